"""Counts the work of a compiled module on each device: matrix FLOPs, bytes of main memory, collectives by mesh axis.

It reads the text of the optimised module (`hlo.py`) and multiplies loops by their trip counts. XLA's `cost_analysis`
counts a loop once, does not count collectives, and counts a slice of an array as a read of the whole array. All
functions are pure.
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

# Instructions that move no bytes: they name values, wait, or their work is counted inside other computations.
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
    """A while loop: the name of its operation, its trips, and one trip's cost.

    `known` says whether the number of trips was found in the module.
    """

    name: str
    trips: int
    body: Cost
    known: bool = True


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective: its kind, the mesh axes that it is along, and the bytes that a device sends over its links.

    `moved` is the number of bytes that it moves between links and main memory.
    """

    kind: str
    axes: str
    sent: float
    moved: float


@dataclasses.dataclass
class Cost:
    """The cost of a computation that runs once, on one device. The cost of loops is in `loops` only.

    `flops` counts the multiplications and additions of matrix products; `kernel_flops` is the part that kernels declare
    themselves. `repeated_flops` is the matrix unit's further work, because it computes a float32 product in several
    passes of bfloat16 products. `moved` is the number of bytes read from and written to main memory, without
    collectives. `exchanges` holds collectives by channel: one that runs beside a chain of products appears in each of
    them, and counts once.
    """

    flops: float = 0.0
    kernel_flops: float = 0.0
    repeated_flops: float = 0.0
    moved: float = 0.0
    exchanges: dict[str, Exchange] = dataclasses.field(default_factory=dict)
    loops: list[Loop] = dataclasses.field(default_factory=list)

    def add(self, other: Cost) -> None:
        """Adds another cost. Its loops stay separate."""
        self.flops += other.flops
        self.kernel_flops += other.kernel_flops
        self.repeated_flops += other.repeated_flops
        self.moved += other.moved
        self.exchanges = other.exchanges | self.exchanges
        self.loops = self.loops + other.loops

    @property
    def bytes(self) -> float:
        """Bytes of main memory moved outside loops."""
        return self.moved + sum(exchange.moved for exchange in self.exchanges.values())

    @property
    def sent(self) -> float:
        """Bytes sent over the links outside loops."""
        return sum(exchange.sent for exchange in self.exchanges.values())

    def flattened(
        self, name: str = "", trips: int = 1, begun: frozenset[str] = frozenset()
    ) -> Iterator[tuple[str, int, Cost]]:
        """Yields (name, trips, cost without inner loops) of the work outside loops and of every loop.

        Trips are multiplied by those of the loops around. Collectives that were `begun` outside a loop and go on beside
        its trips count outside.
        """
        exchanges = {channel: exchange for channel, exchange in self.exchanges.items() if channel not in begun}
        yield name, trips, dataclasses.replace(self, exchanges=exchanges)
        for loop in self.loops:
            yield from loop.body.flattened(loop.name, trips * loop.trips, begun | self.exchanges.keys())

    def total(self) -> Total:
        """Returns the sums over all trips of all loops."""
        sums = Total()
        for _, trips, part in self.flattened():
            sums.flops += trips * part.flops
            sums.kernel_flops += trips * part.kernel_flops
            sums.repeated_flops += trips * part.repeated_flops
            sums.bytes += trips * part.bytes
            sums.sent += trips * part.sent
            for exchange in part.exchanges.values():
                count, size = sums.collectives.get((exchange.kind, exchange.axes), (0, 0.0))
                sums.collectives[exchange.kind, exchange.axes] = count + trips, size + trips * exchange.sent
        return sums


@dataclasses.dataclass
class Total:
    """Sums over a whole program. `collectives` maps (kind, axes) to (number, bytes that a device sends)."""

    flops: float = 0.0
    kernel_flops: float = 0.0
    repeated_flops: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0
    collectives: dict[tuple[str, str], tuple[int, float]] = dataclasses.field(default_factory=dict)


def cost_of(module: Module, axes: dict[str, int], unknown_trips: int = 1) -> Cost:
    """Counts the cost of a module that is partitioned over a mesh of these axes and sizes, in its devices' order.

    `unknown_trips` is used for loops whose trip count cannot be found in the module.
    """
    return _Counter(module, axes, unknown_trips).computation(module.entry)


