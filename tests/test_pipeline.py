"""Training batches: shuffled, every row once an epoch, and resumed at any batch as if never stopped."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlae_jax.data.pipeline import batches, pad


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


def test_pad():
    ids, length = pad([[1, 2, 3], [], [4]], 4)
    np.testing.assert_array_equal(ids, [[1, 2, 3, 0], [0, 0, 0, 0], [4, 0, 0, 0]])
    np.testing.assert_array_equal(length, [3, 0, 1])
    assert ids.dtype == length.dtype == np.int32
