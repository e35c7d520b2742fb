"""Imports parquet files in the schema of the PyTorch reference into a workdir. `dataset_writer` writes such files.

Files are read in pieces, so they may be larger than memory. Prompts are used as they are stored: the encoder's must be
the same in every row, and the decoder's are used whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nlae_jax.config import Config, DatasetConfig
from nlae_jax.data.activations import counted, open_vectors
from nlae_jax.data.answers import explanation_of
from nlae_jax.data.index import SPLITS, Index
from nlae_jax.data.parquet import check_batch, opened
from nlae_jax.interop.sidecar import Sidecar, combined, read_sidecar
from nlae_jax.roles.direction import UNUSABLE, unusable_rows
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, is_text, local_path, write_json

# The reference's name of a file -> the split that its rows belong to.
SPLIT_OF = {"av_sft": "encoder_sft", "ar_sft": "decoder_sft", "rl": "rl", "held_out": "held_out"}

VECTOR, INJECT = "activation_vector", "<INJECT>"
TEXT = "detokenized_text_truncated"
RESPONSE = "response"
LAYER = "activation_layer"
_ROWS = 1024  # rows that are read at a time
_MOST_TOKENS = 2**31 - 1  # positions are stored as int32
_CONTEXT_CHARACTERS = 2000  # of a held-out row's text, stored for the report


def dataset_files(config: DatasetConfig) -> dict[str, Path]:
    """Returns the configured files by the reference's names. Raises UserError where one does not exist."""
    files = {
        name: local_path(path, f"config.dataset.{name}") for name, path in dataclasses.asdict(config).items() if path
    }
    for name, path in files.items():
        if not path.is_file():
            raise UserError(f"config.dataset.{name}: {path}: no such file")
    return files


def identities(files: dict[str, Path]) -> dict[str, str]:
    """Returns a hash of each file's size and end, where a parquet file's footer is, to tell other files from it."""
    hashes = {}
    for name, path in files.items():
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - (1 << 16)))
            hashes[name] = hashlib.sha256(f"{size} ".encode() + file.read()).hexdigest()
    return hashes


def check_datasets(config: Config) -> None:
    """Raises UserError where a stage needs a file that is not configured, or where a corpus is configured too."""
    if not any(dataclasses.asdict(config.dataset).values()):
        return
    reasons = {
        "rl": "RL and evaluation take their rows from it",
        "av_sft": "sft.encoder_steps is above 0" if config.sft.encoder_steps else "",
        "ar_sft": "sft.decoder_steps is above 0" if config.sft.decoder_steps else "",
    }
    for name, reason in reasons.items():
        if reason and not getattr(config.dataset, name):
            raise UserError(f"config.dataset.{name}: no file is named, but {reason}")
    if config.corpus.path or config.corpus.hub:
        raise UserError("config.dataset: given together with a corpus; leave out one: --config.corpus.hub= or .path=")


def dataset_sidecar(files: dict[str, Path], d_model: int, layer: int) -> Sidecar:
    """Combines all files' sidecars, with the prompt that the rows hold. Raises UserError where they disagree."""
    sidecars = {name: read_sidecar(path) for name, path in files.items()}
    first = sidecars["rl"]
    scaled = [sidecar for sidecar in sidecars.values() if sidecar.injection_scale is not None]
    for sidecar in scaled:
        if sidecar.injection_scale != scaled[0].injection_scale:
            raise UserError(
                f"{sidecar.path}: extraction.injection_scale is {sidecar.injection_scale or None}; in "
                f"{scaled[0].path} it is {scaled[0].injection_scale or None}"
            )
    for sidecar in sidecars.values():
        if sidecar.d_model != d_model:
            raise UserError(f"{sidecar.path}: extraction.d_model {sidecar.d_model} should be the subject's {d_model}")
        if sidecar.layer not in (None, layer):
            raise UserError(f"{sidecar.path}: extraction.layer_index {sidecar.layer} should be subject.layer = {layer}")
        if (sidecar.marker_id, sidecar.encoder_template) != (first.marker_id, first.encoder_template):
            raise UserError(f"{sidecar.path}: another prompt or injection token than in {first.path}")
        if sidecar.decoder_template and sidecar.decoder_template != (
            first.decoder_template or sidecar.decoder_template
        ):
            raise UserError(f"{sidecar.path}: another decoder's prompt than in {first.path}")
        first = combined(first, sidecar)
    return dataclasses.replace(
        first,
        encoder_template=_stored_prompt(files["rl"]),
        injection_scale=scaled[0].injection_scale if scaled else None,
    )


