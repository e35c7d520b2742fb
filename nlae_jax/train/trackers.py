"""Copies of the rows of `metrics.jsonl` in an experiment tracker: TensorBoard's files, or Weights & Biases.

A value's name is its name in `metrics.jsonl` after the stage's. A resumed stage goes on in the same run of the tracker.
A tracker cannot stop training: its first failure is printed once, and training goes on without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nlae_jax.runtime.errors import UserError, first_line
from nlae_jax.runtime.files import AnyPath, absolute, is_remote
from nlae_jax.runtime.progress import warn

Log = Callable[[int, Mapping[str, float]], None]  # a step's number and its values by name


@contextlib.contextmanager
def _tensorboard(workdir: AnyPath, stage: str, start: int) -> Iterator[Log]:
    """Writes event files in `workdir/tensorboard/STAGE`. Values logged after step `start` are marked as withdrawn."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(
        str(workdir / "tensorboard" / stage), purge_step=start + 1, filename_suffix=f".{start}"
    ) as writer:

        def log(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(f"{stage}/{name}", value, step)

        yield log


@contextlib.contextmanager
def _wandb(workdir: AnyPath, stage: str, start: int) -> Iterator[Log]:
    """Logs to one run of Weights & Biases per workdir. WANDB_PROJECT, WANDB_MODE and its other variables apply."""
    import wandb

    directory = None if is_remote(workdir) else str(workdir)
    # The absolute path: `runs/mine` is another workdir in another directory.
    name = hashlib.sha256(str(absolute(workdir)).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    # A repeated step is logged twice there: W&B cannot take back rows, and shows the later one.
    run = wandb.init(
        project="nlae_jax", id=name, name=workdir.name, dir=directory, resume="allow", reinit="return_previous"
    )
    run.define_metric(f"{stage}/step")
    run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    try:
        yield lambda step, values: run.log({f"{stage}/step": step, **{f"{stage}/{k}": v for k, v in values.items()}})
    finally:
        run.finish()


_TRACKERS: dict[str, tuple[str, Callable[[AnyPath, str, int], contextlib.AbstractContextManager[Log]]]] = {
    "tensorboard": ("tensorboardX", _tensorboard),
    "wandb": ("wandb", _wandb),
}


def check_tracker(kind: str) -> None:
    """Raises UserError where the package of the config's `track` is not installed."""
    if kind and importlib.util.find_spec(_TRACKERS[kind][0]) is None:
        raise _missing(kind)


def _missing(kind: str) -> UserError:
    return UserError(f"track: {kind} needs {_TRACKERS[kind][0]}; install it with pip install 'nlae_jax[{kind}]'")


@contextlib.contextmanager
def tracker(kind: str, workdir: AnyPath, stage: str, start: int) -> Iterator[Log]:
    """Logs the steps of a stage after step `start`. `kind` is the config's `track`, which is '' for no tracker.

    Raises UserError where the tracker is not installed or cannot begin.
    """
    if not kind:
        yield lambda step, values: None
        return
    _, begin = _TRACKERS[kind]
    opened = contextlib.ExitStack()
    try:
        write = opened.enter_context(begin(workdir, stage, start))
    except ImportError:
        raise _missing(kind) from None
    except Exception as error:
        raise UserError(f"track: {kind} cannot begin: {first_line(error)}") from None
    lost = False

    def attempt(act: Callable[[], Any]) -> None:
        nonlocal lost
        try:
            if not lost:
                act()
        except Exception as error:
            lost = True
            warn(f"track: {kind} has failed and gets nothing more of this stage: {first_line(error)}")

    try:
        yield lambda step, values: attempt(lambda: write(step, values))
    finally:
        attempt(opened.close)
