"""The stages of a run, in order, and the driver that runs them. A stage that was interrupted goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nlae_jax.run.evaluation import evaluate, is_evaluated
from nlae_jax.run.preparation import describe, extract
from nlae_jax.run.resources import Run, prepare
from nlae_jax.run.training import rl, rl_is_finished, sft

STAGES: dict[str, Callable[[Any], None]] = {
    "extract": extract,
    "describe": describe,
    "sft": sft,
    "rl": rl,
    "eval": evaluate,
}
# The first stage that reads prompts: from here on the protocol's fields cannot change any more.
_FIRST_PREPARED = "sft"

# Stages that can be finished although files of earlier stages are gone -> a test whether they are.
_FINISHED: dict[str, Callable[[Run], bool]] = {"rl": rl_is_finished, "eval": is_evaluated}


def run_stage(run: Run, name: str) -> None:
    """Runs the unfinished work of one stage, after that of the stages before it."""
    if name not in _FINISHED or not _FINISHED[name](run):
        run_stages(run, name)


def run_stages(run: Run, last: str = "eval") -> None:
    """Runs the unfinished work of every stage, in order, up to the stage `last`."""
    for name, stage in STAGES.items():
        if name == _FIRST_PREPARED:
            run = prepare(run)
        stage(run)
        if name == last:
            return
