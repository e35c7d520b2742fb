"""Models whose blocks differ in what mixes tokens: their weights are stacked over the blocks that have them.

Blocks are run by the shortest pattern of kinds that they repeat: a loop over the pattern's repetitions whose body is
its blocks one after another, then what is left. So the compiled module grows with the pattern, not with the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nlae_jax.lm.arch import MIXERS, Arch, block_weights
from nlae_jax.lm.block import LayerCache, Segment, cached, layer_of
from nlae_jax.lm.segments import empty_state

# (carry, weights, adapters, block's number, its places in stacks by their leading axis) -> (carry, what it gives).
# Weights and adapters are those that the block has.
Step = Callable[[Any, dict[str, Any], dict[str, Any], Any, dict[str, Any]], tuple[Any, Any]]
# What blocks gave, each with the block's kind: of the loop, stacked over its repetitions, and of those left.
Given = tuple[list[tuple[str, Any]], list[tuple[str, Any]]]

_AXES = ("layers", *MIXERS)


def of_layer(arch: Arch, stacks: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """What block `layer` has of parameters or adapters, by our names."""
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
) -> tuple[Any, Given]:
    """`step` for the blocks `start` to `stop` (exclusive), in order; the carry, and what they gave.

    `policy`: what the backward pass keeps of a step, as `jax.checkpoint` takes it; None: no backward pass.
    """
    kinds = arch.mixers[start:stop]
    length, groups = _pattern(kinds)
    axes = {name: weight.axes[0] for name, weight in block_weights(arch).items()}
    first = {axis: arch.count(axis, start) for axis in _AXES}
    per = {axis: arch.count(axis, start + length) - first[axis] for axis in _AXES}

    def grouped(trees: Mapping[str, Any]) -> dict[str, Any]:
        def of(x: jax.Array, axis: str) -> jax.Array:
            begin, count = first[axis], groups * per[axis]
            part = x if len(x) == count else x[begin : begin + count]
            return part.reshape(groups, per[axis], *x.shape[1:])

        kept = {name: tree for name, tree in trees.items() if per[axes[name]]}
        return {name: jax.tree.map(lambda x, axis=axes[name]: of(x, axis), tree) for name, tree in kept.items()}

    def once(scanned: bool) -> Step:
        return step if policy is None else jax.checkpoint(step, policy=policy, prevent_cse=not scanned)

    # A part of the stack is read in place, block by block: slicing it first would copy it.
    whole = groups * length == arch.num_layers
    in_loop, after = once(True), once(False)

    def body(carry: Any, inputs: tuple[jax.Array, dict[str, Any], dict[str, Any]]) -> tuple[Any, tuple[Any, ...]]:
        group, weights, own = inputs
        given = []
        for number in range(length):
            within = {axis: place - first[axis] for axis, place in _places(arch, start + number).items()}
            places = {axis: first[axis] + group * per[axis] + index for axis, index in within.items()}
            read = _at(weights, axes, within) if whole else _at(stacks, axes, places)
            carry, out = in_loop(carry, read, _at(own, axes, within), places["layers"], places)
            given.append(out)
        return carry, tuple(given)

    looped: list[tuple[str, Any]] = []
    if groups:
        inputs = jnp.arange(groups), grouped(stacks) if whole else {}, grouped(adapters)
        carry, outs = jax.lax.scan(body, carry, inputs)
        looped = list(zip(kinds[:length], outs, strict=True))
    left: list[tuple[str, Any]] = []
    for layer in range(start + groups * length, stop):
        places = _places(arch, layer)
        weights, own = of_layer(arch, stacks, layer), of_layer(arch, adapters, layer)
        carry, out = after(carry, weights, own, layer, places)
        left.append((arch.mixers[layer], out))
    return carry, (looped, left)


def _pattern(kinds: Sequence[str]) -> tuple[int, int]:
    """How long the pattern is that the kinds repeat, and how often; no time where it would be once."""
    for length in range(1, len(kinds) // 2 + 1):
        if all(kind == kinds[number % length] for number, kind in enumerate(kinds)):
            return length, len(kinds) // length
    return len(kinds), 0


def _places(arch: Arch, layer: int) -> dict[str, int]:
    """Where block `layer` stands in the stacks that it is in, by their leading axis."""
    return {axis: place for axis in _AXES if (place := arch.place(axis, layer)) is not None}


def _at(stacks: Mapping[str, Any], axes: Mapping[str, str], places: Mapping[str, Any]) -> dict[str, Any]:
    return {name: layer_of(stack, places[axes[name]]) for name, stack in stacks.items() if axes[name] in places}


def stacked_caches(arch: Arch, given: Given, segments: Sequence[Segment]) -> tuple[LayerCache, ...]:
    """Each segment's keys, values and states, stacked over the blocks that have them, from all blocks' caches."""
    looped, left = given

    def joined(kind: str, number: int) -> Any:
        """None where no block is of that kind."""
        inside = [caches[number] for of, caches in looped if of == kind]
        parts = []
        if inside:
            every = jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *inside)  # [repetitions, of the kind in each, ...]
            parts.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), every))
        parts += [jax.tree.map(lambda x: x[None], caches[number]) for of, caches in left if of == kind]
        return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts) if parts else None

    made = []
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
        made.append(LayerCache(cached(attention.k, 1), cached(attention.v, 1), state, global_kv))
    return tuple(made)
