"""What explanations claim: quoted endings, expected tokens, and what is left of them without each part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.evaluate.claims import claims, ending, holds, is_in, leading, parts, without_last, without_quotes

NOTE = '"drops", "falls" or "slopes" a little. History of the delta, slow water. Verb due: "level floor, which".'
CONTEXT = "it creeps across the delta's almost level  floor, which"


def test_the_parts_of_a_note() -> None:
    assert leading(NOTE, 1) == '"drops", "falls" or "slopes" a little.'
    assert leading(NOTE, 9) == NOTE
    # An empty line is no sentence.
    assert leading("One.\n\nTwo. Three.", 2) == "One.\n\nTwo."
    assert without_last("One.\n\nTwo.\n") == "One."
    assert without_last(NOTE) == '"drops", "falls" or "slopes" a little. History of the delta, slow water.'
    assert without_quotes(NOTE, CONTEXT).endswith("Verb due: .")
    assert without_quotes(NOTE, CONTEXT).startswith('"drops", "falls"')  # they are not in the context
    found = parts(NOTE, CONTEXT)
    assert found["bare"] == found["without_last"] == found["leading_2"]
    assert without_last("One sentence.") == ""


def test_the_ending_is_the_last_quotation_behind_the_first_sentence() -> None:
    assert ending(NOTE) == "level floor, which"
    assert ending('"of" or "the".') is None
    assert ending("No quotation. At all.") is None


@pytest.mark.parametrize(
    ("expected", "token", "result"),
    [
        (["drops", "falls"], " drops", True),
        (["Drops"], " dro", True),
        (["falls"], " drops", False),
        (["the"], "t", False),
        ([","], ",", True),
        (["the"], "", False),
        (["the"], " \n", False),
        ([], "the", False),
    ],
)
def test_expected_words_hold_a_token(expected: list[str], token: str, result: bool) -> None:
    assert holds(expected, token) is result


def test_shares_are_of_what_can_be_checked() -> None:
    texts = [NOTE, '"x" next. Ends: "not there".', "", "nothing quoted. here."]
    contexts = [CONTEXT, "other words", "of another", "text"]
    found = claims(texts, contexts, [" slopes", " y", " z", " w"], [1, 0, 3, 2])
    assert found["ending_in_context"] == 0.5 and found["ending_in_context_shuffled"] == 0.0
    assert found["candidates_hold_top1"] == 0.5 and found["candidates_hold_top1_shuffled"] == 0.0
    assert claims([""], ["x"], [""], [0]) == {}
    alone = claims(texts, contexts, [" slopes", " y", " z", " w"], [None] * 4)
    assert alone == {name: value for name, value in found.items() if not name.endswith("_shuffled")}


@given(st.text(max_size=200), st.text(max_size=80))
def test_any_text_has_parts(text: str, context: str) -> None:
    found = parts(text, context)
    assert all(len(part) <= len(text) for part in found.values())
    assert is_in(context, context) == bool(context.split())
