"""Norms of residual streams, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nlae_jax.lm.arch import Arch


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float, offset: float = 0.0) -> jax.Array:
    """Root-mean-square norm (Zhang & Sennrich 2019) over the last axis, in float32. The result has x's dtype.

    The normed values are multiplied by `weight` + `offset`, or by nothing where `weight` is None.
    """
    x32 = x.astype(jnp.float32)
    scaled = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    if weight is None:
        return scaled.astype(x.dtype)
    return (scaled * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Layer norm (Ba et al. 2016) over the last axis, in float32. The result has x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + eps)
    return (scaled * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def norm(arch: Arch, x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Applies the architecture's norm of residual streams: layer norm where there is a bias, else RMS norm."""
    if bias is None:
        return rms_norm(x, weight, arch.norm_eps, arch.norm_offset)
    return layer_norm(x, weight, bias, arch.norm_eps)
