"""FVE and its controls, against the formulas written out and cases whose answer is known."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.data.mismatch import mismatched, of_others
from nlae_jax.evaluate.reconstruction import (
    UNINFORMED,
    agreement,
    best_of,
    bootstrap,
    centred_cos,
    cross_fitted_tau,
    deciles,
    direction_mse,
    distractors,
    equivalent_rank,
    fve,
    mse_to,
    principal_fve,
    retrieval_bits,
    summarise,
    token_class,
    top1,
    uninformed,
    variances,
)
from nlae_jax.roles import direction
from tests.conftest import vectors

COUNTS = st.lists(st.integers(1, 7), min_size=1, max_size=8)


def directions(h):
    """Each row at norm sqrt(d), in float64."""
    h = np.asarray(h, np.float64)
    return h / np.linalg.norm(h, axis=-1, keepdims=True) * np.sqrt(h.shape[-1])


# --- mse and FVE


def test_mse_is_of_directions_and_2_where_nothing_was_readable():
    h = vectors(6, 16)
    rebuilt = np.stack([3 * h[0], -h[1], np.roll(h[2], 1), h[3], np.zeros(16), h[5]])
    mse = direction_mse(rebuilt, h, np.array([True, True, True, False, True, True]))
    cos = (directions(rebuilt[2]) * directions(h[2])).mean()
    np.testing.assert_allclose(mse, [0, 4, 2 * (1 - cos), 2, 1, 0], atol=1e-5)
    assert mse.dtype == np.float64


def test_fve_of_the_mean_is_zero():
    """The mean of the directions, not renormalised: the paper's baseline."""
    h = vectors(50, 16)
    mean = directions(h).mean(0)
    mse = np.square(directions(h) - mean).mean(-1)
    assert fve(mse, variances(h)) == pytest.approx(0, abs=1e-6)


def test_fve_of_the_truth_is_one():
    h = vectors(20, 16)
    assert fve(direction_mse(h, h), variances(h)) == pytest.approx(1, abs=1e-6)


def test_variance_follows_from_the_length_of_the_mean():
    """With m = |mean of unit vectors| the mean variance is 1 - m²."""
    h = vectors(40, 16)
    m = np.linalg.norm(directions(h).mean(0)) / 4
    assert variances(h).mean() == pytest.approx(1 - m**2, rel=1e-5)


# --- explanations on the wrong activations


def rows_of(counts, seed):
    """Documents' names per row, in any order."""
    documents = np.repeat(np.arange(len(counts)) * 3 + 5, counts)
    return np.random.default_rng(seed).permutation(documents)


@given(COUNTS, st.integers(0, 5))
def test_mismatched_is_a_permutation_that_avoids_the_own_document(counts, seed):
    documents = rows_of(counts, seed)
    other = mismatched(documents, seed)
    assert sorted(other) == list(range(len(documents)))
    # The largest document's rows can only go where the others' are.
    unavoidable = max(0, 2 * max(counts) - len(documents))
    assert (documents[other] == documents).sum() == unavoidable


def test_what_met_its_own_document_is_left_out():
    documents = np.repeat(["long", "short"], [9, 3])
    other = mismatched(documents, 0)
    kept = np.isfinite(of_others(np.ones((12, 2)), documents, other))
    np.testing.assert_array_equal(kept.all(1), documents[other] != documents)
    assert (
        kept.all(1).sum() == 6 and not np.isfinite(of_others(np.ones(3), np.zeros(3), np.roll(np.arange(3), 1))).any()
    )


def test_mismatched_depends_on_the_seed():
    documents = rows_of([2] * 20, 0)
    assert (mismatched(documents, 0) != mismatched(documents, 1)).any()
    np.testing.assert_array_equal(mismatched(documents, 0), mismatched(documents, 0))


# --- vectors that say nothing


def test_uninformed_vectors():
    h = vectors(30, 16) * np.linspace(1, 3, 30)[:, None].astype(np.float32)
    made = uninformed(h, 0)
    assert tuple(made) == UNINFORMED
    assert all(vector.shape == h.shape and vector.dtype == np.float32 for vector in made.values())
    assert (made["zero"] == 0).all()
    length = np.median(np.linalg.norm(h, axis=1))
    for name in ("mean_vector", "random_vector"):
        np.testing.assert_allclose(np.linalg.norm(made[name], axis=1), length, rtol=1e-5)
    np.testing.assert_allclose(
        directions(made["mean_vector"]), directions(np.tile(directions(h).mean(0), (30, 1))), atol=1e-4
    )
    assert fve(direction_mse(made["mean_vector"], h), variances(h)) < 0
    spread = directions(made["random_vector"])
    assert abs((spread[:-1] * spread[1:]).mean(1)).max() < 0.9  # another one in each row
    np.testing.assert_array_equal(made["random_vector"], uninformed(h, 0)["random_vector"])
    assert (made["random_vector"] != uninformed(h, 1)["random_vector"]).any()


