"""Rotary position embeddings (RoPE, Su et al. 2021) in HF's half-split order, and the scalings of their wavelengths."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from nlae_jax.lm.arch import Arch, GlobalAttention, LinearRope, Llama3Rope, LongRope, YarnRope


def rope_table(arch: Arch, positions: jax.Array, kind: str = "global") -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines for these positions, each [*positions.shape, pairs] float32.

    `pairs` is half of the dimensions of a head that RoPE turns (`arch.rotary_dim`). `kind` is one of `arch.ropes`. With
    "none" all angles are 0.
    """
    turned = arch.head_dim if arch.rotary_dim is None else arch.rotary_dim
    wavelengths = _powers(arch.local_rope_theta if kind == "local" else arch.rope_theta, turned)
    scaling, factor = arch.rope_scaling if kind == "global" else None, 1.0
    frequencies = np.zeros_like(wavelengths) if kind == "none" else 1 / wavelengths
    if isinstance(scaling, LinearRope):
        frequencies = frequencies / scaling.factor
    elif isinstance(scaling, YarnRope):
        kept = 1 - _yarn_ramp(scaling, turned, arch.rope_theta)
        frequencies = 1 / (scaling.factor * wavelengths) * (1 - kept) + frequencies * kept
        factor = scaling.attention_factor
    elif isinstance(scaling, LongRope):
        frequencies = 1 / (np.asarray(scaling.short_factors, np.float32) * wavelengths)
        factor = scaling.attention_factor
    elif isinstance(scaling, Llama3Rope):
        frequencies = _llama3(scaling, frequencies)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def global_rope_table(attention: GlobalAttention, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the `rope_table` of blocks with a `GlobalAttention`, each [*positions.shape, head_dim / 2] float32.

    The pairs after the first `turned_pairs` have angle 0.
    """
    frequencies = 1 / _powers(attention.rope_theta, attention.head_dim) / attention.rope_factor
    frequencies[attention.turned_pairs :] = 0.0
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _powers(theta: float, turned: int) -> np.ndarray:
    """Returns theta ** (i / turned) for i = 0, 2, … below `turned`: [pairs] float32.

    Frequencies are computed by numpy, which rounds as transformers does. XLA multiplies by reciprocals instead of
    dividing, and at position p a frequency's last bit counts p times.
    """
    return np.float32(theta) ** (np.arange(0, turned, 2, dtype=np.float32) / np.float32(max(turned, 1)))


def _llama3(scaling: Llama3Rope, frequencies: np.ndarray) -> np.ndarray:
    """Scales frequencies [pairs] as Llama 3 does: low ones by the factor, high ones not, in between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return np.where(wavelengths > low, frequencies / scaling.factor, np.where(wavelengths < high, frequencies, between))


def _yarn_ramp(scaling: YarnRope, turned: int, theta: float) -> np.ndarray:
    """Returns how far each pair is stretched, [turned / 2] float32: from 0, not at all, to 1, by the whole factor."""

    def pair_of(turns: float) -> float:
        """Returns the pair that makes this many turns in the original context."""
        return turned * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    high = high + 0.001 if low == high else high
    return np.clip((np.arange((turned + 1) // 2, dtype=np.float32) - low) / (high - low), 0, 1)


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [..., T, heads, head_dim] by the `rope_table` of its T positions, in float32.

    Dimensions for which the table has no pair stay as they are. The result has x's dtype.
    """
    turned = 2 * table[0].shape[-1]
    if turned == 0:
        return x
    if turned < x.shape[-1]:
        return jnp.concatenate([apply_rope(x[..., :turned], table), x[..., turned:]], axis=-1)
    cos, sin = (t[..., None, :] for t in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def query_growth(arch: Arch, positions: jax.Array) -> jax.Array | None:
    """Returns the factors of queries at these positions, [*positions.shape] float32, or None where there are none."""
    growth = arch.query_growth
    if growth is None:
        return None
    return 1 + growth.beta * jnp.log1p(jnp.floor(positions.astype(jnp.float32) / growth.every))
