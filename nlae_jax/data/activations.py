"""Reads the activations that an index names, and stores them.

`extract` goes through the index's documents in batches. It reads one batch while the batch before is written, and can
stop anywhere. The files in the workdir:

    activations/subject.json        identity of the weights that were read
    activations/documents.parquet   doc_id, split, token ids, domain
    activations/rows.parquet        document, position            (row = activation)
    activations/vectors             zarr3 [N, d] float32, raw, in shards: see `_array`
    activations/next_tokens         zarr3 [N, k] int32, the subject's likeliest continuations
    activations/contexts.parquet    row, text: only where the activations come from a dataset, without token ids
    activations/meta.json           provenance and statistics; its presence says that extraction is complete
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from nlae_jax.config import ExtractConfig
from nlae_jax.data.index import Index, read_index
from nlae_jax.roles.direction import UNUSABLE, unusable_rows
from nlae_jax.runtime import processes, supervision, world
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, kvstore, read_fields, read_parquet, write_json
from nlae_jax.runtime.progress import warn

# Documents are padded to one of these numbers of tokens. Each is compiled once, and padding adds at most a quarter.
_WIDTHS = tuple(quarter << octave for octave in range(12) for quarter in (64, 80, 96, 112))

# A shard is one file or object of an array and is written whole. Its index, 16 bytes a chunk, is read once.
SHARD_ROWS = 512
# A chunk is the part of a shard that can be read alone: one row, or several short rows of this many bytes together.
_CHUNK_BYTES = 2048
# While a store is read, this many bytes of shards' indexes and chunks stay in memory.
_CACHE_BYTES = 64 << 20

# Rows that do not fill a shard yet are written after this time, so that a killed run has to read only these again.
_UNWRITTEN_SECONDS = 10.0

# This many of the subject's likeliest next tokens are stored, for describers that read them.
NUM_NEXT_TOKENS = 3


@dataclasses.dataclass(frozen=True)
class ReadBatch:
    """B documents padded to one width T, and the M places in them that are read.

    The first `count` places are the index's rows from `start` on; the others are padding.
    """

    ids: np.ndarray  # [B, T] int32
    mask: np.ndarray  # [B, T] bool
    rows: np.ndarray  # [M] int32: the place's document in the batch
    columns: np.ndarray  # [M] int32: its position in the document
    start: int
    count: int


def read_batches(index: Index, config: ExtractConfig, parts: int = 1) -> Iterator[ReadBatch]:
    """Yields the index's documents in order, as many in a batch as fit. A batch's shape depends only on its width.

    A batch's number of documents is a multiple of `parts`. Documents are ordered by length, so no other division gives
    fewer batches.
    """
    first_row = np.searchsorted(index.document, np.arange(len(index.ids) + 1))
    widths = [_width(len(ids), config.max_tokens) for ids in index.ids]
    sizes = {width: max(1, config.batch_tokens // width // parts) * parts for width in set(widths)}
    begin = 0
    while begin < len(index.ids):
        end = begin + 1
        while end < len(index.ids) and end - begin < sizes[widths[end]]:
            end += 1
        width = widths[end - 1]
        size = sizes[width]
        ids, mask = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
        mask[end - begin :, 0] = True
        for row, document in enumerate(index.ids[begin:end]):
            ids[row, : len(document)], mask[row, : len(document)] = document, True
        start, stop = int(first_row[begin]), int(first_row[end])
        rows, columns = (np.zeros(size * config.positions_per_document, np.int32) for _ in range(2))
        rows[: stop - start] = index.document[start:stop] - begin
        columns[: stop - start] = index.position[start:stop]
        yield ReadBatch(ids, mask, rows, columns, start, stop - start)
        begin = end


def _width(length: int, max_tokens: int) -> int:
    """Returns the number of tokens that a document of `length` tokens is padded to."""
    return min(next((width for width in _WIDTHS if length <= width), max_tokens), max_tokens)


_CONTEXTS = {"row": "whole numbers", "text": "texts"}

# Remedies for damaged files. What they do not name is kept: descriptions, and the answers that were paid for.
_ANEW = "delete meta.json and progress.json beside it to extract again"
IMPORT_ANEW = "delete rows.parquet and meta.json beside it to import again"

# The fields of meta.json that the store reads.
_META = {"num_next_tokens": int, "d_model": int, "norm_p75": float}

# (ids, mask, rows, columns) -> activations [M, d] float32, likeliest next tokens [M, k] int32
Reader = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def extract(
    directory: AnyPath,
    index: Index,
    read: Reader,
    config: ExtractConfig,
    d_model: int,
    num_next: int,
    advance: Callable[[int], None],
    parts: int = 1,
) -> None:
    """Reads every batch that has not been read yet and writes the store. Calls `advance(rows)` as rows are passed.

    `read` may return before it has computed. The next batch is begun before a batch's results are fetched, so devices
    have work while the host fetches and writes. Rows count once they are on disk: a killed run reads again the rows of
    its last `_UNWRITTEN_SECONDS`, or its last batch (with several processes, its last shard). `parts` is passed to
    `read_batches`. Each process writes the rows that its devices hold.
    """
    progress = directory / "progress.json"
    sizes = len(index.position), d_model, num_next
    done = processes.by_first(lambda: _begin(directory, progress, sizes))
    pending: tuple[ReadBatch, tuple[Any, Any]] | None = None
    with _Writer(progress, done, *_arrays(directory, *sizes, mode="write")) as writer:
        for batch in read_batches(index, config, parts):
            if batch.start + batch.count <= done:
                advance(batch.count)
                continue
            try:
                result = read(batch.ids, batch.mask, batch.rows, batch.columns)
            finally:  # the batch before is complete, even if this one fails
                if pending is not None:
                    writer.put(*pending)
                    advance(pending[0].count)
            pending = batch, result
        if pending is not None:
            writer.put(*pending)
            advance(pending[0].count)


def _begin(directory: AnyPath, progress: AnyPath, sizes: tuple[int, int, int]) -> int:
    """Returns the number of rows on disk. Creates the arrays where there are none."""
    done = counted(progress, "rows", sizes[0])
    _arrays(directory, *sizes, mode="write" if done else "create")
    return done


def counted(progress: AnyPath, name: str, most: int) -> int:
    """Reads the count `name` from progress.json; 0 without the file.

    Raises UserError for a count that is not from 0 to `most`.
    """
    count = read_fields(progress, {name: int})[name] if progress.exists() else 0
    if not 0 <= count <= most:
        raise UserError(f"{progress}: {name} is {count}; it should be from 0 to {most}. Delete it to begin anew")
    return count


def _local_rows(values_MxW: Any, count: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (slice, values) for those of the first `count` rows that this process must write.

    No row is yielded by two processes.
    """
    if not isinstance(values_MxW, jax.Array) or values_MxW.is_fully_addressable:
        yield slice(0, count), np.asarray(values_MxW)[:count]
        return
    for shard in values_MxW.addressable_shards:
        start, stop, _ = shard.index[0].indices(values_MxW.shape[0])
        if shard.replica_id == 0 and start < count:
            yield slice(start, min(stop, count)), np.asarray(shard.data)[: count - start]


