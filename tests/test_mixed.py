"""Blocks of several kinds in one model: whole and in parts, long texts, adapters, devices, rows that come and go."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlae_jax.config import MeshConfig
from nlae_jax.lm.arch import Arch, DeltaNet, Experts, GlobalAttention, block_weights, first_blocks, model_weights
from nlae_jax.lm.experts import router_logits
from nlae_jax.lm.families import read_arch
from nlae_jax.lm.lora import adapter_weights, init_adapters, merge
from nlae_jax.lm.mixed import of_layer
from nlae_jax.lm.transformer import Segment, Transformer, for_decoding
from nlae_jax.lm.weights import load_params
from nlae_jax.mesh import make_mesh, place, put_batch, tree_shardings
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.pair import Pair, make_roles
from nlae_jax.roles.rollout import rollout
from nlae_jax.roles.subject import Subject
from nlae_jax.roles.turns import Turns
from nlae_jax.serve.programs import subject_program
from nlae_jax.serve.tables import Entry, Table
from nlae_jax.train.state import init_encoder
from tests.conftest import drawn_params, perturbed, slow_but, tiny_config, vectors
from tests.test_families import CASES, assert_close, batch_of, model_of, ours, theirs

ARCH = Arch(
    vocab_size=61,
    d_model=16,
    num_layers=5,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    d_ff=24,
    norm_eps=1e-6,
    tied_head=False,
    family="qwen3_5_text",
    qk_norm="head",
    norm_offset=1.0,
    rotary_dim=2,
    attention_gate=True,
    mixers=("delta", "attention", "delta", "attention", "delta"),
    delta=DeltaNet(key_heads=2, value_heads=4, key_dim=8, value_dim=12),
)
PERIODIC = dataclasses.replace(ARCH, num_layers=4, mixers=ARCH.mixers[:4])
GLOBAL = Arch(
    vocab_size=61,
    d_model=16,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=24,
    family="gemma4_text",
    activation="gelu_tanh",
    qk_norm="head",
    post_norms=True,
    attention_scale=1.0,
    windows=(4, 0, 4, 0, 4),
    mixers=("attention", "global", "attention", "global", "attention"),
    global_attention=GlobalAttention(1, 12, 100.0, 3, keys_are_values=True),
    value_norm=True,
    layer_scales=True,
)
TWO_HEADS = dataclasses.replace(PERIODIC, num_heads=4, num_kv_heads=2)
SHARED = Experts(count=4, per_token=2, normalised=True, shared=8)
APART = dataclasses.replace(GLOBAL, d_ff=10, experts=dataclasses.replace(SHARED, apart=True, shared=24))


def test_weights_are_stacked_over_the_blocks_that_have_them():
    weights = block_weights(ARCH)
    counts = {name: weight.shape[0] for name, weight in weights.items()}
    assert (counts["q"], counts["k_norm"], counts["delta_o"], counts["delta_q_conv"], counts["up"]) == (2, 2, 3, 3, 5)
    assert not {
        name for name in block_weights(ARCH.truncated(1)) if not (name.startswith(("delta", "mlp", "attn")))
    } - {*("gate", "up", "down")}
    stacks = {name: np.arange(count) for name, count in counts.items()}
    block = of_layer(ARCH, stacks, 3)
    assert (int(block["q"]), int(block["up"]), "delta_o" in block) == (1, 3, False)
    assert int(of_layer(ARCH, stacks, 4)["delta_o"]) == 2
    kept = first_blocks(ARCH, stacks, 2)
    assert {name: len(kept[name]) for name in ("q", "delta_o", "up")} == {"q": 1, "delta_o": 1, "up": 2}
    assert kept.keys() == block_weights(ARCH.truncated(2)).keys()


def test_adapters_sit_on_the_ways_in_and_out_of_both_kinds():
    found = {name: parts["b"].shape[0] for name, parts in adapter_weights(ARCH, 2).items()}
    attention, delta = ("q", "q_gate", "k", "v", "o"), ("delta_q", "delta_k", "delta_v", "delta_z", "delta_o")
    assert found == dict.fromkeys(attention, 2) | dict.fromkeys(delta, 3) | dict.fromkeys(("gate", "up", "down"), 5)


def assert_near(mine, other):
    """Of a gradient, against its largest entry: DeltaNet's outputs are normed, so that small ones are scaled noise."""
    mine, other = np.asarray(mine), np.asarray(other)
    np.testing.assert_allclose(mine, other, rtol=0, atol=2e-4 * np.abs(other).max())


