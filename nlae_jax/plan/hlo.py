"""Reads the text of a compiled XLA module: computations, instructions, their shapes and attributes.

It reads only the parts that counting needs (`cost.py`). XLA describes the format:
https://openxla.org/xla/operation_semantics. All functions are pure.
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cached_property

# Bits of an element, where the type's name does not end in them.
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_PARENTHESIS = re.compile(r"[()]")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape. `space` 0 is main memory; others are on the chip or the host."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """The bytes of all elements."""
        return -(-self.size * bits(self.dtype) // 8)


def bits(dtype: str) -> int:
    """Returns the bits of one element: 16 of bf16, 8 of f8e4m3fn, 0 of token."""
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
    return int(match.group(1)) if match else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    opcode: str
    outputs: tuple[Array, ...]  # the arrays of its flattened shape
    operands: tuple[str, ...]  # names
    operand_text: str  # the text of the operands
    attributes: str  # the text after them
    root: bool  # whether it is the computation's result

    @cached_property
    def called(self) -> dict[str, str]:
        """The called computations by their role: calls, body, condition, to_apply, ..."""
        return dict(_CALLED.findall(self.attributes))

    @cached_property
    def branches(self) -> list[str]:
        """The computations of a conditional's branches."""
        if match := _BRANCHES.search(self.attributes):
            return [name.strip().lstrip("%") for name in match.group(1).split(",")]
        return [self.called[name] for name in ("true_computation", "false_computation") if name in self.called]

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of a regular expression in the attributes, or None."""
        match = re.search(pattern, self.attributes)
        return match.group(1) if match else None

    def dims(self, name: str) -> tuple[int, ...]:
        """Parses an attribute such as `name={1,2}` into (1, 2); () where it is missing."""
        numbers = self.attribute(rf"\b{name}=\{{([\d,]*)\}}")
        return tuple(int(number) for number in numbers.split(",")) if numbers else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation: its instructions by name, in order. Operands come before their users."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose value is the computation's result."""
        return next(instruction for instruction in reversed(self.instructions.values()) if instruction.root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Number -> parameter."""
        return {int(op.operand_text): op for op in self.instructions.values() if op.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> the instructions that have it as an operand."""
        by_operand: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                by_operand.setdefault(operand, []).append(instruction)
        return by_operand

    def operands(self, instruction: Instruction) -> list[tuple[Array, ...]]:
        """Returns the shapes of an instruction's operands."""
        return [self.instructions[name].outputs for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A module: its computations by name, and the name of the one that is run."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Parses the text of `compiled.as_text()`. Raises ValueError where it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if name and line.startswith("}"):
            computations[name] = Computation(name, instructions)
            name = ""
        elif name and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match.group(2), line[match.end() :], bool(match.group(1)))
            instructions[instruction.name] = instruction
        elif not name and (match := _COMPUTATION.match(line)):
            name, instructions = match.group(2), {}
            entry = name if match.group(1) else entry
    if not entry:
        raise ValueError("no entry computation: not the text of an HLO module")
    return Module(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    """Parses the text after ` = `: shape, opcode, (operands), attributes."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    begin = rest.index("(")
    close = _closing(rest, begin)
    inputs = rest[begin + 1 : close]
    return Instruction(name, rest[:begin], arrays(shape), tuple(_NAME.findall(inputs)), inputs, rest[close + 1 :], root)


def _closing(text: str, begin: int) -> int:
    """Returns the position at which the parenthesis opened at `begin` is closed."""
    depth = 0
    for match in _PARENTHESIS.finditer(text, begin):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def arrays(shape: str) -> tuple[Array, ...]:
    """Parses a shape such as `(f32[2,3]{1,0}, bf16[4]{0:T(256)S(1)})` into its arrays, without nesting."""
    parsed = []
    for dtype, dims, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        space = _SPACE.search(layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        parsed.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(parsed)
