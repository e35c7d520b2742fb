"""Compares two pairs, or two checkpoints of one pair, on the same tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from nlae_jax.explore.directions import cosine
from nlae_jax.explore.explain import Explained, Options, content_words, explain_passages, overlap
from nlae_jax.explore.explainer import Explainer
from nlae_jax.explore.frames import frame
from nlae_jax.explore.passage import read_passage
from nlae_jax.explore.select import picks_of
from nlae_jax.runtime.errors import UserError

LAYERS_DIFFER = (
    "the pairs read different blocks: a difference between two explanations does not show what changes from one block "
    "to the other"
)
BASES_DIFFER = "the pairs rebuild activations of different models, so a cosine of their reconstructions has no meaning"
SUBJECTS_DIFFER = "the pairs read different models, so each pair is scored on activations of its own model"


@dataclasses.dataclass(frozen=True)
class Compared:
    """One selected token as both pairs explain it.

    `overlap` is the number of content words that both explanations contain / the number that at least one contains.
    `reconstruction_cos` is the cosine of the two decoders' reconstructions, or None if the decoders do not rebuild the
    same block of the same model.
    """

    a: Explained
    b: Explained
    overlap: float
    reconstruction_cos: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The comparison of two pairs: their names and layers, the `tokens` in the order of selection, and `notes`.

    Notes say where the two pairs' results cannot be compared.
    """

    names: tuple[str, str]
    layers: tuple[int, int]
    tokens: tuple[Compared, ...]
    mean_mse: tuple[float, float]
    mean_relative_mse: tuple[float, float]
    notes: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """Returns the comparison as JSON has it."""
        tokens = [{**dataclasses.asdict(token), "a": token.a.row(), "b": token.b.row()} for token in self.tokens]
        return {**dataclasses.asdict(self), "tokens": tokens}

    def to_frame(self) -> Any:
        """Returns a pandas data frame with one row per token. Raises UserError where pandas is missing."""
        rows = [
            {"position": token.a.position, "token": token.a.token, "overlap": token.overlap}
            | {f"{name}_{side}": value for side in "ab" for name, value in getattr(token, side).row().items()}
            for token in self.tokens
        ]
        return frame(rows)

    def _repr_html_(self) -> str:
        from nlae_jax.report.audit_page import comparison_card

        return comparison_card(self.row())


def compare(
    first: Explainer,
    second: Explainer,
    source: str | Sequence[dict[str, str]],
    options: Options | None = None,
    positions: str | None = None,
    match: str | None = None,
    span: str | None = None,
) -> Comparison:
    """Explains a text, or a chat's messages, with both pairs.

    Raises UserError if the pairs' tokenizers give different tokens.
    """
    pairs = (first, second)
    passages = [read_passage(nla.tokenizer, nla.subject.arch.vocab_size, source) for nla in pairs]
    token_texts = [[token.text for token in passage.tokens] for passage in passages]
    if token_texts[0] != token_texts[1]:
        raise UserError("compare: the tokenizers split the text into different tokens; give pairs of one tokenizer")
    explained = []
    for nla, passage in zip(pairs, passages, strict=True):
        (rows,) = explain_passages(nla, [(passage, picks_of(passage, positions, match, span))], options or Options())
        explained.append(rows)
    (base, layer), (other_base, other_layer) = first.rebuilds, second.rebuilds
    same_target = (base, layer, first.d_model) == (other_base, other_layer, second.d_model)
    read_alike = first.subject.arch == second.subject.arch
    cos = [None] * len(explained[0])
    if same_target:
        with_rows = zip(pairs, explained, strict=True)
        rebuilt = [nla.rebuild([row.explanation for row in rows]) for nla, rows in with_rows]
        cos = cosine(*rebuilt).tolist()
    tokens = tuple(
        Compared(a, b, overlap(content_words(a.explanation), content_words(b.explanation)), c)
        for a, b, c in zip(explained[0], explained[1], cos, strict=True)
    )
    notes = [LAYERS_DIFFER] if layer != other_layer or (read_alike and first.layer != second.layer) else []
    if base != other_base:
        notes.append(BASES_DIFFER)
    if not read_alike:
        notes.append(SUBJECTS_DIFFER)
    return Comparison(
        (first.name, second.name),
        (first.layer, second.layer),
        tokens,
        (_mean(explained[0], "mse"), _mean(explained[1], "mse")),
        (_mean(explained[0], "relative_mse"), _mean(explained[1], "relative_mse")),
        tuple(notes),
    )


def _mean(rows: Sequence[Explained], name: str) -> float:
    """Returns the mean of a field over explained tokens."""
    return float(np.mean([getattr(row, name) for row in rows]))
