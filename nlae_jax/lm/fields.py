"""Reads an HF `config.json` field by field. Fields that are unknown or make no sense are refused by name."""

from __future__ import annotations

from typing import Any

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import fits_float32, quoted

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
        *("attn_pdrop", "classifier_dropout", "embd_pdrop", "hidden_dropout", "is_decoder", "n_ctx", "resid_pdrop"),
        *("initial_context_length", "output_router_logits", "router_aux_loss_coef", "summary_activation"),
        *(
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
            "task_specific_params",
        ),
        *("_num_labels", "custom_pipelines", "gradient_checkpointing", "init_method", "n_special", "num_labels"),
        *("model_name", "num_steps", "output_past", "predict_special_tokens", "torchscript"),
    ]
)

# Fields that `common_fields` reads.
_COMMON = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
)

# The values that transformers uses for fields that a family's config.json lacks; null means that there is no value.
# Published files leave out fields: Gemma 3's `text_config` has few fields beside those that differ from these.
DEFAULTS: dict[str, dict[str, Any]] = {
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
    "gemma4_text": {
        "vocab_size": 262_144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_size_per_layer_input": 256,
        "sliding_window": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "smollm3": {
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    "olmo2": {"rms_norm_eps": 1e-5},
    "gpt2": {
        "vocab_size": 50_257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "attention_bias": True,
    },
    "olmo3": {"rms_norm_eps": 1e-5, "sliding_window": 4096},
    "ministral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "ministral3": {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5},
    "phi3": {"rms_norm_eps": 1e-5},
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
    },
    "olmoe": {"rms_norm_eps": 1e-5, "num_experts_per_tok": 8},
    "qwen3_5_text": {
        "vocab_size": 248_320,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "partial_rotary_factor": 0.25,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
    "gpt_oss": {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "attention_bias": True,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "num_experts_per_tok": 4,
    },
}

DEFAULTS["gemma4_unified_text"] = DEFAULTS["gemma4_text"] | {"hidden_size_per_layer_input": 0, "sliding_window": 1024}
DEFAULTS["qwen3_5_moe_text"] = {
    **{key: value for key, value in DEFAULTS["qwen3_5_text"].items() if key != "intermediate_size"},
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
}

# Names of fields in the families that call them differently.
NAMES: dict[str, dict[str, str]] = {
    "gemma4_text": {"num_experts_per_tok": "top_k_experts"},
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
    "gpt_neox": {
        "rms_norm_eps": "layer_norm_eps",
        "rope_theta": "rotary_emb_base",
        "partial_rotary_factor": "rotary_pct",
    },
    "qwen3_moe": {"intermediate_size": "moe_intermediate_size"},
    "qwen3_5_moe_text": {"intermediate_size": "moe_intermediate_size"},
    "granitemoehybrid": {"intermediate_size": "shared_intermediate_size"},
}

# Other names that transformers knows fields by. Where a file has both, it takes the value of this one.
_ALIASES: dict[str, dict[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    "granitemoehybrid": {"layers_block_type": "layer_types"},
}


class Fields:
    """A config.json that is read field by field. `finish` refuses unread fields that may change the maths."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.family = str(config.get("model_type"))
        self.names = NAMES.get(self.family, {})
        aliases = _ALIASES.get(self.family, {})
        renamed = {name: config[alias] for alias, name in aliases.items() if alias in config}
        given = {key: value for key, value in config.items() if key not in aliases}
        self.config = DEFAULTS.get(self.family, {}) | given | renamed
        self._read = {*_COMMON, *self.names.values(), *DEFAULTS.get(self.family, {})}

    def get(self, key: str, absent: Any = None) -> Any:
        """Returns a field by its usual name, or `absent` if it is null, or is missing and the family has no default."""
        key = self.names.get(key, key)
        self._read.add(key)
        value = self.config.get(key)
        return absent if value is None else value

    def need(self, key: str, absent: Any = None) -> Any:
        """Does what `get` does. Raises UserError if the result would be None."""
        value = self.get(key, absent)
        return required(self.config, self.names.get(key, key)) if value is None else value

    def size(self, key: str, absent: int | None = None, least: int = 1) -> int:
        """Returns a required whole number. Raises ValueError if it is below `least` or too large for any model."""
        return whole(key, self.need(key, absent), least)

    def number(self, key: str, absent: float | None = None) -> float:
        """Returns a required number. Raises ValueError if the function `number` refuses it."""
        return number(key, self.need(key, absent))

    def flag(self, key: str) -> bool:
        """Returns a switch, which is off if it is null or missing. Raises ValueError for text such as "false"."""
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise ValueError(f"{key} = {quoted(value)} should be true or false")
        return value

    def items(self, key: str) -> list[Any]:
        """Returns a list, which is empty if the field is null or missing."""
        value = self.get(key, [])
        if not isinstance(value, list):
            raise ValueError(f"{key} = {quoted(value)} should be a list")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """Returns an object, which is empty if the field is null or missing."""
        return table(key, self.get(key, {}))

    def only(self, key: str, *allowed: Any) -> None:
        """Raises UserError if the field has a value that is not allowed. It may be null or missing."""
        if (value := self.get(key)) is not None and value not in allowed:
            right = " or ".join(map(quoted, allowed)) or "null"
            raise UserError(
                f"config.json: {key} = {quoted(value)} is not supported for model_type {self.family}; "
                f"it should be {right}"
            )

    def pass_over(self, key: str) -> None:
        """Marks a field as known. The family does not use it."""
        self._read.add(key)

    def finish(self) -> None:
        """Raises UserError for a field that was not read and may change the maths."""
        for key, value in self.config.items():
            if key not in self._read and key not in _NO_MATHS and value not in (None, False, {}, []):
                raise UserError(
                    f"config.json: the field {quoted(key)} is not known for model_type {self.family}; it may change "
                    "the maths"
                )


def required(parameters: dict[str, Any], key: str) -> Any:
    """Returns the value of a field. Raises UserError if it is missing or null."""
    if parameters.get(key) is None:
        raise UserError(f"config.json: the field {key!r} is missing")
    return parameters[key]


# Upper bounds that no model comes near to. A larger size is a mistake, and lists of that length would fill the memory.
_MOST = {"vocab_size": 1 << 24, "num_hidden_layers": 1 << 12, "intermediate_size": 1 << 24, "sliding_window": 1 << 30}


def whole(key: str, value: Any, least: int = 1) -> int:
    """Checks that a value is a whole number from `least` to the field's upper bound. Raises ValueError if it is not."""
    most = _MOST.get(key, 1 << 20)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most or value != int(value):
        raise ValueError(f"{key} = {quoted(value)} should be a whole number from {least} to {most}")
    return int(value)


# Numbers that something is divided by, or that are raised to a negative power: 0 would give infinity and NaN.
_LEAST = dict.fromkeys(("rope_theta", "rope_local_base_freq"), 1.0) | dict.fromkeys(
    (
        *("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"),
        *("query_pre_attn_scalar", "logits_scaling", "swiglu_alpha", "swiglu_limit"),
    ),
    1e-6,
)


def number(key: str, value: Any) -> float:
    """Checks that float32 can hold a number, and that it is at least the field's lower bound, which is 0 for most.

    Raises ValueError if it is not.
    """
    number, least = isinstance(value, int | float) and not isinstance(value, bool), _LEAST.get(key, 0)
    if not number or not value >= least or not fits_float32(value):
        raise ValueError(f"{key} = {quoted(value)} should be a number from {least:g} on that float32 can hold")
    return float(value)


def table(key: str, value: Any) -> dict[str, Any]:
    """Checks that a value is a JSON object. Raises ValueError if it is not."""
    if not isinstance(value, dict):
        raise ValueError(f"{key} = {quoted(value)} should be an object")
    return value
