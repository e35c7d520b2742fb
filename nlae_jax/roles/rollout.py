"""Samples explanations of activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nlae_jax.lm.block import BlockWeights
from nlae_jax.lm.modules import apply
from nlae_jax.lm.sampling import DecodeStep, Samples, sample
from nlae_jax.lm.transformer import Decoding, for_decoding
from nlae_jax.roles.encoder import Encoder
from nlae_jax.roles.pair import Params, Roles


def rollout(
    roles: Roles,
    trained: Params,
    frozen: Params,
    h_BxD: jax.Array,
    key: jax.Array,
    *,
    samples_per_activation: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Samples:
    """Samples G = `samples_per_activation` explanations of R = `max_new_tokens` tokens per activation: [B, G, R].

    The constant prefix is prefilled once, and the slot with the prompt's tail once per activation.
    """
    variables = roles.encoder_variables(frozen["base"], trained)
    protocol, encoder = roles.encoder.protocol, roles.encoder
    logits, decoding = prefilled(encoder, variables, h_BxD, samples_per_activation, max_new_tokens)
    with jax.named_scope("decode"):
        return sample(
            decode_step(encoder, decoding.variables, decoding.weights, decoding.contexts),
            logits,
            decoding.growing,
            key,
            max_new_tokens=max_new_tokens,
            closing=protocol.closing,
            eos_id=protocol.eos_id,
            temperature=temperature,
        )


def prefilled(
    encoder: Encoder, variables: Params, h_BxD: jax.Array, group: int, capacity: int
) -> tuple[jax.Array, Decoding]:
    """Reads the prompts of activations [B, d].

    Returns the logits [B, G, V] of the first tokens of G = `group` responses per activation, and what decoding them
    needs, with room for `capacity` tokens each.
    """
    batch = (h_BxD.shape[0], group)
    with jax.named_scope("prefill"):
        logits, contexts = apply(encoder, variables, h_BxD, method="prefill")
    grown = encoder.empty_caches(batch, capacity, contexts[0].k.dtype)
    decoding = for_decoding(encoder, variables, contexts, grown)
    return jnp.broadcast_to(logits[:, None], (*batch, logits.shape[-1])), decoding


def decode_step(
    encoder: Encoder, variables: Params, weights: Sequence[BlockWeights] | None, contexts: Any
) -> DecodeStep:
    """Returns the function that feeds one token to each response. Its arguments are fields of a `Decoding`."""

    def decode(token: jax.Array, step: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
        logits_and_caches: tuple[jax.Array, Any] = apply(
            encoder, variables, token, step, contexts, caches, weights, method="decode"
        )
        return logits_and_caches

    return decode
