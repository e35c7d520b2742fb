"""Audits of many explanations: where terms occur, what explanations say that the text does not, held against placebos.

A placebo is the same table made of explanations that belong to other texts (permuted) or come from another pair. What
the real ones do not say more, or less, often than a placebo, the activations did not say.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
from nlae_jax.runtime.progress import progress

_MOST_WORDS = 30  # of a list of recurring words


@dataclasses.dataclass(frozen=True)
class Place:
    """One explained token: of which text, where, and whether the text up to there says a term itself."""

    text: str
    position: int
    token: str
    explanation: str
    in_text: bool


@dataclasses.dataclass(frozen=True)
class Term:
    """How often explanations have a term, and how often those of a placebo do.

    `hits` of `count` explanations have it; `unsaid` of these hits stand where the text up to there does not have it.
    `placebos`: name -> share of the placebo's explanations. `difference`: the share minus the largest of those, None
    without a placebo. `places`: the hits, in the order of texts and positions. `first_said`: text -> the first position
    by which the text itself has the term.
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
    """`terms`; and of all explanations the mean share of content words that the text up to the token does not have.

    `unsaid_share` says that of the real ones, `unsaid_placebos` of each placebo: real explanations should have fewer
    such words. `recurring`: words that explanations say and texts do not, with the number of explanations, and the
    same in the placebos per as many explanations.
    """

    num_texts: int
    num_explanations: int
    terms: tuple[Term, ...]
    unsaid_share: float
    unsaid_placebos: dict[str, float]
    recurring: tuple[dict[str, Any], ...]
    explanations: tuple[Place, ...]

    def row(self) -> dict[str, Any]:
        """As JSON has it; what an auditor reads first comes first: the differences from the placebos."""
        differences = {term.term: term.difference for term in self.terms}
        best = min(self.unsaid_placebos.values(), default=None)
        lead = {
            "term_share_minus_placebo": differences,
            "unsaid_share_minus_placebo": None if best is None else self.unsaid_share - best,
        }
        return {"differences": lead, **dataclasses.asdict(self)}

    def search(self, phrase: str) -> list[Place]:
        """The explained tokens whose explanation has a phrase, in any case."""
        wanted = phrase.casefold()
        return [place for place in self.explanations if wanted in place.explanation.casefold()]

    def to_frame(self) -> Any:
        """One row an explanation as a pandas data frame."""
        return frame([dataclasses.asdict(place) for place in self.explanations])

    def _repr_html_(self) -> str:
        from nlae_jax.report.audit_page import audit_card

        return audit_card(self.row())


def term_pattern(term: str) -> re.Pattern[str]:
    """A term as it stands by itself in a text, in any case."""
    return re.compile(rf"(?<!\w){re.escape(term)}(?!\w)", re.IGNORECASE)


def read_terms(text: str, name: str) -> dict[str, re.Pattern[str]]:
    """One term a line; empty lines and those that begin with # are left out."""
    lines = [line.strip() for line in text.splitlines()]
    terms = dict.fromkeys(line for line in lines if line and not line.startswith("#"))
    if not terms:
        raise UserError(f"{name}: no terms in it; there should be one a line")
    return {term: term_pattern(term) for term in terms}


@dataclasses.dataclass(frozen=True)
class Explanations:
    """What an audit is of: explained tokens with what the text says up to each, and which text it is."""

    names: list[str]
    rows: list[Explained]
    texts: list[str]  # up to and including the token

    @property
    def words(self) -> list[set[str]]:
        return [content_words(row.explanation) for row in self.rows]


def explained_passages(nla: Explainer, passages: Sequence[Passage], every: int = 1) -> Explanations:
    """Every Nth token of passages explained, but the first one, which is an attention sink."""
    return gathered(passages, explain_every(nla, passages, every))


def explain_every(nla: Explainer, passages: Sequence[Passage], every: int) -> list[list[Explained]]:
    """The same by passage."""
    picks = [[Pick((at,)) for at in range(min(every, len(one.tokens) - 1), len(one.tokens), every)] for one in passages]
    return explain_passages(nla, list(zip(passages, picks, strict=True)), Options())


def kept_passages(nla: Explainer, passages: Sequence[Passage], every: int, path: Path) -> Explanations:
    """`explained_passages`, kept in a file of results passage by passage: run again, it goes on behind the last one.

    Raises UserError where the file is of another pair or of other passages.
    """
    read = [[passage.name, passage.ids] for passage in passages]
    results = Results(path, {"audit": [nla.identity, nla.max_new_tokens, every, read]})
    for passage in passages:
        check_length(passage)
    with progress(len(passages), "audit", unit="text", start=results.done) as bar:
        for passage in passages[results.done :]:
            (found,) = explain_every(nla, [passage], every)
            results.add({"id": passage.name, "tokens": [row.row() for row in found]}, ())
            bar.advance()
    return gathered(passages, [[Explained(**row) for row in line["tokens"]] for _, line in read_json_lines(path)])


