"""Checkpoints of random values in the HF layout, and what loading them should give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from nlae_jax.config import MeshConfig
from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.layout import hf_name
from nlae_jax.mesh import make_mesh, tree_shardings

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def drawn(arch: Arch, stored: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint under its HF name, in the file's dtype."""
    rng, flat, made = np.random.default_rng(seed), flattened(model_weights(arch)), {}
    for name, weight in flat.items():
        shape = weight.shape if name in ("embed", "head", "final_norm") else weight.shape[1:]
        for layer in range(1 if shape is weight.shape else arch.num_layers):
            shape_there = shape[::-1] if name in MATRICES else shape
            made[hf_name(arch, name, layer)] = rng.normal(size=shape_there).astype(DTYPES[stored])
    return made


def flattened(tree: Any) -> dict[str, Any]:
    """A tree of parameters without the level of the blocks."""
    return {**{name: leaf for name, leaf in tree.items() if name != "blocks"}, **tree["blocks"]}


def put_together(arch: Arch, weights: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Our parameters, flat, by way of whole arrays."""
    made = {}
    for name in flattened(model_weights(arch)):
        if name in ("embed", "head", "final_norm"):
            made[name] = weights[hf_name(arch, name)].astype(dtype)
        else:
            layers = [weights[hf_name(arch, name, layer)] for layer in range(arch.num_layers)]
            made[name] = np.stack([layer.T if name in MATRICES else layer for layer in layers]).astype(dtype)
    return made


def save_index(directory: Path, shards: list[dict[str, np.ndarray]]) -> None:
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def save_shards(directory: Path, weights: dict[str, np.ndarray], count: int) -> None:
    """In files by turns, so that tensors that belong together are in different ones."""
    save_index(directory, [{name: weights[name] for name in list(weights)[part::count]} for part in range(count)])


def write_config(directory: Path, arch: Arch) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.d_model,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.d_ff,
        "rms_norm_eps": arch.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": arch.tied_head,
    }
    (directory / "config.json").write_text(json.dumps(config))


def shardings_on(arch: Arch, sizes: tuple[int, int, int]) -> Any:
    return tree_shardings(make_mesh(MeshConfig(*sizes)), model_weights(arch))
