"""Locks files that only one process at a time may write. A lock ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import BinaryIO

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.progress import warn

# The files that this process has locked, by path: a notebook may lock one file several times.
_LOCKED: dict[Path, BinaryIO] = {}


def hold(path: Path, name: str, busy: str, advice: str) -> None:
    """Locks a file for this process, and makes it if it does not exist.

    Raises UserError `name: busy` where another process has locked it. Network file systems may have no locks: then a
    warning ends with `advice`, which tells the user what not to do.
    """
    path = Path(os.path.realpath(path))
    if path in _LOCKED and _is_at(_LOCKED[path], path):
        return
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"{name}: {busy}") from None
        except OSError as error:  # file systems without locks raise errors of many kinds
            warn(f"{name}: cannot be locked ({error.strerror}); {advice}")
            break
        if _is_at(file, path):
            break
        file.close()
    _LOCKED[path] = file


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Returns whether an open file is still the one at its path.

    After it was deleted, the path may be another file, which another process may have locked.
    """
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
