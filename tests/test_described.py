"""Descriptions made elsewhere: which token each belongs to, and what is left out."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from nlae_jax.config import resolve
from nlae_jax.data.corpus import Document, document_of, read_documents
from nlae_jax.data.described import described_path, match, read_descriptions
from nlae_jax.data.index import SPLITS, make_index
from nlae_jax.lm.tiny import tiny_tokenizer
from nlae_jax.runtime.errors import UserError

TEXT = "The river rises in the hills and falls to the sea in the west of the land."


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), eos_token="<|im_end|>")


def lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def named(name: str, text: str) -> Document:
    return Document(document_of(text).doc_id, text, name)


def test_text_offset_and_position_name_the_same_token(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    document = named("d7", TEXT)
    spans = tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    rows = [
        {"id": "d7", "offset": spans[4][1], "description": "by characters"},
        {"id": document.doc_id, "position": 6, "description": "by tokens"},
        {"text": TEXT[: spans[8][1]], "note": "by text"},
    ]
    found = match(read_descriptions(lines(tmp_path / "d.jsonl", rows)), [document], tokenizer, 64)
    assert found.positions[document.doc_id] == {4: "by characters", 6: "by tokens"}
    added = found.documents[-1]
    assert added.text == TEXT[: spans[8][1]] and found.positions[added.doc_id] == {8: "by text"}
    assert added.group == document.group  # the beginning of a document is in its document's split
    assert not found.dropped


def test_what_fits_nowhere_is_counted_by_reason(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    document = named("d7", TEXT)
    spans = tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    inside = next(stop - 1 for start, stop in spans if stop - start > 2)
    rows = [
        {"id": "d7", "offset": inside, "description": "inside a token"},
        {"id": "d7", "position": 10_000, "description": "beyond the end"},
        {"id": "d7", "position": 0, "description": "the first token"},
        {"id": "elsewhere", "position": 3, "description": "no such document"},
        {"id": "d7", "position": 3, "description": "kept"},
        {"id": "d7", "position": 3, "description": "twice"},
    ]
    found = match(read_descriptions(lines(tmp_path / "d.jsonl", rows)), [document], tokenizer, 64)
    assert found.positions == {document.doc_id: {3: "kept"}}
    assert sorted(found.dropped.values()) == [1, 1, 1, 2]


@pytest.mark.parametrize(
    "row",
    [
        {"description": "nowhere"},
        {"id": "d", "description": "nowhere"},
        {"text": "x"},
        {"text": "x", "description": 5},
        {"text": ["x"], "description": "y"},
        {"id": ["d"], "position": 3, "description": "y"},
        {"id": True, "position": 3, "description": "y"},
        {"id": "d", "position": -1, "description": "y"},
        {"id": "d", "position": True, "description": "y"},
        {"id": "d", "offset": 2.5, "description": "y"},
        {"text": "x", "description": "y" * 30_000},
        {"text": "x", "description": "<explanation>y</explanation>"},
        ["no object"],
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, row: object) -> None:
    path = lines(tmp_path / "d.jsonl", [{"text": "fine", "description": "fine"}, row])
    with pytest.raises(UserError, match=r"d\.jsonl:2"):
        list(read_descriptions(path))


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("<think>Perhaps a poem.</think> A recipe.", False),
        ("Perhaps a poem.</think> A recipe.", False),
        ("<|channel|>analysis Perhaps.<|channel|>final A recipe.", False),
        ('A template; "<think>" comes next.', True),
        ('The model\'s "<think>" was closed by "</think>".', True),
        ("After “</think>” the answer begins.", True),
    ],
)
def test_what_a_model_thought_is_no_description(tmp_path: Path, text: str, fine: bool) -> None:
    path = lines(tmp_path / "d.jsonl", [{"text": "x", "description": text}])
    if fine:
        assert next(read_descriptions(path)).text == text
        return
    with pytest.raises(UserError, match=r"d\.jsonl:1: description begins with a model's thinking"):
        list(read_descriptions(path))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_texts_of_a_passage_are_never_in_two_splits(sizes: list[int]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), eos_token="<|im_end|>")
    documents = [
        document_of(f"{TEXT} {passage} {part}", passage=f"p{passage}", at_end=True)
        for passage, size in enumerate([*sizes, 1, 1, 1, 1])
        for part in range(size)
    ]
    result = make_index(documents, tokenizer, resolve({}))
    passages = {document.doc_id: document.passage for document in documents}
    splits: dict[str, set[int]] = {}
    for doc_id, split in zip(result.doc_ids, result.split.tolist(), strict=True):
        splits.setdefault(passages[doc_id], set()).add(split)
    assert all(len(found) == 1 for found in splits.values())
    assert {next(iter(found)) for found in splits.values()} == set(range(len(SPLITS)))


def test_the_carried_notes_are_read_at_the_ends_of_their_texts() -> None:
    descriptions = list(read_descriptions(described_path("warmstart")))
    documents = read_documents(resolve({"corpus.path": "warmstart"}).corpus)
    assert len(descriptions) > 3000 and all(document.at_end and document.passage for document in documents)
    assert {d.source.lstrip() for d in descriptions} >= {document.text for document in documents}


def test_a_file_must_be_named_by_the_provider_that_reads_it() -> None:
    with pytest.raises(UserError, match=r"describe\.path"):
        resolve({"describe.provider": "file"})


def test_an_id_may_be_a_number_and_must_be_one_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Two files of a corpus may count their documents alike: the description would go to either."""
    documents = [named("7", TEXT), named("8", "Another river. " + TEXT), named("8", "A third river. " + TEXT)]
    path = lines(tmp_path / "d.jsonl", [{"id": 7, "position": 4, "description": "of the first"}])
    found = match(read_descriptions(path), documents, tokenizer, 64)
    assert found.positions == {documents[0].doc_id: {4: "of the first"}}
    path = lines(tmp_path / "d.jsonl", [{"id": "8", "position": 4, "description": "of which?"}])
    with pytest.raises(UserError, match="'8' is the id of several documents"):
        match(read_descriptions(path), documents, tokenizer, 64)


