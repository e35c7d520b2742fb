"""Reads parquet files made by other programs. Every problem with a file raises a UserError that names the file."""

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
    """Opens a file to be read in pieces. Inside the context, errors of reading it become UserErrors that name it.

    Pages that have a checksum are checked against it. Reading is buffered: otherwise a column's whole row group, which
    may be the whole file, would be read at once.
    """
    try:
        open_regular(path).close()
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as file:
            yield file
    except (OSError, ValueError, KeyError, MemoryError, pa.ArrowException) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {' '.join(reason.split())[:200]}") from None


def check_batch(path: Path, start: int, batch: pa.RecordBatch) -> None:
    """Raises UserError that names the first row with values that do not fit their type, such as text that is not UTF-8.

    Arrow does not check this by itself. `start` is the number of the batch's first row.
    """
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        unreadable = _unreadable(batch)
        where = f"rows {start} and after" if unreadable is None else f"row {start + unreadable[0]}: {unreadable[1]}"
        raise UserError(f"{path}: {where}: cannot be read ({' '.join(str(error).split())[:120]})") from None


def _unreadable(batch: pa.RecordBatch) -> tuple[int, str] | None:
    """Returns the first row with a value that cannot become a Python value, and its column; None if there is none."""
    for row in range(len(batch)):
        for name in batch.schema.names:
            try:
                batch.column(name)[row].as_py()
            except ValueError:  # also UnicodeDecodeError
                return row, name
    return None
