"""A pair whose words are known: each planted direction has a word, which encoder and decoder exchange for it.

What is explained by such a pair is known beforehand, so measures can be held against the truth. A plugin: a test module
says `pytest_plugins = ["tests.planted"]` and asks for `planted`.
"""

from __future__ import annotations

import numpy as np
import pytest

from nlae_jax.explore.explainer import Explainer, Written
from nlae_jax.explore.statistics import statistics_of

WORDS = ("list", "array", "string", "number", "function", "values")
LENGTH = 10.0  # of a planted part


class Reader:
    """A subject that expects the tokens that it has read already, so that an explanation with its words prepares it."""

    def __init__(self, lm):
        self._lm = lm
        self.arch, self.tokenizer, self.params, self.stop_ids = lm.arch, lm.tokenizer, lm.params, lm.stop_ids

    def __getattr__(self, name):
        return getattr(self._lm, name)

    def steer(self, prompts, added, layer, max_new_tokens, temperature=1.0, seed=0, later=None):
        """Whoever pushes along a planted direction hears its word."""
        pushes = [push.sum(0) for push in added]
        cos = [self.planted @ push / max(np.linalg.norm(push), 1e-9) for push in pushes]
        said = [[word for word, c in zip(WORDS, row, strict=True) if c > 0.5] for row in cos]
        return [self.tokenizer.encode(" ".join(["the of the", *words])) for words in said]

    def log_probs(self, ids, mask=None):
        seen = [[-1.0 if row[t] in row[:t] else -5.0 for t in range(1, len(row))] for row in np.asarray(ids).tolist()]
        return np.array(seen)


class Planted(Explainer):
    """Activations are a mean, plus the direction of the token's word if it has one, plus noise."""

    identity = "planted"

    def __init__(self, lm, seed=0, base_name="planted"):
        rng = np.random.default_rng(seed)
        self.tokenizer, self.layer, self.max_new_tokens, self.name = lm.tokenizer, 1, 40, "planted"
        self._base_name, self._lm, self.run_texts = base_name, Reader(lm), lambda count: ()
        self.adapter, width = None, lm.arch.d_model
        self.words = np.linalg.qr(rng.standard_normal((width, len(WORDS))))[0].T
        self._lm.planted = self.words
        self._mean = 6 * rng.standard_normal(width) / np.sqrt(width)
        noise = self._mean + 0.3 * rng.standard_normal((500, width)) + LENGTH * self.words[rng.integers(6, size=500)]
        self._known = statistics_of(noise.astype(np.float32), "planted")

    @property
    def subject(self):
        return self._lm

    @property
    def statistics(self):
        return self._known

    @property
    def rebuilds(self):
        return self._base_name, self.layer

    @property
    def d_model(self):
        return self.words.shape[1]

    def direction(self, word):
        return self.words[WORDS.index(word)]

    def write(self, vectors, temperature=0.0, max_new_tokens=None, seed=0):
        change = np.asarray(vectors) - self._known.mean
        cos = (change / np.maximum(np.linalg.norm(change, axis=1, keepdims=True), 1e-9)) @ self.words.T
        found = [[word for word, c in zip(WORDS, row, strict=True) if c > 0.5] for row in cos]
        return [Written(f"it is about {' and '.join(words)}" if words else "nothing much", True) for words in found]

    def rebuild(self, texts):
        parts = [sum((self.direction(word) for word in WORDS if word in text.split()), np.zeros(1)) for text in texts]
        return np.stack([self._known.mean + LENGTH * part for part in parts]).astype(np.float32)

    def read(self, passages):
        rng = np.random.default_rng(1)  # the same whatever was read before

        def h(token):
            planted = [self.direction(word) for word in WORDS if token.text.strip() == word]
            noise = 0.3 * rng.standard_normal(self.d_model)
            return (self._mean + noise + LENGTH * sum(planted, np.zeros(1))).astype(np.float32)

        return [np.stack([h(token) for token in passage.tokens]) for passage in passages]


@pytest.fixture(scope="session")
def planted(tiny_lm):
    return Planted(tiny_lm)


@pytest.fixture(scope="session")
def planted_texts(tmp_path_factory):
    """A corpus in which every word has texts of its own."""
    rng = np.random.default_rng(0)
    small = ["the", "of", "to", "in", "is", "that", "for", "with"]
    lines = []
    for number in range(48):
        words = rng.choice(small, 24).tolist()
        words[8] = words[16] = WORDS[number % len(WORDS)]
        lines.append(" ".join(words) + ".")
    path = tmp_path_factory.mktemp("planted") / "texts.jsonl"
    path.write_text("".join(f'{{"text": "{line} {n}"}}\n' for n, line in enumerate(lines)))
    return path
