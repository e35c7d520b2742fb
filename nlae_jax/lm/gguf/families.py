"""What sets the GGUF architectures apart: what llama.cpp's converter does to their weights and what its graphs fix.

Key names are those of the `gguf` package.
"""

from __future__ import annotations

import dataclasses
from typing import Any

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


@dataclasses.dataclass(frozen=True)
class GgufFamily:
    """One GGUF architecture; the defaults are those of Qwen2."""

    model_type: str  # HF's
    rotary_pairs: bool = False  # rows of queries and keys lie with rotary pairs side by side
    fields: tuple[tuple[str, str], ...] = ()  # metadata key -> config.json field, where the file has the key
    fixed: tuple[tuple[str, Any], ...] = ()  # config.json fields that no key holds, or that hold where it is missing
    window_period: int = 0  # all but the last of so many blocks have a window; 0: the family has no such pattern
    model_type_with_window: str = ""  # of files that name a window
    biases: tuple[tuple[str, str], ...] = (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias"))
    eps: str = "attention.layer_norm_rms_epsilon"  # the key of what norms add to the variance
    partial_rope: bool = False  # a key says how much of a head turns
    head_parts: bool = False  # blocks with a window have heads of another size, and keys of their own for it
    all_experts: bool = False  # no block has an MLP beside its experts, so files may leave out its width
    drafts: bool = False  # blocks after the model's own draft tokens; they are passed over
    rope_tensors: tuple[str, ...] = ()  # tensors with RoPE's constants
    ignored: tuple[str, ...] = ()  # keys that change nothing
    # Where RoPE may be stretched by YaRN: the fields of its parameters that the graph fixes; None: it may not.
    yarn: tuple[tuple[str, Any], ...] | None = None
    rope_by_kind: bool = False  # blocks with a window have the base alone, without the scaling
    names: tuple[tuple[str, str], ...] = ()  # our parameter -> GGUF tensor, where it is not the usual one
    # GGUF tensor -> our parameters in it, one after another. Files may also have each by itself.
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()
    by_head: tuple[str, ...] = ()  # joined tensors in which the parameters alternate, head by head
    query_scalar: bool = False  # scores are scaled by a constant of the release
    wide_scale_layers: int = 0  # the release with so many blocks scales by d_model / num_heads, others by head_dim


_SLIDING_WINDOW = ("attention.sliding_window", "sliding_window")
_LOGIT_SOFTCAP = ("final_logit_softcapping", "final_logit_softcapping")

_EXPERTS = (("expert_count", "num_experts"), ("expert_used_count", "num_experts_per_tok"))
_QKV = (
    ("blk.{}.attn_qkv.weight", ("q", "k", "v")),
    ("blk.{}.attn_qkv.bias", ("q_bias", "k_bias", "v_bias")),
)
_LAYER_NORM = "attention.layer_norm_epsilon"
_GATE_UP = ("blk.{}.ffn_gate_up_exps.weight", ("gate", "up"))
_SSM = ("ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size")
_GLOBAL = (
    *((f"global_{name}", f"blk.{{}}.attn_{name}.weight") for name in ("q", "k", "v")),
    *((f"global_{name}_norm", f"blk.{{}}.attn_{name}_norm.weight") for name in ("q", "k")),
    ("global_o", "blk.{}.attn_output.weight"),
)
_DELTA_NET: dict[str, Any] = {
    "biases": (),
    "partial_rope": True,
    "drafts": True,
    "names": (("mlp_norm", "blk.{}.post_attention_norm.weight"),),
    "joined": (
        ("blk.{}.attn_q.weight", ("q", "q_gate")),
        ("blk.{}.attn_qkv.weight", ("delta_q", "delta_k", "delta_v")),
        ("blk.{}.ssm_conv1d.weight", ("delta_q_conv", "delta_k_conv", "delta_v_conv")),
        _GATE_UP,
    ),
    "by_head": ("blk.{}.attn_q.weight",),
    # Sections concern the positions of images.
    "ignored": ("rope.dimension_sections",),
}

GGUF_FAMILIES: dict[str, GgufFamily] = {
    # Mistral is stored as llama too; its window, where a file names one, is all that sets it apart.
    "llama": GgufFamily(
        "llama",
        rotary_pairs=True,
        rope_tensors=(ROPE_FACTORS,),
        fields=(_SLIDING_WINDOW,),
        model_type_with_window="mistral",
    ),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "gemma2": GgufFamily(
        "gemma2",
        fields=(_SLIDING_WINDOW, _LOGIT_SOFTCAP, ("attn_logit_softcapping", "attn_logit_softcapping")),
        window_period=2,
        query_scalar=True,
        wide_scale_layers=46,
    ),
    "gemma3": GgufFamily(
        "gemma3_text",
        fields=(_SLIDING_WINDOW, _LOGIT_SOFTCAP, ("rope.freq_base_swa", "rope_local_base_freq")),
        fixed=(("sliding_window", None),),
        window_period=6,
        query_scalar=True,
        wide_scale_layers=62,
    ),
    "smollm3": GgufFamily("smollm3", rotary_pairs=True, fixed=(("no_rope_layer_interval", 4),)),
    # OLMo 3 is stored as olmo2 with a window.
    "olmo2": GgufFamily(
        "olmo2",
        fields=(_SLIDING_WINDOW,),
        window_period=4,
        model_type_with_window="olmo3",
        biases=(("attention_bias", "blk.0.attn_q.bias"),),
        yarn=(("truncate", True),),
        rope_by_kind=True,
    ),
    "gpt2": GgufFamily("gpt2", fields=(("context_length", "n_positions"),), biases=(), eps=_LAYER_NORM, joined=_QKV),
    "gptneox": GgufFamily(
        "gpt_neox",
        fields=(("use_parallel_residual", "use_parallel_residual"),),
        biases=(("attention_bias", "blk.0.attn_qkv.bias"),),
        eps=_LAYER_NORM,
        partial_rope=True,
        joined=_QKV,
    ),
    "phi3": GgufFamily(
        "phi3",
        fields=(_SLIDING_WINDOW,),
        biases=(),
        partial_rope=True,
        rope_tensors=(LONG_FACTORS, SHORT_FACTORS),
        joined=(_QKV[0], ("blk.{}.ffn_up.weight", ("gate", "up"))),
    ),
    "gpt-oss": GgufFamily(
        "gpt_oss",
        fields=(_SLIDING_WINDOW, *_EXPERTS, ("expert_feed_forward_length", "intermediate_size")),
        window_period=2,
        biases=(("attention_bias", "blk.0.attn_q.bias"),),
        yarn=(("truncate", False),),
        names=(("mlp_norm", "blk.{}.post_attention_norm.weight"),),
    ),
    "qwen3moe": GgufFamily(
        "qwen3_moe",
        fields=(*_EXPERTS, ("expert_feed_forward_length", "moe_intermediate_size")),
        fixed=(("norm_topk_prob", True),),
    ),
    "olmoe": GgufFamily("olmoe", fields=_EXPERTS, fixed=(("norm_topk_prob", False),)),
    "granite": GgufFamily(
        "granite",
        rotary_pairs=True,
        fields=(
            ("attention.scale", "attention_multiplier"),
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            ("logit_scale", "logits_scaling"),
        ),
        # Of dense Granite 4, whose converter is that of models with state-space blocks.
        ignored=("rope.scaling.finetuned", "expert_shared_feed_forward_length", *_SSM),
    ),
    # Ministral 3, and Mistral Small 3 with its vision tower, which has neither YaRN nor growing queries.
    "mistral3": GgufFamily("ministral3", rotary_pairs=True, yarn=(("truncate", True), ("mscale", 1.0))),
    "gemma4": GgufFamily(
        "gemma4_text",
        fields=(_SLIDING_WINDOW, _LOGIT_SOFTCAP),
        biases=(),
        head_parts=True,
        rope_tensors=(ROPE_FACTORS,),
        names=(
            ("shared_gate", "blk.{}.ffn_gate.weight"),
            ("shared_up", "blk.{}.ffn_up.weight"),
            ("shared_down", "blk.{}.ffn_down.weight"),
            *((name, name_there) for name, name_there in _GLOBAL),
        ),
        joined=(_GATE_UP,),
    ),
    "qwen35": GgufFamily("qwen3_5_text", **_DELTA_NET),
    "qwen35moe": GgufFamily("qwen3_5_moe_text", all_experts=True, **_DELTA_NET),
}
