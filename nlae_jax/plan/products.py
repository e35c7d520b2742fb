"""Counts the FLOPs of matrix products in a compiled module: dots, ragged dots, and convolutions in the place of dots.

All functions are pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from nlae_jax.plan.hlo import Array, Instruction


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


def passes(op: Instruction, operands: Sequence[Sequence[Array]]) -> int:
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
