"""Reads descriptions made elsewhere, by annotators or a batch API: `describe.provider = "file"`.

`describe.path` is a JSONL file, or "warmstart" for the notes that the package carries. A line has a `description` (or
`note`). It names a document and the position in it:

    {"text": "The Thames rises in", "description": "…"}      the end of this text, which is added to the corpus
    {"id": "d7", "offset": 19, "description": "…"}           a document of the corpus, by its `id` there or by our
                                                             doc_id, and the number of its characters that were read
    {"id": "d7", "position": 4, "description": "…"}          the same document, and the token's number from 0

A line with a `text` may have an `offset` or a `position` too. Then its position is the one in that text.

`passage` names the source of a text. Documents of one passage are never in two splits. Neither are a document and a
text that it begins with. A described document is read at the positions of its descriptions. Other documents of the
corpus are read at random positions.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from nlae_jax.assets import WARMSTART, WARMSTART_NOTES
from nlae_jax.data.answers import begins_with_thinking
from nlae_jax.data.corpus import Document, document_of, name_of, read_json_lines
from nlae_jax.lm.tokens import text_ids
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import local_path
from nlae_jax.runtime.outside import encodable, quoted

_MAX_CHARACTERS = 20_000  # of one description
_PLACES = ("offset", "position")


@dataclasses.dataclass(frozen=True)
class Description:
    """One line of the file: the name of a document or else its `source` text, the place in it, and the description.

    `place` is ("end", None), ("offset", characters) or ("position", token).
    """

    document: str
    source: str
    place: tuple[str, int | None]
    passage: str
    text: str


@dataclasses.dataclass(frozen=True)
class Described:
    """The corpus with the file's texts added, and doc_id -> token position -> description."""

    documents: list[Document]
    positions: Mapping[str, Mapping[int, str]]
    dropped: Counter[str]  # reason -> number of lines without a place in the corpus


def described_path(name: str) -> Path:
    """Returns the file that `describe.path` names."""
    if name == WARMSTART and not Path(name).exists():
        return WARMSTART_NOTES
    return local_path(name, "config.describe.path")


def read_descriptions(path: Path) -> Iterator[Description]:
    """Yields the file's descriptions. Raises UserError that names file, line and field where one is invalid."""
    for where, row in read_json_lines(path):
        text = _string(row, where, "note" if "note" in row and "description" not in row else "description").strip()
        if "explanation>" in text:
            raise UserError(f"{where}: description holds an explanation tag; it should be the text inside the tags")
        if begins_with_thinking(text):
            raise UserError(f"{where}: description begins with a model's thinking; it should be the text after it")
        if len(text) > _MAX_CHARACTERS:
            raise UserError(f"{where}: description has {len(text)} characters; at most {_MAX_CHARACTERS} are read")
        passage = _string(row, where, "passage") if row.get("passage") is not None else ""
        places = [(name, _whole_number(row, where, name)) for name in _PLACES if row.get(name) is not None]
        if len(places) > 1:
            raise UserError(f"{where}: offset and position are both set; one of them should be left out")
        if row.get("text") is not None:
            source = _string(row, where, "text")
            yield Description("", source, places[0] if places else ("end", None), passage, text)
            continue
        if not (document := name_of(row.get(key := "id" if "id" in row else "doc_id"))):
            raise UserError(f"{where}: {key} should be a text or a whole number; it is {quoted(row.get(key))}")
        if not places:
            raise UserError(f"{where}: should have a `text`, or an `id` with an `offset` or a `position`")
        yield Description(document, "", places[0], passage, text)


