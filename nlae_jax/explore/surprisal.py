"""Measures whether an explanation fits some texts better than others, by the subject's surprisal after reading it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nlae_jax.explore.explainer import read_batches
from nlae_jax.lm.tokens import known_text_ids
from nlae_jax.roles.language_model import LanguageModel

_BETWEEN = "\n\n"


def mean_nll(subject: LanguageModel, pairs: Sequence[tuple[str, Sequence[int]]]) -> np.ndarray:
    """Returns the mean −log p per token, in nats, of each text's ids after its preface: [N] float64.

    Tokens of a preface that the subject has no embedding for are left out.
    """
    tokenizer, vocab_size = subject.tokenizer, subject.arch.vocab_size
    prefaces = {preface: known_text_ids(tokenizer, preface + _BETWEEN, vocab_size) for preface, _ in pairs}
    return mean_nll_after(subject, [(prefaces[preface], ids) for preface, ids in pairs])


def mean_nll_after(subject: LanguageModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
    """Does what `mean_nll` does, for prefaces given as token ids, at least one each. NaN for a text without tokens."""

    def read(ids: Any, mask: Any) -> np.ndarray:
        log_probs = np.asarray(subject.log_probs(ids, mask))
        return np.pad(log_probs, ((0, 0), (1, 0)))  # the first token has no log-probability

    log_probs_of = read_batches([[*preface, *ids] for preface, ids in pairs], read)
    return np.array(
        [
            -row[len(preface) :].mean(dtype=np.float64) if len(ids) else np.nan
            for row, (preface, ids) in zip(log_probs_of, pairs, strict=True)
        ]
    )


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Returns the share of (positive, negative) pairs whose positive is larger. Ties count half; chance is 0.5."""
    difference = np.asarray(positive)[:, None] - np.asarray(negative)[None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


class Surprisal:
    """Scores explanations on fixed active texts and fixed inactive texts.

    The score of a text x is NLL(x | unrelated sentence) − NLL(x | explanation), averaged over the unrelated sentences.
    It says how much better the explanation prepares the subject for x than an unrelated sentence does.
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
        """Returns the AUC by which the scores of each explanation separate active from inactive texts."""
        pairs = [(explanation, ids) for explanation in explanations for ids in self._texts]
        scores = self._without - mean_nll(self._subject, pairs).reshape(len(explanations), -1)
        return [auc(row[: self._split], row[self._split :]) for row in scores]
