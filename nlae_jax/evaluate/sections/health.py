"""Section `health`: whether explanations are still prose about their own activation."""

from __future__ import annotations

import numpy as np

from nlae_jax.evaluate.estimate import jackknifed
from nlae_jax.evaluate.health import has_cjk, has_repetition, health
from nlae_jax.evaluate.work import Work

_OF_MANY = ("distinct_explanations", "distinct_1", "distinct_2", "distinct_3", "changed_words", "changed_candidates")


def measure(work: Work) -> None:
    """Shares of the explanations, and how different they are from each other."""
    put, length = work.ledger.put, work.main["length"].astype(np.float64)
    put("health", "extraction_rate", work.readable.astype(np.float64))
    put("health", "explanation_tokens", np.where(work.readable, length, np.nan))
    of_readable = lambda has: np.array([float(has(one)) if one else np.nan for one in work.texts])  # noqa: E731
    put("health", "noncanonical_rate", np.where(work.readable, ~work.main["canonical"].astype(bool), np.nan))
    put("health", "repeated_rate", of_readable(has_repetition))
    put("health", "marker_rate", of_readable(lambda one: work.pair.marker in one))
    put("health", "cjk_rate", of_readable(has_cjk))
    for key in _OF_MANY:
        statistic = lambda rows, key=key: health([work.texts[row] for row in rows], work.pair.marker).get(key)  # noqa: E731
        work.ledger.put_result("health", key, jackknifed(statistic, work.rows.document))
