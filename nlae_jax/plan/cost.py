"""Counts the work of a compiled module on each device: matrix FLOPs, bytes of main memory, collectives by mesh axis.

It reads the text of the optimised module (`hlo.py`) and multiplies loops by their trip counts. XLA's `cost_analysis`
counts a loop once, does not count collectives, and counts a slice of an array as a read of the whole array. All
functions are pure.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence

from nlae_jax.plan.groups import axes_of, groups_of
from nlae_jax.plan.hlo import Array, Computation, Instruction, Module
from nlae_jax.plan.products import convolution_flops, dot_flops, passes, ragged_dot_flops

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
    themselves. `repeated_flops` is the matrix unit's additional work: it computes a float32 product as several bfloat16
    products. `moved` is the number of bytes read from and written to main memory, without
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
            cost.repeated_flops += cost.flops * (passes(op, inside.operands(op)) - 1)
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
        groups = groups_of(op, math.prod(self.axes.values()))
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
                continue  # a collective is counted elsewhere, and a tuple reads nothing
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
