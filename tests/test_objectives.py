"""The maths of training against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nlae_jax.roles import direction
from nlae_jax.roles.direction import Baselines, baselines, direction_mse, fve, unit_direction
from nlae_jax.train import objectives
from nlae_jax.train.objectives import FAILED_MSE, REWARDS, group_advantages, kl_k3, masked_mean, policy_loss, rewards
from tests.conftest import vectors

number = st.floats(-8, 8, width=32)
pair_mse = jax.jit(direction_mse)


@given(arrays.arrays(np.float32, (2, 6), elements=number), st.floats(0.125, 64, width=32))
def test_mse_is_twice_one_minus_the_cosine(pair, scale):
    if np.linalg.norm(pair, axis=1).min() < 0.1:
        return
    a, b = pair.astype(np.float64)
    expected = 2 * (1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert abs(pair_mse(pair[0], pair[1]) - expected) < 1e-5
    assert abs(pair_mse(pair[0] * scale, pair[1]) - expected) < 1e-5


def test_mse_of_equal_orthogonal_and_opposite():
    x, y = np.array([3.0, 0, 0]), np.array([0, 2.0, 0])
    np.testing.assert_allclose([direction_mse(x, x), direction_mse(x, y), direction_mse(x, -x)], [0, 2, 4], atol=1e-6)
    np.testing.assert_allclose(jnp.square(unit_direction(x)).mean(), 1, rtol=1e-6)


def test_the_gradient_at_a_zero_vector_is_finite():
    value, gradient = jax.value_and_grad(lambda x: direction_mse(x, jnp.ones(5)))(jnp.zeros(5))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert np.isfinite(jax.grad(lambda h: direction_mse(jnp.ones(5), h))(jnp.zeros(5))).all()


def test_bfloat16_is_compared_in_float32():
    x = vectors(2, 300)
    low = direction_mse(jnp.asarray(x[0], jnp.bfloat16), jnp.asarray(x[1], jnp.bfloat16))
    assert low.dtype == jnp.float32
    assert abs(low - direction_mse(x[0], x[1])) < 0.02


@pytest.fixture(scope="module")
def data():
    """Activations of different norms, their unit vectors' mean, and its norm m."""
    h = vectors(200, 24) * np.linspace(1, 30, 200)[:, None].astype(np.float32)
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    return h, unit.mean(0), float(np.linalg.norm(unit.mean(0)))


def test_both_baselines_follow_from_the_mean_direction(data):
    h, _, m = data
    assert 0.2 < m < 0.9
    denominators = baselines(h)
    assert abs(denominators.variance - (1 - m**2)) < 1e-5
    assert abs(denominators.mean_norm - 2 * (1 - m)) < 1e-5


def test_predicting_the_mean_explains_nothing(data):
    h, mean, m = data
    denominators = baselines(h)
    # Against its own denominator, the renormalised mean; the mean as it is, by its plain squared error.
    assert abs(fve(direction_mse(jnp.tile(mean, (200, 1)), h), denominators.mean_norm)) < 1e-5
    squared = np.square(unit_direction(h) - mean * 24**0.5).mean(1)
    assert abs(fve(squared, denominators.variance)) < 1e-5
    # The two definitions differ: the mean direction is worth less than nothing by the paper's.
    of_mean = fve(direction_mse(mean, h), denominators.variance)
    assert abs(of_mean - (1 - 2 / (1 + m))) < 1e-5


def test_perfect_reconstruction_explains_everything(data):
    h, _, _ = data
    assert all(abs(fve(direction_mse(3 * h, h), baseline) - 1) < 1e-5 for baseline in baselines(h))
    assert isinstance(baselines(h), Baselines)


def test_rewards():
    mse, valid = np.array([0.5, 0.1, 0.1], np.float32), np.array([True, True, False])
    lengths = np.array([10, 20, 30])
    np.testing.assert_allclose(rewards(mse, valid, 0.0 * lengths, "neg_mse"), [-0.5, -0.1, -FAILED_MSE])
    np.testing.assert_allclose(rewards(mse, valid, 0.01 * lengths, "neg_mse"), [-0.6, -0.3, -2.3], rtol=1e-6)
    np.testing.assert_allclose(rewards(mse, valid, 0.0 * lengths, "neg_log_mse"), [0.693147, 2.302575, -2], rtol=1e-5)


@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("length_penalty", [0.0, 0.01, 0.5])
@given(
    mse=arrays.arrays(np.float32, 6, elements=st.floats(0, 4, width=32)),
    lengths=arrays.arrays(np.int32, 6, elements=st.integers(0, 300)),
    valid=arrays.arrays(bool, 6),
)
def test_no_unreadable_sample_earns_more_than_a_readable_one(kind, length_penalty, mse, lengths, valid):
    """Whatever both cost: opposite reconstructions, long texts."""
    reward = np.asarray(rewards(mse, valid, length_penalty * lengths, kind))
    if valid.any() and not valid.all():
        assert reward[~valid].max() <= reward[valid].min()
    np.testing.assert_allclose(reward[~valid], -FAILED_MSE - length_penalty * lengths[~valid], rtol=1e-6)
    plain = np.asarray(REWARDS[kind](mse)) - length_penalty * lengths
    above = valid & (plain >= -FAILED_MSE)
    np.testing.assert_allclose(reward[above], plain[above], rtol=1e-5, atol=1e-6)


