"""The class `Explainer`: turns activations into explanations and back, and holds the subject. Other modules use it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from nlae_jax.assets import WARMSTART_PASSAGES
from nlae_jax.data.corpus import read_json_lines
from nlae_jax.evaluate.reconstruction import direction_mse
from nlae_jax.explore.passage import Passage, read_text
from nlae_jax.explore.statistics import Statistics, statistics_of
from nlae_jax.interop.adapt import Adapter
from nlae_jax.lm.sampling import check_seed, check_temperature
from nlae_jax.lm.tokens import check_ids, pad, padded_width
from nlae_jax.roles.direction import UNUSABLE, unusable_rows
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.pair import Pair, Roles, parameter_sums
from nlae_jax.roles.protocol import CLOSING, OPENING, Protocol, check_prompts, decoder_ids
from nlae_jax.roles.roundtrip import RoundTrip
from nlae_jax.runtime.arrays import as_float32
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import local_path
from nlae_jax.runtime.outside import check_count, quoted
from nlae_jax.runtime.progress import progress

_SMALLEST_BATCH, LARGEST_BATCH = 8, 64  # rows: a token costs little more for 64 rows than for 8
_BATCH_TOKENS = 1024  # the subject reads at most this many tokens at once
_TEXTS, _TEXT_TOKENS = 64, 64  # texts, and tokens of each, that a pair's statistics are made from if it has none
_MOST_NEW_TOKENS = 1 << 16  # of an explanation: its keys and values are stored from the start
MOST_CHARACTERS = 8192  # of an explanation: the decoder reads it in one piece
MAX_TOKENS = 2048  # of one passage: the subject reads it in one piece, and attention grows with the square


class Written(NamedTuple):
    """An explanation. If `closed` is False, the encoder did not end the explanation, and the text is incomplete."""

    text: str
    closed: bool


class Explainer:
    """A trained encoder and decoder, and the subject they read."""

    def __init__(
        self,
        roles: Roles,
        pair: Pair,
        tokenizer: Any,
        subject: Callable[[], LanguageModel],
        max_new_tokens: int = 200,
        mesh: Mesh | None = None,
        statistics: Callable[[Explainer], Statistics] | None = None,
        name: str = "pair",
        run_texts: Callable[[int], Sequence[Sequence[int]]] = lambda count: (),
        subject_name: str = "subject",
        adapter: Adapter | None = None,
        reader: Any = None,
        base_name: str = "",
    ) -> None:
        """Takes a loaded pair. Raises UserError where its prompts hold tokens that its models do not have.

        `subject` loads the subject at its first use. `mesh` is the mesh that the pair's parameters are on; batches are
        split over it. `statistics` makes the statistics of the pair's training data at their first use; without it they
        are made from texts of the package. `name` and `subject_name` name the pair and its subject in pages and
        reports. `run_texts(count)` returns the token ids of texts that the pair was trained on, if there are any.
        `adapter` maps the subject's activations to those that the pair reads; `reader` is then the subject's tokenizer.
        `base_name` is the model whose activations the decoder rebuilds, if it is not the subject.
        """
        self.layer, self.tokenizer, self.max_new_tokens, self.name = (
            roles.decoder.layer if adapter is None else adapter.layer,
            tokenizer if reader is None else reader,
            max_new_tokens,
            name,
        )
        self.adapter, self._pair_tokenizer = adapter, tokenizer
        self._roles, self._pair, self._make_subject, self._mesh = roles, pair, subject, mesh
        self._make_statistics, self.run_texts, self.subject_name = statistics, run_texts, subject_name
        self._base_name = base_name or subject_name
        for role in (roles.encoder, roles.decoder):
            check_prompts(role.protocol, tokenizer, role.arch.vocab_size)

    @cached_property
    def subject(self) -> LanguageModel:
        """The model whose activations are explained, loaded at its first use."""
        return self._make_subject()

    @cached_property
    def _trip(self) -> RoundTrip:
        """The pair's compiled functions, for explanations of any length."""
        return RoundTrip(
            self._roles, self._pair_tokenizer, LARGEST_BATCH, self.max_new_tokens, self._mesh, _SMALLEST_BATCH
        )

    def explain(self, vectors: Any, temperature: float = 0.0, max_new_tokens: int = 150, seed: int = 0) -> list[str]:
        """Writes one explanation of each raw activation [B, d]; '' if the encoder did not close the explanation.

        `vectors` is an array of numpy, JAX or PyTorch, of any dtype and on any device, or a list of such rows. A
        `temperature` of 0 takes the likeliest token at each step. Raises UserError for vectors of another width, and
        for vectors with NaN or infinity.
        """
        vectors = self._checked(vectors)
        check_temperature(temperature)
        check_seed(seed)
        self._checked_limit(max_new_tokens)
        with progress(len(vectors), "explain", unit="activation") as bar:
            return self._trip.explain(self._pair, vectors, seed, temperature, bar.advance, max_new_tokens).texts

    def reconstruct(self, texts: Sequence[str]) -> np.ndarray:
        """Rebuilds activations [B, d] float32 from explanations: the raw output of the decoder's head.

        Raises UserError for a text that is too long, or with a token that the decoder has no embedding for.
        """
        if isinstance(texts, str):
            raise UserError("texts: should be a list of explanations; it is one text")
        if not len(texts):
            return np.zeros((0, self.d_model), np.float32)
        for number, text in enumerate(texts):
            check_explanation(text, f"text {number}")
            ids = decoder_ids(self._pair_tokenizer, self._roles.decoder.protocol, text)
            check_ids(ids, self._roles.decoder.arch.vocab_size, self._pair_tokenizer, f"text {number}")
        return self._trip.reconstruct_texts(self._pair, texts)

    def rebuild(self, texts: Sequence[str]) -> np.ndarray:
        """Does what `reconstruct` does, but leaves out tokens without an embedding. Use it for texts of the encoder.

        A sampled text may spell such a token, because it was sampled piece by piece.
        """
        return self._trip.reconstruct_texts(self._pair, texts)

    def score(self, texts: Sequence[str], vectors: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns (mse, cos), each [B]: how well each text rebuilds its vector's direction; mse = 2 (1 - cos).

        An empty text has mse 2. Raises UserError for a text with a token that the decoder has no embedding for, and if
        the numbers of texts and vectors differ.
        """
        if isinstance(texts, str):
            raise UserError("texts: should be a list of explanations; it is one text")
        if not len(texts):
            return np.zeros(0), np.zeros(0)
        vectors = self._checked(vectors)
        if len(texts) != len(vectors):
            raise UserError(f"score: {len(texts)} texts for {len(vectors)} vectors; there should be one each")
        return _scores(self.reconstruct(texts), vectors, texts)

    def score_written(self, texts: Sequence[str], vectors_BxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Does what `score` does for texts of the encoder, see `rebuild`."""
        return _scores(self.rebuild(texts), vectors_BxD, texts)

    def write(
        self, vectors: Any, temperature: float = 0.0, max_new_tokens: int | None = None, seed: int = 0
    ) -> list[Written]:
        """Writes one explanation of each raw activation [B, d], also if the encoder did not end the explanation."""
        vectors = self._checked(vectors)
        limit = self._checked_limit(self.max_new_tokens if max_new_tokens is None else max_new_tokens)
        check_temperature(temperature)
        check_seed(seed)
        with progress(len(vectors), "explain", unit="activation") as bar:
            sampled = self._trip.explain(self._pair, vectors, seed, temperature, bar.advance, limit)
        return [_written(response) for response in sampled.responses]

    def read(self, passages: Sequence[Passage]) -> list[np.ndarray]:
        """Reads the activations [T, d] float32 of every token of each passage, in common batches.

        Raises UserError for a passage of more than `MAX_TOKENS` tokens.
        """
        for passage in passages:
            check_length(passage)
        residual = lambda ids, mask: self.subject.residual(ids, self.layer, mask=mask)  # noqa: E731
        activations = read_batches([passage.ids for passage in passages], residual)
        return [self.mapped(rows) for rows in activations]

    @property
    def width_read(self) -> int:
        """The width of the subject's activations. It differs from `d_model` only for an adapted pair."""
        return self.d_model if self.adapter is None else len(self.adapter.matrix)

    def mapped(self, h_NxD: np.ndarray) -> np.ndarray:
        """Maps activations [N, width_read] of the subject to those that the pair explains, [N, d_model]."""
        return h_NxD if self.adapter is None else self.adapter(h_NxD)

    def check_own_subject(self, command: str) -> None:
        """Raises UserError if the pair is adapted: it was trained for another model than its subject."""
        if self.adapter is not None:
            raise UserError(f"{command}: {self.name} is a map to another model's pair, which explains activations only")

    @cached_property
    def statistics(self) -> Statistics:
        """The statistics of the pair's activations, made at their first use."""
        if self._make_statistics is None:
            return package_statistics(self)
        return self._make_statistics(self)

    def description(self) -> dict[str, Any]:
        """Returns the pair's name, layer and the statistics that its scores are compared with, as JSON has them."""
        statistics = self.statistics
        return {
            "name": self.name,
            "layer": self.layer,
            "variance": statistics.variance,
            "usual_norms": [statistics.norm_low, statistics.norm_high],
            "statistics_of": statistics.source,
            "relative_mse_is": "mse / variance: 0 is perfect, 1 no better than predicting the data's mean direction",
        }

    @property
    def rebuilds(self) -> tuple[str, int]:
        """The model and block whose activations the decoder rebuilds. An adapted pair's subject is another model."""
        path = local_path(self._base_name, "model")
        return (str(path.resolve()) if path.exists() else self._base_name), self._roles.decoder.layer

    @cached_property
    def identity(self) -> str:
        """A text that identifies the pair, its subject and its map by their parameters, not by their paths."""
        adapter = self.adapter
        arrays = None if adapter is None else (adapter.matrix, adapter.mean, adapter.target_mean)
        sums = parameter_sums((self._pair, self.subject.params, arrays))
        return repr((sums, self.layer, self._roles.decoder.layer, self.protocol.to_json()))

    @property
    def roles(self) -> Roles:
        """The two modules."""
        return self._roles

    @property
    def pair(self) -> Pair:
        """The parameters of both roles."""
        return self._pair

    @property
    def d_model(self) -> int:
        """The width of the activations that the pair explains."""
        return self._roles.encoder.arch.d_model

    @property
    def protocol(self) -> Protocol:
        """Prompts, slot and scale of the pair."""
        return self._roles.encoder.protocol

    def _checked_limit(self, max_new_tokens: int) -> int:
        """Raises UserError where the closing tag does not fit into the limit."""
        check_count("max_new_tokens", max_new_tokens, 1, _MOST_NEW_TOKENS)
        if max_new_tokens <= (least := len(self.protocol.closing)):
            raise UserError(f"max_new_tokens: {max_new_tokens} should be more than the {least} of the closing tag")
        return max_new_tokens

    def _checked(self, vectors: Any) -> np.ndarray:
        """Returns vectors as [B, d] float32. Raises UserError for another shape, and for NaN or infinity."""
        vectors = as_float32(vectors, "vectors")
        if vectors.ndim != 2 or vectors.shape[1] != self.d_model:
            raise UserError(f"vectors: shape {vectors.shape} should be [number, {self.d_model}]")
        if not len(vectors):
            raise UserError("vectors: none given; there should be at least one")
        if (rows := unusable_rows(vectors)).size:
            raise UserError(f"vectors: row {rows[0]}: {UNUSABLE}")
        return vectors


def check_length(passage: Passage, more: int = 0) -> None:
    """Raises UserError where a passage, with `more` tokens after it, exceeds `MAX_TOKENS`."""
    if len(passage.tokens) + more > MAX_TOKENS:
        following = f" and {more} are to follow" if more else ""
        raise UserError(
            f"{passage.name}: {len(passage.tokens)} tokens{following}; at most {MAX_TOKENS} are explained at once: cut "
            "it into parts"
        )


def check_explanation(text: Any, name: str) -> None:
    """Raises UserError where an explanation from outside is no text, or too long for the decoder to read in one piece.

    `name` names it in the message.
    """
    if not isinstance(text, str):
        raise UserError(f"{name}: should be a text; it is {quoted(text)}")
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{name}: an explanation of {len(text)} characters; at most {MOST_CHARACTERS} are read")


def _scores(rebuilt_NxD: np.ndarray, h_NxD: np.ndarray, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (mse, cos), each [N]. An empty text counts as an orthogonal reconstruction."""
    mse_N = direction_mse(rebuilt_NxD, h_NxD, np.array([bool(text.strip()) for text in texts]))
    return mse_N, 1 - mse_N / 2


def _written(response: str) -> Written:
    """Returns the explanation in a sampled response that begins with the opening tag."""
    text, closing, _ = response.removeprefix(OPENING).partition(CLOSING)
    if not closing:  # the response may have been cut within the closing tag
        cut_tag = next((n for n in range(len(CLOSING) - 1, 0, -1) if text.endswith(CLOSING[:n])), 0)
        text = text[: len(text) - cut_tag]
    return Written(text.strip(), bool(closing))


def read_batches(sequences: Sequence[Sequence[int]], read: Callable[[np.ndarray, np.ndarray], Any]) -> list[np.ndarray]:
    """Applies `read(ids, mask)` -> [B, T, ...] to token sequences, in batches of few shapes.

    Returns one array [length, ...] for each sequence.
    """
    results: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    while order:
        width = padded_width(len(sequences[order[-1]]))
        rows = 1 << max(0, min(_BATCH_TOKENS // width, len(order)).bit_length() - 1)
        batch, order = order[-rows:], order[:-rows]
        ids, length = pad([sequences[index] for index in batch], width)
        result = np.asarray(read(ids, np.arange(width) < length[:, None]))
        for index, row, count in zip(batch, result, length, strict=True):
            results[index] = row[:count]
    return results


def package_statistics(pair: Explainer) -> Statistics:
    """Computes statistics on texts of the package, for a pair whose training data are unknown."""
    arch = pair.subject.arch
    passages = [read_text(pair.tokenizer, arch.vocab_size, text, "passage") for text in package_texts(_TEXTS)]
    cut = [dataclasses.replace(passage, tokens=passage.tokens[: arch.within(_TEXT_TOKENS)]) for passage in passages]
    h_NxD = np.concatenate([h[1:] for h in pair.read(cut)])
    return statistics_of(h_NxD, f"{len(h_NxD):,} tokens of texts that come with the package")


def package_texts(count: int) -> list[str]:
    """Returns the first `count` passages that the package carries."""
    rows = itertools.islice(read_json_lines(WARMSTART_PASSAGES), count)
    return [row["text"] for _, row in rows]
