"""Reading and writing the safetensors files of a model directory in the HF layout.

One table per family names every parameter in both directions. An HF Linear is stored [out, in] and ours
is [in, out]; our blocks are stacked on a leading axis. Tensors pass through memory one at a time.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.families import FAMILIES
from nlae_jax.lm.tensors import (
    Source,
    StoredTensor,
    TensorToWrite,
    check_tensor,
    load_array,
    numpy_dtype,
    same_values,
    stored_tensors,
    write_safetensors,
)
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import write_json
from nlae_jax.runtime.outside import quoted, read_json

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

# The language model's tensors may lie beside a vision tower (new and old spelling), and those of either may have been
# saved without the head, by a class that calls them as the model does from inside. What else a vision tower brings:
_TRUNK = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?(?=(?:embed_tokens|layers|norm)\.)")
_HEAD = re.compile(r"language_model\.(?=lm_head\.)")
_VISION = ("model.vision_tower.", "model.multi_modal_projector.", "vision_tower.", "multi_modal_projector.")

# What a model without output lacks: a decoder is read before its final norm and has no vocabulary head.
_OUTPUT = ("final_norm", "head")


def hf_name(arch: Arch, name: str, layer: int = 0) -> str:
    """The HF name of our parameter `name`, in block `layer` if it belongs to a block."""
    return HF_NAMES[arch.family][name][0].format(layer)


def load_params(
    directory: Path, arch: Arch, dtype: str = "float32", trunk: bool = False, shardings: Any = None
) -> dict[str, Any]:
    """The parameters of an HF model directory: the tree of `lm.arch.model_weights`, `jax.Array`s of `dtype`.

    `dtype` is float32, bfloat16 or float16; files may hold any of the three. `trunk` leaves out the final norm and
    the head, whether or not the files have them. `shardings` is a tree like the result (as `mesh.tree_shardings`
    makes it); without it everything is on the default device, uncommitted.

    Each process reads what its own devices hold, once. Host memory: on a CPU the arrays themselves, which are not
    copied, and elsewhere this process's part of one array at a time; beside it a few MB.

    Raises UserError, naming the tensor or file, when a tensor or shard is missing, surplus, doubled, or of the wrong
    shape or dtype; headers tell, before any values are read. Then also where a value is not finite, or where a model
    that is tied has a head that is not its embedding.
    """
    target, shapes = numpy_dtype(dtype), _shapes(arch, trunk)
    sources, heads = _find(Path(directory), arch, trunk, shapes)
    given = dict.fromkeys(shapes) if shardings is None else _flat(shardings)
    with contextlib.ExitStack() as stack:
        paths = {source.tensor.path for parts in sources.values() for source in parts} | {head.path for head in heads}
        files = {path: stack.enter_context(path.open("rb", buffering=0)) for path in sorted(paths)}
        arrays = {name: load_array(shape, target, given[name], sources[name], files) for name, shape in shapes.items()}
        for head in heads:
            _check_tied(sources["embed"][0].tensor, head, files)
        return _tree(arrays)


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
    shapes, tensors = _shapes(arch, trunk), []
    for hf, name, layer, transposed in _places(arch, shapes):
        shape = shapes[name] if layer is None else shapes[name][1:]
        read = functools.partial(_values, values, name, layer, transposed)
        tensors.append(TensorToWrite(hf, shape[::-1] if transposed else shape, read))
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


def _places(arch: Arch, names: Container[str]) -> Iterator[tuple[str, str, int | None, bool]]:
    """(HF name, our name, block if it belongs to one, whether HF's is the transpose) of every tensor of `names`."""
    table = {ours: theirs for ours, theirs in HF_NAMES[arch.family].items() if ours in names}
    for name, (template, transposed) in table.items():
        if "{}" not in template:
            yield template, name, None, transposed
    for layer in range(arch.num_layers):
        for name, (template, transposed) in table.items():
            if "{}" in template:
                yield template.format(layer), name, layer, transposed


def _plain_name(name: str) -> str:
    """The name that a tensor of the language model has in a checkpoint with a head and without a vision tower."""
    if inside := _TRUNK.match(name):
        return "model." + name[inside.end() :]
    return _HEAD.sub("", name, count=1)


def _may_be_ignored(name: str, arch: Arch, trunk: bool) -> bool:
    """Whether a surplus tensor is harmless: a rotary buffer, or a trunk's output part."""
    if name.endswith("rotary_emb.inv_freq") or name.startswith(_VISION):
        return True
    return trunk and name in (hf_name(arch, "head"), hf_name(arch, "final_norm"))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that together hold the model."""
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
    """Raises UserError where the head of a tied model is not its embedding. Processes share the work."""
    count, index = jax.process_count(), jax.process_index()
    rows = embed.shape[0] * index // count, embed.shape[0] * (index + 1) // count
    if head.shape != embed.shape or not same_values(embed, head, rows, files):
        raise UserError(
            f"{head.path}: the tensor {head.name!r} is not the embedding {embed.name!r}, though config.json says "
            "tie_word_embeddings: true; false there if the model has a head of its own, or remove the tensor"
        )


def _find(
    directory: Path, arch: Arch, trunk: bool, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, list[Source]], list[StoredTensor]]:
    """Our name -> what it is read from, and the heads that a tied model has all the same.

    Every tensor is there once and as expected, else UserError.
    """
    wanted = {
        hf: (name, shapes[name] if layer is None else shapes[name][1:], layer, transposed)
        for hf, name, layer, transposed in _places(arch, shapes)
    }
    found: dict[str, Source] = {}
    heads: list[StoredTensor] = []
    for path in weight_files(directory):
        for tensor in stored_tensors(path):
            plain = _plain_name(tensor.name)
            if plain not in wanted:
                if _may_be_ignored(plain, arch, trunk):
                    continue
                if plain == hf_name(arch, "head"):  # else it would be wanted: the model is tied
                    heads.append(tensor)
                    continue
                raise UserError(f"{path}: unexpected tensor {tensor.name!r}; config.json does not describe it")
            if plain in found:
                raise UserError(f"{path}: the tensor {tensor.name!r} is there twice")
            _, shape, layer, transposed = wanted[plain]
            check_tensor(tensor, shape[::-1] if transposed else shape)
            found[plain] = Source(tensor, layer, transposed)
    if missing := wanted.keys() - found.keys():
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{directory}: the weights lack the tensor {min(missing)!r}{more}")
    sources: dict[str, list[Source]] = {name: [] for name in shapes}
    for hf, (name, *_) in wanted.items():
        sources[name].append(found[hf])
    for head in heads:
        check_tensor(head, head.shape)
    return sources, heads
