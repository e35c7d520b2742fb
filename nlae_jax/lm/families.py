"""Model families: an HF `config.json` read as an `Arch`, field by field.

A family is a function from the file's fields to an `Arch`, entered in `FAMILIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nlae_jax.lm.arch import Arch, LinearRope, Llama3Rope
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted, read_json

# Fields of any config.json that do not touch the maths of a forward pass in evaluation.
_NO_MATHS = frozenset(
    [
        *("_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "_sliding_window_pattern"),
        *("architectures", "attention_dropout", "attn_implementation", "auto_map", "boi_token_index", "bos_token_id"),
        *("cache_implementation", "do_sample", "dtype", "eoi_token_index", "eos_token_id", "id2label"),
        *("initializer_range", "label2id", "length_penalty", "max_length", "max_new_tokens", "max_position_embeddings"),
        *("max_sequence_length", "model_max_length", "model_type", "num_beam_groups", "num_beams"),
        *("num_return_sequences", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp"),
        *("problem_type", "pruned_heads", "repetition_penalty", "return_dict", "sep_token_id", "sliding_window_size"),
        *("temperature", "tokenizer_class", "tokenizer_model_max_length", "top_k", "top_p", "torch_dtype"),
        *("transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version"),
        *("use_cache", "use_return_dict"),
    ]
)

# Those that `_common` reads.
_COMMON = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
)

# What transformers takes where a family's config.json has no such field (null is another matter: it means none).
# Published files leave such fields out: Gemma 3's `text_config` holds little more than what differs.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    "gemma2": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "tie_word_embeddings": True,
    },
    "smollm3": {
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    "olmo2": {"rms_norm_eps": 1e-5},
}


class _Fields:
    """A config.json that is read field by field: one that nobody has asked for, and that may matter, is refused."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.family = str(config.get("model_type"))
        self.config = _DEFAULTS.get(self.family, {}) | config
        self._read = {*_COMMON, *_DEFAULTS.get(self.family, {})}

    def get(self, key: str, absent: Any = None) -> Any:
        """The field; `absent` where it is null, or missing without a default of the family."""
        self._read.add(key)
        value = self.config.get(key)
        return absent if value is None else value

    def need(self, key: str, absent: Any = None) -> Any:
        """As `get`. Raises UserError where there is no such field and nothing to take in its place."""
        value = self.get(key, absent)
        return _required(self.config, key) if value is None else value

    def size(self, key: str, absent: int | None = None, least: int = 1) -> int:
        """A whole number that is needed. Raises ValueError for one without sense."""
        return _whole(key, self.need(key, absent), least)

    def number(self, key: str, absent: float | None = None) -> float:
        """A number that is needed and not negative, likewise."""
        return _number(key, self.need(key, absent))

    def flag(self, key: str) -> bool:
        """A switch, off where it is null or missing. Raises ValueError for "false", which would count as on."""
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise ValueError(f"{key} = {quoted(value)} should be true or false")
        return value

    def items(self, key: str) -> list[Any]:
        """A list, empty where it is null or missing."""
        value = self.get(key, [])
        if not isinstance(value, list):
            raise ValueError(f"{key} = {quoted(value)} should be a list")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """An object, empty where it is null or missing."""
        return _table(key, self.get(key, {}))

    def only(self, key: str, *allowed: Any) -> None:
        """Raises UserError where the field is there with another value; null and missing will do."""
        if (value := self.get(key)) is not None and value not in allowed:
            raise UserError(f"config.json: {key} = {quoted(value)} is not supported for model_type {self.family}")

    def pass_over(self, key: str) -> None:
        """The field is known, and this family does not read it."""
        self._read.add(key)

    def finish(self) -> None:
        for key, value in self.config.items():
            if key not in self._read and key not in _NO_MATHS and value not in (None, False, {}, []):
                raise UserError(
                    f"config.json: the field {quoted(key)} is not known for model_type {self.family}; it may change "
                    "the maths"
                )


def _required(parameters: dict[str, Any], key: str) -> Any:
    if parameters.get(key) is None:
        raise UserError(f"config.json: the field {key!r} is missing")
    return parameters[key]


