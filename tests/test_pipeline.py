"""Training batches: shuffled, every row once an epoch, and resumed at any batch as if never stopped."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlae_jax.data.pipeline import batches, bucket_widths, bucketed_batches
from nlae_jax.lm.tokens import pad


def rows(number):
    return {"rows": number}


def take(iterator, count):
    return [next(iterator)["rows"].tolist() for _ in range(count)]


@settings(max_examples=15)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3))
def test_every_row_comes_once_an_epoch(num_rows, batch_size, seed):
    epochs = 3
    needed = -(-epochs * num_rows // batch_size)
    drawn = [row for batch in take(batches(num_rows, batch_size, seed, rows), needed) for row in batch]
    for epoch in range(epochs):
        assert sorted(drawn[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_order_changes_with_epoch_and_seed():
    first, second = take(batches(40, 40, 0, rows), 2)
    assert first != second != sorted(second)
    assert first != sorted(first)
    assert take(batches(40, 40, 0, rows), 2) == [first, second]
    assert take(batches(40, 40, 1, rows), 1) != [first]


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 9])
def test_resumed_iterator_continues(stop):
    """Rows are fetched ahead: the state must be that of the batches handed out, not of those fetched."""
    whole = take(batches(10, 3, 5, rows), 12)
    interrupted = batches(10, 3, 5, rows)
    assert take(interrupted, stop) == whole[:stop]
    state = json.loads(json.dumps(interrupted.get_state()))  # as a checkpoint holds it
    resumed = batches(10, 3, 5, rows)
    next(resumed)  # wherever the new one stands
    resumed.set_state(state)
    assert take(resumed, 12 - stop) == whole[stop:]


def test_loader_makes_the_batch():
    table = np.arange(12, dtype=np.float32).reshape(6, 2)
    batch = next(batches(6, 4, 0, lambda i: {"h": table[i], "row": i}))
    assert batch["h"].dtype == np.float32
    np.testing.assert_array_equal(batch["h"], table[batch["row"]])


# --- batches of similar length


def lengths(num_rows, seed=0):
    return np.random.default_rng(seed).integers(1, 60, num_rows).astype(np.int32)


def bucketed(num_rows, batch_size, seed, buckets=3):
    length = lengths(num_rows)
    widths = bucket_widths(length, buckets)
    return bucketed_batches(length, widths, batch_size, seed, lambda i, width: {"rows": i, "width": width})


@settings(max_examples=25)
@given(st.integers(1, 200), st.integers(1, 6), st.integers(0, 3))
def test_widths_hold_every_row_and_none_is_idle(num_rows, buckets, seed):
    length = lengths(num_rows, seed)
    widths = bucket_widths(length, buckets)
    assert 1 <= len(widths) <= buckets
    assert (np.diff(widths) > 0).all()
    assert (widths % 8 == 0).all()
    assert length.max() <= widths[-1] < length.max() + 8
    assert set(np.searchsorted(widths, length)) == set(range(len(widths)))


@settings(max_examples=15)
@given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 3))
def test_bucketed_rows_come_as_often_as_each_other(num_rows, batch_size, seed):
    """Within a window at most: whole windows hold whole epochs and the beginning of the next."""
    window = max(1, min(16, num_rows // batch_size))
    iterator = bucketed(num_rows, batch_size, seed)
    count = np.zeros(num_rows, int)
    for _ in range(3):
        for batch in take(iterator, window):
            assert len(batch) == batch_size
            np.add.at(count, batch, 1)
        assert count.max() - count.min() <= 1


def test_bucketed_batches_fit_their_rows():
    length, iterator, widths = lengths(200), bucketed(200, 8, 0), bucket_widths(lengths(200), 3)
    met = [next(iterator) for _ in range(75)]
    for batch in met:
        assert batch["width"] == min(w for w in widths if w >= length[batch["rows"]].max())
    padded = sum(batch["width"] for batch in met) / len(met)
    ideal = widths[np.searchsorted(widths, length)].mean()
    assert ideal < padded < ideal + 4 < widths[-1] - 8
    order = [batch["width"] for batch in met]
    assert order != sorted(order)


def test_bucketed_order_changes_with_epoch_and_seed():
    first, second = (take(bucketed(64, 8, 0), 16)[8 * k :][:8] for k in range(2))
    assert sorted(np.ravel(first)) == sorted(np.ravel(second)) == list(range(64))
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    assert take(bucketed(64, 8, 0), 8) == first != take(bucketed(64, 8, 1), 8)


@pytest.mark.parametrize("stop", [0, 1, 3, 16, 21])
def test_resumed_bucketed_iterator_continues(stop):
    whole = take(bucketed(70, 4, 5), 40)
    interrupted = bucketed(70, 4, 5)
    assert take(interrupted, stop) == whole[:stop]
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = bucketed(70, 4, 5)
    next(resumed)
    resumed.set_state(state)
    assert take(resumed, 40 - stop) == whole[stop:]


def test_pad():
    ids, length = pad([[1, 2, 3], [], [4]], 4)
    np.testing.assert_array_equal(ids, [[1, 2, 3, 0], [0, 0, 0, 0], [4, 0, 0, 0]])
    np.testing.assert_array_equal(length, [3, 0, 1])
    assert ids.dtype == length.dtype == np.int32
