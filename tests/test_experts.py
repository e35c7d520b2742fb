"""A mixture of experts: what devices share, and that each does its part only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nlae_jax.config import MeshConfig
from nlae_jax.lm.arch import Arch, ClampedGate, Experts, block_weights
from nlae_jax.lm.experts import mixture
from nlae_jax.mesh import DECODE_RULES, RULES, make_mesh, split, weight_sharding
from tests.conftest import drawn_params

ragged_dot = jax.lax.ragged_dot
EXPERTS = Experts(count=8, per_token=2, normalised=True)
ARCH = Arch(
    vocab_size=64,
    d_model=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=16,
    experts=EXPERTS,
    clamped_gate=ClampedGate(alpha=1.7, limit=7.0),
    biases=("router", "gate", "up", "down"),
)


def case(shape, sizes, decoding):
    """The mixture as a function of weights and rows, both on one device, and as a mesh of these sizes has them."""
    declared = {
        name: weight
        for name, weight in block_weights(ARCH).items()
        if "experts" in weight.axes or name.startswith("router")
    }
    weights = drawn_params(declared, 0)
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    mesh, rules = make_mesh(MeshConfig(*sizes)), DECODE_RULES if decoding else RULES
    placed = {name: jax.device_put(w, weight_sharding(mesh, declared[name], rules)) for name, w in weights.items()}
    rows = PartitionSpec(split(mesh, "rows" if decoding else "batch", shape[0], rules) if len(shape) > 2 else None)

    def function(weights, x):
        return mixture(ARCH, EXPERTS, {name: w[0] for name, w in weights.items()}, x, decoding)

    return function, mesh, (weights, x), (placed, jax.device_put(x, NamedSharding(mesh, rows)))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 2, 4)])
@pytest.mark.parametrize(
    ("shape", "decoding"),
    [((8, 3, 32), False), ((6, 3, 32), False), ((5, 32), False), ((8, 2, 1, 32), True), ((5, 2, 1, 32), True)],
)
def test_a_mesh_gives_what_one_device_gives(shape, decoding, sizes):
    """Values, and the gradients of rows and of every weight; also of rows that all devices have, or some of them."""
    function, mesh, whole, placed = case(shape, sizes, decoding)
    target = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
    loss = jax.jit(jax.value_and_grad(lambda w, x: jnp.vdot(function(w, x), target), argnums=(0, 1)))
    expected = loss(*whole)
    with jax.set_mesh(mesh):
        found = loss(*placed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), found, expected)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))


@jax.custom_vjp
def careless(rows, matrices, sizes):
    """A ragged product whose rows after the last group are NaN, as are those of its gradient."""
    after = (jnp.arange(len(rows)) >= sizes.sum())[:, None]
    return jnp.where(after, jnp.nan, ragged_dot(jnp.where(after, 0, rows), matrices, sizes))


def _forward(rows, matrices, sizes):
    return careless(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(kept, cotangent):
    rows, matrices, sizes = kept
    after = (jnp.arange(len(rows)) >= sizes.sum())[:, None]
    _, transpose = jax.vjp(lambda *operands: ragged_dot(*operands, sizes), jnp.where(after, 0, rows), matrices)
    of_rows, of_matrices = transpose(jnp.where(after, 0, cotangent))
    return jnp.where(after, jnp.nan, of_rows), of_matrices, None


careless.defvjp(_forward, _backward)


def test_rows_that_no_expert_here_takes_reach_nothing(monkeypatch):
    """Accelerators leave open what a ragged product makes of them: it is in no value and in no gradient."""
    function, mesh, whole, placed = case((8, 3, 32), (2, 1, 4), False)
    loss = lambda w, x: jnp.sum(jnp.square(function(w, x)))  # noqa: E731
    expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*whole)
    monkeypatch.setattr(jax.lax, "ragged_dot", lambda rows, matrices, sizes, **_: careless(rows, matrices, sizes))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*placed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), found, expected)


def test_each_device_multiplies_its_own_rows():
    """Not all of them: the FLOPs of one device are a part of all rows'."""
    function, mesh, whole, placed = case((8, 16, 32), (1, 8, 1), False)
    flops = lambda arguments: jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]  # noqa: E731
    alone = flops(whole)
    with jax.set_mesh(mesh):
        assert flops(placed) < alone / 4
