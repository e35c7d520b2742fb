"""Writes the fields of a family's `config.json` from an `Arch`: the inverse of the readers."""

from __future__ import annotations

import dataclasses
from typing import Any

from nlae_jax.lm.arch import Arch, ClampedGate, DeltaNet, Experts, GlobalAttention
from nlae_jax.lm.rope_fields import written_rope


@dataclasses.dataclass(frozen=True)
class Written:
    """How a family's config.json is written.

    `transformers_class` is the family's class in transformers, `fields` are the keys of `own_fields` that its
    config.json has, and `lacks` the common fields that it lacks. If families write a field in several ways, its key is
    the field's name, a slash and the way.
    """

    transformers_class: str
    fields: tuple[str, ...]
    lacks: tuple[str, ...] = ()


_WINDOW = ("use_sliding_window", "sliding_window", "layer_types")
# Families whose class in transformers makes a mask of the window even where no block has one.
_ALWAYS_WINDOW = ("sliding_window/always", "layer_types")
_GEMMA = ("hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping", *_ALWAYS_WINDOW)
_GEMMA4 = (
    *("hidden_activation", "final_logit_softcapping", "sliding_window/always", "layer_types/global"),
    *(
        "attention_k_eq_v",
        "global_head_dim",
        "num_global_key_value_heads",
        "per_layer_config",
        "rope_parameters/global",
    ),
)
_GRANITE = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
_DELTA = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    "linear_conv_kernel_dim",
)
_QWEN3_5 = (
    *("hidden_act", "attention_bias", "layer_types/mixers", "rope_parameters", "partial_rotary_factor"),
    *_DELTA,
    "use_cache",
)
_ROUTED = ("num_experts", "num_experts_per_tok", "norm_topk_prob")
WRITTEN: dict[str, Written] = {
    "llama": Written("LlamaForCausalLM", ("hidden_act", "attention_bias", "mlp_bias")),
    "mistral": Written("MistralForCausalLM", ("hidden_act", "sliding_window")),
    "qwen2": Written("Qwen2ForCausalLM", ("hidden_act", *_WINDOW)),
    "qwen3": Written("Qwen3ForCausalLM", ("hidden_act", "attention_bias", *_WINDOW)),
    "gemma2": Written("Gemma2ForCausalLM", (*_GEMMA, "attn_logit_softcapping")),
    "gemma3_text": Written("Gemma3ForCausalLM", (*_GEMMA, "rope_local_base_freq")),
    "gemma4_text": Written(
        "Gemma4ForCausalLM",
        (
            *(*_GEMMA4, "hidden_size_per_layer_input", "enable_moe_block", "num_experts", "num_experts_per_tok"),
            *("moe_intermediate_size", "intermediate_size/shared"),
        ),
        ("rope_theta",),
    ),
    "gemma4_unified_text": Written("Gemma4UnifiedForCausalLM", _GEMMA4, ("rope_theta",)),
    "smollm3": Written("SmolLM3ForCausalLM", ("hidden_act", "attention_bias", "mlp_bias", "no_rope_layers", *_WINDOW)),
    "olmo2": Written("Olmo2ForCausalLM", ("hidden_act", "attention_bias")),
    "gpt2": Written(
        "GPT2LMHeadModel",
        ("hidden_act", "n_positions", "scale_attn_weights"),
        ("num_key_value_heads", "head_dim", "rope_theta"),
    ),
    "gpt_neox": Written(
        "GPTNeoXForCausalLM",
        ("hidden_act", "attention_bias", "use_parallel_residual", "partial_rotary_factor"),
        ("num_key_value_heads", "head_dim"),
    ),
    "olmo3": Written(
        "Olmo3ForCausalLM",
        ("hidden_act", "attention_bias", *_ALWAYS_WINDOW, "rope_parameters/kinds"),
        ("rope_theta",),
    ),
    "ministral": Written("MinistralForCausalLM", ("hidden_act", *_ALWAYS_WINDOW)),
    "ministral3": Written(
        "Ministral3ForCausalLM", ("hidden_act", "sliding_window", "rope_parameters/growing"), ("rope_theta",)
    ),
    "phi3": Written(
        "Phi3ForCausalLM", ("hidden_act", "sliding_window", "partial_rotary_factor", "original_max_position_embeddings")
    ),
    "granite": Written("GraniteForCausalLM", ("hidden_act", "attention_bias", "mlp_bias", *_GRANITE)),
    "granitemoehybrid": Written(
        "GraniteMoeHybridForCausalLM",
        (
            "hidden_act",
            "attention_bias",
            "layer_types",
            "num_local_experts",
            "position_embedding_type",
            "mamba_n_heads",
            *_GRANITE,
        ),
    ),
    "qwen3_moe": Written("Qwen3MoeForCausalLM", ("hidden_act", "attention_bias", *_WINDOW[:2], *_ROUTED)),
    "olmoe": Written("OlmoeForCausalLM", ("hidden_act", "attention_bias", "clip_qkv", *_ROUTED), ("head_dim",)),
    "gpt_oss": Written(
        "GptOssForCausalLM",
        (
            *("hidden_act", "attention_bias", *_ALWAYS_WINDOW, "swiglu_alpha", "swiglu_limit"),
            *("num_local_experts", "num_experts_per_tok", "rope_scaling/always"),
        ),
    ),
    "qwen3_5_text": Written("Qwen3_5ForCausalLM", _QWEN3_5, ("rope_theta",)),
    "qwen3_5_moe_text": Written(
        "Qwen3_5MoeForCausalLM",
        (*_QWEN3_5, "shared_expert_intermediate_size", "num_experts", "num_experts_per_tok"),
        ("rope_theta",),
    ),
}

