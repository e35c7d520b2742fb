"""Runs a trained pair: activations to text and text to activations, in batches of one compiled shape."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from nlae_jax.lm.modules import apply
from nlae_jax.lm.sampling import Samples, explanation_tokens, truncated
from nlae_jax.lm.tokens import pad, width_within
from nlae_jax.mesh import batch_parts, batch_sharding, place, replicated
from nlae_jax.roles import protocol
from nlae_jax.roles.pair import Pair, Roles
from nlae_jax.roles.protocol import OPENING, Protocol, extract_explanation
from nlae_jax.roles.rollout import rollout
from nlae_jax.roles.turns import Turns
from nlae_jax.runtime import processes

_WIDTH_STEP = 32  # tokens: texts are padded to a multiple of it
_GROUPS = 3  # of texts of like length
_GROUP_TOKENS = 512  # a further group takes about as long as this many tokens: its shape is compiled or loaded


class Explanations(NamedTuple):
    """N sampled explanations.

    `texts` are the stripped explanations, '' if the closing tag is missing. `responses` are the whole sampled texts.
    `ids` [N, T] int32 and `length` [N] int32 hold the explanations' tokens as sampled. `truncated` [N] bool says
    whether the token limit cut the response before its closing tag.
    """

    texts: list[str]
    responses: list[str]
    ids: np.ndarray
    length: np.ndarray
    truncated: np.ndarray


def read_samples(
    tokenizer: Any, protocol: Protocol, tokens_NxR: np.ndarray, lengths_N: np.ndarray
) -> tuple[list[str], list[str]]:
    """Decodes sampled tokens into whole responses and the explanations in them.

    A response includes the opening tag. An explanation is '' if the response has no explanation.
    """
    responses = [
        OPENING + tokenizer.decode([token for token in row[:length].tolist() if token != protocol.eos_id])
        for row, length in zip(tokens_NxR, lengths_N, strict=True)
    ]
    return responses, [extract_explanation(response) or "" for response in responses]


class RoundTrip:
    """Explains activations and reconstructs explanations with any pair of one architecture.

    The parameters are arguments of the compiled functions, so all such pairs share one compilation per shape.
    """

    def __init__(
        self,
        roles: Roles,
        tokenizer: Any,
        batch_size: int,
        max_new_tokens: int,
        mesh: Mesh | None = None,
        smallest_batch: int | None = None,
    ) -> None:
        """Compiles nothing yet.

        `max_new_tokens` is an explanation's limit, unless a call of `explain` says otherwise.
        `mesh` is the mesh that the pairs are on. Batches are split over it, and all its processes get all results.
        Fewer rows than `batch_size` are filled up to a multiple of `smallest_batch`. On one CPU, explanations that have
        ended leave the batch, until half of `smallest_batch` is left. Without `smallest_batch` there is one shape.
        """
        self._vocab_size, self._most_tokens = roles.decoder.arch.vocab_size, roles.decoder.arch.most_tokens
        self._compiled_shapes: set[tuple[Any, ...]] = set()
        self._mesh, everywhere = mesh, None if mesh is None else replicated(mesh)
        self.protocol, self.tokenizer = roles.encoder.protocol, tokenizer
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        self._smallest_batch = smallest_batch or batch_size
        self._parts = 1 if mesh is None else batch_parts(mesh)
        blank = protocol.blank_tokens(tokenizer, roles.encoder.arch.vocab_size)

        def explain(pair: Pair, h: jax.Array, key: jax.Array, temperature: float, limit: int) -> tuple[jax.Array, ...]:
            samples = rollout(
                roles,
                pair.encoder,
                {"base": pair.base},
                h,
                key,
                samples_per_activation=1,
                max_new_tokens=limit,
                temperature=temperature,
            )
            return read(jax.tree.map(lambda x: x[:, 0], samples))

        def read(samples: Samples) -> tuple[jax.Array, ...]:
            ids, length = explanation_tokens(samples, self.protocol.closing, jnp.asarray(blank))
            return samples.tokens, samples.lengths, ids, length, truncated(samples, self.protocol.eos_id)

        def reconstruct(pair: Pair, ids: jax.Array, length: jax.Array, endings: Any) -> jax.Array:
            rebuilt_NxD: jax.Array = apply(roles.decoder, pair.decoder_variables(roles), ids, length, endings)
            return rebuilt_NxD

        def reconstruct_prompts(pair: Pair, ids: jax.Array, mask: jax.Array) -> jax.Array:
            variables = pair.decoder_variables(roles)
            rebuilt_NxD: jax.Array = apply(roles.decoder, variables, ids, mask, method="from_prompts")
            return rebuilt_NxD

        self._explain = jax.jit(explain, static_argnums=(3, 4), out_shardings=everywhere)
        self._read = jax.jit(read)
        left = batch_size if smallest_batch is None else max(1, smallest_batch // 2)
        self._turns = Turns(roles, batch_size, left) if _on_one_cpu(mesh) else None
        self._groups = 1 if self._turns is None else _GROUPS
        self._reconstruct = jax.jit(reconstruct, out_shardings=everywhere)
        self._reconstruct_prompts = jax.jit(reconstruct_prompts, out_shardings=everywhere)

    @functools.cached_property
    def _endings(self) -> Any:
        """The endings (`protocol.Endings`) for explanations as token ids. Explanations as text do not need them."""
        return self._put(protocol.endings(self.tokenizer, self.protocol, self._vocab_size))

    def _put(self, tree: Any, sharding: Callable[[Mesh], NamedSharding] = replicated) -> Any:
        """Puts arrays onto the mesh if there is one, and onto the default device otherwise."""
        if self._mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return place(tree, sharding(self._mesh))

    def explain(
        self,
        pair: Pair,
        vectors: np.ndarray,
        seed: int = 0,
        temperature: float = 0.0,
        advance: Callable[[int], None] = lambda rows: None,
        max_new_tokens: int | None = None,
    ) -> Explanations:
        """Writes one explanation of each raw activation [N, d].

        A batch's random draws depend only on `seed` and the batch's number. A `temperature` of 0 takes the likeliest
        token. `advance` is called after every batch with its number of rows.
        """
        key, limit = jax.random.PRNGKey(seed), max_new_tokens or self._max_new_tokens
        ready = None if self._turns is None else self._turns.ready(pair)
        parts = []
        for number, (h,) in enumerate(self._batches(np.asarray(vectors, np.float32))):
            batch_key = self._put(jax.random.fold_in(key, number))
            count = min(self._batch_size, len(vectors) - number * self._batch_size)
            if self._turns is None or ready is None:
                out = self._call(self._explain, pair, h, batch_key, temperature, limit)
            else:
                out = self._read(self._turns.sample(ready, h, count, batch_key, temperature, limit))
            parts.append([np.asarray(x)[: self._batch_size] for x in out])
            advance(count)
        tokens, lengths, ids, length, cut = (np.concatenate(x)[: len(vectors)] for x in zip(*parts, strict=True))
        responses, texts = read_samples(self.tokenizer, self.protocol, tokens, lengths)
        return Explanations(texts, responses, ids, length, cut)

    def reconstruct_ids(self, pair: Pair, ids: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Rebuilds activations [N, d] float32 from explanations' token ids [N, T] and lengths [N]."""
        batches = self._batches(ids, length)
        return self._collect(
            len(ids), (self._call(self._reconstruct, pair, *batch, self._endings) for batch in batches)
        )

    def reconstruct_texts(self, pair: Pair, texts: Sequence[str]) -> np.ndarray:
        """Rebuilds activations [N, d] float32 from explanations as text.

        The decoder's whole prompt is tokenised as one string. Tokens that the model has no embedding for are left out,
        because a sampled text may spell such a token. On one CPU, texts are computed in a few groups of like length.
        Elsewhere all texts are padded to the longest, because compiling a shape takes longer than computing padding.
        """
        tokenization = self.tokenizer, self.protocol
        prompts = [protocol.known_decoder_ids(*tokenization, text, self._vocab_size) for text in texts]
        groups = like_lengths([len(prompt) for prompt in prompts], self._batch_size, self._smallest_batch, self._groups)
        rebuilt = []
        for rows, width in groups:
            group = [prompts[row] for row in rows]
            width = width_within(width, max(map(len, group)), self._most_tokens)
            ids, length = pad(group, width)
            batches = self._batches(ids, np.arange(width) < length[:, None], few=self._groups > 1)
            parts = (self._call(self._reconstruct_prompts, pair, *batch) for batch in batches)
            rebuilt.append(self._collect(len(rows), parts))
        places = np.argsort(np.concatenate([rows for rows, _ in groups]))
        in_order: np.ndarray = np.concatenate(rebuilt)[places]
        return in_order

    def _call(self, function: Any, pair: Pair, rows: jax.Array, *rest: Any) -> Any:
        """Calls a compiled function. For a new shape, all processes first compile the function together."""
        static = tuple(argument for argument in rest if isinstance(argument, int | float))
        if (function, rows.shape, static) not in self._compiled_shapes:
            self._compiled_shapes.add((function, rows.shape, static))
            processes.compile_together(function, pair, rows, *rest)
        return function(pair, rows, *rest)

    def _batches(self, *arrays: np.ndarray, few: bool = False) -> Any:
        batches = _batches(self._batch_size, self._smallest_batch, self._parts, few, *arrays)
        return (self._put(batch, batch_sharding) for batch in batches)

    def _collect(self, count: int, parts: Any) -> np.ndarray:
        return np.concatenate([np.asarray(part)[: self._batch_size] for part in parts])[:count]


