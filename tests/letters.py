"""Documents of letters, and a tokenizer with one token a letter, for tests of the index and of extraction."""

import dataclasses

import numpy as np

from nlae_jax.config import Config, ExtractConfig, SplitConfig
from nlae_jax.data.corpus import Document
from nlae_jax.data.index import make_index

SPECIAL = 7


class Letters:
    """A tokenizer: one token a character, and `|` is special."""

    all_special_ids = (SPECIAL,)

    def encode(self, text, add_special_tokens=True):
        return [SPECIAL if character == "|" else ord(character) for character in text]

    def convert_ids_to_tokens(self, token):
        return chr(token)

    def __len__(self):
        return 256


def documents(count, seed=0, longest=90):
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcdefgh|"), rng.integers(1, longest))) for _ in range(count)]
    return [Document(f"{number:016x}", text) for number, text in enumerate(texts)]


def config(seed=0, **extract):
    return dataclasses.replace(
        Config(),
        seed=seed,
        extract=ExtractConfig(**{"positions_per_document": 3, "min_position": 5, "max_tokens": 80, **extract}),
        split=SplitConfig(0.25, 0.25, 0.25, 0.25),
    )


def made(count=40, seed=0, **extract):
    settings = config(seed, **extract)
    return make_index(documents(count), Letters(), settings), settings


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
