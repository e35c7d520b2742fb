"""Encoders and decoders whose faults are known, for the suite to find.

Each is a `Pairing` on real activations of a real (tiny) model. A decoder is a table from text to vector, or a rule.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from nlae_jax.data.corpus import Document
from nlae_jax.evaluate.reconstruction import direction_mse
from nlae_jax.evaluate.rows import EvaluatedRows, rows_of_documents
from nlae_jax.evaluate.work import Pairing, Sizes
from nlae_jax.lm.tokens import pad
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.roundtrip import Explanations

SIZES = Sizes(text=40, sampled=12, samples=4, suffix=6, judged=16)
WORDS = [
    f"{stem}{end}" for stem in ("moon", "river", "stone", "lamp", "horse") for end in ("", "s", "ly", "less", "man")
]


def documents(count: int = 20, length: int = 90, kinds: int = 2) -> list[tuple[str, Document]]:
    """Texts of few words in random order: what one of them says, the others do not."""
    rng = random.Random(0)
    texts = [" ".join(rng.choice(WORDS) for _ in range(length)) for _ in range(count)]
    return [(f"kind {i % kinds}", Document(f"{i:016}", text)) for i, text in enumerate(texts)]


def planted_rows(lm: LanguageModel, count: int = 40) -> EvaluatedRows:
    return rows_of_documents(lm, 0, documents(), count, 0)


Write = Callable[[int, int], str]  # row, sample number -> explanation
Read = Callable[[str], np.ndarray]  # explanation -> vector [d]


def planted(lm: LanguageModel, rows: EvaluatedRows, write: Write, read: Read, name: str) -> Pairing:
    """`write` is asked by the row whose activation is nearest to the vector: it may use that or not."""
    calls = {"number": 0}

    def explain(vectors: np.ndarray, seed: int) -> Explanations:
        del seed
        texts = []
        for vector in vectors:
            row = int(np.argmin(direction_mse(rows.h, np.broadcast_to(vector, rows.h.shape))))
            calls["number"] += 1
            texts.append(write(row, calls["number"]))
        encoded = [lm.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        ids, length = pad(encoded, max(map(len, encoded)))
        return Explanations(texts, texts, ids, length, np.zeros(len(texts), bool))

    def reconstruct(texts: Sequence[str]) -> np.ndarray:
        return np.stack([read(text) for text in texts]).astype(np.float32)

    return Pairing(
        explain=explain,
        reconstruct_ids=lambda ids, length: reconstruct(
            [lm.tokenizer.decode(row[:n].tolist()) for row, n in zip(ids, length, strict=True)]
        ),
        reconstruct_texts=reconstruct,
        subject=lambda: lm,
        layer=0,
        tokenizer=lm.tokenizer,
        marker="§",
        batch_size=8,
        identity=name,
    )
