"""Estimates the suite's cost, so that the command can print it before the suite begins."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nlae_jax.evaluate import judge, rewordings, splice, text, trained_controls
from nlae_jax.evaluate.reconstruction import UNINFORMED
from nlae_jax.evaluate.rows import SUFFIX, EvaluatedRows
from nlae_jax.evaluate.sections.truth import BEFORE, CANDIDATES, recurrence_rows
from nlae_jax.evaluate.work import Sizes
from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.transformer import is_weight
from nlae_jax.runtime.progress import clock_text

# Assumed tokens of an explanation: written ones up to the end of the longest in its batch, read ones with the decoder's
# prompt. The carried pair's are 28 tokens long.
_EXPLANATION = 50
# On a CPU, a forward pass over given tokens and the sampling of tokens reach these shares of a matrix product's speed.
_READING, _WRITING = 0.6, 0.2


class Cost(NamedTuple):
    """The cost of one section: the number of explanations to write, and the number of tokens to read.

    The encoder writes explanations. The decoder and the subject read tokens.
    """

    explanations: int = 0
    read: int = 0

    def add(self, explanations: int, read: int = 0) -> Cost:
        """Adds explanations, which the decoder also reads, and `read` tokens of other texts."""
        return Cost(self.explanations + explanations, self.read + explanations * _EXPLANATION + read)


class Extras(NamedTuple):
    """Optional parts of the suite.

    `control_steps` is the number of training steps of each trained control. `rewords` and `judges` say whether another
    language model rewords and judges explanations.
    """

    control_steps: int = 0
    rewords: bool = False
    judges: bool = False


class Asked(NamedTuple):
    """What the suite's cost depends on.

    `rows` may still be without activations: only their number, documents and contexts count. `reading` is the number of
    tokens that the subject reads for the activations, 0 if they are there.
    """

    rows: EvaluatedRows
    sizes: Sizes
    seed: int
    sections: Sequence[str]
    extras: Extras = Extras()
    reading: int = 0

    def some(self, count: int) -> int:
        """Returns how many of at most `count` rows there are."""
        return min(count, len(self.rows.document))


def costs(asked: Asked) -> dict[str, Cost]:
    """Returns the cost of each section, by name.

    If several sections need the same work, the first of them has its cost. Numbers of explanations are exact. Numbers
    of tokens are estimates, because the lengths of explanations are not known yet.
    """
    rows, sizes, extras, some = len(asked.rows.document), asked.sizes, asked.extras, asked.some
    context = sum(map(len, asked.rows.context_ids))
    # About eight vectors are spliced into every row. Only the blocks above the activation's compute, about a third.
    spliced = 8 * (splice.FOLLOWING + 2) // 3
    before = recurrence_rows(asked.rows, sizes.sampled, asked.seed)
    by_section = {
        "reconstruction": Cost().add(len(UNINFORMED) * some(sizes.sampled)),
        "text": Cost().add(
            0,
            (rows + some(sizes.text) * (len(text.TOKEN_COUNTS) // 2 + 10)) * _EXPLANATION
            + (_trained(rows, extras.control_steps) + context if extras.control_steps else 0)
            + (2 * some(sizes.text) * _EXPLANATION if extras.rewords else 0),
        ),
        "meaning": Cost().add(0, context + rows * spliced),
        # The explanations of earlier tokens are compared as text, so the decoder does not read them.
        "truth": Cost(len(before) * BEFORE, some(sizes.suffix) * 3 * (CANDIDATES * SUFFIX + 96)),
        "health": Cost(),
    }
    chosen = {name: by_section[name] for name in by_section if name in asked.sections}
    shared = (
        (chosen, rows, 0),  # every activation is explained once
        (("reconstruction", "truth"), some(sizes.sampled) * sizes.samples, 0),
        (("text", "truth"), 0, context * some(sizes.text) // max(rows, 1)),  # the subject ranks next tokens
    )
    for needed_by, explanations, read in shared:
        if section := next((name for name in chosen if name in needed_by), None):
            chosen[section] = chosen[section].add(explanations, read)
    return chosen


def _trained(rows: int, steps: int) -> int:
    """Returns the tokens that the three trained controls read. A training step costs about three forward passes."""
    held_out = rows // trained_controls.TEST_SHARE
    return 3 * (3 * steps * trained_controls.BATCH + held_out) * _EXPLANATION


def answers(asked: Asked) -> int:
    """Returns the largest number of requests to another language model."""
    extras, sizes, sections = asked.extras, asked.sizes, asked.sections
    reworded = rewordings.answers_asked(asked.some(sizes.text)) if extras.rewords and "text" in sections else 0
    return reworded + (judge.answers_asked(asked.some(sizes.judged)) if extras.judges and "truth" in sections else 0)


def cost_text(asked: Asked, arch: Arch) -> str:
    """Returns the cost as one line: explanations, the total time, and the time of each section.

    Times are estimated from the speed of one matrix product on this machine. `arch` is the encoder's. The line also has
    the number of requests to another language model. What an earlier run has done is not known before the activations
    are read, so it is counted too.
    """
    weights = jax.tree.leaves(model_weights(arch)["blocks"], is_leaf=is_weight)
    flops_per_token, speed = 2 * sum(math.prod(weight.shape) for weight in weights), _product_speed()
    by_part = {"activations": Cost(0, asked.reading)} if asked.reading else {}
    parts, total, explanations = [], 0.0, 0
    for name, cost in {**by_part, **costs(asked)}.items():
        written = cost.explanations * _EXPLANATION
        seconds = flops_per_token * (cost.read / _READING + written / _WRITING) / speed
        explanations += cost.explanations
        total += seconds
        parts.append(f"{name} {clock_text(seconds)}")
    rows = len(asked.rows.document)
    line = f"eval: {rows} activations, {explanations:,} explanations, about {clock_text(total)} in all: "
    line += ", ".join(parts)
    if requests := answers(asked):
        line += f"; another language model is asked {requests} times at most"
    return line


def _product_speed(width: int = 1024, times: int = 8) -> float:
    """Measures a float32 matrix product, the fastest of three. Returns floating-point operations per second."""
    product = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: y @ x, x))
    x = jnp.full((width, width), 1e-3)
    product(x).block_until_ready()
    seconds = []
    for _ in range(3):  # what else the machine does slows some of them
        clock = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - clock)
    return 2 * width**3 * times / min(seconds)
