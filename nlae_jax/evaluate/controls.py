"""What explanations are compared with: vectors and texts that say nothing, or only what is easy to say."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from nlae_jax.roles import direction


def scaled(v: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Vectors as long as the activations in whose place they are put: [N, d] x [N, d] -> [N, d] float32."""
    length = np.linalg.norm(h, axis=-1, keepdims=True)
    own = np.linalg.norm(v, axis=-1, keepdims=True)
    return np.asarray(v * (length / np.maximum(own, 1e-30)), np.float32)


def mean_vector(h: np.ndarray) -> np.ndarray:
    """The mean direction, in every row as long as its activation: [N, d] float32."""
    mean = np.asarray(direction.unit_direction(h), np.float64).mean(0)
    return scaled(np.broadcast_to(mean, h.shape), h)


def isotropic_error(h: np.ndarray, rebuilt: np.ndarray, seed: int) -> np.ndarray:
    """Activations turned by the angle between them and their reconstructions, each in a random direction.

    [N, d] float32 as long as `h`. What reconstructions would do if their errors were of no particular kind.
    """
    h = np.asarray(h, np.float64)  # of a small angle, float32 would leave the sine alone
    unit = h / np.maximum(np.linalg.norm(h, axis=-1, keepdims=True), 1e-30)
    other = rebuilt / np.maximum(np.linalg.norm(rebuilt, axis=-1, keepdims=True), 1e-30)
    cos = np.clip((unit * other).sum(-1, keepdims=True), -1, 1)
    noise = np.random.default_rng(seed).standard_normal(h.shape)
    noise -= (noise * unit).sum(-1, keepdims=True) * unit
    noise /= np.maximum(np.linalg.norm(noise, axis=-1, keepdims=True), 1e-30)
    return scaled(cos * unit + np.sqrt(1 - np.square(cos)) * noise, h)


def last_words(tokenizer: Any, context: str, tokens: int) -> str:
    """The end of the context, from a word's beginning on, in at most `tokens` tokens (one word at least)."""
    pieces = re.findall(r"\S+\s*", context[-20 * max(tokens, 1) :])
    if not pieces:
        return ""
    kept: str = pieces[-1]
    for piece in reversed(pieces[:-1]):
        if len(tokenizer.encode((piece + kept).strip(), add_special_tokens=False)) > tokens:
            break
        kept = piece + kept
    return kept.strip()


def next_tokens_text(ranked: list[str], count: int = 5) -> str:
    """The subject's likeliest next tokens as a list of quotations: what can be said of the logits alone."""
    shown = [token.strip() for token in ranked[:count]]
    return ", ".join(f'"{token}"' for token in shown if token)
