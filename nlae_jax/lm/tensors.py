"""The tensors of safetensors files: where each one lies in its file, what is supported, and how files are written."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import write_atomically

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
STORED_DTYPES = DTYPES | {"U8": np.dtype(np.uint8)}  # bytes occur as parts of `Mxfp4Tensor` only
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in STORED_DTYPES.items()}
_FILE_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
# By dtype: the unsigned integer type of its size, and the bits of its exponent. They are all set in NaN and infinity
# only.
_EXPONENTS = {
    DTYPES["F32"]: (np.uint32, np.uint32(0x7F80_0000)),
    DTYPES["BF16"]: (np.uint16, np.uint16(0x7F80)),
    DTYPES["F16"]: (np.uint16, np.uint16(0x7C00)),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, row-major from byte `offset` on. `dtype` is the file's name for it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def entry(self, number: int) -> StoredTensor:
        """Returns one entry of the leading axis, as a tensor."""
        size = math.prod(self.shape[1:]) * _ITEM_BYTES[self.dtype]
        return dataclasses.replace(self, shape=self.shape[1:], offset=self.offset + number * size)

    @property
    def paths(self) -> set[Path]:
        """The files that hold the tensor."""
        return {self.path}


@dataclasses.dataclass(frozen=True)
class Mxfp4Tensor:
    """A tensor [..., out, in] of 4-bit floats, of which 32 share an exponent (OCP Microscaling Formats, 2023).

    `blocks` [..., out, in / 32, 16] uint8 holds two numbers in each byte, the first in the lower half. `scales`
    [..., out, in / 32] uint8 holds the exponents plus 127.
    """

    blocks: StoredTensor
    scales: StoredTensor

    dtype = "F32"  # of the values that reading gives

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


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """One tensor of a file that is written. `read` is called for its values when the file has come to the tensor."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def numpy_dtype(name: str) -> np.dtype:
    """Returns the numpy dtype called float32, bfloat16 or float16. Raises UserError for any other name."""
    if name not in _FILE_NAMES:
        raise UserError(f"dtype {name!r} is not supported; {', '.join(_FILE_NAMES)} are")
    return DTYPES[_FILE_NAMES[name]]


def stored_tensors(path: Path) -> list[StoredTensor]:
    """Reads the header of a safetensors file. Raises UserError if the file is damaged or cut short."""
    try:
        with safe_open(path, framework="np", backend="pread"):  # checks offsets and shapes against the file's size
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
    """Returns whether an array of one of `DTYPES` holds neither NaN nor infinity."""
    # Looks at the bits, because `np.isfinite` takes thirteen times as long in bfloat16.
    kind, exponent = _EXPONENTS[values.dtype]
    return not (values.view(kind) & exponent == exponent).any()


def mxfp4(blocks: StoredTensor, scales: StoredTensor) -> Mxfp4Tensor:
    """Joins blocks and scales. Raises UserError if their dtypes or shapes are not those of `Mxfp4Tensor`."""
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
    """Raises UserError if the tensor has another shape than `shape`, or a dtype that is not supported."""
    if tensor.shape != shape:
        raise UserError(f"{tensor.path}: the tensor {tensor.name!r} has shape {tensor.shape}; it should be {shape}")
    if tensor.dtype not in DTYPES:
        raise UserError(f"{tensor.path}: the tensor {tensor.name!r} is {tensor.dtype}; {', '.join(DTYPES)} can be read")


def write_safetensors(path: Path, tensors: Sequence[TensorToWrite], dtype: str = "float32") -> None:
    """Writes a safetensors file of one dtype, with one tensor in memory at a time, and renames the file into place.

    The safetensors library's writer needs all tensors at once. The format is: the header's length as 8 little-endian
    bytes, the header as JSON padded with spaces to a multiple of 8 bytes, then the values without gaps.
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

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for tensor in tensors:
                values = tensor.read()
                if values.shape != tensor.shape:
                    raise ValueError(f"{tensor.name}: shape {values.shape}, announced as {tensor.shape}")
                file.write(np.ascontiguousarray(values, dtype=target).reshape(-1).view(np.uint8).data)

    write_atomically(path, write)
