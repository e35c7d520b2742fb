"""Rows exchanged between documents: the control that every comparison with another document's row shares."""

from __future__ import annotations

import numpy as np


def mismatched(documents: np.ndarray, seed: int) -> np.ndarray:
    """A permutation of rows under which every row meets one of another document, as far as the counts allow.

    `documents` [N] names each row's document. Rows are laid out document by document in random order and rotated by
    the largest document's size. Where one document has more than half of the rows, some meet their own: `of_others`
    leaves them out.
    """
    rng = np.random.default_rng(seed)
    names, counts = np.unique(documents, return_counts=True)
    rank = rng.permutation(len(names))[np.searchsorted(names, documents)]
    order = np.argsort(rank, kind="stable")
    permutation = np.empty(len(documents), np.int64)
    permutation[order] = np.roll(order, int(counts.max(initial=0)))
    return permutation


def of_others(values: np.ndarray, documents: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`values` [N, ...] of rows that met rows `other` [N], NaN where those are of the same document, float64."""
    own = (documents[other] == documents).reshape(-1, *[1] * (values.ndim - 1))
    return np.where(own, np.nan, values)
