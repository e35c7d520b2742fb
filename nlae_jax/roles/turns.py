"""Samples explanations on one CPU in turns of a few tokens, after which rows that have ended leave the batch.

On a CPU the time of a token grows with the rows of the batch, and rows that have ended cost as much as the others. One
explanation in forty is often three times as long as the rest. Training samples with `rollout`, in one program.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from nlae_jax.lm.block import BlockWeights
from nlae_jax.lm.mixed import of_layer
from nlae_jax.lm.sampling import Loop, Samples, advanced, started
from nlae_jax.lm.segments import KeyValues, rows_of
from nlae_jax.roles.pair import Pair, Params, Roles
from nlae_jax.roles.rollout import decode_step, prefilled

_TURN = 16  # tokens
_STEP_DOWN = 4  # a batch size is this many times the next smaller one: each takes seconds to trace, load or compile


class Ready(NamedTuple):
    """An encoder's variables, and the weights and adapters of each of its blocks, as `Turns.ready` makes them."""

    variables: Params
    weights: list[BlockWeights]


class Turns:
    """Samples explanations with any pair of one architecture. Each batch size is compiled once.

    `batch_size` is the largest batch, and `smallest` the smallest that is left when rows leave.
    """

    def __init__(self, roles: Roles, batch_size: int, smallest: int) -> None:
        self._roles, self._smallest = roles, smallest
        encoder, protocol = roles.encoder, roles.encoder.protocol

        def begin(variables: Params, h_BxD: jax.Array, used_B: jax.Array, limit: int) -> tuple[Loop, Any]:
            logits, decoding = prefilled(encoder, variables, h_BxD, 1, limit)
            return started(logits, decoding.growing, limit)._replace(done=~used_B[:, None]), decoding.contexts

        def advance(
            variables: Params,
            weights: Any,
            contexts: Any,
            loop: Loop,
            key: jax.Array,
            number_B: jax.Array,
            until: jax.Array,
            temperature: float,
        ) -> Loop:
            # A row keeps its random numbers: those of its place in the batch as it was before rows left.
            draws_of_all = lambda step: jax.random.uniform(jax.random.fold_in(key, step), (batch_size,))  # noqa: E731
            return advanced(
                decode_step(encoder, variables, weights, contexts),
                loop,
                lambda step: draws_of_all(step)[number_B][:, None],
                until,
                closing=protocol.closing,
                eos_id=protocol.eos_id,
                temperature=temperature,
            )

        self._begin = jax.jit(begin, static_argnums=3)
        self._advance = jax.jit(advance, static_argnums=7, donate_argnums=3)

    def ready(self, pair: Pair) -> Ready:
        """Returns the pair's encoder as `sample` reads it. A block's weights are parts of the pair's own arrays."""
        variables = self._roles.encoder_variables(pair.base, pair.encoder)
        host = jax.tree.map(np.asarray, variables)  # reads arrays on a CPU in place
        blocks, adapters = host["params"]["lm"]["blocks"], host.get("lora", {"lm": {"blocks": {}}})["lm"]["blocks"]
        arch = self._roles.encoder.arch
        of_block = lambda stacks, layer: jax.device_put(of_layer(arch, stacks, layer))  # noqa: E731
        layers = range(arch.num_layers)
        return Ready(variables, [(of_block(blocks, layer), of_block(adapters, layer)) for layer in layers])

    def sample(
        self, ready: Ready, h_BxD: jax.Array, count: int, key: jax.Array, temperature: float, limit: int
    ) -> Samples:
        """Samples an explanation of each of the first `count` activations in `h_BxD`, as numpy arrays [B, R].

        R = `limit`. The tokens are those that `rollout` draws, up to rounding. The other activations only fill the
        batch up: their explanations are empty.
        """
        number = np.arange(len(h_BxD))
        loop, contexts = self._begin(ready.variables, h_BxD, number < count, limit)
        empty: list[Any] = [np.asarray(part)[:, 0].copy() for part in loop.samples]
        samples = Samples(*empty)
        until = 0
        while until < limit:
            until = min(until + _TURN, limit)
            loop = self._advance(*ready, contexts, loop, key, number, np.int32(until), temperature)
            going = np.flatnonzero(~np.asarray(loop.done[:, 0]))
            if not len(going):
                break
            if (size := smaller_batch(len(going), len(number), self._smallest)) < len(number):
                _keep(samples, loop, number)
                ended = np.setdiff1d(np.arange(len(number)), going)
                kept = np.concatenate([going, ended[: size - len(going)]])
                (loop, contexts), number = _rows(loop, contexts, kept), number[kept]
        _keep(samples, loop, number)
        return samples


def _keep(samples: Samples, loop: Loop, number_N: np.ndarray) -> None:
    """Writes the tokens that the loop's rows have drawn into `samples`, at the row numbers `number_N`."""
    for array, part in zip(samples, loop.samples, strict=True):
        array[number_N] = np.asarray(part)[:, 0]


def smaller_batch(count: int, size: int, smallest: int) -> int:
    """Returns the size of the batch that the last `count` rows of a batch of `size` move into.

    It is `smallest` times a power of `_STEP_DOWN`, and at most half of `size`. If no such size is at least `count`, it
    is `size`.
    """
    fitting = smallest
    while fitting < count:
        fitting *= _STEP_DOWN
    return fitting if 2 * fitting <= size else size


def _rows(loop: Loop, contexts: Any, index_N: np.ndarray) -> tuple[Loop, Any]:
    """Returns the rows at `index_N` of the loop's state and of the contexts.

    Rows are taken by numpy, which reads arrays on a CPU in place. A compiled function would be compiled for each size.
    """
    loop, contexts = jax.tree.map(np.asarray, (loop, contexts))
    is_keys = lambda x: isinstance(x, KeyValues)  # noqa: E731
    of_rows = lambda tree: jax.tree.map(lambda kv: rows_of(kv, index_N), tree, is_leaf=is_keys)  # noqa: E731
    kept = Loop(
        step=loop.step,
        logits=loop.logits[index_N],
        caches=of_rows(loop.caches),
        samples=Samples(*(part[index_N] for part in loop.samples)),
        done=loop.done[index_N],
    )
    taken: tuple[Loop, Any] = jax.device_put((kept, of_rows(contexts)))
    return taken
