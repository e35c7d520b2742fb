"""What a block keeps of a segment of tokens for later tokens: keys and values of attention, or DeltaNet's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nlae_jax.lm.arch import Arch, DeltaNet


class DeltaState(NamedTuple):
    """DeltaNet's state after some tokens. All batch axes are one, called rows.

    `tails`, each [rows, width - 1, channels], are the last inputs of the convolutions of queries, keys and values. They
    are zero before the first token. `memory` [rows, value_heads, key_dim, value_dim] float32 maps keys to values.
    """

    tails: tuple[jax.Array, jax.Array, jax.Array]
    memory: jax.Array


class KeyValues(NamedTuple):
    """Keys and values of one segment, in one block or in all blocks.

    `positions` [*batch, T] int32 and `valid` [*batch, T] bool are those of the segment's tokens.

    In one block, `k` and `v` are [kv_heads, *batch, T, head_dim]. In a block of DeltaNet they are None, and `state` is
    the state after the segment.

    For all blocks together, `k` and `v` are stacked on a leading axis over the blocks of the kind "attention", `state`
    over those of the kind "delta", and `global_kv` (keys, values) over those of the kind "global". `state` and
    `global_kv` are None where the architecture has no such blocks.
    """

    k: Any
    v: Any
    positions: jax.Array
    valid: jax.Array
    state: DeltaState | None = None
    global_kv: tuple[jax.Array, jax.Array] | None = None


def of_block(arch: Arch, kv: KeyValues, layer: int) -> KeyValues:
    """Returns the keys and values of block `layer` from those of all blocks."""
    if not arch.mixers:
        return kv._replace(k=kv.k[layer], v=kv.v[layer])
    if (place := arch.place("delta_layers", layer)) is not None:
        return of_kind(kv, "delta", lambda x: x[place])
    if (place := arch.place("global_layers", layer)) is not None:
        return of_kind(kv, "global", lambda x: x[place])
    place = arch.place("attention_layers", layer)
    return of_kind(kv, "attention", lambda x: x[place])


def of_kind(kv: KeyValues, kind: str, at: Callable[[jax.Array], jax.Array]) -> KeyValues:
    """Returns the keys and values of one block of this kind from those of all blocks.

    `at` takes the block's entry from a stack.
    """
    if kind == "delta":
        return kv._replace(k=None, v=None, state=jax.tree.map(at, kv.state), global_kv=None)
    pair = (kv.k, kv.v) if kind == "attention" else kv.global_kv
    assert pair is not None  # because there is a block of this kind
    return kv._replace(k=at(pair[0]), v=at(pair[1]), state=None, global_kv=None)


def row_axis(kv: KeyValues) -> int:
    """Returns the axis of rows in keys of one block or of all blocks. In states it is the axis before."""
    return 1 if kv.k is None else kv.k.ndim - 3


def rows_of(kv: KeyValues, index: jax.Array | np.ndarray) -> KeyValues:
    """Returns the keys and values of the rows at `index` [R'] int32, of one block or of all blocks.

    Arrays of numpy give arrays of numpy. A segment without a batch axis, such as the constant prompt, is that of all
    rows and stays as it is.
    """
    if kv.positions.ndim == 1:
        return kv
    axis = row_axis(kv)
    take = lambda part, axis: jax.tree.map(lambda x: x.take(index, axis=axis), part)  # noqa: E731
    k, v, wide = (take(part, axis) for part in (kv.k, kv.v, kv.global_kv))
    return KeyValues(k, v, kv.positions[index], kv.valid[index], take(kv.state, axis - 1), wide)


def empty_state(delta: DeltaNet, rows: int, dtype: jnp.dtype, blocks: tuple[int, ...] = ()) -> DeltaState:
    """Returns the state before the first token: zeros. `blocks` are leading axes for stacks."""
    keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
    tails = [jnp.zeros((*blocks, rows, delta.width - 1, channels), dtype) for channels in (keys, keys, values)]
    memory = jnp.zeros((*blocks, rows, delta.value_heads, delta.key_dim, delta.value_dim), jnp.float32)
    return DeltaState((tails[0], tails[1], tails[2]), memory)


def bytes_of_row(arch: Arch, capacity: int, itemsize: int) -> int:
    """Returns the bytes of one row of `empty_caches` in all blocks: of its keys, values and states.

    `itemsize` is that of the model's dtype. DeltaNet's memory is float32 in any case.
    """
    caches = jax.eval_shape(lambda: empty_caches(arch, jnp.zeros(1, jnp.int32), capacity, jnp.float32))
    memory = 0 if caches.state is None else caches.state.memory.size
    numbers = sum(x.size for x in jax.tree.leaves((caches.k, caches.v, caches.state, caches.global_kv)))
    return (numbers - memory) * itemsize + memory * 4


def empty_caches(arch: Arch, start: jax.Array, capacity: int, dtype: jnp.dtype) -> KeyValues:
    """Makes empty caches of all blocks for `capacity` tokens, whose positions begin at `start` [*batch] int32.

    Stacks are as `KeyValues` has them for all blocks. All entries are valid: those that are not written yet have later
    positions than any query. The batch axes are one axis, because attention multiplies in that shape. With the axes
    apart, each cache was written twice and copied four times per token.
    """
    attention = arch.count("attention_layers") if arch.mixers else arch.num_layers
    shape = (attention, arch.num_kv_heads, start.size, capacity, arch.head_dim)
    positions = start.reshape(-1, 1) + jnp.arange(capacity, dtype=jnp.int32)
    state = None
    if arch.delta is not None:
        state = empty_state(arch.delta, start.size, dtype, (arch.count("delta_layers"),))
    global_kv = None
    if arch.global_attention is not None:
        heads, head_dim = arch.global_attention.num_kv_heads, arch.global_attention.head_dim
        room = jnp.zeros((arch.count("global_layers"), heads, start.size, capacity, head_dim), dtype)
        global_kv = room, jnp.zeros_like(room)
    valid = jnp.ones(positions.shape, bool)
    return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, valid, state, global_kv)
