"""Work on many rows that is kept on disk part by part: what is done once is not done again."""

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

_MOST_BYTES = 1 << 30  # of one part
_SECONDS = "seconds"  # the column of what a part took
_TEXT = "text:"  # begins the name of a column of texts, stored as JSON

# (slice of the rows) -> columns, each an array or a list of texts of so many rows
Compute = Callable[[slice], dict[str, Any]]


class Kept:
    """Parts of the work of one pair on one set of rows, in a directory of their own. `seconds` is what they took."""

    def __init__(self, directory: AnyPath) -> None:
        self._directory = directory
        self.seconds: dict[str, float] = {}

    @property
    def begun(self) -> bool:
        """Whether anything of this work may be on disk."""
        return self._directory.exists()

    def run(
        self, name: str, count: int, batch: int, compute: Compute, unit: str = "activation", of: Any = None
    ) -> dict[str, Any]:
        """`compute` of the rows 0 … count in slices of `batch`, joined; parts that are on disk are read.

        `of` is what they are computed from, an array or a list of texts, where the directory does not tell it from
        other work already: another version of this program may cut or pair texts in another way.
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
