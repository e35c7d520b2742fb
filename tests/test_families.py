"""Every family against transformers: logits and every block's residual stream, on random models of several shapes.

With `pytest -s`, each comparison prints its error; the table in docs/results.md holds the largest ones.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlae_jax.config import MeshConfig
from nlae_jax.lm.arch import ClampedGate, Experts, GlobalAttention, first_blocks, model_weights
from nlae_jax.lm.families import FAMILIES, arch_from_hf, hf_config, read_arch
from nlae_jax.lm.layout import plain_name
from nlae_jax.lm.lora import init_adapters
from nlae_jax.lm.rope import rope_table
from nlae_jax.lm.transformer import Segment, Transformer, random_params
from nlae_jax.lm.weights import load_params, save_params
from nlae_jax.mesh import make_mesh, place, put_batch, replicated, tree_shardings
from nlae_jax.roles.subject import Subject
from nlae_jax.runtime.errors import UserError
from tests.conftest import slow_but

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
save_file = pytest.importorskip("safetensors.torch").save_file
load_file = pytest.importorskip("safetensors.torch").load_file

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "intermediate_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
}
WIDE = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10_000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10_000.0}
GEMMA3_ROPES = {
    "full_attention": LINEAR,
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
# Family and the fields that differ from SMALL or WIDE. Windows are shorter than the sequences.
CASES = {
    "llama-tied": ("llama", SMALL | {"tie_word_embeddings": True}),
    "llama-biases-llama3": ("llama", WIDE | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "mistral": ("mistral", SMALL | {"sliding_window": None}),
    "mistral-window": ("mistral", WIDE | {"sliding_window": 6}),
    "qwen2": ("qwen2", SMALL | {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", WIDE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("qwen3", SMALL | {"tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", WIDE | {"attention_bias": True}),
    "llama-yarn": ("llama", WIDE | {"rope_parameters": YARN}),
    "qwen3-yarn": ("qwen3", SMALL | {"rope_parameters": YARN | {"truncate": False, "beta_fast": 4, "factor": 2.5}}),
    "gemma2": ("gemma2", SMALL | {"sliding_window": 6, "query_pre_attn_scalar": 12}),
    "gemma2-no-caps": (
        "gemma2",
        WIDE | {"sliding_window": 5, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("gemma3_text", SMALL | {"sliding_window": 6, "query_pre_attn_scalar": 12, "num_hidden_layers": 7}),
    "gemma3-ropes": (
        "gemma3_text",
        WIDE | {"sliding_window": 5, "rope_parameters": GEMMA3_ROPES, "num_hidden_layers": 6},
    ),
    "smollm3": ("smollm3", SMALL | {"num_hidden_layers": 5}),
    "smollm3-own-layers": ("smollm3", WIDE | {"no_rope_layers": [0, 1, 1, 0], "tie_word_embeddings": False}),
    "smollm3-windows-by-layer": (
        "smollm3",
        WIDE
        | {"sliding_window": 5, "use_sliding_window": False}
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]},
    ),
    "olmo2": ("olmo2", SMALL),
    "olmo2-tied": ("olmo2", WIDE | {"tie_word_embeddings": True}),
}
GPT2 = {
    "vocab_size": 61,
    "n_embd": 24,
    "n_layer": 4,
    "n_head": 3,
    "n_positions": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX = {name: value for name, value in SMALL.items() if name not in ("num_key_value_heads", "head_dim")}
NEOX_YARN = YARN | {"rope_theta": 500.0, "partial_rotary_factor": 0.5}
CASES |= {
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", GPT2 | {"n_inner": 40, "activation_function": "gelu", "tie_word_embeddings": False}),
    "gpt2-odd-heads": ("gpt2", GPT2 | {"n_embd": 21, "activation_function": "relu"}),
    "gpt_neox": ("gpt_neox", NEOX | {"num_attention_heads": 2}),
    "gpt_neox-tied": ("gpt_neox", NEOX | {"tie_word_embeddings": True, "rotary_pct": 1.0, "rotary_emb_base": 50.0}),
    "gpt_neox-in-turn": (
        "gpt_neox",
        NEOX | {"use_parallel_residual": False, "attention_bias": False, "rope_parameters": NEOX_YARN},
    ),
}
OLMO3_ROPES = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
GRANITE = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 7.0,
}
GRANITE4 = GRANITE | {
    "layer_types": ["full_attention"] * 4,
    "num_local_experts": 0,
    "shared_intermediate_size": 44,
    "mamba_n_heads": 8,
}
GROWING = YARN | {"original_max_position_embeddings": 6, "llama_4_scaling_beta": 0.1}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
}
PHI3 = {name: value for name, value in WIDE.items() if name != "head_dim"}
CASES |= {
    "olmo3": ("olmo3", SMALL | {"sliding_window": 5, "num_hidden_layers": 5}),
    "olmo3-yarn": (
        "olmo3",
        WIDE
        | {
            "sliding_window": 6,
            "rope_parameters": OLMO3_ROPES,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
    "ministral": (
        "ministral",
        SMALL | {"sliding_window": 5, "layer_types": ["sliding_attention", *["full_attention"] * 3]},
    ),
    "ministral3": ("ministral3", SMALL | {"rope_parameters": GROWING}),
    "ministral3-window": (
        "ministral3",
        WIDE | {"sliding_window": 5, "rope_parameters": GROWING | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "ministral3-published": ("ministral3", WIDE | {"tie_word_embeddings": True}),
    "ministral3-constant": ("ministral3", SMALL | {"rope_parameters": GROWING | {"llama_4_scaling_beta": 0.0}}),
    "phi3": ("phi3", PHI3),
    "phi3-part": (
        "phi3",
        PHI3
        | {
            "sliding_window": 6,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.75},
        },
    ),
    "phi3-long": ("phi3", PHI3 | {"original_max_position_embeddings": 32, "rope_parameters": LONG}),
    "phi3-long-part": (
        "phi3",
        PHI3
        | {"original_max_position_embeddings": 20, "num_attention_heads": 2}
        | {"rope_parameters": LONG | {"partial_rotary_factor": 0.5, "attention_factor": 1.3}},
    ),
    "granite": ("granite", SMALL | GRANITE | {"tie_word_embeddings": True}),
    "granite-biases": ("granite", WIDE | GRANITE | {"attention_bias": True, "mlp_bias": True}),
    "granitemoehybrid": ("granitemoehybrid", WIDE | GRANITE4 | {"position_embedding_type": "rope"}),
    "granitemoehybrid-unturned": ("granitemoehybrid", WIDE | GRANITE4 | {"attention_bias": True}),
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}
CASES |= {
    "qwen3_moe": ("qwen3_moe", SMALL | EXPERTS | {"moe_intermediate_size": 20, "norm_topk_prob": True}),
    "qwen3_moe-window": (
        "qwen3_moe",
        WIDE
        | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "attention_bias": True}
        | {"use_sliding_window": True, "sliding_window": 5},
    ),
    "olmoe": ("olmoe", WIDE | EXPERTS | {"clip_qkv": 0.6}),
    "olmoe-normed": ("olmoe", WIDE | {"num_experts": 3, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "gpt_oss": ("gpt_oss", SMALL | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5}),
    "gpt_oss-yarn": (
        "gpt_oss",
        WIDE
        | {"num_local_experts": 4, "num_experts_per_tok": 3, "swiglu_limit": 0.5, "swiglu_alpha": 1.2}
        | {"rope_parameters": YARN | {"truncate": False}, "attention_bias": False, "tie_word_embeddings": True},
    ),
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
}
CASES |= {
    "qwen3_5_text": ("qwen3_5_text", SMALL | DELTA | {"tie_word_embeddings": True}),
    "qwen3_5_text-repeated": ("qwen3_5_text", WIDE | DELTA | {"num_hidden_layers": 9, "full_attention_interval": 4}),
    "qwen3_5_text-attention-first": (
        "qwen3_5_text",
        WIDE
        | {"num_hidden_layers": 5, "attention_bias": True, "linear_conv_kernel_dim": 3, "linear_num_key_heads": 3}
        | {"linear_num_value_heads": 3, "linear_key_head_dim": 4, "linear_value_head_dim": 7}
        | {"layer_types": ["full_attention", *["linear_attention"] * 2, "full_attention", "linear_attention"]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5}},
    ),
}
GEMMA4 = {"hidden_size_per_layer_input": 0, "sliding_window": 6, "num_hidden_layers": 6, "num_attention_heads": 4}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 20}
GEMMA4_ROPES = {
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 50.0,
        "partial_rotary_factor": 0.5,
        "factor": 3.0,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
}
CASES |= {
    "gemma4_text": (
        "gemma4_text",
        SMALL
        | GEMMA4
        | {"num_key_value_heads": 2, "global_head_dim": 14, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
        | {"final_logit_softcapping": 3.0},
    ),
    "gemma4_text-ropes": (
        "gemma4_text",
        WIDE
        | GEMMA4
        | {"num_hidden_layers": 9, "global_head_dim": 6, "rope_parameters": GEMMA4_ROPES, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 2] * 2 + ["full_attention"]},
    ),
    "gemma4_unified_text": (
        "gemma4_unified_text",
        {name: value for name, value in (WIDE | GEMMA4).items() if name != "hidden_size_per_layer_input"}
        | {"num_hidden_layers": 5, "global_head_dim": 10, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
        | {
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "gemma4_text-experts": (
        "gemma4_text",
        SMALL
        | GEMMA4
        | GEMMA4_EXPERTS
        | {"num_key_value_heads": 2, "global_head_dim": 14, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
        | {"final_logit_softcapping": 3.0},
    ),
    "gemma4_text-experts-odd": (
        "gemma4_text",
        WIDE
        | GEMMA4
        | {"enable_moe_block": True, "num_experts": 7, "top_k_experts": 3, "moe_intermediate_size": 9}
        | {"hidden_size": 27, "intermediate_size": 21, "num_hidden_layers": 5, "sliding_window": 5}
        | {"global_head_dim": 6, "rope_parameters": GEMMA4_ROPES, "tie_word_embeddings": False}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]},
    ),
    "gemma4_text-experts-all": (
        "gemma4_text",
        SMALL
        | GEMMA4
        | {"enable_moe_block": True, "num_experts": 3, "top_k_experts": 3, "moe_intermediate_size": 16}
        | {"num_hidden_layers": 3, "global_head_dim": 10, "head_dim": 12},
    ),
    "gemma4_text-global": (
        "gemma4_text",
        SMALL | GEMMA4 | {"global_head_dim": 12, "layer_types": ["full_attention"] * 6},
    ),
    # transformers writes numbers of blocks with two digits.
    "gemma4_text-twelve": (
        "gemma4_text",
        WIDE
        | GEMMA4
        | {"num_hidden_layers": 12, "global_head_dim": 14}
        | {"num_global_key_value_heads": 1, "attention_k_eq_v": True},
    ),
    "gemma4_unified_text-twelve": (
        "gemma4_unified_text",
        {name: value for name, value in (WIDE | GEMMA4).items() if name != "hidden_size_per_layer_input"}
        | {"num_hidden_layers": 12, "global_head_dim": 10, "attention_k_eq_v": True},
    ),
}
CASES |= {
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        SMALL | DELTA | EXPERTS | {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 14},
    ),
    "qwen3_5_moe_text-even": (
        "qwen3_5_moe_text",
        WIDE
        | DELTA
        | {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "tie_word_embeddings": True}
        | {"shared_expert_intermediate_size": 12, "layer_types": ["linear_attention", "full_attention"] * 2},
    ),
}
# Shapes that are easily taken for granted: one block, one kind of block, heads of one size, no scaling.
CASES |= {
    "gpt2-unscaled": ("gpt2", GPT2 | {"n_layer": 1, "n_head": 1, "n_embd": 7, "scale_attn_weights": False}),
    "gpt_oss-unstretched": (
        "gpt_oss",
        WIDE
        | {"num_local_experts": 3, "num_experts_per_tok": 3, "num_hidden_layers": 2, "sliding_window": 1}
        | {"layer_types": ["full_attention", "sliding_attention"], "num_key_value_heads": 4}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ),
    "gemma4_text-one-size": (
        "gemma4_text",
        WIDE
        | GEMMA4
        | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8}
        | {"num_global_key_value_heads": 1, "attention_k_eq_v": True},
    ),
    "gpt_oss-one-expert": ("gpt_oss", SMALL | {"num_local_experts": 1, "num_experts_per_tok": 1, "sliding_window": 99}),
    "gemma4_text-one-expert": (
        "gemma4_text",
        SMALL | GEMMA4 | GEMMA4_EXPERTS | {"num_experts": 1, "top_k_experts": 1, "num_hidden_layers": 2},
    ),
    "gemma4_text-all-alike": (
        "gemma4_text",
        WIDE | GEMMA4 | {"num_hidden_layers": 1, "layer_types": ["full_attention"], "global_head_dim": 8},
    ),
    "qwen3_5_text-linear": (
        "qwen3_5_text",
        WIDE
        | DELTA
        | {"num_hidden_layers": 1, "linear_conv_kernel_dim": 1, "linear_value_head_dim": 1, "use_cache": False},
    ),
}
TIME = 19


def random_model(case):
    return model_of(*CASES[case], seed=sum(map(ord, case)))


def model_of(family, fields, seed=0):
    """A model with weights large enough for attention, caps and norms to matter."""
    fields = dict(fields)
    if family == "qwen2":
        del fields["head_dim"]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **fields)
    config._experts_implementation = "eager"  # grouped products take widths of whole 16 bytes alone
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    offset = 0.0 if family in ("gemma2", "gemma3_text") else 1.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            norm = weight.ndim == 1 and ("norm" in name or "ln_" in name) and "bias" not in name
            weight.copy_(offset + 0.2 * noise if norm else 0.3 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(".layer_scalar"):
                buffer.fill_(float(0.5 + torch.rand(())))
    model.tie_weights()
    return model


def batch_of():
    """Ids and mask [4, TIME]: two full rows, one padded on the right, one on the left."""
    ids = np.random.default_rng(0).integers(3, SMALL["vocab_size"], (4, TIME))
    mask = np.ones((4, TIME), bool)
    mask[2, -5:] = False
    mask[3, :4] = False
    return np.where(mask, ids, 0), mask


def theirs(model, ids, mask):
    """Residual streams [L + 1, B, T, d], taken by hooks because the last hidden state is normed; and logits."""
    states = []
    keep = lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    inner = model.base_model
    hooks = [block.register_forward_hook(keep) for block in (inner.h if hasattr(inner, "h") else inner.layers)]
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(positions),
        )
    for hook in hooks:
        hook.remove()
    return [state.numpy() for state in states], output.logits.numpy()


def ours(arch, params, ids, mask):
    """The same of ours, block by block through parts of the stack and once in one piece."""

    def residuals(lm):
        segment, out = lm.padded(ids, mask), []
        for layer in range(arch.num_layers):
            (x,), _ = lm.run((segment,), start=layer, stop=layer + 1)
            segment = segment._replace(x=x)
            out.append(x)
        return out

    lm, variables = Transformer(arch), {"params": params}
    blocks = jax.jit(lambda variables: lm.apply(variables, method=residuals))(variables)
    return blocks, our_logits(arch, params, ids, mask)


def our_logits(arch, params, ids, mask):
    """Logits [B, T, V] of the stack in one piece."""
    return jax.jit(lambda variables: Transformer(arch).apply(variables, ids, mask))({"params": params})


def assert_close(mine, expected, what, case):
    """Within 1e-4 of the largest value; prints the error under the family and `what`."""
    error = np.abs(np.asarray(mine) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()
    print(f"error: {case.split('-')[0]} {what} {error:.1e}")
    assert error < 1e-4, error


def case_of(family):
    """The family's first case."""
    return next(case for case in CASES if CASES[case][0] == family)


