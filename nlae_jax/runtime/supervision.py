"""How a process ends: told to stop, because another one is gone, or because the run is over.

SIGTERM asks all processes to save and stop. Each gives signs of life, and ends when another is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from nlae_jax.runtime import signals
from nlae_jax.runtime.errors import first_line
from nlae_jax.runtime.world import tell, world

PREEMPTED = 75  # exit code (EX_TEMPFAIL): told to stop; what was reached is saved, and the same command continues
INTERRUPTED = 130  # exit code: by hand
LOST = 76  # exit code: another process of the run is gone; the same command, given to all of them, continues

BEAT_SECONDS = 1.0
_LOST_SECONDS = 25.0  # without a sign of life; longer than Python ever keeps a thread waiting
FOREVER_MS = 7 * 24 * 3600 * 1000  # while one process works, e.g. reads the corpus; who dies meanwhile is found out
_AGAIN = "start the same command again in all processes"

_BEATS, _STOP, _END = "nlae/beat/", "nlae/notice/stop", "nlae/notice/end"

# In errors of a computation or a barrier that some other process has left.
_SEVERED = ("gloo", "connection", "unavailable", "coordination", "barrier", "deadline", "heartbeat", "aborted")


class Preempted(Exception):
    """Told to stop (SIGTERM), and everything is in order to do so."""


def stop_if_asked() -> None:
    """Raises Preempted where this process was asked to stop; only for work that it does alone."""
    if world.asked.is_set():
        raise Preempted


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Inside, SIGTERM asks all processes to stop; `grace` seconds later a process ends in any case, with `PREEMPTED`.

    What cannot be stopped in order, a compilation say, is then cut off as by SIGKILL, which every stage survives.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    world.settled.clear()
    try:
        with signals.heard(signal.SIGTERM, _heed, lambda *_: None):
            try:
                yield
            finally:
                world.settled.set()
    finally:
        world.asked.clear()  # no thread asks any more


def interrupt() -> NoReturn:
    """Ends this process as Control-C does, from any thread."""
    _exit(INTERRUPTED, "interrupted; the same command continues")


def set_grace(seconds: float) -> None:
    """How long after SIGTERM a process ends in any case."""
    world.grace = seconds


def grace() -> float:
    """How many seconds a process has that was told to end."""
    return world.grace


def _heed() -> None:
    if world.count > 1:
        with contextlib.suppress(Exception):  # the others will miss this process
            world.client.key_value_set(_STOP, str(world.index), allow_overwrite=True)
    _ask()


def _ask() -> None:
    if not (world.asked.is_set() or world.settled.is_set()):
        world.asked.set()
        _tell("asked to stop (SIGTERM): saving at the next step")
        threading.Thread(target=_cut_off, name="grace", daemon=True).start()


def _cut_off() -> None:
    if not world.settled.wait(world.grace):
        if world.coordinates:
            time.sleep(3 * BEAT_SECONDS)  # the others were told later, and end by themselves
        _exit(PREEMPTED, f"preempted; nothing more was saved within {world.grace:.0f} s; the same command continues")


def end(code: int, message: str = "") -> int:
    """The exit code of this process, at its end. Where the others do not end likewise, they are told and it exits here.

    Without that, one process would wait for the others to shut down, and they for it to compute.
    """
    if world.count == 1:
        return code
    if code in (0, PREEMPTED):
        try:
            world.client.wait_at_barrier("nlae/end", 60_000 if code else FOREVER_MS)
        except Exception as error:
            wait_for_verdict()
            _exit(LOST, f"the other processes of the run do not end ({first_line(error)}); {_AGAIN}")
        world.over.set()
        return code
    world.over.set()  # what the others say from here on is no news
    with contextlib.suppress(Exception):
        notice = {"code": code, "process": world.index, "message": message}
        world.client.key_value_set(_END, json.dumps(notice))  # the first to fail has the word
    if world.coordinates:
        time.sleep(3 * BEAT_SECONDS)  # with it goes the store that the others read
    _exit(code)


def severed(error: BaseException) -> bool:
    """Whether an error may be what a computation or a barrier ends in when another process has left it."""
    return world.count > 1 and any(word in str(error).lower() for word in _SEVERED)


def wait_for_verdict() -> None:
    """Gives `_watch` and `_guard` the time to find out who is gone, and to end this process; returns if nobody is."""
    time.sleep(_LOST_SECONDS + 20)


def watch() -> None:
    """Gives signs of life and looks for the others'. Only the first looks at all of them: that scales."""
    beats = 0
    seen: dict[str, tuple[str, float]] = {f"{_BEATS}{i}": ("", world.answered) for i in range(world.count)}
    while not world.over.wait(BEAT_SECONDS):
        beats += 1
        try:
            world.client.key_value_set(f"{_BEATS}{world.index}", str(beats), allow_overwrite=True)
            notices = dict(world.client.key_value_dir_get("nlae/notice/"))
            heard = dict(world.client.key_value_dir_get(_BEATS)) if world.index == 0 else {}
        except Exception:  # of many kinds; `_guard` says when there were enough
            continue
        now = world.answered = time.monotonic()
        if _END in notices:
            _follow(json.loads(notices[_END]))
        if _STOP in notices and not world.settled.is_set():
            _ask()
        for key, beat in heard.items():
            if seen[key][0] != beat:
                seen[key] = beat, now
        silent = [key for key, (_, since) in seen.items() if now - since > _LOST_SECONDS] if world.index == 0 else []
        if silent:
            _lost(f"process {silent[0].removeprefix(_BEATS)} of {world.count}")


