"""Signals, heard at once by a thread: Python's own handlers wait for the main thread, which may compile for minutes."""

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

_TOGETHER_SECONDS = 1.0  # a terminal and a wrapper may both hand on the one Control-C
_AGAIN_SECONDS = 0.1  # after an interrupt was swallowed

# Signal -> what the thread does when it comes.
_heed: dict[int, Callable[[], None]] = {}


@contextlib.contextmanager
def heard(number: int, heed: Callable[[], None], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Inside, `heed()` is called in a thread as soon as the signal comes, and `handler` in the main thread as ever.

    Only for the main thread.
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
    while numbers := os.read(reader, 64):  # nothing once the other end is closed
        for number in numbers:
            if (heed := _heed.get(number)) is not None:
                heed()


class _Interrupt:
    """What has become of a Control-C."""

    def __init__(self) -> None:
        self.pressed_at: float | None = None  # as the listening thread knows; the main thread may know before
        self.handled = False
        self.raised = threading.Event()  # it has reached the main thread, or there is nothing to reach any more
        self.own = 0  # signals that are ours: an interrupt that was swallowed, once more
        self.timers: list[threading.Timer] = []  # that send them


_interrupt: _Interrupt | None = None


def interrupted() -> bool:
    """Whether Control-C was pressed inside `interruptible`."""
    return _interrupt is not None and (_interrupt.handled or _interrupt.pressed_at is not None)


def raise_if_interrupted() -> None:
    """For work that goes on although an interrupt was raised: some library has swallowed it."""
    if threading.current_thread() is threading.main_thread() and interrupted():
        raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible(end: Callable[[], Any], seconds: Callable[[], float], tell: Callable[[str], None]) -> Iterator[None]:
    """Inside, Control-C raises KeyboardInterrupt in the main thread for certain, or ends the process.

    Where Python would print and forget it (in `__del__`, or in a callback of the garbage collector, of which jax has
    one) it is raised once more. Where the main thread cannot be reached, in compiled code, `end()` is called after
    `seconds()`; so it is when Control-C is pressed a second time. Nothing is changed where SIGINT is ignored, as in a
    background job, or has a handler of somebody else's.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    global _interrupt
    before, hook, state = _interrupt, sys.unraisablehook, _Interrupt()

    def heed() -> None:
        if state.own:
            state.own -= 1
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

    def unraisable(what: Any) -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):
            hook(what)
            return
        state.own += 1
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
