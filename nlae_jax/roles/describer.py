"""The describer: a language model with adapters that reads a text and writes a note on it for the warm start.

The describer reads text and no activation, so one describer serves every subject.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nlae_jax.lm.arch import Arch
from nlae_jax.lm.head import LossOf
from nlae_jax.lm.transformer import Segment, Transformer

_TEXT_CHARACTERS = 600  # the describer reads this many characters at the end of a text
_BEFORE, _AFTER = "Text:\n", "\n\nNotes on the text up to its last word:\n"


class Describer(nn.Module):
    """Variables: `params/lm` (the base) and `lora/lm` (the adapters)."""

    arch: Arch
    lora_scale: float = 1.0
    remat: str = "linear"

    def setup(self) -> None:
        self.lm = Transformer(self.arch, self.lora_scale, self.remat)

    def loss(
        self,
        prompt_BxP: jax.Array,
        mask_BxP: jax.Array,
        note_BxR: jax.Array,
        loss_of: LossOf,
        *extras_BxR: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns `loss_of(log_probs, *extras)` summed over the notes' tokens, and their log-probs [B, R] float32.

        Prompts are padded on the left (`mask` False), notes on the right.
        """
        prompt = self.lm.padded(prompt_BxP, mask_BxP)
        positions = mask_BxP.sum(-1, keepdims=True).astype(jnp.int32) + jnp.arange(note_BxR.shape[1], dtype=jnp.int32)
        note = Segment(self.lm.embed(note_BxR), positions, jnp.ones(note_BxR.shape, bool))
        (hidden_BxP, hidden_BxR), _ = self.lm.run((prompt, note))
        predicting = jnp.concatenate([hidden_BxP[:, -1:], hidden_BxR[:, :-1]], axis=1)
        loss, (log_probs, _) = self.lm.token_loss(predicting, note_BxR, loss_of, *extras_BxR)
        return loss, log_probs


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of the describer's prompt: the end of the text, from the beginning of a word on."""
    end = text[-_TEXT_CHARACTERS:]
    if len(end) < len(text):
        end = end[end.find(" ") + 1 :]
    before, ending, after = (tokenizer.encode(part, add_special_tokens=False) for part in (_BEFORE, end, _AFTER))
    return [*before, *ending, *after]


def note_ids(tokenizer: Any, note: str) -> list[int]:
    """Returns the token ids that the describer learns to write: the note and the end of sequence."""
    return [*tokenizer.encode(note.strip(), add_special_tokens=False), tokenizer.eos_token_id]