_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}  # other activations have our names
_MIXERS = {"attention": "full_attention", "delta": "linear_attention"}


def own_fields(arch: Arch) -> dict[str, Any]:
    """Returns the fields that only some families have, with the values of this `arch`, by the keys of `Written`."""
    blocks = range(arch.num_layers)
    local = [bool(arch.windows and arch.windows[n]) or bool(arch.ropes and arch.ropes[n] == "local") for n in blocks]
    # Rounded, because the Arch holds the inverse square root.
    query_scalar = round(arch.attention_scale**-2, 6) if arch.attention_scale else float(arch.head_dim)
    experts, clamped = arch.experts or Experts(0, 0), arch.clamped_gate or ClampedGate(0.0, 0.0)
    delta, wide = arch.delta or DeltaNet(0, 0, 0, 0), arch.global_attention or GlobalAttention(1, 1, 1.0, 0)
    wide_heads = {"head_dim": wide.head_dim, "num_key_value_heads": wide.num_kv_heads}
    return {
        "hidden_act": _ACTIVATIONS.get(arch.activation, arch.activation),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": "o" in arch.biases,
        "mlp_bias": "gate" in arch.biases,
        "use_sliding_window": bool(arch.windows),
        "sliding_window": max(arch.windows, default=0) or None,
        "sliding_window/always": max(arch.windows, default=None if any(local) else 512),
        "layer_types": ["sliding_attention" if is_local else "full_attention" for is_local in local],
        "layer_types/mixers": [_MIXERS.get(mixer) for mixer in arch.mixers],
        "layer_types/global": ["full_attention" if mixer == "global" else "sliding_attention" for mixer in arch.mixers],
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": wide.keys_are_values,
        "global_head_dim": wide.head_dim,
        "num_global_key_value_heads": wide.num_kv_heads if wide.keys_are_values else None,
        # transformers reads this field; other programs read the two fields before it.
        "per_layer_config": by_block({n: wide_heads for n, mixer in enumerate(arch.mixers) if mixer == "global"}),
        "rope_parameters/global": {
            "sliding_attention": {"rope_type": "default", "rope_theta": arch.rope_theta},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": wide.rope_theta,
                "partial_rotary_factor": part_of(2 * wide.turned_pairs, wide.head_dim),
                **({"factor": wide.rope_factor} if wide.rope_factor != 1.0 else {}),
            },
        },
        "no_rope_layers": [int(rope != "none") for rope in arch.ropes],
        "query_pre_attn_scalar": int(query_scalar) if query_scalar.is_integer() else query_scalar,
        "attn_logit_softcapping": arch.attention_softcap or None,
        "final_logit_softcapping": arch.logit_softcap or None,
        "rope_local_base_freq": arch.local_rope_theta,
        "n_positions": arch.positions,
        "scale_attn_weights": arch.attention_scale == 0.0,
        "use_parallel_residual": arch.parallel,
        "partial_rotary_factor": _part(arch),
        "original_max_position_embeddings": arch.most_tokens or 4096,
        "position_embedding_type": "nope" if arch.rotary_dim == 0 else "rope",
        "rope_scaling/always": written_rope(arch.rope_scaling) or {"rope_type": "default"},
        "rope_parameters": _rope_parameters(arch),
        # transformers needs both fields also where queries do not grow. The second number then changes nothing.
        "rope_parameters/growing": {"original_max_position_embeddings": 16_384}
        | _rope_parameters(arch)
        | _query_growth(arch),
        "rope_parameters/kinds": {
            "full_attention": _rope_parameters(arch),
            "sliding_attention": {"rope_type": "default", "rope_theta": arch.local_rope_theta or arch.rope_theta},
        },
        "mamba_n_heads": 1,  # no block uses it, but transformers checks that the sizes of heads fit
        "embedding_multiplier": arch.embed_scale,
        "residual_multiplier": arch.residual_scale,
        "attention_multiplier": arch.attention_scale,
        "logits_scaling": arch.logit_divisor,
        "clip_qkv": arch.clip_qkv or None,
        "enable_moe_block": experts.apart,
        "moe_intermediate_size": arch.d_ff if experts.count else None,
        "intermediate_size/shared": experts.shared or arch.d_ff,
        "num_experts": experts.count or None,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token or None,
        "norm_topk_prob": experts.normalised,
        "shared_expert_intermediate_size": experts.shared,
        "swiglu_alpha": clamped.alpha,
        "swiglu_limit": clamped.limit,
        "linear_num_key_heads": delta.key_heads,
        "linear_num_value_heads": delta.value_heads,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.width,
        "use_cache": "attention" in arch.mixers,  # without keys, transformers cannot tell the length of a cache
    }


def _part(arch: Arch) -> float:
    """Returns `partial_rotary_factor`. transformers multiplies it with the head's size and rounds down."""
    return part_of(arch.head_dim if arch.rotary_dim is None else arch.rotary_dim, arch.head_dim)


def part_of(turned: int, head_dim: int) -> float:
    """Returns the share of a head that RoPE turns, from which transformers computes `turned` dimensions again."""
    part = turned / head_dim
    return part if int(head_dim * part) == turned else (turned + 0.5) / head_dim


def by_block(per_layer: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns `per_layer_config` as transformers writes it: numbers of blocks with as many digits as the largest."""
    digits = len(str(max(per_layer, default=0)))
    return {str(block).zfill(digits): fields for block, fields in per_layer.items()}


def _rope_parameters(arch: Arch) -> dict[str, Any]:
    return {"rope_theta": arch.rope_theta, **(written_rope(arch.rope_scaling) or {"rope_type": "default"})}


def _query_growth(arch: Arch) -> dict[str, Any]:
    if arch.query_growth is None:
        return {"llama_4_scaling_beta": 0.0}
    return {
        "llama_4_scaling_beta": arch.query_growth.beta,
        "original_max_position_embeddings": arch.query_growth.every,
    }
