"""Converting a GGUF file to a model directory in the HF layout, in float32.

Names and metadata keys follow the GGUF specification; `families.py` has what differs between families. Changes of
llama.cpp's converter are undone here:

* Where its graph turns neighbouring dimensions, the rows of queries and keys lie with rotary pairs side by side, while
  HF keeps the halves apart.
* Norms whose weights have an offset (Gemma's 1) are stored with it added.
* DeltaNet's decay is stored as the negative rate instead of its logarithm, and its value heads in another order: first
  the first one of every key head, then the second ones.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.families import hf_config
from nlae_jax.lm.gguf.arch import read_gguf_arch
from nlae_jax.lm.gguf.families import GGUF_FAMILIES, GgufFamily
from nlae_jax.lm.gguf.tokenizer import write_tokenizer
from nlae_jax.lm.layout import flat_weights, hf_tensors
from nlae_jax.lm.tensors import TensorToWrite, write_safetensors
from nlae_jax.lm.weights import WEIGHTS_FILE, hf_values
from nlae_jax.mesh import Weight
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import clean_log, quoted

# Our parameter name -> GGUF tensor name; {} is the block's number. Which of them a model has, its Arch says.
TENSOR_NAMES: dict[str, str] = {
    "embed": "token_embd.weight",
    "attn_norm": "blk.{}.attn_norm.weight",
    "attn_post_norm": "blk.{}.post_attention_norm.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "o": "blk.{}.attn_output.weight",
    "q_bias": "blk.{}.attn_q.bias",
    "k_bias": "blk.{}.attn_k.bias",
    "v_bias": "blk.{}.attn_v.bias",
    "o_bias": "blk.{}.attn_output.bias",
    "q_norm": "blk.{}.attn_q_norm.weight",
    "k_norm": "blk.{}.attn_k_norm.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "mlp_post_norm": "blk.{}.post_ffw_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "gate_bias": "blk.{}.ffn_gate.bias",
    "up_bias": "blk.{}.ffn_up.bias",
    "down_bias": "blk.{}.ffn_down.bias",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "router": "blk.{}.ffn_gate_inp.weight",
    "router_bias": "blk.{}.ffn_gate_inp.bias",
    "sinks": "blk.{}.attn_sinks.weight",
    "positions": "position_embd.weight",
    "attn_norm_bias": "blk.{}.attn_norm.bias",
    "mlp_norm_bias": "blk.{}.ffn_norm.bias",
    "final_norm_bias": "output_norm.bias",
    "delta_z": "blk.{}.attn_gate.weight",
    "delta_b": "blk.{}.ssm_beta.weight",
    "delta_a": "blk.{}.ssm_alpha.weight",
    "delta_rate": "blk.{}.ssm_a",
    "delta_bias": "blk.{}.ssm_dt.bias",
    "delta_norm": "blk.{}.ssm_norm.weight",
    "delta_o": "blk.{}.ssm_out.weight",
    "shared_gate": "blk.{}.ffn_gate_shexp.weight",
    "shared_up": "blk.{}.ffn_up_shexp.weight",
    "shared_down": "blk.{}.ffn_down_shexp.weight",
    "shared_share": "blk.{}.ffn_gate_inp_shexp.weight",
    "layer_scale": "blk.{}.layer_output_scale.weight",
    "router_norm": "blk.{}.ffn_gate_inp.scale",
    "expert_scale": "blk.{}.ffn_down_exps.scale",
    "experts_norm": "blk.{}.pre_ffw_norm_2.weight",
    "experts_post_norm": "blk.{}.post_ffw_norm_2.weight",
    "shared_post_norm": "blk.{}.post_ffw_norm_1.weight",
}
# Where a block has experts, each of these holds all of theirs: [experts, out, in].
_EXPERTS = {name: f"blk.{{}}.ffn_{name}_exps.weight" for name in ("gate", "up", "down")}
_EXPERTS |= {f"{name}_bias": f"blk.{{}}.ffn_{name}_exps.bias" for name in ("gate", "up", "down")}
_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})", re.DOTALL)  # the name of one of the files that a model is split into

# Parameters with an entry for each value head of DeltaNet, or `value_dim` of them.
_BY_VALUE_HEAD = dict.fromkeys(("delta_v", "delta_v_conv", "delta_z", "delta_o"), True)
_BY_VALUE_HEAD |= dict.fromkeys(("delta_a", "delta_b", "delta_rate", "delta_bias"), False)

Metadata = dict[str, Any]
Tensors = dict[str, gguf.ReaderTensor]


def gguf_parts(path: Path) -> list[Path]:
    """Returns the files of the model that `path` belongs to: the file itself, or all parts if it is one of several.

    Raises UserError where a part is missing.
    """
    named = _PART.fullmatch(path.stem)
    if named is None or not 1 <= int(named[2]) <= int(named[3]):
        return [path]
    parts = [path.with_name(f"{named[1]}-{part:05}-of-{named[3]}{path.suffix}") for part in range(1, int(named[3]) + 1)]
    for part in parts:
        if not part.is_file():
            raise UserError(f"{part}: missing; {path.name} is one of {len(parts)} parts, which should lie together")
    return parts


def convert_gguf(gguf_path: Path, directory: Path) -> None:
    """Writes `directory` (config.json, model.safetensors in float32, tokenizer) from a GGUF file.

    A model split into several files is named by any of them. `directory` must not exist; it appears complete or not at
    all. If another process completes it first, its result stands. Raises UserError if the file is not a GGUF, or its
    architecture, quantisation or tokenizer is not one that can be converted.
    """
    gguf_path, directory = Path(gguf_path), Path(directory)
    if directory.exists():
        raise UserError(f"{directory}: exists already; name a new directory for the converted model")
    metadata, tensors = _read(gguf_path)
    arch = _arch(gguf_path, metadata, tensors)
    name = metadata["general.architecture"]
    family = GGUF_FAMILIES[name]
    slots = _slots(arch, family, tensors)
    _check_tensors(gguf_path, arch, slots, family, tensors)
    logging.getLogger(__name__).info("converting %s to %s", gguf_path, directory)
    # Not named by the process's number, which processes in other containers with the same cache may share.
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir(parents=True)
        special = write_tokenizer(gguf_path, metadata, temporary)
        config = hf_config(arch) | special | {"torch_dtype": "float32"}
        if length := metadata.get(f"{name}.context_length"):
            config["max_position_embeddings"] = int(length)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_safetensors(temporary / WEIGHTS_FILE, _tensors_to_write(gguf_path, arch, family, slots, tensors))
        try:
            temporary.rename(directory)
        except OSError:
            if not (directory / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(path: Path) -> tuple[Metadata, Tensors]:
    """Returns the metadata and the tensors of all parts, by name. Tensors are memory-mapped and still quantised."""
    parts = gguf_parts(path)
    metadata, tensors = _read_file(parts[0])
    for number, part in enumerate(parts):
        told, found = (metadata, tensors) if number == 0 else _read_file(part)
        if (told.get("split.count") or len(parts)) != len(parts) or told.get("split.no", number) != number:
            raise UserError(
                f"{part}: split.no and split.count say part {quoted(told.get('split.no'))}, counted from 0, of "
                f"{quoted(told.get('split.count'))}; the names of parts end in -00001-of-00002.gguf and so on"
            )
        if number and (twice := tensors.keys() & found.keys()):
            raise UserError(f"{part}: the tensor {min(twice)} is in another part too")
        tensors |= found
    if (expected := metadata.get("split.tensors.count", len(tensors))) != len(tensors):
        raise UserError(f"{path}: its parts hold {len(tensors)} tensors; split.tensors.count is {quoted(expected)}")
    return metadata, tensors


def _read_file(path: Path) -> tuple[Metadata, Tensors]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    clean_log("gguf.gguf_reader")  # it warns of doubled keys, and quotes them
    try:
        reader = gguf.GGUFReader(path)
        if reader.byte_order != "I":
            raise ValueError("its byte order is not this machine's")
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise UserError(f"{path}: not a readable GGUF file ({error})") from None
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _arch(path: Path, metadata: Metadata, tensors: Tensors) -> Arch:
    embeddings = tensors.get(TENSOR_NAMES["embed"])
    if embeddings is None:
        raise UserError(f"{path}: the GGUF lacks the tensor {TENSOR_NAMES['embed']}")
    if len(embeddings.shape) != 2:
        raise UserError(f"{path}: the tensor {embeddings.name} should be a matrix; it has shape {_shape(embeddings)}")
    family = GGUF_FAMILIES.get(str(metadata.get("general.architecture")))
    named = [name for name in family.rope_tensors if name in tensors] if family else []
    factors = {name: _dequantise(path, tensors[name]).reshape(-1) for name in named}
    return read_gguf_arch(path, metadata, tensors, int(embeddings.shape[1]), factors)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where one parameter of one block stands: rows of a GGUF tensor, or all of it.

    `matrix`: ours is [in, out], and a GGUF stores [out, in].
    """

    tensor: str
    shape: tuple[int, ...]  # of the whole GGUF tensor
    rows: np.ndarray | None
    matrix: bool


