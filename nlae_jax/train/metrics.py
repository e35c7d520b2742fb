"""`metrics.jsonl`: one JSON object per step, appended as the run goes and cut back when it resumes.

A row is `{"stage": str, "step": int, ...}`. A run may be killed at any byte: a last line that is not a
whole JSON object is taken as never written, by the reader and by the next writer alike.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, is_remote, plain, read_bytes, upload, write_atomically

# The order that stages run in, and their rows stand in.
ORDER = ("encoder_sft", "decoder_sft", "rl")


def _row(line: bytes) -> dict[str, Any] | None:
    """The object on one line, or None if the line is not a whole JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError, MemoryError):  # also UnicodeDecodeError: a cut may fall inside a character
        return None
    return row if isinstance(row, dict) else None


def _stored(path: AnyPath) -> bytes:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return b""


def _parse(path: AnyPath, data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Each whole line of the file's `data` (with a newline) and its row; blank lines and a torn last one dropped."""
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    parsed = []
    for index, (number, line) in enumerate(lines):
        row = _row(line)
        if row is not None:
            parsed.append((line + b"\n", row))
        elif index < len(lines) - 1:
            raise UserError(f"{path}, line {number}: not a JSON object; remove that line")
    return parsed


def _beyond(row: dict[str, Any], step: int) -> bool:
    """Whether the row belongs to a later step; a row without a step belongs to none."""
    return isinstance(row.get("step"), int) and row["step"] > step


def read(path: AnyPath) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file in order; no file is no rows, and a torn last line is left out.

    Raises UserError for any other line that is not a JSON object: that is damage, not an interrupted write.
    """
    return [row for _, row in _parse(path, _stored(path))]


class MetricsLog:
    """Appends rows to one `metrics.jsonl`. One process writes; any number may read.

    NaN and infinite values are written as null, since JSON has no such numbers and a reader must not fail on them.

    Nothing can be added to an object. On a bucket all rows are held here and the object is written anew: by `sync`,
    which comes before a checkpoint, and in between so that readers see the run go on, as often as `_pause` says.
    """

    def __init__(self, path: AnyPath) -> None:
        """Opens the log, new or existing; a torn last line of an earlier run is removed from the file."""
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._buffer = bytearray(_stored(path)) if is_remote(path) else None
        self._unwritten, self._due = False, 0.0
        self._keep(lambda row: True)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row and hands it to the operating system before returning.

        Numbers are Python's or anything with `.item()` (numpy and jax scalars); floats are written so that
        reading gives the same float64. Raises ValueError without a string `stage` and an integer `step`.
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
        """Returns when every row so far would outlive this process; in a directory here that is so anyway."""
        if self._buffer is not None and self._unwritten:
            upload(self.path, bytes(self._buffer))
            self._unwritten, self._due = False, time.monotonic() + _pause(len(self._buffer))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with contextlib.suppress(*([Exception] if error is not None else [])):  # that error is the one to report
            self.sync()

    def rewind(self, stage: str, step: int) -> None:
        """Drops the rows of `stage` beyond `step`, so that a run resumed from that step writes each row once.

        Rows of other stages keep their bytes and their order. The file changes in one move, or not at all.
        """
        self._keep(lambda row: row.get("stage") != stage or not _beyond(row, step))

    def sort(self) -> None:
        """Puts the rows in the order of stages, as far as `ORDER` has them: a stage that is done again comes late."""
        place = {stage: number for number, stage in enumerate(ORDER)}
        self._keep(lambda row: True, lambda row: place.get(str(row.get("stage")), len(place)))

    def _keep(
        self, wanted: Callable[[dict[str, Any]], bool], place: Callable[[dict[str, Any]], int] = lambda row: 0
    ) -> None:
        """Leaves only the whole lines whose row is `wanted`, sorted by `place`; does not touch a file that is so."""
        before = _stored(self.path) if self._buffer is None else bytes(self._buffer)
        kept = [(line, row) for line, row in _parse(self.path, before) if wanted(row)]
        data = b"".join(line for line, _ in sorted(kept, key=lambda entry: place(entry[1])))
        if data != before:
            write_atomically(self.path, lambda temporary: temporary.write_bytes(data))
            self._buffer = None if self._buffer is None else bytearray(data)


def _pause(size: int) -> float:
    """Seconds between two writings of an object of so many bytes: at most one in ten seconds, and 100 kB a second."""
    return max(10.0, size / 100_000)
