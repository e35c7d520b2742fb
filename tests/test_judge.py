"""A judge's verdicts: of one that reads, one that always says the same, and one that says nothing to be read."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.cli import main
from nlae_jax.evaluate.judge import CHOICE, SUPPORT, answers_asked, chosen, judged, supported
from nlae_jax.evaluate.work import Work
from tests.planted_pairs import SIZES, planted, planted_rows


@pytest.fixture(scope="module")
def rows(tiny_lm):
    return planted_rows(tiny_lm)


def ending(text):
    return " ".join(text.split()[-6:])


def reading(instruction, texts):
    """A judge that looks whether what a note quotes stands in the text, and counts two claims in every note."""
    answers = []
    for text in texts:
        notes, context = text.split("\n\nThe text:\n")
        found = [quoted in context for quoted in re.findall('"(.*?)"', notes)]
        if instruction == SUPPORT:
            answers.append(f"The text supports {2 * found[0]} of 2 claims.")
        else:
            answers.append(f"The note about the text is {'A' if found[0] else 'B'}.")
    return answers


def verdicts(tiny_lm, rows, directory, ask, documents=None):
    rows = rows if documents is None else rows._replace(document=documents)
    pair = planted(
        tiny_lm, rows, lambda row, n: f'It ends "{ending(rows.contexts[row])}".', lambda text: rows.h[0], "quoting"
    )
    work = Work(pair, rows, directory, 0, 100, SIZES)
    judged(work, ask)
    return work.ledger.sections.get("truth", {})


def test_a_judge_that_reads_finds_what_is_true(tiny_lm, rows, tmp_path):
    found = verdicts(tiny_lm, rows, tmp_path, reading)
    assert found["judged_support"]["value"] == 1 and found["judged_support"]["n"] == SIZES.judged
    assert found["judged_support"]["controls"]["permuted"]["value"] == 0
    assert found["judged_choice"]["value"] == 1
    assert found["judged_choice"]["controls"]["chance"]["value"] == 0.5


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_judge_that_always_says_the_same_is_at_chance(tiny_lm, rows, tmp_path, letter):
    def same(instruction, texts):
        sentence = (
            f"The note about the text is {letter}." if instruction == CHOICE else "The text supports 3 of 4 claims."
        )
        return [sentence] * len(texts)

    found = verdicts(tiny_lm, rows, tmp_path, same)
    assert found["judged_choice"]["value"] == 0.5
    assert found["judged_support"]["value"] == found["judged_support"]["controls"]["permuted"]["value"] == 0.75


def test_what_cannot_be_read_is_counted_out(tiny_lm, rows, tmp_path):
    asked = []

    def half(instruction, texts):
        asked.extend(texts)
        answers = reading(instruction, texts)
        return [answer if row % 2 else "I cannot say, sorry." for row, answer in enumerate(answers)]

    found = verdicts(tiny_lm, rows, tmp_path, half)
    assert found["judged_support"]["n"] == found["judged_choice"]["n"] == SIZES.judged // 2
    assert len(asked) == answers_asked(SIZES.judged)
    nothing = verdicts(tiny_lm, rows, tmp_path / "none", lambda instruction, texts: [None] * len(texts))
    assert nothing["judged_choice"]["value"] is None and nothing["judged_choice"]["n"] == 0


def test_with_one_document_there_is_nothing_to_tell_it_from(tiny_lm, rows, tmp_path):
    found = verdicts(tiny_lm, rows, tmp_path, reading, np.zeros(len(rows.h), int))
    assert found["judged_support"]["value"] == 1
    assert found["judged_support"]["controls"]["permuted"]["n"] == found["judged_choice"]["n"] == 0


def test_without_a_judge_there_is_no_figure(tiny_lm, rows, tmp_path):
    assert verdicts(tiny_lm, rows, tmp_path, None) == {}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The text supports 2 of 3 claims.", (2, 3)),
        ("the text supports 0 of the 1 claim", (0, 1)),
        ("The text supports 4 of 3 claims.", None),
        ("The text supports 1 of 999 claims.", None),
        ("The text supports 1 of 2 claims. The text supports 2 of 2 claims.", None),
        ("The text supports two of three claims.", None),
        (None, None),
    ],
)
def test_counts_are_read_or_are_none(answer, expected):
    found = supported(answer)
    assert found == expected if expected else np.isnan(found).all()


@given(st.text())
def test_any_answer_is_read_without_an_error(text):
    assert chosen(text) in (None, "A", "B") and len(supported(text)) == 2


def test_both_notes_are_no_choice():
    assert chosen("The note about the text is A.") == "A" == chosen('the note about the text is "a"')
    assert chosen("The note about the text is A. The note about the text is B.") is None
    assert chosen("The note about the text is Absent.") is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The note about the text is a summary, so it is note b.", None),
        ("THE NOTE ABOUT THE TEXT IS NOTE B", "B"),
        ("the note about the text is b", "B"),
        ("The note about the text is A because it names the river.", "A"),
        ("The note about the text is a vague one. The note about the text is B.", "B"),
    ],
)
def test_an_article_is_no_choice(answer, expected):
    assert chosen(answer) == expected


def test_the_command_says_what_is_missing(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "--model", "smollm2-135m", "--text", "a", "--out", str(tmp_path), "--judge"])
    assert "--judge takes --config" in capsys.readouterr().err