# Every case takes seconds to compile. The fast suite has the first case of each family.
FIRST = slow_but(map(case_of, FAMILIES), CASES)


@pytest.mark.parametrize("case", FIRST)
def test_equal_to_transformers(tmp_path, case):
    model = random_model(case)
    model.save_pretrained(tmp_path)
    arch = read_arch(tmp_path)
    assert arch.family == CASES[case][0]
    params = load_params(tmp_path, arch)
    ids, mask = batch_of()
    blocks, logits = ours(arch, params, ids, mask)
    expected_blocks, expected_logits = theirs(model, ids, mask)
    assert len(blocks) == len(expected_blocks)
    for mine, expected in zip(blocks, expected_blocks, strict=True):
        assert_close(mine[mask], expected[mask], "residuals", case)
    assert_close(logits[mask], expected_logits[mask], "logits", case)


@pytest.mark.parametrize("case", CASES)
def test_a_config_is_written_as_it_is_read(case):
    family, fields = CASES[case]
    config = transformers.AutoConfig.for_model(family, **fields)
    arch = arch_from_hf(json.loads(config.to_json_string()))
    written = json.loads(json.dumps(hf_config(arch)))
    assert arch_from_hf(written) == arch
    assert arch_from_hf(json.loads(transformers.AutoConfig.for_model(**written).to_json_string())) == arch


