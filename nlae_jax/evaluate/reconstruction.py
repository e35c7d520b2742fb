"""How much of held-out activations the words carry: FVE, its controls and its uncertainty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from nlae_jax.roles import direction
from nlae_jax.train import objectives

# Vectors that `uninformed` makes.
UNINFORMED = ("zero", "mean_vector", "random_vector")


def direction_mse(reconstruction: np.ndarray, target: np.ndarray, readable: np.ndarray | None = None) -> np.ndarray:
    """[N] float64; `direction.direction_mse`, with 2 where `readable` is False."""
    mse = np.asarray(direction.direction_mse(jnp.asarray(reconstruction), jnp.asarray(target)), np.float64)
    return mse if readable is None else np.where(readable, mse, objectives.FAILED_MSE)


def variances(h_NxD: np.ndarray) -> np.ndarray:
    """[N] float64: each direction's squared distance from the mean direction (not renormalised), per element."""
    directions = np.asarray(direction.unit_direction(jnp.asarray(h_NxD)), np.float64)
    variance_N: np.ndarray = np.square(directions - directions.mean(0)).mean(-1)
    return variance_N


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


def uninformed(h_NxD: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Vectors [N, d] float32 that say nothing about their row, by name: what an encoder must not do as well from.

    `zero`; `mean_vector`, the mean direction of `h`; `random_vector`, another isotropic direction in each row. The
    latter two are as long as `h`'s median row.
    """
    directions = np.stack(
        [
            np.broadcast_to(np.asarray(direction.unit_direction(jnp.asarray(h_NxD))).mean(0), h_NxD.shape),
            np.random.default_rng(seed).standard_normal(h_NxD.shape),
        ]
    )
    lengths = np.maximum(np.linalg.norm(directions, axis=-1, keepdims=True), 1e-30)
    mean, random = (directions / lengths * np.median(np.linalg.norm(h_NxD, axis=-1))).astype(np.float32)
    return {"zero": np.zeros_like(mean), "mean_vector": mean, "random_vector": random}


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


# What `summarise` has of every row, and the descriptions; any other mse is of parts of the explanations.
_OF_ALL = ("after", "before", "text", "shuffled", "gold")


def summarise(
    h: np.ndarray,
    documents: np.ndarray,
    mse: dict[str, np.ndarray],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """The numbers of `eval.json`.

    `mse` holds [N] arrays: `after` and `before` RL, `text` (through decode and re-encode), `shuffled`, and, NaN on
    rows that have none, `gold` (descriptions), those of explanations of `UNINFORMED` vectors, and any others: of parts
    of the explanations. Gaps are between the same rows. A number is None where no row has what it is of.
    """
    variance = variances(h)
    mean_norm = float(direction.baselines(jnp.asarray(h)).mean_norm)
    after, before = mse["after"], mse["before"]

    def gain(rows: np.ndarray) -> float:
        return fve(after[rows], variance[rows]) - fve(before[rows], variance[rows])

    def on_measured(name: str) -> tuple[float | None, float | None]:
        """FVE of `name` on the rows that have it, and of the explanations on the same rows."""
        if not (rows := np.isfinite(mse.get(name, np.full(len(after), np.nan)))).any():
            return None, None
        return fve(mse[name][rows], variance[rows]), fve(after[rows], variance[rows])

    gold, beside_gold = on_measured("gold")
    controls = {name: on_measured(name) for name in UNINFORMED}
    gaps = [beside - control for control, beside in controls.values() if control is not None and beside is not None]
    return {
        "fve": fve(after, variance),
        "fve_ci95": bootstrap(lambda rows: fve(after[rows], variance[rows]), documents, samples, seed),
        "fve_meannorm": float(1 - after.mean() / mean_norm),
        "fve_text": fve(mse["text"], variance),
        "fve_shuffled": fve(mse["shuffled"], variance),
        "fve_gold": gold,
        "fve_gold_gap": None if gold is None or beside_gold is None else gold - beside_gold,
        **{f"fve_{name}": control for name, (control, _) in controls.items()},
        **{f"fve_{name}": on_measured(name)[0] for name in mse if name not in (*_OF_ALL, *UNINFORMED)},
        "fve_vector_gap": min(gaps, default=None),
        "fve_before_rl": fve(before, variance),
        "fve_gain": gain(np.arange(len(after))),
        "fve_gain_ci95": bootstrap(gain, documents, samples, seed),
        "cos": float(1 - after.mean() / 2),
        "num_activations": len(after),
        "num_documents": len(np.unique(documents)),
    }
