"""Turns texts into the token ids that a model reads, and checks that the model has an embedding for each id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted

_PROBES = ("x", "the text")


def begin_ids(tokenizer: Any) -> list[int]:
    """Returns the tokens that the tokenizer puts before every text: a beginning of sequence, or none."""
    for probe in _PROBES:
        bare, whole = tokenizer.encode(probe, add_special_tokens=False), tokenizer.encode(probe)
        for start in range(len(whole) - len(bare) + 1 if bare else 0):
            if whole[start : start + len(bare)] == bare:
                return whole[:start]
    return []


def text_ids(tokenizer: Any, text: str, begin: list[int] | None = None) -> list[int]:
    """Returns the ids of a text with the tokenizer's beginning tokens once before it, and with nothing after it.

    `begin` is the result of `begin_ids`; pass it where many texts are read. Text that a chat template has written may
    begin with those tokens already, maybe after white space: they are not added again. An end of sequence, which some
    tokenizers add, is left out, because no text goes on after it.
    """
    begin = begin_ids(tokenizer) if begin is None else begin
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not begin:
        return ids
    if text[:1].isspace():
        bare = tokenizer.encode(text.lstrip(), add_special_tokens=False)
        ids = bare if bare[:1] and bare[0] in begin else ids
    first = next((index for index, token in enumerate(ids) if token not in begin), len(ids))
    return [*begin, *ids[first:]]


def known_text_ids(tokenizer: Any, text: str, vocab_size: int) -> list[int]:
    """Returns `text_ids` without tokens that a model of `vocab_size` embeddings lacks.

    Use it for texts that a model sampled. Such a text may spell an added token that the model has no embedding for.
    """
    return [token for token in text_ids(tokenizer, text) if token < vocab_size]


def check_ids(ids: Any, vocab_size: int, tokenizer: Any, where: str) -> None:
    """Raises UserError that names the first token without an embedding in a model of `vocab_size` embeddings.

    `where` begins the message. Without this check JAX reads the last embedding for an id that is too large, and counts
    from the end for a negative one.
    """
    ids = np.asarray(ids)
    if ids.size and ids.dtype.kind not in "iu":
        raise UserError(f"{where}: token ids should be whole numbers; they are {ids.dtype}")
    if not (wrong := ids[(ids < 0) | (ids >= vocab_size)]).size:
        return
    token = int(wrong.flat[0])
    name = f"the token {quoted(tokenizer.convert_ids_to_tokens(token))}" if 0 <= token < len(tokenizer) else "a token"
    raise UserError(f"{where}: {name} has id {token}; the model has embeddings for ids 0 to {vocab_size - 1}")


def pad(sequences: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads token ids with 0 on the right. Returns them, [N, width] int32, and their lengths, [N] int32."""
    ids = np.zeros((len(sequences), width), np.int32)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
    return ids, np.array([len(sequence) for sequence in sequences], np.int32)


def padded_width(length: int) -> int:
    """Returns the width that `length` tokens are padded to: 16, 32 or a multiple of 64, so that few are compiled."""
    return next((width for width in (16, 32) if length <= width), -(-length // 64) * 64)


def width_within(width: int, length: int, most: int, others: int = 0) -> int:
    """Returns the `width` that `length` tokens are padded to, or less where a model cannot be run on so many tokens.

    `most` is the model's `Arch.most_tokens`; `others` counts the tokens that it reads in the same sequence. The result
    holds the `length` tokens also where they are too many, so that the model refuses them by their number.
    """
    return max(length, min(width, most - others)) if most else width


def pad_left(sequences: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads token ids with 0 on the left. Returns them, [N, width] int32, and which are tokens, [N, width] bool."""
    ids, mask = np.zeros((len(sequences), width), np.int32), np.zeros((len(sequences), width), bool)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :], mask[row, width - len(sequence) :] = sequence, True
    return ids, mask