class _Writer:
    """Writes batches in order while the caller goes on. Leaving the context waits for the last one.

    Rows stay in memory until they fill a shard, so that each file or object is written once. A single process also
    writes part of a shard that it has not filled within `_UNWRITTEN_SECONDS`. Several processes decide by the number of
    rows alone, because they must all do the same. There is one write at a time, because rows of a shard that is partly
    written are merged with those on disk.
    """

    def __init__(
        self, progress: AnyPath, done: int, vectors: ts.TensorStore, next_tokens: ts.TensorStore | None
    ) -> None:
        self._progress, self._vectors, self._next_tokens = progress, vectors, next_tokens
        self._write: ts.Future | None = None
        self._is_writing = False  # whether any process is writing
        self._stop = self._read = done  # the row after the last one being written, and after the last one read
        self._unwritten: list[tuple[ts.TensorStore, int, np.ndarray]] = []  # (array, number of the first row, rows)
        self._written_at = time.monotonic()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        together = kind is None or issubclass(kind, supervision.Preempted)  # raised by all, at the same batch
        if together or world.count() == 1:  # after an error of its own a process cannot wait for the others
            self._settle()
            self._begin(self._read)
            self._settle()

    def put(self, batch: ReadBatch, read: tuple[Any, Any]) -> None:
        """Fetches a batch's results. Where they fill a shard, waits for the write before and begins the next one.

        Raises UserError where an activation cannot be computed with.
        """
        activations = list(_local_rows(read[0], batch.count))
        if any(unusable_rows(values).size for _, values in activations):
            raise UserError(
                f"subject.model: activations of rows {batch.start} and after have {UNUSABLE}; check the model's "
                "files, or set subject.dtype=float32"
            )
        parts = [(self._vectors, activations)]
        if self._next_tokens is not None:
            parts.append((self._next_tokens, list(_local_rows(read[1], batch.count))))
        for store, slices in parts:
            for rows, values in slices:
                start = batch.start + rows.start
                on_disk = max(0, self._stop - start)  # more than 0 where an earlier run stopped within this batch
                if on_disk < len(values):
                    self._unwritten.append((store, start + on_disk, values[on_disk:]))
        self._read = batch.start + batch.count
        writable = self._read // SHARD_ROWS * SHARD_ROWS
        if world.count() == 1 and time.monotonic() - self._written_at >= _UNWRITTEN_SECONDS:
            writable = self._read
        if writable > self._stop:
            self._settle()
            self._begin(writable)

    def _begin(self, stop: int) -> None:
        """Begins to write the rows before `stop`, in one transaction, so that a shard is written once."""
        transaction, later = ts.Transaction(), []
        for store, start, values in self._unwritten:
            count = min(max(0, stop - start), len(values))
            if count:
                store.with_transaction(transaction)[start : start + count].write(values[:count]).copy.result()
            if count < len(values):
                later.append((store, start + count, values[count:]))
        # Assigned last and together: only rows that have all been handed to the write may be counted.
        self._write, self._is_writing, self._stop, self._unwritten = (
            transaction.commit_async(),
            stop > self._stop,
            stop,
            later,
        )
        self._written_at = time.monotonic()

    def _settle(self) -> None:
        """Waits until all processes have their rows on disk, and counts them in progress.json."""
        write, is_writing, self._write, self._is_writing = self._write, self._is_writing, None, False
        try:
            if write is not None:
                write.result()
        except BaseException:
            self._unwritten = []  # later rows must not be counted: the rows before them are not on disk
            raise
        if is_writing:
            processes.barrier()
            if world.is_first():
                write_json(self._progress, {"rows": self._stop})


