"""Readers of model families: each makes an `Arch` from the fields of its family's `config.json`.

This file has the families whose blocks are attention and one MLP; `mixed_readers.py` has the others.
"""

from __future__ import annotations

from typing import Any

from nlae_jax.lm.arch import Arch, QueryGrowth
from nlae_jax.lm.common_fields import (
    attention_biases,
    biases_of,
    block_kinds,
    common_fields,
    local_theta,
    one_window,
    rope_parameters,
    sliding_blocks,
    windows_of,
)
from nlae_jax.lm.fields import Fields, number, whole
from nlae_jax.lm.rope_fields import long_rope
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted

# By their names in transformers. The first three name the same approximation.
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}


def llama(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    fields.only("rope_interleaved", False)
    fields.only("is_llama_config", True)
    fields.only("sliding_window")
    fields.only("layer_types", ["full_attention"] * fields.size("num_hidden_layers"))
    return Arch(**common_fields(fields), biases=biases_of(fields))


def mistral(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    return Arch(**common_fields(fields), windows=one_window(fields))


def qwen2(fields: Fields) -> Arch:
    fields.only("use_mrope", False)
    fields.pass_over("attention_bias")  # as in transformers: queries, keys and values always have a bias
    return _qwen(fields, biases=("q", "k", "v"))


def qwen3(fields: Fields) -> Arch:
    return _qwen(fields, biases=attention_biases(fields), qk_norm="head")


def _qwen(fields: Fields, **differences: Any) -> Arch:
    fields.only("hidden_act", "silu")
    common = common_fields(fields)
    first = fields.size("max_window_layers", 28, least=0)
    upper = [number >= first for number in range(common["num_layers"])]
    on = fields.flag("use_sliding_window")
    sliding = sliding_blocks(fields, upper if on else [False] * common["num_layers"])
    if any(sliding) and not on:  # transformers fails there
        raise UserError("config.json: use_sliding_window should be true where layer_types has sliding_attention")
    return Arch(**common, **differences, windows=windows_of(fields, sliding))


def smollm3(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    fields.pass_over("max_window_layers")
    common = common_fields(fields)
    interval = fields.size("no_rope_layer_interval", 4)
    by_interval = [(number + 1) % interval != 0 for number in range(common["num_layers"])]
    with_rope = [bool(flag) for flag in fields.items("no_rope_layers") or by_interval][: common["num_layers"]]
    if len(with_rope) < common["num_layers"]:
        raise UserError(f"config.json: no_rope_layers should have a number for each of the {len(by_interval)} blocks")
    windows = windows_of(fields, sliding_blocks(fields, [not flag for flag in with_rope]))
    # As transformers masks: the switch decides only where layer_types does not.
    has_windows = fields.flag("use_sliding_window") or bool(fields.items("layer_types"))
    return Arch(
        **common,
        biases=biases_of(fields),
        ropes=tuple("global" if flag else "none" for flag in with_rope),
        windows=windows if has_windows else (),
    )


def olmo2(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    biases = attention_biases(fields)
    return Arch(**common_fields(fields), biases=biases, qk_norm="all", pre_norms=False, post_norms=True)


def gemma2(fields: Fields) -> Arch:
    sliding = sliding_blocks(fields, [number % 2 == 0 for number in range(fields.size("num_hidden_layers"))])
    softcap = fields.number("attn_logit_softcapping", 0.0)
    return _gemma(fields, attention_softcap=softcap, windows=windows_of(fields, sliding))


def gemma3(fields: Fields) -> Arch:
    fields.only("attn_logit_softcapping")
    pattern = fields.size("sliding_window_pattern", 6)
    layers = range(fields.size("num_hidden_layers"))
    sliding = sliding_blocks(fields, [(number + 1) % pattern != 0 for number in layers])
    return _gemma(
        fields,
        qk_norm="head",
        local_rope_theta=local_theta(fields, fields.number("rope_local_base_freq", 10_000.0)),
        ropes=tuple("local" if slides else "global" for slides in sliding),
        windows=windows_of(fields, sliding),
    )


def _gemma(fields: Fields, **differences: Any) -> Arch:
    fields.only("hidden_act", "gelu_pytorch_tanh")
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    fields.only("attention_bias", False)
    fields.only("use_bidirectional_attention", False)
    common = common_fields(fields)
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


def gpt2(fields: Fields) -> Arch:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        fields.only(name, False)
    fields.pass_over("reorder_and_upcast_attn")  # another order of the same operations
    if fields.get("intermediate_size") is None:
        fields.config["n_inner"] = 4 * fields.size("hidden_size")
    common = common_fields(fields) | {"rope_theta": Arch.rope_theta, "rope_scaling": None, "rotary_dim": 0}
    return Arch(
        **common,
        **_classic(fields),
        biases=("q", "k", "v", "o", "up", "down"),
        positions=fields.size("n_positions"),
        attention_scale=0.0 if fields.flag("scale_attn_weights") else 1.0,
    )


def gpt_neox(fields: Fields) -> Arch:
    biases = (*attention_biases(fields), "up", "down")
    parallel = fields.flag("use_parallel_residual")
    common = common_fields(fields, partial=True)
    return Arch(**common, **_classic(fields), biases=biases, parallel=parallel)


def _classic(fields: Fields) -> dict[str, Any]:
    """Returns the fields that GPT-2 and GPT-NeoX share: layer norms, an MLP without gate, its activation."""
    fields.only("hidden_act", *_ACTIVATIONS)
    return {"layer_norm": True, "gated": False, "activation": _ACTIVATIONS[fields.need("hidden_act")]}


def olmo3(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    common = common_fields(fields, default_theta=500_000.0)
    sliding = sliding_blocks(fields, [(number + 1) % 4 != 0 for number in range(common["num_layers"])])
    local = local_theta(fields, 500_000.0)
    alike = common["rope_scaling"] is None and common["rope_theta"] == local
    return Arch(
        **common,
        biases=attention_biases(fields),
        qk_norm="all",
        pre_norms=False,
        post_norms=True,
        local_rope_theta=0.0 if alike else local,
        ropes=() if alike else tuple("local" if slides else "global" for slides in sliding),
        windows=windows_of(fields, sliding),
    )


def ministral(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    common = common_fields(fields)
    return Arch(**common, windows=windows_of(fields, sliding_blocks(fields, [True] * common["num_layers"])))


def ministral3(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    if fields.get("rope_parameters") is None and not fields.get("rope_scaling"):
        fields.config["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16_384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    common, parameters = common_fields(fields), rope_parameters(fields)
    original = parameters.get("original_max_position_embeddings") or fields.get("max_position_embeddings")
    beta = parameters.get("llama_4_scaling_beta")
    return Arch(
        **common,
        windows=one_window(fields),
        query_growth=QueryGrowth(
            number("llama_4_scaling_beta", beta), whole("original_max_position_embeddings", original)
        )
        if beta
        else None,
    )


def phi3(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    for name in ("full_attn_mod", "interpolate_factor"):  # of Phi-4-mini's own code; transformers reads neither
        fields.only(name, 1)
    original = fields.size("original_max_position_embeddings", 4096)
    parameters = rope_parameters(fields)
    if (kind := parameters.get("rope_type") or parameters.get("type")) in (None, "default"):
        common = common_fields(fields, partial=True)
    elif kind in ("longrope", "su", "yarn"):  # transformers reads all three as longrope in this family
        fields.config |= {"rope_scaling": None, "rope_parameters": {**parameters, "rope_type": "default"}}
        common = common_fields(fields, partial=True)
        turned = common["head_dim"] if common["rotary_dim"] is None else common["rotary_dim"]
        context = fields.size("max_position_embeddings", 4096)
        common["rope_scaling"] = long_rope(parameters, (turned + 1) // 2, original, context)
    else:
        raise UserError(f"config.json: rope_type {quoted(kind)} is not supported for phi3; default and longrope are")
    return Arch(**common, windows=windows_of(fields, [True] * common["num_layers"]))


def granite(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    return Arch(**common_fields(fields), **_multipliers(fields), biases=biases_of(fields))


def _multipliers(fields: Fields) -> dict[str, Any]:
    scale = fields.number("attention_multiplier", 1.0)
    if scale == 0:
        raise ValueError("attention_multiplier = 0 should be above 0")  # in `Arch`, 0 is the usual scale
    return {
        "embed_scale": fields.number("embedding_multiplier", 1.0),
        "residual_scale": fields.number("residual_multiplier", 1.0),
        "attention_scale": scale,
        "logit_divisor": fields.number("logits_scaling", 1.0),
    }


def granitemoehybrid(fields: Fields) -> Arch:
    """Reads Granite 4.0's dense models. Those with experts or state-space blocks are refused."""
    fields.only("hidden_act", "silu")
    fields.only("normalization_function", "rmsnorm")
    if not block_kinds(fields, "attention", "full_attention"):
        raise UserError("config.json: the field 'layer_types' is missing; it should be attention for each block")
    if fields.size("num_local_experts", 8, least=0):
        raise UserError("config.json: num_local_experts above 0 is not supported for model_type granitemoehybrid")
    for key in ("num_experts_per_tok", "time_step_limit", "intermediate_size"):
        fields.pass_over(key)
    for key in fields.config:
        if key.startswith("mamba_"):
            fields.pass_over(key)
    common, kind = common_fields(fields), fields.get("position_embedding_type")
    fields.only("position_embedding_type", "rope", "nope")
    turning = {} if kind == "rope" else {"rope_theta": Arch.rope_theta, "rope_scaling": None, "rotary_dim": 0}
    return Arch(**common | turning, **_multipliers(fields), biases=attention_biases(fields))
