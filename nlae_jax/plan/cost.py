"""Counts what a compiled module does on each device: matrix FLOPs, bytes of main memory, collectives by mesh axis.

From the text of the optimised module (`hlo.py`), loops times their trip counts. XLA's own `cost_analysis` counts a loop
once, knows nothing of collectives and takes a slice of an array for a read of all of it. Pure.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from nlae_jax.plan.hlo import Array, Computation, Instruction, Module

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)

# They name, wait or are inside others: nothing moves.
_FREE = frozenset(
    [
        *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id", "replica-id"),
        *("opt-barrier", "optimization-barrier", "add-dependency", "domain", "while", "conditional", "call"),
    ]
)
_TARGET = r'custom_call_target="(\w+)"'
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass
class Loop:
    """A while loop: the name of its operation, its trips, one trip's cost. `known`: whether the trips are."""

    name: str
    trips: int
    body: Cost
    known: bool = True


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective: its kind, the mesh axes that it is along, bytes that a device sends over its links.

    `moved`: bytes between them and main memory.
    """

    kind: str
    axes: str
    sent: float
    moved: float


@dataclasses.dataclass
class Cost:
    """Of a computation run once, on one device. What is in loops stands in `loops` only.

    `flops`: of matrix products, a multiplication and an addition each; `kernel_flops`: those of them that kernels say
    of themselves. `repeated_flops`: what the matrix unit does beside `flops`, for it takes float32 products in several
    passes of bfloat16 ones. `moved`: bytes read from main memory and written to it, but for collectives. `exchanges`:
    collectives by channel; one that runs beside a chain of products stands in each of them, and counts once.
    """

    flops: float = 0.0
    kernel_flops: float = 0.0
    repeated_flops: float = 0.0
    moved: float = 0.0
    exchanges: dict[str, Exchange] = dataclasses.field(default_factory=dict)
    loops: list[Loop] = dataclasses.field(default_factory=list)

    def add(self, other: Cost) -> None:
        """Adds `other`, its loops as they are."""
        self.flops += other.flops
        self.kernel_flops += other.kernel_flops
        self.repeated_flops += other.repeated_flops
        self.moved += other.moved
        self.exchanges = other.exchanges | self.exchanges
        self.loops = self.loops + other.loops

    @property
    def bytes(self) -> float:
        """Of main memory, outside loops."""
        return self.moved + sum(one.moved for one in self.exchanges.values())

    @property
    def sent(self) -> float:
        """Bytes over the links, outside loops."""
        return sum(one.sent for one in self.exchanges.values())

    def flattened(
        self, name: str = "", trips: int = 1, begun: frozenset[str] = frozenset()
    ) -> Iterator[tuple[str, int, Cost]]:
        """What is outside loops, then every loop: its name, its trips times those around it, one trip's own cost.

        Collectives that were `begun` outside a loop and go on beside its trips count outside.
        """
        own = {channel: one for channel, one in self.exchanges.items() if channel not in begun}
        yield name, trips, dataclasses.replace(self, exchanges=own)
        for loop in self.loops:
            yield from loop.body.flattened(loop.name, trips * loop.trips, begun | self.exchanges.keys())

    def total(self) -> Total:
        """With all loops' trips."""
        whole = Total()
        for _, trips, part in self.flattened():
            whole.flops += trips * part.flops
            whole.kernel_flops += trips * part.kernel_flops
            whole.repeated_flops += trips * part.repeated_flops
            whole.bytes += trips * part.bytes
            whole.sent += trips * part.sent
            for one in part.exchanges.values():
                count, size = whole.collectives.get((one.kind, one.axes), (0, 0.0))
                whole.collectives[one.kind, one.axes] = count + trips, size + trips * one.sent
        return whole


@dataclasses.dataclass
class Total:
    """Sums over a whole program; `collectives`: (kind, axes) -> how many, and the bytes that a device sends."""

    flops: float = 0.0
    kernel_flops: float = 0.0
    repeated_flops: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0
    collectives: dict[tuple[str, str], tuple[int, float]] = dataclasses.field(default_factory=dict)


