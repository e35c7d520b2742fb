"""Reads the text of a compiled XLA module: computations, instructions, their shapes and attributes. Pure.

Only what counting needs (`cost.py`). The text's form is described with XLA: https://openxla.org/xla/operation_semantics.
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cached_property

# Bits of an element; anything else (token, opaque) takes no memory.
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
    """One array of a shape. `space` 0 is main memory; others are on the chip (or the host's)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return -(-self.size * bits(self.dtype) // 8)


def bits(dtype: str) -> int:
    """Of one element: 16 of bf16, 8 of f8e4m3fn, 0 of token."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
    return int(found.group(1)) if found else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`outputs`: the arrays of its flattened shape; `operands`: names; `given`: their text; `attributes`: the rest."""

    name: str
    opcode: str
    outputs: tuple[Array, ...]
    operands: tuple[str, ...]
    given: str
    attributes: str
    root: bool

    @cached_property
    def called(self) -> dict[str, str]:
        """Computations by the role they have: calls, body, condition, to_apply, ..."""
        return dict(_CALLED.findall(self.attributes))

    @cached_property
    def branches(self) -> list[str]:
        """Of a conditional."""
        if found := _BRANCHES.search(self.attributes):
            return [name.strip().lstrip("%") for name in found.group(1).split(",")]
        return [self.called[name] for name in ("true_computation", "false_computation") if name in self.called]

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression found in the attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    def dims(self, name: str) -> tuple[int, ...]:
        """`name={1,2}` -> (1, 2); () where it is missing."""
        found = self.attribute(rf"\b{name}=\{{([\d,]*)\}}")
        return tuple(int(number) for number in found.split(",")) if found else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """`instructions` by name, in order; operands come before their users."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        return next(one for one in reversed(self.instructions.values()) if one.root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(one.given): one for one in self.instructions.values() if one.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for operand in dict.fromkeys(one.operands):
                found.setdefault(operand, []).append(one)
        return found

    def operands(self, instruction: Instruction) -> list[tuple[Array, ...]]:
        """The shapes of an instruction's operands."""
        return [self.instructions[name].outputs for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """A module from what `compiled.as_text()` gives. Raises ValueError where there is no entry computation."""
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if name and line.startswith("}"):
            computations[name] = Computation(name, instructions)
            name = ""
        elif name and (found := _INSTRUCTION.match(line)):
            one = _instruction(found.group(2), line[found.end() :], bool(found.group(1)))
            instructions[one.name] = one
        elif not name and (found := _COMPUTATION.match(line)):
            name, instructions = found.group(2), {}
            entry = name if found.group(1) else entry
    if not entry:
        raise ValueError("no entry computation: not the text of an HLO module")
    return Module(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    """From what stands after ` = `: shape, opcode, (operands), attributes."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    begin = rest.index("(")
    close = _closing(rest, begin)
    given = rest[begin + 1 : close]
    return Instruction(name, rest[:begin], arrays(shape), tuple(_NAME.findall(given)), given, rest[close + 1 :], root)


def _closing(text: str, begin: int) -> int:
    """Where the parenthesis opened at `begin` is closed."""
    depth = 0
    for found in _PARENTHESIS.finditer(text, begin):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def arrays(shape: str) -> tuple[Array, ...]:
    """`(f32[2,3]{1,0}, bf16[4]{0:T(256)S(1)})` -> its arrays, nesting forgotten."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        space = _SPACE.search(layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        found.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(found)
