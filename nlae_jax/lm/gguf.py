"""Converting a llama-family GGUF file to a model directory in the HF layout, in float32.

Names and metadata keys follow the GGUF specification. llama.cpp stores the rows of the query and key
matrices with rotary pairs side by side, where HF keeps the halves apart: they are put back here.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from nlae_jax.errors import UserError
from nlae_jax.lm.arch import Arch, Llama3Rope
from nlae_jax.lm.families import hf_config
from nlae_jax.lm.gguf_tokenizer import write_tokenizer
from nlae_jax.lm.weights import WEIGHTS_FILE, TensorToWrite, hf_name, write_safetensors

# GGUF architecture -> GGUF tensor name -> our parameter name; {} is the block's number.
TENSOR_NAMES: dict[str, dict[str, str]] = {
    "llama": {
        "token_embd.weight": "embed",
        "blk.{}.attn_norm.weight": "attn_norm",
        "blk.{}.attn_q.weight": "q",
        "blk.{}.attn_k.weight": "k",
        "blk.{}.attn_v.weight": "v",
        "blk.{}.attn_output.weight": "o",
        "blk.{}.ffn_norm.weight": "mlp_norm",
        "blk.{}.ffn_gate.weight": "gate",
        "blk.{}.ffn_up.weight": "up",
        "blk.{}.ffn_down.weight": "down",
        "output_norm.weight": "final_norm",
        "output.weight": "head",
    },
}
_ROPE_FACTORS = "rope_freqs.weight"

Metadata = dict[str, Any]
Tensors = dict[str, gguf.ReaderTensor]


def convert_gguf(gguf_path: Path, directory: Path) -> None:
    """Writes `directory` (config.json, model.safetensors in float32, tokenizer) from a GGUF file.

    `directory` must not exist; it appears complete or not at all. If another process completes it first,
    its result stands. Raises UserError if the file is not a GGUF, or its architecture, quantisation or
    tokenizer is not one that can be converted.
    """
    gguf_path, directory = Path(gguf_path), Path(directory)
    if directory.exists():
        raise UserError(f"{directory}: exists already; name a new directory for the converted model")
    metadata, tensors = _read(gguf_path)
    arch = _arch(gguf_path, metadata, tensors)
    _check_tensors(gguf_path, arch, tensors)
    logging.getLogger(__name__).info("converting %s to %s", gguf_path, directory)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        special = write_tokenizer(gguf_path, metadata, temporary)
        config = hf_config(arch) | special | {"torch_dtype": "float32"}
        if length := metadata.get(f"{arch.family}.context_length"):
            config["max_position_embeddings"] = int(length)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_safetensors(temporary / WEIGHTS_FILE, _tensors_to_write(gguf_path, arch, tensors))
        try:
            temporary.rename(directory)
        except OSError:
            if not (directory / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(path: Path) -> tuple[Metadata, Tensors]:
    """All metadata values, and the tensors by name (memory-mapped, still quantised)."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        reader = gguf.GGUFReader(path)
        if reader.byte_order != "I":
            raise ValueError("its byte order is not this machine's")
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise UserError(f"{path}: not a readable GGUF file ({error})") from None
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _require(path: Path, metadata: Metadata, key: str) -> Any:
    if metadata.get(key) is None:
        raise UserError(f"{path}: the GGUF metadata lack {key}")
    return metadata[key]