def check_same_prompt(released: Sidecar, data: Sidecar | None) -> None:
    """Raises UserError where a dataset's rows hold another prompt than a released encoder was trained with."""
    if data is not None and data.encoder_template != released.encoder_template:
        raise UserError(f"{data.path}: the dataset's prompt is not the one that {released.path} was trained with")


def _stored_prompt(path: Path) -> str:
    """Returns the encoder's prompt of the first row, with `{injection_char}` for the slot."""
    for _, batch in _batches(path, ["prompt"]):
        return _encoder_template(path, 0, batch.column("prompt")[0].as_py())
    raise UserError(f"{path}: the file has no rows")


def _encoder_template(path: Path, row: int, messages: Any) -> str:
    """Returns a row's encoder prompt as a template. Raises UserError where it is not one user message with a slot."""
    is_one_message = isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], dict)
    content = messages[0].get("content") if is_one_message and messages[0].get("role") == "user" else None
    if not isinstance(content, str) or content.count(INJECT) != 1:
        raise UserError(f"{path}: row {row}: prompt should be one user message that holds {INJECT} once")
    return content.replace(INJECT, "{injection_char}")


def import_index(files: dict[str, Path], config: Config) -> Index:
    """Makes the index of all files, one file after the other in the order of `SPLIT_OF`.

    Documents have no token ids. Without a file `held_out`, a share (`split.held_out`) of the documents that are only in
    `rl` is held out. Raises UserError that names the file and its column or row.
    """
    columns = {name: _provenance(path, config.subject.layer) for name, path in _ordered(files)}
    doc_ids: list[str] = []
    splits: list[int] = []
    document, position = [], []
    elsewhere = {doc for name, (docs, _) in columns.items() if name != "rl" for doc in docs}
    for name, (docs, positions) in columns.items():
        numbers: dict[str, int] = {}
        for doc in docs:
            numbers.setdefault(doc, len(doc_ids) + len(numbers))
        held_out = set()
        if name == "rl" and "held_out" not in files:
            held_out = _held_out([doc for doc in numbers if doc not in elsewhere], config)
        doc_ids += numbers
        splits += [SPLITS.index("held_out" if doc in held_out else SPLIT_OF[name]) for doc in numbers]
        document.append(np.array([numbers[doc] for doc in docs], np.int32))
        position.append(positions)
    if "held_out" in files:
        _refuse_overlap(files["held_out"], columns)
    return Index(
        doc_ids=doc_ids,
        ids=[np.zeros(0, np.int32)] * len(doc_ids),
        split=np.array(splits, np.int8),
        document=np.concatenate(document),
        position=np.concatenate(position),
        domain=[""] * len(doc_ids),
    )


def _refuse_overlap(path: Path, columns: dict[str, tuple[list[str], np.ndarray]]) -> None:
    """Raises UserError where a held-out document is also trained on. The other files may share documents."""
    trained = {doc for name, (docs, _) in columns.items() if name != "held_out" for doc in docs}
    if shared := trained.intersection(columns["held_out"][0]):
        raise UserError(f"{path}: {len(shared)} of its documents are also trained on, such as {min(shared)!r}")


def _held_out(documents: Sequence[str], config: Config) -> set[str]:
    """Chooses a share of the documents by a keyed hash: at least one, but not all."""
    if len(documents) < 2:
        raise UserError(f"config.dataset.rl: {len(documents)} documents are in it alone; to hold one out takes two")
    ordered = sorted(documents, key=lambda doc: hashlib.sha256(f"{config.seed}:{doc}".encode()).digest())
    return set(ordered[: min(max(1, round(config.split.held_out * len(documents))), len(documents) - 1)])


