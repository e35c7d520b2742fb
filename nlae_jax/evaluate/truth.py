"""Compares explanations with their text, as far as this is possible without a judge. Pure functions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from nlae_jax.data.english import FUNCTION_WORDS
from nlae_jax.evaluate.claims import holds, is_in
from nlae_jax.evaluate.wording import QUOTED, cjk_pairs, named_next, naming_sentence, real_sentences, words

# Explanations use these words whatever their text is about, so finding one of them in a text shows little.
_FRAME = frozenset(
    ("next", "comes", "text", "ends", "about", "begins", "ending", "follows", "following", "sentence", "word", "token")
)


def content_words(text: str) -> set[str]:
    """Returns the content words of a text, case-folded.

    Content words exclude function words, numbers, words of one or two letters, and the words of `_FRAME`. In CJK text,
    which does not separate words by spaces, each pair of neighbouring characters counts as a content word.
    """
    kept = {w for w in words(text) if len(w) > 2 and not w.isdigit() and w not in FUNCTION_WORDS and w not in _FRAME}
    return kept | cjk_pairs(text)


def words_in_context(text: str, context: str) -> tuple[int, int]:
    """Returns how many of the text's content words occur in the context, and how many content words it has."""
    return precision(content_words(text), context)


def quotes_in_context(text: str, context: str) -> tuple[int, int]:
    """Returns how many of the text's quoted spans occur in the context, and how many quoted spans it has.

    Single words of the sentence that names the next tokens (`wording.naming_sentence`) do not count, because they are
    next tokens rather than quotations. Spans without a word do not count either.
    """
    naming = naming_sentence(text)
    spans = [
        span[1:-1]
        for number, sentence in enumerate(real_sentences(text))
        for span in re.findall(QUOTED, sentence)
        if len(words(span)) > (1 if number == naming else 0)
    ]
    return sum(is_in(span, context) for span in spans), len(spans)


def expects(text: str, ranked: Sequence[str], most: int) -> float:
    """Returns 1 if a quoted next token (`wording.named_next`) is one of the subject's `most` likeliest, else 0.

    `ranked` are the subject's next tokens, likeliest first. Returns NaN if the text quotes no next token, or if the
    subject's likeliest token is white space.
    """
    named = named_next(text)
    if not named or not ranked or not ranked[0].strip():
        return float("nan")
    return float(any(holds(named, token) for token in ranked[:most]))


def picked(scores_NxC: np.ndarray) -> np.ndarray:
    """Returns [N]: 1 where the first of C candidates has the highest score, else 0. If k candidates tie, it is 1/k."""
    best = scores_NxC == scores_NxC.max(-1, keepdims=True)
    return np.asarray(best[:, 0] / best.sum(-1))


def recurrence(text: str, before: Sequence[str]) -> float:
    """Returns the share of the text's content words that an explanation in `before` has too, averaged over `before`.

    `before` are explanations of earlier tokens of the same text; unreadable ones are ''. Returns NaN if the text has no
    content words, or if no explanation in `before` is readable.
    """
    text_words, earlier = content_words(text), [content_words(explanation) for explanation in before if explanation]
    if not text_words or not earlier:
        return float("nan")
    return float(np.mean([len(text_words & found) / len(text_words) for found in earlier]))


def consensus(samples: Sequence[str], share: float = 0.8) -> set[str]:
    """Returns the content words that at least `share` of the samples contain. Unreadable samples contain none."""
    counts = Counter(word for sample in samples for word in content_words(sample))
    return {word for word, count in counts.items() if count >= share * len(samples)}


def precision(content: set[str], context: str) -> tuple[int, int]:
    """Returns how many of the `content` words occur in the context, and how many content words there are."""
    return len(content & (set(words(context)) | cjk_pairs(context))), len(content)
