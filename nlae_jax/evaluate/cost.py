"""What the suite is going to cost, said before it begins."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nlae_jax.evaluate import judge, rewordings, splice, text, trained_controls
from nlae_jax.evaluate.reconstruction import UNINFORMED
from nlae_jax.evaluate.rows import SUFFIX
from nlae_jax.evaluate.sections.truth import BEFORE, CANDIDATES, recurrence_rows
from nlae_jax.evaluate.work import Work
from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.transformer import is_weight
from nlae_jax.runtime.progress import clock_text

_EXPLANATION = 80  # tokens that an explanation is taken to have, prompt and tail of its reader included
# Shares of a plain product's speed that reading and writing tokens reach on a CPU.
_READING, _WRITING = 0.6, 0.2


class Cost(NamedTuple):
    """Explanations that the encoder writes for a section, and tokens that decoder and subject read for it."""

    explanations: int = 0
    read: int = 0

    def add(self, explanations: int, read: int = 0) -> Cost:
        """With more explanations, which the decoder reads, and more tokens of other texts."""
        return Cost(self.explanations + explanations, self.read + explanations * _EXPLANATION + read)


class Extras(NamedTuple):
    """What is asked for beside the suite: steps of each trained control; whether another model rewords, judges."""

    control_steps: int = 0
    rewords: bool = False
    judges: bool = False


def costs(work: Work, sections: Sequence[str], extras: Extras = Extras()) -> dict[str, Cost]:
    """By section; what several need is the first one's. Explanations are counted; lengths are not known yet."""
    rows, sizes = len(work.rows.h), work.sizes
    some = lambda count: min(count, rows)  # noqa: E731
    context = sum(map(len, work.rows.context_ids))
    ways = 8 * (splice.FOLLOWING + 2) // 3  # of blocks after the activation's
    found = {
        "reconstruction": Cost().add(len(UNINFORMED) * some(sizes.sampled)),
        "text": Cost().add(
            0,
            (rows + some(sizes.text) * (len(text.TOKEN_COUNTS) // 2 + 10)) * _EXPLANATION
            + (_trained(rows, extras.control_steps) + context if extras.control_steps else 0)
            + (2 * some(sizes.text) * _EXPLANATION if extras.rewords else 0),
        ),
        "meaning": Cost().add(0, context + rows * ways),
        # Explanations of the tokens before are compared as text: the decoder does not read them.
        "truth": Cost(len(recurrence_rows(work)) * BEFORE, some(sizes.suffix) * 3 * (CANDIDATES * SUFFIX + 96)),
        "health": Cost(),
    }
    chosen = {name: found[name] for name in found if name in sections}
    shared = (
        (chosen, rows, 0),  # one explanation of every activation
        (("reconstruction", "truth"), some(sizes.sampled) * sizes.samples, 0),
        (("text", "truth"), 0, context * some(sizes.text) // max(rows, 1)),  # contexts read for their next tokens
    )
    for needed_by, explanations, read in shared:
        if section := next((name for name in chosen if name in needed_by), None):
            chosen[section] = chosen[section].add(explanations, read)
    return chosen


def _trained(rows: int, steps: int) -> int:
    """Tokens read for the three trained controls; a step of training is worth three readings."""
    return 3 * (3 * steps * trained_controls.BATCH + rows) * _EXPLANATION


def answers(work: Work, sections: Sequence[str], extras: Extras) -> int:
    """How often another language model is asked."""
    some = lambda count: min(count, len(work.rows.h))  # noqa: E731
    reworded = rewordings.answers_asked(some(work.sizes.text)) if extras.rewords and "text" in sections else 0
    return reworded + (judge.answers_asked(some(work.sizes.judged)) if extras.judges and "truth" in sections else 0)


def cost_text(work: Work, sections: Sequence[str], arch: Arch, extras: Extras = Extras()) -> str:
    """One line: explanations, and minutes in all and by section, from the speed of one product on this machine.

    `arch` is the encoder's. The line says how often another language model is asked, and whether some of the work is
    there already.
    """
    weights = jax.tree.leaves(model_weights(arch)["blocks"], is_leaf=is_weight)
    flops_per_token, speed = 2 * sum(math.prod(weight.shape) for weight in weights), _product_speed()
    parts, total, explanations = [], 0.0, 0
    for section, cost in costs(work, sections, extras).items():
        written = cost.explanations * _EXPLANATION
        seconds = flops_per_token * (cost.read / _READING + written / _WRITING) / speed
        explanations += cost.explanations
        total += seconds
        parts.append(f"{section} {clock_text(seconds)}")
    line = f"eval: {len(work.rows.h)} activations, {explanations:,} explanations, about {clock_text(total)} in all: "
    line += ", ".join(parts)
    if asked := answers(work, sections, extras):
        line += f"; another language model is asked {asked} times at most"
    return f"{line}; less what an earlier run has done" if work.kept.begun else line


def _product_speed(width: int = 1024, times: int = 8) -> float:
    """Operations a second of a float32 product."""
    product = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: y @ x, x))
    x = jnp.full((width, width), 1e-3)
    product(x).block_until_ready()
    clock = time.perf_counter()
    product(x).block_until_ready()
    return 2 * width**3 * times / (time.perf_counter() - clock)
