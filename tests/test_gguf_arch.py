"""GGUF metadata as an architecture: what llama.cpp fixes without a key, and what is refused."""

import math
from pathlib import Path

import numpy as np
import pytest

from nlae_jax.lm.arch import GlobalAttention, LinearRope, YarnRope
from nlae_jax.lm.gguf.arch import read_gguf_arch
from nlae_jax.lm.gguf.families import GGUF_FAMILIES
from nlae_jax.runtime.errors import UserError

SIZES = {
    "embedding_length": 96,
    "block_count": 12,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
}
DELTA_NET = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": 6,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 20,
}
# Keys that an architecture has beside those of all.
OWN = {
    "qwen35": DELTA_NET,
    "qwen35moe": DELTA_NET
    | {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    | {"expert_shared_feed_forward_length": 8},
    "gemma4": {"attention.key_length": 32, "attention.key_length_swa": 16, "attention.sliding_window": 5},
}


def arch_of(architecture, changes=None, tensors=(), rope_tensors=None):
    sizes = SIZES | OWN.get(architecture, {})
    keys = {key: value for key, value in (sizes | (changes or {})).items() if value is not None}
    if architecture in ("gpt2", "gptneox"):
        keys = {
            "context_length": 64,
            "attention.layer_norm_epsilon": keys.pop("attention.layer_norm_rms_epsilon"),
        } | keys
    metadata = {"general.architecture": architecture} | {f"{architecture}.{key}": keys[key] for key in keys}
    return read_gguf_arch(Path("m.gguf"), metadata, tensors, 50, rope_tensors)


@pytest.mark.parametrize(("architecture", "blocks"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_scales_scores_by_its_width(architecture, blocks):
    """As llama.cpp does, which knows that release by its number of blocks; d_model / num_heads = 24 here."""
    assert arch_of(architecture, {"block_count": blocks}).attention_scale == 24**-0.5
    assert arch_of(architecture).attention_scale == 16**-0.5


def test_windows_by_pattern():
    six = (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)
    for architecture, changes, sliding in [
        ("gemma2", {}, range(0, 12, 2)),
        ("gemma2", {"attention.sliding_window_pattern": 3}, (0, 1, 3, 4, 6, 7, 9, 10)),
        ("gemma3", {}, six),
        ("gemma3", {"attention.sliding_window_pattern": [True] + [False] * 11}, (0,)),
    ]:
        arch = arch_of(architecture, {"attention.sliding_window": 5} | changes)
        assert arch.windows == tuple(5 if layer in sliding else 0 for layer in range(12))
        if architecture == "gemma3":
            assert arch.ropes == tuple("local" if layer in sliding else "global" for layer in range(12))
    assert set(arch_of("gemma2").windows) == {0, 4096}  # llama.cpp's value where the file has none
    no_window = arch_of("gemma3")
    assert no_window.windows == () and set(no_window.ropes) == {"global"}
    with pytest.raises(UserError, match=r"gemma3\.attention\.sliding_window_pattern should have 12 entries"):
        arch_of("gemma3", {"attention.sliding_window": 5, "attention.sliding_window_pattern": [True]})


def test_yarn():
    """A file may name the attention factor that follows from the factor; llama.cpp rounds gpt-oss's ramp, we do not."""
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64}
    usual = 0.1 * math.log(8) + 1
    for named in (
        {},
        {"rope.scaling.attn_factor": 1.0},
        {"rope.scaling.attn_factor": float(np.float32(usual))},
        {"rope.scaling.yarn_attn_factor": usual},
    ):
        arch = arch_of("olmo2", keys | named | {"attention.sliding_window": 5, "rope.freq_base": 5e5})
        assert (arch.family, arch.rope_scaling) == ("olmo3", YarnRope(8.0, usual, 64))
        assert (arch.ropes, arch.local_rope_theta) == (("local", "local", "local", "global") * 3, 5e5)
    experts = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    arch = arch_of("gpt-oss", keys | experts | {"rope.scaling.yarn_beta_fast": 16.0})
    assert arch.rope_scaling == YarnRope(8.0, usual, 64, beta_fast=16.0, truncate=False)
    assert arch_of("gpt-oss", experts).rope_scaling is None


def test_rope_bases():
    assert arch_of("gemma3").local_rope_theta == 10_000.0
    arch = arch_of("gemma3", {"rope.freq_base": 1e6, "rope.freq_base_swa": 500.0})
    assert (arch.rope_theta, arch.local_rope_theta) == (1e6, 500.0)
    assert arch_of("gemma2").rope_theta == 10_000.0
    assert arch_of("smollm3").ropes == ("global", "global", "global", "none") * 3


def test_linear_scaling_needs_no_type():
    assert arch_of("qwen3", {"rope.scaling.factor": 4.0}).rope_scaling == LinearRope(4.0)
    assert arch_of("llama", {"rope.scale_linear": 2.0}).rope_scaling == LinearRope(2.0)
    for none in ({"rope.scaling.factor": 1.0}, {"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}):
        assert arch_of("llama", none).rope_scaling is None


def test_a_tied_head_is_one_that_is_not_there():
    experts = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    for architecture, family in GGUF_FAMILIES.items():
        changes = {key: value for key, value in experts.items() if key in dict(family.fields)}
        assert arch_of(architecture, changes).tied_head
        assert not arch_of(architecture, changes, tensors=("output.weight",)).tied_head


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("llama", {"expert_count": 8}, "m.gguf: llama.expert_count = 8 is not supported"),
        ("qwen3", {"attention.sliding_window": 4096}, "qwen3.attention.sliding_window = 4096"),
        *(
            (architecture, {"expert_feed_forward_length": 8}, f"{architecture}.expert_feed_forward_length = 8 is not")
            for architecture in ("llama", "qwen3", "olmoe", "qwen35")
        ),
        ("qwen3moe", {"feed_forward_length": None, "expert_feed_forward_length": 8}, "lack qwen3moe.feed_forward_len"),
        (
            "olmo2",
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.attn_factor": 1.5}
            | {"rope.scaling.original_context_length": 64},
            "olmo2.rope.scaling.attn_factor = 1.5 is not supported; 1 and 1.20794 are",
        ),
        ("gpt-oss", {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}, "original_context_length"),
        ("phi3", {"rope.scaling.attn_factor": 1.2}, "phi3.rope.scaling.attn_factor = 1.2"),
        *(
            (architecture, {}, f"architecture '{architecture}' is not supported")
            for architecture in ("mistral4", "qwen3next", "gemma3n", "granitehybrid")
        ),
        (
            "granite",
            {"rope.scaling.finetuned": False},
            "granite.rope.scaling.finetuned = False, attention without RoPE",
        ),
        ("mistral3", {"rope.scaling.type": "longrope"}, "mistral3.rope.scaling.type 'longrope' is not supported"),
        ("phi3", {"rope.scaling.type": "longrope"}, "the GGUF lacks the tensor rope_factors_long.weight"),
        ("qwen35", {"ssm.inner_size": 21}, "qwen35.ssm.inner_size = 21 should be a multiple of ssm.time_step_rank = 4"),
        ("qwen35", {"ssm.group_count": 3}, "linear_num_value_heads = 4 should be a multiple of linear_num_key_heads"),
        ("qwen35moe", {"expert_shared_feed_forward_length": None}, "lack qwen35moe.expert_shared_feed_forward_length"),
        ("gemma4", {"attention.shared_kv_layers": 2}, "num_kv_shared_layers = 2 is not supported"),
        ("gemma4", {"embedding_length_per_layer_input": 8}, "hidden_size_per_layer_input, as Gemma 4 E2B"),
        ("gemma4", {"attention.head_count_kv": [2] * 11}, "attention.head_count_kv should have 12 entries"),
        (
            "gemma4",
            {"attention.head_count_kv": [1, 2] * 6},
            "head_count_kv should be one number for blocks with a window",
        ),
        ("gemma4", {"rope.dimension_count_swa": 8}, "gemma4.rope.dimension_count_swa should be 16"),
        ("qwen2", {"attention.causal": False}, "qwen2.attention.causal should be true"),
        ("qwen3", {"attention.value_length": 8}, "qwen3.attention.value_length should be 16"),
        ("smollm3", {"attention.head_count_kv": [1, 2] * 6}, "smollm3.attention.head_count_kv should be one number"),
        ("gemma2", {"block_count": None}, "lack gemma2.block_count"),
        ("gemma3", {"attention.head_count_kv": 3}, "m.gguf: its gemma3 metadata describe no model"),
        ("qwen2", {"rope.scaling.type": "yarn"}, "qwen2.rope.scaling.type 'yarn'"),
        ("mamba", {}, "architecture 'mamba' is not supported; llama, qwen2, "),
    ],
)
def test_what_cannot_be_run_is_named(architecture, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        arch_of(architecture, changes)
    assert "\n" not in str(caught.value)
    assert arch_of("llama", {"expert_count": 0})


def test_one_number_of_heads_may_be_there_for_each_block():
    """As the converter writes it for dense Granite 4, beside sizes of state-space blocks that there are none of."""
    mamba = {"ssm.conv_kernel": 4, "ssm.state_size": 256, "ssm.group_count": 1, "ssm.inner_size": 192}
    listed = {"attention.head_count_kv": [2] * 12, "ssm.time_step_rank": 48, "rope.scaling.finetuned": True} | mamba
    scales = {"attention.scale": 0.1, "embedding_scale": 6.0, "residual_scale": 0.22, "logit_scale": 7.0}
    assert arch_of("granite", scales | listed) == arch_of("granite", scales)


def test_heads_of_two_sizes():
    """Gemma 4: the numbers are those of blocks without a window, but for the keys that end in swa."""
    arch = arch_of(
        "gemma4",
        {"attention.head_count_kv": [2, 2, 2, 2, 2, 1] * 2, "rope.freq_base": 50.0, "rope.freq_base_swa": 70.0},
        rope_tensors={"rope_freqs.weight": np.array([1.0] * 4 + [1e30] * 12, np.float32)},
    )
    assert (arch.num_kv_heads, arch.head_dim, arch.rope_theta) == (2, 16, 70.0)
    assert arch.global_attention == GlobalAttention(1, 32, 50.0, 4, keys_are_values=True)
    assert arch.mixers == ("attention",) * 5 + ("global",) + ("attention",) * 5 + ("global",)
    with pytest.raises(UserError, match="which should hold ones and then 1e30"):
        arch_of("gemma4", rope_tensors={"rope_freqs.weight": np.full(16, 2.0, np.float32)})


def test_which_blocks_have_delta_net():
    assert arch_of("qwen35").mixers == (("delta",) * 3 + ("attention",)) * 3
    assert arch_of("qwen35", {"full_attention_interval": 6}).mixers == (("delta",) * 5 + ("attention",)) * 2
    listed = arch_of(
        "qwen35", {"attention.recurrent_layers": [False] + [True] * 11 + [False], "nextn_predict_layers": 1}
    )
    assert listed.mixers == ("attention",) + ("delta",) * 10


def test_a_model_without_mlps_beside_its_experts_needs_no_width_of_them():
    without, with_both = (arch_of("qwen35moe", {"feed_forward_length": width}) for width in (None, 64))
    assert (without.d_ff, with_both.d_ff) == (32, 32) and without == with_both
