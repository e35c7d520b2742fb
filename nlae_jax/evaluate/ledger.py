"""Collects the suite's results: every figure with its interval, its controls and its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nlae_jax.evaluate.estimate import Statistic, estimate, first
from nlae_jax.evaluate.figures import BY_NAME


class Ledger:
    """The suite's results: every figure as `estimate` gives it, with its controls and parts."""

    def __init__(self, documents: np.ndarray, samples: int, seed: int) -> None:
        self._documents, self._samples, self._seed = documents, samples, seed
        self.sections: dict[str, dict[str, Any]] = {}

    def estimate(self, columns: np.ndarray, statistic: Statistic = first) -> dict[str, Any]:
        return estimate(columns, self._documents, statistic, self._samples, self._seed)

    def put(
        self,
        section: str,
        key: str,
        columns: np.ndarray | None,
        statistic: Statistic = first,
        controls: Mapping[str, np.ndarray] | None = None,
        parts: Mapping[str, np.ndarray] | None = None,
        part_controls: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    ) -> dict[str, Any]:
        """Reports a figure of columns [N] or [N, k] of all rows, NaN where a row has none, and returns it.

        `controls` and `parts` are columns of the same kind; `part_controls` has columns by control and part. Without
        columns of its own a figure has parts alone.
        """
        beside_parts = part_controls or {}
        assert set(beside_parts) <= set(BY_NAME[section, key].part_controls), (key, set(beside_parts))
        result = {} if columns is None else self.estimate(columns, statistic)
        beside = {name: self.estimate(of, statistic) for name, of in (controls or {}).items()}
        divided = {name: self.estimate(of, statistic) for name, of in (parts or {}).items()}
        for name, part in divided.items():
            if found := {control: self.estimate(of[name], statistic) for control, of in beside_parts.items()}:
                part["controls"] = found
        return self.put_result(section, key, result, beside, divided)

    def put_result(
        self,
        section: str,
        key: str,
        result: Mapping[str, Any],
        controls: Mapping[str, Any] | None = None,
        parts: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The same for numbers that are estimated elsewhere."""
        figure = BY_NAME[section, key]
        assert set(controls or {}) <= set(figure.controls), (key, controls)
        entry = {
            **result,
            **({"controls": dict(controls)} if controls else {}),
            **({"parts": dict(parts)} if parts else {}),
        }
        self.sections.setdefault(section, {})[key] = entry
        return entry
