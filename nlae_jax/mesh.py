"""The device mesh: the one place that knows device axes.

Everything else names logical axes (`arch.Weight.axes`, "batch"); `RULES` maps those to mesh axes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from nlae_jax.config import MeshConfig
from nlae_jax.errors import UserError
from nlae_jax.lm.arch import Weight

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # activations are split over both; parameters are replicated over "data"
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    "norm": None,
    "rank": None,
}


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh of the first devices, as many as the sizes multiply to. Raises UserError where there are fewer."""
    available = jax.device_count()
    sizes = [config.data, config.fsdp, config.tensor]
    wanted = "×".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh: {wanted}: sizes are positive, and at most one is -1 (what is left)")
    if -1 in sizes:
        known = -math.prod(sizes)
        if available % known:
            raise UserError(f"mesh: {wanted} does not fit {available} devices: {known} does not divide {available}")
        sizes[sizes.index(-1)] = available // known
    needed = math.prod(sizes)
    if needed > available:
        raise UserError(f"mesh: {wanted} needs {needed} devices, this machine has {available}")
    if needed < available and jax.process_count() > 1:
        raise UserError(f"mesh: {wanted}: {needed} of {available} devices; several processes must use all of theirs")
    devices = np.array(jax.devices()[:needed]).reshape(sizes)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def weight_sharding(mesh: Mesh, weight: Weight) -> NamedSharding:
    """Splits each axis as `RULES` say; one whose length the devices do not divide stays whole."""
    axes = zip(weight.shape, weight.axes, strict=True)
    return NamedSharding(mesh, PartitionSpec(*(split(mesh, axis, length) for length, axis in axes)))


def split(mesh: Mesh | AbstractMesh, axis: str, length: int) -> str | tuple[str, ...] | None:
    """The mesh axes that split a logical axis of this length; None where they do not divide it."""
    rule = RULES[axis]
    names = (rule,) if isinstance(rule, str) else rule or ()
    parts = math.prod(mesh.shape.get(name, 1) for name in names)
    return rule if parts > 1 and length % parts == 0 else None


def tree_shardings(mesh: Mesh, weights: Any) -> Any:
    """`weight_sharding` of every `Weight` in a tree."""
    return jax.tree.map(lambda w: weight_sharding(mesh, w), weights, is_leaf=lambda node: isinstance(node, Weight))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over the devices that split a batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split: what its size must be divisible by."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def place(tree: Any, shardings: Any) -> Any:
    """Puts host arrays onto the mesh; each device gets its part only. `shardings`: a tree like it, or one for all.

    Every process has the same values and puts its own devices' parts: nothing passes between processes.
    """
    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: _place(x, shardings), tree)
    return jax.tree.map(_place, tree, shardings)


def _place(value: Any, sharding: NamedSharding) -> jax.Array:
    on_others = isinstance(value, jax.Array) and not value.is_fully_addressable
    if sharding.is_fully_addressable or on_others:
        return jax.device_put(value, sharding)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def held_parts(mesh: Mesh) -> list[int]:
    """Which of a batch's `batch_parts` are on this process's devices, ascending."""
    parts = batch_parts(mesh)
    held = batch_sharding(mesh).addressable_devices_indices_map((parts,)).values()
    return sorted({index.indices(parts)[0] for (index,) in held})


def share(mesh: Mesh, rows: np.ndarray) -> np.ndarray:
    """Of a batch's rows [B] those [B / parts · held] that this process's devices hold, in order: it loads these."""
    return rows.reshape(batch_parts(mesh), -1)[held_parts(mesh)].reshape(-1)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A host batch onto the mesh, its leading axis split over the devices that share a batch.

    Of the batch [B, ...] each process gives its `share` [B / parts · held, ...].
    """
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    held, parts = held_parts(mesh), batch_parts(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        size = len(rows) // len(held)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            place = held.index((index[0].start or 0) // size)
            return rows[place * size : (place + 1) * size]

        return jax.make_array_from_callback((size * parts, *rows.shape[1:]), sharding, part)

    return {name: put(rows) for name, rows in batch.items()}
