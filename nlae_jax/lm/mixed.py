"""Models that mix kinds of blocks, such as attention and DeltaNet. Weights are stacked over the blocks that have them.

Blocks are run by the shortest pattern of kinds that repeats: a loop over the repetitions, whose body runs the pattern's
blocks one after another, and then the blocks that are left over. So the compiled module grows with the pattern, not
with the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nlae_jax.lm.arch import MIXERS, Arch, block_weights
from nlae_jax.lm.block import LayerCache, Segment, cached, layer_of
from nlae_jax.lm.segments import empty_state

# (carry, the block's weights, its adapters, its number, its entries in stacks by their leading axis) -> (carry,
# output).
Step = Callable[[Any, dict[str, Any], dict[str, Any], Any, dict[str, Any]], tuple[Any, Any]]
# (kind, output) of the pattern's blocks, whose outputs are stacked over the repetitions, and of the blocks left over.
Outputs = tuple[list[tuple[str, Any]], list[tuple[str, Any]]]

_AXES = ("layers", *MIXERS)


def of_layer(arch: Arch, stacks: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Returns the entries of block `layer` in stacked parameters or adapters."""
    if not arch.mixers:
        return layer_of(stacks, layer)
    axes = {name: weight.axes[0] for name, weight in block_weights(arch).items()}
    return _at(stacks, axes, _places(arch, layer))


def over_blocks(
    arch: Arch,
    stacks: Mapping[str, Any],
    adapters: Mapping[str, Any],
    step: Step,
    carry: Any,
    start: int,
    stop: int,
    policy: Any = None,
) -> tuple[Any, Outputs]:
    """Runs `step` for the blocks from `start` to `stop` (exclusive) in order. Returns the carry and the outputs.

    `policy` says what is kept of a step for the backward pass, as in `jax.checkpoint`; None: there is no backward pass.
    """
    kinds = arch.mixers[start:stop]
    length, groups = _pattern(kinds)
    axes = {name: weight.axes[0] for name, weight in block_weights(arch).items()}
    first = {axis: arch.count(axis, start) for axis in _AXES}
    per = {axis: arch.count(axis, start + length) - first[axis] for axis in _AXES}

    def grouped(trees: Mapping[str, Any]) -> dict[str, Any]:
        def by_group(x: jax.Array, axis: str) -> jax.Array:
            begin, count = first[axis], groups * per[axis]
            part = x if len(x) == count else x[begin : begin + count]
            return part.reshape(groups, per[axis], *x.shape[1:])

        kept = {name: tree for name, tree in trees.items() if per[axes[name]]}
        return {name: jax.tree.map(lambda x, axis=axes[name]: by_group(x, axis), tree) for name, tree in kept.items()}

    def once(scanned: bool) -> Step:
        return step if policy is None else jax.checkpoint(step, policy=policy, prevent_cse=not scanned)

    # If the loop runs a part of the stacks, each block's weights are read in place. Slicing a part first would copy it.
    whole = groups * length == arch.num_layers
    in_loop, after = once(True), once(False)

    def body(carry: Any, inputs: tuple[jax.Array, dict[str, Any], dict[str, Any]]) -> tuple[Any, tuple[Any, ...]]:
        group, weights, group_adapters = inputs
        outputs = []
        for number in range(length):
            within = {axis: place - first[axis] for axis, place in _places(arch, start + number).items()}
            places = {axis: first[axis] + group * per[axis] + index for axis, index in within.items()}
            read = _at(weights, axes, within) if whole else _at(stacks, axes, places)
            carry, out = in_loop(carry, read, _at(group_adapters, axes, within), places["layers"], places)
            outputs.append(out)
        return carry, tuple(outputs)

    looped: list[tuple[str, Any]] = []
    if groups:
        inputs = jnp.arange(groups), grouped(stacks) if whole else {}, grouped(adapters)
        carry, outs = jax.lax.scan(body, carry, inputs)
        looped = list(zip(kinds[:length], outs, strict=True))
    left: list[tuple[str, Any]] = []
    for layer in range(start + groups * length, stop):
        places = _places(arch, layer)
        weights, layer_adapters = of_layer(arch, stacks, layer), of_layer(arch, adapters, layer)
        carry, out = after(carry, weights, layer_adapters, layer, places)
        left.append((arch.mixers[layer], out))
    return carry, (looped, left)


def _pattern(kinds: Sequence[str]) -> tuple[int, int]:
    """Returns the length of the shortest repeated pattern, and its repetitions: 0 if nothing is repeated."""
    for length in range(1, len(kinds) // 2 + 1):
        if all(kind == kinds[number % length] for number, kind in enumerate(kinds)):
            return length, len(kinds) // length
    return len(kinds), 0


def _places(arch: Arch, layer: int) -> dict[str, int]:
    """Returns the entry of block `layer` in each kind of stack that it is in, by the stacks' leading axis."""
    return {axis: place for axis in _AXES if (place := arch.place(axis, layer)) is not None}


def _at(stacks: Mapping[str, Any], axes: Mapping[str, str], places: Mapping[str, Any]) -> dict[str, Any]:
    return {name: layer_of(stack, places[axes[name]]) for name, stack in stacks.items() if axes[name] in places}


def stacked_caches(arch: Arch, outputs: Outputs, segments: Sequence[Segment]) -> tuple[LayerCache, ...]:
    """Stacks the caches of all blocks for each segment: keys, values and states over the blocks that have them."""
    looped, left = outputs

    def joined(kind: str, number: int) -> Any:
        """Stacks the caches of a segment in all blocks of a kind. Returns None where there is no such block."""
        inside = [caches[number] for block_kind, caches in looped if block_kind == kind]
        parts = []
        if inside:  # becomes [repetitions, blocks of the kind in a pattern, ...]
            every = jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *inside)
            parts.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), every))
        parts += [jax.tree.map(lambda x: x[None], caches[number]) for block_kind, caches in left if block_kind == kind]
        return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts) if parts else None

    stacked = []
    for number, segment in enumerate(segments):
        batch, length, dtype = segment.x.shape[:-2], segment.x.shape[-2], segment.x.dtype
        attention, delta = joined("attention", number), joined("delta", number)
        if attention is None:
            none = jnp.zeros((0, arch.num_kv_heads, *batch, length, arch.head_dim), dtype)
            attention = LayerCache(none, none)
        state = None if delta is None else delta.state
        if state is None and arch.delta is not None:
            state = empty_state(arch.delta, segment.positions.size // length, dtype, (0,))
        wide, global_kv = joined("global", number), None
        if wide is not None:
            global_kv = cached(wide.k, 1), cached(wide.v, 1)
        elif arch.global_attention is not None:
            heads, head_dim = arch.global_attention.num_kv_heads, arch.global_attention.head_dim
            none = jnp.zeros((0, heads, *batch, length, head_dim), dtype)
            global_kv = none, none
        stacked.append(LayerCache(cached(attention.k, 1), cached(attention.v, 1), state, global_kv))
    return tuple(stacked)
