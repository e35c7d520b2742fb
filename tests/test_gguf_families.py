"""GGUF conversion of every family, from HF checkpoints that a writer here stores as llama.cpp's converter does.

The writer takes tensor names from the gguf package, and the rest from convert_hf_to_gguf.py, apart from the reader.
"""

import dataclasses
import json

import gguf
import jax
import numpy as np
import pytest

from nlae_jax.lm.families import read_arch
from nlae_jax.lm.gguf.convert import convert_gguf
from nlae_jax.lm.gguf.families import GGUF_FAMILIES
from nlae_jax.lm.transformer import Transformer
from nlae_jax.lm.weights import load_params
from tests.conftest import slow_but
from tests.test_families import CASES as CASES_OF_MODELS
from tests.test_families import (
    GPT2,
    GRANITE,
    LINEAR,
    NEOX,
    PHI3,
    SMALL,
    WIDE,
    YARN,
    assert_close,
    batch_of,
    model_of,
    theirs,
    torch,
    transformers,
)
from tests.test_gguf import MERGES, TOKENS, TYPES, interleave_rotary_pairs

GEMMA3_ROPES = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}
OLMO3_ROPES = {
    "full_attention": YARN | {"factor": 8.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
MINISTRAL3 = YARN | {
    "original_max_position_embeddings": 6,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
GEMMA4_ROPES = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
}
# llama.cpp's graph has these constants.
GPT_OSS_RELEASED = {
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# GGUF architecture, HF family, the fields that differ from transformers' defaults. Windows are shorter than sequences.
CASES = {
    "llama": ("llama", "llama", SMALL | {"tie_word_embeddings": True}),
    "llama-biases": ("llama", "llama", WIDE | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "mistral": ("llama", "mistral", SMALL | {"sliding_window": None}),
    "mistral-window": ("llama", "mistral", WIDE | {"sliding_window": 6}),
    "qwen2": ("qwen2", "qwen2", SMALL | {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen2-linear": ("qwen2", "qwen2", WIDE | {"rope_parameters": LINEAR}),
    "qwen3": ("qwen3", "qwen3", SMALL | {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", "gemma2", SMALL | {"sliding_window": 6, "query_pre_attn_scalar": 10}),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        SMALL | {"sliding_window": 6, "query_pre_attn_scalar": 10, "num_hidden_layers": 7},
    ),
    "gemma3-linear": (
        "gemma3",
        "gemma3_text",
        WIDE
        | {
            "sliding_window": 5,
            "query_pre_attn_scalar": 8,
            "rope_parameters": GEMMA3_ROPES,
            "num_hidden_layers": 6,
            "final_logit_softcapping": 20.0,
        },
    ),
    "smollm3": ("smollm3", "smollm3", SMALL | {"num_hidden_layers": 5}),
    "smollm3-biases": ("smollm3", "smollm3", WIDE | {"attention_bias": True, "tie_word_embeddings": False}),
    "olmo2": ("olmo2", "olmo2", SMALL | {"head_dim": 8}),
    "qwen3moe": ("qwen3moe", "qwen3_moe", CASES_OF_MODELS["qwen3_moe"][1]),
    "olmoe": ("olmoe", "olmoe", WIDE | {"num_experts": 5, "num_experts_per_tok": 2}),
    "granite": ("granite", "granite", SMALL | GRANITE | {"tie_word_embeddings": True}),
    "granite-untied": ("granite", "granite", WIDE | GRANITE | {"attention_bias": True}),
    "granite4": ("granite", "granitemoehybrid", CASES_OF_MODELS["granitemoehybrid"][1]),
    "olmo3": ("olmo2", "olmo3", CASES_OF_MODELS["olmo3-yarn"][1] | {"rope_parameters": OLMO3_ROPES}),
    "olmo3-unstretched": ("olmo2", "olmo3", WIDE | {"sliding_window": 5, "num_hidden_layers": 5}),
    "gpt2": ("gpt2", "gpt2", GPT2),
    "gpt2-untied": ("gpt2", "gpt2", GPT2 | {"n_inner": 40, "tie_word_embeddings": False}),
    "gptneox": ("gptneox", "gpt_neox", NEOX | {"num_attention_heads": 2}),
    "gptneox-in-turn": (
        "gptneox",
        "gpt_neox",
        NEOX | {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.5, "num_hidden_layers": 2},
    ),
    "phi3": ("phi3", "phi3", PHI3),
    "phi3-part": ("phi3", "phi3", CASES_OF_MODELS["phi3-part"][1]),
    "gpt_oss": ("gpt-oss", "gpt_oss", CASES_OF_MODELS["gpt_oss"][1]),
    "phi3-long": ("phi3", "phi3", CASES_OF_MODELS["phi3-long"][1]),
    "ministral3": ("mistral3", "ministral3", SMALL | {"rope_parameters": MINISTRAL3}),
    "ministral3-published": ("mistral3", "ministral3", CASES_OF_MODELS["ministral3-published"][1]),
    "mistral-small": ("mistral3", "mistral", WIDE | {"sliding_window": None}),
    "qwen3_5": ("qwen35", "qwen3_5_text", CASES_OF_MODELS["qwen3_5_text"][1]),
    "qwen3_5-odd": (
        "qwen35",
        "qwen3_5_text",
        CASES_OF_MODELS["qwen3_5_text-attention-first"][1]
        | {
            "attention_bias": False,
            "linear_num_value_heads": 9,
            "layer_types": ["linear_attention"] * 4 + ["full_attention"],
        },
    ),
    "qwen3_5_moe": ("qwen35moe", "qwen3_5_moe_text", CASES_OF_MODELS["qwen3_5_moe_text"][1]),
    "gemma4": ("gemma4", "gemma4_text", CASES_OF_MODELS["gemma4_text"][1]),
    "gemma4-alike": ("gemma4", "gemma4_text", CASES_OF_MODELS["gemma4_text-all-alike"][1]),
    "gemma4-ropes": (
        "gemma4",
        "gemma4_text",
        CASES_OF_MODELS["gemma4_text-ropes"][1] | {"rope_parameters": GEMMA4_ROPES},
    ),
    "gemma4-twelve": ("gemma4", "gemma4_text", CASES_OF_MODELS["gemma4_text-twelve"][1]),
    "gemma4-experts": ("gemma4", "gemma4_text", CASES_OF_MODELS["gemma4_text-experts"][1]),
    "gemma4-experts-odd": (
        "gemma4",
        "gemma4_text",
        CASES_OF_MODELS["gemma4_text-experts-odd"][1] | {"rope_parameters": GEMMA4_ROPES},
    ),
    "gpt_oss-unbiased": ("gpt-oss", "gpt_oss", CASES_OF_MODELS["gpt_oss-yarn"][1] | GPT_OSS_RELEASED),
}
# Families whose GGUF transformers cannot read, or reads by another way than this test's.
OURS_ALONE = (
    *("mistral", "smollm3", "olmo2", "granite", "qwen3_moe", "olmoe", "olmo3", "gpt2", "gpt_neox", "phi3", "gpt_oss"),
    *("granitemoehybrid", "ministral3", "qwen3_5_text", "qwen3_5_moe_text", "gemma4_text"),
)
# Cases that are read as another family, which computes the same.
READ_AS = {"mistral": "llama", "granite4": "granite"}
# The weights of this case's other seed magnify rounding: in float32, transformers is 3.6e-4 off its own float64.
SEEDS = {"qwen3_5_moe": 5}
LAYER_NORMS = ("gpt2", "gptneox")
DELTA_NETS = ("qwen35", "qwen35moe")


def stored(architecture, name, value, config):
    """The values of one HF tensor as llama.cpp's converter stores them."""
    if architecture in ("llama", "smollm3", "granite", "mistral3"):
        if "q_proj" in name:
            value = interleave_rotary_pairs(value, config.num_attention_heads)
        if "k_proj" in name:
            value = interleave_rotary_pairs(value, config.num_key_value_heads)
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        value = value + 1
    if architecture in DELTA_NETS:
        value = delta_net(name, value, config)
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        value = value.T
    if architecture == "gptneox" and ".query_key_value." in name:
        value = np.concatenate(list(value.reshape(config.num_attention_heads, 3, -1, *value.shape[1:]).swapaxes(0, 1)))
        value = value.reshape(3 * config.hidden_size, *value.shape[2:])
    return np.ascontiguousarray(value, np.float32)


def delta_net(name, value, config):
    """Heads of values lie by their place among those of a key head; a rate for its logarithm; norms with 1 added."""
    keys, head = config.linear_num_key_heads, config.linear_value_head_dim

    def tiled(part, axis, width):
        apart = part.reshape(*part.shape[:axis], keys, -1, width, *part.shape[axis + 1 :])
        return apart.swapaxes(axis, axis + 1).reshape(part.shape)

    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        first = 2 * keys * config.linear_key_head_dim
        value = value.squeeze() if "conv1d" in name else value
        return np.concatenate([value[:first], tiled(value[first:], 0, head)])
    if name.endswith("in_proj_z.weight"):
        return tiled(value, 0, head)
    if name.endswith("out_proj.weight"):
        return tiled(value, 1, head)
    if name.endswith(("in_proj_a.weight", "in_proj_b.weight", "dt_bias")):
        return tiled(value, 0, 1)
    if name.endswith("A_log"):
        return -np.exp(tiled(value, 0, 1))
    return value + 1 if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight") else value


def renamed(name):
    """An HF name as the converter spells it before it looks the name up."""
    for ending, other in {
        "linear_attn.dt_bias": "linear_attn.dt_proj.bias",
        "layer_scalar": "layer_scalar.weight",
    }.items():
        name = name.removesuffix(ending) + other if name.endswith(ending) else name
    return f"{name}.weight" if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else name


def gguf_name(names, name):
    block = name.removeprefix("model.layers.").partition(".")[0]
    for ending, there in {
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
    }.items():
        if name.endswith(ending):
            return f"blk.{block}.{there}"
    if name.endswith("A_log"):
        return names.get_name(name)
    stem, suffix = renamed(name).rsplit(".", 1)
    return f"{names.get_name(stem)}.{suffix}"


def gpt_oss_parts(state):
    """Gates and ups lie output by output; GGUF has each by itself, and [out, in]."""
    parts = {}
    for name, value in state.items():
        turned = value.swapaxes(-1, -2) if name.endswith("_proj") else value
        suffix = "bias" if name.endswith("_bias") else "weight"
        stem = name.removesuffix("_bias")
        if stem.endswith("gate_up_proj"):
            gate, up = (turned[:, part::2] for part in (0, 1))
            parts |= {f"{stem.replace('gate_up', part)}.{suffix}": x for part, x in (("gate", gate), ("up", up))}
        elif ".experts." in name or name.endswith("sinks"):
            parts[f"{stem}.{suffix}"] = turned
        else:
            parts[name] = value
    return parts


def tensors_of(architecture, model):
    """GGUF name -> values. The head is not stored where it is tied."""
    config = model.config
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = {}
    state = dict(model.state_dict())
    if architecture == "gpt-oss":
        state = gpt_oss_parts(state)
    for name in [name for name in state if ".shared_mlp." in name]:  # of dense Granite 4
        value, mlp = state.pop(name), name.partition("shared_mlp")[0] + "mlp"
        parts = ("gate", "up") if name.endswith("input_linear.weight") else ("down",)
        state |= {f"{mlp}.{part}_proj.weight": x for part, x in zip(parts, value.chunk(len(parts)), strict=True)}
    apart = architecture != "gemma4"  # its converter keeps gates and ups in one tensor
    for name in [name for name in state if apart and name.endswith(".experts.gate_up_proj")]:
        gate, up = state.pop(name).chunk(2, dim=1)
        state |= {name.replace("gate_up", part) + ".weight": value for part, value in (("gate", gate), ("up", up))}
        down = name.replace("gate_up", "down")
        state[f"{down}.weight"] = state.pop(down)
    for name, value in state.items():
        if name not in ("lm_head.weight", "embed_out.weight") or not config.tie_word_embeddings:
            tensors[gguf_name(names, name)] = stored(architecture, name, value.numpy(), config)
    return tensors


def add_keys(writer, architecture, config):
    """Metadata by the converter's classes for each architecture."""
    told = json.loads(config.to_json_string())  # Gemma 4's config does not tell what differs between blocks
    head_dim = told.get("head_dim") or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    if architecture != "qwen35moe":
        width = getattr(config, "shared_intermediate_size", None) or getattr(config, "intermediate_size", None)
        width = width or config.n_inner or 4 * config.n_embd
        writer.add_feed_forward_length(width)
    writer.add_head_count(config.num_attention_heads)
    if architecture in LAYER_NORMS:
        writer.add_layer_norm_eps(getattr(config, "layer_norm_epsilon", None) or config.layer_norm_eps)
    if architecture == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * head_dim))
    if architecture in LAYER_NORMS:
        return
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "gemma4":
        add_keys_of_gemma4(writer, config, told)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    if architecture in DELTA_NETS:
        add_keys_of_delta_nets(writer, architecture, config)
    if architecture in ("qwen3moe", "olmoe", "gpt-oss"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if architecture == "phi3":
        writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * head_dim))
    if architecture not in ("qwen2", "olmo2", "phi3") and config.model_type != "granitemoehybrid":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "mistral3" and config.model_type == "ministral3":
        writer.add_rope_scaling_yarn_log_mul(config.rope_parameters["mscale_all_dim"])
        writer.add_attn_temperature_scale(config.rope_parameters["llama_4_scaling_beta"])
    if config.model_type == "granitemoehybrid":  # sizes of state-space blocks, though there are none
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_state_size(16)
        writer.add_head_count_kv([config.num_key_value_heads] * config.num_hidden_layers)
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)
        writer.add_rope_scaling_finetuned(True)
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if architecture in ("llama", "smollm3", "granite", "mistral3"):
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    if architecture != "gemma2":
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if architecture in ("gemma2", "gemma3") and config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / config.original_max_position_embeddings
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        grown = np.sqrt(1 + np.log(scale) / np.log(config.original_max_position_embeddings))
        writer.add_rope_scaling_attn_factors(float(grown))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if getattr(config, "sliding_window", None):
        if architecture in ("llama", "gemma2", "gemma3", "olmo2", "phi3", "gpt-oss"):
            writer.add_sliding_window(config.sliding_window)
        if architecture == "olmo2":
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    elif architecture == "phi3":
        writer.add_sliding_window(0)


def add_keys_of_delta_nets(writer, architecture, config):
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    full = [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"]
    writer.add_full_attention_interval(full[0] + 1)
    writer.add_rope_dimension_count(int(config.head_dim * config.rope_parameters["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([11, 11, 10, 0])
    if architecture == "qwen35moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def add_keys_of_gemma4(writer, config, told):
    own = {int(block): fields for block, fields in (told.get("per_layer_config") or {}).items()}
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    wide = own.get(sliding.index(False), {})
    heads = [own.get(n, {}).get("num_key_value_heads", told["num_key_value_heads"]) for n in range(len(sliding))]
    writer.add_head_count_kv(heads)
    writer.add_shared_kv_layers(0)
    writer.add_embedding_length_per_layer_input(0)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(sliding)
    wide_dim = wide.get("head_dim", told["head_dim"])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(wide_dim)
    for add in (writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa):
        add(told["head_dim"])
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.enable_moe_block:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    turned = int(wide_dim * config.rope_parameters["full_attention"]["partial_rotary_factor"] / 2)
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * turned + [1e30] * (wide_dim // 2 - turned), np.float32))


def llama3_factors(rope, head_dim):
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    factors = np.where(turns > rope["high_freq_factor"], 1, between)
    return np.where(turns < rope["low_freq_factor"], rope["factor"], factors).astype(np.float32)


def write_gguf(path, architecture, model, packed=False, changed=None):
    """`packed`: experts in 4 bits, as gpt-oss is published. `changed`: (tensors, writer) -> tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    add_keys(writer, architecture, model.config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(2)
    tensors = tensors_of(architecture, model)
    for name, value in (changed(tensors, writer) if changed else tensors).items():
        if packed and name.endswith("_exps.weight"):
            kind = gguf.GGMLQuantizationType.MXFP4
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    kind = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")
    if kind == "longrope":
        for length in ("long", "short"):
            factors = np.array(model.config.rope_parameters[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(model.config.rope_parameters, model.config.head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", slow_but(CASES.keys() - {"gemma4-twelve"}, CASES))
def test_converted_checkpoint_is_the_original(tmp_path, case):
    architecture, family, fields = CASES[case]
    model = model_of(family, fields, seed=SEEDS.get(case, len(case)))
    model.save_pretrained(tmp_path / "original")
    write_gguf(tmp_path / "m.gguf", architecture, model)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")

    arch, original = read_arch(tmp_path / "hf"), read_arch(tmp_path / "original")
    assert arch == dataclasses.replace(original, family=READ_AS.get(case, family))

    mine, expected = load_params(tmp_path / "hf", arch), load_params(tmp_path / "original", original)
    names = (mine | mine["blocks"]).keys()
    assert names == (expected | expected["blocks"]).keys()
    for name in names - {"blocks"}:
        values, wanted = ((tree | tree["blocks"])[name] for tree in (mine, expected))
        # 1 was added and is taken away: the last bit may differ.
        shifted = "norm" in name and case.startswith(("gemma2", "gemma3", "qwen3_5"))
        np.testing.assert_allclose(values, wanted, rtol=0, atol=4e-7 if shifted or name == "delta_rate" else 0)

    ids, mask = batch_of()
    _, wanted = theirs(model, ids, mask)
    logits = jax.jit(lambda params: Transformer(arch).apply({"params": params}, ids, mask))(mine)
    assert_close(logits[mask], wanted[mask], "GGUF", case)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    config._experts_implementation = "eager"  # grouped products take widths of whole 16 bytes alone
    load = transformers.AutoModelForCausalLM.from_pretrained
    again = load(tmp_path / "hf", config=config, attn_implementation="eager")
    assert_close(theirs(again, ids, mask)[1][mask], wanted[mask], "GGUF", case)


@pytest.mark.parametrize("case", [case for case, (_, family, _) in CASES.items() if family not in OURS_ALONE])
def test_the_files_written_here_are_as_transformers_reads_them(tmp_path, case):
    """Else writer and reader could share a mistake."""
    architecture, family, fields = CASES[case]
    model = model_of(family, fields, seed=len(case))
    write_gguf(tmp_path / "m.gguf", architecture, model)
    reader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    read = reader.load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=model)["tensors"]
    expected = {name: value for name, value in model.state_dict().items() if name in read or name != "lm_head.weight"}
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(read[name], value, rtol=0, atol=2e-7)


def test_experts_in_four_bits(tmp_path):
    fields = CASES["gpt_oss-unbiased"][2] | {"intermediate_size": 64, "num_hidden_layers": 1, "layer_types": None}
    model = model_of("gpt_oss", fields)
    write_gguf(tmp_path / "m.gguf", "gpt-oss", model, packed=True)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    found = load_params(tmp_path / "hf", read_arch(tmp_path / "hf"))["blocks"]
    for name in ("gate", "up", "down"):
        value = tensors_of("gpt-oss", model)[f"blk.0.ffn_{name}_exps.weight"]
        kind = gguf.GGMLQuantizationType.MXFP4
        expected = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
        assert 0 < np.abs(expected - value).max() < 0.3 * np.abs(value).max()
        np.testing.assert_array_equal(found[name][0], expected.swapaxes(1, 2))


def test_blocks_that_draft_tokens_and_experts_in_one_tensor(tmp_path):
    """As newer converters store Qwen3.6: a block more, which is passed over; its gates and ups are in one tensor."""
    architecture, family, fields = CASES["qwen3_5_moe"]
    model = model_of(family, fields)
    model.save_pretrained(tmp_path / "original")

    def changed(tensors, writer):
        writer.add_block_count(fields["num_hidden_layers"] + 1)
        writer.add_nextn_predict_layers(1)
        for name in [name for name in tensors if name.endswith("ffn_gate_exps.weight")]:
            up = tensors.pop(name.replace("gate", "up"))
            tensors[name.replace("gate", "gate_up")] = np.concatenate([tensors.pop(name), up], axis=1)
        for name in [name for name in tensors if name.endswith("ffn_gate_inp_shexp.weight")]:
            tensors[name] = tensors[name].reshape(-1)
        return tensors | {f"blk.{fields['num_hidden_layers']}.nextn.eh_proj.weight": np.ones((3, 4), np.float32)}

    write_gguf(tmp_path / "m.gguf", architecture, model, changed=changed)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    arch, original = read_arch(tmp_path / "hf"), read_arch(tmp_path / "original")
    assert arch == original
    mine, expected = load_params(tmp_path / "hf", arch), load_params(tmp_path / "original", original)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=4e-7), mine, expected)


def test_every_architecture_is_there():
    assert {architecture for architecture, _, _ in CASES.values()} == set(GGUF_FAMILIES)
