"""What the sections of the suite share: the pair at work on the rows, with everything it says kept on disk."""

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
from nlae_jax.evaluate.rows import Rows, likeliest, spread
from nlae_jax.roles import direction
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.pair import Pair, Roles, parameter_sums
from nlae_jax.roles.roundtrip import Explanations, RoundTrip
from nlae_jax.runtime.files import AnyPath
from nlae_jax.runtime.progress import warn

RANKS = 12  # of the subject's next tokens that are looked at
ONE_DOCUMENT = "eval: all activations are of one document; the controls of other documents are left out"
_CONTEXTS = 8  # whose next tokens are asked for at once


class Pairing(NamedTuple):
    """A pair at work. `explain(vectors, seed)`; `identity` tells it, and how it is sampled, from any other."""

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
    """A trained pair as the suite uses it; its identity is that of its parameters and of how it is sampled."""
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
    """How many rows the dearer figures are of, spread over documents.

    `sampled` rows have several explanations each: `samples` of the activation, those of the tokens before it, and those
    of vectors that say nothing. With 64 of them, a suite of 512 activations writes fewer than 2,000 explanations.
    """

    text: int = 128
    sampled: int = 64
    samples: int = 10
    suffix: int = 64
    judged: int = 64


class Work:
    """One pair on one set of rows: what the sections share, each thing made when first asked for and kept on disk."""

    def __init__(
        self,
        pair: Pairing,
        rows: Rows,
        directory: AnyPath,
        seed: int = 0,
        bootstrap_samples: int = 2000,
        sizes: Sizes = Sizes(),
    ) -> None:
        self.pair, self.rows, self.seed, self.sizes = pair, rows, seed, sizes
        self.explanations = 0  # how many have been written for what was asked so far, in earlier runs too
        settings = [pair.identity, pair.batch_size, rows.digest(), seed]
        name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        self.kept = Kept(directory / "evaluation" / name)
        self.ledger = Ledger(rows.document, bootstrap_samples, seed)
        self.other = mismatched(rows.document, seed)
        if len(np.unique(rows.document)) < 2:
            warn(ONE_DOCUMENT)
        self.variance = variances(rows.h)
        self.mean = np.asarray(direction.unit_direction(rows.h), np.float64).mean(0)

    def _seed(self, name: str, start: int) -> int:
        digest = hashlib.sha256(f"{self.seed}:{name}:{start}".encode()).digest()
        return int.from_bytes(digest[:4], "little") >> 1

    def written(self, name: str, vectors: np.ndarray, of: Any = None, rebuild: bool = True) -> dict[str, Any]:
        """Explanations of vectors [M, d], their lengths, and with `rebuild` what is rebuilt from their tokens.

        `of`: what tells the vectors from others, where they are not those of all rows.
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
        """Whether the tokens are those that their own text is tokenised into."""
        tokens = np.asarray(ids)[:length].tolist()
        text = self.pair.tokenizer.decode(tokens)
        return bool(self.pair.tokenizer.encode(text, add_special_tokens=False) == tokens)

    def rebuilt(self, name: str, texts: Sequence[str]) -> np.ndarray:
        """[M, d] float32 of texts; equal ones are rebuilt once. Rows of blank texts are zero."""
        different = sorted({one for one in texts if one.strip()}, key=lambda one: (len(one), one))
        number = {one: index for index, one in enumerate(different)}
        found = self.kept.run(
            name,
            len(different),
            self.pair.batch_size,
            lambda part: {"rebuilt": np.asarray(self.pair.reconstruct_texts(different[part]), np.float32)},
            unit="text",
            of=different,
        )
        rebuilt = np.zeros((len(texts), self.rows.h.shape[1]), np.float32)
        for row, one in enumerate(texts):
            if one in number:
                rebuilt[row] = found["rebuilt"][number[one]]
        return rebuilt

    def rebuilt_pool(self, name: str, texts: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
        """The same of several lists at once: what stands in two of them is rebuilt once."""
        found = self.rebuilt(name, [one for some in texts.values() for one in some])
        ends = np.cumsum([len(some) for some in texts.values()])
        return {key: found[end - len(some) : end] for (key, some), end in zip(texts.items(), ends, strict=True)}

    def others(self, rows: np.ndarray) -> np.ndarray:
        """[M]: for each of some rows the place among them of the row that it is permuted with."""
        return mismatched(self.rows.document[rows], self.seed)

    def mse_of(self, texts: Sequence[str], rebuilt: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """mse [N] of texts about some rows, and of each about a row of another document; NaN elsewhere."""
        readable, h = np.array([bool(one.strip()) for one in texts], bool), self.rows.h[rows]
        other = self.others(rows)
        own, wrong = direction_mse(rebuilt, h, readable), direction_mse(rebuilt[other], h, readable[other])
        return self.full(own, rows), self.full(of_others(wrong, self.rows.document[rows], other), rows)

    def permuted(self, values: np.ndarray) -> np.ndarray:
        """Values [N, ...] of rows that met rows `other`, NaN where those are of the same document."""
        return of_others(values, self.rows.document, self.other)

    def full(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Values of some rows as those of all, NaN elsewhere."""
        full = np.full((len(self.rows.h), *values.shape[1:]), np.nan)
        full[rows] = values
        return full

    def some(self, count: int, among: np.ndarray | None = None) -> np.ndarray:
        """At most `count` rows, spread over documents; of those in `among` alone, if it is given."""
        return spread(self.rows.document, count, self.seed, among)

    def with_variance(self, mse: np.ndarray) -> np.ndarray:
        """[N] as the columns [N, 2] that `estimate.fve_of` and `share_of` take."""
        return np.stack([mse, self.variance], axis=-1)

    @cached_property
    def main(self) -> dict[str, Any]:
        """One explanation of every activation."""
        return self.written("explanations", self.rows.h)

    @cached_property
    def texts(self) -> list[str]:
        texts: list[str] = self.main["texts"]
        return texts

    @cached_property
    def readable(self) -> np.ndarray:
        return np.asarray(self.main["length"] > 0)

    @cached_property
    def mse(self) -> np.ndarray:
        return direction_mse(self.main["rebuilt"], self.rows.h, self.readable)

    @cached_property
    def mse_permuted(self) -> np.ndarray:
        return self.permuted(direction_mse(self.main["rebuilt"][self.other], self.rows.h, self.readable[self.other]))

    @cached_property
    def has_context(self) -> np.ndarray:
        """Rows whose text is known."""
        return np.flatnonzero([len(ids) > 1 for ids in self.rows.context_ids])

    @property
    def has_gold(self) -> bool:
        """Whether any row has a description by a model that saw the text."""
        return any(self.rows.gold)

    @cached_property
    def gold(self) -> np.ndarray | None:
        """What descriptions give [N, d], NaN without one; None where no row has one."""
        if not self.has_gold:
            return None
        rebuilt = self.rebuilt("gold", self.rows.gold)
        return np.where(np.array([bool(one) for one in self.rows.gold])[:, None], rebuilt, np.nan)

    @cached_property
    def sampled(self) -> tuple[np.ndarray, list[list[str]], np.ndarray]:
        """Rows, and several explanations of each: texts [n][S] and what is rebuilt [n, S, d], zero of blank ones."""
        rows, count = self.some(self.sizes.sampled), self.sizes.samples
        written = self.written("samples", np.repeat(self.rows.h[rows], count, axis=0), [rows.tolist(), count])
        texts = [written["texts"][i * count : (i + 1) * count] for i in range(len(rows))]
        rebuilt = np.where((written["length"] > 0)[:, None], written["rebuilt"], 0.0)
        return rows, texts, rebuilt.reshape(len(rows), count, -1)

    @cached_property
    def ranked(self) -> dict[int, list[str]]:
        """By row the subject's likeliest next tokens, of some rows."""
        rows = self.some(self.sizes.text, self.has_context)

        def compute(part: slice) -> dict[str, Any]:
            some = rows[part]
            filled = [self.rows.context_ids[row] for row in [*some, *some[:1].repeat(_CONTEXTS - len(some))]]
            return {"ranked": likeliest(self.pair.subject(), filled, RANKS)[: len(some)]}

        found = self.kept.run("next_tokens", len(rows), _CONTEXTS, compute, of=rows)
        return dict(zip(rows.tolist(), found.get("ranked", []), strict=True))
