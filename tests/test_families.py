"""Every family against transformers: logits and every block's residual stream, on random models of several shapes.

With `pytest -s`, each comparison prints its error; the table in docs/results.md holds the largest ones.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from nlae_jax.lm.families import FAMILIES, arch_from_hf, hf_config, read_arch
from nlae_jax.lm.transformer import Segment, Transformer
from nlae_jax.lm.weights import load_params
from nlae_jax.roles.subject import Subject
from nlae_jax.runtime.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
save_file = pytest.importorskip("safetensors.torch").save_file

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
    "olmo2": ("olmo2", SMALL),
    "olmo2-tied": ("olmo2", WIDE | {"tie_word_embeddings": True}),
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
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    offset = 0.0 if "gemma" in family else 1.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(offset + 0.2 * noise if "norm" in name else 0.3 * noise)
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
    hooks = [block.register_forward_hook(keep) for block in model.model.layers]
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
    return blocks, jax.jit(lambda variables: lm.apply(variables, ids, mask))(variables)


def assert_close(mine, expected, what, case):
    """Within 1e-4 of the largest value; prints the error under the family and `what`."""
    error = np.abs(np.asarray(mine) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()
    print(f"error: {case.split('-')[0]} {what} {error:.1e}")
    assert error < 1e-4, error


@pytest.mark.parametrize("case", CASES)
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


def test_every_family_is_there():
    assert {family for family, _ in CASES.values()} == set(FAMILIES)


def test_what_sets_families_apart_matters_here(tmp_path):
    """Else the comparison could not fail: each field of the architecture changes the numbers."""
    ids, mask = batch_of()
    for case, changes in {
        "gemma2": {"attention_softcap": 0.0, "windows": (), "embed_scale": 1.0, "attention_scale": 0.0},
        "gemma3": {"ropes": (), "windows": (), "local_rope_theta": 7.0, "activation": "silu"},
        "smollm3": {"ropes": ()},
        "gemma3-ropes": {"rope_scaling": None},
    }.items():
        random_model(case).save_pretrained(tmp_path / case)
        arch = read_arch(tmp_path / case)
        params = load_params(tmp_path / case, arch)
        _, logits = ours(arch, params, ids, mask)
        for field, value in changes.items():
            assert getattr(arch, field) != value
            _, other = ours(dataclasses.replace(arch, **{field: value}), params, ids, mask)
            assert np.abs(other - logits)[mask].max() > 1e-3 * np.abs(logits).max(), (case, field)


@pytest.mark.parametrize("case", ["qwen3", "gemma3", "olmo2"])
def test_unknown_fields_are_refused_by_name(tmp_path, case):
    random_model(case).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_qkv": 8.0}))
    with pytest.raises(UserError, match="clip_qkv"):
        read_arch(tmp_path)


def loaded(tmp_path, case):
    random_model(case).save_pretrained(tmp_path)
    arch = read_arch(tmp_path)
    return arch, load_params(tmp_path, arch)


@pytest.mark.parametrize("case", CASES)
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
            part = params | {"blocks": {name: weight[:depth] for name, weight in params["blocks"].items()}}
            cut = lambda kv, depth=depth: kv._replace(k=kv.k[:depth], v=kv.v[:depth])  # noqa: E731
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


@pytest.mark.parametrize("case", ["gemma2", "gemma3-ropes", "smollm3-own-layers", "qwen3-biases"])
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


@pytest.mark.parametrize("spelling", ["model.language_model.", "language_model.model."])
def test_the_language_model_beside_a_vision_tower(tmp_path, spelling):
    """Old and new spelling of a multimodal checkpoint's names; the tower's own tensors are passed over."""
    text = random_model("gemma3")
    text.save_pretrained(tmp_path / "text")
    tensors = {
        name.replace("model.", spelling, 1): t.contiguous()
        for name, t in text.state_dict().items()
        if name != "lm_head.weight"
    }
    tower = "model.vision_tower." if spelling.startswith("model") else "vision_tower."
    (tmp_path / "both").mkdir()
    save_file(tensors | {tower + "patch.weight": torch.ones(3)}, tmp_path / "both/model.safetensors")
    config = {
        "model_type": "gemma3",
        "text_config": json.loads((tmp_path / "text/config.json").read_text()),
        "vision_config": {},
    }
    (tmp_path / "both/config.json").write_text(json.dumps(config))
    arch = read_arch(tmp_path / "both")
    assert arch == read_arch(tmp_path / "text")
    mine, expected = load_params(tmp_path / "both", arch), load_params(tmp_path / "text", arch)
    jax.tree.map(np.testing.assert_array_equal, mine, expected)
