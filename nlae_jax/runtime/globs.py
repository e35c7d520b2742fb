"""The paths that match a glob, also where links form circles."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator


def matching_paths(pattern: str) -> Iterator[str]:
    """Does what `glob.glob(pattern, recursive=True)` does, but enters no directory twice: links may form circles."""
    if "**" not in pattern.split("/"):  # within a name, ** means no more than *
        yield from glob.glob(pattern)
        return
    parts = pattern.split("/")
    first = parts.index("**")
    rest = [part for part in parts[first + 1 :] if part] or ["*"]
    while rest[0] == "**" and len(rest) > 1:
        rest.pop(0)
    for start in glob.glob("/".join(parts[:first]) + "/") if first else ["."]:
        for directory in _directories(start):
            yield from matching_paths("/".join([glob.escape(directory.rstrip("/")), *rest]))


def _directories(start: str) -> Iterator[str]:
    """Yields `start` and every directory below it once, through links too, but no hidden directories."""
    visited: set[tuple[int, int]] = set()
    for directory, names, _ in os.walk(start, followlinks=True):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in visited:
            names.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield directory
