"""Copies of the rows of `metrics.jsonl` in an experiment tracker: TensorBoard's files, or Weights & Biases.

Names are those of `metrics.jsonl`, after the stage. A resumed stage goes on in the same tracker's run. Trackers are
beside the run: what goes wrong in one is said once, and training goes on.
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
    """Event files in `workdir/tensorboard/STAGE`. What was logged beyond `start` is marked as taken back."""
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
    """One run of Weights & Biases per workdir. WANDB_PROJECT, WANDB_MODE and others say where and how."""
    import wandb

    directory = None if is_remote(workdir) else str(workdir)
    # In full: `runs/mine` is another workdir in another directory.
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
    """Logs the steps of a stage that goes on after step `start`; `kind` is the config's `track`, '' for none.

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