def guard(coordinator: str) -> None:
    """Looks whether the coordinator answers `_watch`, whose calls never return from one that is cut off.

    Where it does not, and nobody listens at its address (none: this is the coordinator), it is gone. Within the time
    that `_delay_abort` gives.
    """
    while not world.over.wait(BEAT_SECONDS):
        silent = time.monotonic() - world.answered
        if coordinator and silent > 1.5 * BEAT_SECONDS and _refused(coordinator) and not world.over.is_set():
            _exit(LOST, f"the coordinator is gone; {_AGAIN}")
        if silent > _LOST_SECONDS + 5:  # after the first has said who else is gone
            _exit(LOST, f"the coordinator does not answer for {_LOST_SECONDS + 5:.0f} s; {_AGAIN}")


def _refused(address: str) -> bool:
    """Whether a machine says that nobody listens at HOST:PORT. One that says nothing may only be slow."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=BEAT_SECONDS).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    except OSError:
        return False
    return False


def _lost(who: str) -> NoReturn:
    message = f"{who} is gone (no sign of life for {_LOST_SECONDS:.0f} s); {_AGAIN}"
    with contextlib.suppress(Exception):
        world.client.key_value_set(_END, json.dumps({"code": LOST, "process": world.index, "message": message}))
    _tell(message)
    if world.coordinates:
        time.sleep(3 * BEAT_SECONDS)
    _exit(LOST)


def _follow(notice: dict[str, Any]) -> None:
    """Ends as another process did."""
    if notice["process"] != world.index:
        origin = "" if notice["code"] == LOST else f"process {notice['process']}: "
        _exit(notice["code"], f"{origin}{notice['message']}")


def _tell(message: str) -> None:
    who = "nlae" if world.count == 1 else f"nlae (process {world.index})"
    tell(f"{who}: {message}")


def _exit(code: int, message: str = "") -> NoReturn:
    """At once, from any thread: nothing that waits for other processes is waited for."""
    if code == LOST and world.asked.is_set():  # all were asked to stop, and one was faster
        code, message = PREEMPTED, f"preempted; the same command continues ({message})"
    if message:
        _tell(message)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def delay_abort() -> None:
    """Has abort() wait six seconds, once, before it ends this process: time for `_guard` to do so in its own way.

    jax's client aborts as soon as its connection to the coordinator breaks, which is how most processes learn that the
    coordinator is gone. Nothing of Python may run in a signal's handler: the thread that aborts may hold what Python
    waits for. So the handler is the C library's sleep(), which is allowed there and gets the signal's number, 6, as its
    seconds. It is forgotten when it is called (System V's way): what comes after it ends the process as ever.
    """
    library = ctypes.CDLL(None)
    set_once = getattr(library, "sysv_signal", library.signal)  # the latter on what is not glibc
    set_once.argtypes, set_once.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    set_once(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
