"""Tensors in safetensors files: where each lies, reading parts of them straight into sharded arrays, and writing.

The library finds out whether a file is whole, but reads all of a tensor for any slice of it. So values are read
here, with positioned reads: the pages of a memory map would count as this process's memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from nlae_jax.runtime.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_DTYPES = DTYPES | {"U8": np.dtype(np.uint8)}  # bytes are parts of `Mxfp4Tensor` only
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in _DTYPES.items()}
_FILE_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
# By dtype, the unsigned integer of its size and the bits of the exponent, which are all set in NaN and infinity alone.
_EXPONENTS = {
    DTYPES["F32"]: (np.uint32, np.uint32(0x7F80_0000)),
    DTYPES["BF16"]: (np.uint16, np.uint16(0x7F80)),
    DTYPES["F16"]: (np.uint16, np.uint16(0x7C00)),
}

# Values pass through memory in pieces of about this size: what a core keeps close while it transposes and casts.
_PIECE_BYTES = 1 << 20
# Rows that a piece has in any case: a transposed matrix is written in runs of as many values.
_PIECE_ROWS = 32

Span = tuple[int, int]
# A rectangle of an array: from where to where along each axis.
Box = tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, row-major from the byte `offset`; `dtype` as the file names it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def entry(self, number: int) -> StoredTensor:
        """That entry of the leading axis, as a tensor of its own."""
        size = math.prod(self.shape[1:]) * _ITEM_BYTES[self.dtype]
        return dataclasses.replace(self, shape=self.shape[1:], offset=self.offset + number * size)

    @property
    def paths(self) -> set[Path]:
        """The files that hold it."""
        return {self.path}


@dataclasses.dataclass(frozen=True)
class Mxfp4Tensor:
    """A tensor [..., out, in] of 4-bit floats that share an exponent by 32 (OCP Microscaling Formats, 2023).

    `blocks` [..., out, in / 32, 16] hold two numbers a byte, the first in its lower half, and `scales` [..., out,
    in / 32] the exponents plus 127.
    """

    blocks: StoredTensor
    scales: StoredTensor

    dtype = "F32"  # that its values are given in

    @property
    def path(self) -> Path:
        return self.blocks.path

    @property
    def name(self) -> str:
        return self.blocks.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.blocks.shape[:-2], math.prod(self.blocks.shape[-2:]) * 2)

    @property
    def paths(self) -> set[Path]:
        return {self.blocks.path, self.scales.path}

    def entry(self, number: int) -> Mxfp4Tensor:
        return Mxfp4Tensor(self.blocks.entry(number), self.scales.entry(number))


# The 16 numbers of four bits: a sign, two bits of exponent, one of mantissa.
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])


@dataclasses.dataclass(frozen=True)
class Spread:
    """Where outputs of one matrix stand among those of several that are stored as one.

    By `size` of its own in every `period`, from `offset` on: output j is number j // size · period + offset + j % size.
    """

    size: int
    period: int
    offset: int

    def spans(self, first: int, end: int) -> Iterator[tuple[Span, Span, int]]:
        """Runs of our outputs from `first` to `end`, where they are stored, and by which step there."""
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
        """Where our first `count` outputs are stored."""
        outputs = np.arange(count)
        return outputs // self.size * self.period + self.offset + outputs % self.size


@dataclasses.dataclass(frozen=True)
class Source:
    """A stored tensor and its place in an array: what is at `index` of its leading axes, transposed or not.

    `spread`: the tensor holds outputs of others too.
    """

    tensor: StoredTensor | Mxfp4Tensor
    index: tuple[int, ...]
    transposed: bool
    spread: Spread | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """A rectangle of a stored matrix and where it goes: `target` [rows, cols], of any strides, casts to its dtype.

    A vector is a matrix of one row. `steps`: of rows and of columns, from each that is read to the next.
    """

    rows: Span
    cols: Span
    target: np.ndarray
    steps: tuple[int, int] = (1, 1)


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """One tensor of a file being written; `read` makes its values only when their turn comes."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def numpy_dtype(name: str) -> np.dtype:
    """float32, bfloat16 or float16 as a numpy dtype. Raises UserError for any other name."""
    if name not in _FILE_NAMES:
        raise UserError(f"dtype {name!r} is not supported; {', '.join(_FILE_NAMES)} are")
    return DTYPES[_FILE_NAMES[name]]


