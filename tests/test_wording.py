"""Words, sentences, lists and quoted spans of a text, and what it repeats."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.evaluate.wording import candidates, has_repeated_item, has_repeated_sentence, named_next, sentences, words

NOTE = (
    '"drops", "falls" or "slopes" a few metres. Hydrology of a delta, slow flood, dry winter. It ends: "floor, which".'
)
TEMPLATE = 'Next comes "of", "to" or a new line. The text is about python, data and files. The text ends: a list of'


@pytest.mark.parametrize(
    "text",
    [
        'Next comes "of", "of" or "of".',
        '"of" or "of" in brackets',
        '"of", "to" or "of", then a noun',
        'Next comes "0", "0" or "1".',
        "“of”, “of” or “to”",
        'now "s", then "for" or "for" the greeting.',
        '"of" the servant, or "of" the master.',
        '"from" which "to" then, or even "to"',
        "“of” the servant, or “of” the master",
        "The text is about platform, platform and platform.",
        "The text is about cats and cats. The text ends: here",
        "about cats, dogs and Cats again",
        "cats, dogs, birds and cats",
        "Next comes a new line, a new line or a tab.",
        "of, of or of",
        "It is about data data data and more",
        "苹果、苹果、梨",
        'It asks: "a", "a"',
    ],
)
def test_a_repeated_item_is_found(text):
    assert has_repeated_item(text)


@pytest.mark.parametrize(
    "text",
    [
        NOTE,
        TEMPLATE,
        "",
        "a",
        ",,, and or",
        'Next comes "The", "the" or "then".',
        '"of" comes. "of" comes not, "of course"',  # of three lists
        "He tries again and again, more and more.",
        "The array is 0, 0, 1 and 0.",
        "the city of cats, and cats of the city",
        "cats and dogs: dogs and birds (birds, fish)",
        'a "cat, cat" in quotes',
        '"a" before "a" is no list',
        '"a" and "b", then the "c" of "c"',
        '"a", "a b" or "b"',
        "an open “ first, or “ second",
        "data, database and databases",
        "He, however, and he said",
        "He had had that that year",
        "a well-known, well-known-ish fact",
    ],
)
def test_what_is_no_repeated_item_is_left_alone(text):
    assert not has_repeated_item(text)


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("The text ends. It is long. The text  ENDS!", True),
        ("The text ends\nThe text ends", True),
        ("文字结束。文字结束。", True),
        ("Yes. No. Yes.", False),  # one word may be an abbreviation
        ('It says "the end. It says" here. It says more.', False),
        ("See version 3.5. See version 3.6.", False),
        (NOTE, False),
        (TEMPLATE, False),
        ("", False),
    ],
)
def test_repeated_sentences(text, repeated):
    assert has_repeated_sentence(text) is repeated


def test_sentences_words_and_candidates():
    assert sentences('Is it "a. b"? Yes, 3.5! 好。End') == ['Is it "a. b"?', " Yes, 3.5!", " 好。", "End"]
    expected = ["don't", "the", "cat’s", "3", "snake", "case", "苹", "果", "ünder"]
    assert words("Don't, the CAT’s 3 snake_case 苹果 Ünder") == expected
    assert candidates(NOTE) == ["drops", "falls", "slopes"]
    assert candidates(TEMPLATE) == ["of", "to"]
    assert candidates('Next comes ".", "!" or " x". It says "no".') == [".", "!", "x"]
    assert candidates("“a” or “b”, then") == candidates('an empty "", "a", " " or "b"') == ["a", "b"]
    assert candidates("No quote here. Then “a”.") == candidates("") == candidates('an open "quote') == []


@pytest.mark.parametrize(
    "sentence",
    [
        'The next word may be "a" or "b"',
        'Next comes "a" or "b"',
        'Expects "a" and "b"',
        'It predicts "a" or "b"',
        'Most likely "a" or "b"',
        'The likeliest words are "a" and "b"',
        '"a" or "b" is likely',
        "It may continue with “a” or “b”",
        'It continues with "a" or "b"',
        'Then "a" or "b" follows',
        'Likely to follow: "a", "b"',
        'What follows may be "a" or "b"',
        'A noun as its continuation: "a" or "b"',
    ],
)
def test_next_tokens_may_be_named_later(sentence):
    assert named_next(f'A recipe. It begins with "Put". {sentence}. It stops at "the".') == ["a", "b"]


@pytest.mark.parametrize(
    "sentence",
    [
        'It follows "Dear" and ends at "to"',
        'It continues "Dear"',
        'The text that follows "Dear" is formal',
        'A continuation of "Dear"',
        '"Dear" followed by a name',
        'The following words: "Dear", "Sir"',
        'Likely a letter, as it begins with "Dear"',
        'The unlikely "Dear"',
        'As expected, it stops at "to"',
        'It stands next to "Dear"',
        'The quotation says "what comes next"',
        "It predicts nothing",
    ],
)
def test_what_came_before_is_no_next_token(sentence):
    assert named_next(f"Likely a letter. {sentence}.") == []


@given(st.text(st.sampled_from("ab .\"“”,\nor苹。:('-")) | st.text())
def test_any_text_is_read_whole(text):
    assert "".join(sentences(text)) == text
    assert isinstance(has_repeated_item(text), bool)
    assert all(word == word.casefold() and word for word in words(text))
    assert all(item in sentences(text)[0] for item in candidates(text))
    known = " ".join(words(text))
    assert not known or has_repeated_sentence(f"{text}\nso {known}.\nso {known}!")


NAMES = st.sampled_from(["of", "an apple", "“x”", "苹果", "0", "-ing"])


@given(st.text(st.sampled_from("ab .,\nor:(")), NAMES, st.text("ab", min_size=1))
def test_a_list_in_any_text_is_found(before, name, other):
    assert has_repeated_item(f'{before}: "{name}", "{other}" or "{name}". {before}')
    assert has_repeated_item(f"{before}. The text is about zebra, {other} and zebra.")