def logits_of(arch, params, adapters=None):
    ids, mask = batch_of()
    variables = {"params": params, "lora": {"blocks": adapters or {}}}
    return jax.jit(lambda v: Transformer(arch, 0.7).apply(v, ids, mask))(variables)


@pytest.mark.parametrize(
    ("arch", "experts"),
    [(ARCH, False), (GLOBAL, False), (APART, False), (APART, True)],
    ids=["delta", "global", "global experts", "adapters of experts"],
)
def test_merged_is_applied(arch, experts):
    params = drawn_params(model_weights(arch), 0)
    fresh = init_adapters(jax.random.PRNGKey(0), arch, 2, experts)
    assert ("up" in fresh) == (arch.experts is None or experts)
    adapters = perturbed(fresh, 1, 0.2)
    blocks = {name: merge(weight, adapters.get(name), 0.7) for name, weight in params["blocks"].items()}
    mask = batch_of()[1]
    applied, merged, base = (
        np.asarray(logits_of(arch, *of))[mask]
        for of in ((params, adapters), ({**params, "blocks": blocks},), (params,))
    )
    np.testing.assert_allclose(applied, merged, atol=1e-4 * np.abs(merged).max())
    assert np.abs(applied - base).max() > 0.1 * np.abs(base).max()
    if experts:
        np.testing.assert_array_equal(np.asarray(logits_of(arch, params, fresh))[mask], base)


@pytest.mark.parametrize(
    "arch",
    [ARCH, *slow_but([], [PERIODIC, GLOBAL, APART])],
    ids=["left over", "whole patterns", "global", "global experts"],
)
def test_gradients_are_those_of_the_blocks_one_by_one(arch):
    """Of all weights and adapters, whatever the backward pass keeps."""
    ids, mask = batch_of()
    params = drawn_params(model_weights(arch), 0)
    adapters = perturbed(init_adapters(jax.random.PRNGKey(0), arch, 2), 1, 0.1)

    def one_by_one(lm):
        segment = lm.padded(ids, mask)
        for layer in range(arch.num_layers):
            (x,), _ = lm.run((segment,), start=layer, stop=layer + 1)
            segment = segment._replace(x=x)
        return lm.logits(x)

    def loss(trained, remat="linear", **kwargs):
        params, adapters = trained
        lm = Transformer(arch, 0.7, remat)
        logits = lm.apply({"params": params, "lora": {"blocks": adapters}}, **kwargs)
        return jnp.square(jnp.where(mask[..., None], logits, 0)).mean()

    expected = jax.jit(jax.grad(lambda t: loss(t, method=one_by_one)))((params, adapters))
    # What is kept does not depend on whether whole patterns leave a block over.
    for remat in ("linear", "none") if arch is not PERIODIC else ("linear",):
        found = jax.jit(jax.grad(lambda t, remat=remat: loss(t, remat, ids=ids, mask=mask)))((params, adapters))
        jax.tree.map(assert_near, found, expected)
    if arch.layer_scales:  # a constant of the model
        assert not expected[0]["blocks"].pop("layer_scale").any()
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(expected))


def test_the_router_of_experts_beside_global_attention_computes_in_float32():
    """In a bfloat16 model too: norm, scale and product, to what float64 makes of the same numbers."""
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), drawn_params(model_weights(APART), 0))
    weights = of_layer(APART, params["blocks"], 1)
    x_NxD = 3 * jax.random.normal(jax.random.PRNGKey(0), (7, APART.d_model), jnp.bfloat16)
    found = router_logits(APART, weights, x_NxD)
    x, scale, router = (np.asarray(a, np.float64) for a in (x_NxD, weights["router_norm"], weights["router"]))
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + APART.norm_eps)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, normed * scale @ router * APART.d_model**-0.5, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_shared_segments_have_the_gradient_of_each_text_by_itself():
    """A constant prefix, a part for each of two rows, three samples of each: values, and the gradient of adapters."""
    params = drawn_params(model_weights(ARCH), 0)
    adapters = perturbed(init_adapters(jax.random.PRNGKey(0), ARCH, 2), 1, 0.1)
    rng = np.random.default_rng(1)
    prefix, act, response = (rng.integers(3, ARCH.vocab_size, shape) for shape in ((7,), (2, 2), (2, 3, 6)))

    def shared(lm):
        segments, start = [], 0
        for ids in (prefix, act, response):
            positions = np.broadcast_to(start + np.arange(ids.shape[-1], dtype=np.int32), ids.shape)
            segments.append(Segment(lm.embed(ids), positions, np.ones(ids.shape, bool)))
            start += ids.shape[-1]
        return lm.run(segments)[0][-1]

    def apart(lm):
        spread = [np.broadcast_to(ids, (2, 3, ids.shape[-1])) for ids in (prefix, act[:, None], response)]
        ids = np.concatenate(spread, -1).reshape(6, -1)
        return lm.run((lm.padded(ids, ids >= 0),))[0][0][:, -6:].reshape(2, 3, 6, -1)

    def loss(adapters, method):
        hidden = Transformer(ARCH).apply({"params": params, "lora": {"blocks": adapters}}, method=method)
        return jnp.square(hidden).mean(), hidden

    found, expected = (
        jax.jit(jax.grad(partial(loss, method=method), has_aux=True))(adapters) for method in (shared, apart)
    )
    jax.tree.map(assert_near, found, expected)


