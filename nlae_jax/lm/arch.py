"""What a decoder-only language model looks like: one frozen dataclass, read from an HF `config.json`.

A family is a function from that file's fields to an `Arch`, entered in `FAMILIES`. Differences between
families are data here, so that the transformer has no branches on a family's name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nlae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """`rope_type: llama3`: long wavelengths are stretched by `factor`, short ones kept, the rest interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class Arch:
    """Shape and constants of one decoder-only transformer. `num_layers` blocks, counted from 0."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Rope | None = None
    tied_head: bool = True
    family: str = "llama"

    def truncated(self, num_layers: int) -> Arch:
        """The same model with its first `num_layers` blocks only."""
        return dataclasses.replace(self, num_layers=num_layers)


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter: its shape, and the logical name of each axis (`mesh.py` maps those to devices).

    `fan_in` sets the standard deviation of a random initialisation, `fan_in ** -0.5`; 0 means all ones.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fan_in: int = 0


def block_weights(arch: Arch) -> dict[str, Weight]:
    """The weights of all blocks, stacked on a leading axis of length `num_layers`; matrices are [in, out]."""
    heads, kv_heads = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    matrices = {
        "q": (arch.d_model, heads, "embed", "heads"),
        "k": (arch.d_model, kv_heads, "embed", "kv_heads"),
        "v": (arch.d_model, kv_heads, "embed", "kv_heads"),
        "o": (heads, arch.d_model, "heads", "embed"),
        "gate": (arch.d_model, arch.d_ff, "embed", "mlp"),
        "up": (arch.d_model, arch.d_ff, "embed", "mlp"),
        "down": (arch.d_ff, arch.d_model, "mlp", "embed"),
    }
    weights = {
        name: Weight((arch.num_layers, rows, cols), ("layers", row_axis, col_axis), fan_in=rows)
        for name, (rows, cols, row_axis, col_axis) in matrices.items()
    }
    for norm in ("attn_norm", "mlp_norm"):
        weights[norm] = Weight((arch.num_layers, arch.d_model), ("layers", "norm"))
    return weights


def model_weights(arch: Arch) -> dict[str, Any]:
    """Every weight of the model: `embed` [V, d], `blocks`, `final_norm` [d] and, if untied, `head` [V, d]."""
    vocab = Weight((arch.vocab_size, arch.d_model), ("vocab", "embed"), fan_in=arch.d_model)
    weights: dict[str, Any] = {
        "embed": vocab,
        "blocks": block_weights(arch),
        "final_norm": Weight((arch.d_model,), ("norm",)),
    }
    if not arch.tied_head:
        weights["head"] = vocab
    return weights


# Fields of config.json that change the maths but are accepted only at these values.
_LLAMA_FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "pretraining_tp": (1, None),
    "is_llama_config": (True, None),
    "partial_rotary_factor": (1.0, 1, None),
    "sliding_window": (None,),
}


def _require(config: dict[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise UserError(f"config.json: the field {key!r} is missing")
    return config[key]


def _rope(config: dict[str, Any]) -> tuple[float, Llama3Rope | None]:
    """RoPE base and scaling; transformers 5 keeps both in `rope_parameters`, earlier versions side by side."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "llama3":
        return theta, Llama3Rope(
            factor=float(_require(parameters, "factor")),
            low_freq_factor=float(_require(parameters, "low_freq_factor")),
            high_freq_factor=float(_require(parameters, "high_freq_factor")),
            original_max_positions=int(_require(parameters, "original_max_position_embeddings")),
        )
    raise UserError(f"config.json: rope_type {kind!r} is not supported; default and llama3 are")


def _llama(config: dict[str, Any]) -> Arch:
    for key, allowed in _LLAMA_FIXED.items():
        if config.get(key) not in allowed and key in config:
            raise UserError(f"config.json: {key} = {config[key]!r} is not supported for model_type llama")
    theta, scaling = _rope(config)
    heads = int(_require(config, "num_attention_heads"))
    d_model = int(_require(config, "hidden_size"))
    return Arch(
        vocab_size=int(_require(config, "vocab_size")),
        d_model=d_model,
        num_layers=int(_require(config, "num_hidden_layers")),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or d_model // heads),
        d_ff=int(_require(config, "intermediate_size")),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_head=bool(config.get("tie_word_embeddings", False)),
        family="llama",
    )


FAMILIES: dict[str, Callable[[dict[str, Any]], Arch]] = {"llama": _llama}


def arch_from_hf(config: dict[str, Any]) -> Arch:
    """The architecture that an HF `config.json` describes. Raises UserError for one we do not run."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"config.json: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    try:
        arch = FAMILIES[family](config)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"config.json: a size or constant is not a sensible number ({error})") from None
    if arch.num_kv_heads < 1 or arch.num_heads % arch.num_kv_heads:
        raise UserError(
            f"config.json: num_attention_heads = {arch.num_heads} should be a multiple of "
            f"num_key_value_heads = {arch.num_kv_heads}"
        )
    return arch


def read_arch(directory: Path) -> Arch:
    """`arch_from_hf` of the `config.json` in a model directory."""
    return arch_from_hf(read_hf_config(directory))


def read_hf_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a model directory as a dict. Raises UserError if it is missing or not JSON."""
    path = Path(directory) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory}: no config.json there; a model directory in the HF layout has one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def hf_config(arch: Arch) -> dict[str, Any]:
    """The `config.json` fields of an architecture: the inverse of `arch_from_hf`."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": arch.family,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.d_model,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.d_ff,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": arch.tied_head,
    }
    if arch.rope_scaling is not None:
        scaling = arch.rope_scaling
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return config