@pytest.mark.parametrize("rope", [GROWING, GROWING | {"rope_type": "default", "original_max_position_embeddings": 6}])
def test_transformers_runs_queries_that_do_not_grow(rope):
    """It needs both fields of the growth, whatever they say."""
    arch = arch_from_hf(config_of("ministral3") | {"rope_parameters": rope | {"llama_4_scaling_beta": 0}})
    assert arch.query_growth is None
    config = transformers.AutoConfig.for_model(**hf_config(arch) | {"pad_token_id": 0})
    with torch.no_grad():
        assert transformers.AutoModelForCausalLM.from_config(config)(torch.arange(3, 40)[None]).logits.isfinite().all()


def test_numbers_of_blocks_are_written_as_in_transformers():
    """With as many digits as the largest; they are read with any."""
    config = config_of("gemma4_text-twelve")
    assert list(config["per_layer_config"]) == ["05", "11"]
    arch = arch_from_hf(config)
    assert hf_config(arch)["per_layer_config"] == config["per_layer_config"]
    bare = {str(int(block)): fields for block, fields in config["per_layer_config"].items()}
    assert arch_from_hf(config | {"per_layer_config": bare}) == arch


@pytest.mark.parametrize("case", ["gemma4_text", "gemma4_text-experts"])
def test_gemma4_as_it_is_published(case):
    """Two fields say what transformers saves block by block; its multimodal config.json has the rest inside."""
    family, fields = CASES[case]
    saved = json.loads(transformers.AutoConfig.for_model(family, **fields).to_json_string())
    published = {name: value for name, value in saved.items() if name != "per_layer_config"}
    published |= {name: fields[name] for name in ("global_head_dim", "num_global_key_value_heads")}
    assert arch_from_hf({"model_type": "gemma4", "text_config": published}) == arch_from_hf(saved)
    del published["attention_k_eq_v"]  # transformers reads the number of heads only with it
    assert arch_from_hf(published).global_attention.num_kv_heads == fields["num_key_value_heads"]


def test_every_family_is_there():
    assert {family for family, _ in CASES.values()} == {CASES[case][0] for case in SHARED} == set(FAMILIES)


