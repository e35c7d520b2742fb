"""Splits explanations into parts, and checks their quotations and expected tokens against the context.

A decoder can rebuild much of an activation from the last words of its context. The run's evaluation therefore also
measures explanations without their last sentence and without quotations. It compares the quotations with the context,
and the expected tokens with the subject's likeliest next token. The functions work on text and need no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from nlae_jax.evaluate.wording import QUOTED, candidates, real_sentences, sentences

_MOST_SENTENCES = 3  # `parts` cuts an explanation after 1, 2, … of so many sentences


def leading(text: str, count: int) -> str:
    """Returns the first `count` sentences of the text. Empty lines are not sentences."""
    return "".join(real_sentences(text)[:count]).strip()


def without_last(text: str) -> str:
    """Returns the text without its last sentence. The result is '' if there is only one sentence."""
    return "".join(real_sentences(text)[:-1]).strip()


def without_quotes(text: str, context: str) -> str:
    """Returns the text without those quoted spans that occur in the context. Other quoted spans stay."""
    cut = re.sub(QUOTED, lambda quoted: "" if is_in(quoted[0][1:-1], context) else quoted[0], text)
    return " ".join(cut.split())


def parts(text: str, context: str) -> dict[str, str]:
    """Returns the parts of an explanation, by name.

    The run's evaluation writes the FVE of the part NAME to `eval.json` as `fve_NAME`. `bare` is the text without its
    last sentence and without the quoted spans that occur in the context.
    """
    return {
        **{f"leading_{count}": leading(text, count) for count in range(1, _MOST_SENTENCES + 1)},
        "without_last": without_last(text),
        "without_quotes": without_quotes(text, context),
        "bare": without_quotes(without_last(text), context),
    }


def is_in(span: str, context: str) -> bool:
    """Returns whether a quoted span occurs in the context. Case and the kind of white space do not count."""
    plain = lambda text: " ".join(text.casefold().split())  # noqa: E731
    return bool(plain(span)) and plain(span) in plain(context)


def ending(text: str) -> str | None:
    """Returns the last quoted span after the first sentence, without its marks. Returns None if there is none.

    Quotations in the first sentence are not used, because they name expected next tokens.
    """
    quotations = re.findall(QUOTED, "".join(sentences(text)[1:]))
    return quotations[-1][1:-1] if quotations else None


def holds(expected: Sequence[str], token: str) -> bool:
    """Returns whether one of the expected words begins with the token, the subject's likeliest next token.

    Case and surrounding white space do not count. A token of one character must equal a word, because many words begin
    with any one character.
    """
    start = token.strip().casefold()
    words = [word.strip().casefold() for word in expected]
    return bool(start) and (start in words or (len(start) > 1 and any(word.startswith(start) for word in words)))


def claims(
    texts: Sequence[str], contexts: Sequence[str], tokens: Sequence[str], other: Sequence[int | None]
) -> dict[str, float]:
    """Returns shares of the explanations, by their name in `eval.json`. A share without any case is left out.

    `texts` are N explanations; unreadable ones are '' and do not count. `contexts` are the N texts up to the
    activations. `tokens` are the subject's N likeliest next tokens.

    `ending_in_context` is the share of explanations whose `ending` occurs in the context. Only explanations that have
    an `ending` count. `candidates_hold_top1` is the share of explanations whose expected tokens include the likeliest
    one (`holds`). An explanation counts if it names expected tokens and the likeliest token is not white space.

    The shares ending in `_shuffled` show what chance gives: they compare explanation `other[i]` with context i. Rows
    whose `other` is None are left out.
    """
    same_row = list(range(len(texts)))

    def share(order: Sequence[int | None], checked: Callable[[str, int], bool | None]) -> float | None:
        pairs = [(row, texts[index]) for row, index in enumerate(order) if index is not None and texts[index]]
        results = [result for row, text in pairs if (result := checked(text, row)) is not None]
        return sum(results) / len(results) if results else None

    def quotes(text: str, row: int) -> bool | None:
        return None if (span := ending(text)) is None else is_in(span, contexts[row])

    def expects(text: str, row: int) -> bool | None:
        named = candidates(text)
        return holds(named, tokens[row]) if named and tokens[row].strip() else None

    shares = {
        "ending_in_context": share(same_row, quotes),
        "ending_in_context_shuffled": share(other, quotes),
        "candidates_hold_top1": share(same_row, expects),
        "candidates_hold_top1_shuffled": share(other, expects),
    }
    return {name: value for name, value in shares.items() if value is not None}
