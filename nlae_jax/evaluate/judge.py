"""Asks another language model, the judge, whether texts support their explanations, and which explanation fits a text.

The judge is optional. It is asked if the config names a describe provider for it. A judge also knows what a text
implies, which comparing words does not show. It makes errors of its own, so its figures stand beside the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from nlae_jax.data.describer import Instruct
from nlae_jax.data.mismatch import of_others
from nlae_jax.evaluate.estimate import first, share_of
from nlae_jax.evaluate.work import Work

_CONTEXT_CHARACTERS = 2_000  # a judge reads so many characters of a text's end
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
# A lower-case letter counts only at the end of a phrase: in "the note about the text is a good one", `a` is an article.
_CHOSEN = re.compile(r"\b(?i:note about the text is (?:note )?)[\"“']?([AB]\b|[ab](?=[\"”'.,;:!?]|\s*\Z))")


def judged(work: Work, ask: Instruct | None) -> None:
    """Adds the figures `judged_support` and `judged_choice` to the ledger. Does nothing without `ask`.

    The judge is asked about rows whose explanation is readable and whose text is known. Answers that cannot be read do
    not count.
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
        name: work.full(_supported(ask, [notes[index] for index in order], contexts), rows)
        for name, order in (("matched", list(range(len(rows)))), ("permuted", other.tolist()))
    }
    controls = {"permuted": work.full(of_others(counts["permuted"][rows], documents, other), rows)}
    work.ledger.put("truth", "judged_support", counts["matched"], share_of, controls)
    right = of_others(_chosen(ask, notes, [notes[index] for index in other], contexts), documents, other)
    chance = np.where(np.isfinite(right), 0.5, np.nan)
    work.ledger.put("truth", "judged_choice", work.full(right, rows), first, {"chance": work.full(chance, rows)})


def answers_asked(count: int) -> int:
    """Returns how many answers `judged` asks for if it asks about `count` rows."""
    return 3 * count


def _supported(ask: Instruct, notes: Sequence[str], contexts: Sequence[str]) -> np.ndarray:
    """Returns [N, 2]: the number of claims that the text supports, and the number of claims.

    Both are NaN where the judge's answer does not contain them.
    """
    texts = [f"The note:\n{note}\n\nThe text:\n{context}" for note, context in zip(notes, contexts, strict=True)]
    return np.array([supported(answer) for answer in ask(SUPPORT, texts)], np.float64).reshape(-1, 2)


def supported(answer: str | None) -> tuple[float, float]:
    """Returns the two numbers of an answer to `SUPPORT`: supported claims and all claims.

    Both are NaN if the answer has no such numbers, has several, or has impossible ones.
    """
    fractions = _SUPPORTED.findall(answer or "")
    if len(fractions) != 1 or not 0 <= int(fractions[0][0]) <= int(fractions[0][1]) <= _MOST_CLAIMS:
        return float("nan"), float("nan")
    return float(fractions[0][0]), float(fractions[0][1])


def _chosen(ask: Instruct, matched: Sequence[str], wrong: Sequence[str], contexts: Sequence[str]) -> np.ndarray:
    """Returns [N]: 1 where the judge chooses the matched note, 0 where it chooses the wrong note, else NaN.

    `matched[i]` is the note about text i, `wrong[i]` is about another text. The matched note is A in every other row,
    so a judge that always says A is right in half of the rows.
    """
    pairs = [(a, b) if row % 2 == 0 else (b, a) for row, (a, b) in enumerate(zip(matched, wrong, strict=True))]
    texts = [f"A: {a}\n\nB: {b}\n\nThe text:\n{text}" for (a, b), text in zip(pairs, contexts, strict=True)]
    verdicts = [chosen(answer) for answer in ask(CHOICE, texts)]
    return np.array(
        [np.nan if verdict is None else float(verdict == "AB"[row % 2]) for row, verdict in enumerate(verdicts)]
    )


def chosen(answer: str | None) -> str | None:
    """Returns the letter A or B that an answer to `CHOICE` names. Returns None if it names neither or both."""
    letters = {letter.upper() for letter in _CHOSEN.findall(answer or "")}
    return letters.pop() if len(letters) == 1 else None
