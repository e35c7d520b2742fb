"""The decode loop: samples token after token until every row has stopped.

`sample` is the whole loop. `started` and `advanced` are its parts, for callers that stop between tokens and take rows
that have ended out of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nlae_jax.mesh import DECODE_RULES, constrained
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import check_count


class Samples(NamedTuple):
    """Sampled responses of at most R tokens. `*batch` is any shape.

    `tokens` [*batch, R] int32 is zero after a response's end. `log_probs` [*batch, R] float32 is that of each token in
    the distribution that it was drawn from, and zero after the end. `lengths` [*batch] int32 counts tokens, with the
    closing tag or the end of sequence. `closed` [*batch] bool says whether the response ended with the closing tag.
    """

    tokens: jax.Array
    log_probs: jax.Array
    lengths: jax.Array
    closed: jax.Array


class Loop(NamedTuple):
    """The state of the decode loop before `step`.

    `logits` [*batch, V] are those of the next token. `done` [*batch] bool marks the rows that have ended.
    """

    step: jax.Array
    logits: jax.Array
    caches: Any
    samples: Samples
    done: jax.Array


# (token [*batch], step, caches) -> (logits [*batch, V], caches): feeds the response's token number `step`.
DecodeStep = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def check_temperature(value: float) -> None:
    """Raises UserError for a temperature that is negative or not finite."""
    if not isinstance(value, int | float | np.number) or not 0 <= value < math.inf:
        raise UserError(f"temperature: {value} should be 0 or more")


def check_seed(value: int) -> None:
    """Raises UserError for a seed that is no whole number of 32 bits: JAX would cut a longer one."""
    check_count("seed", value, 0, 2**32 - 1)


_CELL = 256  # tokens in a cell: the first search is among the cells' sums, the second inside a cell


def categorical(uniform: jax.Array, logits: jax.Array) -> jax.Array:
    """Draws one token of `softmax(logits)` per row, by inverting the distribution function at `uniform` in [0, 1).

    `uniform` [...] and `logits` [..., V] are float32; the result is [...] int32. It takes one random number per row.
    The Gumbel trick takes V, which was a fifth of the decode loop's time. The search goes over sums of `_CELL`
    probabilities and then inside one of them, so no sum has V terms. A token whose logit is -inf is never drawn. If no
    token can be drawn, because of NaN, the last one is taken.
    """
    padded = jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, -logits.shape[-1] % _CELL)], constant_values=-jnp.inf)
    weights = jnp.exp(padded - logits.max(-1, keepdims=True)).reshape(*uniform.shape, -1, _CELL)
    cells = weights.sum(-1)
    ends = jnp.cumsum(cells, -1)
    target = uniform[..., None] * ends[..., -1:]
    cell = _first_beyond(ends, target, cells)
    within = jnp.take_along_axis(weights, cell[..., None], -2)[..., 0, :]
    begin = jnp.take_along_axis(ends - cells, cell, -1)
    token = (cell * _CELL + _first_beyond(jnp.cumsum(within, -1), target - begin, within))[..., 0]
    return jnp.minimum(token, logits.shape[-1] - 1).astype(jnp.int32)


def _first_beyond(ends: jax.Array, target: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the first entry [..., 1] with a positive weight and an end beyond the target.

    If there is none, it is the last entry with a positive weight. Because sums are rounded, the target may lie slightly
    outside of them on either side.
    """
    last = weights.shape[-1] - 1 - jnp.argmax(weights[..., ::-1] > 0, -1, keepdims=True)
    beyond = (ends > target) & (weights > 0)
    return jnp.where(beyond.any(-1, keepdims=True), jnp.argmax(beyond, -1, keepdims=True), last)


def sample(
    decode: DecodeStep,
    first_logits: jax.Array,
    caches: Any,
    key: jax.Array,
    *,
    max_new_tokens: int,
    closing: tuple[int, ...],
    eos_id: int | Sequence[int],
    temperature: float = 1.0,
) -> Samples:
    """Draws up to `max_new_tokens` tokens per row. A row stops after the `closing` tokens (if any) or an `eos_id`.

    At temperature 0, and at those that float32 rounds to 0, each token is the likeliest one. There is no top-k or
    top-p, because the trainer's log-probs must be the sampler's. The key is folded with the step, so tokens do not
    depend on how rows are laid out over devices.
    """
    batch = first_logits.shape[:-1]
    return advanced(
        decode,
        started(first_logits, caches, max_new_tokens),
        lambda step: jax.random.uniform(jax.random.fold_in(key, step), batch),
        max_new_tokens,
        closing=closing,
        eos_id=eos_id,
        temperature=temperature,
    ).samples


