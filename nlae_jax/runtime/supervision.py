"""Ends a process in order: when it is asked to stop, when another process is gone, or when the run is over.

SIGTERM asks all processes to save and stop. Each process reports regularly that it is alive, and ends when another one
no longer does.
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

PREEMPTED = 75  # exit code (EX_TEMPFAIL): asked to stop; the state so far is saved, and the same command continues
INTERRUPTED = 130  # exit code: interrupted by Control-C
LOST = 76  # exit code: another process is gone; the same command in all processes continues

BEAT_SECONDS = 1.0
_LOST_SECONDS = 25.0  # a process is lost after this time without a report; Python never keeps a thread waiting so long
FOREVER_MS = 7 * 24 * 3600 * 1000  # bounds waits for a process that works; `watch` and `guard` notice if one dies
_AGAIN = "start the same command again in all processes"

_BEATS, _STOP, _END = "nlae/beat/", "nlae/notice/stop", "nlae/notice/end"

# Words in the errors of a computation or barrier that another process has left.
_SEVERED = ("gloo", "connection", "unavailable", "coordination", "barrier", "deadline", "heartbeat", "aborted")


class Preempted(Exception):
    """Raised where a process was asked to stop (SIGTERM) and has saved its state."""


def stop_if_asked() -> None:
    """Raises Preempted where this process was asked to stop. It is only for work that this process does alone."""
    if world.asked.is_set():
        raise Preempted


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """In the `with` block, SIGTERM asks all processes to stop.

    After `grace` seconds a process ends in any case, with the status `PREEMPTED`.
    Work that cannot be stopped in order, such as a compilation, is then cut off as by SIGKILL, which every stage
    survives.
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
        world.asked.clear()  # only now, when no thread can set it again


def interrupt() -> NoReturn:
    """Ends this process as Control-C does, from any thread."""
    _exit(INTERRUPTED, "interrupted; the same command continues")


def set_grace(seconds: float) -> None:
    """Sets the seconds after SIGTERM after which a process ends in any case."""
    world.grace = seconds


def grace() -> float:
    """Returns the seconds that a process has after it was asked to stop."""
    return world.grace


def _heed() -> None:
    """Passes SIGTERM on to all processes."""
    if world.count > 1:
        with contextlib.suppress(Exception):  # if it fails, the others notice that this process ends
            world.client.key_value_set(_STOP, str(world.index), allow_overwrite=True)
    _ask()


def _ask() -> None:
    """Asks this process to stop, and starts the time after which it ends in any case."""
    if not (world.asked.is_set() or world.settled.is_set()):
        world.asked.set()
        _tell("asked to stop (SIGTERM): saving at the next step")
        threading.Thread(target=_cut_off, name="grace", daemon=True).start()


def _cut_off() -> None:
    """Ends the process where it has not stopped within its grace."""
    if not world.settled.wait(world.grace):
        if world.coordinates:
            time.sleep(3 * BEAT_SECONDS)  # the others were asked later and need the coordinator until they end
        _exit(PREEMPTED, f"preempted; nothing more was saved within {world.grace:.0f} s; the same command continues")