class _Counter:
    """Counts the costs of one module's computations."""

    def __init__(self, module: Module, axes: dict[str, int], unknown_trips: int) -> None:
        self.module, self.axes, self.unknown_trips = module, axes, unknown_trips
        self._costs: dict[tuple[str, bool], Cost] = {}

    def computation(self, name: str, fused: bool = False) -> Cost:
        """Counts a computation. Inside a fusion (`fused`) nothing moves through main memory."""
        if (name, fused) not in self._costs:
            cost, computation = Cost(), self.module.computations[name]
            for instruction in computation.instructions.values():
                cost.add(self._instruction(computation, instruction, fused))
            self._costs[name, fused] = cost
        return self._costs[name, fused]

    def _instruction(self, inside: Computation, op: Instruction, fused: bool) -> Cost:
        """Counts one instruction of the computation `inside`, with the computations that it calls."""
        cost, opcode = Cost(), op.opcode
        if opcode == "while":
            trips, known = self._trips(op)
            trip = Cost()
            for role in ("body", "condition"):
                trip.add(self.computation(op.called[role]))
            return Cost(loops=[Loop(_operation(op), trips, trip, known)])
        if opcode == "conditional":
            branches = [self.computation(branch) for branch in op.branches]
            return max(branches, key=lambda branch: (branch.total().flops, branch.total().bytes), default=cost)
        if opcode in ("call", "async-start"):
            called = op.called.get("to_apply") or op.called.get("calls")
            return self.computation(called, fused) if called in self.module.computations else cost
        if opcode == "fusion":
            cost.add(self.computation(op.called["calls"], fused=True))
        elif opcode == "dot":
            cost.flops = dot_flops(op, inside.operands(op))
        elif opcode == "ragged-dot":
            cost.flops = ragged_dot_flops(op, inside.operands(op))
        elif opcode == "convolution":
            cost.flops = convolution_flops(op, inside.operands(op))
        elif opcode == "custom-call":
            cost.flops = cost.kernel_flops = float(_estimate(op).get("flops", 0))
        elif (kind := opcode.removesuffix("-start")) in COLLECTIVES:
            return self._collective(inside, op, kind)
        if opcode in ("dot", "ragged-dot", "convolution", "custom-call"):
            cost.repeated_flops += cost.flops * (_passes(op, inside.operands(op)) - 1)
        if not fused:
            cost.moved = self._moved(inside, op)
        return cost

    def _trips(self, op: Instruction) -> tuple[int, bool]:
        """Returns a loop's trips, and whether they are known.

        They come from the compiler's note, or else from the constant that the loop's condition compares with.
        """
        if noted := op.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(noted), True
        constants = list(self._compared(op.called["condition"]))
        return (-(-max(constants) // self._stride(op)), True) if constants else (self.unknown_trips, False)

    def _stride(self, op: Instruction) -> int:
        """Returns by how much a trip advances the compared value. Loops over parts of a product are unrolled."""
        condition, body = (self.module.computations[op.called[role]] for role in ("condition", "body"))
        compares = [other for other in condition.instructions.values() if other.opcode == "compare"]
        places = [condition.instructions[name].attribute(r"index=(\d+)") for c in compares for name in c.operands]
        place = next((int(place) for place in places if place), None)
        if place is None or body.root.opcode != "tuple":
            return 1
        stride, value = 0, body.instructions[body.root.operands[place]]
        while value.opcode in ("add", "copy"):
            operands = [body.instructions[name] for name in value.operands]
            stride += sum(int(operand.operand_text) for operand in operands if operand.opcode == "constant")
            value = next((operand for operand in operands if operand.opcode != "constant"), operands[0])
        return max(1, stride)

    def _compared(self, name: str, arguments: Sequence[Instruction] = ()) -> Iterator[int]:
        """Yields the integers that a condition compares with, also inside fusions, whose arguments are `arguments`."""
        inside = self.module.computations[name]
        argument_of = {
            inside.parameters[number].name: op for number, op in enumerate(arguments) if number in inside.parameters
        }
        resolved = inside.instructions | argument_of
        for op in inside.instructions.values():
            operands = [resolved[operand] for operand in op.operands]
            if op.opcode == "compare":
                yield from _integers(operands)
            elif op.opcode in ("fusion", "call"):
                yield from self._compared(op.called.get("calls") or op.called["to_apply"], operands)

    def _collective(self, inside: Computation, op: Instruction, kind: str) -> Cost:
        """Counts a collective."""
        operands = inside.operands(op)
        size = sum(map(_bytes, operands))
        groups = _groups(op, math.prod(self.axes.values()))
        count = len(groups[0])
        if count < 2:
            return Cost()
        if kind == "all-reduce" and _is_scattered(inside, op):
            kind = "reduce-scatter"
        sent = {
            "all-gather": size * (count - 1),
            "reduce-scatter": size * (count - 1) / count,
            "all-reduce": 2 * size * (count - 1) / count,
            "all-to-all": size * (count - 1) / count,
            "ragged-all-to-all": size * (count - 1) / count,
        }.get(kind, size)
        # The outputs of an instruction that only starts a collective list the operands before the results.
        results = op.outputs[len(operands) :][: len(operands)] if op.opcode.endswith("-start") else op.outputs
        moved = float(sum(map(_main, operands)) + _main(results))
        channel = op.attribute(r"channel_id=(\d+)") or f"{inside.name}/{op.name}"
        return Cost(exchanges={channel: Exchange(kind, axes_of(groups, self.axes), sent, moved)})

    def _moved(self, inside: Computation, op: Instruction) -> float:
        """Counts the bytes that an instruction outside fusions reads from main memory and writes to it."""
        opcode, operands = op.opcode, inside.operands(op)
        if opcode in _FREE or opcode.endswith("-done") or opcode in ("send", "recv"):
            return 0.0
        if opcode == "custom-call" and op.attribute(_TARGET) in _FREE_TARGETS:
            return 0.0
        if opcode == "copy-start":  # (destination, source, context)
            return float(_main(op.outputs[:1]) + sum(map(_main, operands)))
        if opcode == "slice-start":  # (source, destination, context)
            return float(_main(op.outputs[1:2]) + (_bytes(op.outputs[1:2]) if _main(operands[0]) else 0))
        if opcode == "fusion":
            called = self.module.computations[op.called["calls"]]
            read = sum(
                min(_main(shape), self._read(called, called.parameters[number].name))
                for number, shape in enumerate(operands)
                if _main(shape) and number in called.parameters
            )
            return read + self._written(called, called.root, op.outputs)
        if opcode in _SLICES:
            return float(_main(op.outputs) + (_bytes(op.outputs) if _main(operands[0]) else 0))
        if opcode == "dynamic-update-slice":
            return float(_main(operands[1]) + (_bytes(operands[1]) if _main(op.outputs) else 0))
        return float(_main(op.outputs) + sum(map(_main, operands)))

    def _read(self, inside: Computation, name: str) -> float:
        """Counts the bytes read of a value inside a fusion: all, unless it is only sliced or updated in place."""
        all_bytes, read = float(_bytes(inside.instructions[name].outputs)), 0.0
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
                continue  # a collective is counted by itself, and a tuple only hands the value on
            elif user.opcode != "dynamic-update-slice" or not first_only:
                return all_bytes
        return min(read, all_bytes)

    def _written(self, inside: Computation, root: Instruction, outputs: Sequence[Array]) -> float:
        """Counts the bytes that a fusion writes: of an array that is updated in place, only the update."""
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
    """Yields the values of those instructions that are integer constants."""
    for op in instructions:
        if op.opcode == "constant" and op.outputs[0].dtype in ("s32", "u32", "s64") and not op.outputs[0].dims:
            yield int(op.operand_text)


def _bytes(shape: Iterable[Array]) -> int:
    """Returns the bytes of a shape's arrays."""
    return sum(array.bytes for array in shape)


def _main(shape: Iterable[Array]) -> int:
    """Returns the bytes of those of a shape's arrays that are in main memory."""
    return sum(array.bytes for array in shape if array.space == 0)


def _operation(op: Instruction) -> str:
    """Returns an instruction's name in the JAX program: `jit(step)/decode/while`."""
    return op.attribute(r'op_name="([^"]*)"') or op.name


def _estimate(op: Instruction) -> dict[str, float]:
    """Returns the cost that a Pallas kernel declares."""
    declared = op.attribute(r'"cost_estimate":(\{[^{}]*\})')
    return json.loads(declared) if declared else {}


def _is_scattered(inside: Computation, op: Instruction) -> bool:
    """Returns whether each device uses only a slice of the reduced array. TPUs write a reduce-scatter like that."""
    users = inside.users[op.name]
    sliced = (
        user.opcode == "dynamic-slice" or (user.opcode == "bitcast" and _is_scattered(inside, user)) for user in users
    )
    return bool(users) and all(sliced)


def dot_flops(op: Instruction, operands: Sequence[Sequence[Array]]) -> float:
    """Counts the FLOPs of a matrix product."""
    contracted = math.prod(operands[0][0].dims[axis] for axis in op.dims("lhs_contracting_dims"))
    return 2.0 * op.outputs[0].size * contracted


def ragged_dot_flops(op: Instruction, operands: Sequence[Sequence[Array]]) -> float:
    """Counts the FLOPs of a ragged product: a row is multiplied only with its group's matrix.

    The third operand holds the sizes of the groups.
    """
    groups = operands[2][0].dims[-1]
    summed = set(op.dims("lhs_ragged_dims")) & set(op.dims("lhs_contracting_dims"))  # the gradient of the matrices
    return dot_flops(op, operands[:2]) / (groups if summed else 1)


def _passes(op: Instruction, operands: Sequence[Sequence[Array]]) -> int:
    """Returns the number of bfloat16 products that a TPU computes a product with.

    A float32 number is the sum of three bfloat16 numbers. Of the nine products of two such numbers, full precision
    computes the largest six and "high" the largest three. Kernels do not declare their precision; ours use full
    precision (`lm.products`).
    """
    wide = sum(array.dtype == "f32" for operand in operands for array in operand)
    precision = "highest" if op.opcode == "custom-call" else op.attribute(r"operand_precision=\{(\w+)")
    return {"highest": (1, 3, 6), "high": (1, 2, 3)}.get(precision or "", (1, 1, 1))[min(wide, 2)]


def convolution_flops(op: Instruction, operands: Sequence[Sequence[Array]]) -> float:
    """Counts 2 · batch · features out · features in · the window's products with elements that are not padding.

    TPUs write matrix products as convolutions. The batch of a batched product becomes a dimension of the window, almost
    all of whose elements meet padding.
    """
    image, kernel, out = (array.dims for array in (operands[0][0], operands[1][0], op.outputs[0]))
    labels = op.attribute(r"dim_labels=(\w+_\w+->\w+)")
    image_labels, kernel_labels, out_labels = re.split(r"_|->", labels or "")
    window = _window(op.attribute(r"window=\{([^}]*)\}") or "")
    products = kernel[kernel_labels.index("i")] * out[out_labels.index("f")] * out[out_labels.index("b")]
    for number in range(len(out_labels) - 2):
        size = image[image_labels.index(str(number))]
        products *= _valid(size, out[out_labels.index(str(number))], *(values[number] for values in window))
    return 2.0 * products


def _window(text: str) -> list[list[int] | _Default]:
    """Parses a window into sizes, strides, padding before, and dilations of image and kernel, by dimension."""
    fields = dict(part.split("=") for part in text.split())
    pads = [part.split("_")[0] for part in fields["pad"].split("x")] if "pad" in fields else None
    read = lambda name: [int(x) for x in fields[name].split("x")] if name in fields else _Default(1)  # noqa: E731
    padding = [int(pad) for pad in pads] if pads else _Default(0)
    return [read("size"), read("stride"), padding, read("lhs_dilate"), read("rhs_dilate")]


class _Default:
    """A list of any length whose entries are all one value."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __getitem__(self, _: int) -> int:
        return self._value


def _valid(image: int, out: int, size: int, stride: int, before: int, spread: int, kernel_spread: int) -> int:
    """Counts the pairs (position of the output, position in the window) that meet an element of the image."""
    places = np.arange(out)[:, None] * stride + np.arange(size)[None] * kernel_spread - before
    return int(((places >= 0) & (places <= (image - 1) * spread) & (places % spread == 0)).sum())


def _groups(op: Instruction, devices: int) -> list[list[int]]:
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
            (int(before or 1), int(length or size), at)
            for at, (name, before, length) in enumerate(parts)
            if name == axis
        )
        covered = 1
        for before, length, at in cuts:
            dims += [before // covered] if before > covered else []
            named_dimensions.append((at, len(dims)))
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
