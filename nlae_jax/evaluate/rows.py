"""Reads the suite's input: activations with their texts, from texts, from a parquet file or from a run."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nlae_jax.config import CorpusConfig
from nlae_jax.data.answers import explanation_of
from nlae_jax.data.corpus import DOMAIN, Document, document_of, domain_of, read_documents, read_named_documents
from nlae_jax.data.parquet import check_batch, opened
from nlae_jax.interop.datasets import LAYER, RESPONSE, TEXT, VECTOR, check_layers, read_doc_ids, read_vectors
from nlae_jax.lm.arch import Arch
from nlae_jax.lm.tokens import begin_ids, check_ids, pad, text_ids
from nlae_jax.roles.direction import UNUSABLE, unusable_rows
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import is_text, local_path
from nlae_jax.runtime.outside import encodable
from nlae_jax.runtime.progress import progress

SUFFIX = 32  # so many tokens after an activation are kept, for the suffix test
_MAX_TOKENS = 512  # of a longer text only the beginning is read
_MIN_POSITION = 16  # earlier positions are avoided if the text is long enough
_PER_DOCUMENT = 4
_REFERENCE_PER_DOCUMENT = 16
TEXTS_AT_A_TIME = 4
PLACES = 4  # the subject predicts the next token at so many places of a text at once
_WIDTH = 64  # texts are padded to multiples of this length
_PREDICTING_WIDTH = 128  # the same where all blocks compute, because their programs take longer to compile


class EvaluatedRows(NamedTuple):
    """N activations with their texts.

    `h` [N, d] float32 are the activations. `document` [N] int numbers their documents. `position` [N] int are their
    token positions. `context_ids` are the tokens up to and including the activation's token, `following_ids` up to
    `SUFFIX` tokens after it; both are empty where the text is not known. `contexts` are the `context_ids` as text.
    `domain` is each row's kind of text. `gold` are descriptions, '' for a row without one.

    `reference` [M, d] are further activations, from which principal directions are fitted. `reference_document` [M]
    numbers their documents.
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
        """Returns a hash of everything in the rows that the suite's explanations and reconstructions depend on."""
        digest = hashlib.sha256(np.ascontiguousarray(self.h, np.float32).tobytes())
        digest.update(repr((self.context_ids, self.following_ids, self.document.tolist(), self.gold)).encode())
        return digest.hexdigest()


def check_rows(rows: EvaluatedRows, d_model: int) -> None:
    """Checks rows that a caller has made. Raises UserError if the activations are not finite or of another width."""
    count = len(rows.document)
    if rows.h.shape != (count, d_model) or not count:
        raise UserError(f"rows.h: shape {rows.h.shape} should be ({max(count, 1)}, {d_model}), one activation a row")
    if (bad := unusable_rows(rows.h)).size:
        raise UserError(f"rows.h: row {bad[0]} should hold finite numbers; it has {UNUSABLE}")


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
    begin: Begin = lambda rows, tokens: None,
) -> EvaluatedRows:
    """Reads at most `count` activations of block `layer`, from texts or from one parquet file of activations.

    Texts come from `texts`, from `files` and from the `corpus`. The seed draws the documents and positions. `subject()`
    loads the subject, which is needed for texts only. `arch` is the encoder's. `begin` is called as in
    `rows_of_documents`, also if there is nothing to read.

    Raises UserError if `count` is below 2, if a parquet file of activations is not the only input, or if no activation
    can be read.
    """
    if count < 2:
        raise UserError(f"--num-activations: {count} should be at least 2")
    paths = [local_path(file, "--input") for file in files]
    if not any(has_vectors(path) for path in paths):
        return rows_of_documents(subject(), layer, documents_of(texts, paths, corpus), count, seed, begin)
    if len(paths) > 1 or texts or corpus:
        raise UserError(
            f"--input {files[0]}: a file of activations should be given alone, without other files, --text or a corpus"
        )
    rows = rows_of_parquet(paths[0], layer, tokenizer, arch.d_model, arch.vocab_size, count, seed)
    begin(rows, 0)
    return rows


