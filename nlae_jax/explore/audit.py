"""Audits many explanations: where terms occur, and which of their words the text does not contain, beside placebos.

A placebo gives every token an explanation that cannot come from its activation: the explanation of another text
(permuted), or of another pair. If a word is as frequent in a placebo as in the real explanations, it does not come from
the activations.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nlae_jax.data.corpus import read_json_lines
from nlae_jax.data.mismatch import mismatched
from nlae_jax.explore.explain import Explained, Options, content_words, explain_passages
from nlae_jax.explore.explainer import Explainer, check_length
from nlae_jax.explore.frames import frame
from nlae_jax.explore.items import Results
from nlae_jax.explore.passage import Passage
from nlae_jax.explore.select import Pick
from nlae_jax.explore.steer import wilson
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import check_count
from nlae_jax.runtime.progress import progress

_MOST_WORDS = 30  # the length of the list of recurring words


@dataclasses.dataclass(frozen=True)
class Place:
    """One explained token of a text. `in_text` says whether the text up to the token contains the term itself."""

    text: str
    position: int
    token: str
    explanation: str
    in_text: bool


@dataclasses.dataclass(frozen=True)
class Term:
    """Counts of one term in explanations and in the placebos' explanations.

    `hits` of `count` explanations contain the term, which is the `share`. `unsaid` is the number of hits at which the
    text up to the token does not contain the term. `placebos` maps a placebo's name to the share of its explanations
    with the term, and `placebos_unsaid` to the share of its unsaid hits. `difference` is `share` minus the largest
    share of a placebo, None without a placebo. `places` holds the hits in the order of texts and positions.
    `first_said` maps a text to the first position at which the text itself contains the term.
    """

    term: str
    hits: int
    count: int
    share: float
    share_ci95: tuple[float, float]
    unsaid: int
    placebos: dict[str, float]
    placebos_unsaid: dict[str, float]
    difference: float | None
    places: tuple[Place, ...]
    first_said: dict[str, int]


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """The result of an audit.

    `unsaid_share` is the share of an explanation's content words that the text up to the token does not contain,
    averaged over explanations. `unsaid_placebos` has this mean for each placebo; real explanations should have a lower
    one. `recurring` lists words that explanations contain and their texts do not, with the number of such explanations,
    and the same number for each placebo. A placebo has as many explanations as there are real ones.
    """

    num_texts: int
    num_explanations: int
    terms: tuple[Term, ...]
    unsaid_share: float
    unsaid_placebos: dict[str, float]
    recurring: tuple[dict[str, Any], ...]
    explanations: tuple[Place, ...]

    def row(self) -> dict[str, Any]:
        """Returns the report as JSON has it. The differences from the placebos come first, as the main result."""
        differences = {term.term: term.difference for term in self.terms}
        best = min(self.unsaid_placebos.values(), default=None)
        lead = {
            "term_share_minus_placebo": differences,
            "unsaid_share_minus_placebo": None if best is None else self.unsaid_share - best,
        }
        return {"differences": lead, **dataclasses.asdict(self)}

    def search(self, phrase: str) -> list[Place]:
        """Returns the explained tokens whose explanation contains a phrase, ignoring case."""
        folded = phrase.casefold()
        return [place for place in self.explanations if folded in place.explanation.casefold()]

    def to_frame(self) -> Any:
        """Returns a pandas data frame with one row per explanation. Raises UserError where pandas is missing."""
        return frame([dataclasses.asdict(place) for place in self.explanations])

    def _repr_html_(self) -> str:
        from nlae_jax.report.audit_page import audit_card

        return audit_card(self.row())


def term_pattern(term: str) -> re.Pattern[str]:
    """Compiles a pattern that finds a term as a whole word, ignoring case."""
    return re.compile(rf"(?<!\w){re.escape(term)}(?!\w)", re.IGNORECASE)


def read_terms(text: str, name: str) -> dict[str, re.Pattern[str]]:
    """Reads one term per line. Skips empty lines and those that begin with #. Raises UserError without any term."""
    lines = [line.strip() for line in re.split(r"\r\n?|\n", text)]  # a term may hold Unicode's other line breaks
    terms = dict.fromkeys(line for line in lines if line and not line.startswith("#"))
    if not terms:
        raise UserError(f"{name}: no terms in it; there should be one a line")
    return {term: term_pattern(term) for term in terms}


@dataclasses.dataclass(frozen=True)
class Explanations:
    """The input of an audit: explained tokens, each with the name of its text and the text up to it."""

    names: list[str]
    rows: list[Explained]
    texts: list[str]  # up to and including the token

    @property
    def words(self) -> list[set[str]]:
        """The content words of each explanation."""
        return [content_words(row.explanation) for row in self.rows]


def unused_name(name: str, taken: Container[str]) -> str:
    """Returns a placebo's name, with a number added if the name is taken. Two pairs may have the same name."""
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def explained_passages(nla: Explainer, passages: Sequence[Passage], every: int = 1) -> Explanations:
    """Explains every `every`-th token of the passages. The first token, an attention sink, is never explained."""
    return gathered(passages, explain_every(nla, passages, every))


def explain_every(nla: Explainer, passages: Sequence[Passage], every: int) -> list[list[Explained]]:
    """Does what `explained_passages` does, and returns one list of explained tokens per passage."""
    check_count("every", every, 1)
    lengths = [len(passage.tokens) for passage in passages]
    picks = [[Pick((at,)) for at in range(min(every, length - 1), length, every)] for length in lengths]
    return explain_passages(nla, list(zip(passages, picks, strict=True)), Options())