@pytest.mark.slow
def test_what_sets_families_apart_matters_here(tmp_path):
    """Else the comparison could not fail: each field of the architecture changes the numbers."""
    ids, mask = batch_of()
    for case, changes in {
        "gemma2": {"attention_softcap": 0.0, "windows": (), "embed_scale": 1.0, "attention_scale": 0.0},
        "gemma3": {"ropes": (), "windows": (), "local_rope_theta": 7.0, "activation": "silu"},
        "smollm3": {"ropes": ()},
        "gemma3-ropes": {"rope_scaling": None},
        "gpt2": {"activation": "relu"},
        "gpt_neox": {"parallel": False, "rotary_dim": 6, "activation": "silu"},
        "olmo3-yarn": {"rope_scaling": None, "local_rope_theta": 7.0, "windows": ()},
        "ministral3": {"query_growth": None, "rope_scaling": None},
        "phi3-part": {"rotary_dim": None, "windows": ()},
        "granite": {"embed_scale": 1.0, "residual_scale": 1.0, "attention_scale": 0.0, "logit_divisor": 1.0},
        "qwen3_moe": {"experts": Experts(5, 2, normalised=False)},
        "olmoe": {"experts": Experts(5, 1), "clip_qkv": 0.0},
        "qwen3_5_text-attention-first": {"norm_offset": 0.0, "rotary_dim": None},
        "gemma4_text": {"logit_softcap": 0.0, "global_attention": GlobalAttention(1, 14, 1e6, 0, 1.0, True)},
        "gemma4_text-experts": {"experts": Experts(5, 1, normalised=True, shared=40, apart=True)},
        "gemma4_text-ropes": {"value_norm": False, "windows": (), "rope_theta": 9.0}
        | {"global_attention": GlobalAttention(2, 6, 50.0, 1, 1.0)},
        "gpt_oss-yarn": {"clamped_gate": ClampedGate(1.2, 9.0), "rope_scaling": None},
    }.items():
        random_model(case).save_pretrained(tmp_path / case)
        arch = read_arch(tmp_path / case)
        params = load_params(tmp_path / case, arch)
        logits = our_logits(arch, params, ids, mask)
        for field, value in changes.items():
            assert getattr(arch, field) != value
            other = our_logits(dataclasses.replace(arch, **{field: value}), params, ids, mask)
            assert np.abs(other - logits)[mask].max() > 1e-3 * np.abs(logits).max(), (case, field)


@pytest.mark.parametrize("case", ["qwen3", "gemma3", "olmo2"])
def test_unknown_fields_are_refused_by_name(tmp_path, case):
    random_model(case).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_qkv": 8.0}))
    with pytest.raises(UserError, match="clip_qkv"):
        read_arch(tmp_path)


def config_of(case):
    """The config.json of a case's model."""
    family, fields = CASES[case]
    return json.loads(transformers.AutoConfig.for_model(family, **fields).to_json_string())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_whose_tokens_see_later_ones_is_refused(family):
    """transformers masks them in every family, unless the file says so."""
    config = config_of(case_of(family))
    assert arch_from_hf(config | {"is_causal": True}) == arch_from_hf(config)
    with pytest.raises(UserError, match="is_causal = False"):
        arch_from_hf(config | {"is_causal": False})


# Fields that any file may have, with values that matter where the family has the field.
ANYWHERE = [
    *({"sliding_window": 4}, {"sliding_window": 4, "use_sliding_window": True}, {"use_sliding_window": False}),
    *({"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 4}, {"max_window_layers": 1}),
    *({"rope_theta": 22.0}, {"rotary_emb_base": 22.0}, {"partial_rotary_factor": 0.5}, {"rotary_pct": 0.5}),
    *({"rope_parameters": None, "rope_scaling": LINEAR}, {"rope_local_base_freq": 5.0}, {"no_rope_layers": [0, 1] * 2}),
    *({"rms_norm_eps": 0.3}, {"layer_norm_eps": 0.3}, {"num_attention_heads": 2}, {"num_key_value_heads": 3}),
    *({"attn_logit_softcapping": 0.5}, {"final_logit_softcapping": 0.5}, {"query_pre_attn_scalar": 3}),
    *({"embedding_multiplier": 3.0}, {"attention_multiplier": 0.0}, {"logits_scaling": 3.0}, {"clip_qkv": 0.3}),
    *({"norm_topk_prob": True}, {"norm_topk_prob": False}, {"num_experts_per_tok": 1}, {"experts_per_token": 1}),
    *({"use_parallel_residual": False}, {"hidden_act": "relu"}, {"activation_function": "silu"}, {"is_decoder": True}),
]


@pytest.mark.parametrize("family", slow_but(["llama", "qwen2", "gemma2", "olmo2", "gpt2", "phi3", "granite"], FAMILIES))
def test_no_field_is_silently_ignored(family):
    """What changes transformers' numbers is refused, or changes the architecture."""
    model, config = random_model(case_of(family)), config_of(case_of(family))
    config.pop("time_step_limit", None)  # transformers does not read what it wrote
    arch, ids = arch_from_hf(config), torch.tensor(batch_of()[0])
    with torch.no_grad():
        expected = model(ids).logits
    for changes in ANYWHERE:
        try:
            if arch_from_hf(config | changes) != arch:
                continue
        except UserError:
            continue
        theirs = transformers.AutoConfig.for_model(**config | changes)
        theirs._experts_implementation = "eager"
        other = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="eager").float().eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(
                other(ids).logits, expected, msg=lambda told, changes=changes: f"{changes} {told}"
            )


@pytest.mark.parametrize(
    ("case", "alias", "value", "field"),
    [
        ("gpt2", "num_attention_heads", 2, "num_heads"),
        ("gpt2", "num_hidden_layers", 3, "num_layers"),
        ("gpt2", "hidden_size", 12, "d_model"),
        ("gpt2", "max_position_embeddings", 9, "positions"),
    ],
)
def test_a_fields_other_name_counts(case, alias, value, field):
    """As in transformers, even where the file has the family's own name too."""
    config = config_of(case) | {alias: value}
    assert getattr(transformers.AutoConfig.for_model(**config), alias) == value
    assert getattr(arch_from_hf(config), field) == value


def test_layer_types_by_their_other_name():
    config = config_of("granitemoehybrid")
    assert arch_from_hf(config | {"layers_block_type": config.pop("layer_types")}) == arch_from_hf(
        config_of("granitemoehybrid")
    )


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gpt2", "granitemoehybrid"}))
def test_null_is_what_transformers_makes_of_it(family):
    """For RoPE and kinds of blocks: the family's default, as if the field were missing."""
    config = config_of(case_of(family))
    for key in {"rope_parameters", "layer_types"} & config.keys():
        null = {name: value for name, value in config.items() if name != "per_layer_config"} | {key: None}
        # In Gemma 4, transformers lets the old name replace the new one even where it is empty, and fails.
        for read in (null,) if family.startswith("gemma4") else (null, null | {"rope_scaling": {}}):
            theirs = transformers.AutoConfig.for_model(**read)
            assert arch_from_hf(read) == arch_from_hf(json.loads(theirs.to_json_string())), key


@pytest.mark.parametrize(
    ("case", "beside"),
    [
        *(("gemma3", beside) for beside in ({}, {"rope_theta": 77.0}, {"rope_local_base_freq": 5.0})),
        *(("olmo3", beside) for beside in ({}, {"rope_theta": 77.0})),
    ],
)
def test_sets_of_rope_without_a_base(case, beside):
    """Each kind of block has a default of its own, and a field beside the sets for it, or none."""
    sets = {kind: {"rope_type": "default"} for kind in ("full_attention", "sliding_attention")}
    config = config_of(case) | {"rope_parameters": sets} | beside
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    assert arch_from_hf(config) == arch_from_hf(json.loads(theirs.to_json_string()))


def test_a_base_beside_gemma4s_sets_of_rope():
    """transformers reads it for the blocks with a window, and fails where the others need it."""
    sets = {kind: dict(fields) for kind, fields in GEMMA4_ROPES.items()}
    del sets["sliding_attention"]["rope_theta"]
    config = config_of("gemma4_text") | {"rope_parameters": sets, "rope_theta": 77.0}
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    found = transformers.AutoModelForCausalLM.from_config(theirs).model.rotary_emb.sliding_attention_inv_freq.numpy()
    arch = arch_from_hf(config)
    assert (arch.rope_theta, arch.global_attention.rope_theta) == (77.0, 50.0)
    np.testing.assert_allclose(found, 77.0 ** -(np.arange(0, arch.head_dim, 2) / arch.head_dim), rtol=1e-6)
    bare = {kind: {"rope_type": fields["rope_type"]} for kind, fields in GEMMA4_ROPES.items()}
    assert arch_from_hf(config | {"rope_parameters": bare}).global_attention.rope_theta == 77.0


def test_gemma4_needs_no_rope_of_a_kind_that_no_block_has():
    config = config_of("gemma4_text-global") | {"rope_parameters": {"full_attention": GEMMA4_ROPES["full_attention"]}}
    transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**json.loads(json.dumps(config)) | {"pad_token_id": 0})
    )
    assert arch_from_hf(config).global_attention.rope_theta == 50.0


