"""Contexts to look for examples in: tokens of many passages with their activations, read once for any direction."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nlae_jax.config import CorpusConfig
from nlae_jax.data.corpus import read_named_documents
from nlae_jax.explore.explainer import Explainer, package_texts, read_batches
from nlae_jax.explore.passage import Passage, passage_of_ids, read_text
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.progress import progress

_AROUND = 16  # tokens of a context shown before its token; a quarter as many after it


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """`passages` as the subject reads them, and `h_NxD`, the activations of all their tokens but the first of each.

    `passage` and `position` [N] say which token a row is. `source`: where the passages come from.
    """

    passages: list[Passage]
    h_NxD: np.ndarray
    passage: np.ndarray
    position: np.ndarray
    source: str

    def digest(self) -> str:
        """Tells these passages from any others, wherever they come from."""
        ids = [passage.ids for passage in self.passages]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    def around(self, row: int) -> tuple[str, str, str]:
        """The text before a row's token, the token, and what follows it."""
        passage, position = self.passages[self.passage[row]], int(self.position[row])
        before = passage.shown(max(0, position - _AROUND), position)
        return before, passage.tokens[position].text, passage.shown(position + 1, position + 1 + _AROUND // 4)

    def window(self, row: int) -> list[int]:
        """The ids up to and including a row's token, no more than can be shown."""
        ids, position = self.passages[self.passage[row]].ids, int(self.position[row])
        return ids[max(0, position - _AROUND) : position + 1]

    def apart(self, order: Iterable[int], count: int, passages: int = 2) -> list[int]:
        """The first `count` rows in this order, at most so many of one passage and none next to another."""
        chosen: list[int] = []
        for row in order:
            same = [other for other in chosen if self.passage[other] == self.passage[row]]
            if len(same) < passages and all(abs(self.position[other] - self.position[row]) > 2 for other in same):
                chosen.append(int(row))
            if len(chosen) == count:
                break
        return chosen


def read_corpus(nla: Explainer, path: Path | None = None, texts: int = 128, tokens: int = 64) -> Corpus:
    """The first `tokens` tokens of `texts` texts: of a file, else of the run's corpus, else of the package's texts.

    Raises UserError where the file has none.
    """
    vocab_size = nla.subject.arch.vocab_size
    if path is not None:
        config = CorpusConfig(path=str(path), max_documents=texts, min_characters=1)
        documents = read_named_documents(config, "--corpus")
        passages = [read_text(nla.tokenizer, vocab_size, document.text, document.doc_id) for document in documents]
        source = str(path)
    elif of_run := nla.run_texts(texts):
        cut = [list(map(int, ids[:tokens])) for ids in of_run]
        passages = [passage_of_ids(nla.tokenizer, ids, nla.tokenizer.decode(ids), "text") for ids in cut]
        source = "the run's corpus"
    else:
        passages = [read_text(nla.tokenizer, vocab_size, text) for text in package_texts(texts)]
        source = "texts that come with the package"
    passages = [dataclasses.replace(passage, tokens=passage.tokens[:tokens]) for passage in passages]
    passages = [passage for passage in passages if len(passage.tokens) > 1]
    if not passages:
        raise UserError(f"{source}: no text of two tokens in it")
    read = nla.read(passages)
    passage = np.concatenate([np.full(len(h) - 1, number) for number, h in enumerate(read)])
    position = np.concatenate([np.arange(1, len(h)) for h in read])
    return Corpus(passages, np.concatenate([h[1:] for h in read]), passage, position, source)


def neuron_values(nla: Explainer, corpus: Corpus, layer: int, keep: Callable[[np.ndarray], Any]) -> list[Any]:
    """`keep` of the activations [tokens, d_ff] of block `layer`'s neurons, for each passage without its first token."""
    read = lambda ids, mask: nla.subject.neurons(ids, layer, mask=mask)  # noqa: E731
    found: list[Any] = []
    with progress(len(corpus.passages), "neurons", unit="text") as bar:
        for start in range(0, len(corpus.passages), 16):
            some = [passage.ids for passage in corpus.passages[start : start + 16]]
            found += [keep(values[1:]) for values in read_batches(some, read)]
            bar.advance(len(some))
    return found
