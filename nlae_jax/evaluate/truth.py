"""Whether explanations are true of the text, as far as that can be told without a judge. Pure functions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from nlae_jax.data.english import FUNCTION_WORDS
from nlae_jax.evaluate.claims import holds, is_in
from nlae_jax.evaluate.health import QUOTED, candidates, cjk_pairs, words

# Words that explanations are written in whatever the text is about: to find them in a text says little.
_FRAME = frozenset(
    ("next", "comes", "text", "ends", "about", "begins", "ending", "follows", "following", "sentence", "word", "token")
)


def content_words(text: str) -> set[str]:
    """Its words without function words, numbers, words of one or two letters and those that frame explanations.

    Of CJK text, whose words are not told apart by spaces, its pairs of neighbouring characters.
    """
    kept = {w for w in words(text) if len(w) > 2 and not w.isdigit() and w not in FUNCTION_WORDS and w not in _FRAME}
    return kept | cjk_pairs(text)


def words_in_context(text: str, context: str) -> tuple[int, int]:
    """How many of the text's content words stand in the context, and how many there are."""
    return precision(content_words(text), context)


def quotes_in_context(text: str, context: str) -> tuple[int, int]:
    """How many of the quoted spans of two words or more stand in the context, and how many there are.

    Single words are left out: they are next tokens more often than quotations.
    """
    spans = [span[1:-1] for span in re.findall(QUOTED, text) if len(words(span)) > 1]
    return sum(is_in(span, context) for span in spans), len(spans)


def expects(text: str, ranked: Sequence[str], most: int) -> float:
    """1 where a quoted next token is one of the subject's `most` likeliest, else 0; NaN where it cannot be told.

    It cannot where none is quoted, or the subject's likeliest token is white space.
    """
    named = candidates(text) if text else []
    if not named or not ranked or not ranked[0].strip():
        return float("nan")
    return float(any(holds(named, token) for token in ranked[:most]))


def picked(scores_NxC: np.ndarray) -> np.ndarray:
    """[N]: 1 where the first candidate has the highest score, a share of 1 where others have it too."""
    best = scores_NxC == scores_NxC.max(-1, keepdims=True)
    return np.asarray(best[:, 0] / best.sum(-1))


def recurrence(text: str, before: Sequence[str]) -> float:
    """The share of the text's content words that an explanation of a token before has, averaged over these.

    NaN without content words, or without a readable explanation before it.
    """
    said, others = content_words(text), [content_words(other) for other in before if other]
    return float(np.mean([len(said & other) / len(said) for other in others])) if said and others else float("nan")


def consensus(samples: Sequence[str], share: float = 0.8) -> set[str]:
    """The content words that at least this share of the samples has; an unreadable sample has none."""
    counts = Counter(word for sample in samples for word in content_words(sample))
    return {word for word, count in counts.items() if count >= share * len(samples)}


def precision(said: set[str], context: str) -> tuple[int, int]:
    """How many of the words stand in the context, and how many there are."""
    return len(said & (set(words(context)) | cjk_pairs(context))), len(said)
