"""Keys and values of a run of tokens, as attention reads them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nlae_jax.lm.arch import Arch


class KeyValues(NamedTuple):
    """Keys and values of one segment in one block.

    `k`, `v`: [kv_heads, *batch, T, head_dim]; `positions`: [*batch, T] int32; `valid`: [*batch, T] bool.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    valid: jax.Array


def empty_caches(arch: Arch, start: jax.Array, capacity: int, dtype: jnp.dtype) -> KeyValues:
    """Room for `capacity` tokens whose positions follow `start` [*batch] int32, in every block; batch axes as one.

    `k` and `v` have all blocks on a leading axis. All entries are valid: those not written yet lie at later positions
    than any query. The batch is one axis because that is how attention multiplies: reshaped in between, each cache was
    written twice and copied four times a token.
    """
    shape = (arch.num_layers, arch.num_kv_heads, start.size, capacity, arch.head_dim)
    positions = start.reshape(-1, 1) + jnp.arange(capacity, dtype=jnp.int32)
    return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, jnp.ones(positions.shape, bool))
