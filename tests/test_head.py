"""The chunked head's loss beside the whole array of log-probs: values, gradients, what it lets through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlae_jax.lm import head
from nlae_jax.train import objectives

D, V = 8, 37


def case(shape, dtype=np.float32):
    rng = np.random.default_rng(0)
    draw = lambda *size: jnp.asarray(rng.standard_normal(size), dtype)  # noqa: E731
    return draw(*shape, D), 2 * draw(V, D), rng.integers(0, V, shape), draw(*shape), draw(*shape)


def loss_of(log_probs, weight, reference):
    return (weight * (jnp.exp(log_probs - reference) + log_probs)).sum()


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("shape", [(3, 5), (2, 2, 3)])
def test_loss_and_gradients_are_those_of_the_whole(shape, softcap, chunk):
    x, weight, targets, *extras = case(shape)

    def chunked(x, weight):
        total, rows = head.loss(loss_of, softcap, chunk, x, weight, targets, tuple(extras))
        return 3.0 * total, rows

    def plain(x, weight):
        log_probs = jax.nn.log_softmax(head.logits(x, weight, softcap))
        chosen = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
        return 3.0 * loss_of(chosen, *extras), (chosen, -(jnp.exp(log_probs) * log_probs).sum(-1))

    both = [jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(x, weight) for f in (chunked, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), *both)
    without = jax.jit(chunked)(x, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), without, both[0][0])
    forward = jax.jit(lambda x: head.log_probs(x, weight, targets, softcap, chunk))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), forward, both[1][0][1])


@pytest.mark.parametrize("ruled_out", [[7], [0, 36], list(range(5, 30))])
def test_tokens_that_are_ruled_out_give_no_nan(ruled_out):
    """Logits of -inf: log-probs, entropy and gradients are those of a vocabulary without these tokens."""
    rng, others = np.random.default_rng(0), np.delete(np.arange(V), ruled_out)
    capped, targets = rng.standard_normal((6, V)).astype(np.float32), rng.integers(0, len(others), 6)
    capped[:, ruled_out] = -np.inf

    def both(capped, targets):
        chosen, entropy, *_ = head._softmax(capped, targets)
        return (chosen - 0.3 * entropy).sum(), (chosen, entropy)

    (_, rows), gradient = jax.value_and_grad(both, has_aux=True)(jnp.asarray(capped), others[targets])
    (_, expected), theirs = jax.value_and_grad(both, has_aux=True)(jnp.asarray(capped[:, others]), targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), rows, expected)
    np.testing.assert_allclose(np.asarray(gradient)[:, others], theirs, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(gradient)[:, ruled_out], 0)


def test_a_masked_token_that_is_ruled_out_adds_nothing():
    """Its log-prob is -inf, and what the objective makes of it has no NaN."""
    log_probs, mask = jnp.array([-jnp.inf, -1.0]), jnp.array([False, True])
    for loss_of in (
        lambda log_probs: -objectives.masked_mean(log_probs, mask),
        lambda log_probs: objectives.policy_loss(log_probs, jnp.array([-3.0, -1.0]), jnp.ones(2), mask, 0.1),
    ):
        value, gradient = jax.value_and_grad(loss_of)(log_probs)
        assert np.isfinite(value)
        np.testing.assert_allclose(gradient, [0, -1])


@pytest.mark.parametrize(
    ("shape", "chunk", "expected"),
    [((3, 5), 12, (2, 3, 3)), ((3, 5), 64, (1, 3, 5)), ((3, 5), 1, (5, 3, 1)), ((16, 52), 256, (4, 16, 13))],
)
def test_chunks_are_as_equal_as_can_be(shape, chunk, expected):
    (chunks,) = head._chunked((jnp.ones(shape),), shape, chunk)
    assert chunks.shape == expected
    assert chunks.sum() == np.prod(shape)


def test_a_frozen_head_costs_no_gradient():
    x, weight, targets, *extras = case((4, 8))
    x = jnp.tile(x, (1, 8, 1))
    targets, extras = np.tile(targets, (1, 8)), tuple(jnp.tile(e, (1, 8)) for e in extras)

    def flops(argnums):
        run = jax.grad(lambda x, w: head.loss(loss_of, 0.0, 512, x, w, targets, extras)[0], argnums=argnums)
        return jax.jit(run).lower(x, weight).compile().cost_analysis()["flops"]

    product = 2 * 4 * 64 * D * V
    assert flops((0, 1)) - flops(0) > 0.9 * product


def test_bfloat16_products_give_float32_numbers():
    x, weight, targets, *extras = case((3, 5), jnp.bfloat16)
    extras = tuple(e.astype(jnp.float32) for e in extras)
    run = lambda x, w: head.loss(loss_of, 0.0, 4, x, w, targets, extras)  # noqa: E731
    (loss, rows), gradients = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(x, weight)
    assert {loss.dtype, *(row.dtype for row in rows)} == {jnp.dtype("float32")}
    assert {gradient.dtype for gradient in gradients} == {jnp.dtype("bfloat16")}
    exact = jax.grad(lambda x, w: run(x, w)[0], argnums=(0, 1))(x.astype(jnp.float32), weight.astype(jnp.float32))
    for mine, theirs in zip(gradients, exact, strict=True):
        assert np.abs(mine - theirs).max() < 0.02 * np.abs(theirs).max()
