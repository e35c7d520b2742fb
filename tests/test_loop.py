"""The loop with batches of several widths: each is compiled before the first step, and resuming changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlae_jax.config import MeshConfig, resolve
from nlae_jax.data.pipeline import bucket_widths, bucketed_batches
from nlae_jax.mesh import make_mesh, replicated
from nlae_jax.train.checkpoint import Checkpoints, is_sealed
from nlae_jax.train.loop import Stage, compiled, last_checkpoint, run_stage
from nlae_jax.train.metrics import MetricsLog

STEPS, SIZE = 23, 4
LENGTH = np.random.default_rng(0).integers(1, 40, 90)
WIDTHS = bucket_widths(LENGTH, 3)


class Killed(Exception):
    pass


def make_step():
    """A new function each time: jit knows those that it has met."""

    def count_words(state, frozen, batch):
        w = 0.9 * state["w"] + frozen["scale"] * batch["x"].sum()
        return {"w": w}, {"loss": w, "tokens": jnp.asarray(batch["x"].size)}

    return count_words


def load(rows, width):
    return {"x": (np.arange(width) < LENGTH[rows][:, None]) * np.float32(rows[:, None])}


class Watched:
    """The jitted step; `seen` has the shape of every batch, `fail` says before which of them to die."""

    def __init__(self, step, fail, caplog):
        self._step, self._fail, self._caplog, self.seen, self.compiled = step, fail, caplog, [], []
        self.lower, self._cache_size = step.lower, step._cache_size

    def __call__(self, state, frozen, batch):
        self.compiled.append(compilations(self._caplog))
        self.seen.append(batch["x"].shape[1])
        if len(self.seen) == self._fail:
            raise Killed
        return self._step(state, frozen, batch)


def compilations(caplog):
    return sum("Finished XLA compilation of jit(count_words)" in record.getMessage() for record in caplog.records)


def run(workdir, caplog, fail=0, widths=WIDTHS):
    mesh = make_mesh(MeshConfig())
    state, frozen = jax.device_put(({"w": jnp.zeros(())}, {"scale": jnp.float32(0.3)}), replicated(mesh))
    watched = Watched(compiled(make_step(), state, mesh), fail, caplog)
    iterator = bucketed_batches(LENGTH, WIDTHS, SIZE, 1, load)
    stage = Stage("toy", STEPS, watched, iterator, tuple(load(np.arange(SIZE), width) for width in widths))
    config = resolve({"checkpoint.every_steps": 5})
    with jax.log_compiles():
        return float(run_stage(stage, state, frozen, mesh, config, workdir)["w"]), watched


def test_every_width_is_compiled_before_the_first_step(tmp_path, caplog):
    _, watched = run(tmp_path, caplog)
    assert set(watched.seen) == set(WIDTHS.tolist())
    assert watched.compiled == [len(WIDTHS)] * STEPS
    assert compilations(caplog) == watched._cache_size() == len(WIDTHS)


@pytest.mark.parametrize("stop", [1, 6, 12, STEPS])
def test_stopped_run_continues_with_the_same_batches(tmp_path, caplog, stop):
    whole, watched = run(tmp_path / "whole", caplog)
    with pytest.raises(Killed):
        run(tmp_path / "stopped", caplog, fail=stop)
    result, again = run(tmp_path / "stopped", caplog)
    assert result == whole
    assert again.seen == watched.seen[(stop - 1) // 5 * 5 :]


def test_a_width_that_was_not_announced_is_an_error(tmp_path, caplog):
    for _ in range(2):  # a second try does not pass as finished
        with pytest.raises(RuntimeError, match="no example announced"):
            run(tmp_path, caplog, widths=WIDTHS[:2])


def test_a_step_that_is_compiled_anew_is_said_and_loses_nothing(tmp_path, caplog, capsys, monkeypatch):
    """Once, when it happens; the run ends as ever and its last state is sealed."""
    whole, _ = run(tmp_path / "whole", caplog)
    counted = Watched.__call__

    def recompiled(self, *arguments):
        if len(self.seen) >= 4:
            self._cache_size = lambda: 100 + len(self.seen)
        return counted(self, *arguments)

    monkeypatch.setattr(Watched, "__call__", recompiled)
    capsys.readouterr()
    result, _ = run(tmp_path / "again", caplog)
    assert result == whole
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: toy: step 5 was compiled anew; 3 compilations are expected in all"]
    assert is_sealed(last_checkpoint(tmp_path / "again", "toy", STEPS))


def test_the_last_checkpoint_is_sealed_before_anything_else(tmp_path, caplog, monkeypatch):
    """Whatever fails when a stage is over: its result is there."""

    def fail(self):
        raise OSError("the network is gone")

    monkeypatch.setattr(MetricsLog, "__exit__", lambda self, *_: fail(self))
    monkeypatch.setattr(Checkpoints, "__exit__", lambda self, *_: None)  # as where other processes go on
    with pytest.raises(OSError, match="the network"):
        run(tmp_path, caplog)
    assert is_sealed(last_checkpoint(tmp_path, "toy", STEPS))
