"""Which positions are read: fixed by the texts and the seed, split by document, and read back as written."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from nlae_jax.config import SplitConfig
from nlae_jax.data.corpus import Document
from nlae_jax.data.index import SPLITS, Index, make_index, read_index, write_index
from nlae_jax.lm.pretrained import load_tokenizer
from nlae_jax.runtime.errors import UserError
from tests.letters import SPECIAL, Letters, config, documents, flip, made


def same(left: Index, right: Index):
    assert left.doc_ids == right.doc_ids
    for a, b in zip(left.ids, right.ids, strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("split", "document", "position", "domain"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def test_index_depends_on_texts_and_seed_alone():
    first, settings = made()
    same(first, make_index(documents(40)[::-1], Letters(), settings))
    other = make_index(documents(40), Letters(), config(seed=1))
    assert (other.position != first.position).any()
    assert (other.split != first.split).any()


def test_a_document_keeps_its_positions_when_others_come_or_go():
    few, many = made(20)[0], made(40)[0]
    kept = {doc_id: few.position[few.document == i].tolist() for i, doc_id in enumerate(few.doc_ids)}
    grown = {doc_id: many.position[many.document == i].tolist() for i, doc_id in enumerate(many.doc_ids)}
    assert kept.items() <= grown.items()


@given(st.integers(4, 30), st.integers(0, 5), st.integers(1, 8), st.integers(1, 20))
def test_positions_may_be_read(count, seed, positions, min_position):
    texts = [Document(f"{i}", "|abcd|" * 6 + "abc" * i) for i in range(count)]
    settings = config(seed, positions_per_document=positions, min_position=min_position)
    chosen = make_index(texts, Letters(), settings)
    for document, ids in enumerate(chosen.ids):
        read_here = chosen.position[chosen.document == document]
        assert len(ids) <= settings.extract.max_tokens
        assert read_here.min() >= min_position
        assert read_here.max() < len(ids)
        assert (np.diff(read_here) > 0).all()
        assert (ids[read_here] != SPECIAL).all()
        candidates = (ids[min_position:] != SPECIAL).sum()
        assert len(read_here) == min(positions, candidates)


def test_texts_read_at_their_ends_are_counted_where_they_are_too_long(capsys):
    texts = [Document(f"{i}", "abc" * (4 + 40 * (i % 2)), at_end=True) for i in range(10)]
    chosen = make_index(texts, Letters(), config(max_tokens=40))
    assert len(chosen.position) == 5
    assert "5 texts read at their ends have more than extract.max_tokens = 40" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"10 texts read at their ends have more than extract\.max_tokens = 8"):
        make_index(texts, Letters(), config(max_tokens=8))


@given(st.integers(4, 200), st.integers(0, 3), st.lists(st.integers(1, 97), min_size=4, max_size=4))
def test_every_document_is_in_one_split_and_none_is_empty(count, seed, weights):
    shares = SplitConfig(*(weight / sum(weights) for weight in weights))
    settings = dataclasses.replace(config(seed), split=shares)
    chosen = make_index([Document(f"{i}", "abcdefghij") for i in range(count)], Letters(), settings)
    rows = [set(chosen.rows_of(name).tolist()) for name in SPLITS]
    assert all(rows)
    assert sum(map(len, rows)) == len(set.union(*rows)) == len(chosen.position)
    holders = [set(chosen.document[sorted(of_split)].tolist()) for of_split in rows]
    assert sum(map(len, holders)) == len(set.union(*holders)) == count
    for name, held in zip(SPLITS, holders, strict=True):
        assert abs(len(held) - getattr(shares, name) * count) <= len(SPLITS)


@pytest.mark.parametrize("rule", ["$A", "<|endoftext|> $A", "<|endoftext|> $A <|im_end|>", "$A <|im_end|>"])
@pytest.mark.parametrize("rendered", [False, True])
def test_documents_are_read_with_one_beginning_and_no_end(tiny_dir, rule, rendered):
    """Text that a chat template has made begins already."""
    tokenizer = load_tokenizer(tiny_dir)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|endoftext|>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(rule, special_tokens=special)
    texts = [("<|endoftext|>" if rendered else "") + f"{number} of the text" for number in range(4)]
    chosen = make_index([Document(f"{i}", text) for i, text in enumerate(texts)], tokenizer, config(min_position=2))
    (bos, eos), begins = (index for _, index in special), rendered or rule.startswith("<")
    for doc_id, ids in zip(chosen.doc_ids, chosen.ids, strict=True):
        bare = tokenizer.encode(f"{doc_id} of the text", add_special_tokens=False)
        assert ids.tolist() == ([bos] if begins else []) + bare
        assert eos not in ids


def test_a_document_with_a_token_that_the_subject_lacks_is_named():
    texts = documents(40)
    texts[7] = dataclasses.replace(texts[7], text="abcdef" * 5 + "z")
    make_index(texts, Letters(), config(), vocab_size=ord("z") + 1)
    with pytest.raises(UserError, match=rf"corpus: document {texts[7].doc_id}: the token 'z' has id {ord('z')}"):
        make_index(texts, Letters(), config(), vocab_size=ord("z"))


@pytest.mark.parametrize("passages", [1, 3])
def test_too_few_passages_are_said(passages):
    """All documents of a passage are in one split."""
    texts = [dataclasses.replace(text, passage=str(i % passages)) for i, text in enumerate(documents(40))]
    with pytest.raises(UserError, match=rf"documents are of {passages} passages; at least 4 are needed"):
        make_index(texts, Letters(), config())


def test_too_few_documents_are_said():
    with pytest.raises(UserError, match=r"extract\.min_position"):
        make_index(documents(40, longest=60), Letters(), config(min_position=58))


def test_index_is_read_as_written(tmp_path):
    chosen, _ = made()
    write_index(tmp_path, chosen)
    same(chosen, read_index(tmp_path))


@pytest.mark.parametrize("name", ["documents", "rows"])
def test_any_flipped_bit_of_the_index_is_noticed_or_means_nothing(tmp_path, name):
    chosen, _ = made()
    write_index(tmp_path, chosen)
    path = tmp_path / f"{name}.parquet"
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 7):
        path.write_bytes(whole)
        flip(path, position)
        try:
            same(chosen, read_index(tmp_path))
        except UserError as error:
            refused += 1
            assert str(tmp_path) in str(error)
    assert refused > len(whole) / 20


def with_columns(path, **columns):
    table = pq.read_table(path)
    for column, values in columns.items():
        table = table.set_column(table.schema.get_field_index(column), column, values)
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("documents", lambda table: {"split": pa.array(["training"] * len(table))}),
        ("documents", lambda table: {"ids": pa.array([[1]] * len(table))}),
        ("documents", lambda table: {"ids": pa.array(["x"] * len(table))}),
        ("documents", lambda table: {"ids": pa.array([[1, None]] * len(table))}),
        ("rows", lambda table: {"document": pa.array(table["document"].to_numpy() + 1)}),
        ("rows", lambda table: {"document": pa.array(table["document"].to_numpy()[::-1])}),
        ("rows", lambda table: {"document": pa.array([None] * len(table), pa.int32())}),
        ("rows", lambda table: {"position": pa.array(table["position"].to_numpy() + 1000)}),
        ("rows", lambda table: {"position": pa.array(["3"] * len(table))}),
    ],
)
def test_rows_that_are_of_no_document_are_an_error(tmp_path, name, change):
    chosen, _ = made()
    write_index(tmp_path, chosen)
    path = tmp_path / f"{name}.parquet"
    with_columns(path, **change(pq.read_table(path)))
    with pytest.raises(UserError, match=r"does not fit documents|damaged"):
        read_index(tmp_path)


@pytest.mark.parametrize("name", ["documents", "rows"])
def test_a_file_of_the_index_that_is_missing_is_named_with_the_remedy(tmp_path, name):
    chosen, _ = made()
    write_index(tmp_path, chosen)
    (tmp_path / f"{name}.parquet").unlink()
    with pytest.raises(UserError, match=f"{name}.parquet: missing; restore it, or delete"):
        read_index(tmp_path)


def test_indexes_of_older_runs_are_read(tmp_path):
    """Their token ids are lists with offsets of 32 bits, their pages without checksums."""
    chosen, _ = made()
    write_index(tmp_path, chosen)
    path = tmp_path / "documents.parquet"
    with_columns(path, ids=pa.array([ids.tolist() for ids in chosen.ids], pa.list_(pa.int32())))
    same(chosen, read_index(tmp_path))


def test_kinds_of_text_are_kept_and_tell_no_index_from_another(tmp_path):
    named = [dataclasses.replace(document, domain=f"kind {i % 3}") for i, document in enumerate(documents(40))]
    chosen, plain = make_index(named, Letters(), config()), made()[0]
    write_index(tmp_path, chosen)
    same(chosen, read_index(tmp_path))
    kind_of = {document.doc_id: document.domain for document in named}
    assert chosen.domain == [kind_of[doc_id] for doc_id in chosen.doc_ids]
    assert chosen.digest() == plain.digest() and set(plain.domain) == {""}
    path = tmp_path / "documents.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["domain"]), path)  # as it was before there was the column
    same(plain, read_index(tmp_path))
