"""The index of a run's activations: documents, their splits, and the positions that are read.

It is fixed before anything is computed, and everything that is written later depends on it: splits, batches and row
numbers. A workdir keeps it in `activations/documents.parquet` and `activations/rows.parquet`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from nlae_jax.config import Config, SplitConfig
from nlae_jax.data.corpus import Document
from nlae_jax.lm.tokens import begin_ids, check_ids, text_ids
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, read_parquet, write_parquet
from nlae_jax.runtime.progress import say

SPLITS = tuple(field.name for field in dataclasses.fields(SplitConfig))


@dataclasses.dataclass(frozen=True)
class Index:
    """The documents and positions to read. Rows are ordered by document, and by position within one.

    `doc_ids`, `ids` (token ids, int32), `split` (index into SPLITS) and `domain` (the kind of text, "" where it is not
    known) have one entry per document. `document` (index into the documents) and `position` (from 0) have one per row.
    """

    doc_ids: list[str]
    ids: list[np.ndarray]
    split: np.ndarray
    document: np.ndarray
    position: np.ndarray
    domain: list[str]

    def rows_of(self, split: str) -> np.ndarray:
        """Returns the row numbers of a split, ascending."""
        return np.flatnonzero(self.split[self.document] == SPLITS.index(split))

    def digest(self) -> str:
        """Returns a hash that identifies these documents, splits and rows."""
        digest = hashlib.sha256("\n".join(self.doc_ids).encode("utf-8", "surrogatepass"))
        for array, dtype in ((self.split, np.int8), (self.document, np.int32), (self.position, np.int32)):
            digest.update(np.ascontiguousarray(array, dtype).tobytes())
        return digest.hexdigest()


def make_index(
    documents: Sequence[Document],
    tokenizer: Any,
    config: Config,
    fixed_positions: Mapping[str, Collection[int]] = MappingProxyType({}),
    vocab_size: int = np.iinfo(np.int32).max,
) -> Index:
    """Draws each document's positions from a generator keyed by (seed, doc_id), and splits by document.

    `fixed_positions` maps a doc_id to the only positions at which that document is read. Documents are ordered by
    length, so that batches pad little. Raises UserError where a split stays empty, or a document holds a token beyond
    the subject's `vocab_size` embeddings.
    """
    extract, begin = config.extract, begin_ids(tokenizer)
    special = np.array(sorted(tokenizer.all_special_ids), np.int32)
    chosen: list[tuple[Document, np.ndarray, np.ndarray]] = []
    too_long = 0
    for document in documents:
        all_ids = text_ids(tokenizer, document.text, begin)
        ids = np.array(all_ids[: extract.max_tokens], np.int32)
        check_ids(ids, vocab_size, tokenizer, f"corpus: document {document.doc_id}")
        if document.doc_id in fixed_positions:
            positions = np.array(sorted(fixed_positions[document.doc_id]), np.int32)
        elif document.at_end:
            positions = np.array([len(ids) - 1] if 1 < len(ids) == len(all_ids) else [], np.int32)
        else:
            candidates = np.arange(extract.min_position, len(ids))
            candidates = candidates[~np.isin(ids[candidates], special)]
            count = min(extract.positions_per_document, len(candidates))
            positions = _rng(config.seed, document.doc_id).choice(candidates, count, replace=False)
        if len(positions):
            chosen.append((document, ids, np.sort(positions).astype(np.int32)))
        elif document.at_end and len(all_ids) > len(ids):
            too_long += 1
    cut = f"{too_long} texts read at their ends have more than extract.max_tokens = {extract.max_tokens} tokens"
    if len(chosen) < len(SPLITS):
        raise UserError(
            f"corpus: {len(chosen)} of {len(documents)} documents are longer than extract.min_position = "
            f"{extract.min_position} tokens; at least {len(SPLITS)} are needed, one per split"
            + (f"; {cut}" if too_long else "")
        )
    if too_long:
        say(f"corpus: {cut}; they are left out")
    chosen.sort(key=lambda entry: (len(entry[1]), entry[0].doc_id))
    counts = [len(positions) for _, _, positions in chosen]
    return Index(
        doc_ids=[document.doc_id for document, _, _ in chosen],
        ids=[ids for _, ids, _ in chosen],
        split=_split([document.group for document, _, _ in chosen], config),
        document=np.repeat(np.arange(len(chosen), dtype=np.int32), counts),
        position=np.concatenate([positions for _, _, positions in chosen]),
        domain=[document.domain for document, _, _ in chosen],
    )


def _rng(seed: int, doc_id: str) -> np.random.Generator:
    """Returns a generator whose draws depend only on the seed and the document."""
    digest = hashlib.sha256(f"{seed}:{doc_id}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def _split(groups: list[str], config: Config) -> np.ndarray:
    """Returns each document's split. Groups are ordered by a keyed hash and cut at the shares.

    Every split gets at least one group. Raises UserError where there are too few groups for that.
    """
    names = sorted(set(groups), key=lambda group: hashlib.sha256(f"{config.seed}:{group}".encode()).digest())
    if len(names) < len(SPLITS):
        raise UserError(
            f"corpus: {len(groups)} documents are of {len(names)} passages; at least {len(SPLITS)} are needed, one "
            "per split (the field or column passage says which documents stay in one split)"
        )
    shares = np.array([getattr(config.split, name) for name in SPLITS])
    counts = np.maximum(1, np.floor(shares * len(names)).astype(int))
    counts[np.argmax(counts)] += len(names) - counts.sum()
    splits = dict(zip(names, np.repeat(np.arange(len(SPLITS), dtype=np.int8), counts).tolist(), strict=True))
    return np.array([splits[group] for group in groups], np.int8)


def write_index(directory: AnyPath, index: Index) -> None:
    """Writes documents.parquet and then rows.parquet, whose presence says that the index is complete."""
    starts = np.cumsum([0, *map(len, index.ids)])
    ids = pa.LargeListArray.from_arrays(starts, np.concatenate([*index.ids, np.zeros(0, np.int32)]))
    splits = [SPLITS[i] for i in index.split]
    documents = pa.table({"doc_id": index.doc_ids, "split": splits, "ids": ids, "domain": index.domain})
    rows = pa.table({"document": index.document, "position": index.position})
    for name, table in (("documents", documents), ("rows", rows)):
        write_parquet(directory / f"{name}.parquet", table)


_DOCUMENTS = {"doc_id": "texts", "split": "texts", "ids": "lists of whole numbers"}
_ROWS = {"document": "whole numbers", "position": "whole numbers"}


def read_index(directory: AnyPath) -> Index:
    """Reads the index that `write_index` wrote.

    Raises UserError where a file is missing or damaged, or where the two files do not belong together.
    """
    # Paid answers are in answers/; all else there can be made again.
    remedy = f"restore it, or delete all of {directory} but answers/ to extract again"
    documents = read_parquet(directory / "documents.parquet", remedy, _DOCUMENTS)
    rows = read_parquet(directory / "rows.parquet", remedy, _ROWS)
    try:
        index = Index(
            doc_ids=documents["doc_id"].to_pylist(),
            ids=[ids for chunk in documents["ids"].chunks for ids in _views(chunk)],
            split=np.array([SPLITS.index(name) for name in documents["split"].to_pylist()], np.int8),
            document=rows["document"].to_numpy(),
            position=rows["position"].to_numpy(),
            domain=_domains(documents),
        )
        sound = _is_sound(index)
    except (ValueError, TypeError, AttributeError):  # columns of other types than were written
        sound = False
    if not sound:
        raise UserError(f"{directory / 'rows.parquet'}: does not fit documents.parquet beside it; {remedy}")
    return index


def _domains(documents: pa.Table) -> list[str]:
    """Returns each document's kind of text. It is "" in tables that were written before they had this column."""
    if "domain" not in documents.column_names:
        return [""] * len(documents)
    return [domain if isinstance(domain, str) else "" for domain in documents["domain"].to_pylist()]


def _views(lists: pa.LargeListArray | pa.ListArray) -> list[np.ndarray]:
    """Returns every list of an arrow array as a numpy array, without a copy."""
    starts = lists.offsets.to_numpy()
    values = lists.values.to_numpy().astype(np.int32, copy=False)
    return [values[start:stop] for start, stop in itertools.pairwise(starts)]


def _is_sound(index: Index) -> bool:
    """Returns whether every row is a position of a document.

    Rows of datasets come in any order, and their documents have no token ids.
    """
    document, position = index.document, index.position
    if len(document) == 0 or document.dtype.kind != "i" or position.dtype.kind != "i":
        return False
    if not 0 <= document.min() <= document.max() < len(index.doc_ids) == len(index.ids) or position.min() < 0:
        return False
    lengths = np.array([len(ids) for ids in index.ids])
    return not lengths.any() or bool((np.diff(document) >= 0).all() and (position < lengths[document]).all())