def kept_passages(nla: Explainer, passages: Sequence[Passage], every: int, path: Path) -> Explanations:
    """Does what `explained_passages` does, and stores the results passage by passage in a file.

    A second call continues after the last stored passage. Raises UserError if the file belongs to another pair or to
    other passages.
    """
    names_and_ids = [[passage.name, passage.ids] for passage in passages]
    results = Results(path, {"audit": [nla.identity, nla.max_new_tokens, every, names_and_ids]})
    for passage in passages:
        check_length(passage)
    with progress(len(passages), "audit", unit="text", start=results.done) as bar:
        for passage in passages[results.done :]:
            (explained,) = explain_every(nla, [passage], every)
            results.add({"id": passage.name, "tokens": [row.row() for row in explained]}, ())
            bar.advance()
    return gathered(passages, [[Explained(**row) for row in line["tokens"]] for _, line in read_json_lines(path)])


def gathered(passages: Sequence[Passage], explained: Sequence[Sequence[Explained]]) -> Explanations:
    """Joins the explained tokens of passages, one list per passage. Raises UserError where there are none."""
    names, rows, texts = [], [], []
    for passage, explained_tokens in zip(passages, explained, strict=True):
        for row in explained_tokens:
            names.append(passage.name)
            rows.append(row)
            texts.append(passage.shown(0, (row.position or 0) + 1))
    if not rows:
        raise UserError("audit: no token was explained; give texts of at least two tokens")
    return Explanations(names, rows, texts)


def check_several(names: Iterable[str]) -> None:
    """Raises UserError if there is only one text: a placebo needs the explanations of another text."""
    if len(set(names)) < 2:
        raise UserError("--placebo: takes explanations of other texts; there is only one text: give at least two")


def permuted(explanations: Explanations, seed: int) -> list[str]:
    """Returns, for every explanation, an explanation of another text.

    Explanations are exchanged between texts. If one text has more than half of the explanations, they are drawn at
    random instead. Raises UserError if there is only one text.
    """
    check_several(explanations.names)
    names, rng = np.array(explanations.names), np.random.default_rng(seed)
    order = mismatched(names, seed)
    for row in np.flatnonzero(names[order] == names):
        order[row] = rng.choice(np.flatnonzero(names != names[row]))
    return [explanations.rows[index].explanation for index in order]


def audit(
    explanations: Explanations,
    terms: Mapping[str, re.Pattern[str]],
    placebos: Mapping[str, Sequence[str]] | None = None,
) -> AuditReport:
    """Counts `terms` and unsaid words in explanations.

    `placebos` maps a name to an unrelated explanation for every row of `explanations`.
    """
    placebos = placebos or {}
    texts = [row.explanation for row in explanations.rows]
    words_of_text = [content_words(text) for text in explanations.texts]
    counted_terms = [_term(term, pattern, explanations, placebos) for term, pattern in terms.items()]
    recurring = Counter(
        word
        for explanation_words, text_words in zip(explanations.words, words_of_text, strict=True)
        for word in explanation_words - text_words
    )
    placebo_words = {
        name: Counter(
            word
            for text, text_words in zip(placebo_texts, words_of_text, strict=True)
            for word in content_words(text) - text_words
        )
        for name, placebo_texts in placebos.items()
    }
    rows: list[dict[str, Any]] = [
        {
            "word": word,
            "explanations": count,
            "placebos": {name: counts[word] for name, counts in placebo_words.items()},
        }
        for word, count in recurring.items()
    ]
    rows.sort(key=lambda row: -(row["explanations"] - max(row["placebos"].values(), default=0)))
    return AuditReport(
        num_texts=len(set(explanations.names)),
        num_explanations=len(texts),
        terms=tuple(counted_terms),
        unsaid_share=_unsaid_share(texts, words_of_text),
        unsaid_placebos={name: _unsaid_share(placebo_texts, words_of_text) for name, placebo_texts in placebos.items()},
        recurring=tuple(rows[:_MOST_WORDS]),
        explanations=tuple(
            Place(name, row.position or 0, row.token, row.explanation, False)
            for name, row in zip(explanations.names, explanations.rows, strict=True)
        ),
    )


def _unsaid_share(texts: Sequence[str], words_of_text: Sequence[set[str]]) -> float:
    """Returns the mean share of an explanation's content words that its text does not contain; 0 for empty ones."""
    shares = [
        len(words - text_words) / len(words) if (words := content_words(text)) else 0.0
        for text, text_words in zip(texts, words_of_text, strict=True)
    ]
    return float(np.mean(shares))


def _term(
    term: str, pattern: re.Pattern[str], explanations: Explanations, placebos: Mapping[str, Sequence[str]]
) -> Term:
    """Counts one term."""
    in_text = [pattern.search(text) is not None for text in explanations.texts]
    first: dict[str, int] = {}
    for name, row, is_in_text in zip(explanations.names, explanations.rows, in_text, strict=True):
        if is_in_text:
            first.setdefault(name, row.position or 0)
    places = [
        Place(name, row.position or 0, row.token, row.explanation, is_in_text)
        for name, row, is_in_text in zip(explanations.names, explanations.rows, in_text, strict=True)
        if pattern.search(row.explanation)
    ]
    count, unsaid = len(explanations.rows), sum(not place.in_text for place in places)
    matches = {name: [pattern.search(text) is not None for text in texts] for name, texts in placebos.items()}
    shares = {name: float(np.mean(hits)) for name, hits in matches.items()}
    return Term(
        term=term,
        hits=len(places),
        count=count,
        share=len(places) / count,
        share_ci95=wilson(len(places), count),
        unsaid=unsaid,
        placebos=shares,
        placebos_unsaid={
            name: float(np.mean([hit and not is_in_text for hit, is_in_text in zip(hits, in_text, strict=True)]))
            for name, hits in matches.items()
        },
        difference=len(places) / count - max(shares.values()) if shares else None,
        places=tuple(places),
        first_said=first,
    )
