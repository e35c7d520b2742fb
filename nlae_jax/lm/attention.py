"""Attention over segments whose keys are never copied.

A segment is a run of tokens with its own batch axes. A constant prompt has none, the prompt's tail after an activation
has `(B,)`, and sampled responses have `(B, G)`. Every segment attends to all earlier segments and to itself under one
softmax. The keys of a segment with fewer batch axes are shared along the missing axes. A plain forward pass has one
segment.
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

# Score of a masked key. It is finite, so that a query without any key gives no NaN.
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
    """Computes the attention of one segment's queries to the keys of several segments, under one softmax.

    q: [*batch, T, heads, head_dim], q_positions: [*batch, T] int32. The batch axes of every entry of `segments` are a
    prefix of q's; a cache may have them as one axis (`empty_caches`). A query at position p sees the valid keys at
    positions up to p and, with a `window`, after p - window. Scores are multiplied by `scale` (default:
    head_dim ** -0.5) and, if `softcap` is not 0, become softcap · tanh(score / softcap). `sinks` [heads] are the scores
    of one more key, whose value is zero. Returns an array of q's shape and dtype.

    `implementation` is one of `IMPLEMENTATIONS`, or "auto" for "xla": the kernel is used only where it is asked for.
    Single queries (decoding), sinks, and more keys than the kernel has room for are computed by "xla" in any case.
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
    """Computes `attend` by operations that XLA schedules, on any backend."""
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


# Below, K = kv_heads, N = rows, R = query heads per kv head. Queries are [K, N, T, R, D]. A segment's keys and values
# are [K, O, S, D], where N = O · I, and I consecutive rows share the same keys. `seen` is [O, I, T, S] bool, and
# sinks are [K, R] float32 or None. Because the heads come first, a reshape from one segment's layout to another's moves
# no data.


def _scores(
    scale: float, softcap: float, q_KxNxTxRxD: jax.Array, keys: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the capped scores [K, O, I, T, R, S] float32, and which are seen [1, O, I, T, 1, S] bool."""
    kv_heads, _, length, repeats, head_dim = q_KxNxTxRxD.shape
    q = q_KxNxTxRxD.reshape(kv_heads, keys.shape[1], -1, head_dim)
    score = einsum("kond,kosd->kons", q, keys, jnp.float32) * scale
    score = score.reshape(*keys.shape[:2], -1, length, repeats, keys.shape[2])
    return (softcap * jnp.tanh(score / softcap) if softcap else score), seen[None, :, :, :, None, :]


def _weighted(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Sums values [K, O, S, D] with weights [K, O, I, T, R, S] over the keys: [K, N, T, R, D] float32."""
    kv_heads, outer, inner, length, repeats, keys = weights.shape
    flat = weights.astype(values.dtype).reshape(kv_heads, outer, -1, keys)
    out = einsum("kons,kosd->kond", flat, values, jnp.float32)
    return out.reshape(kv_heads, outer * inner, length, repeats, -1)


def _summed(weights: jax.Array, x_KxNxTxRxD: jax.Array) -> jax.Array:
    """Sums x [K, N, T, R, D] with weights [K, O, I, T, R, S] over all queries that share keys: [K, O, S, D] float32."""
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
    """Computes the attention, [K, N, T, R, D] like q. `keys`, `values` and `seen` have one entry per segment.

    The gradient is written out as in FlashAttention (Dao et al. 2022). For it, the output and the softmax's maximum and
    denominator are kept instead of the scores, and each segment's weights are computed again from them.
    """
    return _forward(scale, softcap, q, keys, values, seen, sinks)[0]


def _forward(
    scale: float, softcap: float, q: jax.Array, keys: Any, values: Any, seen: Any, sinks: jax.Array | None
) -> tuple[jax.Array, Any]:
    """Takes one maximum over all segments, then sums exponentials and weighted values segment by segment."""
    pairs = (_scores(scale, softcap, q, k, visible) for k, visible in zip(keys, seen, strict=True))
    scores = [jnp.where(visible, score, MASKED) for score, visible in pairs]
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
    for k, v, segment_seen in zip(keys, values, seen, strict=True):
        score, visible = _scores(scale, softcap, q, k, segment_seen)
        per_query = (*score.shape[:-1], 1)
        exponential = jnp.exp(jnp.where(visible, score, MASKED) - top.reshape(per_query))
        weight = exponential / denominator.reshape(per_query)
        of_weight, _ = _scores(1.0, 0.0, gradient, v, segment_seen)
        of_score = weight * (of_weight - shift.reshape(per_query)) * scale
        if softcap:
            of_score = of_score * (1 - jnp.square(score / softcap))
        # Masked scores are selected away, not multiplied by zero, because they may be infinite or NaN.
        of_score = jnp.where(visible, of_score, 0.0)
        of_q = of_q + _weighted(of_score, k)
        of_keys.append(_summed(of_score, q).astype(k.dtype))
        of_values.append(_summed(weight, gradient).astype(v.dtype))
    of_sinks = None
    if sinks is not None:  # a sink's value is zero, so it adds nothing to the output
        of_sinks = -(jnp.exp(sinks[:, None, None] - top) / denominator * shift).sum((1, 2))
    return of_q.astype(q.dtype), tuple(of_keys), tuple(of_values), None, of_sinks


_softmax_of_segments.defvjp(_forward, _backward)


# "pallas" is compiled for TPUs. On other devices its kernels are interpreted, which is slow and meant for tests.
IMPLEMENTATIONS = {"xla": attend_xla, "pallas": attention_kernel.attend}
