"""Reads stored tensors straight into sharded arrays: each byte once, and only the bytes that this process needs.

The safetensors library reads a whole tensor for any slice of it. Values are read here with positioned reads instead of
a memory map, whose pages would count as this process's memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from nlae_jax.lm.tensors import (
    DTYPES,
    STORED_DTYPES,
    Mxfp4Tensor,
    StoredTensor,
    check_tensor,
    is_finite,
    stored_tensors,
)
from nlae_jax.runtime.errors import UserError

# Values pass through memory in pieces of about this size, so that they stay in a core's cache while they are transposed
# and cast.
_PIECE_BYTES = 1 << 20
# The fewest rows of a piece. A transposed matrix is written in runs of as many values.
_PIECE_ROWS = 32

# The first index and the one after the last.
Span = tuple[int, int]
# A rectangle of an array: its span along each axis.
Box = tuple[Span, ...]
# The 16 numbers of four bits: one bit of sign, two of exponent, one of mantissa.
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])


@dataclasses.dataclass(frozen=True)
class Spread:
    """Where the outputs of one matrix stand in a stored matrix that joins several.

    Of every `period` stored outputs, `size` from `offset` on are this matrix's. Its output j is the stored output
    j // size · period + offset + j % size.
    """

    size: int
    period: int
    offset: int

    def spans(self, first: int, end: int) -> Iterator[tuple[Span, Span, int]]:
        """Yields the matrix's outputs from `first` to `end` in runs: their span, their stored span, its step."""
        if self.size == 1:
            start = first * self.period + self.offset
            yield (first, end), (start, start + (end - first - 1) * self.period + 1), self.period
            return
        while first < end:
            group, within = divmod(first, self.size)
            stop = min(end, (group + 1) * self.size)
            start = group * self.period + self.offset + within
            yield (first, stop), (start, start + stop - first), 1
            first = stop

    def places(self, count: int) -> np.ndarray:
        """Returns the stored places [count] int64 of the matrix's first `count` outputs."""
        outputs = np.arange(count)
        return outputs // self.size * self.period + self.offset + outputs % self.size


@dataclasses.dataclass(frozen=True)
class Source:
    """A stored tensor that fills the matrix (or vector) at `index` of an array's leading axes.

    `transposed` says whether the stored matrix is the transpose of the array's. `spread` says which of the tensor's
    outputs are the array's, where other arrays have the rest; None means all.
    """

    tensor: StoredTensor | Mxfp4Tensor
    index: tuple[int, ...]
    transposed: bool
    spread: Spread | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """A rectangle of a stored matrix, and the array `target` [rows, cols] that it is copied into and cast for.

    `target` may have any strides. A vector is a matrix of one row. `steps` are those of the rows and of the columns.
    """

    rows: Span
    cols: Span
    target: np.ndarray
    steps: tuple[int, int] = (1, 1)


