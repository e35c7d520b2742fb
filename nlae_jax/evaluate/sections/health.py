"""Section `health`: measures whether explanations are still prose about their own activation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nlae_jax.evaluate.estimate import first, jackknifed
from nlae_jax.evaluate.health import health
from nlae_jax.evaluate.wording import has_cjk, has_repeated_item, has_repeated_sentence, has_repetition
from nlae_jax.evaluate.work import Work

# The measures of `health.health` that compare explanations with each other.
_OF_MANY = ("distinct_explanations", "distinct_1", "distinct_2", "distinct_3", "changed_words", "changed_candidates")


def measure(work: Work) -> None:
    """Adds the section's figures to the ledger: shares of explanations, and how different explanations are."""
    put, length = work.ledger.put, work.main["length"].astype(np.float64)
    put("health", "extraction_rate", work.readable.astype(np.float64))
    put("health", "truncated_rate", work.main["truncated"].astype(np.float64))
    controls = {"gold": _lengths(work, work.rows.gold)} if work.has_gold else {}
    put("health", "explanation_tokens", np.where(work.readable, length, np.nan), first, controls)
    put("health", "noncanonical_rate", np.where(work.readable, ~work.main["canonical"].astype(bool), np.nan))
    shares: dict[str, Callable[[str], bool]] = {
        "repeated_rate": has_repetition,
        "repeated_item_rate": has_repeated_item,
        "repeated_sentence_rate": has_repeated_sentence,
        "marker_rate": lambda text: work.pair.marker in text,
        "cjk_rate": has_cjk,
    }
    for key, has in shares.items():
        controls = {"contexts": _share(has, work.rows.contexts)} if key == "cjk_rate" else {}
        controls |= {"gold": _share(has, work.rows.gold)} if work.has_gold else {}
        put("health", key, _share(has, work.texts), first, controls)
    variety = _variety(work, work.texts)
    # Fewer texts have fewer repetitions, so descriptions are compared only if every row has one.
    gold = _variety(work, work.rows.gold) if all(work.rows.gold) else {}
    for key in _OF_MANY:
        work.ledger.put_result("health", key, variety[key], {"gold": gold[key]} if gold else {})


def _share(has: Callable[[str], bool], texts: Sequence[str]) -> np.ndarray:
    """Returns [N]: 1 if `has(text)`, else 0, and NaN for an empty text."""
    return np.array([float(has(text)) if text else np.nan for text in texts])


def _lengths(work: Work, texts: Sequence[str]) -> np.ndarray:
    """Returns [N]: the number of tokens of every text, and NaN for an empty text."""
    encode = work.pair.tokenizer.encode
    return np.array([len(encode(text, add_special_tokens=False)) if text else np.nan for text in texts])


def _variety(work: Work, texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the measures of `_OF_MANY` of the readable texts, with their intervals. All of them are shares."""
    readable = np.flatnonzero([bool(text) for text in texts])

    @functools.cache
    def measured(rows: tuple[int, ...]) -> dict[str, float]:
        """All keys leave out the same groups of rows, so each of these is measured once."""
        return health([texts[readable[row]] for row in rows], work.pair.marker)

    def jackknifed_key(key: str) -> dict[str, Any]:
        statistic = lambda rows: measured(tuple(rows.tolist())).get(key)  # noqa: E731
        return jackknifed(statistic, work.rows.document[readable], limits=(0.0, 1.0))

    return {key: jackknifed_key(key) for key in _OF_MANY}
