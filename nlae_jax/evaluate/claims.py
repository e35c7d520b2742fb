"""What explanations claim and what each of their parts carries: quotations, expected tokens, sentences.

A decoder can rebuild much of an activation from the last words of its context alone. So an explanation is also measured
without them, and what it quotes and expects is compared with the context and with the subject. Pure text; no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from nlae_jax.evaluate.health import QUOTED, candidates, real_sentences, sentences

_MOST_SENTENCES = 3  # that the value of an explanation's beginnings is given for


def leading(text: str, count: int) -> str:
    """The first `count` sentences that hold anything."""
    return "".join(real_sentences(text)[:count]).strip()


def without_last(text: str) -> str:
    """All sentences but the last; '' of a single one."""
    return "".join(real_sentences(text)[:-1]).strip()


def without_quotes(text: str, context: str) -> str:
    """Without the quoted spans that stand in the context."""
    cut = re.sub(QUOTED, lambda quoted: "" if is_in(quoted[0][1:-1], context) else quoted[0], text)
    return " ".join(cut.split())


def parts(text: str, context: str) -> dict[str, str]:
    """An explanation's parts by the name that their FVE has in `eval.json`."""
    return {
        **{f"leading_{count}": leading(text, count) for count in range(1, _MOST_SENTENCES + 1)},
        "without_last": without_last(text),
        "without_quotes": without_quotes(text, context),
        "bare": without_quotes(without_last(text), context),
    }


def is_in(span: str, context: str) -> bool:
    """Whether a quoted span stands in the context, white space and case aside."""
    plain = lambda text: " ".join(text.casefold().split())  # noqa: E731
    return bool(plain(span)) and plain(span) in plain(context)


def ending(text: str) -> str | None:
    """The last quoted span outside of the first sentence, whose quotations are expected tokens; None without one."""
    found = re.findall(QUOTED, "".join(sentences(text)[1:]))
    return found[-1][1:-1] if found else None


def holds(expected: Sequence[str], token: str) -> bool:
    """Whether the expected words hold the subject's likeliest next token: one of them begins with it.

    Case and white space aside. A token of one character, which many words begin with, must be one of them.
    """
    start = token.strip().casefold()
    words = [word.strip().casefold() for word in expected]
    return bool(start) and (start in words or (len(start) > 1 and any(word.startswith(start) for word in words)))


def claims(
    texts: Sequence[str], contexts: Sequence[str], tokens: Sequence[str], other: Sequence[int | None]
) -> dict[str, float]:
    """Shares of the explanations that can be read, by their name in `eval.json`.

    `ending_in_context`: the quoted last words stand in the context (of explanations that quote some).
    `candidates_hold_top1`: the expected tokens hold the subject's likeliest (of those that name some and whose subject
    expects a visible token). The `_shuffled` ones compare explanation `other[i]` with context i: what chance
    gives; rows whose `other` is None are left out.
    """
    own = list(range(len(texts)))

    def share(order: Sequence[int | None], checked: Callable[[str, int], bool | None]) -> float | None:
        said = [(i, texts[j]) for i, j in enumerate(order) if j is not None and texts[j]]
        found = [result for i, text in said if (result := checked(text, i)) is not None]
        return sum(found) / len(found) if found else None

    def quotes(text: str, row: int) -> bool | None:
        return None if (span := ending(text)) is None else is_in(span, contexts[row])

    def expects(text: str, row: int) -> bool | None:
        named = candidates(text)
        return holds(named, tokens[row]) if named and tokens[row].strip() else None

    shares = {
        "ending_in_context": share(own, quotes),
        "ending_in_context_shuffled": share(other, quotes),
        "candidates_hold_top1": share(own, expects),
        "candidates_hold_top1_shuffled": share(other, expects),
    }
    return {name: value for name, value in shares.items() if value is not None}