# --- the interval


def test_interval_is_over_documents_not_rows():
    """Rows of a document are equal: the interval must be as wide as that of one row a document."""
    rng = np.random.default_rng(0)
    per_document = rng.standard_normal(30)
    documents = np.repeat(np.arange(30), 20)
    repeated = np.repeat(per_document, 20)
    one = bootstrap(lambda rows: per_document[rows].mean(), np.arange(30), 400, 0)
    many = bootstrap(lambda rows: repeated[rows].mean(), documents, 400, 0)
    np.testing.assert_allclose(many, one, rtol=1e-12)


def test_interval_has_the_width_of_the_normal_approximation():
    values = np.random.default_rng(1).standard_normal(400)
    low, high = bootstrap(lambda rows: values[rows].mean(), np.arange(400), 2000, 0)
    error = values.std() / 20
    assert low < values.mean() < high
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_interval_of_a_constant_is_a_point():
    assert bootstrap(lambda rows: 0.5, np.array([0, 0, 1]), 10, 0) == (0.5, 0.5)


# --- eval.json


def case(num_documents=12, per_document=3, width=16):
    """(h, documents, mse by name) of a pair that got better in RL."""
    h = vectors(num_documents * per_document, width)
    documents = np.repeat(np.arange(num_documents), per_document)
    noise = np.random.default_rng(1).standard_normal(h.shape)
    mse = {
        "before": direction_mse(h + 2 * noise, h),
        "after": direction_mse(h + noise, h),
        "text": direction_mse(h + 1.1 * noise, h),
        "shuffled": direction_mse(h[mismatched(documents, 0)], h),
        "gold": np.where(np.arange(len(h)) % 2, direction_mse(h + 0.5 * noise, h), np.nan),
    }
    return h, documents, mse


def test_summary_is_what_the_formulas_say():
    h, documents, mse = case()
    summary = summarise(h, documents, mse, 100, 0)
    unit = directions(h)
    variance = np.square(unit - unit.mean(0)).mean()
    renormalised = directions(unit.mean(0))
    assert summary["fve"] == pytest.approx(1 - mse["after"].mean() / variance, rel=1e-5)
    assert summary["fve_before_rl"] == pytest.approx(1 - mse["before"].mean() / variance, rel=1e-5)
    assert summary["fve_text"] == pytest.approx(1 - mse["text"].mean() / variance, rel=1e-5)
    assert summary["fve_shuffled"] == pytest.approx(1 - mse["shuffled"].mean() / variance, rel=1e-5)
    meannorm = 1 - mse["after"].mean() / np.square(unit - renormalised).mean()
    assert summary["fve_meannorm"] == pytest.approx(meannorm, rel=1e-5)
    assert summary["fve_gain"] == pytest.approx(summary["fve"] - summary["fve_before_rl"])
    assert summary["cos"] == pytest.approx(1 - mse["after"].mean() / 2)
    assert (summary["num_activations"], summary["num_documents"]) == (36, 12)
    assert summary["fve"] < summary["fve_meannorm"]
    assert summary["fve_shuffled"] < 0


def test_gold_is_measured_on_the_rows_that_have_it():
    h, documents, mse = case()
    summary = summarise(h, documents, mse, 10, 0)
    odd = np.arange(len(h)) % 2 == 1
    assert summary["fve_gold"] == pytest.approx(fve(mse["gold"][odd], variances(h)[odd]))
    on_same_rows = fve(mse["gold"][odd], variances(h)[odd]) - fve(mse["after"][odd], variances(h)[odd])
    assert summary["fve_gold_gap"] == pytest.approx(on_same_rows)
    assert summary["fve_gold_gap"] != pytest.approx(summary["fve_gold"] - summary["fve"])
    mse["gold"][:] = np.nan
    summary = summarise(h, documents, mse, 10, 0)
    assert summary["fve_gold"] is None and summary["fve_gold_gap"] is None


def test_a_single_document_has_no_shuffled_control():
    h, documents, mse = case(num_documents=1, per_document=12)
    mse["shuffled"] = of_others(mse["shuffled"], documents, mismatched(documents, 0))
    assert summarise(h, documents, mse, 10, 0)["fve_shuffled"] is None


