"""Several real processes, each with its own devices, are one run; told to stop, they save; one lost, the others end."""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from nlae_jax.cli import main
from nlae_jax.config import MeshConfig
from nlae_jax.data.activations import ActivationStore
from nlae_jax.mesh import make_mesh, share
from nlae_jax.run.stages import STAGES
from nlae_jax.runtime import processes, supervision, world
from nlae_jax.runtime.errors import UserError
from nlae_jax.train.checkpoint import is_sealed
from nlae_jax.train.metrics import MetricsLog
from tests.conftest import environment_with
from tests.test_resume import assert_same, rows_of, run_toy
from tests.tiny_run import ROOT

pytest_plugins = ["tests.tiny_run"]

PATIENCE = 300  # seconds: only for what should have happened long before

# How it is computed, and nothing that binds a workdir.
SETTINGS = {"mesh__data": 2, "mesh__fsdp": 2, "checkpoint__grace_seconds": 120.0}


def begun(tiny_run, workdir, step=58):
    """The tiny run as one process left it after a while: all but its warm-started encoder is to be made anew."""
    checkpoint = f"checkpoints/encoder_sft/{step}"
    shutil.copytree(tiny_run.workdir / checkpoint, workdir / checkpoint)
    for name in ("protocol.json", "config.json"):
        shutil.copy(tiny_run.workdir / name, workdir)
    lines = (tiny_run.workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(line for line in lines if "encoder_sft" in line), encoding="utf-8")
    return workdir


# --- the flag


def test_settings():
    assert processes.settings("10.0.0.1:1234,4,3") == ("10.0.0.1:1234", 4, 3)
    assert processes.settings("[::1]:80,1,0") == ("[::1]:80", 1, 0)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "a:1",
        "a:1,2",
        "a:1,2,2",
        "a:1,2,-1",
        "a,2,0",
        ":1,2,0",
        "a:0,2,0",
        "a:1,x,0",
        "a:1,2," + "9" * 5000,
        "a:\u0663,2,1",
    ],
)
def test_settings_that_make_no_sense(spec):
    with pytest.raises(UserError, match="--distributed"):
        processes.settings(spec)


def test_a_coordinator_whose_name_is_none_is_said_at_once():
    with pytest.raises(UserError, match=r"--distributed a\.\.b:1: a\.\.b is not a valid host name"):
        processes._await_coordinator("a..b:1", is_coordinator=False)