@pytest.mark.parametrize("before", ["", "\n\n  ", "\ufeff", "\ufeff \r\n"])
def test_an_offset_counts_in_the_text_as_its_file_has_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, before: str
) -> None:
    """White space at a text's beginning is not read, but whoever described the text has counted it."""
    stop = tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"][4][1]
    corpus = lines(tmp_path / "c.jsonl", [{"id": "d7", "text": f"{before}{TEXT}\n"}])
    documents = read_documents(resolve({"corpus.path": str(corpus), "corpus.min_characters": 1}).corpus)
    counted = len(before.removeprefix("\ufeff")) + stop  # a byte-order mark is no part of the text
    path = lines(tmp_path / "d.jsonl", [{"id": "d7", "offset": counted, "description": "here"}])
    assert list(match(read_descriptions(path), documents, tokenizer, 64).positions.values()) == [{4: "here"}]


def test_the_beginning_of_a_document_is_in_its_split_whatever_stands_before_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    document = named("d7", TEXT)
    path = lines(tmp_path / "d.jsonl", [{"text": f"\n {TEXT[:40]}", "description": "the beginning"}])
    assert match(read_descriptions(path), [document], tokenizer, 64).documents[-1].group == document.group


def test_lines_of_a_passage_are_in_one_split_with_its_documents(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """However a line names its document: otherwise the beginning of a held-out document could be trained on."""
    documents = [named("d7", TEXT), named("d8", f"Another land. {TEXT}"), named("d9", f"A third one. {TEXT}")]
    rows = [
        {"text": TEXT[:40], "passage": "p", "description": "the beginning of d7"},
        {"id": "d8", "position": 3, "passage": "p", "description": "of d8"},
        {"text": documents[2].text, "passage": "q", "description": "the whole of d9"},
        {"text": "A stranger to the corpus, by the sea", "passage": "q", "description": "of none"},
        {"text": "A valley in the north", "description": "a text"},
        {"text": "A valley in the north of the land", "description": "the same and more"},
        {"text": "A valley in the north of the land and its hills", "description": "the whole"},
        {"text": "A valley in the north by the sea", "description": "another whole"},
    ]
    found = match(read_descriptions(lines(tmp_path / "d.jsonl", rows)), documents, tokenizer, 64).documents
    groups = [document.group for document in found]
    assert groups[:2] == [documents[0].group] * 2 and groups[2] == documents[2].group
    assert groups[3] == groups[0] and groups[4] == groups[2]
    assert len(set(groups[5:9])) == 1 and len(groups) == 9 and len(set(groups)) == 3


def test_a_description_has_no_white_space_around_it(tmp_path: Path) -> None:
    """The decoder's last token would be a line break in its warm start, and a full stop everywhere else."""
    path = lines(tmp_path / "d.jsonl", [{"text": "The river", "description": "\n A recipe.\r\n"}])
    assert next(read_descriptions(path)).text == "A recipe."


@pytest.mark.parametrize("change", [lambda text: text.replace(" ", "\n\n"), str.upper, lambda text: f" {text}"])
def test_a_text_that_the_corpus_has_in_other_white_space_or_case_is_read_at_the_corpus_documents_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, change: Callable[[str], str]
) -> None:
    document = named("d7", TEXT)
    path = lines(tmp_path / "d.jsonl", [{"text": change(TEXT), "description": "the end"}])
    found = match(read_descriptions(path), [document], tokenizer, 64)
    assert found.documents == [document]
    assert found.positions == {document.doc_id: {len(tokenizer(TEXT)["input_ids"]) - 1: "the end"}}


