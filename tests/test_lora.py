"""Adapters: merged = applied, and none at all at the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlae_jax.lm.lora import adapter_weights, init_adapters, linear, merge
from nlae_jax.lm.transformer import Transformer
from tests.conftest import perturbed

SCALE = 0.7


@pytest.fixture(scope="module")
def adapters(arch):
    return init_adapters(jax.random.PRNGKey(0), arch, 4)


@pytest.fixture(scope="module")
def logits(arch):
    """Jitted: variables -> logits of a fixed text, with `SCALE` before the adapters."""
    ids = np.arange(2 * 9).reshape(2, 9) % 50 + 3
    lm = Transformer(arch, SCALE)
    return jax.jit(lambda variables: lm.apply(variables, ids, np.ones_like(ids, bool)))


def test_adapters_sit_on_every_matrix_of_the_blocks(arch, adapters):
    assert set(adapters) == {"q", "k", "v", "o", "gate", "up", "down"}
    declared = adapter_weights(arch, 4)
    assert jax.tree.map(jnp.shape, adapters) == {
        name: {part: weight.shape for part, weight in parts.items()} for name, parts in declared.items()
    }
    assert adapters["down"]["a"].shape == (2, 4, arch.d_ff)
    assert adapters["down"]["b"].shape == (2, 4, arch.d_model)


def test_fresh_adapters_leave_the_base_as_it_is(params, adapters, logits):
    assert all(np.any(parts["a"]) and not np.any(parts["b"]) for parts in adapters.values())
    np.testing.assert_array_equal(
        logits({"params": params, "lora": {"blocks": adapters}}), logits({"params": params, "lora": {}})
    )


def test_merged_is_applied(params, adapters, logits):
    moved = perturbed(adapters, 1, 0.2)
    applied = logits({"params": params, "lora": {"blocks": moved}})
    blocks = {name: merge(weight, moved.get(name), SCALE) for name, weight in params["blocks"].items()}
    merged = logits({"params": {**params, "blocks": blocks}, "lora": {}})
    base = logits({"params": params, "lora": {}})
    np.testing.assert_allclose(applied, merged, atol=2e-4)
    assert np.abs(applied - base).max() > 0.1


def test_one_block_is_merged_like_the_stack_of_all(params, adapters):
    moved = perturbed(adapters, 2)
    for name in ("q", "down"):
        stacked = merge(params["blocks"][name], moved[name], SCALE)
        one = merge(params["blocks"][name][1], jax.tree.map(lambda a: a[1], moved[name]), SCALE)
        np.testing.assert_allclose(stacked[1], one, atol=1e-6)
        delta = SCALE * np.asarray(moved[name]["a"][1]).T @ np.asarray(moved[name]["b"][1])
        np.testing.assert_allclose(one, params["blocks"][name][1] + delta, atol=1e-5)


def test_linear_keeps_leading_axes_and_dtype():
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 3, 5)).astype(np.float32), rng.standard_normal((5, 4)).astype(np.float32)
    adapter = {"a": rng.standard_normal((2, 5)), "b": rng.standard_normal((2, 4))}
    expected = x @ weight + 0.5 * x @ adapter["a"].T @ adapter["b"]
    np.testing.assert_allclose(linear(x, weight, adapter, 0.5), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(linear(x, weight, None, 0.5), x @ weight, rtol=1e-5, atol=1e-5)
    low = linear(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16), adapter, 0.5)
    assert low.dtype == jnp.bfloat16


def test_merged_weights_are_float32(params, adapters):
    half = jnp.asarray(params["blocks"]["q"], jnp.bfloat16)
    assert merge(half, adapters["q"], SCALE).dtype == jnp.float32
    np.testing.assert_array_equal(merge(half, None, SCALE), half.astype(jnp.float32))
