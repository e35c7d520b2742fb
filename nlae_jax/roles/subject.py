"""The subject: the language model being explained. It is frozen, and its residual stream is read."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nlae_jax.config import Config
from nlae_jax.lm.arch import Arch
from nlae_jax.lm.segments import KeyValues, empty_caches
from nlae_jax.lm.transformer import BlockWeights, Push, Segment, Transformer, key_values
from nlae_jax.mesh import batch_sharding


def _rounding(dtype: jnp.dtype) -> float:
    """Returns the share of an activation's norm by which two computations of it may differ.

    In float32, the bound is a thousandth, and measured differences are far below it. For dtypes with fewer digits, the
    bound is assumed: two and a half steps between neighbouring numbers.
    """
    return max(1e-3, 2.5 * float(jnp.finfo(dtype).eps))


class Spliced(NamedTuple):
    """The result of `Subject.splice` for C vectors and the S tokens read. All arrays are float32.

    `h` [B, d] is the true activation. `kl` [B, C, S] is the divergence, in nats, of the next-token distribution with a
    vector from the one without. `log_p` [B, 1 + C, S] holds the log-probability of the true next token: first without
    any vector, then with each of the C. The last token read has no successor, so the last column has no meaning.
    """

    h: jax.Array
    kl: jax.Array
    log_p: jax.Array


class Subject(nn.Module):
    """The frozen language model. Variables: `params/lm`. `Transformer` describes `bounded`."""

    arch: Arch
    attention: str = "auto"
    bounded: bool = True

    def setup(self) -> None:
        self.lm = Transformer(self.arch, attention=self.attention, bounded=self.bounded)

    def logits(self, ids_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        """Returns next-token logits: [B, T] -> [B, T, V] float32."""
        return self.lm(ids_BxT, mask_BxT)

    def residual(self, ids_BxT: jax.Array, mask_BxT: jax.Array, layer: int) -> jax.Array:
        """Returns the output of block `layer` after its residual add: [B, T, d]. Later blocks are not run."""
        (hidden,), _ = self.lm.run((self.lm.padded(ids_BxT, mask_BxT),), stop=layer + 1)
        return hidden

    def read(
        self, ids_BxT: jax.Array, mask_BxT: jax.Array, rows: jax.Array, columns: jax.Array, layer: int, num_next: int
    ) -> tuple[jax.Array, jax.Array]:
        """Returns activations [M, d] float32 at (rows, columns) and the ids [M, num_next] of the likeliest next tokens.

        With `num_next` = 0 the blocks after `layer` and the head are not run.
        """
        segment = self.lm.padded(ids_BxT, mask_BxT)
        (hidden,), _ = self.lm.run((segment,), stop=layer + 1)
        activations = hidden[rows, columns].astype(jnp.float32)
        if not num_next:
            return activations, jnp.zeros((rows.shape[0], 0), jnp.int32)
        (final,), _ = self.lm.run((segment._replace(x=hidden),), start=layer + 1)
        _, likeliest = jax.lax.top_k(self.lm.logits(final[rows, columns]), num_next)
        return activations, likeliest.astype(jnp.int32)

    def run_with(
        self, ids_BxT: jax.Array, mask_BxT: jax.Array, h_BxD: jax.Array, column_B: jax.Array, layer: int
    ) -> jax.Array:
        """Returns logits [B, T, V] float32 of a run in which `h` replaces one column of block `layer`'s output.

        `column_B` names the replaced column of each row.
        """
        segment = self.lm.padded(ids_BxT, mask_BxT)
        (hidden,), _ = self.lm.run((segment,), stop=layer + 1)
        hidden = hidden.at[jnp.arange(hidden.shape[0]), column_B].set(h_BxD.astype(hidden.dtype))
        (final,), _ = self.lm.run((segment._replace(x=hidden),), start=layer + 1)
        return self.lm.logits(final)

    def splice(
        self,
        context_BxT: jax.Array,
        context_mask_BxT: jax.Array,
        read_BxS: jax.Array,
        read_mask_BxS: jax.Array,
        h_BxCxD: jax.Array,
        layer: int,
    ) -> Spliced:
        """Measures the effect of C vectors put in the place of the activation of `read`'s first token.

        `context` holds the tokens before that token, padded on the right. `read` holds the token and those after it.
        The context is computed once: all vectors share its keys, as samples share a prompt's. A vector that equals the
        true activation up to rounding is the true activation, so its KL is exactly 0. The activation that a caller has
        stored was computed in a batch of another shape, whose sums are rounded differently.
        """
        start = context_mask_BxT.sum(-1).astype(jnp.int32)
        context = self.lm.padded(context_BxT, context_mask_BxT)
        positions = start[:, None] + jnp.arange(read_BxS.shape[1], dtype=jnp.int32)
        read = Segment(self.lm.embed(read_BxS), positions, read_mask_BxS.astype(bool))
        (context_BxTxD, hidden_BxSxD), _ = self.lm.run((context, read), stop=layer + 1)
        runs = 1 + h_BxCxD.shape[1]
        x = jnp.broadcast_to(hidden_BxSxD[:, None], (hidden_BxSxD.shape[0], runs, *hidden_BxSxD.shape[1:]))
        true_Bx1xD = hidden_BxSxD[:, :1]
        distance = jnp.linalg.norm((h_BxCxD - true_Bx1xD).astype(jnp.float32), axis=-1, keepdims=True)
        size = jnp.linalg.norm(true_Bx1xD.astype(jnp.float32), axis=-1, keepdims=True)
        h_BxCxD = jnp.where(distance <= _rounding(x.dtype) * size, true_Bx1xD, h_BxCxD.astype(x.dtype))
        x = x.at[:, 1:, 0].set(h_BxCxD)  # the first run keeps the true activation
        spread = lambda array: jnp.broadcast_to(array[:, None], (array.shape[0], runs, *array.shape[1:]))  # noqa: E731
        spliced = Segment(x, spread(positions), spread(read.valid))
        (_, final), _ = self.lm.run((context._replace(x=context_BxTxD), spliced), start=layer + 1)
        targets = jnp.pad(read_BxS[:, 1:], ((0, 0), (0, 1)))

        def compare_column(column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            """Computes one column at a time: the logits of all columns would be the largest array by far."""
            x_BxCxD, target_B = column
            log_p = jax.nn.log_softmax(self.lm.logits(x_BxCxD))
            # As p and q both sum to 1, Σ p (q/p - 1 - log q/p): no term is negative, and none is lost to rounding.
            ratio = log_p[:, 1:] - log_p[:, :1]
            kl = (jnp.exp(log_p[:, :1]) * (jnp.expm1(ratio) - ratio)).sum(-1)
            return kl, jnp.take_along_axis(log_p, target_B[:, None, None], -1)[..., 0]

        kl, log_p = jax.lax.map(compare_column, (jnp.moveaxis(final, 2, 0), targets.T))
        return Spliced(hidden_BxSxD[:, 0].astype(jnp.float32), jnp.moveaxis(kl, 0, -1), jnp.moveaxis(log_p, 0, -1))

    def continuations(
        self, notes_BxT: jax.Array, notes_mask_BxT: jax.Array, after_BxCxS: jax.Array, after_mask_BxCxS: jax.Array
    ) -> jax.Array:
        """Returns log p of each of C continuations after a row's notes, summed over its tokens: [B, C] float32.

        Notes are padded on the right and computed once for all their continuations.
        """
        notes = self.lm.padded(notes_BxT, notes_mask_BxT)
        start = notes_mask_BxT.sum(-1).astype(jnp.int32)
        positions = start[:, None, None] + jnp.arange(after_BxCxS.shape[-1], dtype=jnp.int32)
        positions = jnp.broadcast_to(positions, after_BxCxS.shape)
        after = Segment(self.lm.embed(after_BxCxS), positions, after_mask_BxCxS.astype(bool))
        (first, hidden), _ = self.lm.run((notes, after))
        last = jnp.take_along_axis(first, jnp.maximum(start - 1, 0)[:, None, None], axis=1)[:, None]
        last = jnp.broadcast_to(last, (*after_BxCxS.shape[:2], 1, last.shape[-1]))
        predicting = jnp.concatenate([last, hidden[:, :, :-1]], axis=2)
        log_p, _ = self.lm.token_log_probs(predicting, after_BxCxS)
        return jnp.where(after_mask_BxCxS, log_p, 0.0).sum(-1)

    def neurons(self, ids_BxT: jax.Array, mask_BxT: jax.Array, layer: int) -> jax.Array:
        """Returns the MLP's neurons in block `layer`, [B, T, d_ff]: the input of its down-projection."""
        return self.lm.neurons(self.lm.padded(ids_BxT, mask_BxT), layer)

    def log_probs(self, ids_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        """Returns log p of every token after the first, given those before it: [B, T - 1] float32.

        Entries at padding have no meaning.
        """
        (hidden,), _ = self.lm.run((self.lm.padded(ids_BxT, mask_BxT),))
        return self.lm.token_log_probs(hidden[:, :-1], ids_BxT[:, 1:])[0]

    def prefill(self, ids_BxT: jax.Array, mask_BxT: jax.Array) -> tuple[jax.Array, tuple[KeyValues, ...]]:
        """Returns logits [B, V] after each row's last real token, and the prompts' keys and values.

        Keys and values are stacked over blocks.
        """
        segment = self.lm.padded(ids_BxT, mask_BxT)
        (hidden,), caches = self.lm.run((segment,), keep_caches=True)
        return self._after_last(hidden, mask_BxT), key_values(caches, (segment,))

    def steered_prefill(
        self, ids_BxT: jax.Array, mask_BxT: jax.Array, added_BxTxD: jax.Array, layer: int
    ) -> tuple[jax.Array, tuple[KeyValues, ...]]:
        """Does what `prefill` does, with `added` [B, T, d] added to the output of block `layer`."""
        segment = self.lm.padded(ids_BxT, mask_BxT)
        (hidden,), low = self.lm.run((segment,), stop=layer + 1, keep_caches=True)
        changed = segment._replace(x=hidden + added_BxTxD.astype(hidden.dtype))
        (hidden,), high = self.lm.run((changed,), start=layer + 1, keep_caches=True)
        caches = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), low, high)
        return self._after_last(hidden, mask_BxT), key_values(caches, (segment,))

    def _after_last(self, hidden_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        """Returns logits [B, V] after each row's last real token."""
        last = mask_BxT.shape[1] - 1 - jnp.argmax(mask_BxT[:, ::-1], axis=1)
        return self.lm.logits(jnp.take_along_axis(hidden_BxTxD, last[:, None, None], axis=1)[:, 0])

    def decode(
        self,
        token_B: jax.Array,
        step: jax.Array,
        start_B: jax.Array,
        contexts: Any,
        generated_caches: Any,
        weights: list[BlockWeights] | None = None,
        push: Push | None = None,
    ) -> tuple[jax.Array, Any]:
        """Reads generated token number `step`. Returns the logits [B, V] of the next token, and the extended caches.

        `start_B` holds the number of tokens in each row's prompt. `step` is a scalar, or [B] where rows are at
        different tokens. `push`, with `added` [B, 1, d], is added to the output of its block.
        """
        positions = (start_B + step)[:, None]
        segment = Segment(self.lm.embed(token_B[:, None]), positions, jnp.ones_like(positions, bool))
        hidden, generated_caches = self.lm.decode(segment, contexts, generated_caches, step, weights, push)
        return self.lm.logits(hidden[:, 0]), generated_caches

    def likeliest(self, ids_BxT: jax.Array, mask_BxT: jax.Array, column_BxP: jax.Array, count: int) -> jax.Array:
        """Returns the ids [B, P, count] int32 of the likeliest tokens after P columns of each row, likeliest first."""
        (hidden,), _ = self.lm.run((self.lm.padded(ids_BxT, mask_BxT),))
        logits_BxPxV = self.lm.logits(jnp.take_along_axis(hidden, column_BxP[..., None], axis=1))
        return jax.lax.top_k(logits_BxPxV, count)[1].astype(jnp.int32)

    def empty_caches(self, start_B: jax.Array, capacity: int, dtype: jnp.dtype) -> KeyValues:
        """Returns empty caches with room for `capacity` tokens after prompts of `start_B` tokens."""
        return empty_caches(self.arch, start_B, capacity, dtype)


def jitted_reader(arch: Arch, config: Config, mesh: Mesh, num_next: int) -> Any:
    """Compiles `Subject.read` as `(base, ids, mask, rows, columns) -> (activations, likeliest next tokens)`.

    The results' rows are split over the mesh: each process writes the rows that its devices hold.
    """
    subject, layer = Subject(arch, config.attention), config.subject.layer

    @partial(jax.jit, out_shardings=batch_sharding(mesh))
    def read(base: dict[str, Any], ids: jax.Array, mask: jax.Array, rows: jax.Array, columns: jax.Array) -> Any:
        return subject.apply({"params": {"lm": base}}, ids, mask, rows, columns, layer, num_next, method="read")

    return read