def _provenance(path: Path, layer: int) -> tuple[list[str], np.ndarray]:
    """Reads each row's document and position. The position is 0 where the file has none."""
    docs: list[str] = []
    positions = []
    for start, batch in _batches(path, ["doc_id"], ["n_raw_tokens", LAYER]):
        docs += read_doc_ids(path, start, batch.column("doc_id"))
        counts = np.ones(len(batch), np.int64)
        if "n_raw_tokens" in batch.schema.names:
            counts = _whole_numbers(path, start, "n_raw_tokens", batch.column("n_raw_tokens"), missing=0)
        if (out_of_range := np.flatnonzero((counts < 0) | (counts > _MOST_TOKENS))).size:
            row = int(out_of_range[0])
            raise UserError(
                f"{path}: row {start + row}: n_raw_tokens is {counts[row]}; it counts a text's tokens from 1"
            )
        positions.append(np.maximum(counts - 1, 0).astype(np.int32))
        check_layers(path, start, batch, layer)
    if not docs:
        raise UserError(f"{path}: the file has no rows")
    return docs, np.concatenate(positions)


def check_layers(path: Path, start: int, batch: pa.RecordBatch, layer: int, owner: str = "subject.layer") -> None:
    """Raises UserError that names the first row whose activation is of another block than `layer`.

    A file without the column passes. `owner` names, in the message, what has that layer.
    """
    if LAYER not in batch.schema.names:
        return
    layers = _whole_numbers(path, start, LAYER, batch.column(LAYER), missing=layer)
    if (differing := np.flatnonzero(layers != layer)).size:
        row = int(differing[0])
        raise UserError(f"{path}: row {start + row}: {LAYER} is {layers[row]}; {owner} is {layer}")


def read_doc_ids(path: Path, start: int, column: pa.Array) -> list[str]:
    """Reads the names of documents. Numbers become text. Raises UserError for nulls and other types."""
    if column.null_count:
        row = start + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"{path}: row {row}: doc_id is null; splits are by document")
    if not (is_text(column.type) or pa.types.is_integer(column.type)):
        raise UserError(f"{path}: the column doc_id should hold strings; it is {column.type}")
    return list(map(str, column.to_pylist()))


def _whole_numbers(path: Path, start: int, name: str, column: pa.Array, missing: int) -> np.ndarray:
    """Reads a column as [rows] int64, with `missing` for nulls.

    Columns of floats are accepted, because some writers turn whole numbers into floats where one is missing. Raises
    UserError that names the first row whose value is not a whole number.
    """
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise UserError(f"{path}: the column {name} should hold whole numbers; it is {column.type}")
    floats = column.to_numpy(zero_copy_only=False).astype(np.float64)
    values = np.where(column.is_null().to_numpy(zero_copy_only=False), missing, floats)
    if (fractional := np.flatnonzero(~((np.abs(values) < 2**53) & (values == np.round(values))))).size:
        row = int(fractional[0])
        raise UserError(f"{path}: row {start + row}: {name} is {column[row].as_py()}; it should be a whole number")
    return values.astype(np.int64)


def import_texts(files: dict[str, Path], index: Index, sidecar: Sidecar) -> tuple[pa.Table, pa.Table, int]:
    """Reads the descriptions (row, description) and the contexts of held-out rows (row, text).

    The third result is the number of responses without tags, which have no description. The description of an `av_sft`
    row stands between its last tags outside of thinking; that of an `ar_sft` row is its whole prompt. Raises UserError
    where a prompt differs from the others.
    """
    described: list[tuple[int, str]] = []
    contexts: list[tuple[int, str]] = []
    held_out, dropped, first = set(index.rows_of("held_out").tolist()), 0, 0
    for name, path in _ordered(files):
        columns = ["prompt", *([RESPONSE] if name == "av_sft" else [])]
        optional = [TEXT] if SPLIT_OF[name] in ("rl", "held_out") else []
        for start, batch in _batches(path, columns, optional):
            for number, row in enumerate(batch.to_pylist(), start):
                prompt = row["prompt"]
                if name == "ar_sft":
                    _check_decoder_prompt(path, number, prompt, sidecar)
                    described.append((first + number, prompt))
                elif _encoder_template(path, number, prompt) != sidecar.encoder_template:
                    raise UserError(
                        f"{path}: row {number}: another prompt than that of {sidecar.path}; it should be the same"
                    )
                if name == "av_sft":
                    text = explanation_of(_text(path, number, RESPONSE, row[RESPONSE]))
                    dropped += text is None
                    described += [(first + number, text)] if text else []
                if first + number in held_out and (text := _text(path, number, TEXT, row.get(TEXT))):
                    contexts.append((first + number, text[-_CONTEXT_CHARACTERS:]))
        first += _num_rows(path)
    return _texts(described, "description"), _texts(contexts, "text"), dropped


