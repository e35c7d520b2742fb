"""What another language model says of the explanations: whether their text supports them, and tells them apart.

The suite needs no judge. Where a describe provider is named for it, its verdicts stand beside the figures that need
none: a judge knows what a text implies, which words alone do not show, and errs in ways of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from nlae_jax.data.describer import Instruct
from nlae_jax.data.mismatch import of_others
from nlae_jax.evaluate.estimate import first, share_of
from nlae_jax.evaluate.work import Work

_CONTEXT_CHARACTERS = 2_000  # of a text's end that a judge is shown
_MOST_CLAIMS = 50
_TAGS = "between <explanation> and </explanation>, and nothing outside these tags."
SUPPORT = (
    "Below is a note, and the text that it is said to be about. The note may be about another text. Count the claims "
    "that the note makes, and how many of them the text supports. What the note expects to come next is no claim. "
    f'Write the sentence "The text supports S of C claims.", with both numbers in digits, {_TAGS}'
)
CHOICE = (
    "Below are two notes, A and B, and a text. One of the notes was written about the text, and the other about "
    'another text. Write the sentence "The note about the text is A." or "The note about the text is B.", '
    f"{_TAGS}"
)
_SUPPORTED = re.compile(r"\bsupports? (\d{1,3}) of (?:the )?(\d{1,3}) claims?\b", re.IGNORECASE)
# A small letter must end a phrase: in "the note about the text is a good one" it is an article.
_CHOSEN = re.compile(r"\b(?i:note about the text is (?:note )?)[\"“']?([AB]\b|[ab](?=[\"”'.,;:!?]|\s*\Z))")


def judged(work: Work, ask: Instruct | None) -> None:
    """Puts the figures `judged_support` and `judged_choice`, of the verdicts that could be read; nothing without `ask`.

    A row has a verdict where its explanation could be read and its text is known.
    """
    if ask is None:
        return
    known = [row for row in work.has_context.tolist() if work.texts[row]]
    rows = work.some(work.sizes.judged, np.array(known, int)) if known else np.zeros(0, int)
    documents = work.rows.document[rows]
    other = work.others(rows)
    notes = [work.texts[row] for row in rows]
    contexts = [work.rows.contexts[row][-_CONTEXT_CHARACTERS:] for row in rows]
    counts = {
        name: work.full(_supported(ask, [notes[index] for index in of], contexts), rows)
        for name, of in (("own", list(range(len(rows)))), ("permuted", other.tolist()))
    }
    beside = {"permuted": work.full(of_others(counts["permuted"][rows], documents, other), rows)}
    work.ledger.put("truth", "judged_support", counts["own"], share_of, beside)
    right = of_others(_chosen(ask, notes, [notes[index] for index in other], contexts), documents, other)
    chance = np.where(np.isfinite(right), 0.5, np.nan)
    work.ledger.put("truth", "judged_choice", work.full(right, rows), first, {"chance": work.full(chance, rows)})


def answers_asked(count: int) -> int:
    """How many answers `judged` asks for, of so many rows."""
    return 3 * count


def _supported(ask: Instruct, notes: Sequence[str], contexts: Sequence[str]) -> np.ndarray:
    """[N, 2]: claims that the text supports, and all of them; NaN where the judge's answer does not say it."""
    texts = [f"The note:\n{note}\n\nThe text:\n{context}" for note, context in zip(notes, contexts, strict=True)]
    return np.array([supported(answer) for answer in ask(SUPPORT, texts)], np.float64).reshape(-1, 2)


def supported(answer: str | None) -> tuple[float, float]:
    """The two numbers of an answer to `SUPPORT`; NaN where they are no count of claims and of some among them."""
    found = _SUPPORTED.findall(answer or "")
    if len(found) != 1 or not 0 <= int(found[0][0]) <= int(found[0][1]) <= _MOST_CLAIMS:
        return float("nan"), float("nan")
    return float(found[0][0]), float(found[0][1])


def _chosen(ask: Instruct, own: Sequence[str], wrong: Sequence[str], contexts: Sequence[str]) -> np.ndarray:
    """[N]: 1 where the judge finds the own note, 0 where it takes the other; NaN where it does not say which.

    The own note is A in every other row: a judge that always says A is right in half of them.
    """
    pairs = [(a, b) if row % 2 == 0 else (b, a) for row, (a, b) in enumerate(zip(own, wrong, strict=True))]
    texts = [f"A: {a}\n\nB: {b}\n\nThe text:\n{text}" for (a, b), text in zip(pairs, contexts, strict=True)]
    verdicts = [chosen(answer) for answer in ask(CHOICE, texts)]
    right = ["AB"[row % 2] for row in range(len(texts))]
    return np.array(
        [np.nan if verdict is None else float(verdict == it) for verdict, it in zip(verdicts, right, strict=True)]
    )


def chosen(answer: str | None) -> str | None:
    """A or B, as an answer to `CHOICE` says; None where it says neither or both."""
    found = {letter.upper() for letter in _CHOSEN.findall(answer or "")}
    return found.pop() if len(found) == 1 else None
