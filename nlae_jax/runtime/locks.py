"""Locks on files that one process at a time may write. They end with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import BinaryIO

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.progress import warn

# Held while the process lives; a notebook may open one file several times.
_HELD: dict[Path, BinaryIO] = {}


def hold(path: Path, name: str, busy: str, alone: str) -> None:
    """Locks a file, which is made if it is not there, for this process.

    Raises UserError `name: busy` where another process has it. File systems that are shared over a network may have no
    locks: then a warning says `alone`, what nobody should do.
    """
    path = path.resolve()
    held = _HELD.get(path)
    # A file that was deleted meanwhile is another one, which anybody may have locked.
    if held is not None and path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat()):
        return
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{name}: {busy}") from None
    except OSError as error:  # of many kinds
        warn(f"{name}: cannot be locked ({error.strerror}); {alone}")
    _HELD[path] = file