def test_a_reconstruction_worse_than_orthogonal_earns_what_an_orthogonal_one_does():
    mse, valid, lengths = np.array([3.5, 2.0, 0.0], np.float32), np.array([True, True, False]), np.zeros(3, np.int32)
    np.testing.assert_array_equal(rewards(mse, valid, 0.0 * lengths, "neg_mse"), [-2, -2, -2])
    np.testing.assert_allclose(rewards(mse, valid, 0.0 * lengths, "neg_log_mse"), [-np.log(3.5), -np.log(2), -2], 1e-5)
    long = np.array([10, 400, 3])  # a readable text of 400 tokens beside an unreadable one of 3
    np.testing.assert_allclose(rewards(mse, valid, 0.01 * long, "neg_log_mse"), [-np.log(3.5) - 0.1, -2, -2.03], 1e-5)


def test_the_logarithm_of_a_perfect_reconstruction_is_finite():
    assert np.isfinite(rewards(np.zeros(1), np.ones(1, bool), np.zeros(1), "neg_log_mse")).all()


advantages_of = jax.jit(group_advantages)


@given(arrays.arrays(np.float32, (3, 5), elements=number))
def test_advantages_are_standardised_within_a_group(reward):
    advantage, no_spread = advantages_of(reward)
    for row in range(3):
        std = reward[row].astype(np.float64).std()
        assert no_spread[row] == (np.ptp(reward[row]) < 1e-6)
        if no_spread[row]:
            assert std < 1e-6
            np.testing.assert_array_equal(advantage[row], 0)
        elif std > 1e-2:
            expected = (reward[row] - reward[row].astype(np.float64).mean()) / std
            np.testing.assert_allclose(advantage[row], expected, atol=1e-3)


@given(number, st.sampled_from([3, 5, 6, 7]))
def test_a_group_of_equal_rewards_carries_no_signal(value, size):
    """Also where the mean of equal numbers is not that number in float32."""
    advantage, no_spread = group_advantages(jnp.full((1, size), value, jnp.float32))
    assert no_spread.tolist() == [True]
    np.testing.assert_array_equal(advantage, 0)


def test_k3_is_unbiased_and_never_negative():
    """Averaged over the policy's own distribution it is the KL divergence, exactly."""
    rng = np.random.default_rng(0)
    policy, reference = jax.nn.log_softmax(rng.standard_normal((2, 9)))
    per_token = kl_k3(policy, reference)
    assert (np.asarray(per_token) >= 0).all()
    probabilities = np.exp(policy)
    np.testing.assert_allclose(
        (probabilities * per_token).sum(), (probabilities * (policy - reference)).sum(), rtol=1e-5
    )
    np.testing.assert_array_equal(kl_k3(policy, policy), 0)


def test_masked_mean():
    x = np.array([[1.0, 2.0], [3.0, 40.0]])
    assert masked_mean(x, np.array([[True, True], [True, False]])) == 2
    assert masked_mean(x, np.zeros((2, 2), bool)) == 0


INFINITY = float("inf")


@pytest.mark.parametrize("hidden", [INFINITY, -INFINITY, float("nan"), 3e38])
def test_what_is_masked_does_not_matter(hidden):
    x = jnp.array([1.0, hidden, 3.0])
    mask = jnp.array([True, False, True])
    value, gradient = jax.value_and_grad(masked_mean)(x, mask)
    assert value == 2
    np.testing.assert_array_equal(gradient, [0.5, 0, 0.5])


@pytest.mark.parametrize(
    ("log_prob", "reference"),
    [
        (-120.0, -20.0),  # exp(100) is no float32
        (-1e30, 0.0),
        (-INFINITY, -1.0),
        (-1.0, -INFINITY),
        (-INFINITY, -INFINITY),
        (float("nan"), INFINITY),
    ],
)
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_masked_token_leaves_loss_and_gradient_alone(log_prob, reference, kl_coef):
    def both(*rows):
        log_probs, references, advantage = (jnp.array(column, jnp.float32) for column in zip(*rows, strict=True))
        mask = jnp.array([True, False])[: len(rows)]
        return jax.value_and_grad(policy_loss, argnums=(0, 1))(log_probs, references, advantage, mask, kl_coef)

    for hidden in (1.0, INFINITY):
        loss, gradients = both((-1, -1.1, 0.5), (log_prob, reference, hidden))
        expected, alone = both((-1, -1.1, 0.5))
        assert loss == expected and np.isfinite(loss)
        for mine, theirs in zip(gradients, alone, strict=True):
            np.testing.assert_array_equal(mine, [theirs[0], 0])


