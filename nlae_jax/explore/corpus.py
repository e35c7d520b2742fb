"""A corpus of contexts to search for examples: the tokens of many passages with their activations.

The activations are read once and serve every direction.
"""

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

_AROUND = 16  # a context is shown with this many tokens before its token, and a quarter as many after it


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Passages as the subject reads them, and activations `h_NxD` of their tokens without each passage's first token.

    `passage` and `position` [N] identify the token of a row. `source` names the origin of the passages.
    """

    passages: list[Passage]
    h_NxD: np.ndarray
    passage: np.ndarray
    position: np.ndarray
    source: str

    def digest(self) -> str:
        """Returns a hash of the passages' token ids, which identifies them."""
        ids = [passage.ids for passage in self.passages]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    def around(self, row: int) -> tuple[str, str, str]:
        """Returns the text before a row's token, the token, and the text after it."""
        passage, position = self.passages[self.passage[row]], int(self.position[row])
        before = passage.shown(max(0, position - _AROUND), position)
        return before, passage.tokens[position].text, passage.shown(position + 1, position + 1 + _AROUND // 4)

    def window(self, row: int) -> list[int]:
        """Returns the last `_AROUND` token ids before a row's token, and that token's id."""
        ids, position = self.passages[self.passage[row]].ids, int(self.position[row])
        return ids[max(0, position - _AROUND) : position + 1]

    def spaced_rows(self, order: Iterable[int], count: int, per_passage: int = 2) -> list[int]:
        """Returns the first `count` rows of `order`: at most `per_passage` of a passage, and no two close together."""
        chosen: list[int] = []
        for row in order:
            same = [other for other in chosen if self.passage[other] == self.passage[row]]
            if len(same) < per_passage and all(abs(self.position[other] - self.position[row]) > 2 for other in same):
                chosen.append(int(row))
            if len(chosen) == count:
                break
        return chosen


def read_corpus(nla: Explainer, path: Path | None = None, texts: int = 128, tokens: int = 64) -> Corpus:
    """Reads the first `tokens` tokens of at most `texts` texts, or as many as the subject can be run on.

    The texts come from the file `path`. Without `path` they come from the run's corpus, or, if there is no run, from
    the package. Raises UserError if no text has two tokens.
    """
    vocab_size, tokens = nla.subject.arch.vocab_size, nla.subject.arch.within(tokens)
    if path is not None:
        config = CorpusConfig(path=str(path), max_documents=texts, min_characters=1)
        documents = read_named_documents(config, "--corpus")
        passages = [read_text(nla.tokenizer, vocab_size, document.text, document.doc_id) for document in documents]
        source = str(path)
    elif run_ids := nla.run_texts(texts):
        cut = [list(map(int, ids[:tokens])) for ids in run_ids]
        passages = [passage_of_ids(nla.tokenizer, ids, nla.tokenizer.decode(ids), "text") for ids in cut]
        source = "the run's corpus"
    else:
        passages = [read_text(nla.tokenizer, vocab_size, text) for text in package_texts(texts)]
        source = "texts that come with the package"
    passages = [dataclasses.replace(passage, tokens=passage.tokens[:tokens]) for passage in passages]
    passages = [passage for passage in passages if len(passage.tokens) > 1]
    if not passages:
        raise UserError(f"{source}: no text of two tokens in it")
    activations = nla.read(passages)
    passage = np.concatenate([np.full(len(h) - 1, number) for number, h in enumerate(activations)])
    position = np.concatenate([np.arange(1, len(h)) for h in activations])
    return Corpus(passages, np.concatenate([h[1:] for h in activations]), passage, position, source)


def neuron_values(nla: Explainer, corpus: Corpus, layer: int, keep: Callable[[np.ndarray], Any]) -> list[Any]:
    """Returns `keep(values)` for each passage. `values` [tokens, d_ff] are the activations of block `layer`'s neurons.

    `values` leaves out the passage's first token.
    """
    read = lambda ids, mask: nla.subject.neurons(ids, layer, mask=mask)  # noqa: E731
    results: list[Any] = []
    with progress(len(corpus.passages), "neurons", unit="text") as bar:
        for start in range(0, len(corpus.passages), 16):
            batch = [passage.ids for passage in corpus.passages[start : start + 16]]
            results += [keep(values[1:]) for values in read_batches(batch, read)]
            bar.advance(len(batch))
    return results
