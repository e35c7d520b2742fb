"""Makes training batches: grain shuffles row numbers, and a loader turns a batch of them into arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable

import grain
import numpy as np

Batch = dict[str, np.ndarray]

_EPOCHS = 2**30  # practically endless; grain's infinite `repeat()` overflows with batches of one row

# Rows are sorted by length within windows of this many batches: enough to fill every width's batches, few in an epoch.
_WINDOW_BATCHES = 16


def batches(num_rows: int, batch_size: int, seed: int, load: Callable[[np.ndarray], Batch]) -> grain.DatasetIterator:
    """Returns an endless iterator of `load(row numbers)`, reshuffled every epoch.

    Its `get_state` and `set_state` resume it.
    """
    dataset = grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat(_EPOCHS).batch(batch_size).map(load)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def bucket_widths(length: np.ndarray, buckets: int) -> np.ndarray:
    """Returns at most `buckets` widths, ascending: quantiles of `length` [N], rounded up to multiples of 8.

    The last one holds the longest row.
    """
    shares = np.arange(1, buckets + 1) / buckets
    return np.unique(-(-np.quantile(length, shares, method="inverted_cdf").astype(int) // 8) * 8)


def bucketed_batches(
    length: np.ndarray, widths: np.ndarray, batch_size: int, seed: int, load: Callable[[np.ndarray, int], Batch]
) -> grain.DatasetIterator:
    """Returns an endless iterator of `load(row numbers, width)` that puts rows of similar `length` [N] together.

    `width` is the smallest of `widths` that holds the batch. Every epoch is shuffled anew and epochs follow each other
    without a gap, as in `batches`. Within each window of `_WINDOW_BATCHES` batches, rows are sorted by the width that
    they need; rows of one width keep their random order. The window's batches are then shuffled. So every row comes
    once an epoch, except in the window that spans two epochs. If the loss is a mean over a batch's tokens, a batch of
    short rows weighs as much as a batch of long rows, so a token in a short row weighs more than without buckets.
    """
    num_rows, width_index = len(length), np.searchsorted(widths, length)
    window = max(1, min(_WINDOW_BATCHES, num_rows // batch_size))

    @functools.lru_cache(maxsize=2)
    def epoch(number: int) -> np.ndarray:
        return np.random.default_rng([seed, 0, number]).permutation(num_rows)

    @functools.lru_cache(maxsize=2)
    def rows_of_window(number: int) -> np.ndarray:
        places = np.arange(number * window * batch_size, (number + 1) * window * batch_size)
        rows = np.array([epoch(e)[place] for e, place in zip(*np.divmod(places, num_rows), strict=True)])
        rows = rows[np.argsort(width_index[rows], kind="stable")].reshape(window, batch_size)
        return np.random.default_rng([seed, 1, number]).permutation(rows)

    def batch(number: int) -> Batch:
        rows = rows_of_window(number // window)[number % window]
        return load(rows, int(widths[width_index[rows].max()]))

    dataset = grain.MapDataset.range(_EPOCHS).map(batch)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
