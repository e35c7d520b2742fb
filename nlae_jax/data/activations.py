"""From documents to stored activations: which positions to read, reading them, and the store.

`plan` fixes everything that is written later (positions, splits, batches, row numbers) before any computing is done;
`extract` then goes through the batches in order, reading one while the one before is written, and can stop anywhere.
In the workdir:

    activations/subject.json        which weights were read
    activations/documents.parquet   doc_id, split, token ids
    activations/rows.parquet        document, position            (row = activation)
    activations/vectors             zarr3 [N, d] float32, raw
    activations/next_tokens         zarr3 [N, k] int32, the subject's likeliest continuations
    activations/contexts.parquet    row, text: only where the activations come from a dataset, without token ids
    activations/meta.json           provenance and statistics; its presence says that extraction is complete
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import tensorstore as ts

from nlae_jax import hosts
from nlae_jax.config import Config, ExtractConfig, SplitConfig
from nlae_jax.data.corpus import Document
from nlae_jax.errors import UserError
from nlae_jax.files import AnyPath, is_remote, kvstore, read_json, read_parquet, write_json, write_parquet
from nlae_jax.lm.tokens import begin_ids, check_ids, text_ids

SPLITS = tuple(field.name for field in dataclasses.fields(SplitConfig))

# Numbers of tokens that documents are padded to: one compilation each, at most a quarter more than is needed.
_WIDTHS = tuple(quarter << octave for octave in range(12) for quarter in (64, 80, 96, 112))

_CHUNK_ROWS = 512

NUM_NEXT_TOKENS = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be read. Rows are ordered by document, positions ascending within one.

    `doc_ids`, `ids` and `split` (index into SPLITS) are per document; `document` and `position` per row.
    """

    doc_ids: list[str]
    ids: list[np.ndarray]
    split: np.ndarray
    document: np.ndarray
    position: np.ndarray

    def rows_of(self, split: str) -> np.ndarray:
        """The row numbers of a split, ascending."""
        return np.flatnonzero(self.split[self.document] == SPLITS.index(split))


def plan(
    documents: Sequence[Document],
    tokenizer: Any,
    config: Config,
    given: Mapping[str, Collection[int]] = MappingProxyType({}),
    vocab_size: int = np.iinfo(np.int32).max,
) -> Plan:
    """Draws positions per document from an RNG keyed by (seed, doc_id) and splits by document.

    `given` are the positions of documents that are read nowhere else, by doc_id. Documents are ordered by length, so
    that batches pad little. Raises UserError where a split stays empty, or a document holds a token that the subject's
    `vocab_size` embeddings do not reach.
    """
    extract, begin = config.extract, begin_ids(tokenizer)
    special = np.array(sorted(tokenizer.all_special_ids), np.int32)
    chosen: list[tuple[Document, np.ndarray, np.ndarray]] = []
    for document in documents:
        whole = text_ids(tokenizer, document.text, begin)
        ids = np.array(whole[: extract.max_tokens], np.int32)
        check_ids(ids, vocab_size, tokenizer, f"corpus: document {document.doc_id}")
        if document.doc_id in given:
            positions = np.array(sorted(given[document.doc_id]), np.int32)
        elif document.at_end:
            positions = np.array([len(ids) - 1] if 1 < len(ids) == len(whole) else [], np.int32)
        else:
            candidates = np.arange(extract.min_position, len(ids))
            candidates = candidates[~np.isin(ids[candidates], special)]
            count = min(extract.positions_per_document, len(candidates))
            positions = _rng(config.seed, document.doc_id).choice(candidates, count, replace=False)
        if len(positions):
            chosen.append((document, ids, np.sort(positions).astype(np.int32)))
    if len(chosen) < len(SPLITS):
        raise UserError(
            f"corpus: {len(chosen)} of {len(documents)} documents are longer than extract.min_position = "
            f"{extract.min_position} tokens; at least {len(SPLITS)} are needed, one per split"
        )
    chosen.sort(key=lambda entry: (len(entry[1]), entry[0].doc_id))
    counts = [len(positions) for _, _, positions in chosen]
    return Plan(
        doc_ids=[document.doc_id for document, _, _ in chosen],
        ids=[ids for _, ids, _ in chosen],
        split=_split([document.group for document, _, _ in chosen], config),
        document=np.repeat(np.arange(len(chosen), dtype=np.int32), counts),
        position=np.concatenate([positions for _, _, positions in chosen]),
    )


