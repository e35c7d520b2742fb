"""Computes results for many rows part by part, and keeps each part on disk, so that it is never computed twice."""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from nlae_jax.runtime.files import AnyPath, read_bytes, write_atomically
from nlae_jax.runtime.progress import progress, say

_MOST_BYTES = 1 << 30  # larger files of a part are not read
_SECONDS = "seconds"  # the column that holds how long a part took to compute
_TEXT = "text:"  # the prefix of the names of text columns, which are stored as JSON

# Maps a slice of the rows to named columns. A column is an array or a list of texts, with one entry for each row.
Compute = Callable[[slice], dict[str, Any]]


class Kept:
    """The finished parts of one pair's work on one set of rows, in one directory.

    `seconds` says, by name of the work, how long its parts took to compute, in this run and in earlier ones.
    """

    def __init__(self, directory: AnyPath) -> None:
        self._directory = directory
        self.seconds: dict[str, float] = {}

    @property
    def begun(self) -> bool:
        """Whether parts of this work, of the same pair and rows, are on disk."""
        return self._directory.exists()

    def run(
        self, name: str, count: int, batch: int, compute: Compute, unit: str = "activation", of: Any = None
    ) -> dict[str, Any]:
        """Returns the columns of `compute` for the rows from 0 to `count`, joined.

        The rows are computed in slices of `batch` rows. Slices that are on disk are read instead. A damaged file is
        reported and computed again. `unit` is the word that the progress bar uses for a row.

        `of` is the input of the work, an array or a value that JSON can hold. Its hash becomes a part of the
        directory's name. Give it if the input can differ between two runs with the same pair, rows and seed. For
        example, another version of nlae_jax may cut or pair texts in another way.
        """
        parts, directory = [], self._directory / (name if of is None else f"{name}-{_digest(of)}")
        with progress(count, f"eval: {name.replace('_', ' ')}", unit=unit) as bar:
            for start in range(0, count, batch):
                rows = slice(start, min(start + batch, count))
                part = self._part(directory / f"{start:06}.npz", rows, compute)
                self.seconds[name] = self.seconds.get(name, 0.0) + float(part.pop(_SECONDS))
                parts.append(part)
                bar.advance(rows.stop - rows.start)
        return {key: _joined([part[key] for part in parts]) for key in parts[0]} if parts else {}

    def _part(self, path: AnyPath, rows: slice, compute: Compute) -> dict[str, Any]:
        """Reads the part of these rows from `path`, or computes it and writes it there."""
        if path.exists():
            try:
                part = _unpacked(read_bytes(path, _MOST_BYTES))
                if all(len(part[name]) == rows.stop - rows.start for name in part.keys() - {_SECONDS}):
                    float(part[_SECONDS])
                    return part
                say(f"{path}: of another number of rows; made again")
            except (ValueError, TypeError, OSError, KeyError, EOFError, zipfile.BadZipFile):
                say(f"{path}: damaged; made again")
        clock = time.perf_counter()
        part = compute(rows)
        part = {**part, _SECONDS: np.array(time.perf_counter() - clock)}
        data = _packed(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_bytes(data))
        return part


def _digest(of: Any) -> str:
    data = np.ascontiguousarray(of).tobytes() if isinstance(of, np.ndarray) else json.dumps(of).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def _joined(parts: list[Any]) -> Any:
    return [item for part in parts for item in part] if isinstance(parts[0], list) else np.concatenate(parts)


def _packed(columns: dict[str, Any]) -> bytes:
    arrays: dict[str, Any] = {
        (f"{_TEXT}{name}" if isinstance(value, list) else name): (
            np.frombuffer(json.dumps(value).encode(), np.uint8) if isinstance(value, list) else value
        )
        for name, value in columns.items()
    }
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _unpacked(data: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {
            name.removeprefix(_TEXT): json.loads(arrays[name].tobytes()) if name.startswith(_TEXT) else arrays[name]
            for name in arrays.files
        }
