"""Texts that are given on the command line, in files or through pipes."""

from __future__ import annotations

import os
import select
from pathlib import Path

from nlae_jax.runtime.errors import UserError

_MOST_TEXT_BYTES = 16 << 20  # of a text to explain; far more than its tokens may be
_SILENT_SECONDS = 60.0  # that a pipe may take to give more of it


def argument_text(text: str) -> str:
    """An argument as text: bytes that are not UTF-8 arrive as lone surrogates, and a byte order mark is no text."""
    return text.encode("utf-8", "replace").decode().removeprefix("\ufeff")


def read_text(path: Path) -> str:
    """A UTF-8 text, from a pipe too. Raises UserError where it is none, has no end, or is too long to be explained."""
    try:
        return _read_all(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--file {path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"--file {path}: cannot be read ({error.strerror})") from None


def _read_all(path: Path) -> bytes:
    """A file, or what is written into a pipe: at most `_MOST_TEXT_BYTES` of it."""
    data = b""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # it would wait for a pipe that nobody writes into
    try:
        while True:
            try:
                piece = os.read(descriptor, 1 << 20)
            except BlockingIOError:  # there is a writer, who says nothing
                if select.select([descriptor], [], [], _SILENT_SECONDS)[0]:
                    continue
                break
            if not piece:
                return data
            data += piece
            if len(data) > _MOST_TEXT_BYTES:
                raise UserError(f"--file {path}: more than {_MOST_TEXT_BYTES:,} bytes; cut it into parts")
    finally:
        os.close(descriptor)
    raise UserError(f"--file {path}: nothing more came within {_SILENT_SECONDS:.0f} s")
