"""Answers that were paid for, kept so that nobody is asked twice: in the workdir, wherever that is.

A directory of answers holds parts, `part-00000-3f9c2a81.jsonl`, of one JSON object a line: `key` tells what was asked,
`answer` is the text that came back, or null where an earlier answer is taken back. Later lines count. A part is written
by one process and never added to by another, so a killed process leaves at most one torn line, the last of its own
part, and two processes never write into each other's. The same layout serves a directory here and a bucket, so a
workdir keeps its answers when it is moved from one to the other.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

from nlae_jax.runtime import world
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, children, is_remote, upload
from nlae_jax.runtime.progress import warn

T = TypeVar("T")

# What a machine that is switched off, or a process killed while it writes to a bucket, may take with it.
SYNC_SECONDS = 10.0
SYNC_ANSWERS = 256

_PART = re.compile(r"part-(\d+)[-\w]*\.jsonl")
_PART_BYTES = 4_000_000  # of an object that is written anew every few seconds until it is as long as this


class AnswerCache:
    """Answers to the questions of one `identity`. A context manager: left, all are stored and files are closed.

    In a directory here an answer is in its file when `put` returns, and survives the process. In a bucket it is held
    until `sync`, because nothing can be added to an object. Safe for threads and for processes.
    """

    def __init__(self, directory: AnyPath, *identity: object, shared: Path | None = None) -> None:
        """`identity`: whatever besides the text decides what is answered (provider, model, instruction, length).

        `shared`: a second directory, which all workdirs of this machine read and write: what one of them has asked, the
        others need not. An answer that is found there is copied into `directory`.
        """
        self._directory, self._shared = directory, shared
        self._identity = json.dumps([str(part) for part in identity])
        self._writers: list[_Writer] = [_writer(directory)]
        if shared is not None:
            self._writers.append(_Lenient(_File(shared)))
        self._put_since, self._due = 0, time.monotonic() + SYNC_SECONDS

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.sync(at_once=True)
            for writer in self._writers:
                writer.close()
        except Exception as problem:
            if error is None:
                raise
            # The error that ended the run is the one to report, but what is lost with it must be said.
            warn(f"{self._directory}: the last answers could not be stored ({problem})")

    def get(self, text: str) -> str | None:
        """The stored answer, or None; a damaged line counts as none."""
        return self.lookup([text], str).get(text)

    def lookup(self, texts: Iterable[str], read: Callable[[str], T]) -> dict[str, T]:
        """Those of the texts that have an answer -> what `read` makes of it. Reads every part once.

        Raises UserError where a part of the workdir's cannot be read: its answers would be paid for again.
        """
        asked = {self._key(text): text for text in texts}
        found = _read(self._directory, asked, read)
        missing = {key: text for key, text in asked.items() if key not in found}
        if self._shared is not None and missing:
            elsewhere = _read(self._shared, missing, str, lenient=True)
            for key, answer in elsewhere.items():
                self._writers[0].append(_line(key, answer))
            self._put_since += len(elsewhere)
            found |= {key: read(answer) for key, answer in elsewhere.items()}
        return {text: found[key] for key, text in asked.items() if key in found}

    def put(self, text: str, answer: str) -> None:
        """Records an answer. Raises UserError where that is not possible."""
        self._record(text, answer)

    def withdraw(self, texts: Iterable[str]) -> None:
        """Forgets the answers to these texts."""
        for text in texts:
            self._record(text, None)

    def sync(self, at_once: bool = False) -> None:
        """Makes what was put outlive this machine; called often, it does so every `SYNC_SECONDS` or `SYNC_ANSWERS`.

        Not thread-safe; `put` may go on meanwhile.
        """
        if not at_once and self._put_since < SYNC_ANSWERS and time.monotonic() < self._due:
            return
        self._put_since, self._due = 0, time.monotonic() + SYNC_SECONDS
        for writer in self._writers:
            writer.sync()

    def _record(self, text: str, answer: str | None) -> None:
        if not world.is_first():  # where several compute the answers, all have the same
            return
        line = _line(self._key(text), answer)
        for writer in self._writers:
            writer.append(line)
        self._put_since += 1

    def _key(self, text: str) -> str:
        return hashlib.sha256(f"{self._identity}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()


def _line(key: str, answer: str | None) -> bytes:
    return (json.dumps({"key": key, "answer": answer}) + "\n").encode("ascii")


# --- reading


def _read(
    directory: AnyPath, wanted: Mapping[str, object], read: Callable[[str], T], lenient: bool = False
) -> dict[str, T]:
    """The newest answer of each wanted key. `lenient`: what this user may not read is passed over."""
    found: dict[str, T] = {}
    for _, path in sorted(_parts(directory), key=lambda part: (part[0], part[1].name)):
        try:
            for key, answer in _answers(path, quiet=lenient):
                if key in wanted:
                    found.pop(key, None)
                    if answer is not None:
                        found[key] = read(answer)
        except OSError as error:
            if not lenient:
                raise UserError(f"{path}: answers cannot be read ({error.strerror or error})") from None
    return found


def _parts(directory: AnyPath) -> Iterator[tuple[int, AnyPath]]:
    for path in children(directory):
        if match := _PART.fullmatch(path.name):
            yield int(match[1]), path


def _answers(path: AnyPath, quiet: bool) -> Iterator[tuple[str, str | None]]:
    """(key, answer) of each whole line. The last one may be torn; another that is damaged is told of."""
    damaged, torn = 0, False
    with path.open("rb") as file:
        for line in file:
            damaged += torn
            try:
                record = json.loads(line)
                key, answer = record["key"], record["answer"]
            except (ValueError, LookupError, TypeError, RecursionError):
                key, answer = None, None
            torn = not (isinstance(key, str) and isinstance(answer, str | None))
            if not torn:
                yield key, answer
    if damaged and not quiet:
        warn(f"{path}: {damaged} damaged lines; what they answered is asked again")


# --- writing


class _Writer(Protocol):
    """What writes a part. `close` gives up nothing: what is added after it begins another part."""

    def append(self, line: bytes) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


def _writer(directory: AnyPath) -> _Writer:
    return _Objects(directory) if is_remote(directory) else _File(Path(directory))


def _new_part(directory: AnyPath) -> tuple[int, str]:
    """Number and mark of a part that is to be read after those that are there; the mark is no other process's."""
    return 1 + max((number for number, _ in _parts(directory)), default=-1), uuid.uuid4().hex[:8]


