"""Attention over segments whose keys are never copied.

A segment is a run of tokens with batch axes of its own: a constant prompt has none, an activation's tail has
`(B,)`, its sampled responses `(B, G)`. Every segment attends to all earlier ones and to itself under one softmax;
keys are shared by everything their batch axes do not index. A plain forward pass is the case of one segment.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nlae_jax.lm import attention_kernel
from nlae_jax.lm.products import einsum
from nlae_jax.lm.segments import KeyValues

# Stands for minus infinity in masked logits: finite, so that a query without any key yields no NaN.
MASKED = -1e30


def attend(
    q: jax.Array,
    q_positions: jax.Array,
    segments: Sequence[KeyValues],
    scale: float | None = None,
    softcap: float = 0.0,
    window: jax.Array | int | None = None,
    implementation: str = "auto",
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention of one segment's queries to the keys of several segments, under one softmax.

    q: [*batch, T, heads, head_dim], q_positions: [*batch, T]. The batch axes of every entry of `segments` are a
    prefix of q's; a cache may have them as one (`empty_caches`). A key is seen if it is valid, its position is not
    after the query's and, with a `window`, less than so many before it. Scores are multiplied by `scale`
    (head_dim ** -0.5 unless given) and, with a `softcap`, squashed below it. `sinks` [heads] are the scores of one key
    more, which holds nothing. Returns q's shape.

    `implementation` is one of `IMPLEMENTATIONS` or "auto", which is "xla" everywhere: no chip has run the other yet.
    Single queries (decoding), sinks and more keys than the kernel has room for take "xla" whatever is asked for.
    """
    if sinks is not None:
        return attend_xla(q, q_positions, segments, scale, softcap, window, sinks)
    if implementation == "auto" or q.shape[-3] == 1 or not attention_kernel.fits(q, segments):
        implementation = "xla"
    return IMPLEMENTATIONS[implementation](q, q_positions, segments, scale, softcap, window)


