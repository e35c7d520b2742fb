"""Files of vectors: activations to explain, and directions that others found (probes, dictionaries' rows)."""

from __future__ import annotations

import dataclasses
import re
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from nlae_jax.data.parquet import check_batch, opened
from nlae_jax.interop import datasets
from nlae_jax.interop.datasets import LAYER, VECTOR, check_layers
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import local_path, open_regular
from nlae_jax.runtime.outside import quoted

# What reading a damaged array raises, and a header that asks for more memory than there is.
_BROKEN = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError, OverflowError)

# Names that dictionaries' decoder rows [features, d] go by: SAELens and Gemma Scope, then others.
_DECODERS = ("W_dec", "decoder.weight", "w_dec", "dictionary")
_SPEC = re.compile(r"(?P<path>.+?)(?:(?<!^[A-Za-z]):(?P<key>[^:\[\]/\\]+))?(?:\[(?P<row>-?\d+)\])?")


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """`vector` [d] float32 as the file has it; `name` says which one it is."""

    name: str
    vector: np.ndarray


def read_vectors(path: Path, width: int, layer: int | None = None) -> np.ndarray:
    """Activations [N, width] float32 of a .npy file, or of the column activation_vector of a .parquet file.

    They should be of block `layer`, where one is given and the file says of which they are.
    """
    found = _parquet(path, width, layer) if path.suffix.lower() == ".parquet" else _npy(path)
    return _checked(found if found.ndim > 1 else found[None], width, str(path))


def _parquet(path: Path, width: int, layer: int | None) -> np.ndarray:
    found, start = [np.zeros((0, width), np.float32)], 0
    with opened(path) as file:
        names = file.schema_arrow.names
        if VECTOR not in names:
            raise UserError(f"{path}: should be a parquet file with a column {VECTOR}")
        for batch in file.iter_batches(1024, columns=[name for name in (VECTOR, LAYER) if name in names]):
            check_batch(path, start, batch)
            if layer is not None:
                check_layers(path, start, batch, layer, "the pair's block")
            found.append(datasets.read_vectors(path, start, batch.column(VECTOR), width))
            start += len(batch)
    return np.concatenate(found)


def read_direction(spec: str, width: int) -> Direction:
    """`FILE.npy`, `FILE.npz:KEY`, `FILE.safetensors:KEY`, each perhaps with `[ROW]`, as a direction of `width` numbers.

    Without a KEY it is the only array of that width, or a dictionary's decoder by its usual names (W_dec as SAELens and
    Gemma Scope have it). A matrix needs a ROW; one with its features as columns [d, features] is taken so where only
    its first side is `width`. Raises UserError naming the file and what would be right.
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
        found, label = _npy(path), path.name
    elif suffix in (".npz", ".safetensors"):
        key, found = _keyed(path, key, width)
        label = f"{path.name}:{key}"
    else:
        raise UserError(f"{path}: should be a .npy, .npz or .safetensors file")
    if found.ndim == 2 and found.shape[1] != width and found.shape[0] == width:
        found = found.T
    if found.ndim == 2 and len(found) == 1 and row is None:
        found = found[0]
    if found.ndim == 2:
        if row is None:
            raise UserError(f"{label}: {found.shape[0]} rows; say which one, as in {spec}[0]")
        number = int(row)
        if not -len(found) <= number < len(found):
            raise UserError(f"{label}: row {number} out of range (0..{len(found) - 1})")
        found, label = found[number], f"{label}[{number}]"
    elif row is not None:
        raise UserError(f"{label}: one direction; there is no row {row} of it")
    vector = _checked(found[None] if found.ndim == 1 else found, width, label)[0]
    if not np.linalg.norm(vector) > 0:
        raise UserError(f"{label}: zero in every component; a direction is not")
    return Direction(label, vector)


def _keyed(path: Path, key: str | None, width: int) -> tuple[str, np.ndarray]:
    """An array of a file that has several, by its key or by what it is. The others are not read."""
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                shapes = {name: _shape(file.zip, name) for name in file.files}
                key = key if key is not None else _chosen(shapes, width, path)
                _check_key(key, shapes, path)
                return key, file[key]
        with safe_open(path, "np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            key = key if key is not None else _chosen(shapes, width, path)
            _check_key(key, shapes, path)
            return key, file.get_tensor(key)
    except (*_BROKEN, SafetensorError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """Of an array of a .npz file, from its header alone: unpacked, it may be larger than the memory."""
    member = name if name in archive.namelist() else f"{name}.npy"
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(stream)[0]


def _check_key(key: str, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    if key not in shapes:
        raise UserError(f"{path}: no key {quoted(key)}; it has {', '.join(sorted(shapes)[:12])}")


def _chosen(shapes: dict[str, tuple[int, ...]], width: int, path: Path) -> str:
    for name in _DECODERS:
        if name in shapes:
            return name
    fitting = [name for name, shape in shapes.items() if width in shape[-2:]]
    if len(fitting) != 1:
        raise UserError(f"{path}: say which array, as FILE:KEY[ROW]; it has {', '.join(sorted(shapes)[:12])}")
    return fitting[0]


def _npy(path: Path) -> np.ndarray:
    try:
        with open_regular(path) as file:
            found = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except _BROKEN as error:
        raise UserError(f"{path}: should be an array that numpy saved ({error})") from None
    if not isinstance(found, np.ndarray):
        raise UserError(f"{path}: several arrays; name one, as FILE.npz:KEY")
    return found


def _checked(found: np.ndarray, width: int, name: str) -> np.ndarray:
    if found.dtype.kind not in "fiu" and found.dtype != ml_dtypes.bfloat16:
        raise UserError(f"{name}: should hold numbers; it holds {found.dtype}")
    if found.ndim != 2 or found.shape[1] != width or not len(found):
        raise UserError(
            f"{name}: shape {tuple(found.shape)} should be [number, {width}]: the pair reads {width} numbers"
        )
    with np.errstate(over="ignore"):
        vectors = found.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise UserError(f"{name}: NaN or infinity among its numbers")
    return vectors