def end(code: int, message: str = "") -> int:
    """Returns the exit code of this process at its end. After an error it tells the other processes, and exits here.

    Otherwise this process would wait for the others to shut down, and they would wait for it to compute.
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
    world.over.set()  # later notices of the others no longer matter
    with contextlib.suppress(Exception):
        notice = {"code": code, "process": world.index, "message": message}
        world.client.key_value_set(_END, json.dumps(notice))  # only the first process that fails can set it
    if world.coordinates:
        time.sleep(3 * BEAT_SECONDS)  # the store that the others read the notice from ends with this process
    _exit(code)


def severed(error: BaseException) -> bool:
    """Returns whether an error may come from a computation or barrier that another process has left."""
    return world.count > 1 and any(word in str(error).lower() for word in _SEVERED)


def wait_for_verdict() -> None:
    """Waits for `watch` and `guard` to find out which process is gone and to end this one. Returns if none is gone."""
    time.sleep(_LOST_SECONDS + 20)


def watch() -> None:
    """Reports that this process is alive, and follows the notices of others.

    Only the first process checks the reports of all, so that the work grows linearly with their number.
    """
    beats = 0
    beat_of: dict[str, tuple[str, float]] = {f"{_BEATS}{i}": ("", world.answered) for i in range(world.count)}
    while not world.over.wait(BEAT_SECONDS):
        beats += 1
        try:
            world.client.key_value_set(f"{_BEATS}{world.index}", str(beats), allow_overwrite=True)
            notices = dict(world.client.key_value_dir_get("nlae/notice/"))
            reports = dict(world.client.key_value_dir_get(_BEATS)) if world.index == 0 else {}
        except Exception:  # of many kinds; `guard` decides when the coordinator is gone
            continue
        now = world.answered = time.monotonic()
        if _END in notices:
            _follow(json.loads(notices[_END]))
        if _STOP in notices and not world.settled.is_set():
            _ask()
        for key, beat in reports.items():
            if beat_of[key][0] != beat:
                beat_of[key] = beat, now
        silent = [key for key, (_, since) in beat_of.items() if now - since > _LOST_SECONDS] if world.index == 0 else []
        if silent:
            _lost(f"process {silent[0].removeprefix(_BEATS)} of {world.count}")


def guard(coordinator: str) -> None:
    """Ends this process when the coordinator is gone. It runs beside `watch`, whose calls may never return then.

    The coordinator is gone where it does not answer `watch` and nobody listens at its address. The address is '' in the
    coordinator itself. The check is faster than the delay of `delay_abort`.
    """
    while not world.over.wait(BEAT_SECONDS):
        silent = time.monotonic() - world.answered
        if coordinator and silent > 1.5 * BEAT_SECONDS and _refused(coordinator) and not world.over.is_set():
            _exit(LOST, f"the coordinator is gone; {_AGAIN}")
        if silent > _LOST_SECONDS + 5:  # later than the first process's notice of which process is gone
            _exit(LOST, f"the coordinator does not answer for {_LOST_SECONDS + 5:.0f} s; {_AGAIN}")


def _refused(address: str) -> bool:
    """Returns whether a machine refuses connections at HOST:PORT. A machine without an answer may only be slow."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=BEAT_SECONDS).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    except OSError:
        return False
    return False


def _lost(who: str) -> NoReturn:
    """Tells all processes that one is gone, and exits."""
    message = f"{who} is gone (no sign of life for {_LOST_SECONDS:.0f} s); {_AGAIN}"
    with contextlib.suppress(Exception):
        world.client.key_value_set(_END, json.dumps({"code": LOST, "process": world.index, "message": message}))
    _tell(message)
    if world.coordinates:
        time.sleep(3 * BEAT_SECONDS)
    _exit(LOST)


def _follow(notice: dict[str, Any]) -> None:
    """Exits with the code of another process that has ended."""
    if notice["process"] != world.index:
        origin = "" if notice["code"] == LOST else f"process {notice['process']}: "
        _exit(notice["code"], f"{origin}{notice['message']}")


def _tell(message: str) -> None:
    who = "nlae" if world.count == 1 else f"nlae (process {world.index})"
    tell(f"{who}: {message}")


def _exit(code: int, message: str = "") -> NoReturn:
    """Exits at once, from any thread, without waiting for other processes."""
    if code == LOST and world.asked.is_set():  # all were asked to stop, and another process has already done so
        code, message = PREEMPTED, f"preempted; the same command continues ({message})"
    if message:
        _tell(message)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def delay_abort() -> None:
    """Makes abort() wait six seconds, once, before it ends this process, so that `guard` can end it with a message.

    jax's client aborts as soon as its connection to the coordinator breaks, which is how most processes learn that the
    coordinator is gone. No Python code may run in a signal's handler: the aborting thread may hold a lock that Python
    needs. So the handler is the C library's sleep(), which is allowed there and gets the signal's number, 6, as its
    seconds. It is uninstalled when it is called (System V semantics), so the signal then ends the process as usual.
    """
    library = ctypes.CDLL(None)
    set_once = getattr(library, "sysv_signal", library.signal)  # the second where the C library is not glibc
    set_once.argtypes, set_once.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    set_once(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
