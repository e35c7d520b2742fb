"""Groups of devices that exchange with one another in a compiled module, and the mesh axes that they are along.

All functions are pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from nlae_jax.plan.hlo import Instruction


def groups_of(op: Instruction, devices: int) -> list[list[int]]:
    """Returns the groups of devices that exchange with one another; for a permutation, its pairs."""
    if pairs := op.attribute(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}"):
        return _lists(pairs)
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", op.attributes):
        shape, dims, axes = match.groups()
        return _iota(dims, axes).reshape([int(size) for size in shape.split(",")]).tolist()
    order = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if match := re.search(rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}]*)\}}", op.attributes):
        mesh, dims, axes, along = match.groups()
        groups = _mesh_groups(mesh, along)
        return groups if dims is None else _iota(dims, axes).reshape(-1)[np.array(groups)].tolist()
    listed = op.attribute(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
    if not listed and re.search(r"replica_groups=(?!\{\})", op.attributes):
        raise ValueError(f"{op.name}: groups of devices in a form that is not known: {op.attributes[:200]}")
    return _lists(listed) if listed else [list(range(devices))]


def _iota(dims: str, axes: str | None) -> np.ndarray:
    """Returns the numbers from 0 on in a shape such as `4,2`, transposed to an order such as `1,0`."""
    sizes = [int(x) for x in dims.split(",")]
    order = [int(x) for x in axes.split(",")] if axes else None
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order)


def _mesh_groups(mesh: str, along: str) -> list[list[int]]:
    """Returns the groups of devices along parts of a mesh's axes.

    With the mesh `'a'=2,'b'=8`, `'a','b':(2)4` means all of a, and the factor 4 of b that follows a factor of 2.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)
    dims: list[int] = []
    named_dimensions: list[tuple[int, int]] = []  # place in `along`, dimension
    for axis, size in sizes.items():
        cuts = sorted(
            (int(before or 1), int(length or size), number)
            for number, (name, before, length) in enumerate(parts)
            if name == axis
        )
        covered = 1
        for before, length, number in cuts:
            dims += [before // covered] if before > covered else []
            named_dimensions.append((number, len(dims)))
            dims.append(length)
            covered = before * length
        dims += [size // covered] if size > covered else []
    inner = [dimension for _, dimension in sorted(named_dimensions)]
    outer = [dimension for dimension in range(len(dims)) if dimension not in inner]
    members = math.prod(dims[dimension] for dimension in inner)
    return np.arange(math.prod(dims)).reshape(dims).transpose(*outer, *inner).reshape(-1, members).tolist()


def _lists(text: str) -> list[list[int]]:
    """Parses `{0,1},{2,3}`."""
    return [[int(number) for number in part.split(",")] for part in re.findall(r"\{([\d,]+)\}", text)]


def axes_of(groups: Sequence[Sequence[int]], axes: dict[str, int]) -> str:
    """Names the mesh axes along which the members of a group differ, as `fsdp` or `data+fsdp`."""
    differ: set[int] = set()
    for group in groups:
        places = np.array(np.unravel_index(group, tuple(axes.values())))
        differ |= set(np.flatnonzero((places != places[:, :1]).any(1)).tolist())
    return "+".join(name for number, name in enumerate(axes) if number in differ)
