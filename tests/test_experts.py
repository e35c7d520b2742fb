"""A mixture of experts: what devices share, and that each does its part only."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nlae_jax.config import MeshConfig
from nlae_jax.lm.arch import Arch, ClampedGate, Experts, block_weights
from nlae_jax.lm.experts import mixture
from nlae_jax.lm.lora import adapter_weights
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


def case(shape, sizes, decoding, rank=0):
    """The mixture as a function of weights and rows, both on one device, and as a mesh of these sizes has them.

    With a rank, the weights hold adapters of every expert.
    """
    declared = {
        name: weight
        for name, weight in block_weights(ARCH).items()
        if "experts" in weight.axes or name.startswith("router")
    }
    if rank:
        small = lambda weight: dataclasses.replace(weight, fan_in=ARCH.d_model)  # noqa: E731
        adapters = adapter_weights(ARCH, rank, experts=True)
        declared["adapters"] = jax.tree.map(small, {name: adapters[name] for name in ("gate", "up", "down")})
    weights = drawn_params(declared, 0)
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    mesh, rules = make_mesh(MeshConfig(*sizes)), DECODE_RULES if decoding else RULES
    placed = jax.tree.map(lambda w, of: jax.device_put(w, weight_sharding(mesh, of, rules)), weights, declared)
    rows = PartitionSpec(split(mesh, "rows" if decoding else "batch", shape[0], rules) if len(shape) > 2 else None)

    def function(weights, x):
        weights = jax.tree.map(lambda w: w[0], weights)
        return mixture(ARCH, EXPERTS, weights, weights.pop("adapters", {}), 0.7, x, decoding)

    return function, mesh, (weights, x), (placed, jax.device_put(x, NamedSharding(mesh, rows)))


@pytest.mark.parametrize(("sizes", "rank"), [((2, 2, 2), 3), ((1, 8, 1), 0), ((1, 2, 4), 3)])
@pytest.mark.parametrize(
    ("shape", "decoding"),
    [((8, 3, 32), False), ((6, 3, 32), False), ((5, 32), False), ((8, 2, 1, 32), True), ((5, 2, 1, 32), True)],
)
def test_a_mesh_gives_what_one_device_gives(shape, decoding, sizes, rank):
    """Values, and the gradients of rows and of every weight and adapter; also of rows that all devices have, or some.

    Adapters lie with their experts: each device has those of its own.
    """
    function, mesh, whole, placed = case(shape, sizes, decoding, rank)
    for parts in placed[0].get("adapters", {}).values():
        count = [x.sharding.shard_shape(x.shape)[1] for x in (*parts.values(), placed[0]["up"])]
        assert count[0] == count[1] == count[2] < EXPERTS.count
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


@pytest.mark.parametrize("rank", [0, 3])
def test_rows_that_no_expert_here_takes_reach_nothing(monkeypatch, rank):
    """Accelerators leave open what a ragged product makes of them: it is in no value and in no gradient."""
    function, mesh, whole, placed = case((8, 3, 32), (2, 1, 4), False, rank)
    loss = lambda w, x: jnp.sum(jnp.square(function(w, x)))  # noqa: E731
    expected = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*whole)
    monkeypatch.setattr(jax.lax, "ragged_dot", lambda rows, matrices, sizes, **_: careless(rows, matrices, sizes))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*placed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), found, expected)


def test_an_adapter_of_an_expert_is_added_to_its_matrix():
    """Rows times W + scale · aᵀb, made in numpy expert by expert, are what the mixture computes from W, a and b."""
    function, _, (weights, x), _ = case((5, 32), (1, 1, 1), False, rank=3)
    function, adapters = jax.jit(function), weights["adapters"]
    merged = {name: w for name, w in weights.items() if name != "adapters"}
    for name, parts in adapters.items():
        a, b = (np.asarray(parts[part][0]) for part in ("a", "b"))
        change = [0.7 * a[expert].T @ b[expert] for expert in range(EXPERTS.count)]
        merged[name] = weights[name] + np.stack(change)[None]
    expected, base = function(merged, x), function({name: weights[name] for name in merged}, x)
    np.testing.assert_allclose(function(weights, x), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - base).max() > 0.1
    # An expert that no row chooses gets no gradient, and neither does its adapter.
    of = jax.grad(lambda w: function(w, x[:1]).sum())(weights)
    used = [sorted(set(np.nonzero(np.asarray(g[0]).any((1, 2)))[0])) for g in jax.tree.leaves(of["adapters"])]
    assert used == [used[0]] * 6 and len(used[0]) == EXPERTS.per_token


def test_each_device_multiplies_its_own_rows():
    """Not all of them: the FLOPs of one device are a part of all rows'."""
    function, mesh, whole, placed = case((8, 16, 32), (1, 8, 1), False)
    flops = lambda arguments: jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]  # noqa: E731
    alone = flops(whole)
    with jax.set_mesh(mesh):
        assert flops(placed) < alone / 4
