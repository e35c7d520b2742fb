"""Attention over segments = plain attention over the whole sequence of every sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlae_jax.lm import attention
from nlae_jax.lm.arch import Arch
from nlae_jax.lm.rope import apply_rope, rope_table
from nlae_jax.lm.segments import KeyValues, empty_caches

HEAD_DIM = 4
attend = jax.jit(attention.attend)


def plain(q, q_positions, k, v, positions, valid):
    """One query row at a time in float64: q [T, heads, D], k and v [kv_heads, S, D], positions and valid [S]."""
    repeats = q.shape[1] // k.shape[0]
    out = np.zeros(q.shape)
    for t in range(q.shape[0]):
        for head in range(q.shape[1]):
            seen = valid & (positions <= q_positions[t])
            scores = k[head // repeats].astype(np.float64) @ q[t, head] / np.sqrt(HEAD_DIM)
            weights = np.exp(scores[seen] - scores[seen].max())
            out[t, head] = weights @ v[head // repeats][seen] / weights.sum()
    return out


def segment(rng, batch, kv_heads, length, start, all_valid):
    """Random keys and values whose positions follow `start`; some invalid, but never a segment's first."""
    shape = (kv_heads, *batch, length, HEAD_DIM)
    valid = rng.random((*batch, length)) < (1.0 if all_valid else 0.7)
    valid[..., 0] = True
    return KeyValues(
        rng.standard_normal(shape).astype(np.float32),
        rng.standard_normal(shape).astype(np.float32),
        np.broadcast_to(start + np.arange(length, dtype=np.int32), valid.shape),
        valid,
    )


def expanded(segments, index):
    """The keys, values, positions and mask that row `index` of the last segment sees, side by side."""
    rows = []
    for kv in segments:
        own = index[: kv.positions.ndim - 1]
        rows.append((kv.k[:, *own], kv.v[:, *own], kv.positions[own], kv.valid[own]))
    return tuple(np.concatenate(parts, axis) for parts, axis in zip(zip(*rows, strict=True), (1, 1, 0, 0), strict=True))


# Few sizes, many combinations: every new shape compiles.
@settings(max_examples=20)
@given(
    batch=st.integers(1, 2),
    group=st.integers(1, 3),
    lengths=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 4)),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    all_valid=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_three_segments_are_one_sequence(batch, group, lengths, heads, all_valid, seed):
    rng = np.random.default_rng(seed)
    num_heads, kv_heads = heads
    starts = np.cumsum([0, *lengths])
    batches = ((), (batch,), (batch, group))
    segments = [
        segment(rng, axes, kv_heads, length, start, all_valid)
        for axes, length, start in zip(batches, lengths, starts[:-1], strict=True)
    ]
    # Large logits: without the shared maximum the exponentials would overflow.
    q = 30 * rng.standard_normal((batch, group, lengths[2], num_heads, HEAD_DIM)).astype(np.float32)
    out = np.asarray(attend(q, segments[-1].positions, segments))
    assert out.shape == q.shape
    for index in np.ndindex(batch, group):
        expected = plain(q[index], segments[-1].positions[index], *expanded(segments, index))
        np.testing.assert_allclose(out[index], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window", [None, 4])
def test_gradients_are_those_of_one_plain_softmax(softcap, window):
    rng = np.random.default_rng(3)
    batches, lengths = ((), (2,), (2, 3)), (5, 3, 4)
    starts = np.cumsum([0, *lengths])
    segments = [
        segment(rng, axes, 2, n, start, False) for axes, n, start in zip(batches, lengths, starts[:-1], strict=True)
    ]
    segments[0].valid[:], segments[1].valid[0, :], segments[2].valid[0, 0, :2] = False, False, False  # two see nothing
    q, weight = rng.standard_normal((2, 2, 3, 4, 4, HEAD_DIM)).astype(np.float32)
    positions = segments[-1].positions

    def ours(q, keys, values):
        given = [kv._replace(k=k, v=v) for kv, k, v in zip(segments, keys, values, strict=True)]
        return (attention.attend(q, positions, given, None, softcap, window) * weight).sum()

    def plain(q, keys, values):
        """Every row with all its keys side by side."""

        def wide(x, front, back):
            """[*front, *batch, *back] with the batch (2, 3)."""
            batch = x.shape[front : x.ndim - back]
            x = x.reshape(*x.shape[:front], *batch, *[1] * (2 - len(batch)), *x.shape[x.ndim - back :])
            return jnp.broadcast_to(x, (*x.shape[:front], 2, 3, *x.shape[x.ndim - back :]))

        k, v = (jnp.concatenate([wide(x, 1, 2) for x in of], -2) for of in (keys, values))
        at = jnp.concatenate([wide(kv.positions, 0, 1) for kv in segments], -1)
        valid = jnp.concatenate([wide(kv.valid, 0, 1) for kv in segments], -1)
        scores = jnp.einsum("bgtkrd,kbgsd->bgtkrs", q.reshape(2, 3, 4, 2, 2, HEAD_DIM), k) * HEAD_DIM**-0.5
        scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
        age = positions[..., None] - at[..., None, :]
        seen = valid[..., None, :] & (age >= 0) & (age < (window or 99))
        out = jax.nn.softmax(jnp.where(seen[:, :, :, None, None], scores, -1e30), -1)
        return (jnp.einsum("bgtkrs,kbgsd->bgtkrd", out, v).reshape(q.shape) * weight).sum()

    given = q, [kv.k for kv in segments], [kv.v for kv in segments]
    mine, theirs = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*given) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), mine, theirs)