def cost_of(module: Module, axes: dict[str, int], unknown_trips: int = 1) -> Cost:
    """The cost of a module that is partitioned over a mesh of these axes and sizes, in the order of its devices.

    `unknown_trips`: of loops whose trip count stands nowhere.
    """
    return _Counter(module, axes, unknown_trips).computation(module.entry)


class _Counter:
    def __init__(self, module: Module, axes: dict[str, int], unknown_trips: int) -> None:
        self.module, self.axes, self.unknown_trips = module, axes, unknown_trips
        self._known: dict[tuple[str, bool], Cost] = {}

    def computation(self, name: str, fused: bool = False) -> Cost:
        """`fused`: what is inside a fusion moves nothing through main memory."""
        if (name, fused) not in self._known:
            cost, computation = Cost(), self.module.computations[name]
            for instruction in computation.instructions.values():
                cost.add(self._instruction(computation, instruction, fused))
            self._known[name, fused] = cost
        return self._known[name, fused]

    def _instruction(self, inside: Computation, one: Instruction, fused: bool) -> Cost:
        cost, opcode = Cost(), one.opcode
        if opcode == "while":
            trips, known = self._trips(one)
            trip = Cost()
            for role in ("body", "condition"):
                trip.add(self.computation(one.called[role]))
            return Cost(loops=[Loop(_operation(one), trips, trip, known)])
        if opcode == "conditional":
            branches = [self.computation(branch) for branch in one.branches]
            return max(branches, key=lambda branch: (branch.total().flops, branch.total().bytes), default=cost)
        if opcode in ("call", "async-start"):
            called = one.called.get("to_apply") or one.called.get("calls")
            return self.computation(called, fused) if called in self.module.computations else cost
        if opcode == "fusion":
            cost.add(self.computation(one.called["calls"], fused=True))
        elif opcode == "dot":
            cost.flops = dot_flops(one, inside.operands(one))
        elif opcode == "ragged-dot":
            cost.flops = ragged_dot_flops(one, inside.operands(one))
        elif opcode == "convolution":
            cost.flops = convolution_flops(one, inside.operands(one))
        elif opcode == "custom-call":
            cost.flops = cost.kernel_flops = float(_estimate(one).get("flops", 0))
        elif (kind := opcode.removesuffix("-start")) in COLLECTIVES:
            return self._collective(inside, one, kind)
        if opcode in ("dot", "ragged-dot", "convolution", "custom-call"):
            cost.repeated_flops += cost.flops * (_passes(one, inside.operands(one)) - 1)
        if not fused:
            cost.moved = self._moved(inside, one)
        return cost

    def _trips(self, one: Instruction) -> tuple[int, bool]:
        """From the compiler's own note, else the constant that the condition compares with."""
        if found := one.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(found), True
        constants = list(self._compared(one.called["condition"]))
        return (-(-max(constants) // self._stride(one)), True) if constants else (self.unknown_trips, False)

    def _stride(self, one: Instruction) -> int:
        """By how much a trip advances what the condition compares: loops over parts of a product are unrolled."""
        condition, body = (self.module.computations[one.called[role]] for role in ("condition", "body"))
        compared = [each for each in condition.instructions.values() if each.opcode == "compare"]
        places = [condition.instructions[name].attribute(r"index=(\d+)") for each in compared for name in each.operands]
        place = next((int(place) for place in places if place), None)
        if place is None or body.root.opcode != "tuple":
            return 1
        stride, value = 0, body.instructions[body.root.operands[place]]
        while value.opcode in ("add", "copy"):
            operands = [body.instructions[name] for name in value.operands]
            stride += sum(int(each.given) for each in operands if each.opcode == "constant")
            value = next((each for each in operands if each.opcode != "constant"), operands[0])
        return max(1, stride)

    def _compared(self, name: str, given: Sequence[Instruction] = ()) -> Iterator[int]:
        """Integers that a condition compares with, also inside fusions, whose operands are `given`."""
        inside = self.module.computations[name]
        stands_for = {
            inside.parameters[number].name: one for number, one in enumerate(given) if number in inside.parameters
        }
        resolved = inside.instructions | stands_for
        for one in inside.instructions.values():
            operands = [resolved[operand] for operand in one.operands]
            if one.opcode == "compare":
                yield from _integers(operands)
            elif one.opcode in ("fusion", "call"):
                yield from self._compared(one.called.get("calls") or one.called["to_apply"], operands)

    def _collective(self, inside: Computation, one: Instruction, kind: str) -> Cost:
        operands = inside.operands(one)
        size = sum(map(_bytes, operands))
        groups = _groups(one, math.prod(self.axes.values()))
        count = len(groups[0])
        if count < 2:
            return Cost()
        if kind == "all-reduce" and _is_scattered(inside, one):
            kind = "reduce-scatter"
        sent = {
            "all-gather": size * (count - 1),
            "reduce-scatter": size * (count - 1) / count,
            "all-reduce": 2 * size * (count - 1) / count,
            "all-to-all": size * (count - 1) / count,
            "ragged-all-to-all": size * (count - 1) / count,
        }.get(kind, size)
        # Begun and not waited for, it names its operands before its results.
        results = one.outputs[len(operands) :][: len(operands)] if one.opcode.endswith("-start") else one.outputs
        moved = float(sum(map(_main, operands)) + _main(results))
        channel = one.attribute(r"channel_id=(\d+)") or f"{inside.name}/{one.name}"
        return Cost(exchanges={channel: Exchange(kind, axes_of(groups, self.axes), sent, moved)})

    def _moved(self, inside: Computation, one: Instruction) -> float:
        """Bytes that an instruction outside fusions reads from main memory and writes to it."""
        opcode, operands = one.opcode, inside.operands(one)
        if opcode in _FREE or opcode.endswith("-done") or opcode in ("send", "recv"):
            return 0.0
        if opcode == "custom-call" and one.attribute(_TARGET) in _FREE_TARGETS:
            return 0.0
        if opcode == "copy-start":  # (destination, source, context)
            return float(_main(one.outputs[:1]) + sum(map(_main, operands)))
        if opcode == "slice-start":  # (source, destination, context)
            return float(_main(one.outputs[1:2]) + (_bytes(one.outputs[1:2]) if _main(operands[0]) else 0))
        if opcode == "fusion":
            called = self.module.computations[one.called["calls"]]
            read = sum(
                min(_main(shape), self._read(called, called.parameters[number].name))
                for number, shape in enumerate(operands)
                if _main(shape) and number in called.parameters
            )
            return read + self._written(called, called.root, one.outputs)
        if opcode in _SLICES:
            return float(_main(one.outputs) + (_bytes(one.outputs) if _main(operands[0]) else 0))
        if opcode == "dynamic-update-slice":
            return float(_main(operands[1]) + (_bytes(operands[1]) if _main(one.outputs) else 0))
        return float(_main(one.outputs) + sum(map(_main, operands)))

    def _read(self, inside: Computation, name: str) -> float:
        """Bytes read of a value inside a fusion: all of it, unless only slices are taken or it is updated in place."""
        whole, read = float(_bytes(inside.instructions[name].outputs)), 0.0
        for user in inside.users[name]:
            first_only = user.operands[:1] == (name,) and user.operands.count(name) == 1
            if user.opcode in _SLICES and first_only:
                read += _bytes(user.outputs)
            elif user.opcode == "bitcast":
                read += self._read(inside, user.name)
            elif user.opcode == "fusion":
                called = self.module.computations[user.called["calls"]]
                numbers = [number for number, operand in enumerate(user.operands) if operand == name]
                read += sum(self._read(called, called.parameters[number].name) for number in numbers)
            elif user.opcode in COLLECTIVES or (user.opcode == "tuple" and user.root):
                continue  # counted by itself; handed on
            elif user.opcode != "dynamic-update-slice" or not first_only:
                return whole
        return min(read, whole)

    def _written(self, inside: Computation, root: Instruction, outputs: Sequence[Array]) -> float:
        """Bytes that a fusion writes: of an array updated in place only the update."""
        if root.opcode == "tuple" and len(root.operands) == len(outputs):
            parts = [inside.instructions[name] for name in root.operands]
            return sum(self._written(inside, part, [array]) for part, array in zip(parts, outputs, strict=True))
        if not _main(outputs) or root.opcode == "parameter" or root.opcode in COLLECTIVES:
            return 0.0
        if root.opcode == "bitcast":
            return self._written(inside, inside.instructions[root.operands[0]], outputs)
        if root.opcode == "dynamic-update-slice":
            return float(_bytes(inside.instructions[root.operands[1]].outputs))
        if root.opcode == "fusion":
            called = self.module.computations[root.called["calls"]]
            return self._written(called, called.root, outputs)
        return float(_main(outputs))


def _integers(instructions: Iterable[Instruction]) -> Iterator[int]:
    for one in instructions:
        if one.opcode == "constant" and one.outputs[0].dtype in ("s32", "u32", "s64") and not one.outputs[0].dims:
            yield int(one.given)


def _bytes(shape: Iterable[Array]) -> int:
    return sum(array.bytes for array in shape)


def _main(shape: Iterable[Array]) -> int:
    """Bytes of what lies in main memory."""
    return sum(array.bytes for array in shape if array.space == 0)


def _operation(one: Instruction) -> str:
    """What the program calls an instruction: `jit(step)/decode/while`."""
    return one.attribute(r'op_name="([^"]*)"') or one.name


def _estimate(one: Instruction) -> dict[str, float]:
    """What a Pallas kernel says it costs."""
    found = one.attribute(r'"cost_estimate":(\{[^{}]*\})')
    return json.loads(found) if found else {}


def _is_scattered(inside: Computation, one: Instruction) -> bool:
    """Whether each device keeps a slice only of what is reduced: TPUs write a reduce-scatter so."""
    users = inside.users[one.name]
    sliced = (
        user.opcode == "dynamic-slice" or (user.opcode == "bitcast" and _is_scattered(inside, user)) for user in users
    )
    return bool(users) and all(sliced)


def dot_flops(one: Instruction, operands: Sequence[Sequence[Array]]) -> float:
    contracted = math.prod(operands[0][0].dims[axis] for axis in one.dims("lhs_contracting_dims"))
    return 2.0 * one.outputs[0].size * contracted


def ragged_dot_flops(one: Instruction, operands: Sequence[Sequence[Array]]) -> float:
    """Every row meets the one group that is its own, whose sizes are the third operand."""
    groups = operands[2][0].dims[-1]
    summed = set(one.dims("lhs_ragged_dims")) & set(one.dims("lhs_contracting_dims"))  # the gradient of the matrices
    return dot_flops(one, operands[:2]) / (groups if summed else 1)


def _passes(one: Instruction, operands: Sequence[Sequence[Array]]) -> int:
    """Of bfloat16 products that a TPU makes a product of.

    A float32 number is three bfloat16 ones; of the nine products of two such numbers, full precision takes the largest
    six and "high" the largest three. Kernels do not say: theirs are full (`lm.products`).
    """
    wide = sum(array.dtype == "f32" for operand in operands for array in operand)
    precision = "highest" if one.opcode == "custom-call" else one.attribute(r"operand_precision=\{(\w+)")
    return {"highest": (1, 3, 6), "high": (1, 2, 3)}.get(precision or "", (1, 1, 1))[min(wide, 2)]


def convolution_flops(one: Instruction, operands: Sequence[Sequence[Array]]) -> float:
    """2 · batch · features out · features in · the products of each window that are not with padding.

    TPUs write matrix products as convolutions, and the batch of a batched one as a dimension of the window that lies
    almost wholly in the padding.
    """
    image, kernel, out = (array.dims for array in (operands[0][0], operands[1][0], one.outputs[0]))
    labels = one.attribute(r"dim_labels=(\w+_\w+->\w+)")
    image_labels, kernel_labels, out_labels = re.split(r"_|->", labels or "")
    window = _window(one.attribute(r"window=\{([^}]*)\}") or "")
    products = kernel[kernel_labels.index("i")] * out[out_labels.index("f")] * out[out_labels.index("b")]
    for number in range(len(out_labels) - 2):
        size = image[image_labels.index(str(number))]
        products *= _valid(size, out[out_labels.index(str(number))], *(values[number] for values in window))
    return 2.0 * products


def _window(text: str) -> list[list[int] | _Default]:
    """Sizes, strides, padding before, dilations of image and kernel, by dimension."""
    given = dict(part.split("=") for part in text.split())
    pads = [part.split("_")[0] for part in given["pad"].split("x")] if "pad" in given else None
    read = lambda name: [int(x) for x in given[name].split("x")] if name in given else _Default(1)  # noqa: E731
    padding = [int(pad) for pad in pads] if pads else _Default(0)
    return [read("size"), read("stride"), padding, read("lhs_dilate"), read("rhs_dilate")]


class _Default:
    """A list of one value, as long as need be."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __getitem__(self, _: int) -> int:
        return self._value


def _valid(image: int, out: int, size: int, stride: int, before: int, spread: int, kernel_spread: int) -> int:
    """How many (place of the output, place in the window) meet an element of the image."""
    at = np.arange(out)[:, None] * stride + np.arange(size)[None] * kernel_spread - before
    return int(((at >= 0) & (at <= (image - 1) * spread) & (at % spread == 0)).sum())


def _groups(one: Instruction, devices: int) -> list[list[int]]:
    """Which devices exchange with one another; of a permutation its pairs."""
    if pairs := one.attribute(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}"):
        return _lists(pairs)
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", one.attributes):
        shape, dims, axes = found.groups()
        return _iota(dims, axes).reshape([int(size) for size in shape.split(",")]).tolist()
    order = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}]*)\}}", one.attributes):
        mesh, dims, axes, along = found.groups()
        groups = _mesh_groups(mesh, along)
        return groups if dims is None else _iota(dims, axes).reshape(-1)[np.array(groups)].tolist()
    listed = one.attribute(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
    if not listed and re.search(r"replica_groups=(?!\{\})", one.attributes):
        raise ValueError(f"{one.name}: groups of devices in a form that is not known: {one.attributes[:200]}")
    return _lists(listed) if listed else [list(range(devices))]


def _iota(dims: str, axes: str | None) -> np.ndarray:
    """`4,2`, `1,0` -> the numbers from 0 on in that shape, its axes in that order."""
    sizes = [int(x) for x in dims.split(",")]
    order = [int(x) for x in axes.split(",")] if axes else None
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order)


def _mesh_groups(mesh: str, along: str) -> list[list[int]]:
    """`'a'=2,'b'=8`, `'a','b':(2)4` -> groups along a, and the part of b that has 4 after one of 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)
    dims: list[int] = []
    chosen: list[tuple[int, int]] = []  # place in `along`, dimension
    for axis, size in sizes.items():
        cuts = sorted(
            (int(before or 1), int(length or size), at)
            for at, (name, before, length) in enumerate(parts)
            if name == axis
        )
        done = 1
        for before, length, at in cuts:
            dims += [before // done] if before > done else []
            chosen.append((at, len(dims)))
            dims.append(length)
            done = before * length
        dims += [size // done] if size > done else []
    inner = [dimension for _, dimension in sorted(chosen)]
    outer = [dimension for dimension in range(len(dims)) if dimension not in inner]
    members = math.prod(dims[dimension] for dimension in inner)
    return np.arange(math.prod(dims)).reshape(dims).transpose(*outer, *inner).reshape(-1, members).tolist()


def _lists(text: str) -> list[list[int]]:
    return [[int(number) for number in part.split(",")] for part in re.findall(r"\{([\d,]+)\}", text)]


def axes_of(groups: Sequence[Sequence[int]], axes: dict[str, int]) -> str:
    """The mesh axes along which the members of a group differ, as `fsdp` or `data+fsdp`."""
    differ: set[int] = set()
    for group in groups:
        places = np.array(np.unravel_index(group, tuple(axes.values())))
        differ |= set(np.flatnonzero((places != places[:, :1]).any(1)).tolist())
    return "+".join(name for number, name in enumerate(axes) if number in differ)
