"""Reading and writing the safetensors files of a model directory in the HF layout.

One table per family names every parameter in both directions. An HF Linear is stored [out, in] and ours
is [in, out]; our blocks are stacked on a leading axis. Tensors pass through memory one at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from nlae_jax.errors import UserError
from nlae_jax.files import write_json
from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.families import FAMILIES

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 2**30  # of one file that is written

# Our name -> (HF name, whether the HF matrix is the transpose of ours), where a family has it.
# A name with {} stands for one tensor per block, and ours is then under "blocks".
_LLAMA_NAMES: dict[str, tuple[str, bool]] = {
    "embed": ("model.embed_tokens.weight", False),
    "attn_norm": ("model.layers.{}.input_layernorm.weight", False),
    "q": ("model.layers.{}.self_attn.q_proj.weight", True),
    "k": ("model.layers.{}.self_attn.k_proj.weight", True),
    "v": ("model.layers.{}.self_attn.v_proj.weight", True),
    "o": ("model.layers.{}.self_attn.o_proj.weight", True),
    "q_bias": ("model.layers.{}.self_attn.q_proj.bias", False),
    "k_bias": ("model.layers.{}.self_attn.k_proj.bias", False),
    "v_bias": ("model.layers.{}.self_attn.v_proj.bias", False),
    "o_bias": ("model.layers.{}.self_attn.o_proj.bias", False),
    "q_norm": ("model.layers.{}.self_attn.q_norm.weight", False),
    "k_norm": ("model.layers.{}.self_attn.k_norm.weight", False),
    "mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", False),
    "gate": ("model.layers.{}.mlp.gate_proj.weight", True),
    "up": ("model.layers.{}.mlp.up_proj.weight", True),
    "down": ("model.layers.{}.mlp.down_proj.weight", True),
    "gate_bias": ("model.layers.{}.mlp.gate_proj.bias", False),
    "up_bias": ("model.layers.{}.mlp.up_proj.bias", False),
    "down_bias": ("model.layers.{}.mlp.down_proj.bias", False),
    "final_norm": ("model.norm.weight", False),
    "head": ("lm_head.weight", False),
}
# With norms on both sides of attention and MLP, the name that Llama gives to the second goes to another.
_POST_NORM_NAMES: dict[str, tuple[str, bool]] = _LLAMA_NAMES | {
    "attn_post_norm": ("model.layers.{}.post_attention_layernorm.weight", False),
    "mlp_norm": ("model.layers.{}.pre_feedforward_layernorm.weight", False),
    "mlp_post_norm": ("model.layers.{}.post_feedforward_layernorm.weight", False),
}
_OTHER_NAMES = {"gemma2": _POST_NORM_NAMES, "gemma3_text": _POST_NORM_NAMES, "olmo2": _POST_NORM_NAMES}
HF_NAMES: dict[str, dict[str, tuple[str, bool]]] = {
    family: _OTHER_NAMES.get(family, _LLAMA_NAMES) for family in FAMILIES
}

# Where the language model lies in a checkpoint that also has a vision tower (new and old spelling), and what else does.
_NESTED = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_VISION = ("model.vision_tower.", "model.multi_modal_projector.", "vision_tower.", "multi_modal_projector.")

# What a model without output lacks: a decoder is read before its final norm and has no vocabulary head.
_OUTPUT = ("final_norm", "head")

_SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """One tensor of a file being written; `read` makes its values only when their turn comes."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def hf_name(arch: Arch, name: str, layer: int = 0) -> str:
    """The HF name of our parameter `name`, in block `layer` if it belongs to a block."""
    return HF_NAMES[arch.family][name][0].format(layer)