@pytest.mark.parametrize("case", ["gemma3", "olmo3"])
def test_yarn_of_some_blocks_by_the_old_name(case):
    """transformers looks for `truncate` where it puts no field of the old name."""
    _, fields = CASES[case]
    config = config_of(case) | {"rope_parameters": None, "rope_scaling": YARN | {"truncate": False}, "rope_theta": 9.0}
    theirs = transformers.AutoConfig.for_model(**fields | config)
    init = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS["yarn"]
    frequencies, factor = init(theirs, "cpu", layer_type="full_attention")
    _, sin = rope_table(arch_from_hf(config), np.ones(1))
    np.testing.assert_allclose(sin[0], factor * np.sin(frequencies.numpy()), atol=1e-6)


def loaded(tmp_path, case):
    random_model(case).save_pretrained(tmp_path)
    arch = read_arch(tmp_path)
    return arch, load_params(tmp_path, arch)


def first_caches(arch, kv, depth):
    """Of all blocks' keys and values, and states, those of the first ones."""
    attention = arch.count("attention_layers", depth) if arch.mixers else depth
    state = jax.tree.map(lambda x: x[: arch.count("delta_layers", depth)], kv.state)
    global_kv = jax.tree.map(lambda x: x[: arch.count("global_layers", depth)], kv.global_kv)
    return kv._replace(k=kv.k[:attention], v=kv.v[:attention], state=state, global_kv=global_kv)


@pytest.mark.parametrize("case", FIRST)
def test_cached_decoding_is_the_plain_forward(tmp_path, case):
    """Logits, and every block's residual stream, of tokens fed one by one after prompts padded on either side."""
    prompt_time, steps = 13, 3
    model = random_model(case)
    arch, params = loaded(tmp_path, case)
    ids, mask = batch_of()
    prompt, prompt_mask, start = ids[:, :prompt_time], mask[:, :prompt_time].copy(), mask[:, :prompt_time].sum(-1)
    prompt_mask[2, -3:], start[2] = False, prompt_time - 3
    tokens = ids[[0, 1, 1, 0], -steps:]
    subject = Subject(arch)
    prefill = jax.jit(lambda p: subject.apply({"params": {"lm": p}}, prompt, prompt_mask, method="prefill"))
    _, contexts = prefill(params)

    @jax.jit
    def decode(params, token, step, own):
        """The residual stream after each block, from models that end there; logits from the whole."""
        residuals = []
        segment = lambda lm: Segment(lm.embed(token[:, None]), (start + step)[:, None], np.ones((4, 1), bool))  # noqa: E731
        for depth in range(1, arch.num_layers + 1):
            part = params | {"blocks": first_blocks(arch, params["blocks"], depth)}
            cut = lambda kv, depth=depth: first_caches(arch, kv, depth)  # noqa: E731
            run = lambda lm, cut=cut: lm.decode(segment(lm), [cut(kv) for kv in contexts], cut(own), step)  # noqa: E731
            hidden, grown = Transformer(arch.truncated(depth)).apply({"params": part}, method=run)
            residuals.append(hidden[:, 0])
        return residuals, Transformer(arch).apply({"params": params}, hidden[:, 0], method="logits"), grown

    own, found = subject.empty_caches(start, steps, np.float32), []
    for step in range(steps):
        *out, own = decode(params, tokens[:, step], step, own)
        found.append(out)
    for row in range(4):
        whole = np.concatenate([prompt[row][prompt_mask[row]], tokens[row]])[None]
        states, logits = theirs(model, whole, np.ones_like(whole, bool))
        for step, (residuals, own_logits) in enumerate(found):
            for mine, expected in zip(residuals, states, strict=True):
                assert_close(mine[row], expected[0, step - steps], "cached", case)
            assert_close(own_logits[row], logits[0, step - steps], "cached", case)


SHARED_SOON = (
    *("gemma2", "gemma3-ropes", "smollm3-own-layers", "qwen3-biases", "qwen3_5_text", "gemma4_text"),
    "gemma4_text-experts",
)
SHARED = (
    *(*SHARED_SOON, "gemma4_unified_text", "llama-biases-llama3", "mistral-window", "qwen2-window", "olmo2", "gpt2"),
    *("gpt_neox", "olmo3-yarn", "ministral", "ministral3", "phi3-part", "granite", "granitemoehybrid"),
    *("qwen3_moe-window", "olmoe", "gpt_oss", "qwen3_5_moe_text-even"),  # the family's first case magnifies rounding
)


