"""Reads files of vectors: activations to explain, and directions from other tools (probes, rows of dictionaries)."""

from __future__ import annotations

import dataclasses
import math
import re
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

from nlae_jax.data.parquet import check_batch, opened
from nlae_jax.interop import datasets
from nlae_jax.interop.datasets import LAYER, VECTOR, check_layers
from nlae_jax.roles.direction import UNUSABLE, unusable_rows
from nlae_jax.runtime.errors import UserError, first_line
from nlae_jax.runtime.files import local_path, open_regular
from nlae_jax.runtime.outside import quoted

# Common names of a dictionary's decoder rows [features, d]: those of SAELens and Gemma Scope first.
_DECODERS = ("W_dec", "decoder.weight", "w_dec", "dictionary")
# Of an array in a .npz file, unpacked, because a small file may hold terabytes: a million rows of 2,048 numbers.
_MOST_BYTES = 8 << 30
_SPEC = re.compile(r"(?P<path>.+?)(?:(?<!^[A-Za-z]):(?P<key>[^:\[\]/\\]+))?(?:\[(?P<row>-?\d{1,15})\])?")


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """A direction from a file: its `name`, and its `vector` [d] float32, not scaled."""

    name: str
    vector: np.ndarray


def read_vectors(path: Path, width: int, layer: int | None = None) -> np.ndarray:
    """Reads activations [N, width] float32 from a .npy file, or from the column activation_vector of a .parquet file.

    Raises UserError for another width, for NaN or infinity, and if the file names another block than `layer`.
    """
    array = _parquet(path, width, layer) if path.suffix.lower() == ".parquet" else _npy(path)
    return _checked(array if array.ndim > 1 else array[None], width, str(path))


def _parquet(path: Path, width: int, layer: int | None) -> np.ndarray:
    """Reads the vectors [N, width] of a .parquet file."""
    parts, start = [np.zeros((0, width), np.float32)], 0
    with opened(path) as file:
        names = file.schema_arrow.names
        if VECTOR not in names:
            raise UserError(f"{path}: should be a parquet file with a column {VECTOR}")
        for batch in file.iter_batches(1024, columns=[name for name in (VECTOR, LAYER) if name in names]):
            check_batch(path, start, batch)
            if layer is not None:
                check_layers(path, start, batch, layer, "the pair's block")
            parts.append(datasets.read_vectors(path, start, batch.column(VECTOR), width))
            start += len(batch)
    return np.concatenate(parts)


def read_direction(spec: str, width: int) -> Direction:
    """Reads a direction of `width` numbers from `FILE.npy`, `FILE.npz:KEY` or `FILE.safetensors:KEY`, perhaps `[ROW]`.

    Without a KEY, the array is a dictionary's decoder under a usual name (W_dec in SAELens and Gemma Scope), or the
    only array of that width. A matrix needs a ROW. If only the first axis of the matrix has length `width`, ROW counts
    its columns. Raises UserError that names the file and says what would be right.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise UserError(f"{quoted(spec)}: should be FILE, FILE:KEY or FILE:KEY[ROW]")
    path, key, row = local_path(match["path"], "direction"), match["key"], match["row"]
    if not path.is_file():
        raise UserError(f"{path}: no such file; a direction is FILE.npy or FILE.safetensors:KEY[ROW]")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        if key is not None:
            raise UserError(f"{path}: a .npy file has one array and no key {quoted(key)}")
        array, label = _npy(path), path.name
    elif suffix in (".npz", ".safetensors"):
        key, array = _keyed(path, key, width)
        label = f"{path.name}:{key}"
    else:
        raise UserError(f"{path}: should be a .npy, .npz or .safetensors file")
    if array.ndim == 2 and array.shape[1] != width and array.shape[0] == width:
        array = array.T
    if array.ndim == 2 and len(array) == 1 and row is None:
        array = array[0]
    if array.ndim == 2:
        if row is None:
            raise UserError(f"{label}: {array.shape[0]} rows; say which one, as in {spec}[0]")
        number = int(row)
        if not -len(array) <= number < len(array):
            raise UserError(f"{label}: row {number} out of range (0..{len(array) - 1})")
        array, label = array[number], f"{label}[{number}]"
    elif row is not None:
        raise UserError(f"{label}: one direction; there is no row {row} of it")
    vector = _checked(array[None] if array.ndim == 1 else array, width, label)[0]
    if not vector.any():
        raise UserError(f"{label}: zero in every component; a direction is not")
    return Direction(label, vector)


def _keyed(path: Path, key: str | None, width: int) -> tuple[str, np.ndarray]:
    """Reads one array of a file with several, by its key or its usual names. The others are not read."""
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                headers = {name: _header(file.zip, name) for name in file.files}
                shapes = {name: shape for name, (shape, _) in headers.items()}
                key = key if key is not None else _default_key(shapes, width, path)
                _check_key(key, shapes, path)
                if headers[key][1] > _MOST_BYTES:
                    raise UserError(
                        f"{path}: {quoted(key)} is larger than {_MOST_BYTES:,} bytes, the most that is unpacked; save "
                        "it as a .safetensors file"
                    )
                return key, file[key]
        with safe_open(path, "np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            key = key if key is not None else _default_key(shapes, width, path)
            _check_key(key, shapes, path)
            return key, file.get_tensor(key)
    except UserError:
        raise
    except Exception as error:  # a damaged file makes numpy, zipfile and safetensors raise errors of every kind
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], int]:
    """Reads (shape, bytes) of an array of a .npz file from its header only: unpacked, it may not fit into memory."""
    member = name if name in archive.namelist() else f"{name}.npy"
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        return shape, math.prod(shape) * dtype.itemsize


def _check_key(key: str, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raises UserError where the file has no array of that key."""
    if key not in shapes:
        raise UserError(f"{path}: no key {quoted(key)}; it has {', '.join(sorted(shapes)[:12])}")


def _default_key(shapes: dict[str, tuple[int, ...]], width: int, path: Path) -> str:
    """Returns the key of a dictionary's decoder, or of the only array of that width. Raises UserError without one."""
    for name in _DECODERS:
        if name in shapes:
            return name
    fitting = [name for name, shape in shapes.items() if width in shape[-2:]]
    if len(fitting) != 1:
        raise UserError(f"{path}: say which array, as FILE:KEY[ROW]; it has {', '.join(sorted(shapes)[:12])}")
    return fitting[0]


def _npy(path: Path) -> np.ndarray:
    """Reads the array of a .npy file. Raises UserError that names the file where it is something else."""
    try:
        with open_regular(path) as file:
            array = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except Exception as error:  # a damaged header makes numpy raise errors of every kind
        raise UserError(f"{path}: should be an array that numpy saved ({first_line(error)})") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: several arrays; name one, as FILE.npz:KEY")
    return array


def _checked(array: np.ndarray, width: int, name: str) -> np.ndarray:
    """Returns an array [N, width] as float32. Raises UserError for other shapes and types, and for unusable rows."""
    if array.dtype.kind not in "fiu" and array.dtype != ml_dtypes.bfloat16:
        raise UserError(f"{name}: should hold numbers; it holds {array.dtype}")
    if array.ndim != 2 or array.shape[1] != width or not len(array):
        raise UserError(
            f"{name}: shape {tuple(array.shape)} should be [number, {width}]: the pair reads {width} numbers"
        )
    with np.errstate(over="ignore"):
        vectors = array.astype(np.float32)
    if (rows := unusable_rows(vectors)).size:
        raise UserError(f"{name}: row {rows[0]}: {UNUSABLE}")
    return vectors