def _name(number: int, mark: str) -> str:
    return f"part-{number:05}-{mark}.jsonl"


class _File:
    """A part in a directory here, made with the first line. Only its owner may read it: texts may be private."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: io.FileIO | None = None
        self._lock = threading.Lock()

    def append(self, line: bytes) -> None:
        try:
            with self._lock:
                self._file = self._file or self._open()
                end = os.fstat(self._file.fileno()).st_size
                if self._file.write(line) != len(line):  # the disk filled up: what follows must not join it
                    self._file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(f"{self._directory}: an answer cannot be stored: {error.strerror}") from None

    def _open(self) -> io.FileIO:
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        path = self._directory / _name(*_new_part(self._directory))
        return io.FileIO(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600), "a")

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            file.close()


class _Lenient:
    """A part that is good to have: where it cannot be written, that is said once, and the run goes on."""

    def __init__(self, writer: _Writer) -> None:
        self._writer: _Writer | None = writer

    def append(self, line: bytes) -> None:
        self._try(lambda writer: writer.append(line))

    def sync(self) -> None:
        self._try(lambda writer: writer.sync())

    def close(self) -> None:
        self._try(lambda writer: writer.close())

    def _try(self, act: Callable[[_Writer], None]) -> None:
        if self._writer is None:
            return
        try:
            act(self._writer)
        except (OSError, UserError) as error:
            self._writer = None
            warn(f"{error}; other workdirs will not find it")


class _Objects:
    """Parts in a bucket: each is written anew, with what was added, until it is long enough and the next one begins."""

    def __init__(self, directory: AnyPath) -> None:
        self._directory = directory
        self._part: tuple[int, str] | None = None
        self._buffer, self._written = bytearray(), 0
        self._lock = threading.Lock()

    def append(self, line: bytes) -> None:
        with self._lock:
            self._buffer += line

    def sync(self) -> None:
        with self._lock:
            data = bytes(self._buffer)
        if len(data) == self._written:
            return
        if self._part is None:
            self._part = _new_part(self._directory)
        upload(self._directory / _name(*self._part), data)
        self._written = len(data)
        if len(data) >= _PART_BYTES:
            number, mark = self._part
            with self._lock:
                # In this order: interrupted in between, lines are written twice rather than never.
                self._part, self._written = (number + 1, mark), 0
                del self._buffer[: len(data)]

    def close(self) -> None:
        """Nothing is open between two writings."""
