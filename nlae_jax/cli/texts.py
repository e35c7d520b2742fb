"""Reads texts from the command line, from files and from pipes."""

from __future__ import annotations

import os
import select
from pathlib import Path

from nlae_jax.runtime.errors import UserError

_MOST_TEXT_BYTES = 16 << 20  # the bound of a text to explain; its tokens are bounded much lower
_SILENT_SECONDS = 60.0  # reading fails where a pipe gives nothing for this time


def argument_text(text: str) -> str:
    """Cleans an argument: lone surrogates, which stand for bytes that are not UTF-8, and a byte-order mark."""
    return text.encode("utf-8", "replace").decode().removeprefix("\ufeff")


def read_text(path: Path) -> str:
    """Reads UTF-8 text from a file or a pipe. Raises UserError where it is not UTF-8, does not end, or is too long."""
    try:
        return _read_all(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--file {path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"--file {path}: cannot be read ({error.strerror})") from None


def _read_all(path: Path) -> bytes:
    """Reads a file or a pipe to its end. Raises UserError for more than `_MOST_TEXT_BYTES`."""
    data = b""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a blocking open would wait for a pipe without a writer
    try:
        while True:
            try:
                piece = os.read(descriptor, 1 << 20)
            except BlockingIOError:  # the pipe has a writer, but no data yet
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