def load_params(directory: Path, arch: Arch, dtype: str = "float32", trunk: bool = False) -> dict[str, Any]:
    """The parameters of an HF model directory: the tree of `lm.arch.model_weights`, host arrays of `dtype`.

    `dtype` is float32, bfloat16 or float16; files may hold any of the three. `trunk` leaves out the final
    norm and the head, whether or not the files have them. Raises UserError, naming the tensor or file, when
    a tensor or shard is missing, surplus, doubled, or of the wrong shape or dtype.
    """
    directory = Path(directory)
    params = _allocate(arch, numpy_dtype(dtype), trunk)
    slots = {slot[0]: slot[1:] for slot in _slots(arch, params)}
    missing = set(slots)
    for path in weight_files(directory):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                plain = _without_tower(name)
                if plain not in slots:
                    if _may_be_ignored(plain, arch, trunk):
                        continue
                    raise UserError(f"{path}: unexpected tensor {name!r}; config.json does not describe it")
                if plain not in missing:
                    raise UserError(f"{path}: the tensor {name!r} is there twice")
                target, transposed = slots[plain]
                _read_into(target, file, name, transposed, path)
                missing.remove(plain)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{directory}: the weights lack the tensor {min(missing)!r}{more}")
    return params


def save_params(directory: Path, params: dict[str, Any], arch: Arch, dtype: str = "float32") -> None:
    """`save_model` of a whole tree, as `load_params` gives it (numpy or JAX arrays), with or without its output part.

    Raises ValueError where it does not fit `arch`.
    """
    trunk = "final_norm" not in params
    expected, flat = _shapes(arch, trunk), _flat(params)
    if {name: tuple(leaf.shape) for name, leaf in flat.items()} != expected:
        raise ValueError(f"the parameters do not fit the architecture; expected {expected}")
    save_model(directory, arch, lambda name, layer: flat[name] if layer is None else flat[name][layer], dtype, trunk)