def read_tensor(path: Path, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Reads one tensor of a file as float32. Raises UserError if the file has no tensor of this name and shape."""
    return read_tensors(path, {name: shape})[name]


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], whole: bool = False) -> dict[str, jax.Array]:
    """Reads the tensors in `shapes` from a file, as float32, by name.

    Raises UserError if the file lacks a tensor or has it in another shape, and with `whole` if it has further tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    stored = {tensor.name: tensor for tensor in stored_tensors(path)}
    if whole and (others := sorted(stored.keys() - shapes.keys())):
        raise UserError(f"{path}: unexpected tensor {others[0]!r}")
    for name, shape in shapes.items():
        if name not in stored:
            raise UserError(f"{path}: lacks the tensor {name!r}")
        check_tensor(stored[name], shape)
    with path.open("rb", buffering=0) as file:
        return {
            name: load_array(shape, DTYPES["F32"], None, [Source(stored[name], (), False)], {path: file})
            for name, shape in shapes.items()
        }


def same_values(tensor: StoredTensor, other: StoredTensor, rows: Span, files: dict[Path, FileIO]) -> bool:
    """Returns whether a span of rows is equal in two stored matrices of the same shape.

    Where their dtypes differ, values are compared in the less precise one. `files` maps the tensors' paths to their
    files, opened unbuffered. Raises UserError if a file cannot be read.
    """
    width = tensor.shape[-1]
    step = max(_PIECE_ROWS, _PIECE_BYTES // max(width * DTYPES[tensor.dtype].itemsize, 1))
    for first, last in itertools.pairwise((*range(*rows, step), rows[1])):
        pieces = []
        for stored in (tensor, other):
            try:
                pieces.append(_read_rectangle(files[stored.path], stored, (first, last), (0, width)))
            except OSError as error:
                raise UserError(f"{stored.path}: the tensor {stored.name!r} cannot be read ({error})") from None
        with np.errstate(over="ignore", invalid="ignore"):
            left, right = pieces
            if not ((left == right.astype(left.dtype)).all() or (left.astype(right.dtype) == right).all()):
                return False
    return True


def load_array(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding | None,
    sources: Sequence[Source],
    files: dict[Path, FileIO],
) -> jax.Array:
    """Reads an array of this shape and dtype from its `sources`.

    `files` maps the sources' paths to their files, opened unbuffered. Each part that devices of this process hold is
    filled on the host once, however many devices hold it, and handed over; on a CPU without a copy. Without a sharding
    the array is on the default device. Raises UserError, naming the tensor, if a file cannot be read, or if a value is
    not finite in the file or in `dtype`.
    """

    def box(index: tuple[slice, ...] | None) -> Box:
        return tuple(
            entry.indices(length)[:2] for entry, length in zip(whole if index is None else index, shape, strict=True)
        )

    whole = (slice(None),) * len(shape)
    indices = [whole] if sharding is None else sharding.addressable_devices_indices_map(shape).values()
    buffers = {piece: _aligned_empty([stop - start for start, stop in piece], dtype) for piece in map(box, indices)}
    for source in sources:
        parts = [part for piece, buffer in buffers.items() for part in _parts(source, piece, buffer)]
        _read_parts(files, source.tensor, parts)
    if sharding is None:
        array = jax.device_put(buffers[box(whole)])
    else:
        array = jax.make_array_from_callback(shape, sharding, lambda index: buffers[box(index)], dtype)
    # Waits for the transfer, so that the host holds the copy of one array at a time.
    return array.block_until_ready()


def _parts(source: Source, box: Box, buffer: np.ndarray) -> Iterator[Part]:
    """Yields the parts of a source's tensor that fill `buffer`, which holds the rectangle `box` of the array.

    There are none if the rectangle does not contain the source's index.
    """
    for place in source.index:
        (first, end), box = box[0], box[1:]
        if not first <= place < end:
            return
        buffer = buffer[place - first]
    rows, cols = box if len(box) == 2 else ((0, 1), *box)
    matrix = buffer if buffer.ndim == 2 else buffer[None]
    spans = [(cols, cols, 1)] if source.spread is None else source.spread.spans(*cols)
    for array_span, stored_span, step in spans:
        target = matrix[:, array_span[0] - cols[0] : array_span[1] - cols[0]]
        if source.transposed:
            yield Part(stored_span, rows, target.T, (step, 1))
        else:
            yield Part(rows, stored_span, target, (1, step))


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Does what `np.empty` does, at an address that JAX on a CPU can use as a device's memory without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _read_parts(files: Mapping[Path, FileIO], tensor: StoredTensor | Mxfp4Tensor, parts: Sequence[Part]) -> None:
    """Fills the targets of all parts. Bytes that a part needs are read once, and other bytes not at all.

    `files` maps the tensor's paths to its files, opened unbuffered; `tensor.dtype` is one of `DTYPES`. Two parts have
    the same rows or none in common, and the same holds for columns, as for the shards of an array. Raises UserError if
    the file cannot be read.
    """
    try:
        for run in _runs(parts):
            _read_run(files, tensor, run)
    except OSError as error:
        raise UserError(f"{tensor.path}: the tensor {tensor.name!r} cannot be read ({error})") from None


def _runs(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Joins parts of the same rows whose columns follow each other without a gap. A run is read at once."""
    run: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.rows, part.cols)):
        has_steps = part.steps != (1, 1) or (run and run[-1].steps != (1, 1))
        if run and (has_steps or part.rows != run[-1].rows or part.cols[0] != run[-1].cols[1]):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _read_run(files: Mapping[Path, FileIO], tensor: StoredTensor | Mxfp4Tensor, run: list[Part]) -> None:
    """Reads one run in pieces and fills the targets of its parts. Raises UserError for values that are not finite."""
    (start, stop), cols = run[0].rows, (run[0].cols[0], run[-1].cols[1])
    row_step, col_step = run[0].steps
    row_bytes = (cols[1] - cols[0]) * DTYPES[tensor.dtype].itemsize
    step = max(_PIECE_ROWS, _PIECE_BYTES // max(row_bytes, 1))
    step = -(-step // row_step) * row_step
    for first, last in itertools.pairwise((*range(start, stop, step), stop)):
        values = _read_values(files, tensor, (first, last), cols)
        for part in run:
            stored = values[::row_step, part.cols[0] - cols[0] : part.cols[1] - cols[0] : col_step]
            # Cast first: a cast that also transposes takes values one by one.
            with np.errstate(over="ignore"):
                piece = stored.astype(part.target.dtype, copy=False)
            if not is_finite(piece):
                problem = f"numbers too large for {piece.dtype}" if is_finite(stored) else "NaN or infinity"
                raise UserError(f"{tensor.path}: the tensor {tensor.name!r} holds {problem}")
            begin = (first - start) // row_step
            part.target[begin : begin + len(piece)] = piece


def _read_values(
    files: Mapping[Path, FileIO], tensor: StoredTensor | Mxfp4Tensor, rows: Span, cols: Span
) -> np.ndarray:
    """Reads a rectangle [rows, cols] of a tensor, in the tensor's dtype. 4-bit floats become float32."""
    if isinstance(tensor, StoredTensor):
        return _read_rectangle(files[tensor.path], tensor, rows, cols)
    blocks, scales = tensor.blocks, tensor.scales
    flat = dataclasses.replace(blocks, shape=(blocks.shape[0], math.prod(blocks.shape[1:])))
    packed = _read_rectangle(files[blocks.path], flat, rows, (0, flat.shape[1]))
    exponents = _read_rectangle(files[scales.path], scales, rows, (0, scales.shape[1])).astype(np.int32) - 127
    values = np.stack([_FP4[packed & 15], _FP4[packed >> 4]], axis=-1).reshape(len(packed), -1, 32)
    with np.errstate(over="ignore"):
        return np.ldexp(values, exponents[..., None]).reshape(len(packed), -1)[:, cols[0] : cols[1]]


def _read_rectangle(file: FileIO, tensor: StoredTensor, rows: Span, cols: Span) -> np.ndarray:
    """Reads a rectangle [rows, cols] in the file's dtype: whole rows by one read, parts of rows by one read each."""
    dtype, width = STORED_DTYPES[tensor.dtype], tensor.shape[-1] if tensor.shape else 1
    values = np.empty((rows[1] - rows[0], cols[1] - cols[0]), dtype)
    begin = tensor.offset + (rows[0] * width + cols[0]) * dtype.itemsize
    buffers: Any = values.view(np.uint8)
    if cols == (0, width):
        _read_exactly(file, begin, memoryview(buffers.reshape(-1)))
    else:
        for row, buffer in enumerate(buffers):
            _read_exactly(file, begin + row * width * dtype.itemsize, memoryview(buffer))
    return values


def _read_exactly(file: FileIO, offset: int, buffer: memoryview) -> None:
    """Fills the buffer from byte `offset` of the file on. Raises OSError if the file ends before."""
    while len(buffer):
        count = os.preadv(file.fileno(), [buffer], offset)
        if count == 0:
            raise OSError(f"it ends at byte {offset}")
        buffer, offset = buffer[count:], offset + count
