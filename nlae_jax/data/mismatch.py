"""Exchanges rows between documents, for every control that compares a row with a row of another document."""

from __future__ import annotations

import numpy as np


def mismatched(documents: np.ndarray, seed: int) -> np.ndarray:
    """Returns a permutation [N] int64 that gives every row a row of another document, as far as the counts allow.

    `documents` [N] names each row's document. The rows are ordered by document, the documents at random, and rotated by
    the largest document's size. Where one document has more than half of the rows, some rows get one of their own
    document: `of_others` leaves these out.
    """
    rng = np.random.default_rng(seed)
    names, counts = np.unique(documents, return_counts=True)
    rank = rng.permutation(len(names))[np.searchsorted(names, documents)]
    order = np.argsort(rank, kind="stable")
    permutation = np.empty(len(documents), np.int64)
    permutation[order] = np.roll(order, int(counts.max(initial=0)))
    return permutation


def of_others(values: np.ndarray, documents: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns `values` [N, ...] with NaN at rows whose exchanged row `other` [N] is of the same document, float64."""
    same_document = (documents[other] == documents).reshape(-1, *[1] * (values.ndim - 1))
    return np.where(same_document, np.nan, values)
