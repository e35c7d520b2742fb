"""Rotary position embeddings (Su et al. 2021, in HF's half-split order) and their ways to stretch them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from nlae_jax.lm.arch import Arch, GlobalAttention, LinearRope, Llama3Rope, LongRope, YarnRope


def rope_table(arch: Arch, positions: jax.Array, kind: str = "global") -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each [*positions.shape, turned pairs] float32: half of a head unless it turns in part.

    `kind` is one of `arch.ropes`; "none" turns nothing.
    """
    turned = arch.head_dim if arch.rotary_dim is None else arch.rotary_dim
    exponents = jnp.arange(0, turned, 2, dtype=jnp.float32) / max(turned, 1)
    frequencies = (arch.local_rope_theta if kind == "local" else arch.rope_theta) ** -exponents
    scaling, factor = arch.rope_scaling if kind == "global" else None, 1.0
    if kind == "none":
        frequencies = jnp.zeros_like(frequencies)
    elif isinstance(scaling, LinearRope):
        frequencies = frequencies / scaling.factor
    elif isinstance(scaling, YarnRope):
        kept = 1 - jnp.asarray(_yarn_ramp(scaling, turned, arch.rope_theta))
        frequencies = frequencies / scaling.factor * (1 - kept) + frequencies * kept
        factor = scaling.attention_factor
    elif isinstance(scaling, LongRope):
        frequencies = frequencies / jnp.asarray(scaling.short_factors, jnp.float32)
        factor = scaling.attention_factor
    elif isinstance(scaling, Llama3Rope):
        frequencies = _llama3(scaling, frequencies)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def global_rope_table(attention: GlobalAttention, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`rope_table` of blocks with a `GlobalAttention`, each [*positions.shape, head_dim / 2]; later pairs stay."""
    pairs = jnp.arange(attention.head_dim // 2, dtype=jnp.float32)
    frequencies = attention.rope_theta ** (-2 * pairs / attention.head_dim) / attention.rope_factor
    frequencies = jnp.where(pairs < attention.turned_pairs, frequencies, 0.0)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _llama3(scaling: Llama3Rope, frequencies: jax.Array) -> jax.Array:
    wavelengths = 2 * math.pi / frequencies
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return jnp.where(
        wavelengths > low, frequencies / scaling.factor, jnp.where(wavelengths < high, frequencies, between)
    )


def _yarn_ramp(scaling: YarnRope, turned: int, theta: float) -> np.ndarray:
    """How far each pair is stretched, [turned / 2] float32: 0 not at all, 1 by the whole factor."""

    def pair_of(turns: float) -> float:
        """The pair that makes so many turns in the original context."""
        return turned * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    high = high + 0.001 if low == high else high
    return np.clip((np.arange((turned + 1) // 2, dtype=np.float32) - low) / (high - low), 0, 1)


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates [..., T, heads, head_dim] by its positions' `rope_table`, in float32; what that does not turn stays."""
    turned = 2 * table[0].shape[-1]
    if turned == 0:
        return x
    if turned < x.shape[-1]:
        return jnp.concatenate([apply_rope(x[..., :turned], table), x[..., turned:]], axis=-1)
    cos, sin = (t[..., None, :] for t in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def query_growth(arch: Arch, positions: jax.Array) -> jax.Array | None:
    """What queries are multiplied by at these positions, [*positions.shape] float32; None: nothing."""
    growth = arch.query_growth
    if growth is None:
        return None
    return 1 + growth.beta * jnp.log1p(jnp.floor(positions.astype(jnp.float32) / growth.every))