# What no model comes near to. Beyond it a size is a mistake, and lists of that length would fill the memory.
_MOST = {"vocab_size": 1 << 24, "num_hidden_layers": 1 << 12, "intermediate_size": 1 << 24, "sliding_window": 1 << 30}


def _whole(key: str, value: Any, least: int = 1) -> int:
    most = _MOST.get(key, 1 << 20)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most or value != int(value):
        raise ValueError(f"{key} = {quoted(value)} should be a whole number from {least} to {most}")
    return int(value)


def _number(key: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ValueError(f"{key} = {quoted(value)} should be a number that is not negative")
    return float(value)


def _table(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} = {quoted(value)} should be an object")
    return value


def _rope(parameters: dict[str, Any], default_theta: float) -> tuple[float, Llama3Rope | LinearRope | None]:
    """RoPE base and scaling from one set of `rope_parameters`."""
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError("config.json: a partial_rotary_factor other than 1 is not supported")
    theta = _number("rope_theta", parameters.get("rope_theta") or default_theta)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    constant = lambda key: _number(key, _required(parameters, key))  # noqa: E731
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRope(constant("factor"))
    if kind == "llama3":
        return theta, Llama3Rope(
            factor=constant("factor"),
            low_freq_factor=constant("low_freq_factor"),
            high_freq_factor=constant("high_freq_factor"),
            original_max_positions=int(constant("original_max_position_embeddings")),
        )
    raise UserError(f"config.json: rope_type {quoted(kind)} is not supported; default, linear and llama3 are")


def _common(fields: _Fields) -> dict[str, Any]:
    """What every family has: sizes, RoPE (transformers 5 keeps it in `rope_parameters`), a tied head or not."""
    fields.only("partial_rotary_factor", 1.0)
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    parameters = fields.table(name)
    if "full_attention" in parameters:  # one set per kind of block
        parameters = _table(f"{name}.full_attention", parameters["full_attention"])
    theta, scaling = _rope(parameters, fields.number("rope_theta", 10_000.0))
    heads, d_model = fields.size("num_attention_heads"), fields.size("hidden_size")
    return {
        "vocab_size": fields.size("vocab_size"),
        "d_model": d_model,
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.size("num_key_value_heads", heads, least=0),
        "head_dim": fields.size("head_dim", 0, least=0) or d_model // heads,
        "d_ff": fields.size("intermediate_size"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tied_head": fields.flag("tie_word_embeddings"),
        "family": fields.family,
    }


def _biases(fields: _Fields) -> tuple[str, ...]:
    """Linear layers with a bias, by the two flags that Llama and its relatives have."""
    attention = ("q", "k", "v", "o") if fields.flag("attention_bias") else ()
    return attention + (("gate", "up", "down") if fields.flag("mlp_bias") else ())


def _sliding(fields: _Fields, otherwise: Sequence[bool]) -> list[bool]:
    """Which blocks have a window, by `layer_types` if it is there."""
    kinds = fields.items("layer_types")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(f"config.json: layer_types {quoted(kind)} is not supported")
    return [kind == "sliding_attention" for kind in kinds] or list(otherwise)


def _windows(fields: _Fields, sliding: Sequence[bool]) -> tuple[int, ...]:
    """Per block its window: `sliding_window` where it slides, none where that is null."""
    size = fields.size("sliding_window", 0, least=0)
    return tuple(size if one else 0 for one in sliding) if size and any(sliding) else ()


def _llama(fields: _Fields) -> Arch:
    fields.only("hidden_act", "silu")
    fields.only("rope_interleaved", False)
    fields.only("is_llama_config", True)
    fields.only("sliding_window")
    fields.only("layer_types", ["full_attention"] * fields.size("num_hidden_layers"))
    return Arch(**_common(fields), biases=_biases(fields))


def _mistral(fields: _Fields) -> Arch:
    fields.only("hidden_act", "silu")
    common = _common(fields)
    return Arch(**common, windows=_windows(fields, _sliding(fields, [True] * common["num_layers"])))


def _qwen2(fields: _Fields) -> Arch:
    fields.only("use_mrope", False)
    fields.pass_over("attention_bias")  # transformers does: queries, keys and values always have one
    return _qwen(fields, biases=("q", "k", "v"))


def _qwen3(fields: _Fields) -> Arch:
    return _qwen(fields, biases=_biases(fields), qk_norm="head")


def _qwen(fields: _Fields, **differences: Any) -> Arch:
    fields.only("hidden_act", "silu")
    common = _common(fields)
    first = fields.size("max_window_layers", 28, least=0)
    upper = [number >= first for number in range(common["num_layers"])]
    windows = _windows(fields, _sliding(fields, upper))
    return Arch(**common, **differences, windows=windows if fields.flag("use_sliding_window") else ())


def _smollm3(fields: _Fields) -> Arch:
    fields.only("hidden_act", "silu")
    fields.pass_over("max_window_layers")
    common = _common(fields)
    interval = fields.size("no_rope_layer_interval", 4)
    by_interval = [(number + 1) % interval != 0 for number in range(common["num_layers"])]
    turned = [bool(on) for on in fields.items("no_rope_layers") or by_interval][: common["num_layers"]]
    windows = _windows(fields, _sliding(fields, [not on for on in turned]))
    return Arch(
        **common,
        biases=_biases(fields),
        ropes=tuple("global" if on else "none" for on in turned),
        windows=windows if fields.flag("use_sliding_window") else (),
    )


def _olmo2(fields: _Fields) -> Arch:
    fields.only("hidden_act", "silu")
    return Arch(**_common(fields), biases=_biases(fields), qk_norm="all", pre_norms=False, post_norms=True)


def _gemma2(fields: _Fields) -> Arch:
    sliding = _sliding(fields, [number % 2 == 0 for number in range(fields.size("num_hidden_layers"))])
    softcap = fields.number("attn_logit_softcapping", 0.0)
    return _gemma(fields, attention_softcap=softcap, windows=_windows(fields, sliding))


def _gemma3(fields: _Fields) -> Arch:
    fields.only("attn_logit_softcapping")
    pattern = fields.size("sliding_window_pattern", 6)
    layers = range(fields.size("num_hidden_layers"))
    sliding = _sliding(fields, [(number + 1) % pattern != 0 for number in layers])
    parameters = fields.table("rope_parameters").get("sliding_attention") or {}
    parameters = _table("rope_parameters.sliding_attention", parameters)
    theta, scaling = _rope(parameters, fields.number("rope_local_base_freq", 10_000.0))
    if scaling is not None:
        raise UserError("config.json: a scaled rope of sliding_attention is not supported")
    return _gemma(
        fields,
        qk_norm="head",
        local_rope_theta=theta,
        ropes=tuple("local" if one else "global" for one in sliding),
        windows=_windows(fields, sliding),
    )


def _gemma(fields: _Fields, **differences: Any) -> Arch:
    fields.only("hidden_act", "gelu_pytorch_tanh")
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    fields.only("attention_bias", False)
    fields.only("use_bidirectional_attention", False)
    common = _common(fields)
    return Arch(
        **common,
        **differences,
        activation="gelu_tanh",
        post_norms=True,
        norm_offset=1.0,
        embed_scale=common["d_model"] ** 0.5,
        attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
        logit_softcap=fields.number("final_logit_softcapping", 0.0),
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


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """An HF `config.json` without its vision tower: that of the language model alone."""
    if config.get("model_type") != "gemma3":
        return config
    text = _required(config, "text_config")
    if not isinstance(text, dict):
        raise UserError("config.json: text_config should be an object")
    tied = {"tie_word_embeddings": config.get("tie_word_embeddings", True)}
    return tied | text | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}


def arch_from_hf(config: dict[str, Any]) -> Arch:
    """The architecture that an HF `config.json` describes. Raises UserError for one we do not run."""
    config = language_config(config)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"config.json: model_type {quoted(family)} is not supported; supported: {', '.join(FAMILIES)}")
    try:
        fields = _Fields(config)
        arch = FAMILIES[family](fields)
        fields.finish()
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"config.json: a size or constant is not a sensible number ({error})") from None
    if arch.num_kv_heads < 1 or arch.num_heads % arch.num_kv_heads:
        raise UserError(
            f"config.json: num_attention_heads = {arch.num_heads} should be a multiple of "
            f"num_key_value_heads = {arch.num_kv_heads}"
        )
    if {len(arch.ropes), len(arch.windows)} - {0, arch.num_layers}:
        raise UserError(f"config.json: layer_types should name each of the {arch.num_layers} blocks, and no more")
    return arch


