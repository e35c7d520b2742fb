"""The language-model head on many tokens, in chunks, so that [tokens, vocabulary] is in memory for one chunk only.

A chunk has as many tokens of every row of the first axis. So devices that split the rows share the work of each chunk.
What they exchange does not grow with the number of chunks: the weights are gathered before the first chunk, and every
device sums its own part of the weights' gradient until after the last.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nlae_jax.lm.products import einsum
from nlae_jax.mesh import constrained, row_parts

# (log-probs [...], *extras [...]) -> the sum [] of these tokens' losses. A token whose extras are zero should add 0.
LossOf = Callable[..., jax.Array]


def logits(x: jax.Array, weight: jax.Array, softcap: float = 0.0) -> jax.Array:
    """Multiplies x [..., d] by the head [V, d]: logits [..., V] float32, passed through the soft cap unless it is 0."""
    raw = einsum("...d,vd->...v", x, weight, jnp.float32)
    return softcap * jnp.tanh(raw / softcap) if softcap else raw


def log_probs(
    x: jax.Array, weight: jax.Array, targets: jax.Array, softcap: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Returns log p(target) and the entropy of the next-token distribution, each [B, ...] float32, from x [B, ..., d].

    `targets` [B, ...] are token ids. Each device has the logits of at most `chunk` tokens (or B) at a time; a backward
    pass computes them again. The entropy carries no gradient.
    """
    weight = constrained(weight, ("vocab", None))

    @jax.checkpoint
    def one_chunk(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        chosen, entropy = _softmax(logits(inputs[0], weight, softcap), inputs[1])[:2]
        return None, (chosen, jax.lax.stop_gradient(entropy))

    _, chunks = jax.lax.scan(one_chunk, None, _chunked((x, targets), targets.shape, chunk * row_parts(x)))
    chosen, entropy = _joined(chunks, targets.shape)
    return chosen, entropy


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def loss(
    loss_of: LossOf,
    softcap: float,
    chunk: int,
    x: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    extras: tuple[jax.Array, ...],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the sum of `loss_of(log-probs, *extras)` over chunks, and the result of `log_probs`, without gradient.

    x is [B, ..., d]; `targets` and every extra are [B, ...]. Extras get no gradient. Chunks are filled up with zeros:
    `loss_of` must be finite where the extras are zero. The gradient is computed chunk by chunk while the logits are in
    memory (as in Liger, Hsu et al. 2024), which saves one pass over the vocabulary.
    """
    return _loss_with_gradient(loss_of, softcap, chunk, x, weight, targets, extras)[0]


def _loss_with_gradient(
    loss_of: LossOf, softcap: float, chunk: int, x: jax.Array, weight: jax.Array, targets: jax.Array, extras: Any
) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    parts, chunk = row_parts(x), chunk * row_parts(x)
    weight = constrained(weight, ("vocab", None))
    by_part = lambda x: x.reshape(parts, -1, *x.shape[1:])  # noqa: E731

    def one_chunk(sums: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        x, targets, *extras = inputs
        capped = logits(x, weight, softcap)
        chosen, entropy, exponentials, denominator = _softmax(capped, targets)
        added, slope = jax.value_and_grad(loss_of)(chosen, *extras)
        one_hot = jax.nn.one_hot(targets, weight.shape[0], dtype=jnp.float32)
        of_logits = slope[..., None] * (one_hot - exponentials / denominator)
        if softcap:
            of_logits = of_logits * (1 - jnp.square(capped / softcap))
        of_logits = of_logits.astype(x.dtype)
        of_x = einsum("bnv,vd->bnd", of_logits, weight)
        # [d, V], because for [V, d] a CPU makes a transposed copy of the gradient of the logits.
        of_weight = einsum("pbnd,pbnv->pdv", by_part(x), by_part(of_logits), jnp.float32)
        of_weight = constrained(sums[1] + of_weight, ("batch", None, "vocab"))
        return (sums[0] + added, of_weight), (of_x, chosen, entropy)

    zeros = jnp.zeros(()), jnp.zeros((parts, *weight.shape[::-1]), jnp.float32)
    (total, of_weight), (of_x, *rows) = jax.lax.scan(
        one_chunk, zeros, _chunked((x, targets, *extras), targets.shape, chunk)
    )
    (of_x,) = _joined((of_x,), targets.shape)
    of_weight = constrained(of_weight.sum(0), ("embed", "vocab")).T.astype(weight.dtype)
    return (total, _joined(tuple(rows), targets.shape)), (of_x, of_weight)


def _scaled_gradient(
    loss_of: LossOf, softcap: float, chunk: int, kept: tuple[jax.Array, jax.Array], gradient: Any
) -> tuple[Any, ...]:
    of_x, of_weight = (array * gradient[0].astype(array.dtype) for array in kept)
    return of_x, of_weight, None, None


loss.defvjp(_loss_with_gradient, _scaled_gradient)


def _softmax(capped: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns log p(target) [...], entropy [...], exponentials [..., V] and their sum [..., 1] of logits [..., V]."""
    top = jax.lax.stop_gradient(capped.max(-1, keepdims=True))
    exponentials = jnp.exp(capped - top)
    denominator = exponentials.sum(-1, keepdims=True)
    log_denominator = (top + jnp.log(denominator))[..., 0]
    chosen = jnp.take_along_axis(capped, targets[..., None], -1)[..., 0] - log_denominator
    # A token of probability 0 adds nothing; its logit may be -inf.
    possible = jnp.where(exponentials > 0, capped, 0.0)
    entropy = log_denominator - (exponentials * possible).sum(-1) / denominator[..., 0]
    return chosen, entropy, exponentials, denominator


def _chunked(arrays: tuple[jax.Array, ...], batch: tuple[int, ...], chunk: int) -> tuple[jax.Array, ...]:
    """Splits arrays [*batch, ...] into chunks [chunks, B, width, ...]. The last chunk is filled up with zeros."""
    rows = batch[0]
    count = math.prod(batch[1:])
    chunks = -(-count // max(1, chunk // rows))
    width = -(-count // chunks)  # nearly equal chunks, because what fills up the last one is computed too

    def split(array: jax.Array) -> jax.Array:
        flat = array.reshape(rows, count, *array.shape[len(batch) :])
        padded = jnp.pad(flat, [(0, 0), (0, -count % width), *[(0, 0)] * (flat.ndim - 2)])
        return jnp.moveaxis(padded.reshape(rows, -1, width, *flat.shape[2:]), 1, 0)

    return tuple(split(array) for array in arrays)


def _joined(chunks: tuple[jax.Array, ...], batch: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Undoes `_chunked`: returns arrays [*batch, ...]."""
    rows = batch[0]
    count = math.prod(batch[1:])

    def join(array: jax.Array) -> jax.Array:
        flat = jnp.moveaxis(array, 0, 1).reshape(rows, -1, *array.shape[3:])
        return flat[:, :count].reshape(*batch, *array.shape[3:])

    return tuple(join(array) for array in chunks)