def _on_one_cpu(mesh: Mesh | None) -> bool:
    """Returns whether a mesh, or the default device without one, is a single CPU."""
    if mesh is None:
        return jax.default_backend() == "cpu"
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def like_lengths(lengths: Sequence[int], size: int, smallest: int, most: int) -> list[tuple[np.ndarray, int]]:
    """Splits texts of these `lengths` into at most `most` groups, so that the fewest tokens are computed.

    Returns (rows, width) of each group: the numbers of its texts, and the width that they are padded to. `size` and
    `smallest` are those of the batches that a group is computed in. A group counts as `_GROUP_TOKENS` more tokens.
    """
    width_N = -(-np.asarray(lengths) // _WIDTH_STEP) * _WIDTH_STEP
    *shorter, widest = np.unique(width_N).tolist()

    def groups(widths: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        spans = zip((0, *widths[:-1]), widths, strict=True)
        return [(np.flatnonzero((width_N > above) & (width_N <= width)), width) for above, width in spans]

    def tokens(split: list[tuple[np.ndarray, int]]) -> int:
        whole, rest = zip(*(divmod(len(rows), size) for rows, _ in split), strict=True)
        rows = [size * count + _filled(left, smallest, few=True) for count, left in zip(whole, rest, strict=True)]
        return sum(count * width + _GROUP_TOKENS for count, (_, width) in zip(rows, split, strict=True))

    splits = (chosen for count in range(most) for chosen in itertools.combinations(shorter, count))
    return min((groups((*chosen, widest)) for chosen in splits), key=tokens)


def _filled(rows: int, smallest: int, few: bool) -> int:
    """Returns the size that a batch is filled up to: a multiple of `smallest`, or with `few` also a power of two."""
    multiple = -(-rows // smallest) * smallest
    return min(multiple, 1 << (rows - 1).bit_length()) if few and rows else multiple


def _batches(size: int, smallest: int, parts: int, few: bool, *arrays: np.ndarray) -> Any:
    """Yields consecutive batches of `size` rows.

    A batch is filled up with copies of its first row until `parts` divides its size. Fewer rows than `size` are filled
    up to a multiple of `smallest`, so that there are few shapes to compile and few copies to compute; with `few`, to a
    power of two if that is less.

    A row's random draws depend on its number in the batch (jax's threefry is partitionable), so they are the same
    however many devices there are.
    """
    for start in range(0, len(arrays[0]), size):
        rows = [array[start : start + size] for array in arrays]
        width = min(_filled(len(rows[0]), smallest, few), size)
        missing = -(-width // parts) * parts - len(rows[0])
        yield [np.concatenate([row, np.repeat(row[:1], missing, axis=0)]) if missing else row for row in rows]
