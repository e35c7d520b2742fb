"""Several processes as one run: they start together, agree on what decides, and end together.

One process needs none of it: it is the first, passes every barrier and gets its own values back. Between processes
small values go through the coordinator's key-value store (`jax.distributed`), arrays through the mesh.

Whatever a process decides by looking at files or clocks, all must decide alike, or they wait for each other for ever:
such decisions are the first process's (`by_first`), or are made on the devices (`Agreement`).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO, TypeVar

from nlae_jax import signals
from nlae_jax.errors import UserError

T = TypeVar("T")

PREEMPTED = 75  # exit code (EX_TEMPFAIL): told to stop; what was reached is saved, and the same command continues
INTERRUPTED = 130  # exit code: by hand
LOST = 76  # exit code: another process of the run is gone; the same command, given to all of them, continues

CONNECT_SECONDS = 120.0  # for all processes to find each other
_BEAT_SECONDS = 1.0
_LOST_SECONDS = 25.0  # without a sign of life; longer than Python ever keeps a thread waiting
_FOREVER_MS = 7 * 24 * 3600 * 1000  # while one process works, e.g. reads the corpus; who dies meanwhile is found out

_AGAIN = "start the same command again in all processes"

_BEATS, _STOP, _END = "nlae/beat/", "nlae/notice/stop", "nlae/notice/end"

# In errors of a computation or a barrier that some other process has left.
_SEVERED = ("gloo", "connection", "unavailable", "coordination", "barrier", "deadline", "heartbeat", "aborted")


class Preempted(Exception):
    """Told to stop (SIGTERM), and everything is in order to do so."""


@dataclasses.dataclass
class _World:
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


_world = _World()


def count() -> int:
    """How many processes compute this run."""
    return _world.count


def is_first() -> bool:
    """Whether this is the process that reads the corpus, asks providers, decides, and writes all small files."""
    return _world.index == 0


# --- starting


def settings(spec: str) -> tuple[str | None, int | None, int | None]:
    """(HOST:PORT, number of processes, this one's index) of `--distributed`; None for what the cluster has to tell.

    `auto` takes what JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say; of these jax itself reads
    the first only. Raises UserError.
    """
    if spec == "auto":
        address = os.environ.get("JAX_COORDINATOR_ADDRESS")
        texts = [os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")]
        source = "--distributed: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"
    else:
        address, *texts = spec.split(",")
        source = f"--distributed {spec}"
        if len(texts) != 2:
            raise UserError(f"{source}: should be auto or HOST:PORT,COUNT,INDEX")
    host, _, port = (address or "").rpartition(":")
    if address is not None and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"{source}: {address!r} should be HOST:PORT")
    if any(text is not None and not text.isdecimal() for text in texts):
        raise UserError(f"{source}: COUNT and INDEX should be whole numbers")
    number, index = (None if text is None else int(text) for text in texts)
    if number is not None and index is not None and index >= number:
        raise UserError(f"{source}: INDEX should be from 0 to COUNT - 1")
    return address, number, index


def start(spec: str) -> None:
    """Joins the other processes, before anything is computed. `spec`: of `--distributed`.

    Raises UserError where no cluster is found, or the others do not come within `CONNECT_SECONDS`.
    """
    import jax
    from jax._src import distributed  # the client that barriers and small values go through has no public name

    address, number, index = given = settings(spec)
    if number != 1 and address is not None and index is not None:
        _reach(address, index == 0)
    # SIGTERM is heeded here, with a bound: `preemptible`. What jax would install takes the signal away.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *given,
            cluster_detection_method=None if None in given else "deactivate",
            initialization_timeout=int(CONNECT_SECONDS),
        )
        index, number = jax.process_index(), jax.process_count()
    except (ValueError, TypeError) as error:
        raise UserError(
            "--distributed: no cluster found: this is no TPU pod, no job of Slurm, Open MPI or Kubernetes, and "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID are not all set; give HOST:PORT,COUNT,INDEX "
            f"({_line(error)})"
        ) from error
    except Exception as error:  # jax's own, of many kinds
        raise UserError(
            f"--distributed: the processes did not come together within {CONNECT_SECONDS:.0f} s ({_line(error)})"
        ) from error
    _world.index, _world.count, _world.client = index, number, distributed.global_state.client
    _world.coordinates = index == 0  # jax has the first process start the coordinator
    if number > 1:
        _world.answered = time.monotonic()
        threading.Thread(target=_watch, name="watch", daemon=True).start()
        coordinator = "" if _world.coordinates else distributed.global_state.coordinator_address
        threading.Thread(target=_guard, args=(coordinator,), name="guard", daemon=True).start()
        if coordinator:
            _delay_abort()


def _reach(address: str, own: bool) -> None:
    """Waits for the coordinator, or finds out that its port here is taken: jax would end the process without a word."""
    host, _, port = address.rpartition(":")
    if own:
        try:
            with contextlib.closing(socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", int(port)))
        except OSError as error:
            raise UserError(f"--distributed {address}: cannot listen there ({error.strerror})") from None
        return
    deadline, problem = time.monotonic() + CONNECT_SECONDS, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            problem = error.strerror or str(error)
            time.sleep(0.2)
    raise UserError(f"--distributed {address}: no coordinator there within {CONNECT_SECONDS:.0f} s ({problem})")


def _delay_abort() -> None:
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


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- doing things together


def barrier() -> None:
    """Waits until every process is here."""
    if _world.count > 1:
        _world.client.wait_at_barrier(_world.name("barrier"), _FOREVER_MS)


def by_first(work: Callable[[], T]) -> T:
    """What `work` gives the first process, in all of them; it alone does it. JSON values; UserErrors are shared too."""
    if _world.count == 1:
        return work()
    key, client = _world.name("value"), _world.client
    if not is_first():
        answer = json.loads(client.blocking_key_value_get(key, _FOREVER_MS))
        if "error" in answer:
            raise UserError(answer["error"])
        if "preempted" in answer:
            raise Preempted
        return answer["value"]
    try:
        text = json.dumps({"value": work()})
    except UserError as error:
        client.key_value_set(key, json.dumps({"error": str(error)}))
        raise
    except Preempted:
        client.key_value_set(key, json.dumps({"preempted": True}))
        raise
    client.key_value_set(key, text)
    return json.loads(text)["value"]


def compile_together(function: Any, *arguments: Any) -> None:
    """Compiles a jitted function for what it is about to be called with, and waits until all processes have.

    They may take minutes more or less to compile; on CPUs, gloo waits for half a minute at a program's first exchange.
    """
    if _world.count > 1:
        function.lower(*arguments).compile()
        barrier()


class Agreement:
    """Whether any process was asked to stop: the same answer in all of them, which all must ask for equally often.

    Between processes it is a reduction on the devices, in order with what they compute, and is waited for one call
    later: nothing stands still for it.
    """

    def __init__(self, mesh: Any) -> None:
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: Any = None

    def __call__(self) -> bool:
        if _world.count == 1:
            return _world.asked.is_set()
        import jax
        import numpy as np

        flags = np.full(self._split.mesh.size, _world.asked.is_set(), np.int32)
        before, self._before = (
            self._before,
            self._any(jax.make_array_from_callback(flags.shape, self._split, lambda index: flags[index])),
        )
        return before is not None and bool(before)


# --- stopping


def stop_if_asked() -> None:
    """Raises Preempted where this process was asked to stop; only for work that it does alone."""
    if _world.asked.is_set():
        raise Preempted


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Inside, SIGTERM asks all processes to stop; `grace` seconds later a process ends in any case, with `PREEMPTED`.

    What cannot be stopped in order, a compilation say, is then cut off as by SIGKILL, which every stage survives.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _world.settled.clear()
    try:
        with signals.heard(signal.SIGTERM, _heed, lambda *_: None):
            try:
                yield
            finally:
                _world.settled.set()
    finally:
        _world.asked.clear()  # no thread asks any more


def interrupt() -> NoReturn:
    """Ends this process as Control-C does, from any thread."""
    _exit(INTERRUPTED, "interrupted; the same command continues")


def set_grace(seconds: float) -> None:
    """How long after SIGTERM a process ends in any case."""
    _world.grace = seconds


def grace() -> float:
    """How many seconds a process has that was told to end."""
    return _world.grace


def _heed() -> None:
    if _world.count > 1:
        with contextlib.suppress(Exception):  # the others will miss this process
            _world.client.key_value_set(_STOP, str(_world.index), allow_overwrite=True)
    _ask()


def _ask() -> None:
    if not (_world.asked.is_set() or _world.settled.is_set()):
        _world.asked.set()
        _tell("asked to stop (SIGTERM): saving at the next step")
        threading.Thread(target=_cut_off, name="grace", daemon=True).start()


def _cut_off() -> None:
    if not _world.settled.wait(_world.grace):
        if _world.coordinates:
            time.sleep(3 * _BEAT_SECONDS)  # the others were told later, and end by themselves
        _exit(PREEMPTED, f"preempted; nothing more was saved within {_world.grace:.0f} s; the same command continues")


# --- ending


def end(code: int, message: str = "") -> int:
    """The exit code of this process, at its end. Where the others do not end likewise, they are told and it exits here.

    Without that, one process would wait for the others to shut down, and they for it to compute.
    """
    if _world.count == 1:
        return code
    if code in (0, PREEMPTED):
        try:
            _world.client.wait_at_barrier("nlae/end", 60_000 if code else _FOREVER_MS)
        except Exception as error:
            wait_for_verdict()
            _exit(LOST, f"the other processes of the run do not end ({_line(error)}); {_AGAIN}")
        _world.over.set()
        return code
    _world.over.set()  # what the others say from here on is no news
    with contextlib.suppress(Exception):
        notice = {"code": code, "process": _world.index, "message": message}
        _world.client.key_value_set(_END, json.dumps(notice))  # the first to fail has the word
    if _world.coordinates:
        time.sleep(3 * _BEAT_SECONDS)  # with it goes the store that the others read
    _exit(code)


def severed(error: BaseException) -> bool:
    """Whether an error may be what a computation or a barrier ends in when another process has left it."""
    return _world.count > 1 and any(word in str(error).lower() for word in _SEVERED)


def wait_for_verdict() -> None:
    """Gives `_watch` and `_guard` the time to find out who is gone, and to end this process; returns if nobody is."""
    time.sleep(_LOST_SECONDS + 20)


def _watch() -> None:
    """Gives signs of life and looks for the others'. Only the first looks at all of them: that scales."""
    world, beats = _world, 0
    seen: dict[str, tuple[str, float]] = {f"{_BEATS}{i}": ("", world.answered) for i in range(world.count)}
    while not world.over.wait(_BEAT_SECONDS):
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
        if _STOP in notices and not _world.settled.is_set():
            _ask()
        for key, beat in heard.items():
            if seen[key][0] != beat:
                seen[key] = beat, now
        silent = [key for key, (_, since) in seen.items() if now - since > _LOST_SECONDS] if world.index == 0 else []
        if silent:
            _lost(f"process {silent[0].removeprefix(_BEATS)} of {world.count}")


def _guard(coordinator: str) -> None:
    """Looks whether the coordinator answers `_watch`, whose calls never return from one that is cut off.

    Where it does not, and nobody listens at its address (none: this is the coordinator), it is gone. Within the time
    that `_delay_abort` gives.
    """
    while not _world.over.wait(_BEAT_SECONDS):
        silent = time.monotonic() - _world.answered
        if coordinator and silent > 1.5 * _BEAT_SECONDS and _refused(coordinator) and not _world.over.is_set():
            _exit(LOST, f"the coordinator is gone; {_AGAIN}")
        if silent > _LOST_SECONDS + 5:  # after the first has said who else is gone
            _exit(LOST, f"the coordinator does not answer for {_LOST_SECONDS + 5:.0f} s; {_AGAIN}")


def _refused(address: str) -> bool:
    """Whether a machine says that nobody listens at HOST:PORT. One that says nothing may only be slow."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_BEAT_SECONDS).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    except OSError:
        return False
    return False


def _lost(who: str) -> NoReturn:
    message = f"{who} is gone (no sign of life for {_LOST_SECONDS:.0f} s); {_AGAIN}"
    with contextlib.suppress(Exception):
        _world.client.key_value_set(_END, json.dumps({"code": LOST, "process": _world.index, "message": message}))
    _tell(message)
    if _world.coordinates:
        time.sleep(3 * _BEAT_SECONDS)
    _exit(LOST)


def _follow(notice: dict[str, Any]) -> None:
    """Ends as another process did."""
    if notice["process"] != _world.index:
        origin = "" if notice["code"] == LOST else f"process {notice['process']}: "
        _exit(notice["code"], f"{origin}{notice['message']}")


def _tell(message: str) -> None:
    who = "nlae" if _world.count == 1 else f"nlae (process {_world.index})"
    tell(f"{who}: {message}")


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


def _exit(code: int, message: str = "") -> NoReturn:
    """At once, from any thread: nothing that waits for other processes is waited for."""
    if code == LOST and _world.asked.is_set():  # all were asked to stop, and one was faster
        code, message = PREEMPTED, f"preempted; the same command continues ({message})"
    if message:
        _tell(message)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
