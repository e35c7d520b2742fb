"""The activation of an MLP: what is computed between its matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from nlae_jax.lm.arch import Arch

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "gelu": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
}


def activated(arch: Arch, product: Callable[[str], jax.Array]) -> jax.Array:
    """Computes the input of the matrix "down" from `product("up")` and, in a gated MLP, `product("gate")`.

    `product(name)` is the MLP's input times the matrix of that name, [..., d_ff].
    """
    if not arch.gated:
        return ACTIVATIONS[arch.activation](product("up"))
    gate, up = product("gate"), product("up")
    if (clamped := arch.clamped_gate) is None:
        return ACTIVATIONS[arch.activation](gate) * up
    gate = jnp.minimum(gate, clamped.limit)
    return gate * jax.nn.sigmoid(clamped.alpha * gate) * (1 + jnp.clip(up, -clamped.limit, clamped.limit))
