"""The encoder over three shared segments = a plain forward pass over every sample's whole sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlae_jax.lm.arch import model_weights
from nlae_jax.lm.lora import adapter_weights
from nlae_jax.lm.transformer import Segment, Transformer
from nlae_jax.roles.encoder import Encoder, inject
from tests.conftest import INJECTION_SCALE, drawn_params, vectors

B, G, R, LORA_SCALE = 2, 3, 5, 0.5


@pytest.fixture(scope="module")
def small(arch):
    """The tiny vocabulary on narrower blocks, three of them."""
    return dataclasses.replace(
        arch, d_model=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=32, tied_head=False
    )


@pytest.fixture(scope="module")
def setting(small):
    """h, responses, and trained parameters: base and adapters, both to be differentiated."""
    rng = np.random.default_rng(0)
    trained = {"base": drawn_params(model_weights(small), 1), "adapters": drawn_params(adapter_weights(small, 2), 2)}
    return vectors(B, 24), rng.integers(0, small.vocab_size, (B, G, R)), trained


def variables(trained):
    return {"params": {"lm": trained["base"]}, "lora": {"lm": {"blocks": trained["adapters"]}}}


def plain_log_probs(arch, protocol, trained, h, response):
    """log p of everything after the slot [B, G, S + R], from one sequence per sample and one softmax over it."""
    lm = Transformer(arch, LORA_SCALE)
    lm_variables = {"params": trained["base"], "lora": {"blocks": trained["adapters"]}}
    groups = response.shape[1]
    ids = jnp.concatenate(
        [
            jnp.broadcast_to(jnp.array(part), (h.shape[0], groups, len(part)))
            for part in (protocol.encoder_prefix, (protocol.marker_id,), protocol.encoder_tail)
        ]
        + [response],
        axis=2,
    ).reshape(h.shape[0] * groups, -1)
    slot = len(protocol.encoder_prefix)
    x = trained["base"]["embed"][ids]
    injected = h * (protocol.injection_scale / np.linalg.norm(h, axis=1, keepdims=True))
    x = x.at[:, slot].set(np.repeat(injected, groups, axis=0))
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    (hidden,), _ = lm.apply(lm_variables, (Segment(x, positions, ids >= 0),), method="run")
    log_probs = jax.nn.log_softmax(lm.apply(lm_variables, hidden[:, slot:-1], method="logits"))
    chosen = jnp.take_along_axis(log_probs, ids[:, slot + 1 :, None], -1)[..., 0]
    return chosen.reshape(h.shape[0], groups, -1)


def assert_trees_close(ours, theirs, tolerance=1e-5):
    """Relative to the largest element of each array."""
    for path, expected in jax.tree_util.tree_leaves_with_path(theirs):
        actual = dict(jax.tree_util.tree_leaves_with_path(ours))[path]
        bound = tolerance * max(1e-3, np.abs(expected).max())
        assert np.abs(actual - expected).max() < bound, jax.tree_util.keystr(path)


def test_shared_segments_are_a_plain_forward_pass(small, protocol, setting):
    """Values, and gradients with respect to the base and the adapters."""
    h, response, trained = setting
    encoder = Encoder(small, protocol, LORA_SCALE)
    weights = np.random.default_rng(1).standard_normal((B, G, R)).astype(np.float32)

    def shared(trained):
        loss_of = lambda log_probs, weight: (log_probs * weight).sum()  # noqa: E731
        loss, (log_probs, _) = encoder.apply(variables(trained), h, response, loss_of, weights, method="loss")
        return loss, log_probs

    def plain(trained):
        log_probs = plain_log_probs(small, protocol, trained, h, response)[..., -R:]
        return (log_probs * weights).sum(), log_probs

    (_, ours), our_gradient = jax.jit(jax.value_and_grad(shared, has_aux=True))(trained)
    (_, theirs), their_gradient = jax.jit(jax.value_and_grad(plain, has_aux=True))(trained)
    assert ours.shape == (B, G, R)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert np.abs(their_gradient["adapters"]["q"]["a"]).max() > 1e-3
    assert_trees_close(our_gradient, their_gradient)


def test_warm_start_log_probs_hold_the_opening_tag_and_the_response(small, protocol, setting):
    h, response, trained = setting
    encoder = Encoder(small, protocol, LORA_SCALE)
    weights = np.random.default_rng(3).standard_normal((B, protocol.opening_length + R)).astype(np.float32)
    loss_of = lambda log_probs, weight: (log_probs * weight).sum()  # noqa: E731
    run = jax.jit(lambda t: encoder.apply(variables(t), h, response[:, 0], loss_of, weights, method="sft_loss"))
    loss, log_probs = run(trained)
    opening, after = np.split(np.asarray(log_probs), [protocol.opening_length], axis=1)
    np.testing.assert_allclose(loss, (log_probs * weights).sum(), rtol=1e-5)
    plain = jax.jit(lambda t: plain_log_probs(small, protocol, t, h, response[:, :1]))(trained)[:, 0]
    assert opening.shape == (B, protocol.opening_length)
    np.testing.assert_allclose(after, plain[:, -R:], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(opening, plain[:, -R - protocol.opening_length : -R], rtol=1e-5, atol=1e-5)


def test_what_follows_a_response_has_no_influence(small, protocol, setting):
    h, response, trained = setting
    encoder = Encoder(small, protocol, LORA_SCALE)
    run = jax.jit(lambda response: encoder.apply(variables(trained), h, response, method="log_probs")[0])
    other = response.copy()
    other[:, 0, 3:] = 7
    ours, theirs = run(response), run(other)
    np.testing.assert_array_equal(ours[:, 0, :3], theirs[:, 0, :3])
    np.testing.assert_array_equal(ours[:, 1:], theirs[:, 1:])
    assert np.abs(ours - theirs)[:, 0, 3:].min() > 1e-4


def test_only_the_direction_of_an_activation_is_seen(small, protocol, setting):
    h, response, trained = setting
    encoder = Encoder(small, protocol, LORA_SCALE)
    run = jax.jit(lambda h: encoder.apply(variables(trained), h, response, method="log_probs")[0])
    np.testing.assert_allclose(run(h), run(100 * h), atol=1e-5)
    assert np.abs(run(h) - run(h[::-1])).max() > 1e-2


def test_injection_sets_the_norm():
    h = np.stack([vectors(1, 32)[0], np.zeros(32), 1e-20 * np.ones(32)]).astype(np.float32)
    out = inject(h, INJECTION_SCALE)
    np.testing.assert_allclose(out[0], h[0] * INJECTION_SCALE / np.linalg.norm(h[0]), rtol=1e-6)
    np.testing.assert_array_equal(out[1], 0)
    assert np.isfinite(out).all()
    assert inject(jnp.asarray(h, jnp.bfloat16), 1.0).dtype == jnp.float32


def test_the_prompt_is_as_long_as_its_parts(small, protocol):
    encoder = Encoder(small, protocol)
    assert encoder.prompt_length == len(protocol.encoder_prefix) + 1 + len(protocol.encoder_tail)
