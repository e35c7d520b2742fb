"""Trained adapters as small directories in the layout of the PEFT library, beside the base model that they need.

A role's directory holds `adapter_config.json`, `adapter_model.safetensors` and the sidecar, a decoder's also
`value_head.safetensors`. `peft.PeftModel.from_pretrained` loads an encoder's onto the base model.
"""

from __future__ import annotations

import dataclasses
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nlae_jax.lm.arch import Arch
from nlae_jax.lm.lora import adapter_weights
from nlae_jax.lm.tensors import TensorToWrite, read_tensors, write_safetensors
from nlae_jax.lm.weights import hf_name
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import read_bytes, write_json
from nlae_jax.runtime.outside import parse_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """The adapters of one directory: `base_model` is the name of the model they sit on, `alpha / rank` their scale."""

    directory: Path
    base_model: str
    rank: int
    alpha: float

    def read(self, arch: Arch) -> dict[str, dict[str, jax.Array]]:
        """The tree of `lora.adapter_weights(arch, rank)`, float32. `arch` has as many blocks as the adapters."""
        tree = adapter_weights(arch, self.rank)
        shapes = {}
        for name, pair in tree.items():
            for layer in range(arch.num_layers):
                for part, (_, rank, width) in ((part, weight.shape) for part, weight in pair.items()):
                    # PEFT's lora_A is [rank, in], as our `a`; its lora_B is [out, rank], the transpose of our `b`.
                    shapes[_tensor_name(arch, name, layer, part)] = (rank, width) if part == "a" else (width, rank)
        tensors = read_tensors(self.directory / WEIGHTS, shapes)

        def stacked(name: str, part: str) -> jax.Array:
            layers = [tensors[_tensor_name(arch, name, layer, part)] for layer in range(arch.num_layers)]
            return jnp.stack(layers if part == "a" else [layer.T for layer in layers])

        return {name: {part: stacked(name, part) for part in ("a", "b")} for name in tree}

    @property
    def identity(self) -> str:
        """A hash of the files: tells these adapters from others."""
        digest = hashlib.sha256()
        for path in sorted(self.directory.glob("*.safetensors")):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()


def has_adapters(directory: Path) -> bool:
    """Whether a directory holds adapters rather than a whole model."""
    return (directory / CONFIG).is_file()


def open_adapters(directory: Path) -> AdapterFile:
    """Reads `adapter_config.json`. Raises UserError naming the field that is missing or not supported."""
    path = directory / CONFIG
    content = parse_json(read_bytes(path), path, dict)
    rank, alpha, base_model = (content.get(name) for name in ("r", "lora_alpha", "base_model_name_or_path"))
    if content.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {content.get('peft_type')!r} should be LORA")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= 65_536:
        raise UserError(f"{path}: r {rank!r} should be a whole number above 0")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not alpha > 0:
        raise UserError(f"{path}: lora_alpha {alpha!r} should be a number above 0")
    if not isinstance(base_model, str) or not base_model:
        raise UserError(
            f"{path}: base_model_name_or_path {base_model!r} should name the model that the adapters sit on"
        )
    for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if content.get(name):
            raise UserError(f"{path}: {name} is not supported; it should be false")
    return AdapterFile(directory, base_model, rank, float(alpha))


def write_adapters(
    directory: Path, arch: Arch, adapters: dict[str, Any], alpha: float, base_model: str, dtype: str = "bfloat16"
) -> None:
    """Writes `adapters` (of as many blocks as `arch` has) into `directory`, which exists."""
    rank = next(iter(adapters.values()))["a"].shape[1]
    tensors = []
    for name, pair in adapters.items():
        for layer in range(arch.num_layers):
            for part in ("a", "b"):
                values = np.asarray(pair[part][layer])
                values = values if part == "a" else values.T
                tensors.append(
                    TensorToWrite(_tensor_name(arch, name, layer, part), values.shape, partial(np.asarray, values))
                )
    write_safetensors(directory / WEIGHTS, tensors, dtype)
    modules = sorted({hf_name(arch, name).removesuffix(".weight").rpartition(".")[2] for name in adapters})
    write_json(
        directory / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": modules,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )


def _tensor_name(arch: Arch, name: str, layer: int, part: str) -> str:
    module = hf_name(arch, name, layer).removesuffix(".weight")
    return f"{_PREFIX}{module}.lora_{part.upper()}.weight"
