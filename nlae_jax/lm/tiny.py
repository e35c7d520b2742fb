"""A random two-block model with its own tokenizer, in the HF layout, for tests and for experiments of seconds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nlae_jax.lm.arch import Arch
from nlae_jax.lm.families import hf_config
from nlae_jax.lm.transformer import random_params
from nlae_jax.lm.weights import save_params

# The text from which the tokenizer learns its merges: the tags, the slot's marker and common short words.
_TEXT = (
    "<explanation>\n</explanation>\n₂\n the of and to in is that it for as with on be at by this from or an are not "
    "Next comes a new line. The text is about. It ends with values returns function array list string number "
) * 8
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer() -> Tokenizer:
    """Trains a byte-level BPE tokenizer with a few hundred tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=448, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer


def write_tiny_model(directory: Path, seed: int = 0, **changes: Any) -> Arch:
    """Writes config.json, model.safetensors and the tokenizer's files. Returns the architecture.

    `changes` are fields of `Arch` that differ. Raises ValueError if the family cannot have them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    arch = Arch(
        vocab_size=-(-tokenizer.get_vocab_size() // 8) * 8,
        d_model=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        d_ff=128,
    )
    arch = dataclasses.replace(arch, **changes)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    params = jax.tree.map(np.asarray, random_params(jax.random.PRNGKey(seed), arch))
    save_params(directory, params, arch)
    (directory / "config.json").write_text(json.dumps(hf_config(arch), indent=1), encoding="utf-8")
    return arch
