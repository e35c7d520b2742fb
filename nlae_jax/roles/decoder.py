"""The decoder: the subject's first K + 1 blocks and a linear head. It rebuilds an activation from text alone."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from nlae_jax.lm.arch import Arch
from nlae_jax.lm.products import einsum
from nlae_jax.lm.transformer import Segment, Transformer
from nlae_jax.roles.protocol import Endings, Protocol


class Decoder(nn.Module):
    """Runs blocks 0 … K without final norm and LM head, then applies `value_head` [d, d]: y = x @ value_head.

    The head starts as the identity. `arch` describes the weights that the module gets: it has more than K + 1 blocks
    where the decoder shares the subject's weights.
    Variables: `params/lm`, `params/value_head` and, with LoRA, `lora/lm`.
    """

    arch: Arch
    layer: int
    protocol: Protocol
    lora_scale: float = 1.0
    remat: str = "linear"
    attention: str = "auto"

    def setup(self) -> None:
        self.lm = Transformer(self.arch, self.lora_scale, self.remat, self.attention)
        self.value_head = self.param("value_head", lambda _: jnp.eye(self.arch.d_model, dtype=jnp.float32))

    def __call__(self, ids_NxT: jax.Array, length_N: jax.Array, endings: Endings | None = None) -> jax.Array:
        """Rebuilds activations [N, d] float32 from explanations: right-padded token ids [N, T] and their lengths [N].

        The prompt's constant prefix is computed once. The suffix follows each explanation's last token. With `endings`,
        that token and the suffix are replaced by the tokens that the tokenizer makes of both together.
        """
        prefix = jnp.asarray(self.protocol.decoder_prefix, jnp.int32)
        suffix = jnp.asarray(self.protocol.decoder_suffix, jnp.int32)
        if endings is None:
            ids, valid, last = place_suffix(ids_NxT, length_N, suffix)
        else:
            ids, valid, last = place_endings(ids_NxT, length_N, endings)
        start = len(prefix)
        positions = jnp.broadcast_to(start + jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        segments = [Segment(self.lm.embed(ids), positions, valid)]
        if start:
            positions = jnp.arange(start, dtype=jnp.int32)
            segments.insert(0, Segment(self.lm.embed(prefix), positions, jnp.ones((start,), bool)))
        (*_, hidden), _ = self.lm.run(segments, stop=self.layer + 1)
        return self.read(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])

    def from_prompts(self, ids_NxT: jax.Array, mask_NxT: jax.Array) -> jax.Array:
        """Rebuilds activations [N, d] float32 from whole decoder prompts: token ids [N, T], padded on either side."""
        (hidden,), _ = self.lm.run((self.lm.padded(ids_NxT, mask_NxT),), stop=self.layer + 1)
        last = ids_NxT.shape[1] - 1 - jnp.argmax(mask_NxT[:, ::-1], axis=1)
        return self.read(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])

    def read(self, x: jax.Array) -> jax.Array:
        """Applies the linear head to block K's output: [..., d] -> [..., d] float32."""
        return einsum("...i,io->...o", x.astype(jnp.float32), self.value_head)


def place_suffix(ids_NxT: jax.Array, length_N: jax.Array, suffix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Appends `suffix` [S] right after each row's `length` tokens.

    Returns the ids [N, T + S], a mask [N, T + S] bool of the real tokens, and the index [N] of each row's last token.
    """
    if len(suffix) == 0:
        return ids_NxT, jnp.arange(ids_NxT.shape[1]) < length_N[:, None], jnp.maximum(length_N - 1, 0)
    width = ids_NxT.shape[1] + len(suffix)
    column = jnp.arange(width)[None]
    ids = jnp.pad(ids_NxT, ((0, 0), (0, len(suffix))))
    within = column - length_N[:, None]
    in_suffix = (within >= 0) & (within < len(suffix))
    ids = jnp.where(in_suffix, suffix[jnp.clip(within, 0, len(suffix) - 1)], ids)
    return ids, column < (length_N + len(suffix))[:, None], length_N + len(suffix) - 1


def place_endings(ids_NxT: jax.Array, length_N: jax.Array, endings: Endings) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Does what `place_suffix` does, but takes each row's last token and the suffix from `endings`."""
    begin = jnp.maximum(length_N - 1, 0)
    last_token = jnp.take_along_axis(ids_NxT, begin[:, None], axis=1)[:, 0]
    ending, ending_length = endings.ids[last_token], endings.length[last_token]
    width = ending.shape[1]
    column = jnp.arange(ids_NxT.shape[1] + width - 1)[None]
    within = column - begin[:, None]
    in_ending = (within >= 0) & (within < ending_length[:, None])
    placed = jnp.take_along_axis(ending, jnp.clip(within, 0, width - 1), axis=1)
    ids = jnp.where(in_ending, placed, jnp.pad(ids_NxT, ((0, 0), (0, width - 1))))
    length = begin + ending_length
    return ids, column < length[:, None], length - 1
