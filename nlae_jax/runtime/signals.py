"""Handles signals at once in a thread. Python's handlers wait for the main thread, which may compile for minutes."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_TOGETHER_SECONDS = 1.0  # signals this close are one Control-C: a terminal and a wrapper may both pass it on
_AGAIN_SECONDS = 0.1  # an interrupt that was swallowed is raised again after this time

# Signal -> the function that the thread calls when the signal comes.
_heed: dict[int, Callable[[], None]] = {}


@contextlib.contextmanager
def heard(number: int, heed: Callable[[], None], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """In the `with` block, a thread calls `heed()` when the signal comes; the main thread calls `handler` when it can.

    It can be entered only in the main thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    _heed[number] = heed
    before = signal.signal(number, handler)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(reader,), name="heed", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(number, before)
        del _heed[number]
        os.close(writer)
        thread.join()
        os.close(reader)


def _listen(reader: int) -> None:
    """Calls the function of each signal whose number arrives in the pipe."""
    while numbers := os.read(reader, 64):  # empty once the other end is closed
        for number in numbers:
            if (heed := _heed.get(number)) is not None:
                heed()


class _Interrupt:
    """The state of a Control-C."""

    def __init__(self) -> None:
        self.pressed_at: float | None = None  # set by the listening thread, perhaps after `handled`
        self.handled = False
        self.raised = threading.Event()  # the main thread has been reached, or has left `interruptible`
        self.repeats_due = 0  # signals still to come from our timers, which repeat a swallowed interrupt
        self.timers: list[threading.Timer] = []  # they send the repeated signals


_interrupt: _Interrupt | None = None


def interrupted() -> bool:
    """Returns whether Control-C was pressed inside `interruptible`."""
    return _interrupt is not None and (_interrupt.handled or _interrupt.pressed_at is not None)


def raise_if_interrupted() -> None:
    """Raises KeyboardInterrupt in the main thread if Control-C was pressed.

    Long work calls it now and then, because a library may have swallowed the first KeyboardInterrupt.
    """
    if threading.current_thread() is threading.main_thread() and interrupted():
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible(end: Callable[[], Any], seconds: Callable[[], float], tell: Callable[[str], None]) -> Iterator[None]:
    """In the `with` block, Control-C always raises KeyboardInterrupt in the main thread, or ends the process.

    Python would print and forget an exception in `__del__` or in a callback of the garbage collector, of which jax has
    one: there it is raised once more. While compiled code keeps the main thread busy it cannot be raised: then `end()`
    is called after `seconds()`, or as soon as Control-C is pressed a second time. Nothing changes where SIGINT is
    ignored, as in a background job, or has another handler.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    global _interrupt
    before, hook, state = _interrupt, sys.unraisablehook, _Interrupt()

    def heed() -> None:
        if state.repeats_due:
            state.repeats_due -= 1
        elif state.pressed_at is None:
            state.pressed_at = time.monotonic()
            threading.Thread(target=watch, name="interrupt", daemon=True).start()
        elif time.monotonic() - state.pressed_at > _TOGETHER_SECONDS:
            end()

    def watch() -> None:
        if not state.raised.wait(2):
            tell("interrupting at the next opportunity; Control-C again ends at once")
            if not state.raised.wait(seconds()):
                end()

    def handler(number: int, frame: FrameType | None) -> None:
        state.handled = True
        state.raised.set()
        raise KeyboardInterrupt

    def unraisable(details: Any) -> None:
        if not issubclass(details.exc_type, KeyboardInterrupt):
            hook(details)
            return
        state.repeats_due += 1
        timer = threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main)
        timer.daemon = True
        state.timers.append(timer)
        timer.start()

    _interrupt, sys.unraisablehook = state, unraisable
    try:
        with heard(signal.SIGINT, heed, handler):
            yield
    finally:
        state.raised.set()
        for timer in state.timers:
            timer.cancel()
        _interrupt, sys.unraisablehook = before, hook
