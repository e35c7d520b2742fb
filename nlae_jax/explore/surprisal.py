"""Whether an explanation tells which texts it is of: what reading it first does to the surprise at a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nlae_jax.explore.explainer import read_batches
from nlae_jax.lm.tokens import text_ids
from nlae_jax.roles.language_model import LanguageModel

_BETWEEN = "\n\n"


def mean_nll(subject: LanguageModel, pairs: Sequence[tuple[str, Sequence[int]]]) -> np.ndarray:
    """Mean −log p per token of each text's ids after its preface, in nats: [N] float64."""
    prefaces = {preface: text_ids(subject.tokenizer, preface + _BETWEEN) for preface, _ in pairs}
    return mean_nll_after(subject, [(prefaces[preface], ids) for preface, ids in pairs])


def mean_nll_after(subject: LanguageModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
    """The same after the ids of a preface, of one token at least; NaN for a text without tokens."""

    def read(ids: Any, mask: Any) -> np.ndarray:
        log_probs = np.asarray(subject.log_probs(ids, mask))
        return np.pad(log_probs, ((0, 0), (1, 0)))  # of each token, the first one's unknown

    found = read_batches([[*preface, *ids] for preface, ids in pairs], read)
    return np.array(
        [
            -row[len(preface) :].mean(dtype=np.float64) if len(ids) else np.nan
            for row, (preface, ids) in zip(found, pairs, strict=True)
        ]
    )


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The share of (positive, negative) pairs in which the positive is larger, ties counting half; 0.5 is chance."""
    difference = np.asarray(positive)[:, None] - np.asarray(negative)[None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


class Surprisal:
    """Scores explanations against fixed texts: those that activate and those that do not.

    The score of a text x is NLL(x | unrelated sentences) − NLL(x | explanation), averaged over the unrelated ones: how
    much more the explanation prepares the subject for x than something unrelated does.
    """

    def __init__(
        self,
        subject: LanguageModel,
        active: Sequence[Sequence[int]],
        inactive: Sequence[Sequence[int]],
        unrelated: Sequence[str],
    ) -> None:
        self._subject, self._texts, self._split = subject, [*active, *inactive], len(active)
        pairs = [(sentence, ids) for ids in self._texts for sentence in unrelated]
        self._without = mean_nll(subject, pairs).reshape(len(self._texts), len(unrelated)).mean(1)

    def auc(self, explanations: Sequence[str]) -> list[float]:
        """Of each explanation, how well its scores tell the active texts from the others."""
        pairs = [(explanation, ids) for explanation in explanations for ids in self._texts]
        scores = self._without - mean_nll(self._subject, pairs).reshape(len(explanations), -1)
        return [auc(row[: self._split], row[self._split :]) for row in scores]