def match(
    descriptions: Iterator[Description], documents: Sequence[Document], tokenizer: Any, max_tokens: int
) -> Described:
    """Finds every description's document and token among the first `max_tokens` of each document.

    An offset belongs to the token that ends there. A description without a token is left out and counted. Raises
    UserError where several documents have a description's id.
    """
    named, shared_names = _named(documents)
    known = {document.doc_id: document for document in documents}
    added: dict[str, Document] = {}
    groups = _Groups(documents)
    positions: dict[str, dict[int, str]] = defaultdict(dict)
    dropped: Counter[str] = Counter()
    tokens: dict[str, _Tokens] = {}
    for description in descriptions:
        if description.source:
            source = document_of(description.source)
            document = known.get(source.doc_id) or added.setdefault(source.doc_id, source)
            if document.text != source.text and description.place[0] != "end":
                dropped["of a text that the corpus has with other white space or case"] += 1
                continue
        elif description.document in shared_names:
            raise UserError(
                f"config.describe.path: {quoted(description.document)} is the id of several documents of the corpus; "
                "each should have its own"
            )
        elif description.document in named:
            document = source = named[description.document]
        else:
            dropped["of documents that the corpus does not have"] += 1
            continue
        if description.passage:
            groups.join(document.group, description.passage)
        if document.doc_id not in tokens:
            tokens[document.doc_id] = _tokens(document.text, tokenizer)
        position = _position(description.place, source.lead, document.text, tokens[document.doc_id], tokenizer)
        if position is None or position >= max_tokens:
            dropped[f"beyond extract.max_tokens = {max_tokens}, or where no token ends"] += 1
        elif position == 0:
            dropped["of a first token, which is an attention sink"] += 1
        elif position in positions[document.doc_id]:
            dropped["of a position that has one already"] += 1
        else:
            positions[document.doc_id][position] = description.text
    described = {doc_id: dict(sorted(by_position.items())) for doc_id, by_position in positions.items() if by_position}
    used = [document for doc_id, document in added.items() if doc_id in described]
    groups.join_beginnings(documents, used)
    return Described([groups.grouped(document) for document in (*documents, *used)], described, dropped)


def _named(documents: Sequence[Document]) -> tuple[dict[str, Document], set[str]]:
    """Returns the documents by their names and doc_ids, and the names that several documents have."""
    named: dict[str, Document] = {}
    shared: set[str] = set()
    for document in documents:
        for name in {document.doc_id, document.name} - {""}:
            shared |= {name} & named.keys()
            named[name] = document
    return named, shared


class _Groups:
    """Which groups of documents are joined into one, so that they are in one split."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._of_corpus = {document.group for document in documents}
        self._joined: dict[str, str] = {}  # group -> a group that it was joined into

    def join(self, group: str, other: str) -> None:
        """Joins two groups. A group of the corpus keeps its name, and so its split, if it can."""
        group, other = self._name(group), self._name(other)
        if group not in self._of_corpus:
            group, other = other, group
        if group != other:
            self._joined[other] = group

    def join_beginnings(self, documents: Sequence[Document], added: Sequence[Document]) -> None:
        """Joins every added document and the documents that begin with its text into one group."""
        ordered = sorted((*documents, *added), key=lambda document: document.text)
        new = {document.doc_id for document in added}
        for index, document in enumerate(ordered):
            if document.doc_id not in new:
                continue
            # Among sorted texts, those that begin with a text stand directly after it.
            for following in islice(ordered, index + 1, None):
                if not following.text.startswith(document.text):
                    break
                self.join(following.group, document.group)

    def grouped(self, document: Document) -> Document:
        """Returns the document with the name of its joined group."""
        name = self._name(document.group)
        return document if name == document.group else dataclasses.replace(document, passage=name)

    def _name(self, group: str) -> str:
        while (into := self._joined.get(group)) is not None:
            self._joined[group] = self._joined.get(into, into)  # shorter paths: chains of texts may be long
            group = into
        return group


class _Tokens(NamedTuple):
    """The number of a text's tokens, and number of characters -> number of the token that ends there."""

    total: int
    ends: dict[int, int]


def _tokens(text: str, tokenizer: Any) -> _Tokens:
    """Tokenises a text. Tokens without characters have no end."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    total = len(text_ids(tokenizer, text))
    before = total - len(encoded["input_ids"])  # the beginning-of-sequence token, if any
    spans = enumerate(encoded["offset_mapping"], before)
    return _Tokens(total, {stop: token for token, (start, stop) in spans if stop > start})


def _position(place: tuple[str, int | None], lead: str, text: str, tokens: _Tokens, tokenizer: Any) -> int | None:
    """Returns the number of the `text`'s token at a place, or None where none is there.

    Places count in the source's text, which has the white space `lead` before the `text`.
    """
    kind, value = place
    if value is None:
        return tokens.ends.get(len(text))
    if kind == "offset":
        return tokens.ends.get(value - len(lead))
    if not lead:
        return value if value < tokens.total else None
    # The token's character ends with the token `last`. In the text alone, its tokens have other numbers.
    whole = _tokens(lead + text, tokenizer).ends
    stop, last = next(((stop, token) for stop, token in whole.items() if token >= value), (0, value))
    end = tokens.ends.get(stop - len(lead))
    return None if end is None else end - (last - value)


def _string(row: dict[str, Any], where: str, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {name} should be a text; it is {quoted(value)}")
    return encodable(value)


def _whole_number(row: dict[str, Any], where: str, name: str) -> int:
    value = row[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{where}: {name} should be a whole number from 0; it is {quoted(value)}")
    return value