@pytest.mark.parametrize(("log_prob", "reference"), [(-INFINITY, -2.0), (-2.0, -INFINITY), (-INFINITY, -INFINITY)])
def test_a_token_that_a_model_rules_out_gives_no_nan(log_prob, reference):
    """Also where it counts."""
    given = jnp.array([-1.0, log_prob]), jnp.array([-1.1, reference]), jnp.array([0.5, 2.0]), jnp.array([True, True])
    loss, gradients = jax.value_and_grad(policy_loss, argnums=(0, 1))(*given, 0.1)
    assert np.isfinite(loss) and all(np.isfinite(gradient).all() for gradient in gradients)
    np.testing.assert_allclose(gradients[0][1], 0 if np.isinf(log_prob) else -2.0 / 2)
    assert kl_k3(given[0], given[1])[1] == 0


def test_nan_that_counts_is_not_hidden():
    """A step must be able to see it and to skip the update."""
    log_probs, mask = jnp.array([-1.0, jnp.nan]), jnp.array([True, True])
    assert np.isnan(masked_mean(log_probs, mask))
    gradient = jax.grad(policy_loss)(log_probs, jnp.array([-1.0, -1.0]), jnp.ones(2), mask, 0.1)
    assert np.isnan(gradient[1])


def test_without_a_reference_there_is_no_kl_term():
    rng = np.random.default_rng(2)
    log_probs, reference = rng.standard_normal((2, 3, 4)).astype(np.float32)
    advantage, mask = rng.standard_normal((3, 1)).astype(np.float32), np.arange(4) < np.array([[4], [2], [1]])
    for gradient_of in (policy_loss, jax.grad(policy_loss)):
        np.testing.assert_array_equal(
            gradient_of(log_probs, None, advantage, mask, 0.0), gradient_of(log_probs, reference, advantage, mask, 0.0)
        )


def test_the_policy_gradient_is_the_advantage_weighted_score():
    rng = np.random.default_rng(1)
    log_probs, reference = rng.standard_normal((2, 2, 3, 4)).astype(np.float32)
    advantage = rng.standard_normal((2, 3)).astype(np.float32)
    mask = np.arange(4) < np.array([[4, 2, 1], [3, 4, 2]])[..., None]
    gradient = jax.grad(policy_loss)(log_probs, reference, advantage[..., None], mask, 0.0)
    np.testing.assert_allclose(gradient, -advantage[..., None] * mask / mask.sum(), rtol=1e-5)
    # d/dlogp of k3: 1 - exp(reference - logp).
    with_kl = jax.grad(policy_loss)(log_probs, reference, advantage[..., None], mask, 0.3)
    of_kl = 0.3 * (1 - np.exp(reference - log_probs)) * mask / mask.sum()
    np.testing.assert_allclose(with_kl - gradient, of_kl, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        policy_loss(log_probs, log_probs, advantage[..., None], mask, 0.3),
        -(advantage[..., None] * mask).sum() / mask.sum(),
        rtol=1e-5,
    )


# --- telling a batch's activations apart


def test_contrast_is_the_softmax_of_the_distances_to_the_batch():
    h = vectors(3, 16, seed=1)
    rebuilt = np.stack([h, h[::-1]], axis=1)  # its own activation, and one from the other end of the batch
    found = objectives.contrast(jnp.asarray(rebuilt), jnp.asarray(h), jnp.ones((3, 2), bool))
    least = -2 * np.log(3)
    for row in range(3):
        for sample in range(2):
            mse = np.array([float(direction.direction_mse(rebuilt[row, sample], other)) for other in h])
            logits = -mse / objectives.CONTRAST_TEMPERATURE
            expected = logits[row] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            np.testing.assert_allclose(found[row, sample], max(expected, least), atol=1e-4)
    assert float(found[0, 0]) > -0.1 and float(found[0, 1]) == pytest.approx(least)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from(sorted(objectives.REWARDS)), st.sampled_from([0.0, 0.02]))
def test_an_unreadable_sample_never_beats_a_readable_one_with_contrast_either(seed, kind, penalty):
    rng = np.random.default_rng(seed)
    h = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    rebuilt, valid = jnp.asarray(rng.normal(size=(4, 6, 8)), jnp.float32), jnp.asarray(rng.random((4, 6)) < 0.5)
    mse = direction.direction_mse(rebuilt, h[:, None])
    lengths = jnp.asarray(rng.integers(1, 100, (4, 6)))
    reward = 0.5 * objectives.rewards(mse, valid, penalty * lengths, kind)
    reward = np.asarray(reward + 0.5 * objectives.contrast(rebuilt, h, valid))
    for row in range(4):
        readable, unreadable = reward[row][np.asarray(valid[row])], reward[row][~np.asarray(valid[row])]
        if readable.size and unreadable.size:
            assert unreadable.max() <= readable.min() + 1e-6
