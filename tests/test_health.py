"""Whether explanations have become something else than prose about their activation: measures, bounds, warnings."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.evaluate.health import MEASURES, Watch, health, share_among

MARKER = "㈎"
NOTE = (
    '"drops", "falls" or "slopes" a few metres. Hydrology of a delta, slow flood, dry winter. It ends: "floor, which".'
)
TEMPLATE = 'Next comes "of", "to" or a new line. The text is about python, data and files. The text ends: a list of'
HEALTH = {measure.key: measure for measure in MEASURES}


# --- many texts


def test_the_numbers_by_hand():
    texts = ['"a" or "b" comes.', '"b" or "c" comes now.', "", f"苹果 comes {MARKER}, {MARKER}"]
    assert health(texts, MARKER) == pytest.approx(
        {
            "repeated_rate": 0,
            "repeated_item_rate": 0,
            "repeated_sentence_rate": 0,
            "marker_rate": 1 / 3,
            "cjk_rate": 1 / 3,
            "distinct_explanations": 1,
            "distinct_1": 8 / 12,  # of a or b comes, b or c comes now, 苹 果 comes
            "distinct_2": 9 / 9,
            "distinct_3": 6 / 6,
            "changed_words": (2 + 2) / (5 + 3),
            "changed_candidates": 1 / 2,
        }
    )


def test_both_kinds_of_repetition_count():
    measured = health([NOTE, '"a" or "a"', "It ends. It ends.", '"a" or "a". "a" or "a".'], MARKER)
    assert (measured["repeated_item_rate"], measured["repeated_sentence_rate"]) == (1 / 2, 1 / 2)
    assert measured["repeated_rate"] == 3 / 4


def test_one_template_for_all():
    measured = health([TEMPLATE] * 10, MARKER)
    assert measured["distinct_explanations"] == 0.1
    assert measured["changed_words"] == measured["changed_candidates"] == 0
    assert measured["distinct_3"] < measured["distinct_2"] * 1.2 < 0.15


def test_samples_of_one_activation_are_not_compared_with_each_other():
    numbered = [f'"a{i}" comes. About topic{i}.' for i in range(6)]
    of_each = health([text for text in numbered for _ in range(3)], MARKER, group=3)
    assert of_each == pytest.approx(health(numbered, MARKER))
    assert of_each["distinct_explanations"] == of_each["changed_candidates"] == 1
    same_for_all = health([*numbered[:3]] * 6, MARKER, group=3)
    assert same_for_all["distinct_explanations"] == pytest.approx(1 / 6)
    assert same_for_all["changed_words"] == 0


def test_what_cannot_be_measured_is_missing():
    assert health([], MARKER) == health(["", ""], MARKER) == {}
    alone = health(["a b c", ""], MARKER)
    assert alone.keys() == {"repeated_rate", "repeated_item_rate", "repeated_sentence_rate", "marker_rate", "cjk_rate"}
    assert health(["a b", "", "", "a b"], MARKER, group=2).keys() == alone.keys()
    unquoted = health(["a b", "c d"], MARKER)
    assert "changed_candidates" not in unquoted and "distinct_3" not in unquoted and unquoted["distinct_2"] == 1
    assert "distinct_1" not in health(["?", "!"], MARKER)


@given(st.lists(st.text(st.sampled_from('ab "“”,.\n苹㈎'), max_size=12), max_size=12), st.integers(1, 3))
def test_every_measure_is_a_share(texts, group):
    texts = texts[: len(texts) // group * group]
    measured = health(texts, MARKER, group)
    assert all(type(value) is float and 0 <= value <= 1 for value in measured.values())
    assert measured.keys() <= HEALTH.keys()
    if measured:
        parts = measured["repeated_item_rate"], measured["repeated_sentence_rate"]
        assert max(parts) <= measured["repeated_rate"] <= sum(parts) + 1e-9
    assert health([text for text in texts if text], MARKER) == health(texts, MARKER)
    pooled = [name for name in measured if not name.startswith(("distinct", "changed"))]
    backwards = health(texts[::-1], MARKER, group)
    assert [backwards[name] for name in pooled] == pytest.approx([measured[name] for name in pooled])


def test_share_among():
    assert share_among(["a", "b", "", "c"], ["b", "", "x"]) == pytest.approx(1 / 3)
    assert share_among(["", ""], ["a"]) is None
    assert share_among(["a"], []) == 0


# --- bounds


def test_every_measure_is_told_once_and_every_bound_has_advice():
    assert len(HEALTH) == len(MEASURES)
    for measure in MEASURES:
        assert bool(measure.bound) == bool(measure.advice)
        assert sum(limit is not None for limit in (measure.at_most, measure.at_least, measure.above)) <= 1


@pytest.mark.parametrize(
    ("values", "key", "healthy"),
    [
        ({"repeated_rate": 0.02}, "repeated_rate", True),
        ({"repeated_rate": 0.021}, "repeated_rate", False),
        ({"distinct_explanations": 0.95}, "distinct_explanations", True),
        ({"distinct_explanations": 0.949}, "distinct_explanations", False),
        ({"cjk_rate": 0.011}, "cjk_rate", False),
        ({"marker_rate": 0.011}, "marker_rate", False),
        ({"fve_gold_gap": 0.0, "fve": 0.1}, "fve_gold_gap", False),
        ({"fve_gold_gap": 0.01, "fve": 0.1}, "fve_gold_gap", True),
        ({"fve_gold_gap": -0.1, "fve": -0.1}, "fve_gold_gap", None),
        ({"fve_gold_gap": -0.1}, "fve_gold_gap", None),
        ({"fve_gold_gap": -0.1, "fve": math.nan}, "fve_gold_gap", None),
        ({"fve_gold_gap": -0.1, "fve": None}, "fve_gold_gap", None),
        ({"fve_vector_gap": 0.0}, "fve_vector_gap", False),
        ({"identical_to_zero": 0.06}, "identical_to_zero", False),
        ({"distinct_1": 0.0}, "distinct_1", None),
        ({}, "repeated_rate", None),
        ({"repeated_rate": None}, "repeated_rate", None),
        ({"repeated_rate": math.nan}, "repeated_rate", None),
        ({"repeated_rate": "0.5"}, "repeated_rate", None),
    ],
)
def test_bounds(values, key, healthy):
    assert HEALTH[key].is_healthy(values) is healthy


def test_a_bound_in_words():
    assert HEALTH["repeated_rate"].bound == "at most 0.02"
    assert HEALTH["distinct_explanations"].bound == "at least 0.95"
    assert HEALTH["fve_gold_gap"].bound == "above 0 where fve is above 0"
    assert HEALTH["distinct_2"].bound == ""


def test_a_crossing_is_said_once_until_it_is_over():
    said = []
    watch = Watch("rl", said.append)
    for step, (repeated, marked) in enumerate([(0.0, 0.0), (0.5, 0.0), (0.6, 0.0), (0.0, 0.5), (0.3, 0.5)], start=1):
        watch.add({"repeated_rate": repeated, "marker_rate": marked})
        watch.review(step)
    assert [line.split(" should be ")[0] for line in said] == [
        "rl: repeated_rate 0.5 (mean of the 1 steps up to 2)",
        "rl: marker_rate 0.5 (mean of the 1 steps up to 4)",
        "rl: repeated_rate 0.3 (mean of the 1 steps up to 5)",
    ]
    assert all("\n" not in line for line in said)
    assert f"should be at most 0.02: {HEALTH['repeated_rate'].advice}" in said[0]


def test_a_review_is_of_the_mean_since_the_last_one():
    said = []
    watch = Watch("rl", said.append)
    for rows in ([0.0, 0.03], [0.03, None, 0.03], []):
        for value in rows:
            watch.add({} if value is None else {"repeated_rate": value})
        watch.review(7)
    assert [line.split(" should")[0] for line in said] == ["rl: repeated_rate 0.03 (mean of the 3 steps up to 7)"]


def test_a_value_that_is_missing_ends_no_crossing():
    said = []
    watch = Watch("eval", said.append)
    for values in ({"cjk_rate": 1.0}, {}, {"cjk_rate": None}, {"cjk_rate": 1.0}):
        watch.check(values, "8 held-out activations")
    assert len(said) == 1 and said[0].startswith("eval: cjk_rate 1 (8 held-out activations) should be at most 0.01: ")


def test_a_warning_is_a_line_on_stderr(capsys):
    Watch("eval").check({"cjk_rate": 1.0}, "x")
    shown = capsys.readouterr()
    assert shown.err.startswith("warning: eval: cjk_rate 1 (x)") and shown.err.count("\n") == 1
    assert not shown.out


def test_measures_are_json():
    assert json.loads(json.dumps(health([NOTE, TEMPLATE], MARKER), allow_nan=False))
