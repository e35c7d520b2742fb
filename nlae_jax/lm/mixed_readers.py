"""Readers of families with experts, with DeltaNet, or with several kinds of attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from nlae_jax.lm.arch import Arch, ClampedGate, DeltaNet, Experts, GlobalAttention
from nlae_jax.lm.common_fields import (
    attention_biases,
    block_kinds,
    common_fields,
    local_theta,
    rope_parameters,
    sliding_blocks,
    windows_of,
)
from nlae_jax.lm.fields import Fields, number, table, whole
from nlae_jax.lm.rope_fields import proportional_rope
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted

_MIXERS = {"full_attention": "attention", "linear_attention": "delta"}


def gemma4(fields: Fields) -> Arch:
    """Reads Gemma 4. Blocks without a window have heads of another size; some models have experts beside every MLP."""
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    fields.only("attention_bias", False)
    fields.only("use_bidirectional_attention", False, "vision")  # "vision" concerns the tokens of images only
    fields.only("num_kv_shared_layers", 0)
    # These change nothing without fields that are refused here.
    for key in ("vocab_size_per_layer_input", "use_double_wide_mlp"):
        fields.pass_over(key)
    if fields.size("hidden_size_per_layer_input", 0, least=0):
        raise UserError("config.json: hidden_size_per_layer_input, as Gemma 4 E2B and E4B have it, is not supported")
    if fields.get("rope_parameters") is None:
        fields.config["rope_parameters"] = {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        }
    count, d_model = fields.size("num_hidden_layers"), fields.size("hidden_size")
    sliding = sliding_blocks(fields, [(block + 1) % 6 != 0 for block in range(count)])
    sliding[-1] = False  # as in transformers, whatever the file says
    experts = _experts_beside(fields)
    return Arch(
        vocab_size=fields.size("vocab_size"),
        d_model=d_model,
        num_layers=count,
        num_heads=fields.size("num_attention_heads"),
        num_kv_heads=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim"),
        d_ff=fields.size("moe_intermediate_size" if experts else "intermediate_size"),
        norm_eps=fields.number("rms_norm_eps"),
        rope_theta=local_theta(fields, _theta(fields, "sliding_attention") if any(sliding) else 10_000.0),
        tied_head=fields.flag("tie_word_embeddings"),
        family=fields.family,
        activation="gelu_tanh",
        qk_norm="head",
        post_norms=True,
        embed_scale=d_model**0.5,
        attention_scale=1.0,
        logit_softcap=fields.number("final_logit_softcapping", 0.0),
        windows=windows_of(fields, sliding),
        mixers=tuple("attention" if slides else "global" for slides in sliding),
        global_attention=_global_attention(fields, sliding),
        value_norm=True,
        layer_scales=True,
        experts=experts,
    )


def _experts_beside(fields: Fields) -> Experts | None:
    """Reads Gemma 4's experts, or returns None. Of its two classes in transformers only one reads the switch."""
    if fields.family == "gemma4_unified_text":
        fields.only("enable_moe_block", False)
    for key in ("num_experts", "moe_intermediate_size"):  # both do nothing without the switch
        fields.pass_over(key)
    if not fields.flag("enable_moe_block"):
        return None
    return dataclasses.replace(_experts(fields, True), shared=fields.size("intermediate_size"), apart=True)


def _global_attention(fields: Fields, sliding: Sequence[bool]) -> GlobalAttention:
    """Reads the attention of the blocks without a window."""
    keys_are_values = fields.flag("attention_k_eq_v")
    kv_heads, head_dim = _global_heads(fields, sliding, keys_are_values)
    if fields.size("num_attention_heads") % kv_heads or head_dim % 2:
        raise ValueError(
            f"global_head_dim = {head_dim} should be even, and num_attention_heads a multiple of "
            f"num_global_key_value_heads = {kv_heads}"
        )
    theta, pairs, factor = proportional_rope(rope_parameters(fields), _theta(fields, "full_attention"), head_dim)
    return GlobalAttention(kv_heads, head_dim, theta, pairs, factor, keys_are_values)


def _theta(fields: Fields, kind: str) -> float:
    """Reads the RoPE base of one kind of block, which may be in the kind's set or beside the sets.

    Raises UserError if it is in neither place. transformers has defaults only where `rope_parameters` is missing.
    """
    theta = rope_parameters(fields, kind).get("rope_theta")
    theta = fields.get("rope_theta") if theta is None else theta
    if theta is None:
        raise UserError(f"config.json: rope_parameters.{kind} should have rope_theta")
    return number("rope_theta", theta)


