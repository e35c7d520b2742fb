"""`metrics.jsonl`: one JSON object per step, appended as the run goes and cut back when it resumes.

A row is `{"stage": str, "step": int, ...}`. A run may be killed at any byte. Readers and the next writer therefore
ignore a last line that is not a whole JSON object, as if it had never been written.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, is_remote, plain, read_bytes, upload, write_atomically

# The order in which stages run. Their rows have the same order in the file.
ORDER = ("encoder_sft", "decoder_sft", "rl")


def _row(line: bytes) -> dict[str, Any] | None:
    """Parses one line. Returns None if it is not a whole JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError, MemoryError):  # also UnicodeDecodeError: a cut may fall inside a character
        return None
    return row if isinstance(row, dict) else None


def _read_or_empty(path: AnyPath) -> bytes:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return b""


def _parse(path: AnyPath, data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Splits the file's `data` into (line with its newline, row). Drops blank lines and a torn last line.

    Raises UserError for any other line that is not a JSON object.
    """
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    parsed = []
    for index, (number, line) in enumerate(lines):
        row = _row(line)
        if row is not None:
            parsed.append((line + b"\n", row))
        elif index < len(lines) - 1:
            raise UserError(f"{path}, line {number}: not a JSON object; remove that line")
    return parsed


def _is_after(row: dict[str, Any], step: int) -> bool:
    """Returns whether the row belongs to a step after `step`. A row without a step does not."""
    return isinstance(row.get("step"), int) and row["step"] > step


def read(path: AnyPath) -> list[dict[str, Any]]:
    """Reads the rows of a JSON-lines file in order. A missing file has no rows, and a torn last line is left out.

    Raises UserError for any other line that is not a JSON object: that is damage, not an interrupted write.
    """
    return [row for _, row in _parse(path, _read_or_empty(path))]


class MetricsLog:
    """Appends rows to one `metrics.jsonl`. One process writes; any number may read.

    NaN and infinite values are written as null, because JSON has no such numbers and a reader must not fail on them.

    Objects in a bucket cannot be appended to. There all rows stay in memory and the whole object is written anew: by
    `sync`, before every checkpoint, and in between as often as `_pause` allows, so that readers see the run go on.
    """

    def __init__(self, path: AnyPath) -> None:
        """Opens a new or existing log. A torn last line of an earlier run is removed from the file."""
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._buffer = bytearray(_read_or_empty(path)) if is_remote(path) else None
        self._unwritten, self._due = False, 0.0
        self._keep(lambda row: True)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row and hands it to the operating system before returning.

        Numbers are Python's or have `.item()` (numpy and jax scalars). Floats are written so that reading them gives
        the same float64. Raises ValueError for a row without a string `stage` and an integer `step`.
        """
        clean = {str(key): plain(value) for key, value in row.items()}
        if not isinstance(clean.get("stage"), str) or type(clean.get("step")) is not int:
            raise ValueError(f"a metrics row needs a string 'stage' and an integer 'step', not {dict(row)!r}")
        line = (json.dumps(clean, allow_nan=False) + "\n").encode("ascii")
        if self._buffer is None:
            with self.path.open("ab") as file:
                file.write(line)
            return
        self._buffer += line
        self._unwritten = True
        if time.monotonic() >= self._due:
            self.sync()

    def sync(self) -> None:
        """Writes the rows that are only in memory, if there are any. A log on a local disk has none."""
        if self._buffer is not None and self._unwritten:
            upload(self.path, bytes(self._buffer))
            self._unwritten, self._due = False, time.monotonic() + _pause(len(self._buffer))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with contextlib.suppress(*([Exception] if error is not None else [])):  # that error is the one to report
            self.sync()

    def rewind(self, stage: str, step: int) -> None:
        """Drops the rows of `stage` after `step`, so that a run resumed from that step writes each row once.

        Rows of other stages keep their bytes and their order. The file is replaced in one move.
        """
        self._keep(lambda row: row.get("stage") != stage or not _is_after(row, step))

    def sort(self) -> None:
        """Sorts the rows by their stage's place in `ORDER`. Rows of a stage that ran again were appended at the end."""
        places = {stage: number for number, stage in enumerate(ORDER)}
        self._keep(lambda row: True, lambda row: places.get(str(row.get("stage")), len(places)))

    def _keep(
        self, wanted: Callable[[dict[str, Any]], bool], place: Callable[[dict[str, Any]], int] = lambda row: 0
    ) -> None:
        """Keeps only the whole lines whose row is `wanted`, sorted by `place`. Leaves an unchanged file untouched."""
        before = _read_or_empty(self.path) if self._buffer is None else bytes(self._buffer)
        lines = [(line, row) for line, row in _parse(self.path, before) if wanted(row)]
        data = b"".join(line for line, _ in sorted(lines, key=lambda entry: place(entry[1])))
        if data != before:
            write_atomically(self.path, lambda temporary: temporary.write_bytes(data))
            self._buffer = None if self._buffer is None else bytearray(data)


def _pause(size: int) -> float:
    """Returns the seconds to wait before an object of `size` bytes is written again.

    That is at most one write in ten seconds, and at most 100 kB a second.
    """
    return max(10.0, size / 100_000)