def started(first_logits: jax.Array, caches: Any, max_new_tokens: int) -> Loop:
    """Returns the loop's state before the first token, with room for `max_new_tokens` tokens in each row."""
    batch = first_logits.shape[:-1]
    return Loop(
        step=jnp.zeros((), jnp.int32),
        logits=first_logits,
        caches=caches,
        samples=Samples(
            tokens=jnp.zeros((*batch, max_new_tokens), jnp.int32),
            log_probs=jnp.zeros((*batch, max_new_tokens), jnp.float32),
            lengths=jnp.zeros(batch, jnp.int32),
            closed=jnp.zeros(batch, bool),
        ),
        done=jnp.zeros(batch, bool),
    )


def advanced(
    decode: DecodeStep,
    loop: Loop,
    uniform: Callable[[jax.Array], jax.Array],
    until: int | jax.Array,
    *,
    closing: tuple[int, ...],
    eos_id: int | Sequence[int],
    temperature: float,
) -> Loop:
    """Runs the loop until step `until` or until all rows have ended. `sample` describes the other parameters.

    `uniform(step)` returns the random numbers [*batch] float32 in [0, 1) that the step's tokens are drawn with. They
    are not drawn at temperature 0.
    """
    batch = loop.done.shape
    closing_ids = jnp.asarray(closing, jnp.int32)
    stops = jnp.asarray([eos_id] if isinstance(eos_id, int) else list(eos_id), jnp.int32)

    def draw(logits: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Logits are computed where the head's parts are and drawn from where the rows are. The change of layout is made
        # in steps: in one step, with the head split over two axes, XLA summed whole logits over all devices.
        between = [None] * (logits.ndim - 2)
        logits = constrained(logits, ("rows", *between, "vocab"), DECODE_RULES)
        logits = constrained(logits, ("batch", *between, "vocab"))
        logits = constrained(logits, ("batch", *between, None))
        if temperature < jnp.finfo(jnp.float32).tiny:
            token = jnp.argmax(logits, -1)
        else:
            if temperature != 1:  # minus the largest, so that a quotient may overflow to -inf only
                logits = (logits - logits.max(-1, keepdims=True)) / temperature
            token = categorical(uniform(step), logits)
        chosen = jnp.take_along_axis(logits, token[..., None], -1)[..., 0]
        return token.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, -1)

    def body(loop: Loop) -> Loop:
        token, log_prob = draw(loop.logits, loop.step)
        token, log_prob = jnp.where(loop.done, 0, token), jnp.where(loop.done, 0.0, log_prob)
        tokens = loop.samples.tokens.at[..., loop.step].set(token)
        closed = jnp.zeros(batch, bool)
        if closing:
            start = loop.step - len(closing) + 1
            window = jax.lax.dynamic_slice_in_dim(tokens, jnp.maximum(start, 0), len(closing), -1)
            closed = (window == closing_ids).all(-1) & (start >= 0) & ~loop.done
        samples = Samples(
            tokens=tokens,
            log_probs=loop.samples.log_probs.at[..., loop.step].set(log_prob),
            lengths=loop.samples.lengths + ~loop.done,
            closed=loop.samples.closed | closed,
        )
        done = loop.done | closed | (token[..., None] == stops).any(-1)
        logits, caches = decode(token, loop.step, loop.caches)
        return Loop(loop.step + 1, logits, caches, samples, done)

    return jax.lax.while_loop(lambda loop: (loop.step < until) & ~loop.done.all(), body, loop)


def truncated(samples: Samples, eos_id: int) -> jax.Array:
    """Marks responses [*batch] that the token limit ended before a closing tag or an end of sequence."""
    at_limit = samples.lengths == samples.tokens.shape[-1]
    return at_limit & ~samples.closed & (samples.tokens[..., -1] != eos_id)


def explanation_tokens(samples: Samples, closing: tuple[int, ...], blank: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the explanations in sampled responses, without the closing tag and without blank tokens at both ends.

    `blank` [V] bool marks the tokens that are white space only. Returns ids [*batch, R - len(closing)] int32, zero
    after the end, and lengths [*batch] int32. The length is 0 if the closing tag is missing or nothing stands before
    it.
    """
    width = samples.tokens.shape[-1] - len(closing)
    column = jnp.arange(width)
    ids = samples.tokens[..., :width]
    content = (column < (samples.lengths - len(closing))[..., None]) & samples.closed[..., None] & ~blank[ids]
    any_content = content.any(-1)
    first = jnp.where(any_content, jnp.argmax(content, -1), 0)
    end = jnp.where(any_content, width - jnp.argmax(content[..., ::-1], -1), 0)
    length = end - first
    shifted = jnp.take_along_axis(ids, jnp.minimum(column + first[..., None], width - 1), -1)
    return jnp.where(column < length[..., None], shifted, 0), length