def stored_tensors(path: Path) -> list[StoredTensor]:
    """What a safetensors file holds, from its header alone. Raises UserError where it is damaged or cut short."""
    try:
        with safe_open(path, framework="np", backend="pread"):  # whether offsets, shapes and the file's size agree
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    header.pop("__metadata__", None)
    return [
        StoredTensor(path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    ]


def is_finite(values: np.ndarray) -> bool:
    """Whether an array of one of `DTYPES` holds neither NaN nor infinity."""
    # By the bits: `np.isfinite` takes thirteen times as long in bfloat16.
    kind, exponent = _EXPONENTS[values.dtype]
    return not (values.view(kind) & exponent == exponent).any()


def mxfp4(blocks: StoredTensor, scales: StoredTensor) -> Mxfp4Tensor:
    """Raises UserError where the two do not fit each other."""
    for tensor in (blocks, scales):
        if tensor.dtype != "U8":
            raise UserError(f"{tensor.path}: the tensor {tensor.name!r} is {tensor.dtype}; it should be U8, MXFP4's")
    if blocks.shape != (*scales.shape, 16):
        raise UserError(
            f"{blocks.path}: the tensor {blocks.name!r} has shape {blocks.shape}; its scales, of shape {scales.shape}, "
            "are one to 16 bytes"
        )
    return Mxfp4Tensor(blocks, scales)


def check_tensor(tensor: StoredTensor | Mxfp4Tensor, shape: tuple[int, ...]) -> None:
    """Raises UserError where the tensor is of another shape, or of a dtype that is not read."""
    if tensor.shape != shape:
        raise UserError(f"{tensor.path}: the tensor {tensor.name!r} has shape {tensor.shape}; it should be {shape}")
    if tensor.dtype not in DTYPES:
        raise UserError(f"{tensor.path}: the tensor {tensor.name!r} is {tensor.dtype}; {', '.join(DTYPES)} can be read")


def read_tensor(path: Path, name: str, shape: tuple[int, ...]) -> jax.Array:
    """One tensor of a file in float32. Raises UserError where the file has none of this name and shape."""
    return read_tensors(path, {name: shape})[name]


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], whole: bool = False) -> dict[str, jax.Array]:
    """Tensors of a file in float32, by name. Raises UserError where the file lacks one or has another shape for it.

    With `whole` also where it holds others.
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
    """Whether rows from … to … of two stored matrices of one shape are equal, as the less precise dtype has them.

    `files` are theirs, opened unbuffered. Raises UserError where one cannot be read.
    """
    width = tensor.shape[-1]
    step = max(_PIECE_ROWS, _PIECE_BYTES // max(width * DTYPES[tensor.dtype].itemsize, 1))
    for first, last in itertools.pairwise((*range(*rows, step), rows[1])):
        read = []
        for one in (tensor, other):
            try:
                read.append(_read_rectangle(files[one.path], one, (first, last), (0, width)))
            except OSError as error:
                raise UserError(f"{one.path}: the tensor {one.name!r} cannot be read ({error})") from None
        with np.errstate(over="ignore", invalid="ignore"):
            mine, theirs = read
            if not ((mine == theirs.astype(mine.dtype)).all() or (mine.astype(theirs.dtype) == theirs).all()):
                return False
    return True


def write_safetensors(path: Path, tensors: Sequence[TensorToWrite], dtype: str = "float32") -> None:
    """Writes a safetensors file of one dtype, holding one tensor in memory at a time, and renames it into place.

    The library's own writer needs all tensors at once. Format: the header's length as 8 little-endian
    bytes, the header as JSON padded with spaces to 8 bytes, then the values without gaps.
    """
    target = numpy_dtype(dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + math.prod(tensor.shape) * target.itemsize
        header[tensor.name] = {
            "dtype": _FILE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for tensor in tensors:
                values = tensor.read()
                if values.shape != tensor.shape:
                    raise ValueError(f"{tensor.name}: shape {values.shape}, announced as {tensor.shape}")
                file.write(np.ascontiguousarray(values, dtype=target).reshape(-1).view(np.uint8).data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_array(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding | None,
    sources: Sequence[Source],
    files: dict[Path, FileIO],
) -> jax.Array:
    """An array of this shape and dtype, read from its `sources`; `files` are theirs, opened unbuffered.

    What devices of this process hold is filled on the host once, however many hold the same, and handed over; on a
    CPU without a copy. Without a sharding it is on the default device. Raises UserError, naming the tensor, if a file
    cannot be read or a value is not finite, in the file or in `dtype`.
    """

    def box(index: tuple[slice, ...] | None) -> Box:
        return tuple(
            entry.indices(length)[:2] for entry, length in zip(whole if index is None else index, shape, strict=True)
        )

    whole = (slice(None),) * len(shape)
    indices = [whole] if sharding is None else sharding.addressable_devices_indices_map(shape).values()
    buffers = {held: _aligned_empty([stop - start for start, stop in held], dtype) for held in map(box, indices)}
    for source in sources:
        parts = [part for held, buffer in buffers.items() for part in _parts(source, held, buffer)]
        _read_parts(files, source.tensor, parts)
    if sharding is None:
        array = jax.device_put(buffers[box(whole)])
    else:
        array = jax.make_array_from_callback(shape, sharding, lambda index: buffers[box(index)], dtype)
    # Else the host's copies of several arrays wait for an accelerator at the same time.
    return array.block_until_ready()


def _parts(source: Source, held: Box, buffer: np.ndarray) -> Iterator[Part]:
    """What `buffer`, the rectangle `held` of our array, needs of one HF tensor: nothing if it lacks that entry."""
    for place in source.index:
        (first, end), held = held[0], held[1:]
        if not first <= place < end:
            return
        buffer = buffer[place - first]
    rows, cols = held if len(held) == 2 else ((0, 1), *held)
    matrix = buffer if buffer.ndim == 2 else buffer[None]
    spans = [(cols, cols, 1)] if source.spread is None else source.spread.spans(*cols)
    for ours, theirs, step in spans:
        part = matrix[:, ours[0] - cols[0] : ours[1] - cols[0]]
        if source.transposed:
            yield Part(theirs, rows, part.T, (step, 1))
        else:
            yield Part(rows, theirs, part, (1, step))


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """As `np.empty`, at an address that JAX on a CPU takes over as a device's memory, without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _read_parts(files: Mapping[Path, FileIO], tensor: StoredTensor | Mxfp4Tensor, parts: Sequence[Part]) -> None:
    """Fills the targets of all parts. Bytes that none of them needs are not read, and the others once.

    `files` are the tensor's, opened unbuffered; `tensor.dtype` is one of `DTYPES`. Parts have the same rows or none in
    common, and so with columns, as the shards of an array have. Raises UserError where the file cannot be read.
    """
    try:
        for run in _runs(parts):
            _read_run(files, tensor, run)
    except OSError as error:
        raise UserError(f"{tensor.path}: the tensor {tensor.name!r} cannot be read ({error})") from None


def _runs(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts of the same rows whose columns follow each other without a gap: they are read as one."""
    run: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.rows, part.cols)):
        alone = part.steps != (1, 1) or (run and run[-1].steps != (1, 1))
        if run and (alone or part.rows != run[-1].rows or part.cols[0] != run[-1].cols[1]):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _read_run(files: Mapping[Path, FileIO], tensor: StoredTensor | Mxfp4Tensor, run: list[Part]) -> None:
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
    """Values [rows, cols] in the tensor's dtype."""
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
    """Values [rows, cols] in the file's dtype, by one read if rows are whole and by one each if not."""
    dtype, width = _DTYPES[tensor.dtype], tensor.shape[-1] if tensor.shape else 1
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
    while len(buffer):
        count = os.preadv(file.fileno(), [buffer], offset)
        if count == 0:
            raise OSError(f"it ends at byte {offset}")
        buffer, offset = buffer[count:], offset + count
