"""The class `Reader`: the server's pair and subject. It reads activations of texts and scores descriptions."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import jax
import numpy as np

from nlae_jax.explore.explainer import Explainer
from nlae_jax.explore.statistics import Statistics
from nlae_jax.interop.released import pair_path
from nlae_jax.lm.modules import apply
from nlae_jax.lm.tokens import pad, pad_left, text_ids, width_within
from nlae_jax.report.ruler import interval_of, interval_text
from nlae_jax.report.table import is_shown, number
from nlae_jax.roles.pair import Pair
from nlae_jax.roles.protocol import known_decoder_ids
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import local_path
from nlae_jax.runtime.outside import read_json
from nlae_jax.serve.programs import encoder_program, subject_program
from nlae_jax.serve.tables import CAPACITIES, SIZES, Compiled, Entry, Table, bucket, room_for

_WIDTHS = tuple(64 * 2**n for n in range(10))  # texts are padded to one of these
_SCORED = (1, 4, 16)  # the decoder reads this many descriptions at once
_PREPARED = 128  # rows of the largest table that is compiled before a request needs it: four texts of forty tokens
_READ_BYTES = 256 << 20  # of cached activations


def public_name(name: str) -> str:
    """Returns a name, or only the last part of a local path, so that clients do not learn where files are."""
    with contextlib.suppress(UserError):  # a name that cannot be a path
        if (path := local_path(name, "model")).exists():
            return path.resolve().name
    return name


def error_rates(name: str) -> dict[str, str]:
    """Reads a pair's error rates from the `eval.json` in its directory, as label -> text. {} without that file."""
    try:
        results = read_json(pair_path(name) / "eval.json")
    except (FileNotFoundError, UserError):
        return {}
    rates = {}
    if is_shown(results.get("fve")):
        interval = interval_text(interval_of(results.get("fve_ci95")), 2)
        rates["FVE (1 is perfect, 0 the mean of the data)"] = f"{number(results['fve'], 2)} {interval}".rstrip()
    if is_shown(results.get("fve_shuffled")):
        rates["with another token's explanation"] = number(results["fve_shuffled"], 2)
    if is_shown(results.get("repeated_rate")):
        rates["explanations that repeat themselves"] = f"{number(100 * results['repeated_rate'], 0)} %"
    return rates


def _advance(table: Table) -> None:
    """Advances a table twice: its second round begins with arrays as a round leaves them."""
    table.advance(1)
    table.advance(1)


def _grow(table: Table) -> None:
    table.grow(CAPACITIES[1])


def _shrink_to(size: int) -> Callable[[Table], None]:
    """Returns what keeps the first `size` rows of a table, whose holders are their numbers."""

    def shrink(table: Table) -> None:
        table.remove(lambda row: row >= size)

    return shrink


