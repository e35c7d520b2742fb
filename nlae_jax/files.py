"""Small files written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nlae_jax.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a temporary sibling, which then takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys, so that equal values are equal files."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """What `write_json` wrote. Raises UserError where the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not valid JSON; it should be as the run wrote it") from None


def write_parquet(path: Path, table: pa.Table) -> None:
    write_atomically(path, lambda temporary: pq.write_table(table, temporary))


def read_parquet(path: Path, remedy: str) -> pa.Table:
    """A table that this project wrote. Raises UserError with the `remedy` where the file is damaged."""
    try:
        return pq.read_table(path)
    except pa.ArrowException:
        raise UserError(f"{path}: damaged; {remedy}") from None
