"""Explains selected activations, with the scores and warnings that a reader needs to judge an explanation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nlae_jax.data.english import FUNCTION_WORDS
from nlae_jax.evaluate.wording import has_repeated_item, has_repeated_sentence, words
from nlae_jax.explore.explainer import Explainer
from nlae_jax.explore.frames import frame
from nlae_jax.explore.passage import Passage, Token
from nlae_jax.explore.select import Pick
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import check_count


@dataclasses.dataclass(frozen=True)
class Sample:
    """One of several explanations of the same activation, with its scores."""

    explanation: str
    cos: float
    mse: float
    cut: bool


@dataclasses.dataclass(frozen=True)
class Explained:
    """One explained activation.

    - `position`, `token`: the token's position and text; for a span, its last position and its text; for a vector
      without a text, None and "";
    - `explanation`: the explanation, incomplete if `cut` is True; with several `samples`, the sample that shares most
      words with the other samples;
    - `cos`, `mse`: how well the decoder rebuilds the activation's direction from the explanation; mse = 2 (1 − cos);
    - `relative_mse`: mse / variance of the pair's data (`Statistics.variance`): 0 perfect, 1 no better than the mean;
    - `norm`: ‖h‖; `outside`: "position 0" or "norm" if the pair was not trained on such activations, else "";
    - `cut`: the encoder did not end the explanation within the limit; `repeated`: it repeats an item in a list or a
      sentence;
    - `agreement`: with several samples, the mean over pairs of samples of shared content words / all content words of
      the pair, 0 to 1; `consensus`: the content words that more than half of the samples have;
    - `span`: the positions that were averaged, `(first, last)`; None for a single token;
    - `fragment_index`: of a character that several tokens make, each has the character as `token`, counted from 0;
    - `role`, `section`, `message_index`: a chat token's place (see `Token`); `generated`: whether the model wrote it.
    """

    position: int | None
    token: str
    explanation: str
    cos: float
    mse: float
    relative_mse: float
    norm: float
    outside: str = ""
    cut: bool = False
    repeated: bool = False
    samples: tuple[Sample, ...] = ()
    agreement: float | None = None
    consensus: str = ""
    span: tuple[int, int] | None = None
    fragment_index: int = 0
    role: str | None = None
    section: str | None = None
    message_index: int | None = None
    generated: bool = False

    def row(self) -> dict[str, Any]:
        """Returns the fields as JSON has them. Fields that do not apply (samples, spans, chats) are left out."""
        row = dataclasses.asdict(self)
        left_out = [name for name, default in _OPTIONAL.items() if row[name] == default]
        return {name: value for name, value in row.items() if name not in left_out}


class ExplainedRows(list[dict[str, Any]]):
    """The rows of one explained passage: a list of dicts that a notebook shows as a page."""

    def __init__(self, explained: Sequence[Explained], name: str, layer: int) -> None:
        super().__init__(explanation.row() for explanation in explained)
        self._name, self._layer = name, layer

    def to_frame(self) -> Any:
        """Returns a pandas data frame with one row per token. Raises UserError where pandas is missing."""
        return frame(self)

    def _repr_html_(self) -> str:
        from html import escape

        from nlae_jax.report.explanation_page import explanation_page

        page = escape(explanation_page([self], self._name, self._layer), quote=True)
        return f'<iframe sandbox srcdoc="{page}" style="width:100%;height:480px;border:0"></iframe>'


_OPTIONAL = {
    "samples": (),
    "agreement": None,
    "consensus": "",
    "span": None,
    "fragment_index": 0,
    "role": None,
    "section": None,
    "message_index": None,
    "generated": False,
}


def repeats(text: str) -> bool:
    """Returns whether an explanation repeats an item in a list or a sentence."""
    return has_repeated_item(text) or has_repeated_sentence(text)


def content_words(text: str) -> set[str]:
    """Returns the words of a text that are not function words."""
    return {word for word in words(text) if word not in FUNCTION_WORDS}


def agreement(texts: Sequence[str]) -> float | None:
    """Returns the mean `overlap` of the content words over all pairs of texts, 0 to 1; None for fewer than two."""
    word_sets = [content_words(text) for text in texts]
    pairs = [(i, j) for i in range(len(word_sets)) for j in range(i)]
    return sum(overlap(word_sets[i], word_sets[j]) for i, j in pairs) / len(pairs) if pairs else None


def overlap(a: set[str], b: set[str]) -> float:
    """Returns the number of common words / the number of all words (Jaccard index); 1 for two empty sets."""
    return len(a & b) / len(a | b) if a | b else 1.0


def consensus(texts: Sequence[str]) -> str:
    """Lists the content words that more than half of the texts have, each with its number of texts, largest first."""
    word_sets = [content_words(text) for text in texts]
    counts = {
        word: sum(word in word_set for word_set in word_sets)
        for word in dict.fromkeys(w for t in texts for w in words(t))
    }
    frequent = sorted((word for word in counts if counts[word] * 2 > len(texts)), key=lambda word: -counts[word])
    shown = ", ".join(f"{word} {counts[word]}/{len(texts)}" for word in frequent)
    return shown or "no content word is in more than half of the samples"


def _medoid(texts: Sequence[str]) -> int:
    """Returns the index of the text that shares most content words with the others."""
    word_sets = [content_words(text) for text in texts]
    shared = [sum(overlap(a, b) for j, b in enumerate(word_sets) if j != i) for i, a in enumerate(word_sets)]
    return int(np.argmax(shared))


@dataclasses.dataclass(frozen=True)
class Options:
    """How explanations are written.

    `samples` is the number of explanations of each activation. `temperature` is by default 0 for one sample and 1 for
    several. With several samples it must not be 0, because all samples would be equal. `max_new_tokens` is by default
    the pair's limit. Raises UserError for invalid values.
    """

    temperature: float | None = None
    max_new_tokens: int | None = None
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("samples", self.samples, 1)
        if self.samples > 1 and self.temperature == 0:
            raise UserError("temperature: 0 writes the same explanation every time; several samples need more than 0")

    @property
    def heat(self) -> float:
        """The temperature, or its default: 0 for one sample and 1 for several."""
        return (1.0 if self.samples > 1 else 0.0) if self.temperature is None else self.temperature


def explain_vectors(
    nla: Explainer, vectors_NxD: np.ndarray, options: Options, tokens: Sequence[Token | None] = ()
) -> list[Explained]:
    """Explains raw activations [N, d]. `tokens` are the tokens of the activations, if the activations have tokens."""
    repeated = np.repeat(vectors_NxD, options.samples, axis=0)
    written = nla.write(repeated, options.heat, options.max_new_tokens, options.seed)
    mse, cos = nla.score_written([text for text, _ in written], repeated)
    sampled = [
        Sample(text, float(c), float(m), not closed) for (text, closed), c, m in zip(written, cos, mse, strict=True)
    ]
    groups = [sampled[start : start + options.samples] for start in range(0, len(sampled), options.samples)]
    tokens = tokens or [None] * len(vectors_NxD)
    return [_explained(nla, h, group, token) for h, group, token in zip(vectors_NxD, groups, tokens, strict=True)]


def _explained(nla: Explainer, h_D: np.ndarray, samples: Sequence[Sample], token: Token | None) -> Explained:
    """Makes the result of one activation from its samples."""
    several = len(samples) > 1
    texts = [sample.explanation for sample in samples]
    shown = samples[_medoid(texts)] if several else samples[0]
    norm = float(np.linalg.norm(h_D))
    position = None if token is None else token.position
    return Explained(
        position=position,
        token="" if token is None else token.text,
        explanation=shown.explanation,
        cos=shown.cos,
        mse=shown.mse,
        relative_mse=nla.statistics.relative(shown.mse),
        norm=norm,
        outside=nla.statistics.outside(norm, position),
        cut=shown.cut,
        repeated=repeats(shown.explanation),
        samples=tuple(samples) if several else (),
        agreement=agreement(texts) if several else None,
        consensus=consensus(texts) if several else "",
        fragment_index=0 if token is None else token.fragment_index,
        role=None if token is None else token.role,
        section=None if token is None else token.section,
        message_index=None if token is None else token.message_index,
        generated=token is not None and token.generated,
    )


def explain_passages(
    nla: Explainer, selected: Iterable[tuple[Passage, Sequence[Pick]]], options: Options
) -> list[list[Explained]]:
    """Explains the selected tokens of several passages in common batches: one list per passage, in its picks' order.

    A span's activation is the mean of its tokens' raw activations. The span is `outside` if one of its tokens is.
    """
    selected = list(selected)
    activations = nla.read([passage for passage, _ in selected])
    picks = [
        (passage, h, pick)
        for (passage, passage_picks), h in zip(selected, activations, strict=True)
        for pick in passage_picks
    ]
    if not picks:
        return [[] for _ in selected]
    vectors = np.stack([h[list(pick.positions)].mean(0, dtype=np.float64) for _, h, pick in picks]).astype(np.float32)
    tokens = [passage.tokens[pick.last] for passage, _, pick in picks]
    explained = explain_vectors(nla, vectors, options, tokens)
    rows = iter(
        explanation if not pick.is_span else _of_span(nla, explanation, passage, h, pick)
        for explanation, (passage, h, pick) in zip(explained, picks, strict=True)
    )
    return [[next(rows) for _ in passage_picks] for _, passage_picks in selected]


def _of_span(nla: Explainer, explanation: Explained, passage: Passage, h_TxD: np.ndarray, pick: Pick) -> Explained:
    """Gives the explanation of a mean activation the span's text, positions and `outside`."""
    norms = np.linalg.norm(h_TxD, axis=-1)
    outside = next((reason for p in pick.positions if (reason := nla.statistics.outside(float(norms[p]), p))), "")
    first, last = pick.positions[0], pick.last
    shown = passage.shown(first, last + 1)
    return dataclasses.replace(explanation, token=shown, fragment_index=0, outside=outside, span=(first, last))
