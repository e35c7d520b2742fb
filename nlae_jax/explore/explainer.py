"""A pair at work: activations to words and back, and the subject that it reads. What everything else here asks."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from nlae_jax.assets import WARMSTART_PASSAGES
from nlae_jax.data.corpus import read_json_lines
from nlae_jax.evaluate.reconstruction import direction_mse
from nlae_jax.explore.passage import Passage, read_text
from nlae_jax.explore.statistics import Statistics, statistics_of
from nlae_jax.interop.adapt import Adapter
from nlae_jax.lm.tokens import check_ids, pad
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.pair import Pair, Roles, parameter_sums
from nlae_jax.roles.protocol import CLOSING, OPENING, Protocol, check_prompts, decoder_ids
from nlae_jax.roles.roundtrip import RoundTrip
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import local_path
from nlae_jax.runtime.progress import progress

_SMALLEST_BATCH, LARGEST_BATCH = 8, 64  # rows: a token costs little more for 64 of them than for 8
_BATCH_TOKENS = 1024  # that the subject reads at once
_WIDTH = 64  # passages are padded to multiples of it: one compilation each
_TEXTS, _TEXT_TOKENS = 64, 64  # that the statistics of a pair are made from, where it brings none
MAX_TOKENS = 2048  # of one passage: the subject reads it in one piece, and attention grows with its square


class Written(NamedTuple):
    """An explanation as far as it goes. `closed`: the encoder ended it by itself."""

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
        """`mesh`: that the pair's parameters are on, to split batches over.

        `statistics`: makes those of the pair's training data when they are first asked for; where there is no such
        function, they are made from the texts that come with the package. `name`, `subject_name`: what pages and
        reports call the pair and its subject. `run_texts(count)`: token ids of so many texts that the pair was trained
        on, where those are at hand. `adapter`: maps the subject's activations into those that the pair reads; `reader`
        is then the tokenizer of the subject, which is another model's. `base_name`: the model whose activations the
        decoder rebuilds, if not the subject.
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
        """The model whose activations are explained, loaded when first asked for."""
        return self._make_subject()

    @cached_property
    def _trip(self) -> RoundTrip:
        """The pair's compiled functions, for explanations of any length."""
        return RoundTrip(
            self._roles, self._pair_tokenizer, LARGEST_BATCH, self.max_new_tokens, self._mesh, _SMALLEST_BATCH
        )

    def explain(self, vectors: Any, temperature: float = 0.0, max_new_tokens: int = 150, seed: int = 0) -> list[str]:
        """[B, d] raw activations -> one explanation each; '' where the encoder did not close its tag.

        `vectors` is an array of numpy, JAX or PyTorch, of any dtype and on any device, or a list of such rows.
        """
        vectors = self._checked(vectors)
        self._checked_limit(max_new_tokens)
        check_temperature(temperature)
        with progress(len(vectors), "explain", unit="activation") as bar:
            return self._trip.explain(self._pair, vectors, seed, temperature, bar.advance, max_new_tokens).texts

    def reconstruct(self, texts: Sequence[str]) -> np.ndarray:
        """Explanations -> activations [B, d] float32, raw as the decoder's head gives them."""
        if isinstance(texts, str):
            raise UserError("texts: should be a list of explanations; it is one text")
        if not len(texts):
            return np.zeros((0, self.d_model), np.float32)
        for number, text in enumerate(texts):
            ids = decoder_ids(self._pair_tokenizer, self._roles.decoder.protocol, text)
            check_ids(ids, self._roles.decoder.arch.vocab_size, self._pair_tokenizer, f"text {number}")
        return self._trip.reconstruct_texts(self._pair, texts)

    def rebuild(self, texts: Sequence[str]) -> np.ndarray:
        """`reconstruct` of what the encoder wrote: pieces that spell a token without an embedding are left out."""
        return self._trip.reconstruct_texts(self._pair, texts)

    def score(self, texts: Sequence[str], vectors: Any) -> tuple[np.ndarray, np.ndarray]:
        """(mse, cos), each [B]: how well each text rebuilds its vector's direction; mse = 2 (1 - cos)."""
        if not len(texts):
            return np.zeros(0), np.zeros(0)
        vectors = self._checked(vectors)
        if len(texts) != len(vectors):
            raise UserError(f"score: {len(texts)} texts for {len(vectors)} vectors; there should be one each")
        return _scores(self.reconstruct(texts), vectors, texts)

    def score_written(self, texts: Sequence[str], vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same of texts that the encoder wrote."""
        return _scores(self.rebuild(texts), vectors, texts)

    def write(
        self, vectors: Any, temperature: float = 0.0, max_new_tokens: int | None = None, seed: int = 0
    ) -> list[Written]:
        """[B, d] raw activations -> one explanation each, as far as it goes where the encoder did not end it."""
        vectors = self._checked(vectors)
        limit = self._checked_limit(self.max_new_tokens if max_new_tokens is None else max_new_tokens)
        check_temperature(temperature)
        with progress(len(vectors), "explain", unit="activation") as bar:
            found = self._trip.explain(self._pair, vectors, seed, temperature, bar.advance, limit)
        return [_written(response) for response in found.responses]

    def read(self, passages: Sequence[Passage]) -> list[np.ndarray]:
        """The activations of every token of every passage, [T, d] float32 each, read together.

        Raises UserError for a passage of more than `MAX_TOKENS` tokens.
        """
        for passage in passages:
            check_length(passage)
        residual = lambda ids, mask: self.subject.residual(ids, self.layer, mask=mask)  # noqa: E731
        read = read_batches([passage.ids for passage in passages], residual)
        return [self.mapped(rows) for rows in read]

    @property
    def width_read(self) -> int:
        """Of the activations that are explained: `d_model`, but for a pair behind a map from another model."""
        return self.d_model if self.adapter is None else len(self.adapter.matrix)

    def mapped(self, h_NxD: np.ndarray) -> np.ndarray:
        """Activations [N, width_read] of the model that is read -> those that the pair explains, [N, d_model]."""
        return h_NxD if self.adapter is None else self.adapter(h_NxD)

    def check_own_subject(self, what: str) -> None:
        """Raises UserError where the pair was made for another model than the one that it reads."""
        if self.adapter is not None:
            raise UserError(f"{what}: {self.name} is a map to another model's pair, which explains activations only")

    @cached_property
    def statistics(self) -> Statistics:
        """What the pair's activations are like as a whole, made when first asked for."""
        if self._make_statistics is None:
            return package_statistics(self)
        return self._make_statistics(self)

    def description(self) -> dict[str, Any]:
        """What scores of this pair are held against, as JSON has it."""
        known = self.statistics
        return {
            "name": self.name,
            "layer": self.layer,
            "variance": known.variance,
            "usual_norms": [known.norm_low, known.norm_high],
            "statistics_of": known.source,
            "relative_mse_is": "mse / variance: 0 is perfect, 1 no better than predicting the data's mean direction",
        }

    @property
    def rebuilds(self) -> tuple[str, int]:
        """The model and its block whose activations the decoder rebuilds: behind a map, not those that are read."""
        path = local_path(self._base_name, "model")
        return (str(path.resolve()) if path.exists() else self._base_name), self._roles.decoder.layer

    @cached_property
    def identity(self) -> str:
        """What tells the pair, its subject and its map from any others, wherever their files are."""
        adapter = self.adapter
        arrays = None if adapter is None else (adapter.matrix, adapter.mean, adapter.target_mean)
        sums = parameter_sums((self._pair, self.subject.params, arrays))
        return repr((sums, self.layer, self._roles.decoder.layer, self.protocol.to_json()))

    @property
    def roles(self) -> Roles:
        return self._roles

    @property
    def pair(self) -> Pair:
        return self._pair

    @property
    def d_model(self) -> int:
        return self._roles.encoder.arch.d_model

    @property
    def protocol(self) -> Protocol:
        """Prompts, slot and scale of the pair."""
        return self._roles.encoder.protocol

    def _checked_limit(self, max_new_tokens: int) -> int:
        if max_new_tokens <= (least := len(self.protocol.closing)):
            raise UserError(f"max_new_tokens: {max_new_tokens} should be more than the {least} of the closing tag")
        return max_new_tokens

    def _checked(self, vectors: Any) -> np.ndarray:
        vectors = _as_float32(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self.d_model:
            raise UserError(f"vectors: shape {vectors.shape} should be [number, {self.d_model}]")
        if not len(vectors):
            raise UserError("vectors: none given; there should be at least one")
        if not np.isfinite(vectors).all():
            raise UserError("vectors: NaN or infinity among them")
        return vectors


def check_temperature(value: float) -> None:
    """Raises UserError where tokens cannot be drawn at it; below 0 the least likely ones would be the likeliest."""
    if not 0 <= value < math.inf:
        raise UserError(f"temperature: {value} should be 0 or more")


def check_length(passage: Passage, more: int = 0) -> None:
    """Raises UserError where a passage, with so many tokens `more`, is longer than the subject is asked to read."""
    if len(passage.tokens) + more > MAX_TOKENS:
        following = f" and {more} are to follow" if more else ""
        raise UserError(
            f"{passage.name}: {len(passage.tokens)} tokens{following}; at most {MAX_TOKENS} are explained at once: cut "
            "it into parts"
        )


def _as_float32(vectors: Any) -> np.ndarray:
    """Any library's array, or a list of them, as float32. Raises UserError where it is not one of numbers."""
    if isinstance(vectors, list | tuple) and any(hasattr(row, "detach") for row in vectors):
        vectors = [_as_float32(row) for row in vectors]
    try:
        if hasattr(vectors, "detach"):  # PyTorch's: maybe on another device, part of a graph, of a dtype numpy lacks
            vectors = vectors.detach().cpu().to_dense()
            vectors = (vectors.float() if vectors.is_floating_point() else vectors).numpy()
        host = np.asarray(jax.device_get(vectors))
        if host.dtype.kind in "cOSUmMb":  # complex numbers would lose a part, without a word
            raise TypeError(f"it is {host.dtype}")
        with np.errstate(over="ignore"):
            return host.astype(np.float32, copy=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"vectors: should be an array of numbers ({error})") from None


def _scores(rebuilt: np.ndarray, vectors: np.ndarray, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(mse, cos); a text that says nothing rebuilds nothing."""
    mse = direction_mse(rebuilt, vectors, np.array([bool(text.strip()) for text in texts]))
    return mse, 1 - mse / 2


def _written(response: str) -> Written:
    """The explanation in a sampled response, opening tag included."""
    text, closing, _ = response.removeprefix(OPENING).partition(CLOSING)
    if not closing:  # cut within the tag, it may be
        begun = next((n for n in range(len(CLOSING) - 1, 0, -1) if text.endswith(CLOSING[:n])), 0)
        text = text[: len(text) - begun]
    return Written(text.strip(), bool(closing))


def read_batches(sequences: Sequence[Sequence[int]], read: Callable[[np.ndarray, np.ndarray], Any]) -> list[np.ndarray]:
    """`read(ids, mask)` [B, T, ...] of token sequences, in batches of few shapes: one array [length, ...] for each."""
    found: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    while order:
        width = -(-len(sequences[order[-1]]) // _WIDTH) * _WIDTH
        rows = 1 << max(0, min(_BATCH_TOKENS // width, len(order)).bit_length() - 1)
        batch, order = order[-rows:], order[:-rows]
        ids, length = pad([sequences[index] for index in batch], width)
        result = np.asarray(read(ids, np.arange(width) < length[:, None]))
        for index, row, count in zip(batch, result, length, strict=True):
            found[index] = row[:count]
    return found


def package_statistics(pair: Explainer) -> Statistics:
    """Of texts that come with the package, where nothing is known of those that the pair was trained on."""
    passages = [
        read_text(pair.tokenizer, pair.subject.arch.vocab_size, text, "passage") for text in package_texts(_TEXTS)
    ]
    cut = [dataclasses.replace(passage, tokens=passage.tokens[:_TEXT_TOKENS]) for passage in passages]
    h_NxD = np.concatenate([h[1:] for h in pair.read(cut)])
    return statistics_of(h_NxD, f"{len(h_NxD):,} tokens of texts that come with the package")


def package_texts(count: int) -> list[str]:
    """The first passages that the package carries."""
    rows = itertools.islice(read_json_lines(WARMSTART_PASSAGES), count)
    return [row["text"] for _, row in rows]