def test_settings_of_the_environment(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    assert processes.settings("auto") == (None, None, None)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "pod-0:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert processes.settings("auto") == ("pod-0:1234", 2, 1)
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(UserError, match="JAX_PROCESS_ID"):
        processes.settings("auto")


@pytest.mark.parametrize("spec", ["auto", "localhost:{free},2,1", "localhost:{taken},2,0"])
def test_start_fails_in_one_line(spec):
    """No cluster; nobody at the coordinator's address; its port taken."""
    with socket.create_server(("", 0)) as server:
        spec = spec.format(free=free_port(), taken=server.getsockname()[1])
        code = (
            "from nlae_jax import cli\n"
            "from nlae_jax.runtime import processes\n"
            "processes.CONNECT_SECONDS = 1.0\n"
            f"raise SystemExit(cli.main(['bench', '--config', 'experiments/tiny.py', '--distributed', {spec!r}]))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("nlae")]
    assert line.startswith("nlae: --distributed")
    assert "Traceback" not in done.stderr


# --- one process


def test_one_process_is_the_first_of_one():
    assert world.is_first()
    assert world.count() == 1
    assert processes.by_first(lambda: (1, 2)) == (1, 2)
    processes.barrier()
    assert supervision.end(3) == 3


def test_a_share_of_one_process_is_all():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_array_equal(share(mesh, np.arange(8)), np.arange(8))


def terminate():
    """Sends SIGTERM to this process and returns when it is heeded."""
    os.kill(os.getpid(), signal.SIGTERM)
    assert world.world.asked.wait(PATIENCE)


def test_the_signal_counts_inside_only():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with supervision.preemptible():
            supervision.stop_if_asked()
            terminate()
            with pytest.raises(supervision.Preempted):
                supervision.stop_if_asked()
        assert not seen
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [1]
        with supervision.preemptible():
            supervision.stop_if_asked()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("stop", [1, 3, 4, 10])
def test_a_loop_told_to_stop_saves_its_last_step(tmp_path, stop):
    whole, workdir = tmp_path / "whole", tmp_path / "W"
    w = np.asarray(run_toy(whole)["w"])
    with pytest.raises(supervision.Preempted), supervision.preemptible():
        run_toy(workdir, lambda number: number == stop and terminate())
    assert is_sealed(workdir / f"checkpoints/toy/{stop}")
    assert len(rows_of(workdir)) == stop
    np.testing.assert_array_equal(run_toy(workdir)["w"], w)
    assert rows_of(workdir) == rows_of(whole)


@pytest.mark.parametrize(("owner", "name"), [("index", "write_parquet"), ("preparation", "make_describer")])
def test_nothing_is_begun_that_cannot_be_stopped(tiny_run, tmp_path, monkeypatch, owner, name):
    """Told to stop while documents are planned, and while they are described."""
    import nlae_jax.data.index
    import nlae_jax.run.preparation

    module = {"index": nlae_jax.data.index, "preparation": nlae_jax.run.preparation}[owner]
    original = getattr(module, name)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *given: terminate() or original(*given))
        assert main(tiny_run.arguments(tmp_path / "W", "describe")) == supervision.PREEMPTED
    assert main(tiny_run.arguments(tmp_path / "W", "describe")) == 0
    for file in ("rows.parquet", "descriptions.parquet", "meta.json"):
        ours, theirs = (workdir / "activations" / file for workdir in (tmp_path / "W", tiny_run.workdir))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_told_to_stop_in_every_stage_ends_with_the_same_numbers(tiny_run, tmp_path, monkeypatch, capsys):
    """Bit for bit."""
    workdir = begun(tiny_run, tmp_path / "W")
    for at in (("encoder_sft", 59), ("decoder_sft", 3), ("rl", 3)):
        run_until(at, tiny_run.arguments(workdir), monkeypatch)
        assert capsys.readouterr().err.splitlines()[-1] == "nlae: preempted; the same command continues"
    assert main(tiny_run.arguments(workdir)) == 0
    assert_same(tiny_run, workdir)


def test_what_cannot_be_stopped_is_cut_off(tiny_run, tmp_path):
    """A step that never ends: the process does, with the same code."""
    code = (
        "import os, signal, sys, threading\n"
        "from nlae_jax import cli\n"
        "from nlae_jax.run import preparation\n"
        "def endless(*_):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    threading.Event().wait()\n"
        "preparation.read_documents = endless\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = tiny_run.arguments(tmp_path / "W", "extract", checkpoint__grace_seconds=0.5)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == supervision.PREEMPTED, done.stderr
    assert done.stderr.splitlines()[-1].startswith("nlae: preempted; nothing more was saved within")


# --- another mesh


def run_until(at, arguments, monkeypatch):
    """Runs in this process until a row is written, and is told to stop then."""
    append = MetricsLog.append

    def patched(self, row):
        append(self, row)
        if (row["stage"], row["step"]) == at:
            terminate()

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", patched)
        assert main(arguments) == supervision.PREEMPTED


# Rates are small: Adam makes large steps of a rounding error's gradient, and a sampled token that then falls otherwise
# changes everything after it. Eight devices divide the batches.
GENTLE = {"rl__activations_per_step": 8, "rl__num_steps": 4}
GENTLE |= {"sft__decoder_learning_rate": 1e-4, "rl__encoder_learning_rate": 1e-6}
ADAPTERS = {"lora__rank": 4, "sft__encoder_steps": 6, "sft__encoder_learning_rate": 1e-4}


def gentle(tiny_run, workdir, rank, mesh=(1, 1, 1)):
    """The arguments of a run on a mesh.

    With full fine-tuning a new workdir gets an encoder that closes its tags.
    """
    if rank == 0 and not workdir.exists():
        begun(tiny_run, workdir, 60)
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    return tiny_run.arguments(workdir, **GENTLE, **(ADAPTERS if rank else {}), **sizes)


@pytest.fixture(scope="module")
def alone(tiny_run, tmp_path_factory):
    """By LoRA rank: the workdir of a whole run on one device."""

    @functools.cache
    def run(rank):
        workdir = tmp_path_factory.mktemp("alone") / "W"
        assert main(gentle(tiny_run, workdir, rank)) == 0
        if rank == 0:  # or there would be nothing to compare
            assert json.loads((workdir / "eval.json").read_text(encoding="utf-8"))["extraction_rate"] > 0
        return workdir

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "mesh"), [(0, (1, 8, 1)), (0, (2, 2, 2)), (4, (1, 2, 4)), (4, (8, 1, 1))])
def test_whole_runs_on_any_mesh_give_the_numbers_of_one_device(tiny_run, tmp_path, alone, rank, mesh):
    """All but full fine-tuning's warm start of the encoder, which `test_steps` has."""
    assert main(gentle(tiny_run, tmp_path / "W", rank, mesh)) == 0
    assert_close(tiny_run, tmp_path / "W", alone(rank))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_goes_on_on_another_mesh(tiny_run, tmp_path, monkeypatch, alone, rank):
    workdir = tmp_path / "W"
    for mesh, at in (((2, 2, 2), ("decoder_sft", 2)), ((1, 1, 1), ("rl", 1))):
        run_until(at, gentle(tiny_run, workdir, rank, mesh), monkeypatch)
    assert main(gentle(tiny_run, workdir, rank, (1, 8, 1))) == 0
    assert_close(tiny_run, workdir, alone(rank))


