"""The encoder: a copy of the subject that reads an activation as one input embedding and writes its explanation."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nlae_jax.lm.arch import Arch
from nlae_jax.lm.head import LossOf
from nlae_jax.lm.segments import KeyValues, empty_caches
from nlae_jax.lm.transformer import BlockWeights, Segment, Transformer, key_values
from nlae_jax.roles.protocol import Protocol


def inject(h: jax.Array, scale: float) -> jax.Array:
    """Scales activations to L2 norm `scale`, `h · scale / ‖h‖`: [..., d] -> [..., d] float32.

    The norm is computed in float32. The zero vector stays zero. A `scale` of 0 leaves `h` as it is.
    """
    h = h.astype(jnp.float32)
    if scale == 0:
        return h
    norm = jnp.linalg.norm(h, axis=-1, keepdims=True)
    return jnp.where(norm > 0, h * (scale / jnp.maximum(norm, 1e-30)), 0.0)


class Encoder(nn.Module):
    """Reads one activation in the slot of its prompt and writes an explanation.

    Variables: `params/lm` (the base or its fine-tuned copy) and, with LoRA, `lora/lm`.
    """

    arch: Arch
    protocol: Protocol
    lora_scale: float = 1.0
    remat: str = "linear"
    attention: str = "auto"

    def setup(self) -> None:
        self.lm = Transformer(self.arch, self.lora_scale, self.remat, self.attention)

    def prompt_segments(self, h_BxD: jax.Array) -> tuple[Segment, Segment]:
        """Returns the prompt's constant prefix [P], and each activation's slot with the prompt's tail [B, 1 + S]."""
        prefix = jnp.asarray(self.protocol.encoder_prefix, jnp.int32)
        tail = jnp.asarray(self.protocol.encoder_tail, jnp.int32)
        x_P = self.lm.embed(prefix)
        slot = inject(h_BxD, self.protocol.injection_scale).astype(x_P.dtype)[:, None]
        tail_x = jnp.broadcast_to(self.lm.embed(tail), (h_BxD.shape[0], len(tail), x_P.shape[-1]))
        x_BxA = jnp.concatenate([slot, tail_x], axis=1)
        return _segment(x_P, 0), _segment(x_BxA, len(prefix))

    def log_probs(self, h_BxD: jax.Array, response_BxGxR: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the teacher-forced log-probs and entropies of responses, each [B, G, R] float32.

        The prompt is computed once per step and once per activation, whatever G is. Responses are padded on the
        right; what follows a response's end has no influence on what precedes it.
        """
        return self.lm.token_log_probs(self._predicting(h_BxD, response_BxGxR), response_BxGxR)

    def loss(
        self, h_BxD: jax.Array, response_BxGxR: jax.Array, loss_of: LossOf, *extras_BxGxR: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns `loss_of(log_probs, *extras)` summed over the responses' tokens, and the results of `log_probs`."""
        return self.lm.token_loss(self._predicting(h_BxD, response_BxGxR), response_BxGxR, loss_of, *extras_BxGxR)

    def sft_loss(
        self, h_BxD: jax.Array, response_BxR: jax.Array, loss_of: LossOf, *extras_BxT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the loss and the log-probs [B, T] float32 of the opening tag and one response per activation.

        T = O + R: the O tokens of the opening tag, then the response's R.
        """
        hidden_BxA, hidden = self._hidden(h_BxD, response_BxR[:, None])
        opening_length = self.protocol.opening_length
        opening = jnp.asarray(self.protocol.encoder_tail[-opening_length:], jnp.int32)
        # Tail positions -O-1 … -2 predict the opening tag, -1 the response's first token.
        predicting = jnp.concatenate([hidden_BxA[:, -opening_length - 1 :], hidden[:, 0, :-1]], axis=1)
        openings = jnp.broadcast_to(opening, (response_BxR.shape[0], opening_length))
        targets = jnp.concatenate([openings, response_BxR], axis=1)
        loss, (log_probs, _) = self.lm.token_loss(predicting, targets, loss_of, *extras_BxT)
        return loss, log_probs

    def _predicting(self, h_BxD: jax.Array, response_BxGxR: jax.Array) -> jax.Array:
        """Returns the residual stream [B, G, R, d] that predicts each token of the responses."""
        hidden_BxA, hidden_BxGxR = self._hidden(h_BxD, response_BxGxR)
        batch, group, _ = response_BxGxR.shape
        last = jnp.broadcast_to(hidden_BxA[:, None, -1:], (batch, group, 1, hidden_BxA.shape[-1]))
        return jnp.concatenate([last, hidden_BxGxR[:, :, :-1]], axis=2)

    def _hidden(self, h_BxD: jax.Array, response_BxGxR: jax.Array) -> tuple[jax.Array, jax.Array]:
        prefix, act = self.prompt_segments(h_BxD)
        response = _segment(self.lm.embed(response_BxGxR), self.prompt_length)
        (_, hidden_BxA, hidden_BxGxR), _ = self.lm.run((prefix, act, response))
        return hidden_BxA, hidden_BxGxR

    def prefill(self, h_BxD: jax.Array) -> tuple[jax.Array, tuple[KeyValues, ...]]:
        """Returns logits [B, V] of the first sampled token, and the keys and values of the prompt's two segments.

        Keys and values are stacked over blocks.
        """
        segments = self.prompt_segments(h_BxD)
        (_, hidden_BxA), caches = self.lm.run(segments, keep_caches=True)
        return self.lm.logits(hidden_BxA[:, -1]), key_values(caches, segments)

    def decode(
        self,
        token_BxG: jax.Array,
        step: jax.Array,
        contexts: Any,
        response_caches: Any,
        weights: list[BlockWeights] | None = None,
    ) -> tuple[jax.Array, Any]:
        """Reads response token number `step`. Returns the logits [B, G, V] of the next token, and the extended caches.

        `step` is a scalar, or [B] with G = 1 if the activations' responses are at different tokens.
        `contexts`, `response_caches` and `weights` come from `transformer.for_decoding`.
        """
        positions = jnp.full((*token_BxG.shape, 1), self.prompt_length, jnp.int32) + jnp.reshape(step, (-1, 1, 1))
        segment = Segment(self.lm.embed(token_BxG[..., None]), positions, jnp.ones_like(positions, bool))
        hidden, response_caches = self.lm.decode(segment, contexts, response_caches, step, weights)
        return self.lm.logits(hidden[:, :, 0]), response_caches

    def empty_caches(self, batch: tuple[int, ...], capacity: int, dtype: Any) -> KeyValues:
        """Returns empty caches with room for `capacity` response tokens in every block."""
        return empty_caches(self.arch, jnp.full(batch, self.prompt_length, jnp.int32), capacity, dtype)

    @property
    def prompt_length(self) -> int:
        return len(self.protocol.encoder_prefix) + 1 + len(self.protocol.encoder_tail)


def _segment(x: jax.Array, start: int) -> Segment:
    positions = jnp.broadcast_to(start + jnp.arange(x.shape[-2], dtype=jnp.int32), x.shape[:-1])
    return Segment(x, positions, jnp.ones(x.shape[:-1], bool))
