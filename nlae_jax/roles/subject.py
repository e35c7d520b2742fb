"""The subject: the language model being explained. Frozen; its residual stream is read."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nlae_jax.config import Config
from nlae_jax.lm.arch import Arch
from nlae_jax.lm.segments import KeyValues, empty_caches
from nlae_jax.lm.transformer import BlockWeights, Segment, Transformer, key_values
from nlae_jax.mesh import batch_sharding


class Subject(nn.Module):
    """Variables: `params/lm`."""

    arch: Arch
    attention: str = "auto"

    def setup(self) -> None:
        self.lm = Transformer(self.arch, attention=self.attention)

    def logits(self, ids_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        """[B, T] -> [B, T, V] float32."""
        return self.lm(ids_BxT, mask_BxT)

    def residual(self, ids_BxT: jax.Array, mask_BxT: jax.Array, layer: int) -> jax.Array:
        """Output of block `layer` after its residual add: [B, T, d]. Later blocks are not run."""
        (hidden,), _ = self.lm.run((self.lm.padded(ids_BxT, mask_BxT),), stop=layer + 1)
        return hidden

    def read(
        self, ids_BxT: jax.Array, mask_BxT: jax.Array, rows: jax.Array, columns: jax.Array, layer: int, num_next: int
    ) -> tuple[jax.Array, jax.Array]:
        """Activations [M, d] float32 at (rows, columns), and the ids [M, num_next] of the likeliest next tokens.

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

    def neurons(self, ids_BxT: jax.Array, mask_BxT: jax.Array, layer: int) -> jax.Array:
        """Activations of the MLP's neurons in block `layer`, [B, T, d_ff]: what its down-projection reads."""
        return self.lm.neurons(self.lm.padded(ids_BxT, mask_BxT), layer)

    def log_probs(self, ids_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        """log p of every token after the first, given those before it: [B, T - 1] float32; any number at padding."""
        (hidden,), _ = self.lm.run((self.lm.padded(ids_BxT, mask_BxT),))
        return self.lm.token_log_probs(hidden[:, :-1], ids_BxT[:, 1:])[0]

    def prefill(self, ids_BxT: jax.Array, mask_BxT: jax.Array) -> tuple[jax.Array, tuple[KeyValues, ...]]:
        """Logits [B, V] after each row's last real token, and the prompts' keys and values, stacked over blocks."""
        segment = self.lm.padded(ids_BxT, mask_BxT)
        (hidden,), caches = self.lm.run((segment,), keep_caches=True)
        return self._after_last(hidden, mask_BxT), key_values(caches, (segment,))

    def steered_prefill(
        self, ids_BxT: jax.Array, mask_BxT: jax.Array, added_BxTxD: jax.Array, layer: int
    ) -> tuple[jax.Array, tuple[KeyValues, ...]]:
        """The same with something added to the output of block `layer`."""
        segment = self.lm.padded(ids_BxT, mask_BxT)
        (hidden,), low = self.lm.run((segment,), stop=layer + 1, keep_caches=True)
        changed = segment._replace(x=hidden + added_BxTxD.astype(hidden.dtype))
        (hidden,), high = self.lm.run((changed,), start=layer + 1, keep_caches=True)
        caches = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), low, high)
        return self._after_last(hidden, mask_BxT), key_values(caches, (segment,))

    def _after_last(self, hidden_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
        """Logits [B, V] after each row's last real token."""
        last = mask_BxT.shape[1] - 1 - jnp.argmax(mask_BxT[:, ::-1], axis=1)
        return self.lm.logits(jnp.take_along_axis(hidden_BxTxD, last[:, None, None], axis=1)[:, 0])

    def decode(
        self,
        token_B: jax.Array,
        step: jax.Array,
        start_B: jax.Array,
        contexts: Any,
        own: Any,
        weights: list[BlockWeights] | None = None,
    ) -> tuple[jax.Array, Any]:
        """Feeds generated token number `step` of rows whose prompts have `start` tokens; returns the next logits.

        `step` is a scalar, or [B] where rows are at different tokens.
        """
        positions = (start_B + step)[:, None]
        segment = Segment(self.lm.embed(token_B[:, None]), positions, jnp.ones_like(positions, bool))
        hidden, own = self.lm.decode(segment, contexts, own, step, weights)
        return self.lm.logits(hidden[:, 0]), own

    def empty_caches(self, start_B: jax.Array, capacity: int, dtype: jnp.dtype) -> KeyValues:
        """Room for `capacity` tokens after prompts of `start` tokens."""
        return empty_caches(self.arch, start_B, capacity, dtype)


def jitted_reader(arch: Arch, config: Config, mesh: Mesh, num_next: int) -> Any:
    """`(base, ids, mask, rows, columns) -> (activations, likeliest next tokens)`; see `Subject.read`.

    The results' rows are split over the mesh, to be written by the processes that hold them.
    """
    subject, layer = Subject(arch, config.attention), config.subject.layer

    @partial(jax.jit, out_shardings=batch_sharding(mesh))
    def read(base: dict[str, Any], ids: jax.Array, mask: jax.Array, rows: jax.Array, columns: jax.Array) -> Any:
        return subject.apply({"params": {"lm": base}}, ids, mask, rows, columns, layer, num_next, method="read")

    return read