def attend_xla(
    q: jax.Array,
    q_positions: jax.Array,
    segments: Sequence[KeyValues],
    scale: float | None = None,
    softcap: float = 0.0,
    window: jax.Array | int | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """`attend` in operations that XLA schedules, on any backend."""
    *batch, length, heads, head_dim = q.shape
    kv_heads, total = segments[0].k.shape[0], math.prod(batch)
    queries = q.reshape(total, length, kv_heads, heads // kv_heads, head_dim).transpose(2, 0, 1, 3, 4)
    keys, values, seen = [], [], []
    for kv in segments:
        outer = math.prod(kv.positions.shape[:-1])
        keys.append(kv.k.reshape(kv_heads, outer, *kv.k.shape[-2:]))
        values.append(kv.v.reshape(keys[-1].shape))
        age = q_positions.reshape(outer, total // outer, length, 1) - kv.positions.reshape(outer, 1, 1, -1)
        visible = kv.valid.reshape(outer, 1, 1, -1) & (age >= 0)
        seen.append(visible if window is None else visible & (age < window))
    scale = head_dim**-0.5 if scale is None else scale
    if sinks is not None:
        sinks = sinks.reshape(kv_heads, -1).astype(jnp.float32)
    out = _softmax_of_segments(scale, softcap, queries, tuple(keys), tuple(values), tuple(seen), sinks)
    return out.transpose(1, 2, 0, 3, 4).reshape(q.shape)


# Below, K = kv_heads, N = rows, R = query heads per kv head. Queries are [K, N, T, R, D]; a segment's keys and values
# are [K, O, S, D], where N = O · I and I rows follow each other that share its keys; `seen` is [O, I, T, S], and
# sinks, where there are any, are [K, R] float32. With the heads in front, going from one segment's layout to another's
# is a reshape that moves nothing.


def _scores(
    scale: float, softcap: float, q_KxNxTxRxD: jax.Array, keys: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Capped scores [K, O, I, T, R, S] float32, and where they count [1, O, I, T, 1, S] bool."""
    kv_heads, _, length, repeats, head_dim = q_KxNxTxRxD.shape
    q = q_KxNxTxRxD.reshape(kv_heads, keys.shape[1], -1, head_dim)
    score = einsum("kond,kosd->kons", q, keys, jnp.float32) * scale
    score = score.reshape(*keys.shape[:2], -1, length, repeats, keys.shape[2])
    return (softcap * jnp.tanh(score / softcap) if softcap else score), seen[None, :, :, :, None, :]


def _weighted(weights: jax.Array, values: jax.Array) -> jax.Array:
    """[K, O, I, T, R, S] · [K, O, S, D] -> [K, N, T, R, D] float32."""
    kv_heads, outer, inner, length, repeats, keys = weights.shape
    flat = weights.astype(values.dtype).reshape(kv_heads, outer, -1, keys)
    out = einsum("kons,kosd->kond", flat, values, jnp.float32)
    return out.reshape(kv_heads, outer * inner, length, repeats, -1)


def _summed(weights: jax.Array, x_KxNxTxRxD: jax.Array) -> jax.Array:
    """[K, O, I, T, R, S] and [K, N, T, R, D] -> [K, O, S, D] float32: summed over everything that shares the keys."""
    kv_heads, outer, *_, keys = weights.shape
    flat, x = (
        weights.reshape(kv_heads, outer, -1, keys),
        x_KxNxTxRxD.reshape(kv_heads, outer, -1, x_KxNxTxRxD.shape[-1]),
    )
    return einsum("kons,kond->kosd", flat.astype(x.dtype), x, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax_of_segments(
    scale: float, softcap: float, q: jax.Array, keys: Any, values: Any, seen: Any, sinks: jax.Array | None
) -> jax.Array:
    """The attention itself, [K, N, T, R, D] like q; `keys`, `values` and `seen` have an entry per segment.

    Its gradient is written out (Dao et al. 2022): kept are the output and the softmax's maximum and denominator, from
    which each segment's weights are made again, instead of the scores.
    """
    return _forward(scale, softcap, q, keys, values, seen, sinks)[0]


def _forward(
    scale: float, softcap: float, q: jax.Array, keys: Any, values: Any, seen: Any, sinks: jax.Array | None
) -> tuple[jax.Array, Any]:
    """The softmax is taken in pieces: one maximum over all segments, then sums of exponentials and weighted values."""
    scores = [
        jnp.where(m, s, MASKED) for s, m in (_scores(scale, softcap, q, *of) for of in zip(keys, seen, strict=True))
    ]
    top = functools.reduce(jnp.maximum, [score.max(-1).reshape(q.shape[:-1]) for score in scores])
    if sinks is not None:
        top = jnp.maximum(top, sinks[:, None, None])
    weights = [jnp.exp(score - top.reshape(*score.shape[:-1], 1)) for score in scores]
    denominator = functools.reduce(jnp.add, [weight.sum(-1).reshape(top.shape) for weight in weights])
    if sinks is not None:
        denominator = denominator + jnp.exp(sinks[:, None, None] - top)
    numerator = functools.reduce(jnp.add, [_weighted(weight, v) for weight, v in zip(weights, values, strict=True)])
    out = (numerator / denominator[..., None]).astype(q.dtype)
    out, top, denominator = (checkpoint_name(x, "attention") for x in (out, top, denominator))
    return out, (q, keys, values, seen, sinks, out, top, denominator)


def _backward(scale: float, softcap: float, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    q, keys, values, seen, sinks, out, top, denominator = kept
    shift = (gradient.astype(jnp.float32) * out).sum(-1)
    of_q, of_keys, of_values = jnp.zeros(q.shape, jnp.float32), [], []
    for k, v, m in zip(keys, values, seen, strict=True):
        score, counted = _scores(scale, softcap, q, k, m)
        per_query = (*score.shape[:-1], 1)
        exponential = jnp.exp(jnp.where(counted, score, MASKED) - top.reshape(per_query))
        weight = exponential / denominator.reshape(per_query)
        of_weight, _ = _scores(1.0, 0.0, gradient, v, m)
        of_score = weight * (of_weight - shift.reshape(per_query)) * scale
        if softcap:
            of_score = of_score * (1 - jnp.square(score / softcap))
        # Last: what is masked is left out and not multiplied by zero, for its score may be anything.
        of_score = jnp.where(counted, of_score, 0.0)
        of_q = of_q + _weighted(of_score, k)
        of_keys.append(_summed(of_score, q).astype(k.dtype))
        of_values.append(_summed(weight, gradient).astype(v.dtype))
    of_sinks = None
    if sinks is not None:  # what they hold is zero, so their share of the output is too
        of_sinks = -(jnp.exp(sinks[:, None, None] - top) / denominator * shift).sum((1, 2))
    return of_q.astype(q.dtype), tuple(of_keys), tuple(of_values), None, of_sinks


_softmax_of_segments.defvjp(_forward, _backward)


# "pallas" is compiled for TPUs; elsewhere its kernels are interpreted, which is for tests.
IMPLEMENTATIONS = {"xla": attend_xla, "pallas": attention_kernel.attend}
