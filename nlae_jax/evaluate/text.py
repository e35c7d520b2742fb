"""What of an explanation its decoder reads: its sentences, its beginning, its quotations, its order, its copied words.

Pure text; the suite rebuilds activations from what these functions leave.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nlae_jax.evaluate.claims import leading, without_quotes
from nlae_jax.evaluate.health import QUOTED, candidates, joined, pieces, real_sentences, words

MOST_SENTENCES = 4  # whose marginal value is given one by one
TOKEN_COUNTS = (4, 8, 16, 32, 64)  # that explanations are cut to
FREE_BITS = 15.0  # of a shared run of words: what chance and grammar give


def without_sentence(text: str, index: int) -> str:
    """The text without one of its sentences; negative indexes count from the end."""
    kept = real_sentences(text)
    del kept[index]
    return "".join(kept).strip()


def shuffled_sentences(text: str, seed: int) -> str:
    """The sentences in another order, where there are several."""
    kept = [sentence.strip() for sentence in real_sentences(text)]
    order = list(range(len(kept)))
    random.Random(f"{seed} {text}").shuffle(order)
    if order == sorted(order):
        order = order[1:] + order[:1]
    return " ".join(kept[index] for index in order)


def shuffled_words(text: str, seed: int) -> str:
    """The words of every sentence in another order; marks move with their words, and CJK characters count as words.

    A sentence of different words never keeps its order.
    """
    rng, mixed = random.Random(f"{seed} {text}"), []
    for sentence in real_sentences(text):
        parts = pieces(sentence)
        order = list(parts)
        rng.shuffle(order)
        mixed += order if order != parts else [*parts[1:], *parts[:1]]
    return joined(mixed)


def quotes_only(text: str) -> str:
    """The quoted spans alone, with their marks."""
    return " ".join(re.findall(QUOTED, text))


def without_all_quotes(text: str) -> str:
    """Everything but the quoted spans, wherever they stand."""
    return without_quotes(text, text)


def first_tokens(tokenizer: Any, text: str, count: int) -> str:
    """The text's first `count` tokens."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return text if len(ids) <= count else tokenizer.decode(ids[:count]).strip()


def variants(tokenizer: Any, text: str, seed: int) -> dict[str, str]:
    """What is left of an explanation, by the name that its FVE has in the suite's section `text`."""
    return {
        **{f"leading_{count}": leading(text, count) for count in range(1, MOST_SENTENCES + 1)},
        **{f"tokens_{count}": first_tokens(tokenizer, text, count) for count in TOKEN_COUNTS},
        "quotes_only": quotes_only(text),
        "quotes_removed": without_all_quotes(text),
        "sentences_shuffled": shuffled_sentences(text, seed),
        "words_shuffled": shuffled_words(text, seed),
        "lower_case": text.lower(),
    }


def twin(text: str, ranked: Sequence[str], ranks: Sequence[int]) -> str | None:
    """The text with its quoted next token, the subject's likeliest, replaced by one of other ranks (from 0).

    None where the first sentence does not quote the likeliest token, or quotes all the others, too.
    """
    own = ranked[0].strip()
    named = candidates(text) if text else []
    if not own or own not in named:
        return None
    for rank in ranks:
        other = ranked[rank].strip() if rank < len(ranked) else ""
        if other and other not in named and not set(other) & set('"“”\n'):
            return _with_token(text, own, other)
    return None


def _with_token(text: str, own: str, other: str) -> str:
    """Every quotation of exactly `own` quotes `other`."""
    return re.sub(QUOTED, lambda m: m[0].replace(own, other, 1) if m[0][1:-1].strip() == own else m[0], text)


def word_bits(texts: Sequence[str]) -> dict[str, float]:
    """Word -> -log2 of its share of all words of `texts`."""
    counts = Counter(word for text in texts for word in words(text))
    total = counts.total()
    return {word: -math.log2(count / total) for word, count in counts.items()}


def copied_runs(text: str, context: str) -> list[tuple[str, ...]]:
    """Runs of at least two words of the text that stand in the context too, each as long as can be, left to right."""
    own, place = words(text), " " + " ".join(words(context)) + " "
    runs, start = [], 0
    while start < len(own):
        end = start
        while end < len(own) and f" {' '.join(own[start : end + 1])} " in place:
            end += 1
        if end - start >= 2:
            runs.append(tuple(own[start:end]))
        start = max(end, start + 1)
    return runs


def copied_bits(text: str, context: str, bits: Mapping[str, float]) -> float:
    """Sum over `copied_runs` of max(0, Σ -log2 p(word) - 15): what can be said by quoting and not by chance."""
    return sum(max(0.0, sum(bits[word] for word in run) - FREE_BITS) for run in copied_runs(text, context))
