"""Reading config.json: families, what is refused and how it is named, RoPE scaling, and writing it back."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.lm.arch import Arch, LinearRope, Llama3Rope, model_weights
from nlae_jax.lm.families import FAMILIES, arch_from_hf, hf_config, read_arch
from nlae_jax.lm.rope import rope_table
from nlae_jax.mesh import Weight
from nlae_jax.runtime.errors import UserError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_a_llama_config_is_read():
    assert arch_from_hf(LLAMA) == Arch(
        vocab_size=96,
        d_model=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=48,
        norm_eps=1e-5,
        rope_theta=1e5,
        rope_scaling=None,
        tied_head=True,
        family="llama",
    )


def test_absent_fields_take_the_values_that_transformers_gives_them():
    needed = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )
    arch = arch_from_hf({key: LLAMA[key] for key in needed})
    assert (arch.num_kv_heads, arch.head_dim, arch.norm_eps, arch.rope_theta) == (4, 8, 1e-6, 10_000.0)
    assert not arch.tied_head


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "mixtral", "gemma4n", "qwen3_next", "Llama", None])
def test_an_unsupported_family_is_refused_by_name(model_type):
    with pytest.raises(UserError, match=f"model_type {model_type!r} is not supported; supported: llama"):
        arch_from_hf({**LLAMA, "model_type": model_type})


def test_a_config_without_a_family_is_refused():
    with pytest.raises(UserError, match="model_type None"):
        arch_from_hf({key: value for key, value in LLAMA.items() if key != "model_type"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("rope_interleaved", True),
        ("is_llama_config", False),
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 4096),
    ],
)
def test_a_field_that_changes_the_maths_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=rf"config.json: {key} = {value!r} is not supported"):
        arch_from_hf({**LLAMA, key: value})


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
)
@pytest.mark.parametrize("absent", [True, False])
def test_a_missing_field_is_named(key, absent):
    config = {name: value for name, value in LLAMA.items() if name != key} if absent else {**LLAMA, key: None}
    with pytest.raises(UserError, match=f"the field '{key}' is missing"):
        arch_from_hf(config)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_other_rope_types_are_refused_by_name(key):
    with pytest.raises(UserError, match="rope_type 'longrope' is not supported"):
        arch_from_hf({**LLAMA, key: {"rope_type": "longrope", "factor": 4.0}})
    with pytest.raises(UserError, match="rope_type 'dynamic' is not supported"):
        arch_from_hf({**LLAMA, key: {"type": "dynamic", "factor": 4.0}})


@pytest.mark.parametrize("key", ["attn_soft_cap", "num_local_experts", "quantization_config"])
def test_a_field_that_nobody_reads_is_refused_by_name(key):
    with pytest.raises(UserError, match=f"the field {key!r} is not known for model_type llama"):
        arch_from_hf({**LLAMA, key: 8})
    assert arch_from_hf({**LLAMA, key: None}) == arch_from_hf(LLAMA)


def test_a_config_that_cannot_be_written_is_not():
    with pytest.raises(ValueError, match="cannot be written"):
        hf_config(dataclasses.replace(arch_from_hf(LLAMA), norm_offset=1.0))


def test_rope_is_read_from_both_places():
    expected = Llama3Rope(8.0, 1.0, 4.0, 64)
    old = arch_from_hf({**LLAMA, "rope_scaling": LLAMA3_SCALING})
    new = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    new = arch_from_hf({**new, "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 1e5}})
    assert old == new
    assert (old.rope_scaling, old.rope_theta) == (expected, 1e5)
    assert arch_from_hf({**LLAMA, "rope_scaling": None}).rope_scaling is None


@pytest.mark.parametrize("key", sorted(LLAMA3_SCALING.keys() - {"rope_type"}))
def test_a_missing_constant_of_the_scaling_is_named(key):
    scaling = {name: value for name, value in LLAMA3_SCALING.items() if name != key}
    with pytest.raises(UserError, match=f"the field '{key}' is missing"):
        arch_from_hf({**LLAMA, "rope_scaling": scaling})


@pytest.mark.parametrize("fields", [{"num_key_value_heads": 3}, {"num_attention_heads": 6, "num_key_value_heads": 4}])
def test_heads_that_do_not_share_keys_evenly_are_refused(fields):
    with pytest.raises(UserError, match=r"num_attention_heads = \d should be a multiple of num_key_value_heads = \d"):
        arch_from_hf({**LLAMA, **fields})


@pytest.mark.parametrize("fields", [{"hidden_size": "wide"}, {"vocab_size": [96]}])
def test_a_size_that_is_no_number_is_refused(fields):
    with pytest.raises(UserError, match="a size or constant is not a sensible number"):
        arch_from_hf({**LLAMA, **fields})


def test_llama3_rope_stretches_long_waves_and_keeps_short_ones():
    # Head size 32: wavelengths from 2 pi to 2 pi · 1e4 ** (15/16), across both bounds (64 / 4 and 64 / 1).
    plain = Arch(8, 32, 1, 1, 1, 32, 8)
    scaled = Arch(8, 32, 1, 1, 1, 32, 8, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 64))
    frequencies = np.array([1e4 ** (-2 * i / 32) for i in range(16)])
    expected = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < 64 / 4:
            expected.append(frequency)
        elif wavelength > 64 / 1:
            expected.append(frequency / 8)
        else:
            share = (64 / wavelength - 1) / (4 - 1)
            expected.append((1 - share) * frequency / 8 + share * frequency)
    kept = sum(a == b for a, b in zip(expected, frequencies, strict=True))
    stretched = sum(a == b / 8 for a, b in zip(expected, frequencies, strict=True))
    assert kept and stretched and kept + stretched < 16  # all three ranges occur
    positions = np.arange(7)
    for arch, waves in ((plain, frequencies), (scaled, np.array(expected))):
        cos, sin = rope_table(arch, positions)
        np.testing.assert_allclose(cos, np.cos(positions[:, None] * waves), atol=2e-6)
        np.testing.assert_allclose(sin, np.sin(positions[:, None] * waves), atol=2e-6)


scalings = st.none() | st.builds(
    Llama3Rope,
    factor=st.floats(1, 64),
    low_freq_factor=st.floats(0.5, 2),
    high_freq_factor=st.floats(3, 8),
    original_max_positions=st.integers(16, 8192),
)
arches = st.builds(
    Arch,
    vocab_size=st.integers(1, 10**6),
    d_model=st.integers(1, 10**4),
    num_layers=st.integers(1, 200),
    num_heads=st.integers(1, 200),
    num_kv_heads=st.integers(1, 200),
    head_dim=st.integers(1, 512),
    d_ff=st.integers(1, 10**5),
    norm_eps=st.floats(1e-8, 1e-3),
    rope_theta=st.floats(1, 1e7),
    rope_scaling=scalings,
    tied_head=st.booleans(),
).map(lambda arch: dataclasses.replace(arch, num_heads=arch.num_heads * arch.num_kv_heads))


@given(arches)
def test_writing_and_reading_a_config_is_the_identity(arch):
    assert arch_from_hf(json.loads(json.dumps(hf_config(arch)))) == arch


def test_a_directory_is_read(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json there"):
        read_arch(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        read_arch(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    assert read_arch(tmp_path) == arch_from_hf(LLAMA)


HUGE = 10**12


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"model_type": {}}, "model_type {} is not supported"),
        ({"num_hidden_layers": HUGE}, f"num_hidden_layers = {HUGE} should be a whole number from 1 to 4096"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers = '3'"),
        ({"vocab_size": HUGE}, f"vocab_size = {HUGE}"),
        ({"vocab_size": 10**299}, "vocab_size = 1000"),
        ({"hidden_size": math.inf}, "hidden_size = inf"),
        ({"hidden_size": math.nan}, "hidden_size = nan"),
        ({"intermediate_size": HUGE}, f"intermediate_size = {HUGE}"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_attention_heads": HUGE}, f"num_attention_heads = {HUGE}"),
        ({"head_dim": 7}, "head_dim = 7 should be even"),
        ({"head_dim": HUGE}, f"head_dim = {HUGE}"),
        ({"hidden_size": 2, "num_attention_heads": 4}, "head_dim = 0 should be even and above 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps = -1e-05"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5'"),
        ({"rope_theta": [1]}, "rope_theta = [1]"),
        ({"rope_theta": 10**299 * 10**299}, "a size or constant is not a sensible number"),
        ({"rope_scaling": [1]}, "rope_scaling = [1] should be an object"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear' should be an object"),
        (
            {"model_type": "olmo3", "rope_parameters": {"full_attention": 3}},
            "rope_parameters.full_attention = 3 should be an object",
        ),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type ['linear'] is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": {}}}, "factor = {}"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false' should be true or false"),
        ({"attention_bias": 1}, "attention_bias = 1 should be true or false"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types = ['full_attention', 'full_attention']"),
        ({"model_type": "qwen2", "layer_types": "full"}, "layer_types = 'full' should be a list"),
        ({"model_type": "qwen2", "layer_types": [[]]}, "layer_types [] is not supported"),
        ({"model_type": "qwen2", "use_sliding_window": "no"}, "use_sliding_window = 'no'"),
        ({"model_type": "mistral", "sliding_window": HUGE}, f"sliding_window = {HUGE}"),
        ({"model_type": "mistral", "sliding_window": -5}, "sliding_window = -5"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval = 0"),
        ({"model_type": "smollm3", "no_rope_layers": 5}, "no_rope_layers = 5 should be a list"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": -4}, "query_pre_attn_scalar = -4"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "a size or constant is not a sensible number"),
        ({"model_type": "gemma2", "attn_logit_softcapping": "50"}, "attn_logit_softcapping = '50'"),
        ({"model_type": "gemma3", "text_config": []}, "text_config should be an object"),
        ({"\x1b]0;\x07": 1}, r"the field '\x1b]0;\x07' is not known"),
    ],
)
def test_a_config_without_sense_is_one_line_that_names_file_and_field(tmp_path, fields, says):
    config = {key: value for key, value in (LLAMA | fields).items()}
    if config["model_type"] in ("gemma2", "gemma3_text"):
        del config["hidden_act"]
    with pytest.raises(UserError) as caught:
        with_config(tmp_path, config)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/config.json: ") and says in message
    assert message.isprintable() and len(message) < 400


def with_config(directory, config):
    """As `read_arch`, of values that JSON does not have too: a GGUF file might bring them."""
    path = directory / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    try:
        read_arch(directory)
    except UserError as error:
        if "finite number" not in str(error) and " digits" not in str(error):
            raise
    else:
        return
    try:
        arch_from_hf(config)
    except UserError as error:
        raise UserError(f"{directory}/{error}") from None


@pytest.mark.parametrize(
    "content", ["[]", "null", "3", "", "[" * 10**5, '{"a":' * 10**5, '{"vocab_size": 1' + "0" * 6000]
)
def test_a_config_that_is_no_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=rf"^{tmp_path}/config\.json: ") as caught:
        read_arch(tmp_path)
    assert len(str(caught.value)) < 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=9), children, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from(
        sorted(
            {
                *LLAMA,
                "head_dim",
                "layer_types",
                "rope_scaling",
                "rope_parameters",
                "sliding_window",
                "no_rope_layers",
                "query_pre_attn_scalar",
                "sliding_window_pattern",
                "max_window_layers",
            }
            - {"model_type"}
        )
    ),
    json_values,
)
def test_no_value_of_a_field_is_a_traceback(family, field, value):
    config = {key: value for key, value in LLAMA.items() if key != "hidden_act"} | {"model_type": family, field: value}
    try:
        arch = arch_from_hf(config)
    except UserError as error:
        assert str(error).startswith("config.json: ")
    else:
        assert arch.num_layers <= 4096


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_names_all_its_axes(tied):
    weights = model_weights(arch_from_hf({**LLAMA, "tie_word_embeddings": tied}))
    assert ("head" in weights) is not tied
    leaves = jax.tree.leaves(weights, is_leaf=lambda node: isinstance(node, Weight))
    assert len(leaves) == 11 + (not tied)
    assert all(len(weight.shape) == len(weight.axes) for weight in leaves)
    assert weights["blocks"]["k"].shape == (3, 32, 16)
    assert weights["blocks"]["o"].shape == (3, 32, 32)
    assert weights["blocks"]["down"].shape == (3, 48, 32)


def test_truncating_changes_the_depth_alone():
    arch = arch_from_hf(LLAMA)
    assert arch.truncated(2).num_layers == 2
    assert arch.truncated(2).truncated(3) == arch


# --- config.json as published: fields that their writers left out, and fields that mean nothing here

PUBLISHED = {
    "Llama-3.3-70B-Instruct": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 8192,
            "initializer_range": 0.02,
            "intermediate_size": 28672,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 64,
            "num_hidden_layers": 80,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {**LLAMA3_SCALING, "original_max_position_embeddings": 8192},
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.47.0.dev0",
            "use_cache": True,
            "vocab_size": 128256,
        },
        {"d_model": 8192, "rope_theta": 5e5, "rope_scaling": Llama3Rope(8.0, 1.0, 4.0, 8192), "tied_head": False},
    ),
    "Mistral-7B-Instruct-v0.1": (
        {
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        {"windows": (4096,) * 32, "num_kv_heads": 8, "head_dim": 128},
    ),
    "Qwen2.5-7B-Instruct": (
        {
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
        {"biases": ("q", "k", "v"), "windows": (), "head_dim": 128, "rope_theta": 1e6},
    ),
    "Qwen3-8B": (
        {
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_window_layers": 36,
            "model_type": "qwen3",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"biases": (), "qk_norm": "head", "windows": (), "head_dim": 128},
    ),
    "gemma-2-9b-it": (
        {
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "model_type": "gemma2",
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
            "vocab_size": 256000,
        },
        {
            "windows": (4096, 0) * 21,
            "attention_softcap": 50.0,
            "logit_softcap": 30.0,
            "attention_scale": 1 / 16,
            "tied_head": True,
            "embed_scale": 3584**0.5,
        },
    ),
    "gemma-3-4b-it": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 255999,
            "mm_tokens_per_image": 256,
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
        },
        {
            "family": "gemma3_text",
            "vocab_size": 262208,
            "num_heads": 8,
            "num_kv_heads": 4,
            "head_dim": 256,
            "rope_theta": 1e6,
            "rope_scaling": LinearRope(8.0),
            "local_rope_theta": 1e4,
            "windows": ((1024,) * 5 + (0,)) * 5 + (1024,) * 4,
            "ropes": (("local",) * 5 + ("global",)) * 5 + ("local",) * 4,
            "attention_softcap": 0.0,
            "logit_softcap": 0.0,
            "attention_scale": 1 / 16,
            "tied_head": True,
            "norm_eps": 1e-6,
        },
    ),
    "SmolLM3-3B": (
        {
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "layer_types": ["full_attention"] * 36,
            "max_window_layers": 28,
            "mlp_bias": False,
            "model_type": "smollm3",
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 4,
            "pretraining_tp": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 128256,
        },
        {"ropes": ("global", "global", "global", "none") * 9, "windows": (), "tied_head": True, "rope_theta": 5e6},
    ),
    "OLMo-2-1124-7B": (
        {
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "model_type": "olmo2",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
            "vocab_size": 100352,
        },
        {"qk_norm": "all", "pre_norms": False, "post_norms": True, "tied_head": False},
    ),
    "Qwen3-Coder-30B-A3B-Instruct": (
        {
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 5472,
            "max_position_embeddings": 262144,
            "max_window_layers": 28,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "qkv_bias": False,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 10000000,
            "router_aux_loss_coef": 0.0,
            "shared_expert_intermediate_size": 0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_qk_norm": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"d_ff": 768, "head_dim": 128, "rope_theta": 1e7, "tied_head": False, "windows": (), "biases": ()},
    ),
    "polyglot-ko-1.3b": (
        {
            "hidden_act": "gelu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "gpt_neox",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "num_steps": "global_step213000",
            "rotary_emb_base": 10000,
            "rotary_pct": 0.5,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_parallel_residual": True,
            "vocab_size": 30080,
        },
        {"head_dim": 128, "rotary_dim": 64, "parallel": True, "tied_head": False},
    ),
    "gpt2-xl": (
        {
            "activation_function": "gelu_new",
            "attn_pdrop": 0.1,
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 1600,
            "n_head": 25,
            "n_layer": 48,
            "n_positions": 1024,
            "n_special": 0,
            "output_past": True,
            "predict_special_tokens": True,
            "summary_type": "cls_index",
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
        {"num_layers": 48, "head_dim": 64, "d_ff": 6400, "positions": 1024, "tied_head": True, "norm_eps": 1e-5},
    ),
    "Phi-4-mini-instruct": (
        {
            "attention_bias": False,
            "embd_pdrop": 0.0,
            "full_attn_mod": 1,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "phi3",
            "num_attention_heads": 24,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "vocab_size": 200064,
        },
        {"rotary_dim": 96, "tied_head": True, "most_tokens": 4096},
    ),
    "granite-4.0-micro": (
        {
            "attention_bias": False,
            "attention_multiplier": 0.015625,
            "embedding_multiplier": 12,
            "hidden_act": "silu",
            "hidden_size": 2560,
            "init_method": "mup",
            "intermediate_size": 8192,
            "layer_types": ["attention"] * 40,
            "logits_scaling": 10,
            "mamba_chunk_size": 256,
            "model_type": "granitemoehybrid",
            "normalization_function": "rmsnorm",
            "num_attention_heads": 40,
            "num_experts_per_tok": 0,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "residual_multiplier": 0.22,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000000,
            "router_aux_loss_coef": 0.01,
            "shared_intermediate_size": 8192,
            "tie_word_embeddings": True,
            "vocab_size": 100352,
        },
        {"embed_scale": 12.0, "logit_divisor": 10.0, "d_ff": 8192, "rope_theta": 1e7, "rotary_dim": None},
    ),
    "Qwen3.6-27B": (
        {
            "model_type": "qwen3_5",
            "text_config": {
                "attn_output_gate": True,
                "full_attention_interval": 4,
                "head_dim": 256,
                "hidden_act": "silu",
                "hidden_size": 5120,
                "intermediate_size": 17408,
                "linear_num_value_heads": 48,
                "mamba_ssm_dtype": "float32",
                "model_type": "qwen3_5_text",
                "mtp_num_hidden_layers": 1,
                "num_attention_heads": 24,
                "num_hidden_layers": 64,
                "num_key_value_heads": 4,
                "output_gate_type": "swish",
                "partial_rotary_factor": 0.25,
                "rms_norm_eps": 1e-06,
                "rope_parameters": {
                    "mrope_interleaved": True,
                    "mrope_section": [11, 11, 10],
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 10000000,
                    "rope_type": "default",
                },
                "vocab_size": 248320,
            },
            "tie_word_embeddings": False,
            "vision_config": {},
        },
        {"mixers": ("delta", "delta", "delta", "attention") * 16, "rotary_dim": 64, "rope_theta": 1e7},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_rightly(name):
    config, expected = PUBLISHED[name]
    arch = arch_from_hf(config)
    assert {field: getattr(arch, field) for field in expected} == expected


def test_missing_is_the_familys_default_and_null_is_none():
    config = dict(PUBLISHED["gemma-2-9b-it"][0])
    none = arch_from_hf({**config, "attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (none.attention_softcap, none.logit_softcap) == (0.0, 0.0)
    del config["attn_logit_softcapping"], config["final_logit_softcapping"]
    assert (arch_from_hf(config).attention_softcap, arch_from_hf(config).logit_softcap) == (50.0, 30.0)


def test_per_block_fields_name_every_block():
    config = PUBLISHED["gemma-2-9b-it"][0]
    with pytest.raises(UserError, match="each of the 42 blocks"):
        arch_from_hf({**config, "layer_types": ["sliding_attention"] * 3})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 1e-300}, "rope_theta"),
        ({"rope_theta": 1e300}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": LLAMA3_SCALING | {"factor": 0}}, "factor"),
        ({"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0, "original_max_position_embeddings": 64}}, "factor"),
    ],
)
def test_constants_that_would_give_nan_are_named(tmp_path, fields, named):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | fields))
    with pytest.raises(UserError, match=rf"config\.json: .*{named} = "):
        read_arch(tmp_path)
