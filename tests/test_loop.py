"""The loop: batches of several widths, each compiled before the first step; what a step shows; resuming."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlae_jax.config import MeshConfig, resolve
from nlae_jax.data.pipeline import batches, bucket_widths, bucketed_batches
from nlae_jax.mesh import make_mesh, replicated
from nlae_jax.runtime.errors import UserError
from nlae_jax.train.checkpoint import Checkpoints, is_sealed
from nlae_jax.train.loop import Stage, _check_learned, compiled, last_checkpoint, run_stage
from nlae_jax.train.metrics import MetricsLog, read
from nlae_jax.train.state import RlState, RoleState
from nlae_jax.train.steps import OBSERVED
from nlae_jax.train.updates import apply_update

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


class Constant:
    """An iterator of one batch."""

    def __next__(self):
        return {"x": np.ones((2, 2), np.float32)}

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def learning(workdir, steps, finite, every=3):
    """A stage with an optimiser whose gradient is finite in the steps that `finite` names (counted from 1)."""
    mesh, optimizer = make_mesh(MeshConfig()), optax.adamw(lambda count: 0.1)

    def update(state, frozen, batch):
        good = (jnp.asarray(finite) == state.step + 1).any()
        gradient = {"w": jnp.where(good, 1.0, jnp.nan)}
        state, norm, skipped = apply_update(state, gradient, optimizer)
        return state, {"loss": norm, "skipped_updates": skipped, "tokens": jnp.ones(())}

    trained = {"w": jnp.zeros(())}
    state = RoleState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))
    state = jax.device_put(state, replicated(mesh))
    frozen = jax.device_put({}, replicated(mesh))
    stage = Stage("toy", steps, compiled(update, state, mesh), Constant())
    config = resolve({"checkpoint.every_steps": every})
    return run_stage(stage, state, frozen, mesh, config, workdir)


def logged(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("steps", [1, 4, 10, 30])
def test_a_stage_that_skips_every_update_fails_soon_and_again(tmp_path, steps):
    """Not after days, and not with a checkpoint that passes for a finished stage."""
    last = min(steps, 10)
    for _ in range(2):
        with pytest.raises(UserError, match=f"toy: none of the first {last} updates was made, because no gradient"):
            learning(tmp_path, steps, finite=[0])
        assert logged(tmp_path) == list(range(1, last + 1))
    assert not (tmp_path / "checkpoints/toy" / str(steps)).exists()


@pytest.mark.parametrize(("steps", "finite"), [(1, [1]), (4, [4]), (30, [10]), (14, [3])])
def test_one_update_is_enough(tmp_path, steps, finite):
    assert learning(tmp_path, steps, finite).trained["w"] != 0
    assert logged(tmp_path) == list(range(1, steps + 1))


def test_a_run_that_goes_on_has_learned_before(tmp_path):
    """Skipping all that is left of it is no failure."""
    learning(tmp_path, 3, [1, 2, 3])
    assert int(learning(tmp_path, 6, [1]).step) == 6


def test_the_role_that_learns_nothing_is_named():
    optimizer, trained = optax.adamw(0.1), {"w": jnp.zeros(())}
    still = RoleState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))
    moved, _, _ = apply_update(still, {"w": jnp.ones(())}, optimizer)
    _check_learned("rl", 10, RlState(moved, moved, jnp.zeros(2)))
    for role, state in {"encoder": RlState(still, moved, jnp.zeros(2)), "decoder": RlState(moved, still, None)}.items():
        with pytest.raises(UserError, match=f"rl: none of the first 10 updates of the {role} was made"):
            _check_learned("rl", 10, state)


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


# --- what a step shows beside scalars


def run_observed(workdir, fail=0, every=5, observe=True):
    """A stage whose step shows an array; the steps at which it was looked at, in the order of things."""
    mesh, happened = make_mesh(MeshConfig()), []

    def show(state, frozen, batch):
        w = state["w"] + batch["x"].sum()
        return {"w": w}, {"loss": w, "tokens": jnp.asarray(1), OBSERVED: {"rows": batch["x"], "sum": w}}

    state, frozen = jax.device_put(({"w": jnp.zeros(())}, {}), replicated(mesh))
    step = compiled(show, state, mesh)

    class Dispatching:
        _cache_size = step._cache_size

        def __call__(self, *arguments):
            happened.append("step")
            if happened.count("step") == fail:
                raise Killed
            return step(*arguments)

    def look(arrays):
        happened.append("look")
        assert type(arrays["rows"]) is np.ndarray and arrays["rows"].shape == (SIZE, 1)
        return {"seen": float(arrays["sum"]) + 0.5}

    iterator = batches(len(LENGTH), SIZE, 1, lambda rows: {"x": np.float32(rows[:, None])})
    watching = {"observe": look, "at_checkpoint": lambda number: happened.append(number)} if observe else {}
    stage = Stage("toy", 12, Dispatching(), iterator, **watching)
    run_stage(stage, state, frozen, mesh, resolve({"checkpoint.every_steps": every}), workdir)
    return happened, [
        {name: row.get(name) for name in ("step", "loss", "seen")} for row in read(workdir / "metrics.jsonl")
    ]


def test_what_a_step_shows_is_looked_at_one_step_late_and_logged_with_it(tmp_path):
    happened, rows = run_observed(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row["seen"] == row["loss"] + 0.5 for row in rows)
    assert happened[:6] == ["step", "step", "look", "step", "look", "step"]
    after_steps = [event for event in happened if event != "step"]
    assert after_steps == [*["look"] * 5, 5, *["look"] * 5, 10, "look", "look", 12]


def test_looking_begins_again_at_the_checkpoint(tmp_path):
    _, whole = run_observed(tmp_path / "whole")
    with pytest.raises(Killed):
        run_observed(tmp_path / "stopped", fail=8)
    happened, rows = run_observed(tmp_path / "stopped")
    assert rows == whole
    assert [event for event in happened if event != "step"] == [*["look"] * 5, 10, "look", "look", 12]


def test_what_nobody_looks_at_is_left_out(tmp_path):
    happened, rows = run_observed(tmp_path, observe=False)
    assert set(happened) == {"step"}
    assert len(rows) == 12 and all(row["seen"] is None for row in rows)
