"""What a process knows of the run's other processes, and how it speaks to a person.

One process alone is the first of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
from typing import Any, TextIO


@dataclasses.dataclass
class World:
    """What this process knows of the others. `calls` counts what all processes call in the same order."""

    index: int = 0
    count: int = 1
    client: Any = None
    coordinates: bool = False
    calls: int = 0
    grace: float = 25.0
    answered: float = 0.0  # when the coordinator last did, by this process's monotonic clock
    asked: threading.Event = dataclasses.field(default_factory=threading.Event)
    settled: threading.Event = dataclasses.field(default_factory=threading.Event)
    over: threading.Event = dataclasses.field(default_factory=threading.Event)

    def name(self, kind: str) -> str:
        self.calls += 1
        return f"nlae/{kind}/{self.calls}"


world = World()


def count() -> int:
    """How many processes compute this run."""
    return world.count


def is_first() -> bool:
    """Whether this is the process that reads the corpus, asks providers, decides, and writes all small files."""
    return world.index == 0


def tell(line: str) -> None:
    """A line on stderr, if there is one that takes it: what cannot be said must not end a run."""
    try:
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        mute(sys.stderr)


def mute(stream: TextIO) -> None:
    """Sends what a broken stream still holds nowhere: Python would fail on it once more at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