def test_uninformed_explanations_are_set_against_the_true_ones_on_the_same_rows():
    h, documents, mse = case()
    first = np.arange(len(h)) < 10
    for name, value in zip(UNINFORMED, (1.5, 1.2, 1.9), strict=True):
        mse[name] = np.where(first, value, np.nan)
    summary = summarise(h, documents, mse, 10, 0)
    variance = variances(h)[first]
    assert summary["fve_zero"] == pytest.approx(1 - 1.5 / variance.mean())
    assert summary["fve_random_vector"] == pytest.approx(1 - 1.9 / variance.mean())
    best = 1 - 1.2 / variance.mean()
    assert summary["fve_mean_vector"] == pytest.approx(best)
    assert summary["fve_vector_gap"] == pytest.approx(fve(mse["after"][first], variance) - best)
    without = summarise(*case(), 10, 0)
    assert {without[f"fve_{name}"] for name in (*UNINFORMED, "vector_gap")} == {None}


def test_gain_is_paired():
    """What both pairs share cancels: the interval of the gain is narrower than that of either FVE."""
    h, documents, mse = case()
    mse["after"] = mse["before"] - 0.01
    summary = summarise(h, documents, mse, 200, 0)
    low, high = summary["fve_gain_ci95"]
    wide_low, wide_high = summary["fve_ci95"]
    assert low <= summary["fve_gain"] <= high
    assert low > 0
    assert high - low < (wide_high - wide_low) / 5


def test_summary_is_json_and_the_same_every_time():
    first, second = (json.dumps(summarise(*case(), 50, 3), sort_keys=True, allow_nan=False) for _ in range(2))
    assert first == second


# --- what FVE alone does not show


def test_a_shared_direction_is_no_centred_cosine():
    h = vectors(60, 16)
    mean = directions(h).mean(0)
    np.testing.assert_allclose(centred_cos(h, h, mean), 1, atol=1e-5)
    assert centred_cos(np.tile(mean, (60, 1)), h, mean).mean() < 0.2
    other = np.roll(np.arange(60), 1)
    assert abs(centred_cos(h[other], h, mean).mean()) < 0.15 < np.mean(1 - direction_mse(h[other], h) / 2)


def test_distractors_are_of_other_documents_or_of_the_same():
    documents = np.repeat(np.arange(6), 3)
    for same in (False, True):
        candidates, valid = distractors(documents, 4, 0, same)
        assert (candidates[:, 0] == np.arange(18)).all() and valid[:, 0].all()
        for row in range(18):
            drawn = candidates[row, 1:][valid[row, 1:]]
            assert len(set(drawn)) == len(drawn) == (2 if same else 4) and row not in drawn
            assert ((documents[drawn] == documents[row]) == same).all()


def test_bits_of_what_finds_its_own_and_of_what_finds_nothing():
    h = vectors(40, 64)
    candidates, valid = distractors(np.arange(40), 15, 0)
    own, constant = mse_to(h, h, candidates), mse_to(np.tile(h.mean(0), (40, 1)), h, candidates)
    np.testing.assert_allclose(retrieval_bits(own, valid, 0.01), 4, atol=1e-6)  # log2 of 16
    np.testing.assert_allclose(retrieval_bits(own, valid, 1e6), 0, atol=1e-4)
    tau = cross_fitted_tau(constant, valid, np.arange(40))
    assert abs(retrieval_bits(constant, valid, tau).mean()) < 0.1
    assert top1(own, valid).mean() == 1
    np.testing.assert_allclose(top1(np.ones_like(own), valid), 1 / 16)
    # One document has no other half to choose the temperature by.
    assert np.isnan(retrieval_bits(own, valid, cross_fitted_tau(own, valid, np.zeros(40, int)))).all()
    alone = np.zeros_like(valid)
    alone[:, 0] = True
    assert np.isnan(retrieval_bits(own, alone, 1.0)).all() and np.isnan(top1(own, alone)).all()


@given(st.integers(0, 20), st.floats(0.01, 100))
def test_bits_never_exceed_those_of_the_number_of_candidates(seed, tau):
    mse = np.random.default_rng(seed).uniform(0, 4, (5, 8))
    assert (retrieval_bits(mse, np.ones(mse.shape, bool), tau) <= 3 + 1e-9).all()


