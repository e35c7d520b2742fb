"""Estimates a statistic of means over rows, with a 95 % interval over documents."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

# Maps the means of k columns, [..., k], to the statistic, [...].
Statistic = Callable[[np.ndarray], np.ndarray]


def first(means: np.ndarray) -> np.ndarray:
    """Returns the mean of the first column: [..., k] -> [...]."""
    return np.asarray(means[..., 0])


def fve_of(means: np.ndarray) -> np.ndarray:
    """Returns FVE from the columns mse and variance: 1 - mean(mse) / mean(variance)."""
    return np.asarray(1 - means[..., 0] / means[..., 1])


def share_of(means: np.ndarray) -> np.ndarray:
    """Returns a share from two columns, such as counts of hits and of cases: mean(first) / mean(second)."""
    return np.asarray(means[..., 0] / means[..., 1])


def recovered(means: np.ndarray) -> np.ndarray:
    """Returns the share of the loss that a vector wins back: (mean - vector) / (mean - true).

    The columns are the losses with the mean vector, with the vector in question and with the true activation.
    """
    return np.asarray((means[..., 0] - means[..., 1]) / (means[..., 0] - means[..., 2]))


def estimate(
    columns: np.ndarray, documents: np.ndarray, statistic: Statistic = first, samples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Returns `statistic` of the columns' means over rows, with a 95 % percentile interval over resampled documents.

    `columns` are [N] or [N, k]. Rows with a number that is not finite are left out. `documents` [N] names each row's
    document. The bootstrap draws whole documents (Efron and Tibshirani 1993, ch. 8), because rows of the same document
    are not independent observations. `samples` is the number of resamplings.

    The result has `value`, `ci95` (a list of both ends), `n` (the rows that count) and `documents` (the number of their
    documents). `value` is None without a row. `ci95` is None with fewer than two documents.
    """
    columns = np.asarray(columns, np.float64)
    columns = columns[:, None] if columns.ndim == 1 else columns
    kept = np.isfinite(columns).all(-1)
    columns, document_of_row = columns[kept], np.asarray(documents)[kept]
    names, index = np.unique(document_of_row, return_inverse=True)
    result: dict[str, Any] = {"value": None, "ci95": None, "n": len(columns), "documents": len(names)}
    if not len(columns):
        return result
    sums = np.zeros((len(names), columns.shape[1]))
    np.add.at(sums, index, columns)
    counts = np.bincount(index, minlength=len(names)).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        result["value"] = _number(statistic(columns.mean(0)))
        if len(names) > 1:
            times = _drawn_documents(len(names), samples, seed)
            values = statistic((times @ sums) / (times @ counts)[:, None])
            values = values[np.isfinite(values)]
            result["ci95"] = [float(end) for end in np.percentile(values, [2.5, 97.5])] if len(values) else None
    return result


@functools.lru_cache(maxsize=2)
def _drawn_documents(count: int, samples: int, seed: int) -> np.ndarray:
    """Returns how often each of `count` documents is drawn in each resampling: [samples, count] of small whole numbers.

    Most figures of a suite are of the same number of documents, and drawing takes longer than everything else here. The
    arrays are kept, so they have the smallest dtype that holds `count`, the largest number possible.
    """
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples)
    return times.astype(np.min_scalar_type(count))


def _number(value: np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None


def jackknifed(
    statistic: Callable[[np.ndarray], float | None],
    documents: np.ndarray,
    groups: int = 20,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> dict[str, Any]:
    """Returns `statistic(rows)` of all rows, with a 95 % interval from leaving out one group of documents at a time.

    Use it for statistics of repetition. The bootstrap of `estimate` draws rows twice, which would itself count as
    repetition. `documents` [N] names each row's document. The documents are divided into at most `groups` groups.

    The variance is that of the delete-a-group jackknife (Kott 2001): (G - 1) / G times the sum of squared deviations,
    for G groups. The interval is symmetric and could exceed the statistic's range, so it is cut at `limits`.

    The result has the fields of `estimate`. `ci95` is None if the statistic is None for all rows, if it is None
    after a group is left out, or if there is only one document.
    """
    names, index = np.unique(documents, return_inverse=True)
    rows, groups = np.arange(len(index)), min(groups, len(names))
    value = statistic(rows)
    result: dict[str, Any] = {"value": value, "ci95": None, "n": len(index), "documents": len(names)}
    if value is None or groups < 2:
        return result
    without = [statistic(rows[index % groups != group]) for group in range(groups)]
    known = np.array([value_without for value_without in without if value_without is not None])
    if len(known) == groups:
        error = 1.96 * np.sqrt((groups - 1) / groups * np.square(known - known.mean()).sum())
        result["ci95"] = [float(end) for end in np.clip([value - error, value + error], *limits)]
    return result
