"""Stores answers that were paid for in the workdir, local or in a bucket, so that no question is paid for twice.

A directory of answers holds parts such as `part-00000-3f9c2a81.jsonl`, with one JSON object a line. `key` is a hash of
the question, `answer` is the text that came back, or null where an earlier answer is withdrawn. The last line of a key
counts. Only one process writes a part, so a killed process leaves at most one torn line, the last of its part, and two
processes never write into the same file. Local directories and buckets have the same layout, so a workdir keeps its
answers when it is moved from one to the other.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

from nlae_jax.runtime import world
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, children, is_remote, upload
from nlae_jax.runtime.progress import warn

T = TypeVar("T")

# At most the answers of this time or number are lost where a machine is switched off, or a process that writes to a
# bucket is killed.
SYNC_SECONDS = 10.0
SYNC_ANSWERS = 256

_PART = re.compile(r"part-(\d+)[-\w]*\.jsonl")
_PART_BYTES = 4_000_000  # a bucket's part is rewritten every few seconds until it is this long; then the next begins


class AnswerCache:
    """The answers to questions of one `identity`. It is a context manager: leaving it stores all and closes the files.

    In a local directory an answer is in its file when `put` returns, and survives the process. In a bucket it stays in
    memory until `sync`, because objects cannot be appended to. Threads and processes may share a directory.
    """

    def __init__(
        self,
        directory: AnyPath,
        *identity: object,
        shared: Path | None = None,
        others: Iterable[tuple[object, ...]] = (),
    ) -> None:
        """Opens the answers in `directory`.

        `identity` is everything besides the text that decides an answer: provider, model, instruction, length.
        `others` are identities that mean the same: their answers count too. New answers have `identity`.
        `shared` is a second directory, which all workdirs of this machine read and write, so that a question of one
        workdir is not asked again in another. An answer that is found there is copied into `directory`.
        """
        self._directory, self._shared = directory, shared
        self._identities = [json.dumps([str(part) for part in parts]) for parts in (identity, *others)]
        self._writers: list[_Writer] = [_writer(directory)]
        if shared is not None:
            self._writers.append(_OptionalWriter(_FileWriter(shared)))
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
            # The error that ended the run is the one to report, but the user must learn that answers are lost.
            warn(f"{self._directory}: the last answers could not be stored ({problem})")

    def get(self, text: str) -> str | None:
        """Returns the stored answer, or None. A damaged line counts as no answer."""
        return self.lookup([text], str).get(text)

    def lookup(self, texts: Iterable[str], read: Callable[[str], T]) -> dict[str, T]:
        """Returns text -> `read(answer)`, for the texts that have an answer. Reads every part once.

        Raises UserError where a part in the workdir cannot be read: its answers would be paid for again.
        """
        keys = {text: self._keys(text) for text in texts}
        results = _of_texts(keys, _read(self._directory, _all_of(keys), read))
        missing = {text: keys[text] for text in keys if text not in results}
        if self._shared is not None and missing:
            shared_answers = _of_texts(missing, _read(self._shared, _all_of(missing), str, lenient=True))
            for text, answer in shared_answers.items():
                self._writers[0].append(_line(keys[text][0], answer))
            self._put_since += len(shared_answers)
            results |= {text: read(answer) for text, answer in shared_answers.items()}
        return {text: results[text] for text in keys if text in results}

    def put(self, text: str, answer: str) -> None:
        """Records an answer. Raises UserError where it cannot be written."""
        self._record(self._keys(text)[0], answer)

    def withdraw(self, texts: Iterable[str]) -> None:
        """Forgets the answers to these texts."""
        for text in texts:
            for key in self._keys(text):
                self._record(key, None)

    def sync(self, at_once: bool = False) -> None:
        """Stores the answers so far durably, at most every `SYNC_SECONDS` or `SYNC_ANSWERS` unless `at_once`.

        Only one thread may call it at a time. Other threads may call `put` meanwhile.
        """
        if not at_once and self._put_since < SYNC_ANSWERS and time.monotonic() < self._due:
            return
        self._put_since, self._due = 0, time.monotonic() + SYNC_SECONDS
        for writer in self._writers:
            writer.sync()

    def _record(self, key: str, answer: str | None) -> None:
        if not world.is_first():  # where several processes compute answers, all have the same ones
            return
        line = _line(key, answer)
        for writer in self._writers:
            writer.append(line)
        self._put_since += 1

    def _keys(self, text: str) -> list[str]:
        """Returns the keys of the question, that of `identity` first."""
        questions = (f"{identity}\n{text}" for identity in self._identities)
        return [hashlib.sha256(question.encode("utf-8", "surrogatepass")).hexdigest() for question in questions]


def _all_of(keys: Mapping[str, Sequence[str]]) -> set[str]:
    return {key for keys_of_text in keys.values() for key in keys_of_text}


def _of_texts(keys: Mapping[str, Sequence[str]], found: Mapping[str, T]) -> dict[str, T]:
    """Returns text -> what was found under the first of its keys that has something."""
    present = {text: [key for key in keys_of_text if key in found] for text, keys_of_text in keys.items()}
    return {text: found[of_text[0]] for text, of_text in present.items() if of_text}


def _line(key: str, answer: str | None) -> bytes:
    return (json.dumps({"key": key, "answer": answer}) + "\n").encode("ascii")


# --- reading


def _read(directory: AnyPath, wanted: Container[str], read: Callable[[str], T], lenient: bool = False) -> dict[str, T]:
    """Returns key -> `read(answer)` for the newest answer of each wanted key.

    With `lenient`, a directory or a part that cannot be read is skipped. Otherwise it raises UserError.
    """
    results: dict[str, T] = {}
    parts: list[tuple[int, AnyPath]] = []
    with _readable(directory, lenient):
        parts = sorted(_parts(directory), key=lambda part: (part[0], part[1].name))
    for _, path in parts:
        with _readable(path, lenient):
            for key, answer in _answers(path, quiet=lenient):
                if key in wanted:
                    results.pop(key, None)
                    if answer is not None:
                        results[key] = read(answer)
    return results


@contextlib.contextmanager
def _readable(path: AnyPath, lenient: bool) -> Iterator[None]:
    """In the `with` block, errors of reading `path` become UserErrors, or are ignored with `lenient`."""
    try:
        yield
    except OSError as error:
        if not lenient:
            problem = error.strerror or error
            raise UserError(f"{path}: answers cannot be read ({problem}); make it readable") from None


def _parts(directory: AnyPath) -> Iterator[tuple[int, AnyPath]]:
    """Yields (number, path) of each part."""
    for path in children(directory):
        if match := _PART.fullmatch(path.name):
            yield int(match[1]), path


def _answers(path: AnyPath, quiet: bool) -> Iterator[tuple[str, str | None]]:
    """Yields (key, answer) of each whole line. The last line may be torn; other damaged lines give a warning."""
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
        warn(f"{path}: {damaged} damaged lines; their questions are asked again")


# --- writing


class _Writer(Protocol):
    """A writer of parts. After `close`, another `append` begins a new part."""

    def append(self, line: bytes) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


def _writer(directory: AnyPath) -> _Writer:
    return _BucketWriter(directory) if is_remote(directory) else _FileWriter(Path(directory))


def _new_part(directory: AnyPath) -> tuple[int, str]:
    """Returns number and mark of a new part. It is read after the existing ones, and its mark is unique."""
    return 1 + max((number for number, _ in _parts(directory)), default=-1), uuid.uuid4().hex[:8]


def _name(number: int, mark: str) -> str:
    return f"part-{number:05}-{mark}.jsonl"


class _FileWriter:
    """Writes a part in a local directory. Only its owner may read it, because texts may be private."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: io.FileIO | None = None
        self._lock = threading.Lock()

    def append(self, line: bytes) -> None:
        try:
            with self._lock:
                self._file = self._file or self._open()
                end = os.fstat(self._file.fileno()).st_size
                if self._file.write(line) != len(line):  # the disk filled up: the next line must not join the torn one
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


class _OptionalWriter:
    """Writes a part that the run can do without: the first failure gives a warning, and nothing more is written."""

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
            warn(f"{error}; other workdirs will not find this answer")


class _BucketWriter:
    """Writes parts in a bucket. The whole part is uploaded anew at every `sync` until it has `_PART_BYTES`."""

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
                # In this order, an interruption between the two makes lines be written twice rather than never.
                self._part, self._written = (number + 1, mark), 0
                del self._buffer[: len(data)]

    def close(self) -> None:
        """Does nothing: no file is open between two uploads."""