# --- several processes


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Processes:
    """`count` processes with four devices together; a context manager that leaves none behind."""

    def __init__(self, count, arguments):
        environment = environment_with(4 // count)
        port = free_port()
        self.all = [
            subprocess.Popen(
                [sys.executable, "-m", "nlae_jax", *arguments, "--distributed", f"localhost:{port},{count},{index}"],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
            process.communicate()

    def ends(self, timeout=PATIENCE):
        """Exit codes and what was said, of each."""
        shown = [process.communicate(timeout=timeout)[1] for process in self.all]
        return [process.returncode for process in self.all], shown

    def wait_for(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in self.all), self.ends()
            time.sleep(0.01)


def run_in(count, arguments):
    """A port that was free may be taken by another process before the run listens there: then another is tried."""
    for _ in range(3):
        with Processes(count, arguments) as processes:
            codes, shown = processes.ends()
        if not any("cannot listen" in text for text in shown):
            break
    assert codes == [0] * count, "\n".join(shown)
    return shown


def rows_in(workdir, stage):
    path = workdir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return sum(json.loads(line)["stage"] == stage for line in text.splitlines(keepends=True) if line.endswith("\n"))


def files_of(workdir):
    """Names of all files, without those inside arrays and checkpoints, whose division follows the processes'."""
    names = {path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()}
    return {name for name in names if not {"vectors", "next_tokens", "state"} & set(name.parts)}


def close_to(expected):
    """Equal to what has these values by name, its numbers to 1e-4."""
    is_exact = lambda value: value is None or isinstance(value, str)  # noqa: E731
    return {k: v if is_exact(v) else pytest.approx(v, rel=1e-4, abs=1e-4) for k, v in expected.items()}


def assert_close(tiny_run, workdir, whole):
    """Every number to 1e-4, which is what another order of sums leaves of float32 after some steps.

    Such a difference may turn a draw between two tokens: one explanation of the evaluation may be another one. Then the
    figures of the others are compared instead of the means.
    """
    rows, expected = tiny_run.metrics(workdir), tiny_run.metrics(whole)
    assert [(row["stage"], row["step"]) for row in rows] == [(row["stage"], row["step"]) for row in expected]
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours == close_to(theirs)
    results = [json.loads((path / "eval.json").read_text(encoding="utf-8")) for path in (workdir, whole)]
    explained = [tiny_run.samples(path) for path in (workdir, whole)]
    same = [ours["explanation"] == theirs["explanation"] for ours, theirs in zip(*explained, strict=True)]
    assert sum(same) >= len(same) - 1
    for ours, theirs in zip(*explained, strict=True):
        if ours["explanation"] == theirs["explanation"]:
            assert ours == close_to(theirs)
    if all(same):
        assert results[0] == close_to(results[1])
    stores = [ActivationStore(path / "activations") for path in (workdir, whole)]
    vectors = [store.vectors(np.arange(len(store.index.position))) for store in stores]
    np.testing.assert_allclose(*vectors, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "fused"), [(4, True), (2, False)])
def test_several_processes_give_the_numbers_of_one(tiny_run, tmp_path, count, fused):
    """To 1e-4 and not to the bit: the sums between processes are taken in another order than inside one."""
    workdir = begun(tiny_run, tmp_path / "W")
    shown = run_in(count, tiny_run.arguments(workdir, rl__fused=fused, **SETTINGS))
    assert_close(tiny_run, workdir, tiny_run.workdir)
    assert files_of(workdir) == files_of(tiny_run.workdir)
    assert "rl 6/6" in shown[0]
    for text in shown[1:]:
        assert "rl" not in text


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_one_process_killed_ends_the_other_and_the_run_goes_on(tiny_run, tmp_path, lost):
    """Whichever it is: the coordinator, or another."""
    workdir = begun(tiny_run, tmp_path / "W")
    arguments = tiny_run.arguments(workdir, **SETTINGS)
    with Processes(2, arguments) as processes:
        processes.wait_for(lambda: rows_in(workdir, "decoder_sft") >= 2)
        processes.all[lost].kill()
        killed = time.monotonic()
        _, shown = processes.all[1 - lost].communicate(timeout=PATIENCE)
        assert time.monotonic() - killed < 60
        assert processes.all[1 - lost].returncode == supervision.LOST, shown
    assert "is gone" in shown.splitlines()[-1]
    assert "Traceback" not in shown
    run_in(2, arguments)
    assert_close(tiny_run, workdir, tiny_run.workdir)


@pytest.mark.slow
def test_an_abort_while_python_stands_still_ends_the_process():
    """A thread that Python does not know aborts while another holds Python's lock: nothing waits for that lock."""
    code = (
        "import ctypes\n"
        "from nlae_jax.runtime import supervision\n"
        "supervision.delay_abort()\n"
        "library = ctypes.CDLL(None)\n"
        "library.pthread_create(ctypes.byref(ctypes.c_ulong()), None, library.abort, None)\n"
        "ctypes.PyDLL(None).sleep(600)\n"  # a PyDLL keeps the lock
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=PATIENCE)
    assert done.returncode == -signal.SIGABRT, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("gone", [True, False])
def test_an_abort_leaves_time_to_say_that_the_coordinator_is_gone(gone):
    """Without one the process ends with the code and the line of a loss; with one it aborts as ever."""
    code = (
        "import ctypes, threading, sys\n"
        "from nlae_jax.runtime import supervision, world\n"
        "supervision.world = world.World(index=1, count=2)\n"  # it was never answered
        "supervision._LOST_SECONDS = float('inf')\n"
        "supervision.delay_abort()\n"
        "threading.Thread(target=supervision.guard, args=(sys.argv[1],), daemon=True).start()\n"
        "ctypes.CDLL(None).abort()\n"
    )
    with socket.create_server(("localhost", 0)) as server:
        place = f"localhost:{free_port() if gone else server.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", code, place], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
        )
    assert done.returncode == (supervision.LOST if gone else -signal.SIGABRT)
    assert ("the coordinator is gone" in done.stderr) == gone