def test_a_rollout_draws_from_its_teacher_forced_distribution(tokenizer, protocol):
    arch = dataclasses.replace(ARCH, vocab_size=-(-len(tokenizer) // 8) * 8)
    params = drawn_params(model_weights(arch), 0)
    roles = make_roles(tiny_config(lora__rank=2), arch, protocol)
    trained = perturbed(init_encoder(roles, params, jax.random.PRNGKey(0)), 0)
    h = vectors(2, arch.d_model)
    shape = {"samples_per_activation": 2, "max_new_tokens": 8}
    samples = jax.jit(lambda t: rollout(roles, t, {"base": params}, h, jax.random.PRNGKey(1), **shape))(trained)
    variables = roles.encoder_variables(params, trained)
    log_probs, _ = jax.jit(lambda v: roles.encoder.apply(v, h, samples.tokens, method="log_probs"))(variables)
    real = np.arange(8) < np.asarray(samples.lengths)[..., None]
    assert real.sum() > 16
    np.testing.assert_allclose(np.asarray(log_probs)[real], np.asarray(samples.log_probs)[real], atol=1e-4)


@pytest.mark.parametrize("arch", slow_but([GLOBAL], [ARCH, GLOBAL]), ids=["delta", "global"])
def test_rows_that_are_left_in_a_batch_draw_what_they_would_have(monkeypatch, caplog, tokenizer, protocol, arch):
    """After the first turn the batch shrinks to four rows, of which three are in use."""
    arch = dataclasses.replace(arch, vocab_size=-(-len(tokenizer) // 8) * 8)
    params = drawn_params(model_weights(arch), 0)
    roles = make_roles(tiny_config(lora__rank=2), arch, protocol)
    trained = perturbed(init_encoder(roles, params, jax.random.PRNGKey(0)), 0)
    h, key, limit = vectors(8, arch.d_model), jax.random.PRNGKey(1), 8
    shape = {"samples_per_activation": 1, "max_new_tokens": limit}
    whole = jax.jit(lambda t: rollout(roles, t, {"base": params}, h, key, **shape))(trained)
    monkeypatch.setattr("nlae_jax.roles.turns._TURN", 3)
    turns = Turns(roles, 8, 1)
    with jax.log_compiles():
        found = turns.sample(turns.ready(Pair(params, trained, {})), h, 3, key, 1.0, limit)
    assert sum("Compiling jit(advance)" in message for message in caplog.messages) >= 2
    np.testing.assert_array_equal(found.tokens[:3], whole.tokens[:3, 0])
    np.testing.assert_allclose(found.log_probs[:3], whole.log_probs[:3, 0], atol=1e-4)


@pytest.mark.parametrize("looped", [False, True])
def test_in_bfloat16_the_state_is_float32(monkeypatch, looped):
    """What is prefilled and what decoding grows, in shapes alone."""
    if looped:
        monkeypatch.setattr("nlae_jax.lm.transformer.platform_of", lambda _: "gpu")
    subject, ids = Subject(ARCH), jnp.zeros((2, 7), jnp.int32)

    def run(params):
        variables = {"params": {"lm": params}}
        _, contexts = subject.apply(variables, ids, ids == 0, method="prefill")
        own = subject.empty_caches(jnp.full(2, 7), 4, contexts[0].k.dtype)
        made = for_decoding(subject, variables, contexts, own)
        read = made.contexts, made.growing, made.weights
        return (
            contexts,
            own,
            made.growing,
            subject.apply(made.variables, ids[:, 0], 0, jnp.full(2, 7), *read, method="decode"),
        )

    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), drawn_params(model_weights(ARCH), 0))
    contexts, own, begun, (logits, grown) = jax.eval_shape(run, params)
    for kv in (*contexts, own):
        assert (kv.k.dtype, kv.state.tails[0].dtype, kv.state.memory.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
        assert (kv.k.shape[0], kv.state.memory.shape[:2]) == (2, (3, 2))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), begun) == jax.tree.map(lambda x: (x.shape, x.dtype), grown)
    assert logits.shape == (2, ARCH.vocab_size)


def test_texts_of_several_chunks_are_transformers_too(tmp_path):
    """Longer than DeltaNet's chunks, not a multiple of them, and padded."""
    family, fields = CASES["qwen3_5_text"]
    sizes = {"max_position_embeddings": 256, "linear_key_head_dim": 12, "linear_value_head_dim": 16}
    model = model_of(family, fields | sizes, seed=4)  # not all random weights keep rounding small
    model.save_pretrained(tmp_path)
    arch = read_arch(tmp_path)
    ids = np.random.default_rng(1).integers(3, arch.vocab_size, (2, 141))
    mask = np.ones(ids.shape, bool)
    mask[1, :9] = False
    blocks, logits = ours(arch, load_params(tmp_path, arch), ids, mask)
    expected_blocks, expected = theirs(model, ids, mask)
    for mine, other in zip(blocks, expected_blocks, strict=True):
        assert_close(mine[mask], other[mask], "long", "qwen3_5_text")
    assert_close(logits[mask], expected[mask], "long", "qwen3_5_text")


@pytest.mark.parametrize(
    "arch",
    [TWO_HEADS, *slow_but([], [dataclasses.replace(TWO_HEADS, experts=SHARED), GLOBAL, APART])],
    ids=["delta", "experts", "global", "global experts"],
)
def test_eight_devices_are_one(arch):
    """Values, and the gradient of all adapters; with a shared expert beside routed ones, too."""
    params = drawn_params(model_weights(arch), 0)
    adapters = perturbed(init_adapters(jax.random.PRNGKey(1), arch, 2, experts=True), 1, 0.1)
    ids, mask = batch_of()

    def loss(adapters, params, ids, mask):
        logits = Transformer(arch).apply({"params": params, "lora": {"blocks": adapters}}, ids, mask)
        return jnp.square(jnp.where(mask[..., None], logits, 0)).mean()

    expected = jax.jit(jax.value_and_grad(loss))(adapters, params, ids, mask)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = place(params, tree_shardings(mesh, model_weights(arch)))
    split_adapters = place(adapters, tree_shardings(mesh, adapter_weights(arch, 2, experts=True)))
    with jax.set_mesh(mesh):
        rows = put_batch({"ids": ids, "mask": mask}, mesh)
        found = jax.jit(jax.value_and_grad(loss))(split_adapters, split, **rows)
    jax.tree.map(assert_near, found, expected)


@pytest.mark.parametrize(
    ("arch", "looped"),
    slow_but([(ARCH, True)], [(ARCH, False), (ARCH, True), (GLOBAL, False), (GLOBAL, True), (APART, True)]),
    ids=["delta", "delta looped", "global", "global looped", "global experts looped"],
)
def test_rows_that_come_and_go_write_what_each_writes_alone(monkeypatch, tokenizer, arch, looped):
    """A place that another row has left holds its state no more; tables grow and shrink on the way."""
    if looped:  # as on accelerators
        for module in ("lm.transformer", "serve.tables"):
            monkeypatch.setattr(f"nlae_jax.{module}.platform_of", lambda _: "gpu")
    model = LanguageModel(arch, drawn_params(model_weights(arch), 2), tokenizer, stop_ids=())
    rng, width, count = np.random.default_rng(0), 9, 6
    prompts = [rng.integers(3, arch.vocab_size, length) for length in (9, 1, 4, 6)]
    table, found = Table(subject_program(model).compiled(), 16), {}
    for turn in range(16):
        if turn in (0, 1, 3, 5):
            row = len(found)
            ids = np.pad(prompts[row], (width - len(prompts[row]), 0)).astype(np.int32)
            mask = np.arange(width) >= width - len(prompts[row])
            table.add([Entry((ids, mask), count, 0.0, row)], [row])
            found[row] = []
        ended = {row for row, tokens, done in table.advance(2) if not found.update({row: tokens.tolist()}) and done}
        table.remove(lambda row, ended=ended: row in ended)
    subject = jax.jit(lambda p, ids: Subject(arch).apply({"params": {"lm": p}}, ids, ids >= 0, method="logits"))
    for row, prompt in enumerate(prompts):
        ids = np.concatenate([prompt, np.zeros(count, prompt.dtype)])
        for number in range(len(prompt), len(ids)):
            ids[number] = np.argmax(subject(model.params, ids[None])[0, number - 1])
        assert found[row] == ids[len(prompt) :].tolist()
