"""Attention over segments whose keys are never copied.

A segment is a run of tokens with batch axes of its own: a constant prompt has none, an activation's tail has
`(B,)`, its sampled responses `(B, G)`. Every segment attends to all earlier ones and to itself under one softmax;
keys are shared by everything their batch axes do not index. A plain forward pass is the case of one segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nlae_jax.lm import attention_kernel
from nlae_jax.lm.arch import Arch, LinearRope

# Stands for minus infinity in masked logits: finite, so that a query without any key yields no NaN.
MASKED = -1e30


class KeyValues(NamedTuple):
    """Keys and values of one segment in one block.

    `k`, `v`: [*batch, kv_heads, T, head_dim]; `positions`: [*batch, T] int32; `valid`: [*batch, T] bool.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    valid: jax.Array


def empty_caches(arch: Arch, start: jax.Array, capacity: int, dtype: jnp.dtype) -> list[KeyValues]:
    """Per block, room for `capacity` tokens whose positions follow `start` [*batch] int32.

    All entries are valid: those not written yet lie at later positions than any query.
    """
    shape = (*start.shape, arch.num_kv_heads, capacity, arch.head_dim)
    positions = start[..., None] + jnp.arange(capacity, dtype=jnp.int32)
    valid = jnp.ones(positions.shape, bool)
    return [KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, valid)] * arch.num_layers


def rope_table(arch: Arch, positions: jax.Array, kind: str = "global") -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each [*positions.shape, head_dim / 2] float32 (Su et al. 2021, in HF's half-split order).

    `kind` is one of `arch.ropes`; "none" turns nothing.
    """
    exponents = jnp.arange(0, arch.head_dim, 2, dtype=jnp.float32) / arch.head_dim
    frequencies = (arch.local_rope_theta if kind == "local" else arch.rope_theta) ** -exponents
    scaling = arch.rope_scaling if kind == "global" else None
    if kind == "none":
        frequencies = jnp.zeros_like(frequencies)
    elif isinstance(scaling, LinearRope):
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        wavelengths = 2 * math.pi / frequencies
        low = scaling.original_max_positions / scaling.low_freq_factor
        high = scaling.original_max_positions / scaling.high_freq_factor
        smooth = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
        frequencies = jnp.where(
            wavelengths > low, frequencies / scaling.factor, jnp.where(wavelengths < high, frequencies, between)
        )
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates [..., T, heads, head_dim] by its positions' `rope_table`, in float32."""
    cos, sin = (t[..., None, :] for t in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(
    q: jax.Array,
    q_positions: jax.Array,
    segments: Sequence[KeyValues],
    scale: float | None = None,
    softcap: float = 0.0,
    window: jax.Array | int | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Attention of one segment's queries to the keys of several segments, under one softmax.

    q: [*batch, T, heads, head_dim], q_positions: [*batch, T]. The batch axes of every entry of `segments` are a
    prefix of q's. A key is seen if it is valid, its position is not after the query's and, with a `window`, less
    than so many before it. Scores are multiplied by `scale` (head_dim ** -0.5 unless given) and, with a `softcap`,
    squashed below it. Returns q's shape.

    `implementation` is one of `IMPLEMENTATIONS` or "auto": "pallas" on a TPU, else "xla". Single queries (decoding) and
    more keys than the kernel has room for take "xla" whatever is asked for.
    """
    if implementation == "auto":
        implementation = "pallas" if jax.default_backend() == "tpu" else "xla"
    if q.shape[-3] == 1 or not attention_kernel.fits(q, segments):
        implementation = "xla"
    return IMPLEMENTATIONS[implementation](q, q_positions, segments, scale, softcap, window)


def attend_xla(
    q: jax.Array,
    q_positions: jax.Array,
    segments: Sequence[KeyValues],
    scale: float | None = None,
    softcap: float = 0.0,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """`attend` in operations that XLA schedules, on any backend.

    The softmax is taken in pieces: one maximum over all segments, then sums of exponentials and of weighted values.
    """
    *batch, length, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    kv_heads = segments[0].k.shape[-3]
    repeats = heads // kv_heads
    total = math.prod(batch)

    def grouped(kv: KeyValues) -> tuple[int, int]:
        outer = math.prod(kv.k.shape[:-3])
        return outer, total // outer

    def common(x: jax.Array, kv: KeyValues) -> jax.Array:
        """[outer, kv_heads, inner, ...] -> [total, kv_heads, ...]: the layout all segments share."""
        return x.swapaxes(1, 2).reshape(total, kv_heads, *x.shape[3:])

    def local(x: jax.Array, kv: KeyValues) -> jax.Array:
        """The inverse of `common`."""
        return x.reshape(*grouped(kv), *x.shape[1:]).swapaxes(1, 2)

    scores = []
    for kv in segments:
        outer, inner = grouped(kv)
        queries = q.reshape(outer, inner, length, kv_heads, repeats, head_dim)
        keys = kv.k.reshape(outer, *kv.k.shape[-3:])
        score = jnp.einsum("oitkrd,oksd->okitrs", queries, keys, preferred_element_type=jnp.float32) * scale
        if softcap:
            score = softcap * jnp.tanh(score / softcap)
        age = q_positions.reshape(outer, inner, length, 1) - kv.positions.reshape(outer, 1, 1, -1)
        seen = kv.valid.reshape(outer, 1, 1, -1) & (age >= 0)
        if window is not None:
            seen &= age < window
        scores.append(jnp.where(seen[:, None, :, :, None, :], score, MASKED))

    tops = [common(score.max(-1), kv) for score, kv in zip(scores, segments, strict=True)]
    top = jax.lax.stop_gradient(jnp.stack(tops).max(0))
    weights = [jnp.exp(score - local(top, kv)[..., None]) for score, kv in zip(scores, segments, strict=True)]
    denominator = sum(common(weight.sum(-1), kv) for weight, kv in zip(weights, segments, strict=True))
    numerator = sum(
        common(
            jnp.einsum(
                "okitrs,oksd->okitrd",
                weight.astype(kv.v.dtype),
                kv.v.reshape(-1, *kv.v.shape[-3:]),
                preferred_element_type=jnp.float32,
            ),
            kv,
        )
        for weight, kv in zip(weights, segments, strict=True)
    )
    out = numerator / denominator[..., None]  # [total, kv_heads, T, repeats, head_dim]
    return out.swapaxes(1, 2).reshape(q.shape).astype(q.dtype)


# "pallas" is compiled for TPUs; elsewhere its kernels are interpreted, which is for tests.
IMPLEMENTATIONS = {"xla": attend_xla, "pallas": attention_kernel.attend}
