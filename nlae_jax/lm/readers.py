"""One reader per model family: the fields of its `config.json` as an `Arch`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from nlae_jax.lm.arch import Arch, ClampedGate, DeltaNet, Experts, GlobalAttention, QueryGrowth, YarnRope
from nlae_jax.lm.fields import Fields, number, table, whole
from nlae_jax.lm.rope_fields import long_rope, proportional_rope, rope_of, turned_of, whole_heads_turn
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted

# By the names of transformers. All of the first three are one approximation.
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}


_MIXERS = {"full_attention": "attention", "linear_attention": "delta"}


def _common(fields: Fields, default_theta: float = 10_000.0, partial: bool = False) -> dict[str, Any]:
    """What every family has: sizes, RoPE (transformers 5 keeps it in `rope_parameters`), a tied head or not.

    `partial`: transformers lets a part of each head turn in this family; others should not say so.
    """
    parameters = _rope_parameters(fields)
    context = fields.get("max_position_embeddings")
    theta, scaling = rope_of(parameters, fields.number("rope_theta", default_theta), context)
    heads, d_model = fields.size("num_attention_heads"), fields.size("hidden_size")
    head_dim = fields.size("head_dim", 0, least=0) or d_model // heads
    turned = head_dim
    if partial:
        turned = turned_of(parameters, fields.number("partial_rotary_factor", 1.0), head_dim)
    else:
        fields.only("partial_rotary_factor", 1.0)
        whole_heads_turn(parameters)
    return {
        "vocab_size": fields.size("vocab_size"),
        "d_model": d_model,
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.size("num_key_value_heads", heads, least=0),
        "head_dim": head_dim,
        "d_ff": fields.size("intermediate_size"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rotary_dim": None if turned == head_dim else turned,
        "tied_head": fields.flag("tie_word_embeddings"),
        "family": fields.family,
    }


def _rope_parameters(fields: Fields, kind: str = "full_attention") -> dict[str, Any]:
    """Those of one kind of block, where each has a set of its own; else those of all."""
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    parameters = fields.table(name)
    if "full_attention" not in parameters and "sliding_attention" not in parameters:
        return parameters if kind == "full_attention" else {}
    # transformers looks for `truncate` beside the sets.
    truncate = {"truncate": parameters.get("truncate", True)}
    return table(f"{name}.{kind}", parameters.get(kind) or {}) | truncate


def _local_theta(fields: Fields, otherwise: float) -> float:
    """The RoPE base of sliding blocks."""
    theta, scaling = rope_of(_rope_parameters(fields, "sliding_attention"), otherwise)
    if scaling is not None:
        raise UserError("config.json: a scaled rope of sliding_attention is not supported")
    return theta


def _biases(fields: Fields) -> tuple[str, ...]:
    """Linear layers with a bias, by the two flags that Llama and its relatives have."""
    attention = ("q", "k", "v", "o") if fields.flag("attention_bias") else ()
    return attention + (("gate", "up", "down") if fields.flag("mlp_bias") else ())


def _sliding(fields: Fields, otherwise: Sequence[bool]) -> list[bool]:
    """Which blocks have a window, by `layer_types` if it is there."""
    kinds = fields.items("layer_types")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(f"config.json: layer_types {quoted(kind)} is not supported")
    return [kind == "sliding_attention" for kind in kinds] or list(otherwise)


def _windows(fields: Fields, sliding: Sequence[bool]) -> tuple[int, ...]:
    """Per block its window: `sliding_window` where it slides, none where that is null."""
    size = fields.size("sliding_window", 0, least=0)
    return tuple(size if one else 0 for one in sliding) if size and any(sliding) else ()


def llama(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    fields.only("rope_interleaved", False)
    fields.only("is_llama_config", True)
    fields.only("sliding_window")
    fields.only("layer_types", ["full_attention"] * fields.size("num_hidden_layers"))
    return Arch(**_common(fields), biases=_biases(fields))


def mistral(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    common = _common(fields)
    return Arch(**common, windows=_windows(fields, _sliding(fields, [True] * common["num_layers"])))


def qwen2(fields: Fields) -> Arch:
    fields.only("use_mrope", False)
    fields.pass_over("attention_bias")  # transformers does: queries, keys and values always have one
    return _qwen(fields, biases=("q", "k", "v"))


def qwen3(fields: Fields) -> Arch:
    return _qwen(fields, biases=_biases(fields), qk_norm="head")


def _qwen(fields: Fields, **differences: Any) -> Arch:
    fields.only("hidden_act", "silu")
    common = _common(fields)
    first = fields.size("max_window_layers", 28, least=0)
    upper = [number >= first for number in range(common["num_layers"])]
    windows = _windows(fields, _sliding(fields, upper))
    return Arch(**common, **differences, windows=windows if fields.flag("use_sliding_window") else ())


def smollm3(fields: Fields) -> Arch:
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


def olmo2(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    return Arch(**_common(fields), biases=_biases(fields), qk_norm="all", pre_norms=False, post_norms=True)


def gemma2(fields: Fields) -> Arch:
    sliding = _sliding(fields, [number % 2 == 0 for number in range(fields.size("num_hidden_layers"))])
    softcap = fields.number("attn_logit_softcapping", 0.0)
    return _gemma(fields, attention_softcap=softcap, windows=_windows(fields, sliding))


def gemma3(fields: Fields) -> Arch:
    fields.only("attn_logit_softcapping")
    pattern = fields.size("sliding_window_pattern", 6)
    layers = range(fields.size("num_hidden_layers"))
    sliding = _sliding(fields, [(number + 1) % pattern != 0 for number in layers])
    return _gemma(
        fields,
        qk_norm="head",
        local_rope_theta=_local_theta(fields, fields.number("rope_local_base_freq", 10_000.0)),
        ropes=tuple("local" if one else "global" for one in sliding),
        windows=_windows(fields, sliding),
    )


def _gemma(fields: Fields, **differences: Any) -> Arch:
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


def gemma4(fields: Fields) -> Arch:
    """The dense ones, whose blocks without a window have heads of another size."""
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    fields.only("attention_bias", False)
    fields.only("use_bidirectional_attention", False, "vision")  # among an image's tokens
    fields.only("enable_moe_block", False)
    fields.only("num_kv_shared_layers", 0)
    for key in ("vocab_size_per_layer_input", "use_double_wide_mlp"):  # nothing without what is refused here
        fields.pass_over(key)
    if fields.size("hidden_size_per_layer_input", 0, least=0):
        raise UserError("config.json: hidden_size_per_layer_input, as Gemma 4 E2B and E4B have it, is not supported")
    count, d_model = fields.size("num_hidden_layers"), fields.size("hidden_size")
    sliding = _sliding(fields, [(block + 1) % 6 != 0 for block in range(count)])
    sliding[-1] = False  # as transformers has it, whatever the file says
    theta, scaling = rope_of(_rope_parameters(fields, "sliding_attention"), 10_000.0)
    if scaling is not None:
        raise UserError("config.json: a scaled rope of sliding_attention is not supported")
    return Arch(
        vocab_size=fields.size("vocab_size"),
        d_model=d_model,
        num_layers=count,
        num_heads=fields.size("num_attention_heads"),
        num_kv_heads=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim"),
        d_ff=fields.size("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps"),
        rope_theta=theta,
        tied_head=fields.flag("tie_word_embeddings"),
        family=fields.family,
        activation="gelu_tanh",
        qk_norm="head",
        post_norms=True,
        embed_scale=d_model**0.5,
        attention_scale=1.0,
        logit_softcap=fields.number("final_logit_softcapping", 0.0),
        windows=_windows(fields, sliding),
        mixers=tuple("attention" if one else "global" for one in sliding),
        global_attention=_global_attention(fields, sliding),
        value_norm=True,
        layer_scales=True,
    )


def _global_attention(fields: Fields, sliding: Sequence[bool]) -> GlobalAttention:
    """Attention of the blocks that have no window."""
    keys_are_values = fields.flag("attention_k_eq_v")
    kv_heads, head_dim = _global_heads(fields, sliding, keys_are_values)
    if fields.size("num_attention_heads") % kv_heads or head_dim % 2:
        raise ValueError(
            f"global_head_dim = {head_dim} should be even, and num_attention_heads a multiple of "
            f"num_global_key_value_heads = {kv_heads}"
        )
    theta, pairs, factor = proportional_rope(_rope_parameters(fields), 1_000_000.0, head_dim)
    return GlobalAttention(kv_heads, head_dim, theta, pairs, factor, keys_are_values)


def _global_heads(fields: Fields, sliding: Sequence[bool], keys_are_values: bool) -> tuple[int, int]:
    """Their heads of keys and values, and a head's size, by `per_layer_config`, as transformers saves them.

    Published files have two fields instead, of which transformers reads the first where keys are values only.
    """
    kv_heads, head_dim = fields.size("num_key_value_heads"), fields.size("head_dim")
    few, wide = fields.size("num_global_key_value_heads", kv_heads), fields.size("global_head_dim", 512)
    per_layer = fields.table("per_layer_config")
    if not per_layer:
        return few if keys_are_values else kv_heads, wide
    if set(per_layer) - {str(block) for block, one in enumerate(sliding) if not one}:
        raise UserError("config.json: per_layer_config of blocks that are not full_attention is not supported")
    own = {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    blocks = [str(block) for block, one in enumerate(sliding) if not one]
    heads = [own | table("per_layer_config", per_layer.get(block, {})) for block in blocks]
    if any(one != heads[0] or one.keys() != own.keys() for one in heads):
        raise UserError(
            "config.json: per_layer_config should have the same head_dim and num_key_value_heads for all "
            "full_attention blocks, and nothing else"
        )
    return whole("num_key_value_heads", heads[0]["num_key_value_heads"]), whole("head_dim", heads[0]["head_dim"])


def gpt2(fields: Fields) -> Arch:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        fields.only(name, False)
    fields.only("scale_attn_weights", True)
    fields.pass_over("reorder_and_upcast_attn")  # another order of the same operations
    if fields.get("intermediate_size") is None:
        fields.config["n_inner"] = 4 * fields.size("hidden_size")
    common = _common(fields) | {"rope_theta": Arch.rope_theta, "rope_scaling": None, "rotary_dim": 0}
    biases = ("q", "k", "v", "o", "up", "down")
    return Arch(**common, **_classic(fields), biases=biases, positions=fields.size("n_positions"))


def gpt_neox(fields: Fields) -> Arch:
    attention = ("q", "k", "v", "o") if fields.flag("attention_bias") else ()
    parallel = fields.flag("use_parallel_residual")
    common = _common(fields, partial=True)
    return Arch(**common, **_classic(fields), biases=(*attention, "up", "down"), parallel=parallel)


def _classic(fields: Fields) -> dict[str, Any]:
    """What the models before Llama share."""
    fields.only("hidden_act", *_ACTIVATIONS)
    return {"layer_norm": True, "gated": False, "activation": _ACTIVATIONS[fields.need("hidden_act")]}


def olmo3(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    common = _common(fields, default_theta=500_000.0)
    sliding = _sliding(fields, [(number + 1) % 4 != 0 for number in range(common["num_layers"])])
    if isinstance(common["rope_scaling"], YarnRope):  # where transformers looks for it there is none
        common["rope_scaling"] = dataclasses.replace(common["rope_scaling"], truncate=True)
    local = _local_theta(fields, 500_000.0)
    alike = common["rope_scaling"] is None and common["rope_theta"] == local
    return Arch(
        **common,
        biases=_biases(fields),
        qk_norm="all",
        pre_norms=False,
        post_norms=True,
        local_rope_theta=0.0 if alike else local,
        ropes=() if alike else tuple("local" if one else "global" for one in sliding),
        windows=_windows(fields, sliding),
    )


def ministral(fields: Fields) -> Arch:
    return mistral(fields)


def ministral3(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    fields.only("layer_types", ["full_attention"] * fields.size("num_hidden_layers"))
    if fields.get("rope_parameters") is None and fields.get("rope_scaling") is None:
        fields.config["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16_384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    common, parameters = _common(fields), _rope_parameters(fields)
    every = parameters.get("original_max_position_embeddings") or fields.get("max_position_embeddings")
    beta = parameters.get("llama_4_scaling_beta")
    return Arch(
        **common,
        windows=_windows(fields, [True] * common["num_layers"]),
        query_growth=QueryGrowth(number("llama_4_scaling_beta", beta), whole("original_max_position_embeddings", every))
        if beta
        else None,
    )


def phi3(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    original = fields.size("original_max_position_embeddings", 4096)
    parameters = _rope_parameters(fields)
    if (kind := parameters.get("rope_type") or parameters.get("type")) in (None, "default"):
        common = _common(fields, partial=True)
    elif kind in ("longrope", "su", "yarn"):  # transformers takes all three for the first here
        fields.config |= {"rope_scaling": None, "rope_parameters": {**parameters, "rope_type": "default"}}
        common = _common(fields, partial=True)
        turned = common["head_dim"] if common["rotary_dim"] is None else common["rotary_dim"]
        context = fields.size("max_position_embeddings", 4096)
        common["rope_scaling"] = long_rope(parameters, (turned + 1) // 2, original, context)
    else:
        raise UserError(f"config.json: rope_type {quoted(kind)} is not supported for phi3; default and longrope are")
    return Arch(**common, windows=_windows(fields, [True] * common["num_layers"]))


def granite(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    return Arch(**_common(fields), **_multipliers(fields), biases=_biases(fields))


def _multipliers(fields: Fields) -> dict[str, Any]:
    return {
        "embed_scale": fields.number("embedding_multiplier", 1.0),
        "residual_scale": fields.number("residual_multiplier", 1.0),
        "attention_scale": fields.number("attention_multiplier", 1.0),
        "logit_divisor": fields.number("logits_scaling", 1.0),
    }


def granitemoehybrid(fields: Fields) -> Arch:
    """Those without experts and state space: Granite 4.0's dense models."""
    fields.only("hidden_act", "silu")
    for kind in fields.items("layer_types") or ["mamba"]:
        if kind not in ("attention", "full_attention"):
            raise UserError(f"config.json: layer_types {quoted(kind)} is not supported; attention is")
    if fields.size("num_local_experts", 8, least=0):
        raise UserError("config.json: num_local_experts above 0 is not supported for model_type granitemoehybrid")
    for key in ("num_experts_per_tok", "time_step_limit", "intermediate_size"):
        fields.pass_over(key)
    for key in fields.config:
        if key.startswith("mamba_"):
            fields.pass_over(key)
    common, kind = _common(fields), fields.get("position_embedding_type")
    fields.only("position_embedding_type", "rope", "nope")
    biases = ("q", "k", "v", "o") if fields.flag("attention_bias") else ()
    turning = {} if kind == "rope" else {"rope_theta": Arch.rope_theta, "rope_scaling": None, "rotary_dim": 0}
    return Arch(**common | turning, **_multipliers(fields), biases=biases)