def _slots(arch: Arch, family: GgufFamily, tensors: Container[str]) -> dict[tuple[str, int | None], _Slot]:
    """Returns (our parameter, its entry in the stack of blocks that have it) -> the parameter's place in the GGUF."""
    weights = model_weights(arch)
    in_blocks: dict[str, Weight] = weights.pop("blocks")
    shapes = {name: weight.shape for name, weight in weights.items()}
    shapes |= {name: weight.shape[1:] for name, weight in in_blocks.items()}
    joined = {name: (template, members) for template, members in family.joined for name in members}
    names = TENSOR_NAMES | (_EXPERTS if arch.experts else {}) | dict(family.names)
    slots = {}
    for name, shape in shapes.items():
        blocks = range(arch.num_layers) if name in in_blocks else (None,)
        matrix = name in in_blocks and len(shape) > 1 and not name.endswith("_bias")
        for layer in blocks:
            place = None if layer is None else arch.place(in_blocks[name].axes[0], layer)
            if layer is not None and place is None:
                continue
            template, members = joined.get(name, ("", ()))
            if template.format(layer) not in tensors:
                template, members = names.get(name, template), (name,) if name in names else members
            widths = [shapes[member][-1] if len(members) > 1 or matrix else shape[0] for member in members]
            whole = (*shape[:-2], sum(widths), shape[-2]) if matrix else (sum(widths), *shape[1:])
            rows = None
            if len(members) > 1:
                heads = arch.num_heads if template in family.by_head else 1
                rows = _rows(widths, members.index(name), heads)
            slots[name, place] = _Slot(template.format(layer), whole, rows, matrix)
    return slots