def _arrays(
    directory: AnyPath, rows: int, d_model: int, num_next: int, mode: str = "read"
) -> tuple[ts.TensorStore, ts.TensorStore | None]:
    vectors = _array(directory / "vectors", (rows, d_model), np.float32, mode)
    return vectors, _array(directory / "next_tokens", (rows, num_next), np.int32, mode) if num_next else None


def open_vectors(directory: AnyPath, rows: int, d_model: int, create: bool = False) -> ts.TensorStore:
    """Opens the raw activations [rows, d] float32. With `create` it makes a new array, in the place of any other."""
    return _array(directory / "vectors", (rows, d_model), np.float32, "create" if create else "read")


def _array(path: AnyPath, shape: tuple[int, int], dtype: type, mode: str) -> ts.TensorStore:
    """Opens an array [rows, width] on disk to "read" or to "write"; "create" makes a new one in the place of any other.

    It consists of shards of `SHARD_ROWS` rows, one file or object each, whose chunks can be read alone. Chunks and
    their index carry a CRC-32C. Reading rows that were never written, or are gone, is an error and does not give zeros.
    Raises UserError where there is no such array. Arrays of older runs, in plain chunks without checksums, can be
    opened too, because an array's metadata describes its layout.
    """
    spec: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": kvstore(path),
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
        # An array that is opened to be read does not change any more.
        "recheck_cached_data": "open" if mode == "read" else True,
    }
    if mode == "create":
        spec |= {"create": True, "delete_existing": True, "metadata": _metadata(shape, dtype)}
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES if mode == "read" else 0}})
    try:
        return ts.open(spec, open=mode != "create", dtype=dtype, shape=list(shape), context=context).result()
    except ValueError as error:
        if mode == "create":
            raise
        raise UserError(f"{path}: missing or damaged ({_reason(error)}); restore it, or {_ANEW}") from None


