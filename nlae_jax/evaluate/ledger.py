"""Collects the suite's results: every figure with its interval, its controls and its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nlae_jax.evaluate.estimate import Statistic, estimate, first
from nlae_jax.evaluate.figures import BY_NAME


class Ledger:
    """The suite's results. `sections` maps section and figure to what `eval.json` has of the figure.

    `documents` [N] names each row's document, for the intervals. `samples` is the number of resamplings.
    """

    def __init__(self, documents: np.ndarray, samples: int, seed: int) -> None:
        self._documents, self._samples, self._seed = documents, samples, seed
        self.sections: dict[str, dict[str, Any]] = {}

    def estimate(self, columns: np.ndarray, statistic: Statistic = first) -> dict[str, Any]:
        """Calls `estimate.estimate` with the ledger's documents, number of resamplings and seed."""
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
        """Estimates a figure, stores it and returns it.

        `columns` are [N] or [N, k], the input of `statistic` for all rows, with NaN where a row does not count. Give
        None for a figure that consists of parts only. `controls` and `parts` map names to columns of the same kind.
        `part_controls` maps a control's name to the columns of each part. The table of figures must list the controls.
        """
        part_controls = part_controls or {}
        assert set(part_controls) <= set(BY_NAME[section, key].part_controls), (key, set(part_controls))
        result = {} if columns is None else self.estimate(columns, statistic)
        estimated_controls = {name: self.estimate(values, statistic) for name, values in (controls or {}).items()}
        estimated_parts = {name: self.estimate(values, statistic) for name, values in (parts or {}).items()}
        for name, part in estimated_parts.items():
            if part_controls:
                part["controls"] = {
                    control: self.estimate(by_part[name], statistic) for control, by_part in part_controls.items()
                }
        return self.put_result(section, key, result, estimated_controls, estimated_parts)

    def put_result(
        self,
        section: str,
        key: str,
        result: Mapping[str, Any],
        controls: Mapping[str, Any] | None = None,
        parts: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Stores a figure whose numbers were estimated elsewhere, and returns it. `put` has the same arguments."""
        figure = BY_NAME[section, key]
        assert set(controls or {}) <= set(figure.controls), (key, controls)
        entry = {
            **result,
            **({"controls": dict(controls)} if controls else {}),
            **({"parts": dict(parts)} if parts else {}),
        }
        self.sections.setdefault(section, {})[key] = entry
        return entry