def qwen3_moe(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    fields.only("decoder_sparse_step", 1)
    fields.only("mlp_only_layers", [])
    fields.pass_over("max_window_layers")
    fields.pass_over("intermediate_size_mlp")
    common = _common(fields)
    windows = _windows(fields, [True] * common["num_layers"])
    return Arch(
        **common,
        biases=("q", "k", "v", "o") if fields.flag("attention_bias") else (),
        qk_norm="head",
        windows=windows if fields.flag("use_sliding_window") else (),
        experts=_experts(fields, fields.flag("norm_topk_prob")),
    )


def olmoe(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    return Arch(
        **_common(fields),
        biases=("q", "k", "v", "o") if fields.flag("attention_bias") else (),
        qk_norm="all",
        clip_qkv=fields.number("clip_qkv", 0.0),
        experts=_experts(fields, fields.flag("norm_topk_prob")),
    )


def gpt_oss(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    fields.pass_over("experts_per_token")  # an older name of num_experts_per_tok
    fields.pass_over("quantization_config")  # `weights` reads MXFP4, and refuses what else it does not know
    if fields.get("rope_parameters") is None and fields.get("rope_scaling") is None:
        fields.config["rope_parameters"] = {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        }
    common = _common(fields, default_theta=150_000.0)
    sliding = _sliding(fields, [number % 2 == 0 for number in range(common["num_layers"])])
    attention = ("q", "k", "v", "o") if fields.flag("attention_bias") else ()
    return Arch(
        **common,
        biases=(*attention, "router", "gate", "up", "down"),
        windows=_windows(fields, sliding),
        sinks=True,
        experts=_experts(fields, normalised=True),  # a softmax of the chosen ones' logits is that of all, normalised
        clamped_gate=ClampedGate(fields.number("swiglu_alpha"), fields.number("swiglu_limit")),
    )


def qwen3_5(fields: Fields) -> Arch:
    """Qwen 3.6's models are called so too."""
    fields.only("hidden_act", "silu")
    fields.only("attn_output_gate", True)
    fields.only("mlp_only_layers", [])
    fields.pass_over("mamba_ssm_dtype")  # the state is float32 in any case
    for key in ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"):  # of blocks that draft tokens: not run
        fields.pass_over(key)
    common, kinds = _common(fields, partial=True), fields.items("layer_types")
    interval = fields.size("full_attention_interval", 4)
    by_interval = ["linear_attention" if (n + 1) % interval else "full_attention" for n in range(common["num_layers"])]
    for kind in kinds:
        if kind not in _MIXERS:
            raise UserError(f"config.json: layer_types {quoted(kind)} is not supported")
    delta = DeltaNet(
        key_heads=fields.size("linear_num_key_heads"),
        value_heads=fields.size("linear_num_value_heads"),
        key_dim=fields.size("linear_key_head_dim"),
        value_dim=fields.size("linear_value_head_dim"),
        width=fields.size("linear_conv_kernel_dim"),
    )
    if delta.value_heads % delta.key_heads:
        raise ValueError(
            f"linear_num_value_heads = {delta.value_heads} should be a multiple of "
            f"linear_num_key_heads = {delta.key_heads}"
        )
    return Arch(
        **common,
        biases=("q", "q_gate", "k", "v", "o") if fields.flag("attention_bias") else (),
        qk_norm="head",
        norm_offset=1.0,
        attention_gate=True,
        mixers=tuple(_MIXERS[kind] for kind in kinds or by_interval),
        delta=delta,
    )


def qwen3_5_moe(fields: Fields) -> Arch:
    fields.only("decoder_sparse_step", 1)
    fields.only("norm_topk_prob", True)
    shared = fields.size("shared_expert_intermediate_size")
    return dataclasses.replace(qwen3_5(fields), experts=dataclasses.replace(_experts(fields, True), shared=shared))


def _experts(fields: Fields, normalised: bool) -> Experts:
    """transformers writes the number of experts under either name."""
    count = fields.get("num_experts")
    count = fields.size("num_local_experts") if count is None else fields.size("num_experts")
    per_token = fields.size("num_experts_per_tok")
    if per_token > count:
        raise ValueError(f"num_experts_per_tok = {per_token} should be at most the number of experts, {count}")
    fields.pass_over("num_local_experts")
    return Experts(count, per_token, normalised)
