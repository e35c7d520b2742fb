"""Reads and writes the safetensors files of a model directory in the HF layout, one tensor in memory at a time.

`layout.py` says where each parameter is stored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nlae_jax.lm.arch import Arch
from nlae_jax.lm.layout import (
    HfTensor,
    Share,
    flat_weights,
    hf_name,
    hf_tensors,
    is_buffer,
    is_packed,
    layout,
    plain_name,
)
from nlae_jax.lm.reading import Source, load_array, same_values
from nlae_jax.lm.tensors import (
    Mxfp4Tensor,
    StoredTensor,
    TensorToWrite,
    check_tensor,
    mxfp4,
    numpy_dtype,
    stored_tensors,
    write_safetensors,
)
from nlae_jax.mesh import Weight
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import write_json
from nlae_jax.runtime.outside import quoted, read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 2**30  # the most that is written into one file

# Beginnings of the names of tensors that are passed over: of vision and audio towers, and of heads that draft tokens.
_BESIDE = (
    *("model.vision_tower.", "model.multi_modal_projector.", "vision_tower.", "multi_modal_projector."),
    *("model.visual.", "visual.", "mtp.", "model.mtp."),
    *("model.audio_tower.", "model.embed_vision.", "model.embed_audio.", "model.vision_embedder."),
)

# The two tensors of an MXFP4 tensor: their names are the tensor's with these endings.
_MXFP4 = ("blocks", "scales")

# The parameters that a trunk lacks. A decoder is read before the final norm and has no vocabulary head.
_OUTPUT = ("final_norm", "final_norm_bias", "head")


def load_params(
    directory: Path, arch: Arch, dtype: str = "float32", trunk: bool = False, shardings: Any = None
) -> dict[str, Any]:
    """Reads the parameters of an HF model directory: the tree of `lm.arch.model_weights`, `jax.Array`s of `dtype`.

    `dtype` is float32, bfloat16 or float16; files may hold any of the three. `trunk` leaves out the final norm and
    the head, whether or not the files have them. `shardings` is a tree like the result (as `mesh.tree_shardings`
    makes it). Without it every array is on the default device, uncommitted.

    Each process reads the parts that its own devices hold, once. On a CPU this takes no host memory beside the arrays.
    Elsewhere it takes that of this process's part of one array. In both cases a few MB are added.

    Raises UserError that names the tensor or file if a tensor or shard is missing, unexpected, doubled, or of the wrong
    shape or dtype. That is found in the headers, before values are read. Also raises UserError if a value is not
    finite, or if a tied model has a head that differs from its embedding.
    """
    target, weights = numpy_dtype(dtype), _weights(arch, trunk)
    sources, heads = _find(Path(directory), arch, trunk, weights)
    sharding_of = dict.fromkeys(weights) if shardings is None else _flat(shardings)
    with contextlib.ExitStack() as stack:
        paths = {path for parts in sources.values() for source in parts for path in source.tensor.paths}
        paths |= {head.path for head in heads}
        files = {path: stack.enter_context(path.open("rb", buffering=0)) for path in sorted(paths)}
        arrays = {
            name: load_array(weight.shape, target, sharding_of[name], sources[name], files)
            for name, weight in weights.items()
        }
        for head in heads:
            embed = sources["embed"][0].tensor
            assert isinstance(embed, StoredTensor)  # only experts are stored in MXFP4
            _check_tied(embed, head, files)
        return _tree(arrays)


def save_params(directory: Path, params: dict[str, Any], arch: Arch, dtype: str = "float32") -> None:
    """Writes a whole tree of numpy or JAX arrays, like the result of `load_params`, with `save_model`.

    A tree without `final_norm` is a trunk. Raises ValueError if the tree does not fit `arch`.
    """
    trunk = "final_norm" not in params
    expected, flat = {name: weight.shape for name, weight in _weights(arch, trunk).items()}, _flat(params)
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

    `values(name, layer)` returns our parameter `name` of block `layer`, which is None for a parameter outside of
    blocks. It is called for one tensor at a time. `trunk` leaves out final norm and head. Each file appears complete or
    not at all, and the index appears last.
    """
    if arch.experts is not None:  # a block's experts are written one by one
        values = functools.lru_cache(maxsize=1)(values)
    tensors = [
        TensorToWrite(tensor.name, tensor.stored_shape, functools.partial(hf_values, values, tensor))
        for tensor in hf_tensors(arch, _weights(arch, trunk))
    ]
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


def hf_values(values: Callable[[str, int | None], Any], tensor: HfTensor) -> np.ndarray:
    """Returns the values of one HF tensor, joined from the parameters that it holds, which `save_model` explains."""

    def parameter(share: Share) -> np.ndarray:
        array = values(share.name, share.index[0] if share.index else None)
        return np.asarray(array[share.index[1]] if share.index[1:] else array)

    if len(tensor.shares) == 1 and tensor.shares[0].spread is None and tensor.shares[0].expert is None:
        array = parameter(tensor.shares[0])
        return array.T if tensor.transposed else array
    joined = np.empty(tensor.shape, np.float32)  # holds the values of any supported dtype
    for share in tensor.shares:
        target, array = joined if share.expert is None else joined[share.expert], parameter(share)
        places = np.arange(array.shape[-1]) if share.spread is None else share.spread.places(array.shape[-1])
        (target.T if tensor.transposed else target)[..., places] = array
    return joined.reshape(tensor.stored_shape)