def read_arch(directory: Path) -> Arch:
    """`arch_from_hf` of the `config.json` in a model directory."""
    config = read_hf_config(directory)
    try:
        arch = arch_from_hf(config)
        if arch.head_dim % 2 or not arch.head_dim:
            raise UserError(f"config.json: head_dim = {arch.head_dim} should be even and above 0: RoPE turns pairs")
    except UserError as error:
        raise UserError(f"{directory}/{error}") from None
    return arch


def read_hf_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a model directory. Raises UserError if it is missing or not a JSON object."""
    try:
        return read_json(Path(directory) / "config.json")
    except FileNotFoundError:
        raise UserError(f"{directory}: no config.json there; a model directory in the HF layout has one") from None


def hf_config(arch: Arch) -> dict[str, Any]:
    """The `config.json` fields of `arch`: the inverse of `arch_from_hf`.

    Raises ValueError for what no config.json of its family says.
    """
    transformers_class, written = _WRITTEN.get(arch.family, ("", ()))
    config = {
        "architectures": [transformers_class],
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
        "tie_word_embeddings": arch.tied_head,
    }
    own = _own_fields(arch)
    config |= {key: own[key] for key in written}
    if isinstance(scaling := arch.rope_scaling, LinearRope):
        config["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Rope):
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


# The class in transformers, and which of `_own_fields` the family's config.json has.
_WINDOW = ("use_sliding_window", "sliding_window", "layer_types")
_GEMMA = ("hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping", "sliding_window", "layer_types")
_WRITTEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("LlamaForCausalLM", ("hidden_act", "attention_bias", "mlp_bias")),
    "mistral": ("MistralForCausalLM", ("hidden_act", "sliding_window")),
    "qwen2": ("Qwen2ForCausalLM", ("hidden_act", *_WINDOW)),
    "qwen3": ("Qwen3ForCausalLM", ("hidden_act", "attention_bias", *_WINDOW)),
    "gemma2": ("Gemma2ForCausalLM", (*_GEMMA, "attn_logit_softcapping")),
    "gemma3_text": ("Gemma3ForCausalLM", (*_GEMMA, "rope_local_base_freq")),
    "smollm3": ("SmolLM3ForCausalLM", ("hidden_act", "attention_bias", "mlp_bias", "no_rope_layers", *_WINDOW)),
    "olmo2": ("Olmo2ForCausalLM", ("hidden_act", "attention_bias")),
}


def _own_fields(arch: Arch) -> dict[str, Any]:
    """The fields that only some families have, each as this `arch` would have it."""
    blocks = range(arch.num_layers)
    local = [bool(arch.windows and arch.windows[n]) or bool(arch.ropes and arch.ropes[n] == "local") for n in blocks]
    # Off by a rounding error, because the Arch holds its inverse square root.
    query_scalar = round(arch.attention_scale**-2, 6) if arch.attention_scale else float(arch.head_dim)
    return {
        "hidden_act": "silu",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": "o" in arch.biases,
        "mlp_bias": "gate" in arch.biases,
        "use_sliding_window": bool(arch.windows),
        "sliding_window": max(arch.windows, default=0) or None,
        "layer_types": ["sliding_attention" if one else "full_attention" for one in local],
        "no_rope_layers": [int(rope != "none") for rope in arch.ropes],
        "query_pre_attn_scalar": int(query_scalar) if query_scalar.is_integer() else query_scalar,
        "attn_logit_softcapping": arch.attention_softcap or None,
        "final_logit_softcapping": arch.logit_softcap or None,
        "rope_local_base_freq": arch.local_rope_theta,
    }
