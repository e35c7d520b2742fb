"""Makes the encoder and the subject programs of `tables`: how a row begins, and how a token is fed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.pair import Pair, Roles
from nlae_jax.roles.subject import Subject
from nlae_jax.serve.tables import Program


def encoder_program(roles: Roles, pair: Pair) -> Program:
    """Makes the program of explanations. A row's source is an activation [d] float32."""
    encoder = roles.encoder

    def prefill(variables: Any, h_BxD: jax.Array) -> tuple[jax.Array, Any]:
        return encoder.apply(variables, h_BxD, method="prefill")

    def caches(h_BxD: jax.Array, capacity: int, dtype: Any) -> Any:
        return encoder.empty_caches((h_BxD.shape[0], 1), capacity, dtype)

    def decode(variables: Any, weights: Any, token: jax.Array, step: jax.Array, contexts: Any, grown: Any) -> Any:
        logits, grown = encoder.apply(variables, token[:, None], step, contexts, grown, weights, method="decode")
        return logits[:, 0], grown

    protocol = encoder.protocol
    variables = roles.encoder_variables(pair.base, pair.encoder)
    return Program(encoder, variables, prefill, caches, decode, protocol.closing, (protocol.eos_id,))


def subject_program(subject: LanguageModel) -> Program:
    """Makes the program of completions. A row's source is a prompt's ids [T] int32 and mask [T] bool, padded left."""
    role = Subject(subject.arch)

    def prefill(variables: Any, source: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        return role.apply(variables, *source, method="prefill")

    def caches(source: tuple[jax.Array, jax.Array], capacity: int, dtype: Any) -> Any:
        return role.empty_caches(source[1].sum(-1).astype(jnp.int32), capacity, dtype)

    def decode(variables: Any, weights: Any, token: jax.Array, step: jax.Array, contexts: Any, grown: Any) -> Any:
        # A row's positions begin after its prompt. Its caches know that position.
        start = (grown[0] if isinstance(grown, list) else grown).positions[:, 0]
        return role.apply(variables, token, step, start, contexts, grown, weights, method="decode")

    variables = {"params": {"lm": subject.params}}
    return Program(role, variables, prefill, caches, decode, (), tuple(subject.stop_ids))