def _shards(tensors: Sequence[TensorToWrite], elements: int) -> list[list[TensorToWrite]]:
    """Splits tensors into consecutive groups of one tensor, or of several with at most `elements` numbers together."""
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


def _weights(arch: Arch, trunk: bool) -> dict[str, Weight]:
    """Returns every parameter by our name. Those of the blocks are stacked."""
    return {name: weight for name, weight in flat_weights(arch).items() if not (trunk and name in _OUTPUT)}


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in tree.items() if name != "blocks"} | tree["blocks"]


def _tree(flat: dict[str, Any]) -> dict[str, Any]:
    outside = ("embed", "positions", *_OUTPUT)
    blocks = {name: leaf for name, leaf in flat.items() if name not in outside}
    return {name: leaf for name, leaf in flat.items() if name in outside} | {"blocks": blocks}


def _may_be_ignored(name: str, arch: Arch, trunk: bool) -> bool:
    """Returns whether an unexpected tensor is harmless: a buffer, one of `_BESIDE`, or a trunk's output part."""
    if is_buffer(arch, name) or name.startswith(_BESIDE):
        return True
    return trunk and name in {hf_name(arch, output) for output in _OUTPUT if output in layout(arch)}


def has_weights(directory: Path) -> bool:
    """Returns whether a model directory holds more than a config.json."""
    return any((Path(directory) / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))


def weight_files(directory: Path) -> list[Path]:
    """Returns the safetensors files that together hold the model. Raises UserError if one of them is missing."""
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    index = directory / INDEX_FILE
    if not index.is_file():
        raise UserError(f"{directory}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there")
    try:
        weight_map = read_json(index).get("weight_map")
    except UserError as error:
        raise UserError(f"{error}; it should be an object with a `weight_map` of tensor to file names") from None
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: weight_map should be an object of tensor to file names; it is {quoted(weight_map)}")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index}: {quoted(shard)} should be the name of a file beside it")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not (directory / shard).is_file():
            raise UserError(f"{directory / shard}: this shard of the model is missing")
    return [directory / shard for shard in shards]


def _check_tied(embed: StoredTensor, head: StoredTensor, files: dict[Path, Any]) -> None:
    """Raises UserError if the head of a tied model differs from its embedding. Processes share the work."""
    count, index = jax.process_count(), jax.process_index()
    rows = embed.shape[0] * index // count, embed.shape[0] * (index + 1) // count
    if head.shape != embed.shape or not same_values(embed, head, rows, files):
        raise UserError(
            f"{head.path}: the tensor {head.name!r} is not the embedding {embed.name!r}, though config.json says "
            "tie_word_embeddings: true; false there if the model has a head of its own, or remove the tensor"
        )


def _find(
    directory: Path, arch: Arch, trunk: bool, weights: dict[str, Weight]
) -> tuple[dict[str, list[Source]], list[StoredTensor]]:
    """Returns the sources of every parameter by our names, and the stored heads of a tied model.

    Raises UserError unless every tensor is there once and as expected.
    """
    stored = {path: stored_tensors(path) for path in weight_files(directory)}
    packed_experts = is_packed(arch, (tensor.name for tensors in stored.values() for tensor in tensors))
    wanted = {tensor.name: tensor for tensor in hf_tensors(arch, weights, packed_experts)}
    found: dict[str, StoredTensor | Mxfp4Tensor] = {}
    packed: dict[str, dict[str, StoredTensor]] = {}
    heads: list[StoredTensor] = []
    for path, tensors in stored.items():
        for tensor in tensors:
            plain = plain_name(arch, tensor.name)
            stem, _, part = plain.rpartition("_")
            if part in _MXFP4 and stem in wanted and part not in packed.get(stem, {}):
                packed.setdefault(stem, {})[part] = tensor
                continue
            if plain not in wanted:
                if _may_be_ignored(plain, arch, trunk):
                    continue
                if plain == hf_name(arch, "head"):  # the model is tied, or else its head would be in `wanted`
                    heads.append(tensor)
                    continue
                raise UserError(f"{path}: unexpected tensor {tensor.name!r}; config.json does not describe it")
            if plain in found:
                raise UserError(f"{path}: the tensor {tensor.name!r} is there twice")
            check_tensor(tensor, wanted[plain].stored_shape)
            found[plain] = dataclasses.replace(tensor, shape=wanted[plain].shape)
    for stem, parts in packed.items():
        if stem in found or len(parts) < len(_MXFP4):
            where = next(iter(parts.values()))
            raise UserError(f"{where.path}: {where.name!r}: there should be its {' and '.join(_MXFP4)}, and no others")
        found[stem] = mxfp4(*(parts[part] for part in _MXFP4))
        shape = wanted[stem].shape  # MXFP4 has the inputs last, whatever the order of the plain tensor
        check_tensor(found[stem], shape if wanted[stem].transposed else (*shape[:-2], *shape[:-3:-1]))
    if missing := wanted.keys() - found.keys():
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{directory}: the weights lack the tensor {min(missing)!r}{more}")
    sources: dict[str, list[Source]] = {name: [] for name in weights}
    for name, hf in wanted.items():
        for share in hf.shares:
            stored_matrix = found[name] if share.expert is None else found[name].entry(share.expert)
            transposed = hf.transposed or isinstance(stored_matrix, Mxfp4Tensor)
            sources[share.name].append(Source(stored_matrix, share.index, transposed, share.spread))
    for head in heads:
        check_tensor(head, head.shape)
    return sources, heads
