"""Parquet files of others: whatever is wrong with one is said in one line that names it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import open_regular


@contextlib.contextmanager
def opened(path: Path) -> Iterator[pq.ParquetFile]:
    """A file to be read in pieces. Inside, errors of reading it are UserErrors that name it.

    One of them is a page that is not as its checksum says, where it has one. Buffered: else the whole of a column's row
    group, which may be the whole file, is read at once.
    """
    try:
        open_regular(path).close()
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as file:
            yield file
    except (OSError, ValueError, KeyError, MemoryError, pa.ArrowException) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {' '.join(reason.split())[:200]}") from None


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings, in any of their layouts."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def check_batch(path: Path, start: int, batch: pa.RecordBatch) -> None:
    """Raises UserError naming the first row whose values are not what their type says, such as text that is not UTF-8.

    Arrow itself believes the file. `start` is the number of the batch's first row.
    """
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        found = _unreadable(batch)
        where = f"rows {start} and after" if found is None else f"row {start + found[0]}: {found[1]}"
        raise UserError(f"{path}: {where}: cannot be read ({' '.join(str(error).split())[:120]})") from None


def _unreadable(batch: pa.RecordBatch) -> tuple[int, str] | None:
    """The first row with a value that Python cannot have, and its column."""
    for row in range(len(batch)):
        for name in batch.schema.names:
            try:
                batch.column(name)[row].as_py()
            except ValueError:  # also UnicodeDecodeError
                return row, name
    return None
