"""From text to the token ids that a model reads, and whether it has an embedding for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted

_PROBES = ("x", "the text")


def begin_ids(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text: a beginning of sequence, or none."""
    for probe in _PROBES:
        bare, whole = tokenizer.encode(probe, add_special_tokens=False), tokenizer.encode(probe)
        for start in range(len(whole) - len(bare) + 1 if bare else 0):
            if whole[start : start + len(bare)] == bare:
                return whole[:start]
    return []


def text_ids(tokenizer: Any, text: str, begin: list[int] | None = None) -> list[int]:
    """A text as a model reads it: what the tokenizer puts before texts stands there once, and nothing after the text.

    `begin`: what `begin_ids` says, where many texts are read.

    Text that a chat template has made begins with those tokens already, maybe after white space. A tokenizer that also
    ends texts (with an end of sequence) would have the model read a last token that no text goes on from.
    """
    begin = begin_ids(tokenizer) if begin is None else begin
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not begin:
        return ids
    if text[:1].isspace():
        bare = tokenizer.encode(text.lstrip(), add_special_tokens=False)
        ids = bare if bare[:1] and bare[0] in begin else ids
    own = next((index for index, token in enumerate(ids) if token not in begin), len(ids))
    return [*begin, *ids[own:]]


def check_ids(ids: Any, vocab_size: int, tokenizer: Any, where: str) -> None:
    """Raises UserError naming the first token that a model of `vocab_size` embeddings lacks.

    `where` begins the message. JAX would take the last row for an id beyond the table, and count a negative one from
    the end.
    """
    ids = np.asarray(ids)
    if not (wrong := ids[(ids < 0) | (ids >= vocab_size)]).size:
        return
    token = int(wrong.flat[0])
    name = f"the token {quoted(tokenizer.convert_ids_to_tokens(token))}" if 0 <= token < len(tokenizer) else "a token"
    raise UserError(f"{where}: {name} has id {token}; the model has embeddings for ids 0 to {vocab_size - 1}")


def pad(sequences: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids padded with 0 on the right to [N, width] int32, and their lengths [N] int32."""
    ids = np.zeros((len(sequences), width), np.int32)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
    return ids, np.array([len(sequence) for sequence in sequences], np.int32)


def padded_width(length: int) -> int:
    """Returns the width that `length` tokens are padded to: 16, 32 or a multiple of 64, so that few are compiled."""
    return next((width for width in (16, 32) if length <= width), -(-length // 64) * 64)


def pad_left(sequences: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids padded with 0 on the left to [N, width] int32, and which of them are tokens, [N, width] bool."""
    ids, mask = np.zeros((len(sequences), width), np.int32), np.zeros((len(sequences), width), bool)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :], mask[row, width - len(sequence) :] = sequence, True
    return ids, mask
