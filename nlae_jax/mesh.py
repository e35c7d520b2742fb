"""The device mesh. Only this module knows device axes.

All other code names logical axes (`Weight.axes`, "batch"). `RULES` maps them to mesh axes, and `DECODE_RULES` does so
while tokens are sampled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from nlae_jax.config import Config, MeshConfig, flatten, microbatches
from nlae_jax.runtime.errors import UserError

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Weight:
    """The declaration of one parameter: its shape, and the logical name of each axis, which `RULES` maps to devices.

    `fan_in` sets the standard deviation of a random initialisation, `fan_in ** -0.5`; 0 means all ones.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fan_in: int = 0


Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    "batch": ("data", "fsdp"),  # activations are split over both; parameters are replicated over "data"
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "tensor",  # split between experts, never inside one
    "layers": None,
    "attention_layers": None,
    "delta_layers": None,
    "global_layers": None,
    "none": None,
    "norm": None,
    "rank": None,
}

# A decode step reads every weight for a few rows, so gathering the weights that "fsdp" splits would move the whole
# model once a token. Here every matrix is split along its other axis over both mesh axes instead. That moves the model
# once a rollout, and rows are multiplied where the parts are.
DECODE_RULES: Rules = {
    **RULES,
    "embed": None,
    "rows": "data",  # the rows of a residual stream
    **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "experts"), ("tensor", "fsdp")),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh of the first devices, as many as the product of the config's sizes.

    `devices` replace jax's devices. Raises UserError where there are too few, or the sizes are invalid.
    """
    devices = jax.devices() if devices is None else devices
    available = len(devices)
    sizes = [config.data, config.fsdp, config.tensor]
    layout = "×".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh: {layout}: sizes are positive, and at most one is -1 (all remaining devices)")
    if -1 in sizes:
        fixed = -math.prod(sizes)
        if available % fixed:
            raise UserError(f"mesh: {layout} does not fit {available} devices: {fixed} does not divide {available}")
        sizes[sizes.index(-1)] = available // fixed
    needed = math.prod(sizes)
    if needed > available:
        raise UserError(f"mesh: {layout} needs {needed} devices, this machine has {available}")
    if needed < available and jax.process_count() > 1:
        raise UserError(f"mesh: {layout}: {needed} of {available} devices; several processes must use all of theirs")
    return Mesh(np.array(devices[:needed]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batches(config: Config, mesh: Mesh) -> None:
    """Raises UserError where the devices do not divide a batch or a part of it."""
    values, devices = flatten(dataclasses.asdict(config)), batch_parts(mesh)
    for batch, count in microbatches().items():
        if values[batch] % devices:
            raise UserError(f"config.{batch}: {values[batch]} should be divisible by mesh data×fsdp = {devices}")
        if values[batch] // values[count] % devices:
            raise UserError(
                f"config.{count}: {values[count]} leave {values[batch] // values[count]} of {batch} at a time, which "
                f"should be divisible by mesh data×fsdp = {devices}"
            )


def weight_sharding(mesh: Mesh | AbstractMesh, weight: Weight, rules: Rules = RULES) -> NamedSharding:
    """Splits each axis as the rules say. An axis whose length the devices do not divide stays whole."""
    axes = zip(weight.shape, weight.axes, strict=True)
    return NamedSharding(mesh, PartitionSpec(*(split(mesh, axis, length, rules) for length, axis in axes)))


def split(mesh: Mesh | AbstractMesh, axis: str, length: int, rules: Rules = RULES) -> str | tuple[str, ...] | None:
    """Returns the mesh axes that split a logical axis of this length, or None where they do not divide it.

    Where several mesh axes do not divide it together, the last ones are left out.
    """
    rule = rules[axis]
    names = (rule,) if isinstance(rule, str) else rule or ()
    while names:
        parts = math.prod(mesh.shape.get(name, 1) for name in names)
        if length % parts == 0:
            return (rule if isinstance(rule, str) else names) if parts > 1 else None
        names = names[:-1]
    return None


def constrained(x: jax.Array, axes: Sequence[str | None], rules: Rules = RULES, together: int = 1) -> jax.Array:
    """Constrains the sharding of `x` inside a jitted function: its axes are split as the rules say.

    An axis named None stays whole. The last axis is never split inside a block of `together` entries. The mesh is read
    from x's type, so that models need no mesh argument. Without a mesh, or with one device, x is returned unchanged.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.size == 1:
        return x
    lengths = (*x.shape[:-1], x.shape[-1] // together)
    spec = (axis and split(mesh, axis, length, rules) for axis, length in zip(axes, lengths, strict=True))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def row_parts(x: jax.Array) -> int:
    """Returns the number of parts that devices split the rows of `x` into, inside a jitted function."""
    mesh = jax.typeof(x).sharding.mesh
    names = () if mesh.empty else split(mesh, "batch", x.shape[0]) or ()
    return math.prod(mesh.shape[name] for name in names)


def constrained_tree(tree: Any, weights: Any, rules: Rules) -> Any:
    """Applies `constrained` to every array in a tree whose axes `weights` declares."""
    return jax.tree.map(
        lambda weight, x: constrained(x, weight.axes, rules), weights, tree, is_leaf=lambda x: isinstance(x, Weight)
    )


def tree_shardings(mesh: Mesh, weights: Any) -> Any:
    """Returns the `weight_sharding` of every `Weight` in a tree."""
    return jax.tree.map(lambda w: weight_sharding(mesh, w), weights, is_leaf=lambda node: isinstance(node, Weight))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis over the devices that share a batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def batch_parts(mesh: Mesh) -> int:
    """Returns the number of parts that a batch is split into. A batch's size must be divisible by it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def platform_of(x: jax.Array) -> str:
    """Returns the platform that x is on or compiled for: `cpu`, `gpu` or `tpu`.

    `nlae plan` compiles programs for devices that this machine does not have, so the platform is read from x's mesh.
    Without a mesh it is that of jax's default backend.
    """
    device = jax.typeof(x).sharding.mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def place(tree: Any, shardings: Any) -> Any:
    """Puts host arrays onto the mesh, so that each device gets only its part.

    `shardings` is a tree like `tree`, or one sharding for all arrays. Every process must have the same values, and puts
    the parts of its own devices: nothing passes between processes.
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


def local_parts(mesh: Mesh) -> list[int]:
    """Returns the numbers of the `batch_parts` that are on this process's devices, ascending."""
    parts = batch_parts(mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((parts,)).values()
    return sorted({index[0].indices(parts)[0] for index in indices if index is not None})


def share(mesh: Mesh, rows: np.ndarray) -> np.ndarray:
    """Returns those rows of a batch [B] that this process's devices hold and that it must load, in order.

    They are [B / batch_parts · local_parts] of the rows.
    """
    return rows.reshape(batch_parts(mesh), -1)[local_parts(mesh)].reshape(-1)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a host batch onto the mesh, its leading axis split over the devices that share a batch.

    Each process passes only its `share` of the batch [B, ...].
    """
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    local, parts = local_parts(mesh), batch_parts(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        size = len(rows) // len(local)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # jax gives None for scalars only
            place = local.index((index[0].start or 0) // size)
            return rows[place * size : (place + 1) * size]

        return jax.make_array_from_callback((size * parts, *rows.shape[1:]), sharding, part)

    return {name: put(rows) for name, rows in batch.items()}
