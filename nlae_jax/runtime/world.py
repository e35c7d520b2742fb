"""The state that a process has about the run's other processes, and its lines on stderr.

A single process is the first of one.
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
    """The state that this process has about the others."""

    index: int = 0
    count: int = 1  # of processes
    client: Any = None  # of jax's coordinator
    coordinates: bool = False  # whether this process runs the coordinator
    calls: int = 0  # of `name`, which all processes call in the same order
    grace: float = 25.0  # seconds after SIGTERM after which a process ends in any case
    answered: float = 0.0  # when the coordinator last answered, by this process's monotonic clock
    asked: threading.Event = dataclasses.field(default_factory=threading.Event)  # asked to stop
    settled: threading.Event = dataclasses.field(default_factory=threading.Event)  # outside of `preemptible`
    over: threading.Event = dataclasses.field(default_factory=threading.Event)  # the run has ended

    def name(self, kind: str) -> str:
        """Returns a key that is the same in all processes, and new at every call."""
        self.calls += 1
        return f"nlae/{kind}/{self.calls}"


world = World()


def count() -> int:
    """Returns the number of processes that compute this run."""
    return world.count


def is_first() -> bool:
    """Returns whether this is the first process, which reads the corpus, asks providers and writes all small files."""
    return world.index == 0


def tell(line: str) -> None:
    """Prints a line on stderr. A closed or broken stderr is ignored, because it must not end a run."""
    try:
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        mute(sys.stderr)


def mute(stream: TextIO) -> None:
    """Redirects a broken stream to the null device: otherwise Python would fail on its buffer once more at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
