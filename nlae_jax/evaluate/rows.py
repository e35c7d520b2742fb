"""What the suite is run on: activations with the texts they are of, from texts, from a parquet file or from a run."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nlae_jax.config import CorpusConfig
from nlae_jax.data.corpus import DOMAIN, Document, document_of, domain_of, read_documents, read_named_documents
from nlae_jax.data.parquet import check_batch, is_text, opened
from nlae_jax.interop.datasets import LAYER, TEXT, VECTOR, check_layers, read_doc_ids, read_vectors
from nlae_jax.lm.arch import Arch
from nlae_jax.lm.tokens import begin_ids, check_ids, pad, text_ids
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import encodable
from nlae_jax.runtime.progress import progress

SUFFIX = 32  # tokens after an activation that are kept: what a continuation is told by
_MAX_TOKENS = 512  # of a text; the rest is not read
_MIN_POSITION = 16
_PER_DOCUMENT = 4
_REFERENCE_PER_DOCUMENT = 16
_READ = 4, 64  # texts at a time, and what their width is a multiple of


class Rows(NamedTuple):
    """N activations: `h` [N, d] float32, `document` [N] and `position` [N] int.

    `context_ids` end with the activation's token, `following_ids` are up to `SUFFIX` tokens after it; both are empty
    where only the activation is known. `contexts` are the first as text. `gold` are descriptions, '' for none.
    `reference` [M, d] are other activations, for principal directions, of documents `reference_document` [M].
    """

    h: np.ndarray
    document: np.ndarray
    position: np.ndarray
    context_ids: list[list[int]]
    following_ids: list[list[int]]
    contexts: list[str]
    domain: list[str]
    gold: list[str]
    reference: np.ndarray
    reference_document: np.ndarray

    def digest(self) -> str:
        """Tells these rows from others."""
        digest = hashlib.sha256(np.ascontiguousarray(self.h, np.float32).tobytes())
        digest.update(repr((self.context_ids, self.following_ids, self.document.tolist(), self.gold)).encode())
        return digest.hexdigest()


def rows_of(
    subject: Callable[[], LanguageModel],
    layer: int,
    tokenizer: Any,
    arch: Arch,
    texts: Sequence[str],
    files: Sequence[str | Path],
    corpus: CorpusConfig | None,
    count: int,
    seed: int,
) -> Rows:
    """At most `count` activations of texts, files of texts and a corpus, or of one parquet of activations.

    `arch` is the encoder's. Raises UserError where nothing can be read.
    """
    if count < 2:
        raise UserError(f"--num-activations: {count} should be at least 2")
    if not any(has_vectors(path) for path in files):
        return rows_of_documents(subject(), layer, documents_of(texts, files, corpus), count, seed)
    if len(files) > 1 or texts or corpus:
        raise UserError(f"--input {files[0]}: a file of activations should be given alone")
    return rows_of_parquet(Path(files[0]), layer, tokenizer, arch.d_model, arch.vocab_size, count, seed)


def documents_of(
    texts: Sequence[str], paths: Sequence[str | Path], corpus: CorpusConfig | None = None
) -> list[tuple[str, Document]]:
    """(kind of text, document) of texts, of files and of a corpus.

    The kind is what a file says of a text in its field `domain`, else the name of the file, or of its folder where it
    holds one text alone.
    """
    found = [("text", document_of(encodable(text))) for text in texts]
    for path in paths:
        config = CorpusConfig(path=str(path))
        found += [(document.domain, document) for document in read_named_documents(config, "--input")]
    found += [(document.domain or "corpus", document) for document in read_documents(corpus)] if corpus else []
    unique: dict[str, tuple[str, Document]] = {}
    for domain, document in found:
        unique.setdefault(document.doc_id, (domain, document))
    return list(unique.values())


def rows_of_documents(
    lm: LanguageModel, layer: int, documents: Sequence[tuple[str, Document]], count: int, seed: int
) -> Rows:
    """At most `count` activations of at most four positions of each document, documents drawn by the seed.

    Positions leave `SUFFIX` tokens after them where the text is long enough. Raises UserError where no text is.
    """
    tokenizer, begin = lm.tokenizer, begin_ids(lm.tokenizer)
    order = np.random.default_rng([seed, 7]).permutation(len(documents))
    special = set(tokenizer.all_special_ids)
    chosen: list[tuple[str, list[int], np.ndarray, np.ndarray]] = []
    total = 0
    # Few texts are read at more positions each.
    each = max(_PER_DOCUMENT, -(-count // max(len(documents), 1)))
    for index in order:
        if total >= count:
            break
        domain, document = documents[index]
        ids = text_ids(tokenizer, document.text, begin)[:_MAX_TOKENS]
        check_ids(ids, lm.arch.vocab_size, tokenizer, f"text {document.doc_id}")
        places = np.array([i for i in range(len(begin) + 1, len(ids)) if ids[i] not in special], int)
        good = places[(places >= min(_MIN_POSITION, len(ids) // 2)) & (places < len(ids) - SUFFIX)]
        pool = good if len(good) else places[places >= len(ids) // 2]
        rng = np.random.default_rng(
            np.frombuffer(hashlib.sha256(f"{seed}:{document.doc_id}".encode()).digest(), np.uint32)
        )
        drawn = np.sort(rng.permutation(pool)[: min(each, count - total)])
        if not len(drawn):
            continue
        others = rng.permutation(places)[:_REFERENCE_PER_DOCUMENT]
        chosen.append((domain, ids, drawn, others))
        total += len(drawn)
    if not chosen:
        raise UserError("--text, --input: no text is long enough; an activation needs a few tokens before it")
    vectors = read_activations(lm, layer, [ids for _, ids, _, _ in chosen])
    number = np.repeat(np.arange(len(chosen)), [len(drawn) for _, _, drawn, _ in chosen])
    position = np.concatenate([drawn for _, _, drawn, _ in chosen])
    context_ids = [chosen[doc][1][: at + 1] for doc, at in zip(number, position, strict=True)]
    return Rows(
        h=np.stack([vectors[doc][at] for doc, at in zip(number, position, strict=True)]),
        document=number,
        position=position,
        context_ids=context_ids,
        following_ids=[chosen[doc][1][at + 1 : at + 1 + SUFFIX] for doc, at in zip(number, position, strict=True)],
        contexts=[tokenizer.decode(ids, skip_special_tokens=True) for ids in context_ids],
        domain=[chosen[doc][0] for doc in number],
        gold=[""] * len(number),
        reference=np.concatenate([vectors[doc][others] for doc, (*_, others) in enumerate(chosen)]),
        reference_document=np.repeat(np.arange(len(chosen)), [len(others) for *_, others in chosen]),
    )


def read_activations(lm: LanguageModel, layer: int, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The activations [T, d] of every text, read in the order of their lengths."""
    size, multiple = _READ
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: list[np.ndarray] = [np.zeros((0, 0), np.float32)] * len(texts)
    with progress(len(texts), "eval: activations", unit="text") as bar:
        for start in range(0, len(texts), size):
            some = order[start : start + size]
            width = -(-max(len(texts[index]) for index in some) // multiple) * multiple
            ids, length = pad([texts[index] for index in [*some, *some[:1] * (size - len(some))]], width)
            hidden = np.asarray(lm.residual(ids, layer, np.arange(width) < length[:, None]), np.float32)
            for row, index in enumerate(some):
                found[index] = hidden[row, : len(texts[index])]
            bar.advance(len(some))
    return found


def has_vectors(path: str | Path) -> bool:
    """Whether a file is a parquet of activations rather than of texts."""
    if not str(path).lower().endswith(".parquet") or not Path(path).is_file():
        return False
    with opened(Path(path)) as file:
        return VECTOR in file.schema_arrow.names


def rows_of_parquet(
    path: Path, layer: int, tokenizer: Any, d_model: int, vocab_size: int, count: int, seed: int
) -> Rows:
    """At most `count` rows of a dataset in the reference's layout, drawn by the seed; activations as they are stored.

    They should be of block `layer`, where the file says of which they are. The text up to the activation is read where
    the file has it. What follows is not known.
    """
    with opened(path) as file:
        total, names = file.metadata.num_rows, file.schema_arrow.names
        wanted = set(np.random.default_rng([seed, 7]).permutation(total)[:count].tolist())
        if "doc_id" not in names:
            raise UserError(f"{path}: no column 'doc_id'; intervals are over documents")
        if TEXT in names and not is_text(file.schema_arrow.field(TEXT).type):
            raise UserError(f"{path}: the column {TEXT} should hold strings")
        columns = [name for name in (VECTOR, "doc_id", TEXT, LAYER) if name in names]
        if DOMAIN in names and is_text(file.schema_arrow.field(DOMAIN).type):
            columns.append(DOMAIN)
        kept: list[tuple[str, str, str]] = []
        vectors, start = [], 0
        for batch in file.iter_batches(1024, columns=columns):
            check_batch(path, start, batch)
            check_layers(path, start, batch, layer, "the pair's block")
            docs = read_doc_ids(path, start, batch.column("doc_id"))
            here = [row for row in range(len(batch)) if start + row in wanted]
            if here:
                vectors.append(read_vectors(path, start, batch.column(VECTOR), d_model)[here])
                texts, domains = (
                    batch.column(name).to_pylist() if name in columns else [""] * len(batch) for name in (TEXT, DOMAIN)
                )
                kept += [(docs[row], texts[row] or "", domain_of(domains[row]) or "text") for row in here]
            start += len(batch)
    if not kept:
        raise UserError(f"{path}: the file has no rows")
    context_ids = [text_ids(tokenizer, encodable(text)) if text else [] for _, text, _ in kept]
    for row, ids in enumerate(context_ids):
        check_ids(ids, vocab_size, tokenizer, f"{path}: row {row}")
    names_of_docs, texts, domains = (list(column) for column in zip(*kept, strict=True))
    return without_following(np.concatenate(vectors), names_of_docs, context_ids, texts, domains)


def without_following(
    h: np.ndarray, docs: Sequence[str], context_ids: list[list[int]], contexts: list[str], domain: list[str]
) -> Rows:
    """Rows of which no more is known than their text, which may be '', and its kind."""
    numbers = {doc: number for number, doc in enumerate(dict.fromkeys(docs))}
    document = np.array([numbers[doc] for doc in docs])
    return Rows(
        h=h,
        document=document,
        position=np.array([max(len(ids) - 1, 0) for ids in context_ids]),
        context_ids=context_ids,
        following_ids=[[] for _ in docs],
        contexts=contexts,
        domain=domain,
        gold=[""] * len(docs),
        reference=h,
        reference_document=document,
    )


def likeliest(lm: LanguageModel, context_ids: Sequence[Sequence[int]], count: int) -> list[list[str]]:
    """The subject's `count` likeliest next tokens after each context, as text, likeliest first."""
    width = -(-max(map(len, context_ids)) // 128) * 128
    ids, length = pad(context_ids, width)
    found = lm.likeliest(ids, np.arange(width) < length[:, None], count)
    return [[lm.tokenizer.decode([token]) for token in row] for row in found.tolist()]


def spread(document: np.ndarray, count: int, seed: int, among: np.ndarray | None = None) -> np.ndarray:
    """At most `count` row numbers, ascending: one row of every document, then a second one of each, and so on.

    `document` [N] names each row's document. The seed draws the rows, and the documents where there are more of them
    than `count`. A larger `count` adds rows to those of a smaller one. `among` are the rows that may be drawn.
    """
    drawn = np.random.default_rng([seed, 11]).permutation(len(document))
    drawn = drawn if among is None else drawn[np.isin(drawn, among)]
    turns: Counter[int] = Counter()
    turn = []
    for name in document[drawn].tolist():
        turn.append(turns[name])
        turns[name] += 1
    return np.sort(drawn[np.argsort(np.array(turn, int), kind="stable")][:count])


def by_part(values: np.ndarray, names: Sequence[str]) -> Mapping[str, np.ndarray]:
    """The rows [N, ...] of each name, NaN elsewhere: what `Ledger.put` takes as parts. '' names no part."""
    parts = {}
    for name in dict.fromkeys(filter(None, names)):
        own = np.array([other == name for other in names])
        parts[name] = np.where(own.reshape(-1, *[1] * (values.ndim - 1)), values, np.nan)
    return parts


def kinds(domain: Sequence[str], document: Sequence[int] | np.ndarray, most: int = 12) -> list[str]:
    """Each row's kind of text. Kinds of one document, and the rarest of more than `most`, are "other kinds".

    A source may have a domain for every document, as where it is the address of a web page; and of one document there
    is no interval. A single kind of one document keeps its name. '' is no kind: it stays.
    """
    counts = Counter(filter(None, domain))
    documents = Counter(name for name, _ in set(zip(domain, np.asarray(document).tolist(), strict=True)))
    alone = {name for name in counts if documents[name] == 1}
    several = [name for name in counts if len(alone) < 2 or name not in alone]
    most_kept = most if len(several) == len(counts) <= most else most - 1
    named = set(sorted(several, key=lambda name: (-counts[name], name))[:most_kept])
    return [name if name in named or not name else "other kinds" for name in domain]