def save_model(
    directory: Path,
    arch: Arch,
    values: Callable[[str, int | None], Any],
    dtype: str = "float32",
    trunk: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model's weights under HF names in `dtype`, in files of at most `shard_bytes` (or one tensor).

    `values(name, layer)` gives our parameter `name`, of one block where it belongs to one, else with layer None; it is
    asked for one tensor at a time. `trunk` leaves out final norm and head. Each file appears complete or not at all,
    an index last.
    """
    shapes = _shapes(arch, trunk)
    tensors = []
    for name, (template, transposed) in HF_NAMES[arch.family].items():
        for layer in range(arch.num_layers) if "{}" in template else (None,):
            if name in shapes:
                shape = shapes[name] if layer is None else shapes[name][1:]
                read = functools.partial(_values, values, name, layer, transposed)
                tensors.append(TensorToWrite(template.format(layer), shape[::-1] if transposed else shape, read))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, shard_bytes // numpy_dtype(dtype).itemsize)
    if len(shards) == 1:
        return write_safetensors(directory / WEIGHTS_FILE, tensors, dtype)
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(directory / file, shard, dtype)
    size = sum(math.prod(tensor.shape) for tensor in tensors) * numpy_dtype(dtype).itemsize
    index = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": index})


def _values(values: Callable[[str, int | None], Any], name: str, layer: int | None, transposed: bool) -> np.ndarray:
    array = np.asarray(values(name, layer))
    return array.T if transposed else array


def _shards(tensors: Sequence[TensorToWrite], elements: int) -> list[list[TensorToWrite]]:
    """Consecutive groups of at most so many elements, or of one tensor."""
    shards: list[list[TensorToWrite]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor.shape)
        if shards[-1] and filled + size > elements:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def write_safetensors(path: Path, tensors: Sequence[TensorToWrite], dtype: str = "float32") -> None:
    """Writes a safetensors file of one dtype, holding one tensor in memory at a time, and renames it into place.

    The library's own writer needs all tensors at once. Format: the header's length as 8 little-endian
    bytes, the header as JSON padded with spaces to 8 bytes, then the values without gaps.
    """
    target = numpy_dtype(dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + int(np.prod(tensor.shape)) * target.itemsize
        header[tensor.name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
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


def numpy_dtype(name: str) -> np.dtype:
    """float32, bfloat16 or float16 as a numpy dtype. Raises UserError for any other name."""
    if name not in _SAFETENSORS_NAMES:
        raise UserError(f"dtype {name!r} is not supported; {', '.join(_SAFETENSORS_NAMES)} are")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _shapes(arch: Arch, trunk: bool) -> dict[str, tuple[int, ...]]:
    """Our name -> shape of every parameter, blocks stacked."""
    names = _flat(model_weights(arch))
    return {name: weight.shape for name, weight in names.items() if not (trunk and name in _OUTPUT)}


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in tree.items() if name != "blocks"} | tree["blocks"]


def _tree(flat: dict[str, Any]) -> dict[str, Any]:
    outside = ("embed", *_OUTPUT)
    blocks = {name: leaf for name, leaf in flat.items() if name not in outside}
    return {name: leaf for name, leaf in flat.items() if name in outside} | {"blocks": blocks}


def _allocate(arch: Arch, dtype: np.dtype, trunk: bool) -> dict[str, Any]:
    return _tree({name: np.empty(shape, dtype) for name, shape in _shapes(arch, trunk).items()})


def _slots(arch: Arch, params: dict[str, Any]) -> Iterator[tuple[str, np.ndarray, bool]]:
    """(HF name, view of our array that holds it, whether HF's is the transpose) of every tensor."""
    flat = _flat(params)
    for name, (template, transposed) in HF_NAMES[arch.family].items():
        if name in flat and "{}" not in template:
            yield template, flat[name], transposed
    for layer in range(arch.num_layers):
        for name, (template, transposed) in HF_NAMES[arch.family].items():
            if name in flat and "{}" in template:
                yield template.format(layer), flat[name][layer], transposed


def _without_tower(name: str) -> str:
    """The name that a tensor of the language model has in a checkpoint without a vision tower."""
    for nested, plain in _NESTED:
        if name.startswith(nested):
            return plain + name.removeprefix(nested)
    return name


def _may_be_ignored(name: str, arch: Arch, trunk: bool) -> bool:
    """Whether a surplus tensor is harmless: a rotary buffer, the copy of a tied head, or a trunk's output part."""
    if name.endswith("rotary_emb.inv_freq") or name.startswith(_VISION):
        return True
    if name == hf_name(arch, "head"):
        return arch.tied_head or trunk
    return trunk and name == hf_name(arch, "final_norm")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that together hold the model."""
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    index = directory / INDEX_FILE
    if not index.is_file():
        raise UserError(f"{directory}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: should be JSON with an object `weight_map` of tensor to file names") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index}: {shard!r} should be the name of a file beside it")
        if not (directory / shard).is_file():
            raise UserError(f"{directory / shard}: this shard of the model is missing")
    return [directory / shard for shard in shards]


def read_tensor(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor of a file in float32. Raises UserError where the file, or the tensor in this shape, is not there."""
    target = np.empty(shape, np.float32)
    with _open(path) as file:
        if name not in file.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
            raise UserError(f"{path}: lacks the tensor {name!r}")
        _read_into(target, file, name, transposed=False, path=path)
    return target


def _open(path: Path) -> Any:
    try:
        # pread, because the pages of a memory map would count as this process's memory: twice the model.
        return safe_open(path, framework="np", backend="pread")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _read_into(target: np.ndarray, file: Any, name: str, transposed: bool, path: Path) -> None:
    """Copies one tensor into `target`, transposed if need be and in the dtype of `target`."""
    entry = file.get_slice(name)
    expected = (target.T if transposed else target).shape
    if tuple(entry.get_shape()) != expected:
        raise UserError(
            f"{path}: the tensor {name!r} has shape {tuple(entry.get_shape())}; config.json asks for {expected}"
        )
    if entry.get_dtype() not in _SAFETENSORS_NAMES.values():
        raise UserError(
            f"{path}: the tensor {name!r} is {entry.get_dtype()}; {', '.join(_SAFETENSORS_NAMES.values())} can be read"
        )
    values = file.get_tensor(name)
    target[...] = values.T if transposed else values
