"""The encoder and the subject as programs of `tables`: what begins a row, and how a token is fed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.pair import Pair, Roles
from nlae_jax.roles.subject import Subject
from nlae_jax.serve.tables import Program


def encoder_program(roles: Roles, pair: Pair) -> Program:
    """Explanations; a row's source is an activation [d] float32."""
    encoder = roles.encoder

    def prefill(variables: Any, h_BxD: jax.Array) -> tuple[jax.Array, Any]:
        return encoder.apply(variables, h_BxD, method="prefill")

    def caches(h_BxD: jax.Array, capacity: int, dtype: Any) -> Any:
        return encoder.empty_caches((h_BxD.shape[0], 1), capacity, dtype)

    def decode(variables: Any, weights: Any, token: jax.Array, step: jax.Array, contexts: Any, own: Any) -> Any:
        logits, own = encoder.apply(variables, token[:, None], step, contexts, own, weights, method="decode")
        return logits[:, 0], own

    protocol = encoder.protocol
    variables = roles.encoder_variables(pair.base, pair.encoder)
    return Program(encoder, variables, prefill, caches, decode, protocol.closing, (protocol.eos_id,))


def subject_program(subject: LanguageModel) -> Program:
    """Completions; a row's source is its prompt's ids and mask, [T] int32 and [T] bool, padded on the left."""
    role = Subject(subject.arch)

    def prefill(variables: Any, source: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        return role.apply(variables, *source, method="prefill")

    def caches(source: tuple[jax.Array, jax.Array], capacity: int, dtype: Any) -> Any:
        return role.empty_caches(source[1].sum(-1).astype(jnp.int32), capacity, dtype)

    def decode(variables: Any, weights: Any, token: jax.Array, step: jax.Array, contexts: Any, own: Any) -> Any:
        # The positions of what is written follow the prompt's; the room knows where they begin.
        start = (own[0] if isinstance(own, list) else own).positions[:, 0]
        return role.apply(variables, token, step, start, contexts, own, weights, method="decode")

    variables = {"params": {"lm": subject.params}}
    return Program(role, variables, prefill, caches, decode, (), tuple(subject.stop_ids))