@pytest.mark.parametrize("case", slow_but(SHARED_SOON, SHARED))
def test_shared_segments_are_the_plain_forward(tmp_path, case):
    arch, params = loaded(tmp_path, case)
    rng, lm = np.random.default_rng(1), Transformer(arch)
    lengths = {(): 7, (2,): 3, (2, 3): 6}
    ids = [rng.integers(3, arch.vocab_size, (*batch, length)) for batch, length in lengths.items()]

    def shared(lm):
        segments, start = [], 0
        for part in ids:
            positions = np.broadcast_to(start + np.arange(part.shape[-1], dtype=np.int32), part.shape)
            segments.append(Segment(lm.embed(part), positions, np.ones(part.shape, bool)))
            start += part.shape[-1]
        return lm.run(segments)[0][-1]

    def plain(lm):
        whole = np.concatenate(
            [np.broadcast_to(part[..., None, :] if part.ndim == 2 else part, (2, 3, part.shape[-1])) for part in ids],
            -1,
        )
        flat = whole.reshape(6, -1)
        return lm.run((lm.padded(flat, np.ones(flat.shape, bool)),))[0][0].reshape(2, 3, flat.shape[1], -1)[:, :, -6:]

    ours, expected = (jax.jit(lambda v, f=f: lm.apply(v, method=f))({"params": params}) for f in (shared, plain))
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("parts", [1, 3])
def test_mxfp4_is_read_as_transformers_reads_it(tmp_path, parts):
    """Both matrices of the experts, packed as gpt-oss is published; whole, and split over devices."""
    unpacked = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    fields = WIDE | {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 64, "num_hidden_layers": 2}
    model_of("gpt_oss", fields).save_pretrained(tmp_path)
    arch, rng, tensors, expected = read_arch(tmp_path), np.random.default_rng(0), {}, {"gate": [], "up": [], "down": []}
    plain = load_file(tmp_path / "model.safetensors")
    for name, tensor in plain.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.tensor(rng.integers(0, 256, (experts, outputs, inputs // 32, 16)), dtype=torch.uint8)
        scales = torch.tensor(rng.integers(118, 130, blocks.shape[:-1]), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = unpacked(blocks, scales, dtype=torch.float32).numpy()
        assert values.shape == tensor.shape
        if "down" in name:
            expected["down"].append(values)
        else:
            expected["gate"].append(values[..., ::2])
            expected["up"].append(values[..., 1::2])
    save_file(tensors, tmp_path / "model.safetensors")
    shardings = tree_shardings(make_mesh(MeshConfig(fsdp=2, tensor=parts)), model_weights(arch)) if parts > 1 else None
    loaded = load_params(tmp_path, arch, shardings=shardings)["blocks"]
    for name, layers in expected.items():
        np.testing.assert_array_equal(loaded[name], np.stack(layers))
    del tensors[next(name for name in tensors if name.endswith("_scales"))]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="blocks and scales"):
        load_params(tmp_path, arch)


@pytest.mark.parametrize(
    "case",
    [
        *("phi3-part", "gpt_neox-in-turn", "gpt2-untied", "gpt_oss", "qwen3_moe", "qwen3_5_text-attention-first"),
        "qwen3_5_moe_text",
        *("gemma4_text", "gemma4_text-ropes", "gemma4_text-experts", "gemma4_text-one-expert", "gpt_oss-one-expert"),
    ],
)
def test_what_is_written_is_what_was_read(tmp_path, case):
    """Tensors that hold several of our parameters, and experts: every name and every bit."""
    random_model(case).save_pretrained(tmp_path / "theirs")
    arch = read_arch(tmp_path / "theirs")
    save_params(tmp_path / "ours", load_params(tmp_path / "theirs", arch), arch)
    written, expected = (load_file(tmp_path / part / "model.safetensors") for part in ("ours", "theirs"))
    written = {plain_name(arch, name): value for name, value in written.items()}
    expected = {plain_name(arch, name): value for name, value in expected.items()}
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(written[name], value), name


@pytest.mark.parametrize("case", ["qwen3_moe", "olmoe", "qwen3_5_moe_text"])
def test_experts_in_one_tensor_are_those_in_many(tmp_path, case):
    """As Qwen3.5's are published, and as transformers saves them."""
    model = random_model(case)
    model.save_pretrained(tmp_path / "many")
    model.config.save_pretrained(tmp_path / "one")
    packed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in packed)
    save_file(packed, tmp_path / "one/model.safetensors")
    arch = read_arch(tmp_path / "many")
    one, many = load_params(tmp_path / "one", read_arch(tmp_path / "one")), load_params(tmp_path / "many", arch)
    jax.tree.map(np.testing.assert_array_equal, one, many)


@pytest.mark.parametrize("case", slow_but(["qwen3_moe"], ["qwen3_moe", "olmoe", "gpt_oss", "gemma4_text-experts"]))
def test_experts_on_eight_devices_are_those_on_one(tmp_path, case):
    """Values and the gradient of the adapters; where the experts are as many, each device has its own."""
    arch, params = loaded(tmp_path, case)
    arch_of_four = dataclasses.replace(arch, experts=dataclasses.replace(arch.experts, count=4))
    ids, mask = batch_of()
    for one, weights in ((arch, params), (arch_of_four, random_params(jax.random.PRNGKey(0), arch_of_four))):
        adapters = {"blocks": jax.tree.map(lambda a: a + 0.01, init_adapters(jax.random.PRNGKey(1), one, 2))}
        lm = Transformer(one)

        def loss(adapters, params, ids, mask, lm=lm):
            return jnp.square(lm.apply({"params": params, "lora": adapters}, ids, mask)).mean()

        expected = jax.jit(jax.value_and_grad(loss))(adapters, weights, ids, mask)
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        split = place(weights, tree_shardings(mesh, model_weights(one)))
        if one is arch_of_four:
            assert split["blocks"]["up"].sharding.shard_shape(split["blocks"]["up"].shape)[1] == 2
        with jax.set_mesh(mesh):
            rows = put_batch({"ids": ids, "mask": mask}, mesh)
            found = jax.jit(jax.value_and_grad(loss))(place(adapters, replicated(mesh)), split, **rows)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), found, expected)


@pytest.mark.parametrize(
    "outer", ["gemma3", "mistral3", "ministral3", "qwen3_5", "qwen3_5_moe", "gemma4", "gemma4_unified"]
)
@pytest.mark.parametrize("spelling", ["model.language_model.", "language_model.model."])
def test_the_language_model_beside_a_vision_tower(tmp_path, spelling, outer):
    """Old and new spelling of a multimodal checkpoint's names; the tower's own tensors are passed over."""
    case = {"mistral3": "mistral", "ministral3": "ministral3-published"}.get(outer, outer)
    case = f"{case}_text" if outer.startswith(("qwen3_5", "gemma4")) else case
    text = random_model(case)
    text.save_pretrained(tmp_path / "text")
    head = "language_model.lm_head.weight" if spelling.startswith("language") else "lm_head.weight"
    tensors = {
        head if name == "lm_head.weight" else name.replace("model.", spelling, 1): tensor.clone()
        for name, tensor in text.state_dict().items()
        if name != "lm_head.weight" or not text.config.tie_word_embeddings
    }
    tower = "visual." if outer.startswith("qwen3_5") else "vision_tower."
    tower = f"model.{tower}" if spelling.startswith("model") else tower
    (tmp_path / "both").mkdir()
    beside = {tower + "patch.weight": torch.ones(3)}
    if outer.startswith("qwen3_5"):
        beside["mtp.fc.weight"] = torch.ones(3)
    save_file(tensors | beside, tmp_path / "both/model.safetensors")
    config = {
        "model_type": "mistral3" if outer == "ministral3" else outer,
        "text_config": json.loads((tmp_path / "text/config.json").read_text()),
        "vision_config": {},
    }
    (tmp_path / "both/config.json").write_text(json.dumps(config))
    arch = read_arch(tmp_path / "both")
    assert arch == read_arch(tmp_path / "text")
    mine, expected = load_params(tmp_path / "both", arch), load_params(tmp_path / "text", arch)
    jax.tree.map(np.testing.assert_array_equal, mine, expected)


SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIGLIP |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
PIXTRAL = SIGLIP | {"model_type": "pixtral", "head_dim": 8}
GEMMA4_TOWERS = {
    "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 64},
    "audio_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
    | {"subsampling_conv_channels": [4, 4]},
}
UNIFIED_TOWERS = {"vision_config": {"patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 32}, "audio_config": {}}
QWEN_TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
# Class in transformers, the case of its language model, the fields beside `text_config`.
MULTIMODAL = {
    "gemma3": ("Gemma3", "gemma3", {"vision_config": SIGLIP, "image_token_index": 1}),
    "mistral3": ("Mistral3", "mistral-window", {"vision_config": PIXTRAL, "image_token_index": 1}),
    "gemma4": ("Gemma4", "gemma4_text", GEMMA4_TOWERS),
    "gemma4_unified": ("Gemma4Unified", "gemma4_unified_text", UNIFIED_TOWERS),
    "qwen3_5": ("Qwen3_5", "qwen3_5_text", {"vision_config": QWEN_TOWER}),
    "qwen3_5_moe": ("Qwen3_5Moe", "qwen3_5_moe_text", {"vision_config": QWEN_TOWER}),
}


@pytest.mark.parametrize("outer", slow_but(["gemma4_unified"], MULTIMODAL))
def test_a_multimodal_model_as_transformers_saves_it(tmp_path, outer):
    """With towers of its own making, whose tensors have the names of published files."""
    name, case, beside = MULTIMODAL[outer]
    family, fields = CASES[case]
    config = transformers.AutoConfig.for_model(outer, text_config={"model_type": family} | fields, **beside)
    config._experts_implementation = config.text_config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")._from_config(config, attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "language_model" in key or "lm_head" in key:
                weight.copy_(0.3 * torch.randn_like(weight) + float("norm" in key))
    model.tie_weights()
    model.save_pretrained(tmp_path)
    arch, (ids, mask) = read_arch(tmp_path), batch_of()
    logits = our_logits(arch, load_params(tmp_path, arch), ids[:2], mask[:2])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids[:2])).logits.numpy()
    assert_close(logits, expected, "multimodal", outer)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo3", "ministral", "gpt_oss"])
def test_transformers_runs_blocks_that_have_no_window(family):
    """As a decoder of the first block may have none. Its mask of a window needs the window's size all the same."""
    config = config_of(case_of(family))
    kinds = ["full_attention", *["sliding_attention"] * (config["num_hidden_layers"] - 1)]
    arch = arch_from_hf(config | {"layer_types": kinds})
    assert arch.windows and not arch.truncated(1).windows
    written = hf_config(arch.truncated(1)) | {"pad_token_id": 0}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**written))
    with torch.no_grad():
        assert model(torch.arange(3, 9)[None]).logits.isfinite().all()


def test_yarn_of_half_a_pair_is_refused():
    """transformers stretches all pairs alike there, or fails."""
    rope = {"rope_parameters": YARN | {"partial_rotary_factor": 0.25}}
    fields = {"model_type": "gpt_neox", "num_attention_heads": 2}
    with pytest.raises(UserError, match="rope_type yarn of 3 dimensions of a head"):
        arch_from_hf(NEOX | fields | rope)


def test_a_sequence_beyond_what_the_model_has_positions_for_is_one_line(tmp_path):
    """In a forward pass, and in a cache that would outgrow them."""
    arch, params = loaded(tmp_path, "gpt2")
    long = arch_from_hf(json.loads(transformers.AutoConfig.for_model("phi3", **CASES["phi3-long"][1]).to_json_string()))
    ids, subject = np.zeros((1, 41), np.int32), Subject(arch)
    with pytest.raises(UserError, match="a sequence of 41 tokens is too long for this model, which can be run on 40"):
        Transformer(arch).apply({"params": params}, ids, ids == 0)
    with pytest.raises(UserError, match="41 tokens is too long for this model, which can be run on 32"):
        jax.eval_shape(
            lambda: Transformer(long).apply({"params": random_params(jax.random.PRNGKey(0), long)}, ids, ids == 0)
        )
    variables, start = {"params": {"lm": params}}, np.full(1, 38)
    _, contexts = subject.apply(variables, ids[:, :38], ids[:, :38] == 0, method="prefill")
    for capacity in (2, 3):
        own = subject.empty_caches(start, capacity, np.float32)
        decode = lambda own=own: subject.apply(variables, ids[:, 0], 1, start, contexts, own, method="decode")  # noqa: E731
        if capacity == 2:
            decode()
        else:
            with pytest.raises(UserError, match="41 tokens"):
                decode()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_names_as_published_long_ago(tmp_path, family):
    """Without what the class with a head puts before them, or with the head's old name; with buffers of constants."""
    random_model(f"{family}-untied" if family == "gpt2" else family).save_pretrained(tmp_path)
    arch = read_arch(tmp_path)
    expected, path = load_params(tmp_path, arch), tmp_path / "model.safetensors"
    tensors = load_file(path)
    if family == "gpt2":
        tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
    else:
        tensors["lm_head.weight"] = tensors.pop("embed_out.weight", tensors.get("lm_head.weight"))
        tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
        tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, path)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, arch), expected)


@pytest.mark.parametrize(
    "parameters",
    [
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.0},
        YARN | {"attention_factor": 0.8, "beta_slow": 2},
        YARN | {"truncate": None, "beta_fast": 4},
        YARN | {"factor": None},
        YARN | {"factor": 0.5},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 100.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 100.0},
    ],
)
def test_rope_is_transformers(parameters):
    """Cosines and sines of variants, with what is left out taken as transformers takes it."""
    config = transformers.AutoConfig.for_model("llama", **WIDE, rope_parameters=dict(parameters))
    init = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    frequencies, factor = init(config, "cpu")
    positions = np.arange(40)
    angles = positions[:, None] * frequencies.numpy().astype(np.float64)
    cos, sin = rope_table(arch_from_hf({"model_type": "llama", **WIDE, "rope_parameters": parameters}), positions)
    np.testing.assert_allclose(cos, factor * np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin, factor * np.sin(angles), atol=1e-5)


