"""Control-C: it ends a command, wherever it arrives."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nlae_jax.runtime import signals, supervision, world
from nlae_jax.runtime.progress import progress

ROOT = Path(__file__).parent.parent
PATIENCE = 120


@contextlib.contextmanager
def interruptible(end=pytest.fail, seconds=PATIENCE):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with signals.interruptible(end, lambda: seconds, lambda line: None):
            yield
    finally:
        signal.signal(signal.SIGINT, before)


def press():
    os.kill(os.getpid(), signal.SIGINT)


def wait():
    """For an interrupt, in Python code."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        pass


def in_plain_code():
    press()


def in_a_callback_of_the_garbage_collector():
    def callback(phase, info):
        gc.callbacks.remove(callback)
        press()

    gc.callbacks.append(callback)
    gc.collect()


def where_an_object_ends():
    class Ending:
        def __del__(self):
            press()

    Ending()


@pytest.mark.parametrize(
    "arrive", [in_plain_code, in_a_callback_of_the_garbage_collector, where_an_object_ends], ids=lambda f: f.__name__
)
def test_an_interrupt_is_raised_wherever_it_arrives(arrive):
    assert not signals.interrupted()
    with interruptible(), pytest.raises(KeyboardInterrupt):
        try:
            arrive()
            wait()
        finally:
            assert signals.interrupted()
    assert not signals.interrupted()


def test_what_a_library_swallows_is_raised_at_the_next_unit_of_work(capsys):
    with interruptible(), progress(3, "rl") as bar:
        bar.advance()
        with contextlib.suppress(BaseException):
            press()
            wait()
        with pytest.raises(KeyboardInterrupt):
            bar.advance()


def test_other_errors_that_cannot_be_raised_are_reported_as_ever(monkeypatch):
    class Broken:
        def __del__(self):
            raise ZeroDivisionError

    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: seen.append(what.exc_type))
    with interruptible():
        Broken()
    Broken()
    assert seen == [ZeroDivisionError] * 2


def test_an_interrupt_and_being_told_to_stop_are_two_things():
    with interruptible(), supervision.preemptible():
        os.kill(os.getpid(), signal.SIGTERM)
        assert world.world.asked.wait(PATIENCE)
        assert not signals.interrupted()
        with pytest.raises(KeyboardInterrupt):
            press()
            wait()


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_where_it_is_ignored_or_heeded_by_somebody_else_it_stays_so(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with signals.interruptible(pytest.fail, lambda: PATIENCE, pytest.fail):
            assert signal.getsignal(signal.SIGINT) is handler
            press()
        assert not signals.interrupted()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_may_use_commands(capsys):
    """Only the main thread has signals."""
    failures = []

    def work():
        try:
            with signals.interruptible(pytest.fail, lambda: 0, pytest.fail), supervision.preemptible():
                signals.raise_if_interrupted()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


# --- whole processes


def commands(bodies, tmp_path, grace=60):
    """Runs `nlae extract` once for each body, in one process, and returns the last exit code and the lines of stderr.

    A body defines a function `read(config)`, which takes the place of the reading of the corpus. A command that returns
    its exit code, instead of ending the process, adds a line `code N`.
    """
    code = (
        "import gc, hashlib, os, signal, sys, threading, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from nlae_jax import cli\n"
        "from nlae_jax.run import preparation\n"
        "press = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        f"for body in {list(bodies)!r}:\n"
        "    exec(body)\n"
        "    preparation.read_documents = read\n"
        "    code = cli.main(sys.argv[1:])\n"
        "    print('code', code, file=sys.stderr, flush=True)\n"
        "sys.exit(code)"
    )
    arguments = ["extract", "--config", "experiments/tiny.py", "--workdir", str(tmp_path / "W")]
    arguments.append(f"--config.checkpoint.grace_seconds={grace}")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()


ENDLESS = "while True: time.sleep(0.01)"
IN_GARBAGE_COLLECTION = f"""
def callback(phase, info):
    gc.callbacks.remove(callback)
    press()
def read(config):
    gc.callbacks.append(callback)
    gc.collect()
    {ENDLESS}
"""
MADE_ANOTHER_ERROR = """
def read(config):
    try:
        press()
        time.sleep(60)
    except BaseException:
        raise ImportError("initialization failed")
"""
PLAIN = f"""
def read(config):
    press()
    {ENDLESS}
"""


def test_a_command_is_interrupted(tmp_path):
    bodies = [PLAIN, IN_GARBAGE_COLLECTION, MADE_ANOTHER_ERROR]
    code, lines = commands(bodies, tmp_path)
    ends = [(lines[number - 1], line) for number, line in enumerate(lines) if line.startswith("code ")]
    assert ends == [("nlae: interrupted; the same command continues", "code 130")] * len(bodies)
    assert code == 130


IN_COMPILED_CODE = """
def read(config):
    threading.Timer(0.5, press).start()
    hashlib.pbkdf2_hmac("sha512", b"", b"", 1_000_000_000)  # hours, in which Python runs nothing
"""
AGAIN = f"""
def read(config):
    try:
        press()
        time.sleep(60)
    except BaseException:
        threading.Timer(1.5, press).start()
        try:
            hashlib.pbkdf2_hmac("sha512", b"", b"", 1_000_000_000)
        except BaseException:
            {ENDLESS}
"""


@pytest.mark.parametrize(("body", "grace"), [(IN_COMPILED_CODE, 1), (AGAIN, 60)])
def test_a_command_that_cannot_be_interrupted_is_ended(tmp_path, body, grace):
    """In compiled code after a while, and at once when Control-C is pressed again."""
    code, lines = commands([body], tmp_path, grace)
    assert (code, lines[-1]) == (130, "nlae: interrupted; the same command continues")
    assert any("Control-C again ends at once" in line for line in lines) == (grace == 1)