def _text(path: Path, row: int, name: str, value: Any) -> str:
    """Returns a text of a row, "" for null. Raises UserError where the value is not a string."""
    if not isinstance(value, str | None):
        raise UserError(f"{path}: row {row}: {name} should be a string; it is {type(value).__name__}")
    return value or ""


def _check_decoder_prompt(path: Path, row: int, prompt: Any, sidecar: Sidecar) -> None:
    """Raises UserError where a prompt is not the sidecar's decoder template with an explanation in it.

    The prompt itself is used as it is, but later the decoder reads other explanations in the sidecar's template.
    """
    before, _, after = (sidecar.decoder_template or "{explanation}").partition("{explanation}")
    if not (isinstance(prompt, str) and prompt.startswith(before) and prompt.endswith(after)):
        raise UserError(
            f"{path}: row {row}: prompt should be the text of prompt_templates.ar with an explanation in it"
        )


def _texts(rows: list[tuple[int, str]], name: str) -> pa.Table:
    """Makes a table of row numbers and texts."""
    return pa.table(
        {"row": pa.array([r for r, _ in rows], pa.int64()), name: pa.array([t for _, t in rows], pa.string())}
    )


def import_vectors(
    directory: AnyPath, files: dict[str, Path], rows: int, d_model: int, advance: Callable[[int], None]
) -> None:
    """Copies the activations into the workdir's array, which can be read in any order. Resumes where it stopped."""
    progress = directory / "progress.json"
    copied_batches = counted(progress, "batches", rows)
    vectors = open_vectors(directory, rows, d_model, create=copied_batches == 0)
    first, number = 0, 0
    for _, path in _ordered(files):
        for start, batch in _batches(path, [VECTOR]):
            if number >= copied_batches:
                values = read_vectors(path, start, batch.column(VECTOR), d_model)
                vectors[first + start : first + start + len(values)].write(values).result()
                write_json(progress, {"batches": number + 1})
            number += 1
            advance(len(batch))
        first += _num_rows(path)


def read_vectors(path: Path, start: int, column: pa.Array, d_model: int) -> np.ndarray:
    """Reads a column of lists as [rows, d] float32.

    Raises UserError that names the first row that does not hold d numbers that can be computed with.
    """
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    kind = column.type
    if column.null_count:
        row = start + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"{path}: row {row}: {VECTOR} is null")
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))):
        raise UserError(f"{path}: the column {VECTOR} should hold lists of float32; it is {kind}")
    if pa.types.is_fixed_size_list(kind):
        lengths = np.full(len(column), kind.list_size)
    else:
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    if (bad_rows := np.flatnonzero(lengths != d_model)).size:
        row = int(bad_rows[0])
        raise UserError(
            f"{path}: row {start + row}: {VECTOR} has {lengths[row]} numbers; the subject's width is {d_model}"
        )
    with np.errstate(over="ignore"):  # numbers too large for float32 become infinite, which is checked below
        values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, d_model)
    if (bad_rows := unusable_rows(values)).size:
        raise UserError(f"{path}: row {start + int(bad_rows[0])}: {VECTOR} has {UNUSABLE}")
    return values


def _ordered(files: dict[str, Path]) -> list[tuple[str, Path]]:
    return [(name, files[name]) for name in SPLIT_OF if name in files]


def _batches(path: Path, columns: list[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields (number of the first row, batch) through a file. Raises UserError that names a missing column."""
    with opened(path) as file:
        present = file.schema_arrow.names
        for column in columns:
            if column not in present:
                raise UserError(f"{path}: no column {column!r}; there are {', '.join(map(repr, present[:12]))}")
        start = 0
        for batch in file.iter_batches(_ROWS, columns=[*columns, *(c for c in optional if c in present)]):
            check_batch(path, start, batch)
            yield start, batch
            start += len(batch)


def _num_rows(path: Path) -> int:
    with opened(path) as file:
        return file.metadata.num_rows
