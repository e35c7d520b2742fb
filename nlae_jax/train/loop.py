"""The loop of every training stage: it resumes, runs steps, logs each one step late, and saves checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from nlae_jax.config import Config
from nlae_jax.mesh import put_batch, replicated
from nlae_jax.runtime import processes, supervision, world
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath
from nlae_jax.runtime.progress import Progress, progress, warn
from nlae_jax.train.checkpoint import Checkpoints, abstract_of
from nlae_jax.train.metrics import MetricsLog
from nlae_jax.train.state import shardings_of
from nlae_jax.train.steps import OBSERVED
from nlae_jax.train.trackers import Log, tracker

# After this many steps a stage ends if all its updates were skipped: it has no finite gradient to learn from.
_PATIENCE = 10

_Shapes = tuple[tuple[int, ...], ...]  # of a batch's arrays, ordered by the arrays' names

SHOWN = ("loss", "fve", "reward_mean", "kl", "explanation_tokens")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage: `steps` calls of the jitted `step`, on batches of `iterator`.

    Where batches come in several shapes, `examples` has one batch of each: all are compiled before the first step.
    The process that logs calls `observe` with the arrays that the step's metrics hold under `steps.OBSERVED`, as host
    arrays, and logs the returned numbers in the step's row. It calls `at_checkpoint` with the step's number after the
    row of every step that is saved.
    `made_with` says, as JSON, what the stage is trained with. It is saved in every checkpoint.
    """

    name: str
    steps: int
    step: Any
    iterator: Any
    examples: Sequence[dict[str, np.ndarray]] = ()
    observe: Callable[[Any], Mapping[str, float]] | None = None
    at_checkpoint: Callable[[int], None] | None = None
    made_with: dict[str, Any] = dataclasses.field(default_factory=dict)


def compiled(step: Callable[..., tuple[Any, Any]], state: Any, mesh: Mesh) -> Any:
    """Jits a step. The new state takes over the old one's memory (donation) and keeps its shardings."""
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(state), replicated(mesh)))


def run_stage(stage: Stage, state: Any, frozen: Any, mesh: Mesh, config: Config, workdir: AnyPath) -> Any:
    """Runs the remaining steps of a stage and returns its final state.

    `state` is the first state, used where no checkpoint exists. Rows logged after the checkpoint that is resumed from
    are dropped, and their steps are run again with the same numbers. Raises `supervision.Preempted`, after saving the
    last step, once any process is asked to stop. Raises UserError where every update was skipped.
    """
    with contextlib.ExitStack() as opened:
        checkpoints = opened.enter_context(Checkpoints(workdir / "checkpoints" / stage.name, config.checkpoint.keep))
        log = opened.enter_context(MetricsLog(workdir / "metrics.jsonl")) if world.is_first() else None
        newest = checkpoints.newest()
        kind = config.track if log is not None and newest != stage.steps else ""
        track = opened.enter_context(tracker(kind, workdir, stage.name, newest or 0))
        return _run(stage, state, frozen, mesh, config, checkpoints, newest, log, track)


