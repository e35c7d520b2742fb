"""Two pairs, or two checkpoints of one, on the same tokens."""

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
    "the pairs read different blocks: what one says and the other does not is no change from block to block; "
    "differences of blocks do not verbalise"
)
BASES_DIFFER = "the pairs rebuild activations of different models: their reconstructions have no cosine"
SUBJECTS_DIFFER = "the pairs read different models: scores are of each one's own activations"


@dataclasses.dataclass(frozen=True)
class Compared:
    """One selected token as both pairs explain it.

    `overlap`: shared content words / content words of either. `reconstruction_cos`: the cosine of what the two decoders
    rebuild, where that is the same block of the same model; else None.
    """

    a: Explained
    b: Explained
    overlap: float
    reconstruction_cos: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`names` and `layers` of the two pairs, `tokens` in the order of selection, and what to keep in mind."""

    names: tuple[str, str]
    layers: tuple[int, int]
    tokens: tuple[Compared, ...]
    mean_mse: tuple[float, float]
    mean_relative_mse: tuple[float, float]
    notes: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """As JSON has it."""
        tokens = [{**dataclasses.asdict(one), "a": one.a.row(), "b": one.b.row()} for one in self.tokens]
        return {**dataclasses.asdict(self), "tokens": tokens}

    def to_frame(self) -> Any:
        """One row a token as a pandas data frame."""
        rows = [
            {"position": one.a.position, "token": one.a.token, "overlap": one.overlap}
            | {f"{name}_{side}": value for side in "ab" for name, value in getattr(one, side).row().items()}
            for one in self.tokens
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
    """A text, or a chat's messages, explained by both. Raises UserError where they read it as different tokens."""
    pairs = (first, second)
    passages = [read_passage(nla.tokenizer, nla.subject.arch.vocab_size, source) for nla in pairs]
    cut = [[token.text for token in passage.tokens] for passage in passages]
    if cut[0] != cut[1]:
        raise UserError("compare: the two pairs' tokenizers cut the text differently; there is nothing side by side")
    found = []
    for nla, passage in zip(pairs, passages, strict=True):
        (rows,) = explain_passages(nla, [(passage, picks_of(passage, positions, match, span))], options or Options())
        found.append(rows)
    (base, layer), (other_base, other_layer) = first.rebuilds, second.rebuilds
    same = (base, layer, first.d_model) == (other_base, other_layer, second.d_model)
    read_alike = first.subject.arch == second.subject.arch
    cos = [None] * len(found[0])
    if same:
        both = zip(pairs, found, strict=True)
        rebuilt = [nla.rebuild([row.explanation for row in rows]) for nla, rows in both]
        cos = cosine(*rebuilt).tolist()
    tokens = tuple(
        Compared(a, b, overlap(content_words(a.explanation), content_words(b.explanation)), c)
        for a, b, c in zip(found[0], found[1], cos, strict=True)
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
        (_mean(found[0], "mse"), _mean(found[1], "mse")),
        (_mean(found[0], "relative_mse"), _mean(found[1], "relative_mse")),
        tuple(notes),
    )


def _mean(rows: Sequence[Explained], name: str) -> float:
    return float(np.mean([getattr(row, name) for row in rows]))