def _rng(seed: int, doc_id: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{doc_id}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def _split(groups: list[str], config: Config) -> np.ndarray:
    """Each document's split: groups in the order of a keyed hash, cut at the shares; every split gets one."""
    names = sorted(set(groups), key=lambda group: hashlib.sha256(f"{config.seed}:{group}".encode()).digest())
    shares = np.array([getattr(config.split, name) for name in SPLITS])
    counts = np.maximum(1, np.floor(shares * len(names)).astype(int))
    counts[np.argmax(counts)] += len(names) - counts.sum()
    splits = dict(zip(names, np.repeat(np.arange(len(SPLITS), dtype=np.int8), counts).tolist(), strict=True))
    return np.array([splits[group] for group in groups], np.int8)


@dataclasses.dataclass(frozen=True)
class ReadBatch:
    """Documents padded to one width: `ids`, `mask` [B, T]; `rows`, `columns` [M] with real entries first.

    The first `count` of M are the plan's rows `start` … `start + count`.
    """

    ids: np.ndarray
    mask: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    start: int
    count: int


def read_batches(plan: Plan, config: ExtractConfig, parts: int = 1) -> Iterator[ReadBatch]:
    """The plan's documents in order, as many in a batch as fit; a batch's shape depends on its width alone.

    The number of documents is divisible by `parts`, and at least that. As documents ascend in length, no other cut
    into batches makes fewer of them.
    """
    first_row = np.searchsorted(plan.document, np.arange(len(plan.ids) + 1))
    widths = [_width(len(ids), config.max_tokens) for ids in plan.ids]
    sizes = {width: max(1, config.batch_tokens // width // parts) * parts for width in set(widths)}
    begin = 0
    while begin < len(plan.ids):
        end = begin + 1
        while end < len(plan.ids) and end - begin < sizes[widths[end]]:
            end += 1
        width = widths[end - 1]
        size = sizes[width]
        ids, mask = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
        mask[end - begin :, 0] = True
        for row, document in enumerate(plan.ids[begin:end]):
            ids[row, : len(document)], mask[row, : len(document)] = document, True
        start, stop = int(first_row[begin]), int(first_row[end])
        rows, columns = (np.zeros(size * config.positions_per_document, np.int32) for _ in range(2))
        rows[: stop - start] = plan.document[start:stop] - begin
        columns[: stop - start] = plan.position[start:stop]
        yield ReadBatch(ids, mask, rows, columns, start, stop - start)
        begin = end


def _width(length: int, max_tokens: int) -> int:
    return min(next((width for width in _WIDTHS if length <= width), max_tokens), max_tokens)


# (ids, mask, rows, columns) -> activations [M, d] float32, likeliest next tokens [M, k] int32
Reader = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[Any, Any]]


def extract(
    directory: AnyPath,
    plan: Plan,
    read: Reader,
    config: ExtractConfig,
    d_model: int,
    num_next: int,
    advance: Callable[[int], None],
    parts: int = 1,
) -> None:
    """Reads every batch not yet read and writes the store; `advance(rows)` is called as rows are passed.

    `read` may return before it has computed: the next batch is asked for before one is waited for, so devices have
    work while the host fetches and writes. Rows count when they are on disk, so a killed run does at most the last
    few batches again. `parts`: of `read_batches`. Each of several processes writes the rows that its devices hold.
    """
    progress = directory / "progress.json"
    done = hosts.by_first(lambda: _begin(directory, progress, (len(plan.position), d_model, num_next)))
    vectors, next_tokens = _arrays(directory, len(plan.position), d_model, num_next)
    ahead: tuple[ReadBatch, tuple[Any, Any]] | None = None
    with _Writer(progress, vectors, next_tokens) as writer:
        for batch in read_batches(plan, config, parts):
            if batch.start + batch.count <= done:
                advance(batch.count)
                continue
            try:
                result = read(batch.ids, batch.mask, batch.rows, batch.columns)
            finally:  # the one before is whole, whatever becomes of this one
                if ahead is not None:
                    writer.put(*ahead)
                    advance(ahead[0].count)
            ahead = batch, result
        if ahead is not None:
            writer.put(*ahead)
            advance(ahead[0].count)


def _begin(directory: AnyPath, progress: AnyPath, sizes: tuple[int, int, int]) -> int:
    """How many rows are on disk; makes the arrays where there are none."""
    done = read_json(progress).get("rows", 0) if progress.exists() else 0
    _arrays(directory, *sizes, create=done == 0)
    return done


def _held(values: Any, count: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Of the first `count` rows of what was read those that this process writes, each of them one process's."""
    if not isinstance(values, jax.Array) or values.is_fully_addressable:
        yield slice(0, count), np.asarray(values)[:count]
        return
    for shard in values.addressable_shards:
        start, stop, _ = shard.index[0].indices(values.shape[0])
        if shard.replica_id == 0 and start < count:
            yield slice(start, min(stop, count)), np.asarray(shard.data)[: count - start]


class _Writer:
    """Writes batches in order, one at a time, while the caller goes on; leaving it waits for the last one.

    One at a time, because rows that share a chunk are merged with what is on disk. In a bucket a chunk's worth of them
    at a time: an object takes one write a second. (Not by the clock: several processes must do the same.)
    """

    def __init__(self, progress: AnyPath, vectors: ts.TensorStore, next_tokens: ts.TensorStore | None) -> None:
        self._progress, self._vectors, self._next_tokens = progress, vectors, next_tokens
        self._writes: list[ts.WriteFutures] = []
        self._begun = False  # whether any process is writing
        self._stop = self._read = 0  # after the last row that is being written, and that was read
        self._held: list[tuple[ts.TensorStore, int, np.ndarray]] = []  # what is to be written, from which row on
        self._least = _CHUNK_ROWS if is_remote(progress) else 1

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or hosts.count() == 1:  # else the others are not here to wait for
            self._settle()
            self._begin()
            self._settle()

    def put(self, batch: ReadBatch, read: tuple[Any, Any]) -> None:
        """Fetches what was read, waits for the batch before to be on disk and begins to write this one."""
        activations = list(_held(read[0], batch.count))
        if not all(np.isfinite(values).all() for _, values in activations):
            raise UserError(f"subject.model: activations of rows {batch.start} and after are not finite")
        likeliest = [] if self._next_tokens is None else list(_held(read[1], batch.count))
        for store, held in ((self._vectors, activations), (self._next_tokens, likeliest)):
            self._held += [(store, batch.start + rows.start, values) for rows, values in held]
        self._read = batch.start + batch.count
        if self._read - self._stop >= self._least:
            self._settle()
            self._begin()

    def _begin(self) -> None:
        """Begins to write what is held: all of it first, so that a chunk is written once."""
        writes = [store[start : start + len(values)].write(values) for store, start, values in self._held]
        for write in writes:
            write.commit.force()
        # Only now: what is counted has been given to be written whole.
        self._writes, self._begun, self._stop, self._held = writes, self._read > self._stop, self._read, []

    def _settle(self) -> None:
        """Waits until what is being written is on disk, everywhere, and counts it."""
        writes, begun, self._writes, self._begun = self._writes, self._begun, [], False
        try:
            for write in writes:
                write.result()
        except BaseException:
            self._held = []  # nothing may be counted that comes after rows that are not there
            raise
        if begun:
            hosts.barrier()
            if hosts.is_first():
                write_json(self._progress, {"rows": self._stop})


def _arrays(
    directory: AnyPath, rows: int, d_model: int, num_next: int, create: bool = False
) -> tuple[ts.TensorStore, ts.TensorStore | None]:
    vectors = open_vectors(directory, rows, d_model, create)
    return vectors, _array(directory / "next_tokens", (rows, num_next), np.int32, create) if num_next else None


def open_vectors(directory: AnyPath, rows: int, d_model: int, create: bool = False) -> ts.TensorStore:
    """The raw activations [rows, d] float32 on disk."""
    return _array(directory / "vectors", (rows, d_model), np.float32, create)


def _array(path: AnyPath, shape: tuple[int, ...], dtype: type, create: bool) -> ts.TensorStore:
    """An array on disk. One that should be there and is not is an error: a new one would read as zeros."""
    try:
        return ts.open(
            {"driver": "zarr3", "kvstore": kvstore(path)},
            open=True,
            create=create,
            dtype=dtype,
            shape=list(shape),
            chunk_layout=ts.ChunkLayout(chunk_shape=[min(_CHUNK_ROWS, shape[0]), shape[1]]) if create else None,
        ).result()
    except ValueError as error:
        if create:
            raise
        raise UserError(f"{path}: missing or damaged ({str(error).splitlines()[0][:120]})") from None


def write_plan(directory: AnyPath, plan: Plan) -> None:
    """documents.parquet and, last, rows.parquet: its presence says that the plan is complete."""
    documents = pa.table(
        {
            "doc_id": plan.doc_ids,
            "split": [SPLITS[i] for i in plan.split],
            "ids": pa.array([ids.tolist() for ids in plan.ids], pa.list_(pa.int32())),
        }
    )
    rows = pa.table({"document": plan.document, "position": plan.position})
    for name, table in (("documents", documents), ("rows", rows)):
        write_parquet(directory / f"{name}.parquet", table)


def read_plan(directory: AnyPath) -> Plan:
    remedy = f"restore it, or delete {directory} to extract again"
    documents, rows = (read_parquet(directory / f"{name}.parquet", remedy) for name in ("documents", "rows"))
    return Plan(
        doc_ids=documents["doc_id"].to_pylist(),
        ids=[np.asarray(ids.values, np.int32) for ids in documents["ids"]],
        split=np.array([SPLITS.index(name) for name in documents["split"].to_pylist()], np.int8),
        document=rows["document"].to_numpy(),
        position=rows["position"].to_numpy(),
    )


class ActivationStore:
    """The finished activations of a workdir. `plan` says what the rows are, `meta` where they come from."""

    def __init__(self, directory: AnyPath) -> None:
        self.plan = read_plan(directory)
        self.meta: dict[str, Any] = read_json(directory / "meta.json")
        rows, num_next = len(self.plan.position), self.meta["num_next_tokens"]
        self._vectors, self._next_tokens = _arrays(directory, rows, self.meta["d_model"], num_next)
        self._contexts = directory / "contexts.parquet"

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Raw activations [len(rows), d] float32, in the order of `rows`."""
        return self._vectors[rows].read().result()

    def next_tokens(self, rows: np.ndarray) -> np.ndarray:
        """Likeliest next tokens [len(rows), k] int32; k is 0 where the describer does not read them."""
        if self._next_tokens is None:
            return np.zeros((len(rows), 0), np.int32)
        return self._next_tokens[rows].read().result()

    def context_ids(self, row: int) -> np.ndarray:
        """The tokens up to and including the row's position; none where the activations come from a dataset."""
        return self.plan.ids[self.plan.document[row]][: self.plan.position[row] + 1]

    @cached_property
    def contexts(self) -> dict[int, str]:
        """Held-out row -> text up to its position, of activations that come from a dataset."""
        if not self._contexts.exists():
            return {}
        table = read_parquet(self._contexts, f"restore it, or delete {self._contexts.parent} to import again")
        return dict(zip(table["row"].to_pylist(), table["text"].to_pylist(), strict=True))


def write_meta(directory: AnyPath, plan: Plan, d_model: int, num_next: int, provenance: dict[str, Any]) -> None:
    """meta.json: provenance, counts, and statistics of the stored vectors, read chunk by chunk."""
    vectors, _ = _arrays(directory, len(plan.position), d_model, num_next)
    norms, mean_direction = np.empty(len(plan.position)), np.zeros(d_model)
    for start in range(0, len(norms), _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, len(norms))
        chunk = vectors[start:stop].read().result().astype(np.float64)
        norm = np.linalg.norm(chunk, axis=1)
        norms[start:stop] = norm
        mean_direction += (chunk / np.maximum(norm, 1e-30)[:, None]).sum(0) / len(norms)
    statistics = {
        "norm_mean": float(norms.mean()),
        "norm_p75": float(np.percentile(norms, 75)),
        "norm_of_mean_direction": float(np.linalg.norm(mean_direction)),
    }
    counts = {
        "num_documents": len(plan.doc_ids),
        "num_activations": len(norms),
        "d_model": d_model,
        "num_next_tokens": num_next,
    }
    write_json(directory / "meta.json", {**provenance, **counts, **statistics})