def test_keys_of_later_positions_are_not_seen():
    rng = np.random.default_rng(0)
    kv = segment(rng, (1,), 2, 5, 0, True)
    q = rng.standard_normal((1, 5, 2, HEAD_DIM)).astype(np.float32)
    before = attend(q, kv.positions, [kv])
    changed = kv._replace(k=kv.k.copy(), v=kv.v.copy())
    changed.k[:, :, 3:] += 1
    changed.v[:, :, 3:] += 1
    after = attend(q, kv.positions, [changed])
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (np.abs(before - after)[:, 3:] > 1e-3).any(-1).all()


def test_a_query_without_any_key_gives_no_nan():
    rng = np.random.default_rng(1)
    kv = segment(rng, (2,), 1, 3, 0, True)._replace(valid=np.zeros((2, 3), bool))
    q = rng.standard_normal((2, 3, 2, HEAD_DIM)).astype(np.float32)

    def total(q, k, v):
        return attend(q, kv.positions, [kv._replace(k=k, v=v)]).sum()

    assert np.isfinite(attend(q, kv.positions, [kv])).all()
    for gradient in jax.grad(total, argnums=(0, 1, 2))(q, kv.k, kv.v):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("size", [1e30, -1e30])
def test_the_scores_of_masked_keys_may_overflow(implementation, softcap, size):
    """They are left out before the exponential: output and gradients are those without the keys."""
    rng = np.random.default_rng(5)
    kv = segment(rng, (2,), 1, 4, 0, True)
    valid = kv.valid & (np.arange(4) != 1)
    huge = kv._replace(valid=valid, k=np.where(valid[None, ..., None], kv.k, np.float32(size)))
    q = (1e9 * rng.standard_normal((2, 4, 2, HEAD_DIM))).astype(np.float32)

    def gradients(kv):
        def total(q, k, v):
            out = attention.attend(q, kv.positions, [kv._replace(k=k, v=v)], None, softcap, None, implementation)
            return (out * jnp.arange(HEAD_DIM)).sum()

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, kv.k, kv.v)

    for mine, theirs in zip(
        jax.tree.leaves(gradients(huge)), jax.tree.leaves(gradients(kv._replace(valid=valid))), strict=True
    ):
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_segment_of_masked_keys_changes_nothing():
    rng = np.random.default_rng(2)
    first, second = segment(rng, (), 2, 3, 0, True), segment(rng, (2,), 2, 4, 3, True)
    q = rng.standard_normal((2, 4, 4, HEAD_DIM)).astype(np.float32)
    alone = attend(q, second.positions, [second])
    masked = attend(q, second.positions, [first._replace(valid=np.zeros(3, bool)), second])
    np.testing.assert_allclose(alone, masked, rtol=1e-6)


def test_rope_depends_on_the_distance_only():
    arch = Arch(8, 8, 1, 1, 1, HEAD_DIM, 8)
    rng = np.random.default_rng(4)
    q, k = rng.standard_normal((2, 1, 1, HEAD_DIM)).astype(np.float32)

    def score(at_q, at_k):
        turned = [apply_rope(x, rope_table(arch, jnp.array([at]))) for x, at in ((q, at_q), (k, at_k))]
        return float((turned[0] * turned[1]).sum())

    assert abs(score(9, 4) - score(105, 100)) < 1e-4
    assert abs(score(9, 4) - score(9, 8)) > 1e-2
    np.testing.assert_array_equal(apply_rope(q, rope_table(arch, jnp.array([0]))), q)


def test_room_that_is_not_written_yet_lies_after_every_query():
    arch = Arch(8, 8, 3, 2, 1, HEAD_DIM, 8)
    caches = empty_caches(arch, jnp.array([5, 9]), 4, jnp.float32)
    assert caches.k.shape == caches.v.shape == (3, 1, 2, 4, HEAD_DIM)
    np.testing.assert_array_equal(caches.positions, [[5, 6, 7, 8], [9, 10, 11, 12]])
    # A first token at the start position sees its own key alone, whatever lies in the rest.
    filled = caches._replace(k=caches.k[0] + 3.0, v=jnp.arange(8.0).reshape(1, 2, 4, 1) + jnp.zeros(HEAD_DIM))
    q = jnp.ones((2, 1, 2, HEAD_DIM))
    out = attend(q, jnp.array([[5], [9]]), [filled])
    np.testing.assert_allclose(out[:, 0, 0, 0], [0.0, 4.0], atol=1e-6)
