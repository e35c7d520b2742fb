"""Statistics of a pair's activations, with which an mse, a norm or a direction is compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from nlae_jax.evaluate.reconstruction import variances
from nlae_jax.runtime.errors import UserError

FILE = "statistics.safetensors"

# Norms between these quantiles of the data's norms count as usual.
_LOW, _HIGH = 0.001, 0.999


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of `count` activations at positions from 1 on; `source` names them.

    `mean` [d] float32 is the raw mean of the activations. `variance` is the mean of ‖u(h) − mean(u(h))‖²/d, where u(h)
    is the activation scaled to norm √d. It is the mse of predicting the mean, and FVE and relative mse divide by it.
    Norms outside of `norm_low` to `norm_high`, the 0.1 % and 99.9 % quantiles, are outliers.
    """

    mean: np.ndarray
    variance: float
    norm_low: float
    norm_median: float
    norm_high: float
    count: int
    source: str

    def outside(self, norm: float, position: int | None) -> str:
        """Returns why the pair was not trained on such activations: "position 0" or "norm"; "" if it was."""
        if position == 0:
            return "position 0"
        return "" if self.norm_low <= norm <= self.norm_high else "norm"

    def relative(self, mse: float) -> float:
        """Returns mse / variance: 0 for a perfect reconstruction, 1 for a reconstruction no better than the mean."""
        return mse / self.variance if self.variance > 0 else float("inf")

    def save(self, path: Path) -> None:
        """Writes the statistics to a safetensors file."""
        numbers = [self.variance, self.norm_low, self.norm_median, self.norm_high]
        tensors: dict[str, np.ndarray] = {
            "mean": self.mean.astype(np.float32),
            "numbers": np.array(numbers, np.float64),
        }
        save_file(tensors, path, {"source": self.source, "count": str(self.count)})


def statistics_of(h_NxD: np.ndarray, source: str) -> Statistics:
    """Computes the statistics of raw activations [N, d] float32."""
    norms = np.linalg.norm(h_NxD.astype(np.float64), axis=1)
    low, median, high = np.quantile(norms, [_LOW, 0.5, _HIGH])
    mean = h_NxD.mean(0, dtype=np.float64).astype(np.float32)
    return Statistics(mean, float(variances(h_NxD).mean()), float(low), float(median), float(high), len(h_NxD), source)


def load_statistics(path: Path, width: int | None = None) -> Statistics:
    """Reads a file that `Statistics.save` wrote for activations of `width`. Raises UserError for any other file."""
    try:
        tensors = load_file(path)
        with safe_open(path, "np") as file:
            labels = file.metadata() or {}
        mean, numbers = (np.asarray(tensors[name], np.float64) for name in ("mean", "numbers"))
        if not (np.isfinite(mean).all() and np.isfinite(numbers).all()):
            raise ValueError("NaN or infinity in it")
        if mean.shape != (len(mean) if width is None else width,):
            raise ValueError(f"mean has shape {mean.shape}; the pair's width is {width}")
        variance, low, median, high = numbers.tolist()
        if not (variance >= 0 and 0 <= low <= median <= high):
            raise ValueError("variance and norms should be 0 or more, and the norms in order")
        count, source = int(labels["count"]), labels["source"]
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path}: not the statistics of a pair ({error}); delete it to have them made anew") from None
    return Statistics(mean.astype(np.float32), variance, low, median, high, count, source)
