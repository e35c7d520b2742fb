"""Training batches: grain shuffles row numbers, a loader turns a batch of them into arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grain
import numpy as np

Batch = dict[str, np.ndarray]

_EPOCHS = 2**30  # without end; grain's own infinite `repeat()` overflows with batches of one row


def batches(num_rows: int, batch_size: int, seed: int, load: Callable[[np.ndarray], Batch]) -> grain.DatasetIterator:
    """An endless iterator of `load(row numbers)`, reshuffled every epoch; `get_state` and `set_state` resume it."""
    dataset = grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat(_EPOCHS).batch(batch_size).map(load)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def pad(sequences: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids padded with 0 on the right to [N, width] int32, and their lengths [N] int32."""
    ids = np.zeros((len(sequences), width), np.int32)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
    return ids, np.array([len(sequence) for sequence in sequences], np.int32)
