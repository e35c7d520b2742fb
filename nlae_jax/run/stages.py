"""The stages of a run, in order. Each first finishes what it needs, then does what is left of it, once and for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nlae_jax.run.evaluation import evaluate
from nlae_jax.run.preparation import describe, extract
from nlae_jax.run.run import Run
from nlae_jax.run.training import rl, sft

STAGES: dict[str, Callable[[Run], Any]] = {
    "extract": extract,
    "describe": describe,
    "sft": sft,
    "rl": rl,
    "eval": evaluate,
}