def test_principal_directions_of_a_plane():
    """Activations in a plane through their mean: two directions carry all of it, none carries nothing."""
    rng = np.random.default_rng(0)
    first, second, offset = np.linalg.qr(rng.standard_normal((16, 3)))[0].T
    plane, offset = np.stack([first, second]), 20 * offset
    draw = lambda count: (rng.standard_normal((count, 2)) @ plane + offset).astype(np.float32)  # noqa: E731
    h, reference = draw(60), draw(400)
    ranks = principal_fve(h, np.arange(60), reference, np.arange(400) + 1000)
    assert abs(ranks[0]) < 0.05
    assert 0.3 < ranks[1] < 0.8 and ranks[2] > 0.98
    assert (np.diff(ranks) >= -1e-9).all()
    assert [equivalent_rank(ranks, value) for value in (-0.3, 0.0, ranks[1], 0.9, 2.0)] == [0, 0, 1, 2, None]


def test_principal_directions_are_not_fitted_on_what_they_are_measured_on():
    """With as many directions as numbers, activations of the same documents would be rebuilt whole."""
    h = vectors(40, 64)
    ranks = principal_fve(h, np.arange(40), h, np.arange(40))
    assert ranks[-1] < 0.9


def test_best_of_is_the_mean_over_all_choices():
    mse = np.array([[3.0, 1.0, 2.0], [0.5, 0.5, 0.5]])
    np.testing.assert_allclose(best_of(mse, 1), mse.mean(1))
    np.testing.assert_allclose(best_of(mse, 2), [(1 + 2 + 1) / 3, 0.5])
    np.testing.assert_allclose(best_of(mse, 3), [1, 0.5])


def test_agreement_of_equal_samples_is_1_and_of_other_activations_about_0():
    h = vectors(80, 32)
    mean, other = directions(h).mean(0), np.roll(np.arange(80), 1)
    own, others = agreement(np.repeat(h[:, None], 4, axis=1), mean, other)
    np.testing.assert_allclose(own, 1, atol=1e-5)
    assert abs(others.mean()) < 0.1
    assert np.isnan(agreement(h[:, None], mean, other)[0]).all()


def test_samples_that_cannot_be_read_agree_with_nothing():
    """Not even with each other: of zeros the centred direction is that of the mean, in all of them the same."""
    h = vectors(20, 32)
    mean, other = directions(h).mean(0), np.roll(np.arange(20), 1)
    samples = np.repeat(h[:, None], 4, axis=1)
    samples[:, 2:] = 0
    own, _ = agreement(samples, mean, other)
    np.testing.assert_allclose(own, 2 / 12, atol=1e-5)  # of 12 ordered pairs, two are of readable samples
    for found in agreement(np.zeros_like(samples), mean, other):
        np.testing.assert_array_equal(found, 0)
    alike = np.repeat(np.repeat(h[:1, None], 4, axis=1), 20, axis=0)  # all are the mean direction
    for found in agreement(alike, np.asarray(direction.unit_direction(h[0]), np.float64), other):
        np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize(
    ("context", "token", "following", "expected"),
    [
        ("He saw the horse", " horse", " run", "content"),
        ("He saw the", " the", " horse", "function"),
        ("He saw th", " th", "e horse", "function"),
        ("He saw unhappi", "happi", "ness", "inside"),
        ("He saw it.", ".", " Then", "punctuation"),
        ("x\nreturn foo(bar_baz, n", " n", ");", "code"),
        ("A normal line; it goes on", " on", "", "function"),
        ("昔、灰色の", "色の", "犬", "content"),
        ("그는 안녕하세요", "세요", "", "inside"),
        ("그는 안녕", " 안녕", "하세요", "content"),
        ("韓国の안녕", "안녕", "", "content"),
        ("昔、灰\ufffd", "\ufffd", "\ufffdの", "inside"),
    ],
)
def test_token_classes(context, token, following, expected):
    assert token_class(context, token, following) == expected


def test_tenths_of_positions():
    assert deciles(np.arange(20)).tolist() == [i // 2 for i in range(20)]
    assert deciles(np.zeros(5)).tolist() == [0] * 5


@pytest.mark.parametrize("scale", [1e-13, 1e-8, 1e-4, 1.0, 1e4, 1e13])
def test_a_score_does_not_depend_on_lengths(scale):
    """Directions are compared: a small number beside the mean square must not count, nor a square overflow."""
    h, other = (np.random.default_rng(seed).standard_normal((8, 32)).astype(np.float32) for seed in (0, 1))
    expected, scaled = direction_mse(other, h), h * np.float32(scale)
    np.testing.assert_allclose(direction_mse(other, scaled), expected, rtol=1e-6)
    np.testing.assert_allclose(direction_mse(scaled, other), expected, rtol=1e-6)
    np.testing.assert_allclose(variances(scaled), variances(h), rtol=1e-5)
    assert direction_mse(np.zeros((1, 4)), np.ones((1, 4))) == 1