@pytest.mark.parametrize("parameters", [LINEAR, YARN])
def test_rope_far_away_is_transformers(parameters):
    """At position p, the last bit of a frequency counts p times."""
    fields = WIDE | {"head_dim": 64, "rope_parameters": dict(parameters)}
    config = transformers.AutoConfig.for_model("llama", **fields)
    init = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    frequencies, factor = init(config, "cpu")
    position = np.full(1, 8000)
    _, sin = jax.jit(lambda: rope_table(arch_from_hf({"model_type": "llama"} | fields), position))()
    np.testing.assert_allclose(sin[0], factor * np.sin(np.float32(8000) * frequencies.numpy()), atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_multimodal_model_is_tied_as_the_whole_says(tmp_path, tied):
    """transformers writes the text's own default inside, whatever holds."""
    text = {"model_type": "ministral3"} | CASES["ministral3"][1]
    whole = transformers.AutoConfig.for_model("mistral3", text_config=text, tie_word_embeddings=tied)
    whole.save_pretrained(tmp_path)
    assert read_arch(tmp_path).tied_head is tied


@pytest.mark.parametrize(
    ("outer", "case"), [("gemma3", "gemma3"), ("gemma4_unified", "gemma4_unified_text"), ("mistral3", "gemma2")]
)
def test_a_multimodal_model_caps_its_logits_where_its_class_does(outer, case):
    """Some classes in transformers with a vision tower leave out what the language model's own class does."""
    family, fields = CASES[case]
    text = {"model_type": family} | fields | {"num_hidden_layers": 1, "final_logit_softcapping": 0.5}
    text |= {"layer_types": ["full_attention"]}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.AutoConfig.for_model(outer, text_config=text, vision_config=vision)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)
        largest = model(torch.arange(3, 20)[None]).logits.abs().max()
    cap = arch_from_hf(json.loads(config.to_json_string())).logit_softcap
    assert (0.25 < largest <= 0.5) if cap == 0.5 else (cap == 0 and largest > 1)


GLOBAL = {"per_layer_config": None}  # as published files have it


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "short_factor"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        (
            "granitemoehybrid",
            {"layer_types": ["mamba"] * 4},
            "layer_types 'mamba' .* should be 'attention' or 'full_attention'",
        ),
        ("granitemoehybrid", {"num_local_experts": 4}, "num_local_experts"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function|hidden_act"),
        ("gpt_neox", {"rotary_pct": 1.5}, "partial_rotary_factor = 1.5"),
        ("olmoe", {"clip_qkv": -1}, "clip_qkv = -1"),
        ("qwen3_5_text", {"layer_types": ["mamba"] * 4}, "should be 'full_attention' or 'linear_attention'"),
        ("qwen3_5_text", {"layer_types": ["full_attention"] * 3}, "layer_types should name each of the 4 blocks"),
        ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input, as Gemma 4 E2B"),
        ("gemma4_text", {"num_kv_shared_layers": 2}, "num_kv_shared_layers = 2"),
        ("gemma4_unified_text", GEMMA4_EXPERTS, "enable_moe_block"),
        ("gemma4_text", {"enable_moe_block": True}, "num_experts"),
        ("gemma4_text", GEMMA4_EXPERTS | {"moe_intermediate_size": None}, "moe_intermediate_size"),
        ("gemma4_text", GEMMA4_EXPERTS | {"top_k_experts": 6}, "top_k_experts = 6"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        (
            "gemma4_text",
            GLOBAL | {"layer_types": ["full_attention"] * 3},
            "layer_types should name each of the 6 blocks",
        ),
        ("gemma4_text", GLOBAL | {"global_head_dim": 9}, "global_head_dim = 9 should be even"),
        ("gemma4_text", GLOBAL | {"num_global_key_value_heads": 3}, "multiple of num_global_key_value_heads = 3"),
        ("gemma4_text", {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config of blocks"),
        ("gemma4_text", {"per_layer_config": {"5": {"hidden_size": 4}}}, "per_layer_config should have the same"),
        ("gemma4_text", {"per_layer_config": {"5": {"head_dim": "4"}}}, "head_dim = '4' should be a whole number"),
        ("gemma4_text", {"per_layer_config": {"5": {}, "05": {}}}, "per_layer_config has block 5 twice"),
        (
            "gemma4_text",
            {"per_layer_config": {"five": {}}},
            "the key 'five'; it should be a block's number",
        ),
        ("gemma4_text", {"rope_parameters": GEMMA4_ROPES | {"full_attention": YARN}}, "'yarn' of full_attention"),
        ("gemma4_text", {"rope_parameters": {}}, "rope_parameters.sliding_attention should have rope_theta"),
        *(
            ("gemma4_text", {"rope_parameters": GEMMA4_ROPES | {kind: given}}, f"{kind} should have rope_theta")
            for kind in GEMMA4_ROPES
            for given in (None, {"rope_type": "default"})
        ),
        *(
            (case, {"rope_parameters": {"full_attention": None, "sliding_attention": LINEAR}}, "'linear' of sliding")
            for case in ("gemma3", "olmo3", "gemma4_text")
        ),
        (
            "qwen3_5_text",
            {"output_gate_type": "sigmoid"},
            "= 'sigmoid' .* should be 'swish' or 'silu'",
        ),
        ("llama-tied", {"hidden_act": "gelu"}, "hidden_act = 'gelu' .* should be 'silu'"),
        ("llama-tied", {"sliding_window": 5}, "sliding_window = 5 .* should be null"),
        ("phi3", {"full_attn_mod": 2}, "full_attn_mod = 2"),
        ("granitemoehybrid", {"normalization_function": "layernorm"}, "normalization_function = 'layernorm'"),
        ("olmo3", {"rope_parameters": LINEAR}, "rope_parameters should have full_attention and sliding_attention"),
        ("ministral", {"rope_scaling": LINEAR}, "rope_parameters and rope_scaling differ"),
        ("mistral-window", {"layer_types": ["sliding_attention", *["full_attention"] * 3]}, "layer_types ="),
        ("ministral3-window", {"layer_types": ["full_attention"] * 4}, "layer_types ="),
        ("qwen3", {"mlp_bias": True}, "'mlp_bias' is not known"),
        ("granite", {"attention_multiplier": 0.0}, "attention_multiplier = 0 should be above 0"),
        ("gemma3", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type, not type"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window should be true"),
        ("ministral", {"layer_types": ["full_attention"] * 3}, "layer_types should name each of the 4 blocks"),
        ("granitemoehybrid", {"layer_types": ["attention"] * 3}, "layer_types should name each of the 4 blocks"),
        ("granitemoehybrid", {"layer_types": None}, "'layer_types' is missing; it should be attention"),
        ("smollm3", {"no_rope_layers": [0, 1]}, "no_rope_layers should have a number for each of the 5 blocks"),
        ("olmo3", {"rope_parameters": None, "rope_scaling": OLMO3_ROPES}, "rope_scaling by kind of block"),
        ("llama-yarn", {"rope_parameters": OLMO3_ROPES}, "rope_parameters by kind of block is not supported"),
        ("qwen3_5_text", {"linear_num_value_heads": 3}, "linear_num_value_heads = 3 should be a multiple"),
    ],
)
def test_variants_that_are_not_run_are_one_line(family, changes, says):
    config = config_of(family)
    if family != "ministral" and changes.keys() & {"rope_scaling", "rotary_pct"}:
        del config["rope_parameters"]
    with pytest.raises(UserError, match=says) as caught:
        arch_from_hf(config | changes)
    assert str(caught.value).isprintable()