class Reader:
    """A pair and its subject, with all functions compiled for a few sizes. Only one thread may use it."""

    def __init__(self, explainer: Explainer) -> None:
        roles, pair = explainer.roles, explainer.pair
        self.name, self.subject_name = public_name(explainer.name), public_name(explainer.subject_name)
        self.rates, self.loaded_at = error_rates(explainer.name), time.time()
        explainer.check_own_subject("serve")
        self.layer, self.tokenizer, self.d_model = explainer.layer, explainer.tokenizer, explainer.d_model
        self.explainer, self.subject = explainer, explainer.subject
        self._roles, self._pair = roles, pair
        self.encoder = encoder_program(roles, pair).compiled()
        self._read: collections.OrderedDict[tuple[int, ...], np.ndarray] = collections.OrderedDict()

        def reconstruct(pair: Pair, ids: jax.Array, mask: jax.Array) -> jax.Array:
            rebuilt: jax.Array = apply(roles.decoder, pair.decoder_variables(roles), ids, mask, method="from_prompts")
            return rebuilt

        self._reconstruct = jax.jit(reconstruct)

    @cached_property
    def completer(self) -> Compiled:
        """The compiled program with which the subject writes completions."""
        shared = self.encoder.weights if self._pair.base is self.subject.params else None
        return subject_program(self.subject).compiled(shared)

    @property
    def statistics(self) -> Statistics:
        """The statistics of the pair's activations, made at their first use."""
        return self.explainer.statistics

    @property
    def vocab_size(self) -> int:
        """The number of the subject's embeddings."""
        return self.subject.arch.vocab_size

    @property
    def most_new_tokens(self) -> int:
        """The most tokens of an explanation: as many as the model can be run on after the encoder's prompt."""
        encoder = self._roles.encoder
        most = encoder.arch.most_tokens
        return min(CAPACITIES[-1], most - encoder.prompt_length) if most else CAPACITIES[-1]

    @property
    def usual_new_tokens(self) -> int:
        """The pair's own limit of an explanation, as far as the model can be run on."""
        return min(self.explainer.max_new_tokens, self.most_new_tokens)

    def table(self, limit: int) -> Table:
        """Makes an empty table for explanations of up to `limit` tokens."""
        return Table(self.encoder, room_for(limit, self.most_new_tokens))

    def warm(self) -> None:
        """Compiles the functions that a first request needs, so that it need not wait."""
        vector = self.activations(text_ids(self.tokenizer, "the text"))[-1]
        table = self.table(CAPACITIES[1])
        table.add([Entry(vector, 4, 0.0, 0)], [0])
        table.advance(4)
        self.score(["the text"], vector[None])
        _ = self.statistics
        self._example = vector

    def warm_more(self) -> Iterator[None]:
        """Compiles the functions of larger requests while there is no other work.

        A step does what tables of requests do, as far as their next operation, so that a request waits for one of them
        at most. These are: the growth to each size in groups of 16 rows, each size's rounds, the moves from each size
        to every smaller one, and the first growth of explanations. No step leaves a table in memory.
        """
        most = min(_PREPARED, self.encoder.most_rows(CAPACITIES[1]))
        sizes = [size for size in SIZES if size <= most]
        for size in sizes[1:]:
            self._prepare(size)
            yield
            self._prepare(size, _advance)
            yield
            for smaller in (smaller for smaller in sizes if smaller < size):
                self._prepare(size, _advance, _shrink_to(smaller))
                yield
        for count in _SCORED[1:]:
            self.score(["the text"] * count, np.stack([self._example] * count))
            yield
        for size in (size for size in sizes if 2 * size <= _PREPARED):  # longer rows take more memory
            self._prepare(size, _advance, _grow)
            yield
            self._prepare(size, _advance, _grow, _advance)
            yield

    def _prepare(self, size: int, *operations: Callable[[Table], None]) -> None:
        """Runs operations on a table of `size` rows of one token each, which began in groups as a request's do.

        Operations that were compiled before take little time.
        """
        table, entry = self.table(CAPACITIES[1]), Entry(self._example, 1, 0.0, 0)
        while table.size[0] < size:
            rows = range(len(table), len(table) + min(size, 16))
            table.add([entry] * len(rows), rows)
        for operation in operations:
            operation(table)

    def decoded(self, tokens: np.ndarray) -> str:
        """Decodes tokens without the end of sequence."""
        end = self._roles.encoder.protocol.eos_id
        return self.tokenizer.decode([token for token in tokens.tolist() if token != end])

    def padded(self, ids: Sequence[int], left: bool = False, room: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Pads a text to one of few widths T: ids [T] int32 and mask [T] bool.

        `room` is the number of tokens that the subject will write after it.
        """
        width = width_within(bucket(len(ids), _WIDTHS), len(ids), self.subject.arch.most_tokens, room)
        if left:
            padded, mask = pad_left([ids], width)
            return padded[0], mask[0]
        padded, length = pad([ids], width)
        return padded[0], np.arange(width) < length

    def activations(self, ids: Sequence[int]) -> np.ndarray:
        """Reads the output [T, d] float32 of block `layer` for a text. Recent results are cached."""
        key = tuple(ids)
        if key in self._read:
            self._read.move_to_end(key)
            return self._read[key]
        padded, mask = self.padded(ids)
        residual = self.subject.residual(padded[None], self.layer, mask=mask[None])
        activations = np.asarray(residual, np.float32)[0, : len(ids)]
        self._read[key] = activations
        while sum(cached.nbytes for cached in self._read.values()) > _READ_BYTES and len(self._read) > 1:
            self._read.popitem(last=False)
        return activations

    def reconstruct(self, texts: Sequence[str]) -> np.ndarray:
        """Rebuilds activations [N, d] float32 from descriptions, also empty ones. They are the head's raw output.

        Raises UserError for a description that is too long for the decoder.
        """
        protocol, vocab_size = self._roles.decoder.protocol, self._roles.decoder.arch.vocab_size
        prompts = [known_decoder_ids(self.tokenizer, protocol, text, vocab_size) for text in texts]
        width = bucket(max(map(len, prompts)), _WIDTHS)
        width = self._roles.decoder.arch.within(width)
        if width < max(map(len, prompts)):
            raise UserError(f"description: more than {width} tokens")
        most = max(1, _SCORED[-1] * 256 // width) if width > 256 else _SCORED[-1]
        parts = []
        for start in range(0, len(prompts), most):
            batch = prompts[start : start + most]
            ids, length = pad([*batch, *[batch[0]] * (bucket(len(batch), _SCORED) - len(batch))], width)
            mask = np.arange(width) < length[:, None]
            parts.append(np.asarray(self._reconstruct(self._pair, ids, mask))[: len(batch)])
        return np.concatenate(parts)

    def score(self, texts: Sequence[str], vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (mse, cos), each [N], of descriptions' reconstructions and activations [N, d]; mse = 2 (1 - cos).

        A vector of zeros has no direction: its mse is 1, its cos NaN.
        """
        rebuilt, target = self.reconstruct(texts).astype(np.float64), np.asarray(vectors, np.float64)
        norms = np.linalg.norm(rebuilt, axis=1) * np.linalg.norm(target, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            cos = np.where(norms > 0, (rebuilt * target).sum(1) / norms, np.nan)
        cos = np.clip(cos, -1.0, 1.0)
        return np.where(np.isnan(cos), 1.0, 2 * (1 - cos)), cos
