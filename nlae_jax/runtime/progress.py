"""Shows the progress of a stage on stderr: a bar on a terminal, a line now and then in a log.

Of several processes only the first prints anything.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from nlae_jax.runtime import signals, world
from nlae_jax.runtime.errors import one_line

LINE_EVERY_SECONDS = 10.0  # a log gets at most one line in this time
WINDOW = 16  # the rate is computed over this many calls of `advance`


def say(message: str) -> None:
    """Prints a status line on stderr, above a running bar. Text that it quotes is made safe to print."""
    if world.is_first():
        world.tell(one_line(message))


def warn(message: str) -> None:
    """Prints a line on stderr that starts with `warning:`, in yellow on a terminal."""
    label = "\x1b[33mwarning:\x1b[0m" if _on_terminal() else "warning:"
    if world.is_first():
        world.tell(f"{label} {one_line(message)}")


def _on_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False


def clock_text(seconds: float) -> str:
    """Writes a duration as `m:ss` or `h:mm:ss`, rounded to the second."""
    total = max(0, round(seconds))
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate_text(seconds_per_unit: float, unit: str) -> str:
    """Writes a pace as `3.1 s/step`, or as `12.4 step/s` where a unit takes less than a second."""
    if seconds_per_unit >= 1.0:
        return f"{seconds_per_unit:.1f} s/{unit}"
    per_second = 1.0 / max(seconds_per_unit, 1e-9)
    return f"{per_second:,.0f} {unit}/s" if per_second >= 100 else f"{per_second:.1f} {unit}/s"


def metric_text(metrics: dict[str, Any]) -> str:
    """Writes `name value` pairs, two spaces apart, with floats of three digits and None as a dash."""
    return "  ".join(f"{name} {_value_text(value)}" for name, value in metrics.items())


def _value_text(value: Any) -> str:
    if value is None:
        return "–"
    if hasattr(value, "item"):  # a scalar of numpy or jax
        value = value.item()
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if type(value) is int else str(value)


class Progress:
    """Counts the units of one stage and shows them. It is a context manager; `progress` makes it."""

    def __init__(
        self, total: int | None, name: str, unit: str, start: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.name, self.unit, self.done = total, name, unit, start
        self._clock = clock
        self._metrics: dict[str, Any] = {}
        self._marks: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # (time, done) after recent advances
        self._advances = 0
        self._bar: RichProgress | None = None
        self._next_line_at = -float("inf")

    def __enter__(self) -> Progress:
        self._began = self._clock()
        self._marks.append((self._began, self.done))
        if _on_terminal() and world.is_first():
            bar = _terminal_bar()
            self._task = bar.add_task(self.name, total=self.total, completed=self.done, text=self._bar_text())
            with contextlib.suppress(OSError):  # the terminal is gone
                bar.start()
                self._bar = bar
        return self

    def advance(self, n: int = 1, **shown_metrics: Any) -> None:
        """Counts `n` more units. `shown_metrics` stay on display until a later call replaces them."""
        signals.raise_if_interrupted()
        self.done += n
        self._metrics.update(shown_metrics)
        self._advances += 1
        if self._advances == 2:
            self._marks.popleft()  # the first unit includes the compilation, so it does not show the pace
        self._marks.append((self._clock(), self.done))
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, text=self._bar_text())
        elif self._clock() >= self._next_line_at and self.done != self.total:  # the end gets another line
            self._write_line()

    def seconds_per_unit(self) -> float | None:
        """Returns the recent pace, or None until a unit without the first call's compilation is done."""
        (since, done_then), (now, done_now) = self._marks[0], self._marks[-1]
        if self._advances < 2 or done_now <= done_then:
            return None
        return (now - since) / (done_now - done_then)

    def line(self, ended: bool = False) -> str:
        """Writes the state as one line: `rl 12/40  3.1 s/step  1:27 left  fve 0.12`."""
        count = f"{self.done}/{self.total}" if self.total is not None else f"{self.done} {self.unit}"
        parts = (f"{self.name} {count}", self._pace(ended), metric_text(self._metrics))
        return "  ".join(part for part in parts if part)

    def _pace(self, ended: bool) -> str:
        pace = self.seconds_per_unit()
        parts = [] if pace is None else [rate_text(pace, self.unit)]
        if pace is None or ended or self.total is None:
            parts.append(f"{clock_text(self._clock() - self._began)} elapsed")
        else:
            parts.append(f"{clock_text(pace * max(0, self.total - self.done))} left")
        return "  ".join(parts)

    def _bar_text(self) -> str:
        """Writes the text to the right of the bar. The elapsed time is in another column, so that it ticks."""
        pace = self.seconds_per_unit()
        if pace is None:
            return metric_text(self._metrics)
        parts = [rate_text(pace, self.unit)]
        if self.total is not None:
            parts.append(f"{clock_text(pace * max(0, self.total - self.done))} left")
        return "  ".join([*parts, metric_text(self._metrics)]).rstrip()

    def _write_line(self, ended: bool = False) -> None:
        say(self.line(ended))
        self._next_line_at = self._clock() + LINE_EVERY_SECONDS

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
        else:
            self._write_line(ended=True)


class _Elapsed(ProgressColumn):
    """Shows the time since the bar started, as `clock_text` writes it."""

    def render(self, task: Any) -> Text:
        return Text(clock_text(task.finished_time or task.elapsed or 0.0), style="dim")


def _terminal_bar() -> RichProgress:
    """Makes a bar on stderr. `Progress` writes the text at its right, so bar and log show the same numbers."""
    console = Console(stderr=True)
    text_column = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # only this column shrinks in a narrow window
    return RichProgress(
        TextColumn("{task.description}", markup=False, style="bold"),
        BarColumn(bar_width=20 if console.width >= 100 else 10),
        MofNCompleteColumn(),
        _Elapsed(),
        TextColumn("{task.fields[text]}", markup=False, table_column=text_column),
        console=console,
        expand=True,
    )


def progress(total: int | None, name: str, unit: str = "step", start: int = 0) -> Progress:
    """Makes a progress display: `with progress(40, "rl", start=12) as bar: bar.advance(fve=0.12)`.

    `total` counts from 0 and includes the `start` units that an earlier run has done. It is None if it is unknown.
    On a terminal stderr shows a live bar; otherwise it gets a line at the first call, one every ten seconds at most,
    and one at the end.
    """
    return Progress(total, name, unit, start)
