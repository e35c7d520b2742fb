"""The fused kernels, interpreted = the plain attention: values and all gradients, also split over devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nlae_jax.config import MeshConfig
from nlae_jax.lm import attention, attention_kernel
from nlae_jax.lm.arch import model_weights
from nlae_jax.lm.attention import attend
from nlae_jax.lm.segments import KeyValues
from nlae_jax.mesh import batch_sharding, make_mesh, replicated, tree_shardings
from nlae_jax.train.state import init_encoder
from tests.conftest import perturbed, vectors


def drawn(batches, lengths, heads, kv_heads, head_dim, dtype=jnp.float32, valid=0.8, seed=0):
    """Queries of the last segment, the keys and values of all, a weight for every output."""
    rng, starts = np.random.default_rng(seed), np.cumsum([0, *lengths])
    segments = []
    for batch, length, start in zip(batches, lengths, starts[:-1], strict=True):
        k, v = rng.standard_normal((2, kv_heads, *batch, length, head_dim))
        mask = rng.random((*batch, length)) < valid
        positions = np.broadcast_to(start + np.arange(length, dtype=np.int32), mask.shape)
        segments.append(KeyValues(jnp.asarray(k, dtype), jnp.asarray(v, dtype), positions, mask))
    q, weight = rng.standard_normal((2, *batches[-1], lengths[-1], heads, head_dim))
    return jnp.asarray(q, dtype), segments, weight.astype(np.float32)


def value_and_gradients(implementation, q, segments, weight, softcap=0.0, window=None):
    """The output and the gradients of its weighted sum by queries, keys and values; compiled."""

    @jax.jit
    def run(q, segments, window):
        def loss(q, keys, values):
            given = [kv._replace(k=k, v=v) for kv, k, v in zip(segments, keys, values, strict=True)]
            out = attend(q, segments[-1].positions, given, None, softcap, window, implementation)
            return (out.astype(jnp.float32) * weight).sum(), out

        keys, values = [kv.k for kv in segments], [kv.v for kv in segments]
        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, keys, values)
        return out, *gradients

    return run(q, segments, window)


def assert_equal(q, segments, weight, tolerance, **options):
    plain, fused = (value_and_gradients(name, q, segments, weight, **options) for name in ("xla", "pallas"))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(fused), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(a).max()))


BATCHES = ((), (2,), (2, 3))


@pytest.mark.parametrize("batches", [BATCHES, BATCHES[1:], BATCHES[2:], BATCHES[:1]], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_it_equals_the_plain_attention(batches, heads):
    """One to three segments, shared keys and unshared, grouped heads, lengths that fill no block."""
    assert_equal(*drawn(batches, (5, 3, 7)[-len(batches) :], *heads, 16), 1e-5)


@pytest.mark.parametrize(
    "options", [{"softcap": 2.0}, {"window": 4}, {"softcap": 3.0, "window": jnp.int32(6)}], ids=str
)
def test_it_knows_caps_and_windows(options):
    assert_equal(*drawn(BATCHES, (5, 18, 7), 4, 2, 16), 1e-5, **options)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bfloat16_differs_by_its_rounding(head_dim):
    """Both round the weights before they multiply them, one after dividing by their sum."""
    assert_equal(*drawn(BATCHES, (17, 5, 16), 3, 1, head_dim, jnp.bfloat16), 2e-2)


def test_queries_in_several_blocks(monkeypatch):
    """Gradients of keys add up over blocks, and over the rows that share them."""
    monkeypatch.setattr(attention_kernel, "_SCORE_BYTES", 4 * 16 * 128 * 2)
    assert_equal(*drawn(BATCHES, (5, 3, 37), 4, 2, 16), 1e-5)
    assert_equal(*drawn(BATCHES, (5, 3, 37), 4, 2, 16, jnp.bfloat16), 2e-2)


def test_queries_that_see_no_key():
    q, segments, weight = drawn(BATCHES, (5, 3, 7), 4, 2, 16, valid=0.0)
    plain, *_ = value_and_gradients("xla", q, segments, weight)
    fused, *gradients = value_and_gradients("pallas", q, segments, weight)
    np.testing.assert_allclose(plain, fused, rtol=1e-5, atol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))


@pytest.mark.parametrize("case", ["one query", "many keys"])
def test_what_the_kernel_is_not_for_takes_the_plain_path(case):
    q, segments, _ = drawn(((1,),), (1 if case == "one query" else 2,), 1, 1, 16)
    if case == "many keys":
        wide = 2**15
        kv = segments[0]
        segments = [KeyValues(*(jnp.repeat(x, wide, axis) for x, axis in zip(kv[:4], (2, 2, 1, 1), strict=True)))]
    made = jax.make_jaxpr(lambda q: attend(q, jnp.ones(q.shape[:2], int), segments, implementation="pallas"))(q)
    assert "pallas_call" not in str(made)


def placed(kv, mesh):
    """A segment on the mesh, its rows split if it has any."""
    rows = batch_sharding(mesh).spec if kv.positions.ndim > 1 else ()
    specs = [PartitionSpec(None, *rows)] * 2 + [PartitionSpec(*rows)] * 2
    return KeyValues(*(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(kv[:4], specs, strict=True)))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 1, 8), (2, 1, 4)])
def test_devices_split_rows_and_heads(sizes):
    """Gradients of shared keys are added up over the devices that share them; a head count may not divide."""
    batches = ((), (8,), (8, 2))
    q, segments, weight = drawn(batches, (5, 3, 7), 4, 2, 16)
    expected = value_and_gradients("xla", q, segments, weight)
    mesh = make_mesh(MeshConfig(*sizes))
    rows = batch_sharding(mesh)
    heads = "tensor" if 4 % sizes[2] == 0 else None
    q = jax.device_put(q, NamedSharding(mesh, PartitionSpec(*rows.spec, None, None, heads)))
    segments = [placed(kv, mesh) for kv in segments]
    made = value_and_gradients("pallas", q, segments, weight)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(made), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_devices_hold_their_own_rows_only():
    q, segments, weight = drawn(((), (8,), (8, 2)), (5, 3, 7), 4, 2, 16)
    mesh = make_mesh(MeshConfig(data=8))
    q = jax.device_put(q, batch_sharding(mesh))
    segments = [placed(kv, mesh) for kv in segments]

    def loss(q):
        return (attend(q, segments[-1].positions, segments, implementation="pallas") * weight).sum()

    assert "all-gather" not in jax.jit(jax.grad(loss)).lower(q).compile().as_text()


@pytest.mark.parametrize("remat", ["none", "linear"])
@pytest.mark.parametrize("sizes", [None, pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_an_encoder_that_uses_it(lora_roles, params, sizes, remat):
    """Log-probs of responses and their gradients by the adapters, on one device and on eight."""
    adapters = perturbed(init_encoder(lora_roles, params, jax.random.PRNGKey(0)), 0)
    h = vectors(8, lora_roles.encoder.arch.d_model)
    response = np.random.default_rng(0).integers(0, 400, (8, 2, 6))
    if sizes:
        mesh = make_mesh(MeshConfig(*sizes))
        h, response = jax.device_put((h, response), batch_sharding(mesh))
        adapters = jax.device_put(adapters, replicated(mesh))
        params = jax.device_put(jax.device_get(params), tree_shardings(mesh, model_weights(lora_roles.encoder.arch)))

    def run(attention):
        roles = dataclasses.replace(lora_roles, encoder=lora_roles.encoder.clone(attention=attention, remat=remat))

        def loss(adapters, params):
            variables = roles.encoder_variables(params, adapters)
            chosen, entropy = roles.encoder.apply(variables, h, response, method="log_probs")
            return chosen.sum(), (chosen, entropy)

        return jax.jit(jax.grad(loss, has_aux=True))(adapters, params)

    plain, fused = run("xla"), run("pallas")
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(fused), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(a).max()))


def test_on_a_cpu_the_plain_path_is_taken():
    q, segments, _ = drawn(BATCHES, (5, 3, 7), 4, 2, 16)
    made = jax.make_jaxpr(lambda q: attend(q, segments[-1].positions, segments))(q)
    assert "pallas_call" not in str(made)
    assert set(attention.IMPLEMENTATIONS) == {"xla", "pallas"}
