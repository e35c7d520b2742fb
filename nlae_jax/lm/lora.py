"""Low-rank adapters (LoRA, Hu et al. 2021) on every linear layer that all tokens use, and optionally on experts.

Adapters are a separate tree beside the frozen base, stacked over blocks as the base is. So one base in memory serves
every role, whatever the role's depth and adapters are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nlae_jax.lm.arch import Arch, expert_layers, linear_layers
from nlae_jax.lm.products import einsum
from nlae_jax.mesh import Weight


def adapter_weights(arch: Arch, rank: int, experts: bool = False) -> dict[str, dict[str, Weight]]:
    """Declares the adapters of every linear layer: `a` [L, rank, in] and `b` [L, rank, out].

    With `experts` also those of every expert: `a` [L, experts, rank, in] and `b` [L, experts, rank, out].
    """

    def side(weight: Weight, number: int, fan_in: int = 0) -> Weight:
        shape, axes = weight.shape, weight.axes
        return Weight((*shape[:-2], rank, shape[number]), (*axes[:-2], "rank", axes[number]), fan_in)

    layers = linear_layers(arch) | (expert_layers(arch) if experts else {})
    return {
        name: {"a": side(weight, -2, fan_in=weight.shape[-2]), "b": side(weight, -1)} for name, weight in layers.items()
    }


def init_adapters(key: jax.Array, arch: Arch, rank: int, experts: bool = False) -> dict[str, Any]:
    """Draws new adapters, float32: `a` is random and `b` zero, so the adapted model equals the base."""
    weights = adapter_weights(arch, rank, experts)
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
