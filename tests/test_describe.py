"""Warm-start descriptions: the template, on any text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlae_jax.config import DescribeConfig
from nlae_jax.data import template
from nlae_jax.data.describe import make_describer
from nlae_jax.data.describer import Context, DescribeResources
from nlae_jax.data.template import describe_by_template
from nlae_jax.runtime.errors import UserError


def resources(tmp_path, generate=None):
    frequency = {"the": 90, "bread": 4, "oven": 5, "value": 60, "hot": 20, "cold": 20, "lost": 20, "needs": 40}
    return DescribeResources(frequency, 100, generate, tmp_path / "cache")


def contexts(n):
    return [Context(f"doc{i}", f"Text number {i} about bread", (" the",)) for i in range(n)]


# --- the template

BREAD = "The bread needs a hot oven. Any value of the bread is lost when the oven is cold"


def test_template_wording(tmp_path):
    context = Context("a", BREAD, (" and", "\n", "er", " so"))
    assert describe_by_template(context, resources(tmp_path)) == (
        'Next comes "and", a new line or "-er". The text is about oven, bread and cold. The text ends: the oven is cold'
    )


@pytest.mark.parametrize(
    ("token", "name"),
    [
        ("\n", "a new line"),
        ("\n\n", "a blank line"),
        ("   ", "a space"),
        ("\t", "a tab"),
        ("<|im_end|>", "the end of the text"),
        ("</s>", "the end of the text"),
        ("<|im_start|>", "a special token"),
        ("<", "a less-than sign"),
        (' "', "a quotation mark"),
        ("\ufffd", "a rare character"),
        ("\x00", "a rare character"),
        ("List<int>", '"-List(int)"'),
        (" caf\u00e9", '"caf\u00e9"'),
        ("x" * 50, '"-' + "x" * 16 + '"'),
    ],
)
def test_odd_tokens_are_named(tmp_path, token, name):
    line = describe_by_template(Context("a", "bread", (token,)), resources(tmp_path))
    assert line.startswith(f"Next comes {name}. ")


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("", "The text has not begun"),
        ("  \n", "The text has not begun, a new line after it"),
        ("one two\n\n  ", "The text ends, a blank line after it: one two"),
        ("a b c d e f", "The text ends: c d e f"),
        ('say “hi” to "me"', "The text ends: say 'hi' to 'me'"),
        ("for x in range(10):\n    total += x<y", "The text ends: range(10): total += x(y"),
        ("a" * 100, "The text ends: " + "a" * 40),
    ],
)
def test_endings(tmp_path, text, ending):
    line = describe_by_template(Context("a", text, ()), resources(tmp_path))
    assert line.endswith(ending)


def test_topic_words_weigh_rarity_count_and_recency():
    frequency = {"common": 99, "first": 10, "second": 10, "twice": 10}
    text = "common common twice first twice second common"
    assert template.topic_words(text, frequency, 100) == ["twice", "second", "first"]
    assert template.topic_words("the of and", {}, 0) == []


def test_document_frequencies_count_documents():
    assert template.document_frequencies(["Bread bread oven", "the bread"]) == {"bread": 2, "oven": 1}


ANY_TEXT = st.text(st.characters(), max_size=80) | st.text("<>\"'/explanation \n\t“”\x85\u2028\ud800", max_size=80)


@settings(deadline=None, max_examples=200)
@given(text=ANY_TEXT, tokens=st.lists(ANY_TEXT, max_size=5))
def test_template_is_one_plain_line_for_any_text(text, tokens):
    context = Context("a", text, tuple(tokens))
    held = DescribeResources({"explanation": 3}, 5, None, None)
    line = describe_by_template(context, held)
    assert line == describe_by_template(context, held)
    assert line.strip() and len(line.splitlines()) == 1 and min(line) >= " "
    assert not set(line) & set("<>\n\r“”")
    line.encode("utf-8")
    assert len(line) < 260


def test_template_reports_progress(tmp_path):
    done = []
    described = make_describer(DescribeConfig(), resources(tmp_path), done.append)(contexts(3))
    assert done == [3] and len(described) == 3 and all(described)


def test_an_unknown_provider_is_named(tmp_path):
    with pytest.raises(UserError, match="'magic' is unknown: use one of template, file, describer, subject, openai"):
        make_describer(DescribeConfig(provider="magic"), resources(tmp_path))
