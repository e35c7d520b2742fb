"""Cuts and changes explanations, to find out which of their parts the decoder reads.

The suite rebuilds activations from the changed texts. These functions work on text and need no model.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nlae_jax.evaluate.claims import leading, without_quotes
from nlae_jax.evaluate.wording import QUOTED, joined, named_next, pieces, real_sentences, words

MOST_SENTENCES = 4  # the number of sentences whose marginal FVE is measured one by one
TOKEN_COUNTS = (4, 8, 16, 32, 64)  # explanations are cut to these numbers of tokens
FREE_BITS = 15.0  # so much information of a shared run of words may come from chance and grammar


def without_sentence(text: str, index: int) -> str:
    """Returns the text without one of its sentences. Negative indexes count from the end."""
    kept = real_sentences(text)
    del kept[index]
    return "".join(kept).strip()


def shuffled_sentences(text: str, seed: int) -> str:
    """Returns the text with its sentences in another order. A single sentence is returned as it is."""
    kept = [sentence.strip() for sentence in real_sentences(text)]
    order = list(range(len(kept)))
    random.Random(f"{seed} {text}").shuffle(order)
    if order == sorted(order):
        order = order[1:] + order[:1]
    return " ".join(kept[index] for index in order)


def shuffled_words(text: str, seed: int) -> str:
    """Returns the text with the words of every sentence in another order.

    Punctuation moves with its word. A CJK character counts as a word. A sentence of different words always changes.
    """
    rng, mixed = random.Random(f"{seed} {text}"), []
    for sentence in real_sentences(text):
        in_order = pieces(sentence)
        shuffled = list(in_order)
        rng.shuffle(shuffled)
        mixed += shuffled if shuffled != in_order else [*in_order[1:], *in_order[:1]]
    return joined(mixed)


def quotes_only(text: str) -> str:
    """Returns only the quoted spans, with their marks, joined by spaces."""
    return " ".join(re.findall(QUOTED, text))


def without_all_quotes(text: str) -> str:
    """Returns the text without any quoted span."""
    return without_quotes(text, text)


def first_tokens(tokenizer: Any, text: str, count: int) -> str:
    """Returns the text's first `count` tokens as text."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return text if len(ids) <= count else tokenizer.decode(ids[:count]).strip()


def variants(tokenizer: Any, text: str, seed: int) -> dict[str, str]:
    """Returns the cut and changed versions of an explanation, by the names that the section `text` uses."""
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
    """Returns the explanation's twin: it quotes another next token in the place of the subject's likeliest one.

    `ranked` are the subject's next tokens, likeliest first. The other token is the first of the given `ranks`, counted
    from 0, that is not among the named next tokens (`wording.named_next`). Returns None if the likeliest token is not
    among them, or if there is no such other token.
    """
    likeliest, named = ranked[0].strip(), named_next(text)
    if not likeliest or likeliest not in named:
        return None
    for rank in ranks:
        token = ranked[rank].strip() if rank < len(ranked) else ""
        if token and token not in named and not set(token) & set('"“”\n'):
            return _with_token(text, likeliest, token)
    return None


def _with_token(text: str, token: str, replacement: str) -> str:
    """Replaces `token` in every quotation that holds exactly this token."""
    return re.sub(QUOTED, lambda m: m[0].replace(token, replacement, 1) if m[0][1:-1].strip() == token else m[0], text)


def word_bits(texts: Sequence[str]) -> dict[str, float]:
    """Returns -log2 p(word) of every word, in bits, where p(word) is the word's share of all words of `texts`."""
    counts = Counter(word for text in texts for word in words(text))
    total = counts.total()
    return {word: -math.log2(count / total) for word, count in counts.items()}


def copied_runs(text: str, context: str) -> list[tuple[str, ...]]:
    """Returns the runs of at least two words of the text that also occur in the context.

    Runs are found from left to right. Each is as long as possible, and they do not overlap.
    """
    text_words, context_line = words(text), " " + " ".join(words(context)) + " "
    runs, start = [], 0
    while start < len(text_words):
        end = start
        while end < len(text_words) and f" {' '.join(text_words[start : end + 1])} " in context_line:
            end += 1
        if end - start >= 2:
            runs.append(tuple(text_words[start:end]))
        start = max(end, start + 1)
    return runs


def copied_bits(text: str, context: str, bits: Mapping[str, float]) -> float:
    """Returns the information that the text copies from the context, in bits.

    It is the sum over `copied_runs` of max(0, Σ -log2 p(word) - 15). `bits` is the result of `word_bits`. The 15 bits
    (`FREE_BITS`) of each run may come from chance and grammar.
    """
    return sum(max(0.0, sum(bits[word] for word in run) - FREE_BITS) for run in copied_runs(text, context))