@pytest.mark.parametrize("before", ["", "\n\n", "  \r\n"])
def test_a_position_counts_in_the_text_as_its_file_has_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, before: str
) -> None:
    corpus = lines(tmp_path / "c.jsonl", [{"id": "d7", "text": before + TEXT}])
    documents = read_documents(resolve({"corpus.path": str(corpus), "corpus.min_characters": 1}).corpus)
    spans = tokenizer(before + TEXT, return_offsets_mapping=True)["offset_mapping"]
    stop = tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"][4][1]
    counted = next(token for token, (_, end) in enumerate(spans) if end == len(before) + stop)
    row = {"position": counted, "description": "here"}
    for place in ({"id": "d7"}, {"text": before + TEXT}):
        path = lines(tmp_path / "d.jsonl", [place | row])
        assert list(match(read_descriptions(path), documents, tokenizer, 64).positions.values()) == [{4: "here"}]


def test_a_text_may_have_an_offset(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A file of whole documents, each on several lines with an offset, needs no other corpus."""
    spans = tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    rows = [{"text": TEXT, "offset": spans[token][1], "description": f"token {token}"} for token in (3, 9)]
    rows += [{"text": TEXT, "offset": len(TEXT) + 1, "description": "beyond the end"}]
    found = match(read_descriptions(lines(tmp_path / "d.jsonl", rows)), [], tokenizer, 64)
    assert list(found.positions.values()) == [{3: "token 3", 9: "token 9"}] and found.dropped.total() == 1
    path = lines(tmp_path / "d.jsonl", [{"text": TEXT, "offset": 4, "position": 2, "description": "which?"}])
    with pytest.raises(UserError, match=r"d\.jsonl:1: offset and position are both set"):
        list(read_descriptions(path))


@pytest.mark.parametrize("before", ["", "\n\n"])
def test_any_token_of_a_character_has_a_position(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, before: str
) -> None:
    document = dataclasses.replace(named("d7", "The 🙂 land"), lead=before)
    spans = tokenizer(document.text, return_offsets_mapping=True)["offset_mapping"]
    inner = next(token for token, (span, after) in enumerate(pairwise(spans)) if span[1] == after[1])
    position = inner + len(tokenizer(before + document.text)["input_ids"]) - len(spans)
    path = lines(tmp_path / "d.jsonl", [{"id": "d7", "position": position, "description": "a part of a character"}])
    found = match(read_descriptions(path), [document], tokenizer, 64)
    assert found.positions == {document.doc_id: {inner: "a part of a character"}}


def test_the_carried_texts_have_their_notes_ids() -> None:
    documents = read_documents(resolve({"corpus.path": "warmstart"}).corpus)
    assert len({document.name for document in documents}) == len(documents) and all(d.name for d in documents)