def _rows(widths: Sequence[int], member: int, heads: int) -> np.ndarray:
    """Returns the rows of parameter number `member` among several that lie one after another in each head.

    `widths` are the numbers of rows of the parameters, over all heads.
    """
    within = [width // heads for width in widths]
    first = sum(within[:member]) + sum(within) * np.arange(heads)
    return (first[:, None] + np.arange(within[member])).reshape(-1)


def _check_tensors(path: Path, arch: Arch, slots: Mapping[Any, _Slot], family: GgufFamily, tensors: Tensors) -> None:
    wanted = {slot.tensor: slot.shape for slot in slots.values()}
    for name, expected in wanted.items():
        if name not in tensors:
            raise UserError(f"{path}: the GGUF lacks the tensor {name}")
        shape = _shape(tensors[name])
        if shape != expected and (1, *shape) != expected:  # a matrix of one row may be a vector
            raise UserError(f"{path}: the tensor {name} has shape {shape}; the metadata ask for {expected}")
    for name in tensors:
        block = _BLOCK.match(name)
        draft = family.drafts and block and int(block[1]) >= arch.num_layers
        if name not in wanted and name not in family.rope_tensors and not draft:
            raise UserError(f"{path}: unexpected tensor {name}; this variant of {family.model_type} is not supported")


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _tensors_to_write(
    path: Path, arch: Arch, family: GgufFamily, slots: Mapping[tuple[str, int | None], _Slot], tensors: Tensors
) -> Sequence[TensorToWrite]:
    """Returns the tensors of the HF layout, in the order of `TENSOR_NAMES`.

    The order must not change, because the fingerprint of a converted model depends on it.
    """

    @functools.lru_cache(maxsize=1)  # a block's experts may be written one at a time
    def values(name: str, layer: int | None) -> np.ndarray:
        slot = slots[name, layer]
        tensor = tensors[slot.tensor]
        if slot.rows is not None:
            tensor = tensor._replace(data=tensor.data.take(slot.rows, axis=-2 if slot.matrix else 0))
        found = _dequantise(path, tensor)
        if len(slot.shape) > found.ndim:
            found = found[None]
        if name == "delta_rate" and not (found < 0).all():
            raise UserError(f"{path}: the tensor {slot.tensor} should hold numbers below 0, the rates of decay")
        found = _undo(arch, family, name)(found)
        return found.swapaxes(-1, -2) if slot.matrix else found

    order = {name: number for number, name in enumerate(TENSOR_NAMES)}
    place = lambda hf: (order.get(hf.shares[0].name, len(order)), hf.shares[0].index)  # noqa: E731
    found = sorted(hf_tensors(arch, flat_weights(arch)), key=place)
    return [TensorToWrite(hf.name, hf.stored_shape, functools.partial(hf_values, values, hf)) for hf in found]


def _undo(arch: Arch, family: GgufFamily, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from the values of our parameter `name` in a GGUF to its values in the HF layout."""
    heads = {"q": arch.num_heads, "k": arch.num_kv_heads}.get(name.removesuffix("_bias"))
    if family.rotary_pairs and heads:
        return lambda values: split_rotary_pairs(values, heads)
    if name.endswith("norm") and arch.norm_offset and name != "delta_norm":
        return lambda values: values - np.float32(arch.norm_offset)
    if arch.delta is not None and name in _BY_VALUE_HEAD:
        delta = arch.delta
        width = delta.value_dim if _BY_VALUE_HEAD[name] else 1
        axis = -1 if name == "delta_o" else 0  # of its inputs, else of the outputs
        rate = (lambda values: np.log(-values)) if name == "delta_rate" else (lambda values: values)
        return lambda values: rate(by_key_head(values, delta.key_heads, width, axis))
    return lambda values: values


def _dequantise(path: Path, tensor: gguf.ReaderTensor) -> np.ndarray:
    """Returns the tensor's values [out, in] in float32. Raises UserError where a value is not finite."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise UserError(
            f"{path}: the tensor {tensor.name} is quantised as {tensor.tensor_type.name}, which cannot be read"
        ) from None
    if not np.isfinite(values).all():
        raise UserError(f"{path}: the tensor {tensor.name} holds NaN or infinity")
    return values


def split_rotary_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head from rotary pairs (0, 0', 1, 1', …) to halves (0, 1, …, 0', 1', …).

    `weight` is a matrix [heads * head_dim, in] or a bias [heads * head_dim]; the values are a copy.
    """
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def by_key_head(values: np.ndarray, key_heads: int, width: int, axis: int) -> np.ndarray:
    """Reorders value heads, `width` entries of an axis each, so that those of one key head lie side by side.

    A GGUF has the first value head of every key head first, then the second ones. The values are a copy.
    """
    moved = np.moveaxis(values, axis, 0)
    apart = moved.reshape(-1, key_heads, width, *moved.shape[1:]).swapaxes(0, 1)
    return np.moveaxis(apart.reshape(moved.shape), 0, axis)
