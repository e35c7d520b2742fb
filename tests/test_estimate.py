"""Numbers with intervals: over documents, of rows that have one, and against cases known in closed form."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.evaluate.estimate import _drawn_documents, estimate, fve_of, jackknifed, recovered, share_of


def test_value_is_the_statistic_of_the_means():
    columns = np.array([[1.0, 4.0], [3.0, 4.0], [np.nan, 4.0], [5.0, 4.0]])
    found = estimate(columns, np.array([0, 0, 1, 1]), fve_of, 100)
    assert found["value"] == pytest.approx(1 - 3 / 4)
    assert (found["n"], found["documents"]) == (3, 2)


def test_of_no_rows_and_of_one_document():
    assert estimate(np.full(3, np.nan), np.arange(3)) == {"value": None, "ci95": None, "n": 0, "documents": 0}
    one = estimate(np.array([1.0, 2.0]), np.zeros(2))
    assert one["value"] == 1.5 and one["ci95"] is None


def test_a_statistic_without_a_number_is_none():
    assert estimate(np.zeros((4, 2)), np.arange(4), share_of)["value"] is None


def test_loss_recovered_is_0_of_the_mean_and_1_of_the_truth():
    mean, true = np.array([5.0, 6.0]), np.array([2.0, 1.0])
    for other, expected in ((mean, 0.0), (true, 1.0), ((mean + true) / 2, 0.5)):
        found = estimate(np.stack([mean, other, true], -1), np.arange(2), recovered)
        assert found["value"] == pytest.approx(expected)


def test_interval_is_over_documents_not_rows():
    """Rows of a document are equal: the interval is that of one row a document."""
    values = np.random.default_rng(0).standard_normal(30)
    one = estimate(values, np.arange(30), samples=1000)
    many = estimate(np.repeat(values, 20), np.repeat(np.arange(30), 20), samples=1000)
    np.testing.assert_allclose(one["ci95"], many["ci95"], atol=1e-9)


def test_interval_has_the_width_of_the_standard_error():
    values = np.random.default_rng(0).standard_normal(400)
    low, high = estimate(values, np.arange(400), samples=4000)["ci95"]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20), st.integers(0, 3))
def test_interval_holds_the_smallest_and_largest_document_at_most(values, seed):
    found = estimate(np.array(values), np.arange(len(values)), samples=50, seed=seed)
    low, high = found["ci95"]
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


@pytest.mark.parametrize(("count", "dtype"), [(255, np.uint8), (300, np.uint16)])
def test_drawn_documents_take_little_room_and_count_as_before(count, dtype):
    times = _drawn_documents(count, 50, 3)
    wide = np.random.default_rng(3).multinomial(count, np.full(count, 1 / count), size=50)
    np.testing.assert_array_equal(times, wide)
    assert times.dtype == dtype
    values = np.random.default_rng(0).standard_normal(count)
    found = estimate(values, np.arange(count), samples=50, seed=3)["ci95"]
    assert (
        found == np.percentile((wide @ values[:, None] / (wide @ np.ones(count))[:, None])[:, 0], [2.5, 97.5]).tolist()
    )


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(1).standard_normal(40)
    found = jackknifed(lambda rows: float(values[rows].mean()), np.arange(40), groups=40)
    assert found["value"] == pytest.approx(values.mean())
    low, high = found["ci95"]
    assert high - low == pytest.approx(2 * 1.96 * values.std(ddof=1) / np.sqrt(40), rel=1e-6)


@given(st.lists(st.booleans(), min_size=2, max_size=30))
def test_jackknife_of_a_share_stays_within_its_range(hits):
    values = np.array(hits, float)
    share = lambda rows: float(values[rows].mean())  # noqa: E731
    low, high = jackknifed(share, np.arange(len(values)), limits=(0.0, 1.0))["ci95"]
    assert 0 <= low <= values.mean() <= high <= 1
    without = jackknifed(share, np.arange(len(values)))["ci95"]
    assert [low, high] == [max(without[0], 0.0), min(without[1], 1.0)]


def test_jackknife_without_a_value_or_with_one_document():
    assert jackknifed(lambda rows: None, np.arange(4))["ci95"] is None
    assert jackknifed(lambda rows: 1.0, np.zeros(4))["ci95"] is None