def _arch(path: Path, metadata: Metadata, tensors: Tensors) -> Arch:
    family = metadata.get("general.architecture")
    if family not in TENSOR_NAMES:
        raise UserError(f"{path}: GGUF architecture {family!r} is not supported; {', '.join(TENSOR_NAMES)} is")
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: the GGUF lacks the tensor token_embd.weight")
    scaling = metadata.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none":
        raise UserError(f"{path}: {family}.rope.scaling.type {scaling!r} is not supported; none is")
    if metadata.get(f"{family}.expert_count"):
        raise UserError(f"{path}: a mixture of experts ({family}.expert_count) is not supported")
    d_model = int(_require(path, metadata, f"{family}.embedding_length"))
    heads = int(_require(path, metadata, f"{family}.attention.head_count"))
    head_dim = int(metadata.get(f"{family}.attention.key_length") or d_model // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.get(f"{family}.{key}", head_dim) != head_dim:
            raise UserError(f"{path}: {family}.{key} should be {head_dim}, the size of a head")
    theta = float(metadata.get(f"{family}.rope.freq_base", 10_000.0))
    # Shortest decimal that is the same float32: 1e-5 is stored as 9.999999747378752e-06.
    eps = float(str(np.float32(_require(path, metadata, f"{family}.attention.layer_norm_rms_epsilon"))))
    return Arch(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        d_model=d_model,
        num_layers=int(_require(path, metadata, f"{family}.block_count")),
        num_heads=heads,
        num_kv_heads=int(metadata.get(f"{family}.attention.head_count_kv") or heads),
        head_dim=head_dim,
        d_ff=int(_require(path, metadata, f"{family}.feed_forward_length")),
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=_rope_scaling(path, tensors, head_dim, theta),
        tied_head="output.weight" not in tensors,
        family=family,
    )


def _rope_scaling(path: Path, tensors: Tensors, head_dim: int, theta: float) -> Llama3Rope | None:
    """Llama 3's RoPE scaling, which a GGUF holds only as the factors that follow from it.

    All its releases share three of the four constants; the fourth is the largest factor. Factors that
    these do not reproduce are refused, because the model would silently compute something else.
    """
    if _ROPE_FACTORS not in tensors:
        return None
    factors = _dequantise(path, tensors[_ROPE_FACTORS]).reshape(-1)
    if np.all(factors == 1):
        return None
    scaling = Llama3Rope(float(factors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    kept = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = np.clip(kept, 0, 1)
    expected = 1 / ((1 - kept) / scaling.factor + kept)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(f"{path}: the RoPE factors in {_ROPE_FACTORS} are not those of Llama 3; they are not supported")
    return scaling


def _names(arch: Arch) -> dict[str, tuple[str, int]]:
    """GGUF name -> (our name, block) of every tensor the model has."""
    return {
        template.format(layer): (name, layer)
        for template, name in TENSOR_NAMES[arch.family].items()
        if not (name == "head" and arch.tied_head)
        for layer in range(arch.num_layers if "{}" in template else 1)
    }


def _check_tensors(path: Path, arch: Arch, tensors: Tensors) -> None:
    names = _names(arch)
    for name in names:
        if name not in tensors:
            raise UserError(f"{path}: the GGUF lacks the tensor {name}")
    for name in tensors:
        if name not in names and name != _ROPE_FACTORS:
            raise UserError(f"{path}: unexpected tensor {name}; this variant of {arch.family} is not supported")


def _expected_shape(arch: Arch, name: str) -> tuple[int, ...]:
    """The shape of our parameter `name` under HF: [out, in]."""
    heads, kv_heads = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    return {
        "embed": (arch.vocab_size, arch.d_model),
        "head": (arch.vocab_size, arch.d_model),
        "q": (heads, arch.d_model),
        "k": (kv_heads, arch.d_model),
        "v": (kv_heads, arch.d_model),
        "o": (arch.d_model, heads),
        "gate": (arch.d_ff, arch.d_model),
        "up": (arch.d_ff, arch.d_model),
        "down": (arch.d_model, arch.d_ff),
    }.get(name, (arch.d_model,))


def _tensors_to_write(path: Path, arch: Arch, tensors: Tensors) -> Sequence[TensorToWrite]:
    written = []
    for gguf_name, (name, layer) in _names(arch).items():
        shape = tuple(int(size) for size in reversed(tensors[gguf_name].shape))
        if shape != _expected_shape(arch, name):
            raise UserError(
                f"{path}: the tensor {gguf_name} has shape {shape}; the metadata ask for {_expected_shape(arch, name)}"
            )
        heads = {"q": arch.num_heads, "k": arch.num_kv_heads}.get(name, 0)
        written.append(TensorToWrite(hf_name(arch, name, layer), shape, _reader(path, tensors[gguf_name], heads)))
    return written


def _reader(path: Path, tensor: gguf.ReaderTensor, rotary_heads: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        values = _dequantise(path, tensor)
        return split_rotary_pairs(values, rotary_heads) if rotary_heads else values

    return read


def _dequantise(path: Path, tensor: gguf.ReaderTensor) -> np.ndarray:
    """The tensor's values in float32, [out, in]."""
    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise UserError(
            f"{path}: the tensor {tensor.name} is quantised as {tensor.tensor_type.name}, which cannot be read"
        ) from None


def split_rotary_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head from rotary pairs (0, 0', 1, 1', …) to halves (0, 1, …, 0', 1', …).

    `weight` is [heads * head_dim, in]; the values are a copy.
    """
    rows, cols = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(weight.shape)
