"""What is said against what is so: words, quotations, next tokens, continuations, samples."""

import math

import numpy as np
import pytest

from nlae_jax.evaluate import truth

CONTEXT = "The old man rode a grey horse into the town."


def test_content_words_leave_out_grammar_and_frame():
    assert truth.content_words('Next comes "of". The text is about 3 grey horses.') == {"grey", "horses"}


def test_content_words_of_text_without_spaces_are_pairs_of_characters():
    assert truth.content_words("灰色の馬") == {"灰色", "色の", "の馬"}
    assert truth.words_in_context("灰色の馬", "昔、灰色の犬がいた。") == (2, 3)


def test_words_and_quotations_in_the_context():
    assert truth.words_in_context("A grey dragon rode.", CONTEXT) == (2, 3)
    assert truth.quotes_in_context('"grey horse", "grey dragon", "town"', CONTEXT) == (1, 2)
    assert truth.quotes_in_context("none", CONTEXT) == (0, 0)
    # A single word is a quotation where it is no next token.
    assert truth.quotes_in_context('"of" or "to". A tale of "horse" and "cart". It stops at "town", ".".', CONTEXT) == (
        2,
        3,
    )


@pytest.mark.parametrize(
    ("note", "counts"),
    [
        ('A recipe. The next word may be "salt" or "oil". It stops at "the".', (1, 1)),
        ('\n\n"salt" or "oil". It stops at "the".', (1, 1)),
        ('A recipe. Expects "salt", "oil" or "put in". It stops at "the" and "end".', (2, 3)),
        ('A recipe. It stops at "the".', (1, 1)),
        ('Likely a letter. It follows "put" and ends at "the".', (2, 2)),
    ],
)
def test_single_words_where_next_tokens_are_named_are_no_quotations(note, counts):
    assert truth.quotes_in_context(note, "Put in the") == counts


@pytest.mark.parametrize(
    ("note", "ranked", "most", "expected"),
    [
        ('Next comes "of" or "to".', [" to", " in"], 1, 1.0),
        ('Next comes "of".', [" to", " of"], 1, 0.0),
        ('Next comes "of".', [" to", " of"], 5, 1.0),
        ("Nothing quoted.", [" to"], 1, None),
        ('Next comes "of".', ["\n", " of"], 5, None),
        ("", [" to"], 1, None),
        ('It is about "horses". It stops at "to".', [" to"], 1, 0.0),
        ('A tale. It stops at "to".', [" to"], 1, None),
        ('A tale. It stops at "grey". The next word may be "of" or "to".', [" to"], 1, 1.0),
        ('A tale of "to". Expects "of" and "in".', [" to"], 1, 1.0),
    ],
)
def test_expected_tokens(note, ranked, most, expected):
    found = truth.expects(note, ranked, most)
    assert math.isnan(found) if expected is None else found == expected


def test_the_first_candidate_is_picked_if_it_is_the_best():
    scores = np.array([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0], [2.0, 2.0, 1.0]])
    np.testing.assert_allclose(truth.picked(scores), [1, 0, 0.5])


def test_recurrence_is_of_words_that_stood_there_before():
    before = ["a grey horse", "a lamp", ""]  # an unreadable one counts for nothing
    assert truth.recurrence("a grey horse", before) == pytest.approx((1 + 0) / 2)
    assert math.isnan(truth.recurrence("a grey horse", [""]))
    assert math.isnan(truth.recurrence("of the", before))


def test_consensus_is_what_most_samples_say():
    samples = ["grey horse", "grey horse", "grey lamp", "grey", ""]
    assert truth.consensus(samples) == {"grey"}
    assert truth.consensus(samples, 0.4) == {"grey", "horse"}
    assert truth.precision({"grey", "lamp"}, CONTEXT) == (1, 2)
    assert truth.precision(set(), CONTEXT) == (0, 0)
