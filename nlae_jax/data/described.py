"""Reads descriptions made elsewhere, by annotators or a batch API: `describe.provider = "file"`.

`describe.path` is a JSONL file, or "warmstart" for the notes that the package carries. A line has a `description` (or
`note`) and names its position in one of three ways:

    {"text": "The Thames rises in", "description": "…"}      the text up to the position; no other corpus is needed
    {"id": "d7", "offset": 19, "description": "…"}           a document of the corpus, by its `id` there or by our
                                                             doc_id, and the number of its characters that were read
    {"id": "d7", "position": 4, "description": "…"}          the same document, and the token's number from 0

`passage` names the source that several texts are taken from: no passage is in two splits. A described document is read
at the positions of its descriptions. Other documents of the corpus are read at random positions.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nlae_jax.assets import WARMSTART, WARMSTART_NOTES
from nlae_jax.data.answers import begins_with_thinking
from nlae_jax.data.corpus import Document, document_of, name_of, read_json_lines
from nlae_jax.lm.tokens import text_ids
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import local_path
from nlae_jax.runtime.outside import encodable, quoted

_MAX_CHARACTERS = 20_000  # of one description


@dataclasses.dataclass(frozen=True)
class Description:
    """One line of the file: the document, the place in it, and the description `text`.

    `place` is ("text", text), ("offset", characters) or ("position", token).
    """

    document: str
    place: tuple[str, Any]
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
        text = _string(row, where, "note" if "note" in row and "description" not in row else "description")
        if "explanation>" in text:
            raise UserError(f"{where}: description holds an explanation tag; it should be the text inside the tags")
        if begins_with_thinking(text):
            raise UserError(f"{where}: description begins with a model's thinking; it should be the text after it")
        if len(text) > _MAX_CHARACTERS:
            raise UserError(f"{where}: description has {len(text)} characters; at most {_MAX_CHARACTERS} are read")
        passage = _string(row, where, "passage") if row.get("passage") is not None else ""
        if row.get("text") is not None:
            yield Description("", ("text", _string(row, where, "text")), passage, text)
            continue
        if not (document := name_of(row.get(key := "id" if "id" in row else "doc_id"))):
            raise UserError(f"{where}: {key} should be a text or a whole number; it is {quoted(row.get(key))}")
        for name in ("offset", "position"):
            if row.get(name) is not None:
                yield Description(document, (name, _whole_number(row, where, name)), passage, text)
                break
        else:
            raise UserError(f"{where}: should have a `text`, or an `id` with an `offset` or a `position`")


def match(
    descriptions: Iterator[Description], documents: Sequence[Document], tokenizer: Any, max_tokens: int
) -> Described:
    """Finds every description's document and token among the first `max_tokens` of each document.

    An offset belongs to the token that ends there. A description without a token is left out and counted. Raises
    UserError where several documents have a description's id.
    """
    texts = sorted(documents, key=lambda document: document.text)
    keys = [document.text for document in texts]
    named: dict[str, Document] = {}
    shared_names = set()
    for document in documents:
        for name in {document.doc_id, document.name} - {""}:
            shared_names |= {name} & named.keys()
            named[name] = document
    added: dict[str, Document] = {}
    positions: dict[str, dict[int, str]] = defaultdict(dict)
    dropped: Counter[str] = Counter()
    ends: dict[str, dict[int, int]] = {}
    for description in descriptions:
        kind, value = description.place
        if kind == "text":
            new = document_of(value)
            new = dataclasses.replace(new, passage=description.passage or _passage_of(new.text, texts, keys))
            document = added.setdefault(new.doc_id, new)
        elif description.document in shared_names:
            raise UserError(
                f"config.describe.path: {quoted(description.document)} is the id of several documents of the corpus; "
                "each should have its own"
            )
        elif description.document in named:
            document = named[description.document]
        else:
            dropped["of documents that the corpus does not have"] += 1
            continue
        if document.doc_id not in ends:
            ends[document.doc_id] = _token_ends(document.text, tokenizer, max_tokens)
        tokens = ends[document.doc_id]
        read = len(document.text) if kind == "text" else value - document.lead  # an offset counts in the source's text
        position = value if kind == "position" else tokens.get(read)
        if position is None or position not in tokens.values():
            dropped[f"beyond extract.max_tokens = {max_tokens}, or where no token ends"] += 1
        elif position == 0:
            dropped["of a first token, which is an attention sink"] += 1
        elif position in positions[document.doc_id]:
            dropped["of a position that has one already"] += 1
        else:
            positions[document.doc_id][position] = description.text
    described = {doc_id: dict(sorted(by_position.items())) for doc_id, by_position in positions.items() if by_position}
    corpus_ids = {document.doc_id for document in documents}
    used = [document for doc_id, document in added.items() if doc_id in described and doc_id not in corpus_ids]
    return Described([*documents, *used], described, dropped)


def _passage_of(text: str, texts: Sequence[Document], keys: Sequence[str]) -> str:
    """Returns the group of the corpus's document that begins with `text`, or '' where there is none."""
    index = bisect.bisect_left(keys, text)
    return texts[index].group if index < len(keys) and keys[index].startswith(text) else ""


def _token_ends(text: str, tokenizer: Any, max_tokens: int) -> dict[int, int]:
    """Returns number of characters -> number of the token that ends there. Tokens without characters are left out."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    before = len(text_ids(tokenizer, text)) - len(encoded["input_ids"])  # the beginning-of-sequence token, if any
    ends = {stop: before + token for token, (start, stop) in enumerate(encoded["offset_mapping"]) if stop > start}
    return {stop: token for stop, token in ends.items() if token < max_tokens}


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
