"""Makes controls for explanations: vectors and texts that explanations should do better than.

They carry nothing about an activation, or only what is easy to say.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from nlae_jax.roles import direction


def scaled(v: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Returns the vectors `v` [N, d], each scaled to the L2 norm of its row of `h` [N, d]: [N, d] float32.

    A vector of zeros stays zero.
    """
    wanted = np.linalg.norm(h, axis=-1, keepdims=True)
    present = np.linalg.norm(v, axis=-1, keepdims=True)
    return np.asarray(v * (wanted / np.maximum(present, 1e-30)), np.float32)


def mean_vector(h: np.ndarray) -> np.ndarray:
    """Returns the mean direction of `h` [N, d] in every row, scaled to the norm of the row's activation.

    The result is [N, d] float32.
    """
    mean = np.asarray(direction.unit_direction(h), np.float64).mean(0)
    return scaled(np.broadcast_to(mean, h.shape), h)


def isotropic_error(h: np.ndarray, rebuilt: np.ndarray, seed: int) -> np.ndarray:
    """Turns each activation, in a random direction, by the angle between it and its reconstruction.

    `h` and `rebuilt` are [N, d]. The result is [N, d] float32, with the norms of `h`. It shows what reconstructions
    would do to the model if the directions of their errors were random.
    """
    h = np.asarray(h, np.float64)  # in float32 the cosine of a small angle rounds to 1
    unit = h / np.maximum(np.linalg.norm(h, axis=-1, keepdims=True), 1e-30)
    rebuilt_unit = rebuilt / np.maximum(np.linalg.norm(rebuilt, axis=-1, keepdims=True), 1e-30)
    cos = np.clip((unit * rebuilt_unit).sum(-1, keepdims=True), -1, 1)
    noise = np.random.default_rng(seed).standard_normal(h.shape)
    noise -= (noise * unit).sum(-1, keepdims=True) * unit
    noise /= np.maximum(np.linalg.norm(noise, axis=-1, keepdims=True), 1e-30)
    return scaled(cos * unit + np.sqrt(1 - np.square(cos)) * noise, h)


def last_words(tokenizer: Any, context: str, tokens: int) -> str:
    """Returns the last words of the context, as many whole words as `tokens` tokens hold, and at least one word."""
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
    """Returns the first `count` of the `ranked` next tokens as a list of quotations, without tokens of white space.

    The text carries only what the subject's logits show.
    """
    shown = [token.strip() for token in ranked[:count]]
    return ", ".join(f'"{token}"' for token in shown if token)