def _metadata(shape: tuple[int, int], dtype: type) -> dict[str, Any]:
    """Returns the zarr3 metadata of a new array, which describes its layout."""
    rows, width = shape
    chunk_rows = SHARD_ROWS
    while chunk_rows > 1 and chunk_rows * width * np.dtype(dtype).itemsize > _CHUNK_BYTES:
        chunk_rows //= 2
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [chunk_rows, width], "codecs": checked, "index_codecs": checked}
    return {
        "shape": [rows, width],
        "data_type": np.dtype(dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD_ROWS, width]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:300]


def _rows_of(store: ts.TensorStore, rows: np.ndarray | slice, path: AnyPath) -> np.ndarray:
    """Reads rows. Raises UserError where they are damaged."""
    remedy = f"if it is damaged, restore it, or {_ANEW}"
    try:
        values = store[rows].read().result()
    except ValueError as error:  # tensorstore raises no other kind
        raise UserError(f"{path}: cannot be read ({_reason(error)}); {remedy}") from None
    if values.dtype == np.float32 and not np.isfinite(values).all():
        raise UserError(f"{path}: NaN or infinity among the rows read; {remedy}")
    return values


class ActivationStore:
    """The finished activations of a workdir. `index` has their documents and positions, `meta` their provenance."""

    def __init__(self, directory: AnyPath) -> None:
        self.index = read_index(directory)
        self.meta: dict[str, Any] = read_fields(directory / "meta.json", _META)
        rows, num_next = len(self.index.position), self.meta["num_next_tokens"]
        self._vectors, self._next_tokens = _arrays(directory, rows, self.meta["d_model"], num_next)
        self._directory = directory

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Reads raw activations [len(rows), d] float32, in the order of `rows`. Raises UserError for damaged ones."""
        return _rows_of(self._vectors, rows, self._directory / "vectors")

    def next_tokens(self, rows: np.ndarray) -> np.ndarray:
        """Reads the likeliest next tokens [len(rows), k] int32; k is 0 where extraction did not store them."""
        if self._next_tokens is None:
            return np.zeros((len(rows), 0), np.int32)
        return _rows_of(self._next_tokens, rows, self._directory / "next_tokens")

    def context_ids(self, row: int) -> np.ndarray:
        """Returns the token ids up to and including the row's position; none for activations from a dataset."""
        return self.index.ids[self.index.document[row]][: self.index.position[row] + 1]

    @cached_property
    def contexts(self) -> dict[int, str]:
        """Held-out row -> text up to its position, for activations from a dataset."""
        path = self._directory / "contexts.parquet"
        if not path.exists():
            return {}
        table = read_parquet(path, f"restore it, or {IMPORT_ANEW}", _CONTEXTS)
        return dict(zip(table["row"].to_pylist(), table["text"].to_pylist(), strict=True))


def write_meta(directory: AnyPath, index: Index, d_model: int, num_next: int, provenance: dict[str, Any]) -> None:
    """Writes meta.json: provenance, counts, and statistics of the stored vectors, which are read shard by shard."""
    vectors, _ = _arrays(directory, len(index.position), d_model, num_next)
    norms, mean_direction = np.empty(len(index.position)), np.zeros(d_model)
    for start in range(0, len(norms), SHARD_ROWS):
        stop = min(start + SHARD_ROWS, len(norms))
        shard = _rows_of(vectors, slice(start, stop), directory / "vectors").astype(np.float64)
        norm = np.linalg.norm(shard, axis=1)
        norms[start:stop] = norm
        mean_direction += (shard / np.maximum(norm, 1e-30)[:, None]).sum(0) / len(norms)
    if not norms.any():
        warn(f"{directory / 'vectors'}: every activation is zero; there is nothing to tell them apart by")
    statistics = {
        "norm_mean": float(norms.mean()),
        "norm_p75": float(np.percentile(norms, 75)),
        "norm_of_mean_direction": float(np.linalg.norm(mean_direction)),
    }
    counts = {
        "num_documents": len(index.doc_ids),
        "num_activations": len(norms),
        "d_model": d_model,
        "num_next_tokens": num_next,
    }
    write_json(directory / "meta.json", {**provenance, **counts, **statistics})
