"""Parts of explanations, twins and copied runs: pure text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.evaluate import text
from nlae_jax.evaluate.wording import words

NOTE = 'Next comes "of", "the" or a verb. It is a letter about a horse. The text ends "a grey horse".'


def test_sentences_that_are_left():
    assert text.without_sentence(NOTE, 1) == 'Next comes "of", "the" or a verb. The text ends "a grey horse".'
    assert text.without_sentence(NOTE, -1).endswith("about a horse.")
    assert text.without_sentence("One only.", 0) == ""


def test_quotations():
    assert text.quotes_only(NOTE) == '"of" "the" "a grey horse"'
    assert text.without_all_quotes(NOTE) == "Next comes , or a verb. It is a letter about a horse. The text ends ."


@given(st.text(alphabet='ab c."', max_size=60), st.integers(0, 3))
def test_shuffling_keeps_every_character(given_text, seed):
    for shuffle in (text.shuffled_sentences, text.shuffled_words):
        shuffled = shuffle(given_text, seed)
        assert sorted("".join(shuffled.split())) == sorted("".join(given_text.split()))
        assert shuffle(given_text, seed) == shuffle(given_text, seed)


def test_shuffling_changes_the_order():
    assert text.shuffled_sentences(NOTE, 0) != NOTE
    long = " ".join(map(str, range(30))) + "."
    assert text.shuffled_words(long, 0) != long
    for seed in range(20):  # half of the orders of two words are the one that there was
        assert text.shuffled_words("moon river", seed) == "river moon"


def test_words_without_spaces_between_them_are_shuffled_too():
    """A code in the order of characters would pass for words otherwise."""
    note = "これは馬についての手紙です。"
    shuffled = text.shuffled_words(note, 0)
    assert shuffled != note and sorted(shuffled) == sorted(note)
    assert text.shuffled_words("手 letter", 1) == "letter手"


def test_first_tokens(tokenizer):
    ids = tokenizer.encode(NOTE, add_special_tokens=False)
    assert text.first_tokens(tokenizer, NOTE, len(ids)) == NOTE
    assert NOTE.startswith(text.first_tokens(tokenizer, NOTE, 4))


def test_variants_of_a_text_without_sentences(tokenizer):
    assert set(text.variants(tokenizer, "", 0).values()) == {""}


# --- twins


RANKED = [" of", " to", " the", " in", " a", " an", " at", " by", " for", " or", " so", " no"]


def test_twin_names_another_token_in_the_place_of_the_likeliest():
    assert text.twin(NOTE, RANKED, (1, 2, 3)) == NOTE.replace('"of"', '"to"')
    assert text.twin(NOTE, RANKED, (2, 3)) == NOTE.replace('"of"', '"in"')  # "the" is named already
    assert text.twin(NOTE, RANKED, range(7, 12)) == NOTE.replace('"of"', '"by"')


@pytest.mark.parametrize(
    ("note", "ranked", "ranks"),
    [(NOTE, [" on", *RANKED], (1, 2)), ("", RANKED, (1, 2)), (NOTE, ["\n", *RANKED], (1,)), (NOTE, RANKED, (2,))],
    ids=["not named", "empty", "white space", "all named"],
)
def test_no_twin_where_nothing_can_be_swapped(note, ranked, ranks):
    assert text.twin(note, ranked, ranks) is None


# --- copying


CONTEXT = "The old man rode a grey horse into the town, and the grey horse was tired."


def test_runs_are_as_long_as_can_be():
    assert text.copied_runs("A grey horse into the sea.", CONTEXT) == [("a", "grey", "horse", "into", "the")]
    assert text.copied_runs("grey horse was; old man rode", CONTEXT) == [
        ("grey", "horse", "was"),
        ("old", "man", "rode"),
    ]
    assert text.copied_runs("horse man grey", CONTEXT) == []  # single words are no runs


def test_a_run_is_of_whole_words():
    assert text.copied_runs("he old", CONTEXT) == []


def test_bits_are_what_exceeds_fifteen():
    bits = dict.fromkeys([*words(CONTEXT), "sea"], 4.0)
    assert text.copied_bits("A grey horse into the sea.", CONTEXT, bits) == pytest.approx(5 * 4 - 15)
    assert text.copied_bits("grey horse was", CONTEXT, bits) == 0
    assert text.copied_bits("horse sea grey", CONTEXT, bits) == 0


def test_rare_words_have_more_bits():
    bits = text.word_bits(["a a a b", "a a a a"])
    assert bits == {"a": pytest.approx(0.1926, abs=1e-3), "b": pytest.approx(3.0)}


@given(st.text(alphabet="ab ", max_size=40), st.text(alphabet="ab ", max_size=40))
def test_a_text_copies_itself_whole_and_nothing_of_an_empty_one(own, other):
    assert text.copied_runs(own, "") == []
    found = words(own)
    assert text.copied_runs(own, own) == ([tuple(found)] if len(found) > 1 else [])
    assert all(len(run) > 1 for run in text.copied_runs(own, other))
