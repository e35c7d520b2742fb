"""Samples explanations of activations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nlae_jax.lm.modules import apply
from nlae_jax.lm.sampling import Samples, sample
from nlae_jax.lm.transformer import for_decoding
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
    batch = (h_BxD.shape[0], samples_per_activation)
    with jax.named_scope("prefill"):
        logits, contexts = apply(encoder, variables, h_BxD, method="prefill")
    grown = encoder.empty_caches(batch, max_new_tokens, contexts[0].k.dtype)
    decoding = for_decoding(encoder, variables, contexts, grown)

    def decode(token: jax.Array, step: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
        cached = decoding.contexts, caches, decoding.weights
        logits_and_caches: tuple[jax.Array, Any] = apply(
            encoder, decoding.variables, token, step, *cached, method="decode"
        )
        return logits_and_caches

    with jax.named_scope("decode"):
        return sample(
            decode,
            jnp.broadcast_to(logits[:, None], (*batch, logits.shape[-1])),
            decoding.own,
            key,
            max_new_tokens=max_new_tokens,
            closing=protocol.closing,
            eos_id=protocol.eos_id,
            temperature=temperature,
        )
