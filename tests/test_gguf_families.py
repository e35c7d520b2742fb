"""GGUF conversion of every family, from HF checkpoints that a writer here stores as llama.cpp's converter does.

The writer takes tensor names from the gguf package, and the rest from convert_hf_to_gguf.py, apart from the reader.
"""

import dataclasses

import gguf
import jax
import numpy as np
import pytest

from nlae_jax.lm.families import read_arch
from nlae_jax.lm.gguf.arch import GGUF_FAMILIES
from nlae_jax.lm.gguf.convert import convert_gguf
from nlae_jax.lm.transformer import Transformer
from nlae_jax.lm.weights import load_params
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
    "gpt_oss-unbiased": ("gpt-oss", "gpt_oss", CASES_OF_MODELS["gpt_oss-yarn"][1] | GPT_OSS_RELEASED),
}
# Families whose GGUF transformers cannot read, or reads by another way than this test's.
OURS_ALONE = (
    *("mistral", "smollm3", "olmo2", "granite", "qwen3_moe", "olmoe", "olmo3", "gpt2", "gpt_neox", "phi3", "gpt_oss"),
)
LAYER_NORMS = ("gpt2", "gptneox")


def stored(architecture, name, value, config):
    """The values of one HF tensor as llama.cpp's converter stores them."""
    if architecture in ("llama", "smollm3", "granite"):
        if "q_proj" in name:
            value = interleave_rotary_pairs(value, config.num_attention_heads)
        if "k_proj" in name:
            value = interleave_rotary_pairs(value, config.num_key_value_heads)
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        value = value + 1
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        value = value.T
    if architecture == "gptneox" and ".query_key_value." in name:
        value = np.concatenate(list(value.reshape(config.num_attention_heads, 3, -1, *value.shape[1:]).swapaxes(0, 1)))
        value = value.reshape(3 * config.hidden_size, *value.shape[2:])
    return np.ascontiguousarray(value, np.float32)


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
    for name in [name for name in state if name.endswith(".experts.gate_up_proj")]:
        gate, up = state.pop(name).chunk(2, dim=1)
        state |= {name.replace("gate_up", part) + ".weight": value for part, value in (("gate", gate), ("up", up))}
        down = name.replace("gate_up", "down")
        state[f"{down}.weight"] = state.pop(down)
    for name, value in state.items():
        if name not in ("lm_head.weight", "embed_out.weight") or not config.tie_word_embeddings:
            stem, suffix = name.rsplit(".", 1)
            tensors[f"{names.get_name(stem)}.{suffix}"] = stored(architecture, name, value.numpy(), config)
    return tensors


def add_keys(writer, architecture, config):
    """Metadata by the converter's classes for each architecture."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.num_attention_heads)
    if architecture in LAYER_NORMS:
        writer.add_layer_norm_eps(getattr(config, "layer_norm_epsilon", None) or config.layer_norm_eps)
    if architecture == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * head_dim))
    if architecture in LAYER_NORMS:
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture in ("qwen3moe", "olmoe", "gpt-oss"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if architecture == "phi3":
        writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * head_dim))
    if architecture not in ("qwen2", "olmo2", "phi3"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if architecture in ("llama", "smollm3", "granite"):
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


def llama3_factors(rope, head_dim):
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    factors = np.where(turns > rope["high_freq_factor"], 1, between)
    return np.where(turns < rope["low_freq_factor"], rope["factor"], factors).astype(np.float32)


def write_gguf(path, architecture, model, packed=False):
    """`packed`: experts in 4 bits, as gpt-oss is published."""
    writer = gguf.GGUFWriter(path, architecture)
    add_keys(writer, architecture, model.config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(2)
    for name, value in tensors_of(architecture, model).items():
        if packed and name.endswith("_exps.weight"):
            kind = gguf.GGMLQuantizationType.MXFP4
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    if (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(model.config.rope_parameters, model.config.head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("case", CASES)
def test_converted_checkpoint_is_the_original(tmp_path, case):
    architecture, family, fields = CASES[case]
    model = model_of(family, fields, seed=len(case))
    model.save_pretrained(tmp_path / "original")
    write_gguf(tmp_path / "m.gguf", architecture, model)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")

    arch, original = read_arch(tmp_path / "hf"), read_arch(tmp_path / "original")
    assert arch == dataclasses.replace(original, family="llama" if case == "mistral" else family)

    mine, expected = load_params(tmp_path / "hf", arch), load_params(tmp_path / "original", original)
    names = (mine | mine["blocks"]).keys()
    assert names == (expected | expected["blocks"]).keys()
    for name in names - {"blocks"}:
        values, wanted = ((tree | tree["blocks"])[name] for tree in (mine, expected))
        # 1 was added and is taken away: the last bit may differ.
        np.testing.assert_allclose(values, wanted, rtol=0, atol=2e-7 if "gemma" in case and "norm" in name else 0)

    ids, mask = batch_of()
    _, wanted = theirs(model, ids, mask)
    logits = jax.jit(lambda params: Transformer(arch).apply({"params": params}, ids, mask))(mine)
    assert_close(logits[mask], wanted[mask], "GGUF", case)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
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
        assert 0 < np.abs(expected - value).max() < 0.2 * np.abs(value).max()
        np.testing.assert_array_equal(found[name][0], expected.swapaxes(1, 2))


def test_every_architecture_is_there():
    assert {architecture for architecture, _, _ in CASES.values()} == set(GGUF_FAMILIES)
