"""The device mesh: the one place that knows device axes.

Everything else names logical axes (`arch.Weight.axes`, "batch"); `RULES` maps those to mesh axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    return Mesh(np.array(devices[:needed]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


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


def platform_of(x: jax.Array) -> str:
    """Where x is, or what it is compiled for: `cpu`, `gpu` or `tpu`. Arrays off any mesh are where jax puts them.

    Programs are also compiled for devices that this machine has not (`nlae plan`), so jax's own backend does not tell.
    """
    device = jax.typeof(x).sharding.mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def place(tree: Any, shardings: Any) -> Any:
    """Puts host arrays onto the mesh; each device gets its part only."""
    return jax.tree.map(jax.device_put, tree, shardings)
