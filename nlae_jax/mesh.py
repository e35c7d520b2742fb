"""The device mesh: the one place that knows device axes.

Everything else names logical axes (`Weight.axes`, "batch"); `RULES` maps those to mesh axes, and `DECODE_RULES`
does while tokens are sampled.
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
    """One parameter: its shape, and the logical name of each axis (`RULES` maps those to devices).

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
    "experts": "tensor",  # whole ones
    "layers": None,
    "attention_layers": None,
    "delta_layers": None,
    "global_layers": None,
    "none": None,
    "norm": None,
    "rank": None,
}

# A decode step reads every weight for a few rows: gathering what "fsdp" splits would move the model once a token. So
# every matrix is split by its other axis, over both, which moves it once a rollout, and rows meet it whole.
DECODE_RULES: Rules = {
    **RULES,
    "embed": None,
    "rows": "data",  # of a residual stream
    **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "experts"), ("tensor", "fsdp")),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first devices (jax's, or those given), as many as the sizes multiply to.

    Raises UserError where there are fewer.
    """
    devices = jax.devices() if devices is None else devices
    available = len(devices)
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
    return Mesh(np.array(devices[:needed]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batches(config: Config, mesh: Mesh) -> None:
    """Raises UserError where the devices do not divide a batch or a part of it."""
    flat, devices = flatten(dataclasses.asdict(config)), batch_parts(mesh)
    for whole, parts in microbatches().items():
        if flat[whole] % devices:
            raise UserError(f"config.{whole}: {flat[whole]} should be divisible by mesh data×fsdp = {devices}")
        if flat[whole] // flat[parts] % devices:
            raise UserError(
                f"config.{parts}: {flat[parts]} leave {flat[whole] // flat[parts]} of {whole} at a time, which "
                f"should be divisible by mesh data×fsdp = {devices}"
            )


def weight_sharding(mesh: Mesh | AbstractMesh, weight: Weight, rules: Rules = RULES) -> NamedSharding:
    """Splits each axis as the rules say; one whose length the devices do not divide stays whole."""
    axes = zip(weight.shape, weight.axes, strict=True)
    return NamedSharding(mesh, PartitionSpec(*(split(mesh, axis, length, rules) for length, axis in axes)))


def split(mesh: Mesh | AbstractMesh, axis: str, length: int, rules: Rules = RULES) -> str | tuple[str, ...] | None:
    """The mesh axes that split a logical axis of this length; None where they do not divide it.

    Of several axes the last ones are left out where all together do not divide it.
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
    """`x`, inside a jitted function, with its axes split as the rules say; None is an axis that stays whole.

    `together`: the last axis is never split inside a block of this many entries. The mesh is the one that x's type
    carries: nobody hands one to a model. Without one, or with one device, x itself.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.size == 1:
        return x
    lengths = (*x.shape[:-1], x.shape[-1] // together)
    spec = (axis and split(mesh, axis, length, rules) for axis, length in zip(axes, lengths, strict=True))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def row_parts(x: jax.Array) -> int:
    """Into how many parts devices split the rows of `x`, inside a jitted function."""
    mesh = jax.typeof(x).sharding.mesh
    names = () if mesh.empty else split(mesh, "batch", x.shape[0]) or ()
    return math.prod(mesh.shape[name] for name in names)


def constrained_tree(tree: Any, weights: Any, rules: Rules) -> Any:
    """`constrained` of every array in a tree whose weights are declared so."""
    return jax.tree.map(
        lambda weight, x: constrained(x, weight.axes, rules), weights, tree, is_leaf=lambda x: isinstance(x, Weight)
    )


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


def platform_of(x: jax.Array) -> str:
    """Where x is, or what it is compiled for: `cpu`, `gpu` or `tpu`. Arrays off any mesh are where jax puts them.

    Programs are also compiled for devices that this machine has not (`nlae plan`), so jax's own backend does not tell.
    """
    device = jax.typeof(x).sharding.mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


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


def local_parts(mesh: Mesh) -> list[int]:
    """Which of a batch's `batch_parts` are on this process's devices, ascending."""
    parts = batch_parts(mesh)
    held = batch_sharding(mesh).addressable_devices_indices_map((parts,)).values()
    return sorted({index[0].indices(parts)[0] for index in held if index is not None})


def share(mesh: Mesh, rows: np.ndarray) -> np.ndarray:
    """Of a batch's rows [B] those [B / parts · held] that this process's devices hold, in order: it loads these."""
    return rows.reshape(batch_parts(mesh), -1)[local_parts(mesh)].reshape(-1)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A host batch onto the mesh, its leading axis split over the devices that share a batch.

    Of the batch [B, ...] each process gives its `share` [B / parts · held, ...].
    """
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    held, parts = local_parts(mesh), batch_parts(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        size = len(rows) // len(held)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # as for a scalar, which no batch is
            place = held.index((index[0].start or 0) // size)
            return rows[place * size : (place + 1) * size]

        return jax.make_array_from_callback((size * parts, *rows.shape[1:]), sharding, part)

    return {name: put(rows) for name, rows in batch.items()}
