"""The gated delta rule: as defined, in chunks, over segments, with padding, and its gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlae_jax.lm.arch import DeltaNet
from nlae_jax.lm.delta import convolved, in_chunks, mix, token_by_token
from nlae_jax.lm.segments import empty_state

NET = DeltaNet(key_heads=2, value_heads=4, key_dim=3, value_dim=5, width=3)


def drawn(length, rows=2, net=NET, seed=0, strength=1.0):
    """Queries, keys, values, logarithms of decay, steps, and a memory before them."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((2, rows, length, net.key_heads, net.key_dim))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    values = rng.standard_normal((rows, length, net.value_heads, net.value_dim))
    log_decay = -strength * rng.gamma(1.0, size=values.shape[:-1])
    step = rng.uniform(size=log_decay.shape)
    memory = rng.standard_normal((rows, net.value_heads, net.key_dim, net.value_dim))
    return [np.float32(x) for x in (*keys, values, log_decay, step, memory)]


def by_hand(q, k, v, log_decay, step, memory):
    out, memory = np.zeros(v.shape), np.float64(memory)
    each = v.shape[2] // k.shape[2]
    for row, token, head in np.ndindex(v.shape[:3]):
        key, state = k[row, token, head // each], memory[row, head] * np.exp(log_decay[row, token, head])
        state = state + step[row, token, head] * np.outer(key, v[row, token, head] - state.T @ key)
        memory[row, head], out[row, token, head] = state, state.T @ q[row, token, head // each]
    return out, memory


RULES = {"tokens": jax.jit(token_by_token), "chunks": jax.jit(partial(in_chunks, chunk=8))}


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 8, 21]), st.sampled_from([0.01, 1.0, 60.0]), st.integers(0, 99))
def test_chunks_are_the_rule_token_by_token(length, strength, seed):
    """Also where nearly all or nothing is forgotten at each token, and where chunks are not full."""
    inputs = drawn(length, seed=seed, strength=strength)
    for rule in RULES.values():
        for found, expected in zip(rule(*inputs), by_hand(*inputs), strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-5)


def test_chunks_of_the_size_in_use_are_the_rule_too():
    inputs = drawn(150, rows=1)
    for found, expected in zip(jax.jit(in_chunks)(*inputs), RULES["tokens"](*inputs), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_what_a_whole_chunk_forgets_does_not_blur_near_tokens():
    """Some tokens forget much and the others little: differences of the chunk's running sum would lose 4e-6."""
    inputs = drawn(150, rows=1)
    inputs[3][:] = -0.013
    inputs[3][:, ::3] = -11.3
    for found, expected in zip(jax.jit(in_chunks)(*inputs), by_hand(*inputs), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("strength", [1.0, 200.0])
def test_the_gradient_of_chunks_is_that_of_the_rule(strength):
    inputs = drawn(19, strength=strength)
    weight = np.random.default_rng(1).standard_normal(inputs[2].shape)

    def loss(rule, *inputs):
        out, memory = rule(*inputs)
        return (out * weight).sum() + jnp.square(memory).sum()

    every = tuple(range(6))
    found, expected = (jax.jit(jax.grad(partial(loss, RULES[name]), every))(*inputs) for name in ("chunks", "tokens"))
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def make_layer():
    """A layer's `mix` of inputs [rows, T, channels], as a function of them, what is valid and the state before."""
    rng, wide = np.random.default_rng(3), 6
    draw = lambda *shape: jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    keys, values = NET.key_heads * NET.key_dim, NET.value_heads * NET.value_dim
    matrices = {"delta_q": draw(wide, keys), "delta_k": draw(wide, keys), "delta_v": draw(wide, values)}
    matrices["delta_z"] = draw(wide, values)
    weights = {f"{name}_conv": draw(NET.width, matrix.shape[1]) for name, matrix in matrices.items()}
    weights |= {"delta_a": draw(wide, NET.value_heads), "delta_b": draw(wide, NET.value_heads)}
    weights |= {"delta_rate": draw(NET.value_heads), "delta_bias": draw(NET.value_heads)}
    weights["delta_norm"] = 1 + draw(NET.value_dim)

    def run(x, valid, state):
        return mix(NET, 1e-6, weights, lambda name: x @ matrices[name], x, valid, state)

    return jax.jit(run)


LAYER = make_layer()


def test_a_segment_goes_on_where_the_one_before_ended():
    """Cut anywhere, shorter than the convolution too; token by token at the end, as decoding does."""
    x = np.float32(np.random.default_rng(4).standard_normal((2, 11, 6)))
    valid = np.ones(x.shape[:2], bool)
    whole, last = LAYER(x, valid, empty_state(NET, 2, jnp.float32))
    for cuts in ([4], [1, 2, 6, 7]):
        state, outs = empty_state(NET, 2, jnp.float32), []
        for first, end in zip([0, *cuts], [*cuts, 11], strict=True):
            out, state = LAYER(x[:, first:end], valid[:, first:end], state)
            outs.append(out)
        np.testing.assert_allclose(np.concatenate(outs, 1), whole, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, last)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=3))
def test_padding_changes_no_state(parts):
    """Segments of five places, some tokens with padding on both sides, whatever stands there, are the tokens alone."""
    rng = np.random.default_rng(5)
    state, tokens, outs = empty_state(NET, 1, jnp.float32), [], []
    for left, count in parts:
        x, valid = np.float32(rng.standard_normal((1, 5, 6))), np.zeros((1, 5), bool)
        valid[:, left : left + count] = True
        out, state = LAYER(x, valid, state)
        outs.append(np.asarray(out)[valid])
        tokens.append(x[valid])
    x = np.concatenate(tokens)[None]
    valid = np.arange(15)[None] < x.shape[1]
    whole, last = LAYER(np.pad(x, ((0, 0), (0, 15 - x.shape[1]), (0, 0))), valid, empty_state(NET, 1, jnp.float32))
    np.testing.assert_allclose(np.concatenate(outs), whole[valid], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, last)


def test_a_convolution_is_numpys_of_each_channel():
    rng = np.random.default_rng(6)
    x, weight, tail = (np.float32(rng.standard_normal(shape)) for shape in ((2, 7, 3), (4, 3), (2, 3, 3)))
    found, after = convolved(x, weight, tail, np.ones((2, 7), bool))
    inputs = np.concatenate([tail, x], 1)
    for row, channel in np.ndindex(2, 3):
        plain = np.convolve(inputs[row, :, channel], weight[::-1, channel], "valid")
        np.testing.assert_allclose(found[row, :, channel], plain / (1 + np.exp(-plain)), atol=1e-5)
    np.testing.assert_array_equal(after, inputs[:, -3:])
