"""Low-rank adapters (LoRA, Hu et al. 2021) on every linear layer that all tokens use: not on experts or routers.

Adapters are a separate tree beside the frozen base, stacked over blocks as the base is. So one base in memory serves
every role, whatever the role's depth and adapters are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nlae_jax.lm.arch import Arch, linear_layers
from nlae_jax.lm.products import einsum
from nlae_jax.mesh import Weight


def adapter_weights(arch: Arch, rank: int) -> dict[str, dict[str, Weight]]:
    """Declares the adapters of every linear layer: `a` [L, rank, in] and `b` [L, rank, out]."""
    return {
        name: {
            "a": Weight(
                (weight.shape[0], rank, weight.shape[1]), (weight.axes[0], "rank", weight.axes[1]), weight.shape[1]
            ),
            "b": Weight((weight.shape[0], rank, weight.shape[2]), (weight.axes[0], "rank", weight.axes[2])),
        }
        for name, weight in linear_layers(arch).items()
    }


def init_adapters(key: jax.Array, arch: Arch, rank: int) -> dict[str, Any]:
    """Draws new adapters, float32: `a` is random and `b` zero, so the adapted model equals the base."""
    weights = adapter_weights(arch, rank)
    keys = jax.random.split(key, len(weights))
    return {
        name: {
            "a": jax.random.normal(k, w["a"].shape, jnp.float32) * w["a"].fan_in ** -0.5,
            "b": jnp.zeros(w["b"].shape, jnp.float32),
        }
        for k, (name, w) in zip(keys, weights.items(), strict=True)
    }


def linear(x: jax.Array, weight: jax.Array, adapter: dict[str, jax.Array] | None, scale: float) -> jax.Array:
    """Computes `x @ weight`, plus `scale · (x @ aᵀ) @ b` if there is an adapter: [..., in] -> [..., out].

    The adapter's inner product has the shape [rank, tokens]. With [tokens, rank], gradients transposed an array as wide
    as x, and the backward pass of a block took 1.4 times as long on a CPU.
    """
    flat = x.reshape(-1, x.shape[-1])
    y = einsum("ni,io->no", flat, weight)
    if adapter is not None:
        inner = einsum("ri,ni->rn", adapter["a"].astype(x.dtype), flat)
        y = y + einsum("rn,ro->no", inner, adapter["b"].astype(x.dtype)) * jnp.asarray(scale, x.dtype)
    return y.reshape(*x.shape[:-1], -1)


def merge(weight: jax.Array, adapter: dict[str, jax.Array] | None, scale: float) -> jax.Array:
    """Returns a matrix [..., in, out] in float32, with the product of its adapter added if there is one."""
    weight = weight.astype(jnp.float32)
    if adapter is None:
        return weight
    return weight + einsum("...ri,...ro->...io", adapter["a"], adapter["b"]) * scale
