"""What the sections of the suite share: one pair's explanations and reconstructions of the rows, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from nlae_jax.data.mismatch import mismatched, of_others
from nlae_jax.evaluate.kept import Kept
from nlae_jax.evaluate.ledger import Ledger
from nlae_jax.evaluate.reconstruction import direction_mse, variances
from nlae_jax.evaluate.rows import PLACES, TEXTS_AT_A_TIME, EvaluatedRows, likeliest, shared_reads, spread
from nlae_jax.roles import direction
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.pair import Pair, Roles, parameter_sums
from nlae_jax.roles.roundtrip import Explanations, RoundTrip
from nlae_jax.runtime.files import AnyPath
from nlae_jax.runtime.progress import warn

RANKS = 12  # so many of the subject's likeliest next tokens are kept for each row
ONE_DOCUMENT = "eval: all activations are of one document; controls that need a second document are left out"


class Pairing(NamedTuple):
    """An encoder and a decoder as the suite uses them.

    `explain(vectors, seed)` samples explanations of vectors [M, d]. `reconstruct_ids(ids, length)` and
    `reconstruct_texts(texts)` return reconstructions [M, d]. `subject()` loads the subject; `layer` is its block K.
    `marker` is the character in the encoder's slot. Two pairs with the same `identity` have the same parameters and
    prompts and sample in the same way.
    """

    explain: Callable[[np.ndarray, int], Explanations]
    reconstruct_ids: Callable[[np.ndarray, np.ndarray], np.ndarray]
    reconstruct_texts: Callable[[Sequence[str]], np.ndarray]
    subject: Callable[[], LanguageModel]
    layer: int
    tokenizer: Any
    marker: str
    batch_size: int
    identity: str


def pairing_of(
    roles: Roles,
    pair: Pair,
    trip: RoundTrip,
    subject: Callable[[], LanguageModel],
    temperature: float,
    batch_size: int,
    max_new_tokens: int,
) -> Pairing:
    """Makes the `Pairing` of a trained pair. Explanations are sampled at `temperature`."""
    sums = parameter_sums((pair.encoder, pair.decoder))
    protocol = roles.encoder.protocol
    return Pairing(
        explain=lambda vectors, seed: trip.explain(pair, vectors, seed, temperature),
        reconstruct_ids=lambda ids, length: trip.reconstruct_ids(pair, ids, length),
        reconstruct_texts=lambda texts: trip.reconstruct_texts(pair, texts),
        subject=subject,
        layer=roles.decoder.layer,
        tokenizer=trip.tokenizer,
        marker=protocol.marker,
        batch_size=batch_size,
        identity=repr((sums, protocol.to_json(), temperature, max_new_tokens)),
    )


class Sizes(NamedTuple):
    """How many rows the expensive figures use. The rows are spread over documents.

    `text` rows have changed explanations and ranked next tokens, `suffix` rows the suffix test, `judged` rows a judge.
    `sampled` rows have several explanations each: `samples` explanations of the activation, explanations of the tokens
    before it, and explanations of the vectors of `reconstruction.uninformed`. With 64 sampled rows, a suite on 512
    activations writes fewer than 2,000 explanations.
    """

    text: int = 128
    sampled: int = 64
    samples: int = 10
    suffix: int = 64
    judged: int = 64


class Work:
    """One pair's work on one set of N rows. Each result is computed when it is first needed, and kept on disk.

    `name` is another one for another pair, other rows or another seed. `other` [N] gives every row a row of another
    document, for the control `permuted`. `variance` [N] is that of `reconstruction.variances`. `mean` [d] is the mean
    direction of the activations.
    """

    def __init__(
        self,
        pair: Pairing,
        rows: EvaluatedRows,
        directory: AnyPath,
        seed: int = 0,
        bootstrap_samples: int = 2000,
        sizes: Sizes = Sizes(),
    ) -> None:
        self.pair, self.rows, self.seed, self.sizes = pair, rows, seed, sizes
        self.explanations = 0  # the explanations that the results so far needed, including those of earlier runs
        settings = [pair.identity, pair.batch_size, rows.digest(), seed]
        self.name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        self.kept = Kept(directory / "evaluation" / self.name)
        self.ledger = Ledger(rows.document, bootstrap_samples, seed)
        self.other = mismatched(rows.document, seed)
        if len(np.unique(rows.document)) < 2:
            warn(ONE_DOCUMENT)
        self.variance = variances(rows.h)
        self.mean = np.asarray(direction.unit_direction(rows.h), np.float64).mean(0)

    def _seed(self, name: str, start: int) -> int:
        """Returns the sampling seed of the slice that begins at `start`. It does not depend on other slices."""
        digest = hashlib.sha256(f"{self.seed}:{name}:{start}".encode()).digest()
        return int.from_bytes(digest[:4], "little") >> 1

    def written(self, name: str, vectors: np.ndarray, of: Any = None, rebuild: bool = True) -> dict[str, Any]:
        """Explains vectors [M, d]. Returns columns with one entry for each vector.

        The columns are `texts` ('' if unreadable), `length` (tokens, 0 if unreadable), `truncated` (cut by the token
        limit), `canonical` (the text is tokenised into the sampled tokens) and, with `rebuild`, `rebuilt` [M, d]
        float32, the reconstructions from the tokens.

        `name` names the work on disk. `of` identifies the vectors if they are not the activations of all rows.
        """
        self.explanations += len(vectors)

        def compute(part: slice) -> dict[str, Any]:
            written = self.pair.explain(vectors[part], self._seed(name, part.start))
            rebuilt = self.pair.reconstruct_ids(written.ids, written.length) if rebuild else None
            return {
                "texts": written.texts,
                "length": np.asarray(written.length),
                "truncated": np.asarray(written.truncated),
                "canonical": np.array(
                    [self._is_canonical(*row) for row in zip(written.ids, written.length, strict=True)]
                ),
                **({} if rebuilt is None else {"rebuilt": np.asarray(rebuilt, np.float32)}),
            }

        return self.kept.run(name, len(vectors), self.pair.batch_size, compute, of=of)

    def _is_canonical(self, ids: np.ndarray, length: int) -> bool:
        """Returns whether decoding the tokens and tokenising the text again gives the same tokens."""
        tokens = np.asarray(ids)[:length].tolist()
        text = self.pair.tokenizer.decode(tokens)
        return bool(self.pair.tokenizer.encode(text, add_special_tokens=False) == tokens)

    def rebuilt(self, name: str, texts: Sequence[str]) -> np.ndarray:
        """Returns the reconstructions [M, d] float32 from M texts. The rows of blank texts are zero.

        Equal texts are rebuilt once. Texts are sorted by length, so that batches need little padding.
        """
        different = sorted({text for text in texts if text.strip()}, key=lambda text: (len(text), text))
        place = {text: index for index, text in enumerate(different)}
        columns = self.kept.run(
            name,
            len(different),
            self.pair.batch_size,
            lambda part: {"rebuilt": np.asarray(self.pair.reconstruct_texts(different[part]), np.float32)},
            unit="text",
            of=different,
        )
        rebuilt = np.zeros((len(texts), self.rows.h.shape[1]), np.float32)
        for row, text in enumerate(texts):
            if text in place:
                rebuilt[row] = columns["rebuilt"][place[text]]
        return rebuilt

    def rebuilt_pool(self, name: str, texts: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
        """Calls `rebuilt` on several lists of texts together, so that texts of two lists are rebuilt once.

        Returns the reconstructions of each list by its name.
        """
        rebuilt = self.rebuilt(name, [text for listed in texts.values() for text in listed])
        ends = np.cumsum([len(listed) for listed in texts.values()])
        return {key: rebuilt[end - len(listed) : end] for (key, listed), end in zip(texts.items(), ends, strict=True)}

    def others(self, rows: np.ndarray) -> np.ndarray:
        """Returns [M]: for each of M rows, the index in `rows` of a row of another document (`data.mismatch`)."""
        return mismatched(self.rows.document[rows], self.seed)

    def mse_of(self, texts: Sequence[str], rebuilt: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the direction mse of M texts about M rows, and of the same texts permuted: two arrays [N] float64.

        `rebuilt` [M, d] are the reconstructions from the texts. Blank texts have an mse of 2. In the second array, each
        activation meets the text of another document. Entries of other rows are NaN.
        """
        readable, h = np.array([bool(text.strip()) for text in texts], bool), self.rows.h[rows]
        other = self.others(rows)
        matched, permuted = direction_mse(rebuilt, h, readable), direction_mse(rebuilt[other], h, readable[other])
        return self.full(matched, rows), self.full(of_others(permuted, self.rows.document[rows], other), rows)

    def permuted(self, values: np.ndarray) -> np.ndarray:
        """Returns `values` [N, ...] with NaN where the row in `other` is of the same document.

        Use it for values that compare each row with the row in `other`.
        """
        return of_others(values, self.rows.document, self.other)

    def full(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Returns [N, ...]: the `values` [M, ...] at M rows, and NaN at all other rows."""
        full = np.full((len(self.rows.h), *values.shape[1:]), np.nan)
        full[rows] = values
        return full

    def some(self, count: int, among: np.ndarray | None = None) -> np.ndarray:
        """Returns at most `count` row numbers, spread over documents. `among` are the rows that may be drawn."""
        return spread(self.rows.document, count, self.seed, among)

    def with_variance(self, mse: np.ndarray) -> np.ndarray:
        """Returns the columns [N, 2] of an mse [N] and the variance, as `estimate.fve_of` and `share_of` need them."""
        return np.stack([mse, self.variance], axis=-1)

    @cached_property
    def main(self) -> dict[str, Any]:
        """One explanation of every activation: the columns of `written`."""
        return self.written("explanations", self.rows.h)

    @cached_property
    def texts(self) -> list[str]:
        """The N explanations of `main`; unreadable ones are ''."""
        texts: list[str] = self.main["texts"]
        return texts

    @cached_property
    def readable(self) -> np.ndarray:
        """[N] bool: whether each explanation of `main` could be read."""
        return np.asarray(self.main["length"] > 0)

    @cached_property
    def mse(self) -> np.ndarray:
        """[N] float64: the direction mse of each explanation of `main`."""
        return direction_mse(self.main["rebuilt"], self.rows.h, self.readable)

    @cached_property
    def mse_permuted(self) -> np.ndarray:
        """[N] float64: the direction mse of each activation with the explanation of another document."""
        return self.permuted(direction_mse(self.main["rebuilt"][self.other], self.rows.h, self.readable[self.other]))

    @cached_property
    def has_context(self) -> np.ndarray:
        """The numbers of the rows whose text is known."""
        return np.flatnonzero([len(ids) > 1 for ids in self.rows.context_ids])

    @property
    def has_gold(self) -> bool:
        """Whether any row has a description that was written from the text itself."""
        return any(self.rows.gold)

    @cached_property
    def gold(self) -> np.ndarray | None:
        """The reconstructions from descriptions [N, d]. Rows without a description are NaN. None if no row has one."""
        if not self.has_gold:
            return None
        rebuilt = self.rebuilt("gold", self.rows.gold)
        return np.where(np.array([bool(text) for text in self.rows.gold])[:, None], rebuilt, np.nan)

    @cached_property
    def sampled(self) -> tuple[np.ndarray, list[list[str]], np.ndarray]:
        """The numbers of n sampled rows, S explanations of each (texts [n][S]), and their reconstructions [n, S, d].

        The reconstructions of unreadable explanations are zero.
        """
        rows, count = self.some(self.sizes.sampled), self.sizes.samples
        written = self.written("samples", np.repeat(self.rows.h[rows], count, axis=0), [rows.tolist(), count])
        texts = [written["texts"][i * count : (i + 1) * count] for i in range(len(rows))]
        rebuilt = np.where((written["length"] > 0)[:, None], written["rebuilt"], 0.0)
        return rows, texts, rebuilt.reshape(len(rows), count, -1)

    @cached_property
    def ranked(self) -> dict[int, list[str]]:
        """The subject's `RANKS` likeliest next tokens of at most `sizes.text` rows, by row number, likeliest first."""
        return self.next_tokens(self.some(self.sizes.text, self.has_context))

    def next_tokens(self, rows: np.ndarray) -> dict[int, list[str]]:
        """Returns the subject's `RANKS` likeliest next tokens after the contexts of `rows` [M], by row number."""
        ids = [self.rows.context_ids[row] for row in rows]
        groups = shared_reads(ids, PLACES)

        def compute(part: slice) -> dict[str, Any]:
            batch = groups[part]
            # The last batch is filled up with copies of its first text, so that only one shape is compiled.
            filled = [*batch, *batch[:1] * (TEXTS_AT_A_TIME - len(batch))]
            contexts = [[ids[number] for number in group] for group in filled]
            return {"ranked": likeliest(self.pair.subject(), contexts, RANKS)[: len(batch)]}

        read = self.kept.run("likeliest_tokens", len(groups), TEXTS_AT_A_TIME, compute, unit="text", of=rows)
        ranked = {
            int(rows[number]): tokens
            for group, of_group in zip(groups, read.get("ranked", []), strict=True)
            for number, tokens in zip(group, of_group, strict=True)
        }
        return {row: ranked[row] for row in rows.tolist()}
