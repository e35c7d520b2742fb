"""How much of held-out activations the words carry: FVE, its controls and its uncertainty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nlae_jax.train import objectives


def direction_mse(reconstruction: np.ndarray, target: np.ndarray, readable: np.ndarray | None = None) -> np.ndarray:
    """[N] float64; `objectives.direction_mse`, with 2 where `readable` is False."""
    mse = np.asarray(objectives.direction_mse(reconstruction, target), np.float64)
    return mse if readable is None else np.where(readable, mse, objectives.FAILED_MSE)


def variances(h_NxD: np.ndarray) -> np.ndarray:
    """[N] float64: each direction's squared distance from the mean direction (not renormalised), per element."""
    directions = np.asarray(objectives.unit_direction(h_NxD), np.float64)
    return np.square(directions - directions.mean(0)).mean(-1)


def fve(mse: np.ndarray, variance: np.ndarray) -> float:
    """1 - mean(mse) / mean(variance)."""
    return float(1.0 - mse.mean() / variance.mean())


def mismatched(documents: np.ndarray, seed: int) -> np.ndarray:
    """A permutation of rows under which every row meets one of another document, as far as the counts allow.

    `documents` [N] names each row's document. Rows are laid out document by document in random order and rotated by
    the largest document's size.
    """
    rng = np.random.default_rng(seed)
    names, counts = np.unique(documents, return_counts=True)
    rank = rng.permutation(len(names))[np.searchsorted(names, documents)]
    order = np.argsort(rank, kind="stable")
    permutation = np.empty(len(documents), np.int64)
    permutation[order] = np.roll(order, int(counts.max()))
    return permutation


def bootstrap(
    statistic: Callable[[np.ndarray], float], documents: np.ndarray, samples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of `statistic(rows)` over resampled documents."""
    rng = np.random.default_rng(seed)
    rows_of = [np.flatnonzero(documents == name) for name in np.unique(documents)]
    values = [
        statistic(np.concatenate([rows_of[i] for i in rng.integers(len(rows_of), size=len(rows_of))]))
        for _ in range(samples)
    ]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def summarise(
    h: np.ndarray,
    documents: np.ndarray,
    mse: dict[str, np.ndarray],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """The numbers of `eval.json`.

    `mse` holds [N] arrays: `after` and `before` RL, `text` (through decode and re-encode), `shuffled`, and, where
    descriptions exist, `gold`, NaN elsewhere.
    """
    variance = variances(h)
    mean_norm = float(objectives.baselines(h).mean_norm)
    after, before = mse["after"], mse["before"]

    def gain(rows: np.ndarray) -> float:
        return fve(after[rows], variance[rows]) - fve(before[rows], variance[rows])

    described = np.isfinite(mse["gold"])
    return {
        "fve": fve(after, variance),
        "fve_ci95": bootstrap(lambda rows: fve(after[rows], variance[rows]), documents, samples, seed),
        "fve_meannorm": float(1 - after.mean() / mean_norm),
        "fve_text": fve(mse["text"], variance),
        "fve_shuffled": fve(mse["shuffled"], variance),
        "fve_gold": fve(mse["gold"][described], variance[described]) if described.any() else None,
        "fve_before_rl": fve(before, variance),
        "fve_gain": gain(np.arange(len(after))),
        "fve_gain_ci95": bootstrap(gain, documents, samples, seed),
        "cos": float(1 - after.mean() / 2),
        "num_activations": len(after),
        "num_documents": len(np.unique(documents)),
    }