def _global_heads(fields: Fields, sliding: Sequence[bool], keys_are_values: bool) -> tuple[int, int]:
    """Returns the number of key heads and the size of heads in blocks without a window.

    transformers saves them in `per_layer_config`, without the numbers that other blocks have too. Published files have
    `num_global_key_value_heads` and `global_head_dim` instead; transformers reads the first of these only if keys are
    values.
    """
    kv_heads, head_dim = fields.size("num_key_value_heads"), fields.size("head_dim")
    few, wide = fields.size("num_global_key_value_heads", kv_heads), fields.size("global_head_dim", 512)
    if fields.get("per_layer_config") is None:
        return few if keys_are_values else kv_heads, wide
    per_layer = _by_block(fields.table("per_layer_config"))
    blocks = [block for block, slides in enumerate(sliding) if not slides]
    if set(per_layer) - set(blocks):
        raise UserError("config.json: per_layer_config of blocks that are not full_attention is not supported")
    default = {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    heads = [default | table("per_layer_config", per_layer.get(block, {})) for block in blocks]
    if any(sizes != heads[0] or sizes.keys() != default.keys() for sizes in heads):
        raise UserError(
            "config.json: per_layer_config should have the same head_dim and num_key_value_heads for all "
            "full_attention blocks, and nothing else"
        )
    return whole("num_key_value_heads", heads[0]["num_key_value_heads"]), whole("head_dim", heads[0]["head_dim"])


def _by_block(per_layer: dict[str, Any]) -> dict[int, Any]:
    """Returns the values of `per_layer_config` by the numbers of their blocks, which transformers pads with zeros."""
    found: dict[int, Any] = {}
    for key, values in per_layer.items():
        if not (key.isascii() and key.isdigit()):
            raise UserError(f"config.json: per_layer_config has the key {quoted(key)}; it should be a block's number")
        if (block := int(key)) in found:
            raise UserError(f"config.json: per_layer_config has block {block} twice; it should be there once")
        found[block] = values
    return found


def qwen3_moe(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    fields.only("decoder_sparse_step", 1)
    fields.only("mlp_only_layers", [])
    fields.pass_over("max_window_layers")
    fields.pass_over("intermediate_size_mlp")
    fields.only("use_qk_norm", True)  # in files of Qwen3-Coder
    common = common_fields(fields)
    windows = windows_of(fields, [True] * common["num_layers"])
    return Arch(
        **common,
        biases=attention_biases(fields),
        qk_norm="head",
        windows=windows if fields.flag("use_sliding_window") else (),
        experts=_experts(fields, fields.flag("norm_topk_prob")),
    )


def olmoe(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    return Arch(
        **common_fields(fields),
        biases=attention_biases(fields),
        qk_norm="all",
        clip_qkv=fields.number("clip_qkv", 0.0),
        experts=_experts(fields, fields.flag("norm_topk_prob")),
    )


def gpt_oss(fields: Fields) -> Arch:
    fields.only("hidden_act", "silu")
    fields.pass_over("experts_per_token")  # the older name of num_experts_per_tok
    fields.pass_over("quantization_config")  # `weights.py` reads MXFP4 and refuses other packed tensors
    if fields.get("rope_parameters") is None and not fields.get("rope_scaling"):
        fields.config["rope_parameters"] = {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        }
    common = common_fields(fields, default_theta=150_000.0)
    sliding = sliding_blocks(fields, [number % 2 == 0 for number in range(common["num_layers"])])
    return Arch(
        **common,
        biases=(*attention_biases(fields), "router", "gate", "up", "down"),
        windows=windows_of(fields, sliding),
        sinks=True,
        experts=_experts(fields, normalised=True),  # its softmax is over the chosen experts only
        clamped_gate=ClampedGate(fields.number("swiglu_alpha"), fields.number("swiglu_limit")),
    )


def qwen3_5(fields: Fields) -> Arch:
    """Reads Qwen3.5 and Qwen3.6, which have the same model type."""
    fields.only("hidden_act", "silu")
    fields.only("attn_output_gate", True)
    fields.only("output_gate_type", "swish", "silu")  # of DeltaNet's output; attention's is a sigmoid in any case
    fields.only("mlp_only_layers", [])
    fields.pass_over("mamba_ssm_dtype")  # the state is float32 in any case
    # Fields of blocks that draft tokens, which are not used.
    for key in ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"):
        fields.pass_over(key)
    common, kinds = common_fields(fields, partial=True), block_kinds(fields, *_MIXERS)
    interval = fields.size("full_attention_interval", 4)
    by_interval = ["linear_attention" if (n + 1) % interval else "full_attention" for n in range(common["num_layers"])]
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
    """Reads the numbers of experts. transformers writes `num_experts` or `num_local_experts`."""
    local = fields.get("num_experts") is None and fields.get("num_local_experts") is not None
    count = fields.size("num_local_experts" if local else "num_experts")
    per_token = fields.size("num_experts_per_tok")
    if per_token > count:
        name = fields.names.get("num_experts_per_tok", "num_experts_per_tok")
        raise ValueError(f"{name} = {per_token} should be at most the number of experts, {count}")
    fields.pass_over("num_local_experts")
    return Experts(count, per_token, normalised)