def _run(
    stage: Stage,
    state: Any,
    frozen: Any,
    mesh: Mesh,
    config: Config,
    checkpoints: Checkpoints,
    newest: int | None,
    log: MetricsLog | None,
    track: Log,
) -> Any:
    """Runs a stage from its `newest` checkpoint on. `run_stage` opens and closes the files that it writes."""
    stop, start = processes.Agreement(mesh), newest or 0
    if newest is not None:
        state = _restored(stage, state, checkpoints, newest)
    if log is not None:
        log.rewind(stage.name, start)
        log.sort()
    if start == stage.steps:
        return state
    announced_shapes = _compile_examples(stage, state, frozen, mesh)
    processes.barrier()
    compiled_before, expected, warned = stage.step._cache_size(), max(1, len(announced_shapes)), False
    with progress(stage.steps, stage.name, unit="step", start=start) as bar:
        rows = _MetricRows(stage, log, track, bar)
        for number in range(start + 1, stage.steps + 1):
            batch = put_batch(next(stage.iterator), mesh)
            if announced_shapes and _shapes(batch) not in announced_shapes:
                raise RuntimeError(f"{stage.name}: a batch of shapes {_shapes(batch)}, which no example announced")
            if number == start + 1 and not announced_shapes:
                processes.compile_together(stage.step, state, frozen, batch)
            with jax.transfer_guard("disallow"):
                state, metrics = stage.step(state, frozen, batch)
            if not warned and stage.step._cache_size() - compiled_before > expected:
                warned = True
                warn(f"{stage.name}: step {number} was compiled anew; {expected} compilations are expected in all")
            # The previous step's metrics are fetched only now, so that the device never waits for the host.
            rows.write()
            checkpoints.poll()
            rows.hold(number, metrics)
            stopping = stop()
            if number in (_PATIENCE, stage.steps):
                rows.write()
                _check_learned(stage.name, number, state)
            if stopping or number % config.checkpoint.every_steps == 0 or number == stage.steps:
                rows.write()
                if log is not None:
                    log.sync()  # a complete checkpoint must not be ahead of its rows
                    if stage.at_checkpoint is not None:
                        stage.at_checkpoint(number)
                checkpoints.save(number, state, {"iterator": stage.iterator.get_state(), "made_with": stage.made_with})
            if stopping:
                checkpoints.finish()
                raise supervision.Preempted
    try:
        if log is not None:
            log.sort()
    finally:
        checkpoints.finish()  # also where the log fails
    return state


def _restored(stage: Stage, state: Any, checkpoints: Checkpoints, step: int) -> Any:
    """Restores the state and the position in the data after `step`. Deletes the arrays of `state`."""
    abstract = abstract_of(state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # the caller still holds this state, and the device may have room for one only
    state, data = checkpoints.restore_step(abstract, step)
    stage.iterator.set_state(data["iterator"])
    return state


def _compile_examples(stage: Stage, state: Any, frozen: Any, mesh: Mesh) -> set[_Shapes]:
    """Compiles the step for each of the stage's example batches. Returns their shapes."""
    shapes = set()
    for example in stage.examples:
        batch = put_batch(example, mesh)
        stage.step.lower(state, frozen, batch).compile()
        shapes.add(_shapes(batch))
    return shapes


class _MetricRows:
    """Logs each step's metrics one step late: `hold` keeps them on the device, and `write` fetches and logs them."""

    def __init__(self, stage: Stage, log: MetricsLog | None, track: Log, bar: Progress) -> None:
        self._stage, self._log, self._track, self._bar = stage, log, track, bar
        self._clock = time.perf_counter()
        self._held: tuple[int, Any] | None = None

    def hold(self, number: int, metrics: Any) -> None:
        """Keeps the metrics of step `number`."""
        self._held = number, metrics

    def write(self) -> None:
        """Logs the metrics that are held, if there are any."""
        if self._held is None:
            return
        (number, metrics), self._held = self._held, None
        observed = metrics.pop(OBSERVED, None)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        tokens = values.pop("tokens")
        if self._log is not None:
            row = {**values, "step_seconds": seconds, "tokens_per_second": tokens / seconds}
            if self._stage.observe is not None:
                row |= self._stage.observe(jax.device_get(observed))
            self._log.append({"stage": self._stage.name, "step": number, **row})
            self._track(number, row)
        self._bar.advance(1, **{name: values[name] for name in SHOWN if name in values})


def _check_learned(stage: str, steps: int, state: Any) -> None:
    """Raises UserError where an optimiser has skipped every update: the stage would silently learn nothing."""
    for path, count in optax.tree_utils.tree_get_all_with_path(state, "count"):
        if int(count) == 0:
            role = getattr(path[0], "name", "")
            of_role = f"of the {role} " if role in ("encoder", "decoder") else ""
            raise UserError(
                f"{stage}: none of the first {steps} updates {of_role}was made, because no gradient was finite; the "
                "weights or activations are too large for subject.dtype, or a learning rate is too high"
            )


def _shapes(batch: dict[str, Any]) -> _Shapes:
    return tuple(batch[name].shape for name in sorted(batch))


def last_checkpoint(workdir: AnyPath, stage: str, steps: int) -> AnyPath:
    """Returns the directory in which a stage of `steps` steps leaves its final state."""
    return workdir / "checkpoints" / stage / str(steps)
