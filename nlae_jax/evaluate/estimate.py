"""A number with its uncertainty: means over rows, a statistic of them, and its interval over documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# (means of the columns [..., k]) -> [...]
Statistic = Callable[[np.ndarray], np.ndarray]


def first(means: np.ndarray) -> np.ndarray:
    """The mean of the first column."""
    return np.asarray(means[..., 0])


def fve_of(means: np.ndarray) -> np.ndarray:
    """Columns mse and variance: 1 - mean(mse) / mean(variance)."""
    return np.asarray(1 - means[..., 0] / means[..., 1])


def share_of(means: np.ndarray) -> np.ndarray:
    """Columns of counts: how many there are, of how many."""
    return np.asarray(means[..., 0] / means[..., 1])


def recovered(means: np.ndarray) -> np.ndarray:
    """Columns of losses with the mean vector, with another and with the true one: (mean - other) / (mean - true)."""
    return np.asarray((means[..., 0] - means[..., 1]) / (means[..., 0] - means[..., 2]))


def estimate(
    columns: np.ndarray, documents: np.ndarray, statistic: Statistic = first, samples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """`statistic` of the columns' means over rows, with its 95 % percentile interval over resampled documents.

    `columns` [N] or [N, k]; rows with a number that is not finite are left out, and counted out of `n`. `documents` [N]
    names each row's document. Documents are drawn whole (Efron and Tibshirani 1993, ch. 8): rows of one are no
    independent observations. The value is None without a row, and the interval without two documents.
    """
    columns = np.asarray(columns, np.float64)
    columns = columns[:, None] if columns.ndim == 1 else columns
    kept = np.isfinite(columns).all(-1)
    columns, names = columns[kept], np.asarray(documents)[kept]
    found, index = np.unique(names, return_inverse=True)
    result: dict[str, Any] = {"value": None, "ci95": None, "n": len(columns), "documents": len(found)}
    if not len(columns):
        return result
    sums = np.zeros((len(found), columns.shape[1]))
    np.add.at(sums, index, columns)
    counts = np.bincount(index, minlength=len(found)).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        result["value"] = _number(statistic(columns.mean(0)))
        if len(found) > 1:
            rng = np.random.default_rng(seed)
            times = rng.multinomial(len(found), np.full(len(found), 1 / len(found)), size=samples)
            values = statistic((times @ sums) / (times @ counts)[:, None])
            values = values[np.isfinite(values)]
            result["ci95"] = [float(end) for end in np.percentile(values, [2.5, 97.5])] if len(values) else None
    return result


def _number(value: np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None


def jackknifed(
    statistic: Callable[[np.ndarray], float | None],
    documents: np.ndarray,
    groups: int = 20,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> dict[str, Any]:
    """`statistic(rows)` of all rows, with a 95 % interval from leaving out one group of documents at a time.

    For what resampling would change by itself: rows that are there twice are repetitions. The variance is that of the
    delete-a-group jackknife (Kott 2001): (G - 1) / G times the sum of squared deviations. The interval is symmetric and
    would pass the end of a statistic's range, so it is cut at `limits`.
    """
    found, index = np.unique(documents, return_inverse=True)
    rows, groups = np.arange(len(index)), min(groups, len(found))
    value = statistic(rows)
    result: dict[str, Any] = {"value": value, "ci95": None, "n": len(index), "documents": len(found)}
    if value is None or groups < 2:
        return result
    without = [statistic(rows[index % groups != group]) for group in range(groups)]
    known = np.array([other for other in without if other is not None])
    if len(known) == groups:
        error = 1.96 * np.sqrt((groups - 1) / groups * np.square(known - known.mean()).sum())
        result["ci95"] = [float(end) for end in np.clip([value - error, value + error], *limits)]
    return result
