"""What blocks keep of a run of tokens: keys and values, as attention reads them, or the state of DeltaNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nlae_jax.lm.arch import Arch, DeltaNet


class DeltaState(NamedTuple):
    """What DeltaNet keeps of the tokens before: all batch axes as one, rows.

    `tails` [rows, width - 1, channels] are the last inputs of the convolutions of queries, keys and values, zero before
    the first token. `memory` [rows, value_heads, key_dim, value_dim] float32 maps keys to values.
    """

    tails: tuple[jax.Array, jax.Array, jax.Array]
    memory: jax.Array


class KeyValues(NamedTuple):
    """Keys and values of one segment in one block.

    `k`, `v`: [kv_heads, *batch, T, head_dim]; `positions`: [*batch, T] int32; `valid`: [*batch, T] bool. In a block of
    DeltaNet, `state` after the segment in the place of `k` and `v`, which are None. Of all blocks together both are
    there, each stacked over the blocks that have it; no state where none has. So are the keys and values of blocks of
    the kind "global", `global_kv`, which in such a block are `k` and `v`.
    """

    k: Any
    v: Any
    positions: jax.Array
    valid: jax.Array
    state: DeltaState | None = None
    global_kv: tuple[jax.Array, jax.Array] | None = None


def of_block(arch: Arch, kv: KeyValues, layer: int) -> KeyValues:
    """What block `layer` has of the keys and values of all blocks."""
    if not arch.mixers:
        return kv._replace(k=kv.k[layer], v=kv.v[layer])
    if (place := arch.place("delta_layers", layer)) is not None:
        return of_kind(kv, "delta", lambda x: x[place])
    if (place := arch.place("global_layers", layer)) is not None:
        return of_kind(kv, "global", lambda x: x[place])
    place = arch.place("attention_layers", layer)
    return of_kind(kv, "attention", lambda x: x[place])


def of_kind(kv: KeyValues, kind: str, at: Callable[[jax.Array], jax.Array]) -> KeyValues:
    """Of all blocks' keys and values what a block of this kind has, which `at` takes from its stacks."""
    if kind == "delta":
        return kv._replace(k=None, v=None, state=jax.tree.map(at, kv.state), global_kv=None)
    pair = (kv.k, kv.v) if kind == "attention" else kv.global_kv
    assert pair is not None  # as there is such a block
    return kv._replace(k=at(pair[0]), v=at(pair[1]), state=None, global_kv=None)


def empty_state(delta: DeltaNet, rows: int, dtype: jnp.dtype, blocks: tuple[int, ...] = ()) -> DeltaState:
    """Before the first token."""
    keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
    tails = [jnp.zeros((*blocks, rows, delta.width - 1, channels), dtype) for channels in (keys, keys, values)]
    memory = jnp.zeros((*blocks, rows, delta.value_heads, delta.key_dim, delta.value_dim), jnp.float32)
    return DeltaState((tails[0], tails[1], tails[2]), memory)


def bytes_of_row(arch: Arch, capacity: int, itemsize: int) -> int:
    """What one row of `empty_caches` takes in all blocks, its keys and values and its states."""
    made = jax.eval_shape(lambda: empty_caches(arch, jnp.zeros(1, jnp.int32), capacity, jnp.float32))
    memory = 0 if made.state is None else made.state.memory.size
    keys = sum(x.size for x in jax.tree.leaves((made.k, made.v, made.state, made.global_kv)))
    return (keys - memory) * itemsize + memory * 4


def empty_caches(arch: Arch, start: jax.Array, capacity: int, dtype: jnp.dtype) -> KeyValues:
    """Room for `capacity` tokens whose positions follow `start` [*batch] int32, in every block; batch axes as one.

    `k` and `v` have all blocks on a leading axis. All entries are valid: those not written yet lie at later positions
    than any query. The batch is one axis because that is how attention multiplies: reshaped in between, each cache was
    written twice and copied four times a token.
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