def gathered(passages: Sequence[Passage], explained: Sequence[Sequence[Explained]]) -> Explanations:
    """The explained tokens of passages, as `explain_passages` gives them."""
    names, rows, texts = [], [], []
    for passage, some in zip(passages, explained, strict=True):
        for row in some:
            names.append(passage.name)
            rows.append(row)
            texts.append(passage.shown(0, (row.position or 0) + 1))
    if not rows:
        raise UserError("nothing was explained; there is nothing to audit")
    return Explanations(names, rows, texts)


def check_several(names: Iterable[str]) -> None:
    """Raises UserError where all explanations are of one text: there is no other text's to hold them against."""
    if len(set(names)) < 2:
        raise UserError("--placebo: takes explanations of other texts; there is only one text: give at least two")


def permuted(found: Explanations, seed: int) -> list[str]:
    """For every explanation one of another text: exchanged, or drawn where the numbers of texts do not allow it.

    Raises UserError where there is one text.
    """
    check_several(found.names)
    names, rng = np.array(found.names), np.random.default_rng(seed)
    order = mismatched(names, seed)
    for row in np.flatnonzero(names[order] == names):
        order[row] = rng.choice(np.flatnonzero(names != names[row]))
    return [found.rows[index].explanation for index in order]


def audit(
    found: Explanations,
    terms: Mapping[str, re.Pattern[str]],
    placebos: Mapping[str, Sequence[str]] | None = None,
) -> AuditReport:
    """`placebos`: name -> an explanation for every row of `found`, which has nothing to do with it."""
    placebos = placebos or {}
    texts = [row.explanation for row in found.rows]
    seen = [content_words(text) for text in found.texts]
    wanted = [_term(term, pattern, found, placebos) for term, pattern in terms.items()]
    recurring = Counter(word for said, known in zip(found.words, seen, strict=True) for word in said - known)
    fake = {
        name: Counter(word for text, known in zip(some, seen, strict=True) for word in content_words(text) - known)
        for name, some in placebos.items()
    }
    lists: list[dict[str, Any]] = [
        {"word": word, "explanations": count, "placebos": {name: counts[word] for name, counts in fake.items()}}
        for word, count in recurring.items()
    ]
    lists.sort(key=lambda one: -(one["explanations"] - max(one["placebos"].values(), default=0)))
    return AuditReport(
        num_texts=len(set(found.names)),
        num_explanations=len(texts),
        terms=tuple(wanted),
        unsaid_share=_unsaid_share(texts, seen),
        unsaid_placebos={name: _unsaid_share(some, seen) for name, some in placebos.items()},
        recurring=tuple(lists[:_MOST_WORDS]),
        explanations=tuple(
            Place(name, row.position or 0, row.token, row.explanation, False)
            for name, row in zip(found.names, found.rows, strict=True)
        ),
    )


def _unsaid_share(texts: Sequence[str], seen: Sequence[set[str]]) -> float:
    """Mean over explanations of the share of their content words that the text does not have; 0 for empty ones."""
    shares = [
        len(said - known) / len(said) if (said := content_words(text)) else 0.0
        for text, known in zip(texts, seen, strict=True)
    ]
    return float(np.mean(shares))


def _term(term: str, pattern: re.Pattern[str], found: Explanations, placebos: Mapping[str, Sequence[str]]) -> Term:
    in_text = [pattern.search(text) is not None for text in found.texts]
    first: dict[str, int] = {}
    for name, row, said in zip(found.names, found.rows, in_text, strict=True):
        if said:
            first.setdefault(name, row.position or 0)
    places = [
        Place(name, row.position or 0, row.token, row.explanation, said)
        for name, row, said in zip(found.names, found.rows, in_text, strict=True)
        if pattern.search(row.explanation)
    ]
    count, unsaid = len(found.rows), sum(not place.in_text for place in places)
    matches = {name: [pattern.search(text) is not None for text in some] for name, some in placebos.items()}
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
            name: float(np.mean([hit and not said for hit, said in zip(hits, in_text, strict=True)]))
            for name, hits in matches.items()
        },
        difference=len(places) / count - max(shares.values()) if shares else None,
        places=tuple(places),
        first_said=first,
    )