@pytest.mark.slow
def test_one_process_told_to_stop_stops_all_and_others_go_on(tiny_run, tmp_path):
    """Two processes, then one, then four: the same numbers."""
    workdir = begun(tiny_run, tmp_path / "W")
    arguments = tiny_run.arguments(workdir, **SETTINGS)
    for count, stage in ((2, "decoder_sft"), (1, "rl")):
        with Processes(count, arguments) as processes:
            processes.wait_for(lambda stage=stage: rows_in(workdir, stage) >= 1)
            processes.all[-1].send_signal(signal.SIGTERM)
            codes, shown = processes.ends()
        assert codes == [supervision.PREEMPTED] * count, "\n".join(shown)
        assert shown[0].splitlines()[-1] == "nlae: preempted; the same command continues"
        assert is_sealed(workdir / f"checkpoints/{stage}/{rows_in(workdir, stage)}")
    run_in(4, arguments)
    assert_close(tiny_run, workdir, tiny_run.workdir)


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_its_code(tiny_run, tmp_path):
    """Found by the first alone, while the others wait for it."""
    with Processes(2, tiny_run.arguments(tmp_path / "W", corpus__min_characters=10**6, **SETTINGS)) as processes:
        codes, shown = processes.ends()
    assert codes == [2, 2], shown
    for text in shown:
        assert "no document is left" in text.splitlines()[-1]


@pytest.mark.slow
def test_bench_in_several_processes(tiny_run, tmp_path):
    """To its end."""
    arguments = tiny_run.arguments(tmp_path / "W", "bench", rl__activations_per_step=4, **SETTINGS)
    place = arguments.index("--workdir")
    run_in(2, [*arguments[:place], *arguments[place + 2 :], "--repeats", "1"])


def test_an_error_that_no_loss_explains_is_the_process_s_own(tiny_run, tmp_path, monkeypatch, capsys):
    """It reads like a lost connection, and all others are there."""

    def mistake(run):
        raise RuntimeError("the connection is a mistake")

    def leave(code, message=""):
        raise SystemExit(code)

    pretended = world.World(count=2, client=Mock())
    for module in (supervision, world):
        monkeypatch.setattr(module, "world", pretended)
    monkeypatch.setattr(supervision, "_LOST_SECONDS", -20.0)
    monkeypatch.setattr(supervision, "_exit", leave)
    monkeypatch.setitem(STAGES, "extract", mistake)
    with pytest.raises(SystemExit) as ended:
        main(tiny_run.arguments(tmp_path / "W", "extract"))
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("RuntimeError: the connection is a mistake") == 1


def test_this_process_has_eight_devices_and_no_others():
    """What the tests above take for granted."""
    assert jax.process_count() == 1
    assert jax.device_count() == 8
