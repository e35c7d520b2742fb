"""What a decoder-only language model looks like: one frozen dataclass, read from an HF `config.json`.

A family is a function from that file's fields to an `Arch`, entered in `FAMILIES`. Differences between
families are data here, so that the transformer has no branches on a family's name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
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
class LinearRope:
    """`rope_type: linear`: all wavelengths are stretched by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Arch:
    """Shape and constants of one decoder-only transformer. `num_layers` blocks, counted from 0.

    What sets the families apart is here, as data; the defaults are Llama's.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Rope | LinearRope | None = None  # of global rope
    tied_head: bool = True
    family: str = "llama"
    activation: str = "silu"  # of the gate; or "gelu_tanh"
    biases: tuple[str, ...] = ()  # linear layers that have one
    qk_norm: str = ""  # RMS norm of queries and keys: "head" (each head by itself) or "all" (all heads as one vector)
    pre_norms: bool = True  # norms of what attention and MLP read
    post_norms: bool = False  # norms of what they add to the residual stream
    norm_offset: float = 0.0  # added to the weights of all norms
    embed_scale: float = 1.0  # embeddings are multiplied by it
    attention_scale: float = 0.0  # of scores; 0: head_dim ** -0.5
    attention_softcap: float = 0.0  # scores pass through cap · tanh(score / cap); 0: not
    logit_softcap: float = 0.0  # and so do logits
    local_rope_theta: float = 0.0  # RoPE base of blocks whose rope is "local"
    ropes: tuple[str, ...] = ()  # per block: "global", "local" or "none"; empty: all global
    windows: tuple[int, ...] = ()  # per block: how many keys a query sees, itself included, 0: all; empty: all 0

    def truncated(self, num_layers: int) -> Arch:
        """The same model with its first `num_layers` blocks only."""
        return dataclasses.replace(
            self, num_layers=num_layers, ropes=self.ropes[:num_layers], windows=self.windows[:num_layers]
        )


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
    for name in arch.biases:
        _, cols, _, col_axis = matrices[name]
        weights[f"{name}_bias"] = Weight((arch.num_layers, cols), ("layers", col_axis))
    pre, post = ("attn_norm", "mlp_norm"), ("attn_post_norm", "mlp_post_norm")
    for norm in (*(pre if arch.pre_norms else ()), *(post if arch.post_norms else ())):
        weights[norm] = Weight((arch.num_layers, arch.d_model), ("layers", "norm"))
    if arch.qk_norm:
        whole = arch.qk_norm == "all"
        for name, width in (("q_norm", heads), ("k_norm", kv_heads)):
            weights[name] = Weight((arch.num_layers, width if whole else arch.head_dim), ("layers", "norm"))
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


# Fields of any config.json that do not touch the maths of a forward pass in evaluation.
_NO_MATHS = frozenset(
    [
        *("_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "_sliding_window_pattern"),
        *("architectures", "attention_dropout", "attn_implementation", "auto_map", "boi_token_index", "bos_token_id"),
        *("cache_implementation", "dtype", "eoi_token_index", "eos_token_id", "id2label", "initializer_range"),
        *("label2id", "max_length", "max_position_embeddings", "model_type", "output_attentions"),
        *("output_hidden_states", "pad_token_id", "problem_type", "return_dict", "sep_token_id", "tokenizer_class"),
        *("torch_dtype", "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version"),
        *("use_cache", "use_return_dict"),
    ]
)

# Those that `_common` reads.
_COMMON = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
)


class _Fields:
    """A config.json that is read field by field: one that nobody has asked for, and that may matter, is refused."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.family = config, config.get("model_type")
        self._read = set(_COMMON)

    def get(self, key: str, default: Any = None) -> Any:
        """The field, or the default where it is missing or null."""
        self._read.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def require(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise UserError(f"config.json: the field {key!r} is missing")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Raises UserError where the field is there with another value; null and missing will do."""
        if (value := self.get(key)) is not None and value not in allowed:
            raise UserError(f"config.json: {key} = {value!r} is not supported for model_type {self.family}")

    def finish(self) -> None:
        for key, value in self.config.items():
            if key not in self._read and key not in _NO_MATHS and value not in (None, False):
                raise UserError(
                    f"config.json: the field {key!r} is not known for model_type {self.family}; it may change the maths"
                )


def _rope(parameters: dict[str, Any], default_theta: float) -> tuple[float, Llama3Rope | LinearRope | None]:
    """RoPE base and scaling from one set of `rope_parameters`."""
    theta = float(parameters.get("rope_theta") or default_theta)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRope(float(_required(parameters, "factor")))
    if kind == "llama3":
        return theta, Llama3Rope(
            factor=float(_required(parameters, "factor")),
            low_freq_factor=float(_required(parameters, "low_freq_factor")),
            high_freq_factor=float(_required(parameters, "high_freq_factor")),
            original_max_positions=int(_required(parameters, "original_max_position_embeddings")),
        )
    raise UserError(f"config.json: rope_type {kind!r} is not supported; default, linear and llama3 are")


def _required(parameters: dict[str, Any], key: str) -> Any:
    if parameters.get(key) is None:
        raise UserError(f"config.json: the field {key!r} is missing")
    return parameters[key]


def _common(fields: _Fields, theta: float = 10_000.0, tied: bool = False) -> dict[str, Any]:
    """What every family has: sizes, RoPE (transformers 5 keeps it in `rope_parameters`), a tied head or not."""
    get, require = fields.get, fields.require
    fields.only("partial_rotary_factor", 1.0)
    parameters = get("rope_parameters") or get("rope_scaling") or {}
    if "full_attention" in parameters:  # one set per kind of block
        parameters = parameters["full_attention"]
    theta, scaling = _rope(parameters, float(get("rope_theta", theta)))
    heads, d_model = int(require("num_attention_heads")), int(require("hidden_size"))
    return {
        "vocab_size": int(require("vocab_size")),
        "d_model": d_model,
        "num_layers": int(require("num_hidden_layers")),
        "num_heads": heads,
        "num_kv_heads": int(get("num_key_value_heads", heads)),
        "head_dim": int(get("head_dim") or d_model // heads),
        "d_ff": int(require("intermediate_size")),
        "norm_eps": float(get("rms_norm_eps", 1e-6)),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tied_head": bool(get("tie_word_embeddings", tied)),
        "family": fields.family,
    }


def _windows(fields: _Fields, sliding: Sequence[bool], default: int | None = None) -> tuple[int, ...]:
    """Per block its window; `layer_types`, where it is there, says which blocks have one instead of `sliding`."""
    size = int(fields.get("sliding_window", default) or 0)
    if kinds := fields.get("layer_types"):
        if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
            raise UserError(f"config.json: layer_types {min(unknown)!r} is not supported")
        sliding = [kind == "sliding_attention" for kind in kinds]
    return tuple(size if one else 0 for one in sliding) if size and any(sliding) else ()


def _llama(fields: _Fields) -> Arch:
    fields.only("hidden_act", "silu")
    fields.only("rope_interleaved", False)
    fields.only("pretraining_tp", 1)
    fields.only("is_llama_config", True)
    fields.only("sliding_window")
    biases = ("q", "k", "v", "o") if fields.get("attention_bias", False) else ()
    biases += ("gate", "up", "down") if fields.get("mlp_bias", False) else ()
    return Arch(**_common(fields), biases=biases)


def _mistral(fields: _Fields) -> Arch:
    fields.only("hidden_act", "silu")
    common = _common(fields)
    return Arch(
        **common,
        windows=_windows(
            fields, [True] * common["num_layers"], default=4096 if "sliding_window" not in fields.config else None
        ),
    )


def _qwen(fields: _Fields, **differences: Any) -> Arch:
    fields.only("hidden_act", "silu")
    common = _common(fields)
    first = int(fields.get("max_window_layers", 28))
    sliding = [number >= first for number in range(common["num_layers"])]
    if not fields.get("use_sliding_window", False):
        fields.get("sliding_window"), fields.get("layer_types")
        return Arch(**common, **differences)
    return Arch(**common, **differences, windows=_windows(fields, sliding, default=4096))


def _qwen2(fields: _Fields) -> Arch:
    fields.only("use_mrope", False)
    return _qwen(fields, biases=("q", "k", "v"))


def _qwen3(fields: _Fields) -> Arch:
    biases = ("q", "k", "v", "o") if fields.get("attention_bias", False) else ()
    return _qwen(fields, biases=biases, qk_norm="head")


def _smollm3(fields: _Fields) -> Arch:
    fields.only("hidden_act", "silu")
    fields.only("pretraining_tp", 1)
    common = _common(fields, theta=2_000_000.0, tied=True)
    interval = int(fields.get("no_rope_layer_interval", 4))
    default = [int((number + 1) % interval != 0) for number in range(common["num_layers"])]
    ropes = tuple("global" if on else "none" for on in fields.get("no_rope_layers", default))
    biases = ("q", "k", "v", "o") if fields.get("attention_bias", False) else ()
    biases += ("gate", "up", "down") if fields.get("mlp_bias", False) else ()
    windows: tuple[int, ...] = ()
    if fields.get("use_sliding_window", False):
        windows = _windows(fields, [rope == "none" for rope in ropes])
    fields.get("sliding_window"), fields.get("layer_types"), fields.get("max_window_layers")
    return Arch(**common, biases=biases, ropes=ropes, windows=windows)


def _olmo2(fields: _Fields) -> Arch:
    fields.only("hidden_act", "silu")
    biases = ("q", "k", "v", "o") if fields.get("attention_bias", False) else ()
    return Arch(**_common(fields), biases=biases, qk_norm="all", pre_norms=False, post_norms=True)


def _gemma(fields: _Fields, sliding: Sequence[bool], window: int, **differences: Any) -> Arch:
    fields.only("hidden_act", "gelu_pytorch_tanh")
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    fields.only("attention_bias", False)
    fields.only("use_bidirectional_attention", False)
    common = _common(fields, tied=True) | differences
    return Arch(
        **common,
        activation="gelu_tanh",
        post_norms=True,
        norm_offset=1.0,
        embed_scale=common["d_model"] ** 0.5,
        attention_scale=float(fields.get("query_pre_attn_scalar", 256)) ** -0.5,
        attention_softcap=float(fields.get("attn_logit_softcapping", 0.0)),
        logit_softcap=float(fields.get("final_logit_softcapping", 0.0)),
        windows=_windows(fields, sliding, default=window),
    )


def _gemma2(fields: _Fields) -> Arch:
    layers = int(fields.require("num_hidden_layers"))
    head_dim = int(fields.get("head_dim", 256))
    arch = _gemma(fields, [number % 2 == 0 for number in range(layers)], 4096, head_dim=head_dim)
    return arch


def _gemma3(fields: _Fields) -> Arch:
    layers = int(fields.require("num_hidden_layers"))
    pattern = int(fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6)))
    sliding = [(number + 1) % pattern != 0 for number in range(layers)]
    if kinds := fields.get("layer_types"):
        sliding = [kind == "sliding_attention" for kind in kinds]
    by_kind = fields.get("rope_parameters") or {}
    local = (by_kind.get("sliding_attention") or {}).get("rope_theta", fields.get("rope_local_base_freq", 10_000.0))
    theta = {} if by_kind or fields.get("rope_theta") else {"rope_theta": 1_000_000.0}
    return _gemma(
        fields,
        sliding,
        4096,
        head_dim=int(fields.get("head_dim", 256)),
        qk_norm="head",
        local_rope_theta=float(local),
        ropes=tuple("local" if one else "global" for one in sliding),
        **theta,
    )


FAMILIES: dict[str, Callable[[_Fields], Arch]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
}


def arch_from_hf(config: dict[str, Any]) -> Arch:
    """The architecture that an HF `config.json` describes. Raises UserError for one we do not run."""
    if config.get("model_type") == "gemma3":  # with a vision tower: its language model alone
        config = {"tie_word_embeddings": True, **_required(config, "text_config"), "model_type": "gemma3_text"}
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"config.json: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    fields = _Fields(config)
    try:
        arch = FAMILIES[family](fields)
        fields.finish()
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
    """The `config.json` fields of a Llama: the inverse of `arch_from_hf`. Raises ValueError for what is none."""
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
    if isinstance(scaling := arch.rope_scaling, Llama3Rope):
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    if arch_from_hf(config) != arch:
        raise ValueError(f"the config.json of this {arch.family} cannot be written: {arch}")
    return config