def documents_of(
    texts: Sequence[str], paths: Sequence[str | Path], corpus: CorpusConfig | None = None
) -> list[tuple[str, Document]]:
    """Reads documents from texts, files and a corpus. Returns pairs (kind of text, document), each document once.

    The kind of a document is its field `domain`, if the file has one. Otherwise it is the name of the file, or the name
    of the folder if the file holds a single document. `texts` have the kind `text`.
    """
    pairs = [("text", document_of(encodable(text))) for text in texts]
    for path in paths:
        config = CorpusConfig(path=str(path))
        pairs += [(document.domain, document) for document in read_named_documents(config, "--input")]
    pairs += [(document.domain or "corpus", document) for document in read_documents(corpus)] if corpus else []
    unique: dict[str, tuple[str, Document]] = {}
    for domain, document in pairs:
        unique.setdefault(document.doc_id, (domain, document))
    return list(unique.values())


class _Excerpt(NamedTuple):
    """The tokens of one document that are read, with the positions of its activations and of its reference."""

    domain: str
    ids: list[int]
    positions: np.ndarray
    reference: np.ndarray


def _excerpts(
    lm: LanguageModel, documents: Sequence[tuple[str, Document]], count: int, seed: int
) -> Iterator[_Excerpt]:
    """Draws documents, and at most `count` positions in all, by the seed. Documents without a position are left out."""
    tokenizer, begin = lm.tokenizer, begin_ids(lm.tokenizer)
    special = set(tokenizer.all_special_ids)
    # If there are few documents, more positions of each are read.
    per_document = max(_PER_DOCUMENT, -(-count // max(len(documents), 1)))
    missing = count
    for index in np.random.default_rng([seed, 7]).permutation(len(documents)):
        if missing <= 0:
            return
        domain, document = documents[index]
        ids = text_ids(tokenizer, document.text, begin)[: lm.arch.within(_MAX_TOKENS)]
        check_ids(ids, lm.arch.vocab_size, tokenizer, f"text {document.doc_id}")
        possible = np.array([i for i in range(len(begin) + 1, len(ids)) if ids[i] not in special], int)
        good = possible[(possible >= min(_MIN_POSITION, len(ids) // 2)) & (possible < len(ids) - SUFFIX)]
        pool = good if len(good) else possible[possible >= len(ids) // 2]
        # The generator depends on the document's name, so that a document's positions do not depend on the others.
        digest = hashlib.sha256(f"{seed}:{document.doc_id}".encode()).digest()
        rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
        positions = np.sort(rng.permutation(pool)[: min(per_document, missing)])
        if len(positions):
            missing -= len(positions)
            yield _Excerpt(domain, ids, positions, rng.permutation(possible)[:_REFERENCE_PER_DOCUMENT])


# Gets the rows without their activations, and the number of tokens that are read for these.
Begin = Callable[["EvaluatedRows", int], None]


def rows_of_documents(
    lm: LanguageModel,
    layer: int,
    documents: Sequence[tuple[str, Document]],
    count: int,
    seed: int,
    begin: Begin = lambda rows, tokens: None,
) -> EvaluatedRows:
    """Reads at most `count` activations of block `layer` from documents, which the seed draws.

    `documents` are pairs (kind of text, document). Each document gives at most four activations, or more if there are
    too few documents for `count`. If the text is long enough, a position has `SUFFIX` tokens after it. `begin` is
    called before the subject reads anything. Raises UserError if no text is long enough.
    """
    excerpts = list(_excerpts(lm, documents, count, seed))
    if not excerpts:
        raise UserError("--text, --input: no text is long enough; an activation needs a few tokens before it")
    document = np.repeat(np.arange(len(excerpts)), [len(excerpt.positions) for excerpt in excerpts])
    places = [(number, excerpt.ids, at) for number, excerpt in enumerate(excerpts) for at in excerpt.positions]
    context_ids = [ids[: at + 1] for _, ids, at in places]
    nothing = np.zeros((0, lm.arch.d_model), np.float32)
    rows = EvaluatedRows(
        h=nothing,
        document=document,
        position=np.concatenate([excerpt.positions for excerpt in excerpts]),
        context_ids=context_ids,
        following_ids=[ids[at + 1 : at + 1 + SUFFIX] for _, ids, at in places],
        contexts=[lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in context_ids],
        domain=[excerpts[number].domain for number in document],
        gold=[""] * len(document),
        reference=nothing,
        reference_document=np.repeat(np.arange(len(excerpts)), [len(excerpt.reference) for excerpt in excerpts]),
    )
    begin(rows, sum(len(excerpt.ids) for excerpt in excerpts))
    vectors = read_activations(lm, layer, [excerpt.ids for excerpt in excerpts])
    return rows._replace(
        h=np.stack([vectors[number][at] for number, _, at in places]),
        reference=np.concatenate([vectors[number][excerpt.reference] for number, excerpt in enumerate(excerpts)]),
    )


def read_activations(lm: LanguageModel, layer: int, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Reads the activations of block `layer` at every token: texts as token ids -> arrays [T, d] float32.

    Texts are read in the order of their lengths, so that batches need little padding.
    """
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    activations: list[np.ndarray] = [np.zeros((0, 0), np.float32)] * len(texts)
    with progress(len(texts), "eval: activations", unit="text") as bar:
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            batch = order[start : start + TEXTS_AT_A_TIME]
            width = -(-max(len(texts[index]) for index in batch) // _WIDTH) * _WIDTH
            filled = [*batch, *batch[:1] * (TEXTS_AT_A_TIME - len(batch))]
            ids, length = pad([texts[index] for index in filled], width)
            hidden = np.asarray(lm.residual(ids, layer, np.arange(width) < length[:, None]), np.float32)
            for row, index in enumerate(batch):
                activations[index] = hidden[row, : len(texts[index])]
            bar.advance(len(batch))
    return activations


def has_vectors(path: Path) -> bool:
    """Returns whether a file is a parquet file with a column of activations."""
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return False
    with opened(path) as file:
        return VECTOR in file.schema_arrow.names


def rows_of_parquet(
    path: Path, layer: int, tokenizer: Any, d_model: int, vocab_size: int, count: int, seed: int
) -> EvaluatedRows:
    """Reads at most `count` rows of a parquet file in the PyTorch reference's layout. The seed draws the rows.

    Activations are returned as they are stored. The text up to the activation is read if the file has it, and so is the
    description in a column `response`. The text after the activation is not known. The vectors should be `d_model`
    wide, and tokens should be below `vocab_size`.

    Raises UserError if the file has no rows or no column `doc_id`, or if it says that the activations are of another
    block than `layer`.
    """
    with opened(path) as file:
        total, names = file.metadata.num_rows, file.schema_arrow.names
        wanted = set(np.random.default_rng([seed, 7]).permutation(total)[:count].tolist())
        if "doc_id" not in names:
            raise UserError(
                f"{path}: no column 'doc_id'; it should name each row's document, because intervals need it"
            )
        if TEXT in names and not is_text(file.schema_arrow.field(TEXT).type):
            raise UserError(f"{path}: the column {TEXT} should hold strings")
        columns = [name for name in (VECTOR, "doc_id", TEXT, LAYER) if name in names]
        columns += [
            name for name in (DOMAIN, RESPONSE) if name in names and is_text(file.schema_arrow.field(name).type)
        ]
        drawn: list[tuple[str, str, str, str]] = []  # document, text, kind of text and response
        vectors, start = [], 0
        for batch in file.iter_batches(1024, columns=columns):
            check_batch(path, start, batch)
            check_layers(path, start, batch, layer, "the pair's block")
            docs = read_doc_ids(path, start, batch.column("doc_id"))
            drawn_here = [row for row in range(len(batch)) if start + row in wanted]
            if drawn_here:
                vectors.append(read_vectors(path, start, batch.column(VECTOR), d_model)[drawn_here])
                texts, domains, responses = (
                    batch.column(name).to_pylist() if name in columns else [""] * len(batch)
                    for name in (TEXT, DOMAIN, RESPONSE)
                )
                drawn += [
                    (docs[row], texts[row] or "", domain_of(domains[row]) or "text", responses[row] or "")
                    for row in drawn_here
                ]
            start += len(batch)
    if not drawn:
        raise UserError(f"{path}: the file has no rows")
    names_of_docs, texts, domains, responses = (list(column) for column in zip(*drawn, strict=True))
    context_ids = [text_ids(tokenizer, encodable(text)) if text else [] for text in texts]
    for row, ids in enumerate(context_ids):
        check_ids(ids, vocab_size, tokenizer, f"{path}: row {row}")
    rows = without_following(np.concatenate(vectors), names_of_docs, context_ids, texts, domains)
    return rows._replace(gold=[encodable(explanation_of(response) or "") for response in responses])


def without_following(
    h: np.ndarray, docs: Sequence[str], context_ids: list[list[int]], contexts: list[str], domain: list[str]
) -> EvaluatedRows:
    """Makes rows without the tokens after the activation and without descriptions. The activations are the reference.

    `docs` name each row's document. `context_ids` and `contexts` are empty for rows whose text is not known.
    """
    numbers = {doc: number for number, doc in enumerate(dict.fromkeys(docs))}
    document = np.array([numbers[doc] for doc in docs])
    return EvaluatedRows(
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


def shared_reads(texts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Groups texts, so that all texts of a group are beginnings of the group's first one: lists of text numbers.

    One pass over the first text then gives what the model predicts after each of the others. A group has at most `most`
    texts. Groups are in the order of their lengths.
    """
    groups: list[list[int]] = []
    # In alphabetical order a text stands before all texts that it begins.
    for number in sorted(range(len(texts)), key=lambda number: list(texts[number]), reverse=True):
        text, group = list(texts[number]), groups[-1] if groups else []
        if group and len(group) < most and list(texts[group[0]][: len(text)]) == text:
            group.append(number)
        else:
            groups.append([number])
    return sorted(groups, key=lambda group: len(texts[group[0]]))


def likeliest(lm: LanguageModel, contexts: Sequence[Sequence[Sequence[int]]], count: int) -> list[list[list[str]]]:
    """Returns the subject's `count` likeliest next tokens, as text, likeliest first.

    `contexts` has a group of `shared_reads` in each row, as token ids. The result has the tokens of every context in
    the place of the context. At most `PLACES` contexts are in a group.
    """
    width = -(-max(len(group[0]) for group in contexts) // _PREDICTING_WIDTH) * _PREDICTING_WIDTH
    ids, length = pad([group[0] for group in contexts], width)
    columns = np.array(
        [[len(context) - 1 for context in [*group, *list(group[:1]) * (PLACES - len(group))]] for group in contexts]
    )
    token_ids = lm.likeliest(ids, np.arange(width) < length[:, None], columns, count)
    return [
        [[lm.tokenizer.decode([token]) for token in tokens] for tokens in row[: len(group)].tolist()]
        for row, group in zip(token_ids, contexts, strict=True)
    ]


def spread(document: np.ndarray, count: int, seed: int, among: np.ndarray | None = None) -> np.ndarray:
    """Draws at most `count` row numbers, spread over documents, and returns them in ascending order.

    It draws one row of every document, then a second row of every document, and so on. `document` [N] names each row's
    document. The seed draws the rows. If there are more documents than `count`, it draws the documents too. A larger
    `count` adds rows to the rows of a smaller one. `among` are the rows that may be drawn, all if it is None.
    """
    shuffled = np.random.default_rng([seed, 11]).permutation(len(document))
    shuffled = shuffled if among is None else shuffled[np.isin(shuffled, among)]
    seen: Counter[int] = Counter()
    turn = []  # how many rows of the same document come before each row
    for name in document[shuffled].tolist():
        turn.append(seen[name])
        seen[name] += 1
    return np.sort(shuffled[np.argsort(np.array(turn, int), kind="stable")][:count])


def by_part(values: np.ndarray, names: Sequence[str]) -> Mapping[str, np.ndarray]:
    """Splits `values` [N, ...] by the name of each row's part, for the argument `parts` of `Ledger.put`.

    Each part is an array [N, ...] with NaN at the rows of other parts. Rows named '' belong to no part.
    """
    parts = {}
    for name in dict.fromkeys(filter(None, names)):
        is_in_part = np.array([name_of_row == name for name_of_row in names])
        parts[name] = np.where(is_in_part.reshape(-1, *[1] * (values.ndim - 1)), values, np.nan)
    return parts


def kinds(domain: Sequence[str], document: Sequence[int] | np.ndarray, most: int = 12) -> list[str]:
    """Returns each row's kind of text, with rare kinds combined as "other kinds".

    `domain` and `document` name each row's kind and document. At most `most` kinds are left: the rarest are combined.
    Kinds of one document are combined too, because there is no interval over one document. A source may have such a
    kind for every document, for example the address of a web page. If only one kind has one document, it keeps its
    name. Rows of kind '' keep it.
    """
    counts = Counter(filter(None, domain))
    documents = Counter(name for name, _ in set(zip(domain, np.asarray(document).tolist(), strict=True)))
    single = {name for name in counts if documents[name] == 1}
    candidates = [name for name in counts if len(single) < 2 or name not in single]
    most_kept = most if len(candidates) == len(counts) <= most else most - 1
    kept = set(sorted(candidates, key=lambda name: (-counts[name], name))[:most_kept])
    return [name if name in kept or not name else "other kinds" for name in domain]
