"""What the decoder is shown of an explanation: sentences and quoted spans are found, and cut, on token ids."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from nlae_jax.config import ViewsConfig, resolve
from nlae_jax.lm.tiny import tiny_tokenizer
from nlae_jax.lm.tokens import pad, padded_width
from nlae_jax.roles.views import (
    Marks,
    keep,
    marks,
    open_quotations,
    repeated_strings,
    repeated_words,
    sentences,
    shown,
)
from nlae_jax.runtime.errors import UserError

NOTE = 'a or "b." or "c", the end. Of the land. It ends: "in the".'


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), eos_token="<|im_end|>")


def encoded(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[jnp.ndarray, jnp.ndarray, Marks]:
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    padded, length = pad(ids, padded_width(max(map(len, ids)) + 3))
    return jnp.asarray(padded), jnp.asarray(length), marks(tokenizer, len(tokenizer) + 5)


def test_sentences_end_outside_quotation_marks(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, length, tables = encoded(tokenizer, [NOTE, "one two"])
    sentence, quoted, count = sentences(ids, length, tables)
    assert count.tolist() == [3, 1]
    text = lambda row, chosen: tokenizer.decode(ids[row][np.asarray(chosen)])  # noqa: E731
    valid = jnp.arange(ids.shape[1]) < length[0]
    assert text(0, valid & (sentence[0] == 0)) == 'a or "b." or "c", the end.'
    assert text(0, valid & (sentence[0] == 2)) == ' It ends: "in the".'
    assert '"' not in text(0, valid & ~quoted[0]) and "in the" not in text(0, valid & ~quoted[0])
    assert not quoted[1].any()


def test_shares_of_the_batch_lose_sentences_and_quotes(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, length, tables = encoded(tokenizer, [NOTE] * 8)
    config = ViewsConfig(leading=0.5, unquoted=0.5)
    seen, seen_length, whole = shown(ids[:, None], length[:, None], tables, config)
    texts = [tokenizer.decode(row[:n]) for row, n in zip(seen[:, 0], seen_length[:, 0].tolist(), strict=True)]
    assert whole.tolist() == [False] * 6 + [True] * 2
    assert texts[6:] == [NOTE, NOTE]
    assert texts[0] == 'a or "b." or "c", the end.' and texts[1] == texts[0]
    assert all("It ends" not in text for text in texts[:4])
    assert all('"' not in text for text in texts[2:6])
    assert ["Of the land" in text for text in texts[:4]] == [False, False, True, True]


def test_nothing_is_cut_by_default(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, length, tables = encoded(tokenizer, [NOTE, "one two"])
    seen, seen_length, whole = shown(ids[:, None], length[:, None], tables, ViewsConfig())
    assert (seen[:, 0] == jnp.where(jnp.arange(ids.shape[1]) < length[:, None], ids, 0)).all()
    assert (seen_length[:, 0] == length).all() and whole is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"of", "of" or "the".', 1),
        ('"of", "of" or "of".', 2),
        ('"of", "a" or " of ".', 1),
        ('"of", "a" or "the". It ends: "of".', 0),
        ('".", "," or ".".', 1),
        ('"in the", "in" or "the".', 0),
        ('"in the", "of the" or "in the".', 1),
        ('"", "" or "of".', 0),
        ('of, of or of. "of", or "of', 0),
        ('"the land", "a land" or "the land". "end", "end".', 2),
        ("", 0),
    ],
)
def test_strings_that_a_sentence_quotes_again(tokenizer: PreTrainedTokenizerFast, text: str, expected: int) -> None:
    assert repeated_strings(*encoded(tokenizer, [text, "a"])).tolist() == [expected, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It mentions cats, dogs and cats.", 1),
        ("It mentions cats, dogs and Cats.", 1),
        ("It mentions cats, cats and cats.", 2),
        ("Prose about land, land.", 1),
        ("Prose about land; land", 1),
        ("It mentions cats, dogs and cat.", 0),
        ("It mentions cats, dogs and cats again.", 0),
        ("It mentions cats and dogs. It mentions dogs, cats.", 0),
        ("cats. cats. cats", 0),
        ('"cats", "cats" or "cats".', 0),
        ('"cats" cats, "dogs" or cats.', 1),
        ("1, 1 and 1", 0),
        ("the land of the land of", 0),
        ("", 0),
    ],
)
def test_words_that_a_list_names_again(tokenizer: PreTrainedTokenizerFast, text: str, expected: int) -> None:
    ids, length, tables = encoded(tokenizer, [text, "a"])
    assert repeated_words(ids, length, tables).tolist() == [expected, 0]
    assert repeated_words(ids[:, None], length[:, None], tables).tolist() == [[expected], [0]]


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ('"of" or "the".', 0),
        ('"is", "was observed or "may".', 1),
        ('It ends: "of', 1),
        ("“of”.", 0),
        ("of", 0),
        ("", 0),
    ],
)
def test_a_quotation_that_does_not_end(tokenizer: PreTrainedTokenizerFast, text: str, is_open: int) -> None:
    ids, length, tables = encoded(tokenizer, [text, 'a "'])
    assert open_quotations(ids, length, tables).tolist() == [is_open, 1]
    assert open_quotations(ids[:, None], length[:, None], tables).tolist() == [[is_open], [1]]


@pytest.fixture(scope="module")
def counted(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], int]:
    """Repeated strings of a text of up to 128 tokens, compiled once."""
    tables, count = marks(tokenizer, len(tokenizer)), jax.jit(repeated_strings)

    def of(text: str) -> int:
        ids, length = pad([tokenizer.encode(text, add_special_tokens=False)], 128)
        return int(count(ids, length, tables)[0])

    return of


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["of", "the", "the land", ",", "it's", ""]), min_size=1, max_size=4), max_size=3)
)
def test_repeated_strings_are_counted_as_a_reader_counts_them(
    counted: Callable[[str], int], lists: list[list[str]]
) -> None:
    text = " ".join(" or ".join(f'"{item}"' for item in items) + ", then it ends." for items in lists)
    named = [[item for item in items if item] for items in lists]
    assert counted(text) == sum(len(items) - len(set(items)) for items in named)


def test_a_single_sentence_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, length, tables = encoded(tokenizer, ["one two three"] * 4)
    _, seen_length, _ = shown(ids[:, None], length[:, None], tables, ViewsConfig(leading=1.0))
    assert (seen_length[:, 0] == length).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(1, 99), st.booleans()), max_size=9), min_size=1, max_size=5))
def test_kept_tokens_move_together_in_order(rows: list[list[tuple[int, bool]]]) -> None:
    width = 10
    ids, length = pad([[token for token, _ in row] for row in rows], width)
    kept = np.zeros((len(rows), width), bool)
    for row, entries in enumerate(rows):
        kept[row, : len(entries)] = [flag for _, flag in entries]
    moved, count = keep(jnp.asarray(ids), jnp.asarray(length), jnp.asarray(kept))
    for row, entries in enumerate(rows):
        expected = [token for token, flag in entries if flag]
        assert count[row] == len(expected)
        assert moved[row].tolist() == expected + [0] * (width - len(expected))


def test_shares_are_between_nothing_and_all() -> None:
    for name in ("views.leading", "views.unquoted", "rl.contrastive"):
        with pytest.raises(UserError, match=name):
            resolve({name: 1.5})
