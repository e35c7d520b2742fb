"""Steering: an edit is added where it was asked for, and is held against random directions of its length."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.cli import main
from nlae_jax.cli.steer import _lines
from nlae_jax.explore.passage import read_text
from nlae_jax.explore.select import parse_at
from nlae_jax.explore.steer import Outcome, SteerSettings, compile_pattern, distinct_2, steer, summary, wilson
from nlae_jax.report.audit_page import audit_page, steer_tables, steer_verdict
from nlae_jax.runtime.errors import UserError

pytest_plugins = ["tests.tiny_run", "tests.planted"]

FEW = SteerSettings(alphas=(0.5, 1.0), samples=3, max_new_tokens=8)


@pytest.fixture(scope="module")
def passage(planted):
    return read_text(planted.tokenizer, planted.subject.arch.vocab_size, "the array of the array is")


@pytest.fixture(scope="module")
def report(planted, passage):
    pattern = compile_pattern("list", None)
    return steer(planted, passage, [1, 2], "it is about list", "it is about array", pattern, FEW)


def test_an_edit_that_works_beats_its_controls(report):
    assert report.beats_controls and report.before.hits == 0
    assert all(edit.hits == 3 for edit in report.edits)
    assert len(report.controls) == 3 * 2 and all(control.hits == 0 for control in report.controls)
    assert report.at == (1, 2) and report.originals == ("it is about array",)
    assert report.before.distinct_2 is not None and np.isfinite(report.before.nll)


def test_what_is_added_is_as_long_as_asked_for_and_nowhere_else(planted, passage, monkeypatch):
    pushes, laters = [], []
    plain = type(planted.subject).steer

    def watched(self, prompts, added, *more):
        pushes.extend(added[::3])
        laters.extend(more[-1][::3])
        return plain(self, prompts, added, *more)

    monkeypatch.setattr(type(planted.subject), "steer", watched)
    steer(planted, passage, [2, 5], "it is about list", None, None, FEW)
    (h,) = planted.read([passage])
    assert len(pushes) == 1 + 4 * 2 and not pushes[0].any() and not np.any(laters)
    for push, alpha in zip(pushes[1:], [0.5, 1.0] * 4, strict=True):
        lengths = np.linalg.norm(push, axis=1)
        assert np.flatnonzero(lengths).tolist() == [2, 5]
        np.testing.assert_allclose(lengths[[2, 5]], alpha * np.linalg.norm(h[[2, 5]], axis=1), rtol=0.2)
    laters.clear()
    settings = dataclasses.replace(FEW, generated=True)
    steer(planted, passage, [2, 5], "it is about list", None, None, settings)
    median = np.median(np.linalg.norm(h[[2, 5]], axis=1))
    np.testing.assert_allclose(np.linalg.norm(laters, axis=1), median * np.array([0, *[0.5, 1.0] * 4]), rtol=0.2)


def test_what_only_one_original_says_is_not_pushed_away(planted, passage, monkeypatch):
    pushes, plain = [], type(planted.subject).steer

    def watched(self, prompts, added, *more):
        pushes.extend(added)
        return plain(self, prompts, added, *more)

    monkeypatch.setattr(type(planted.subject), "steer", watched)
    few = SteerSettings(alphas=(1.0,), samples=1, max_new_tokens=2)
    originals = ["it is about array", "it is about string", "it is about file", "it is about list"]
    cos = []
    for original in ("it is about array", originals):
        pushes.clear()
        steer(planted, passage, [2], "it is about list", original, None, few)
        away, towards = (planted.rebuild([text])[0] for text in ("it is about array", "it is about list"))
        cos.append(-(pushes[1][2] @ (away - towards)) / np.linalg.norm(pushes[1][2]) / np.linalg.norm(away - towards))
    assert cos[0] == pytest.approx(1, abs=0.2) and cos[1] < cos[0] - 0.05


def test_an_edit_that_misses_its_word_does_not_beat_them(planted, passage):
    report = steer(planted, passage, [1], "it is about string", None, compile_pattern("list", None), FEW)
    assert report.beats_controls is False
    total = summary([report])
    assert (total["prompts"], total["beaten"], total["lost"], total["equal"]) == (1, 0, 0, 1)
    without = steer(planted, passage, [1], "it is about string", None, None, FEW)
    assert without.beats_controls is None and without.before.hits is None
    assert summary([without])["prompts"] == 0
    assert summary([without])["conditions"] == {}


def test_hits_of_several_prompts_are_pooled_at_each_best_strength(report):
    pooled = summary([report, report])["conditions"]
    best = [outcome for outcome in report.edits if outcome.alpha == report.best_alpha]
    assert pooled["edit"]["hits"] == 2 * best[0].hits > 0
    assert pooled["edit"]["continuations"] == pooled["none"]["continuations"] == 2 * FEW.samples
    assert pooled["random"]["continuations"] == 3 * pooled["edit"]["continuations"]
    assert pooled["edit"]["hit_rate_ci95"] == wilson(2, 2)  # both prompts have hits only
    assert pooled["none"]["nll"] == pytest.approx(report.before.nll)


def outcome(kind, hits, alpha=0.0):
    return Outcome(kind, alpha, ("x",) * 8, hits, hits / 8, wilson(hits, 8), 1.0, 1.0)


def with_hits(report, edits, control=0):
    """The report with these hits of its edits, one at each α."""
    return dataclasses.replace(
        report,
        before=outcome("none", 0),
        edits=tuple(outcome("edit", hits, 0.1 * (n + 1)) for n, hits in enumerate(edits)),
        controls=tuple(outcome("random", control, 0.1 * (n + 1)) for n in range(len(edits)) for _ in range(3)),
        best_alpha=0.1 * (edits.index(max(edits)) + 1),
    )


def test_continuations_of_one_prompt_are_not_independent(report):
    prompts = [with_hits(report, [hits]) for hits in [8] * 3 + [0] * 9]
    conditions = summary(prompts)["conditions"]
    low, high = conditions["edit"]["hit_rate_ci95"]
    assert low < 0.25 < high
    alike = wilson(24, 96)
    assert high - low > 2 * (alike[1] - alike[0])  # eight equal continuations say no more than one
    assert conditions["none"]["hit_rate_ci95"] == wilson(0, 12)  # no spread is not certainty
    assert summary(prompts[:1])["conditions"]["edit"]["hit_rate_ci95"] == wilson(8, 8)


def test_it_is_said_that_the_edits_hits_chose_the_strength(report):
    assert summary([with_hits(report, [2])])["alpha_chosen"] is False
    assert "with most hits of the edit" not in steer_verdict(with_hits(report, [2]).row())
    several = with_hits(report, [2, 5], control=3)
    assert summary([several])["alpha_chosen"] is True
    assert "At α = 0.2, the one of 2 with most hits of the edit, the edit has 5 of 8" in steer_verdict(several.row())


def test_committed_prompts_ask_for_a_word_that_only_the_edit_has():
    prompts = _lines(Path(__file__).parents[1] / "experiments/smollm2/steering.jsonl")
    assert len(prompts) >= 20
    for prompt in prompts:
        pattern = compile_pattern(prompt["word"], prompt["pattern"])
        assert pattern.search(prompt["edit"]), prompt["name"]
        assert not any(pattern.search(text) for text in (prompt["source"], *prompt["original"])), prompt["name"]


def test_an_edit_that_changes_nothing(planted, passage):
    with pytest.raises(UserError, match="rebuilds the same"):
        steer(planted, passage, [1], "it is about array too", "it is about array", None, FEW)


@pytest.mark.parametrize(
    "wrong", [{"controls": 2}, {"samples": 0}, {"alphas": ()}, {"alphas": (0.0,)}, {"alphas": (1e39,)}]
)
def test_settings_that_say_nothing(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SteerSettings(**wrong)


@pytest.mark.parametrize("texts", [{"edited": "of " * 5_000}, {"edited": "x", "original": ["y", "of " * 5_000]}])
def test_an_explanation_without_end_is_not_read(planted, passage, texts):
    """Attention takes memory with the square of its length."""
    with pytest.raises(UserError, match=f"{list(texts)[-1][:4]}.*: an explanation of 15000 characters; at most 8192"):
        steer(planted, passage, [1], settings=FEW, **texts)


def test_patterns():
    assert compile_pattern("list", None).search("a List.") and not compile_pattern("list", None).search("listing")
    assert compile_pattern("c++", None).search("in C++ is")
    assert compile_pattern(None, "lists?$").search("lists")
    for pattern in ("(", "a{99999999999}"):
        with pytest.raises(UserError, match="not a regular expression"):
            compile_pattern(None, pattern)
    with pytest.raises(UserError, match="--word: empty"):
        compile_pattern(" ", None)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_is_narrower_with_more(case):
    hits, count = case
    low, high = wilson(hits, count)
    assert 0 <= low <= hits / count <= high <= 1 and low < high
    more = wilson(4 * hits, 4 * count)
    assert more[1] - more[0] < high - low


def test_distinct_pairs_of_words():
    assert distinct_2(["a b a b a b"]) == pytest.approx(2 / 5)
    assert distinct_2(["a b c", "a b c"]) == 1.0
    assert distinct_2(["a", ""]) is None


def test_where_to_push(passage):
    length = len(passage.tokens)
    assert parse_at(passage, "-1") == [length - 1]
    assert parse_at(passage, "1:3,0") == [1, 2, 0]
    assert "array" in passage.shown(parse_at(passage, "array")[0], parse_at(passage, "array")[-1] + 1)
    assert parse_at(passage, None) == list(range(max(1, length - 8), length))


def test_a_page_and_tables(report):
    page = audit_page("steer", [report.row()], "<script>")
    assert "<script>" not in page and "beats the best random direction" in page
    assert "<article" in report._repr_html_()
    assert steer_tables(report.row())


def test_several_originals_are_shown_one_by_one(report):
    row = dataclasses.replace(report, originals=("it is about\narray", "")).row()
    shown = " ".join(audit_page("steer", [row], "").split())
    assert "edit:</b> it is about array<br><b>Before the edit:</b> (empty)<br><b>After the edit:</b> it is" in shown
    assert steer_tables(row)[0].plain.startswith("before: it is about array\nbefore: \nedited: it is about list\n")


def test_the_command(tiny_run, tmp_path, capsys):
    few = ["--workdir", str(tiny_run.workdir), "--alphas=1", "--samples=2", "--tokens=4", "--max-new-tokens=24"]
    capsys.readouterr()
    assert main(["steer", *few, "--text=the of to in", "--at=1:3", "--edit=the list", "--word=of", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["at"] == [1, 2] and len(found["controls"]) == 3 and found["before"]["hits"] in (0, 1, 2)
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"text": "the of to", "edit": "the list", "word": "of"}, {"text": "it is", "edit": "for that"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["steer", *few, "--input", str(prompts), "--html", str(tmp_path / "s.html")]) == 0
    shown = capsys.readouterr().out
    assert (
        "1 prompts" in shown
        and "hits with the edit: " in shown
        and "of 2 (share " in shown
        and (tmp_path / "s.html").exists()
    )
    several = {"text": "the of to", "edit": "the list", "original": ["the array", "the to"]}
    prompts.write_text(json.dumps(several) + "\n")
    assert main(["steer", *few, "--generated", "--input", str(prompts), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"][0]["originals"] == ["the array", "the to"]
    for wrong in ([], [1], 1):
        prompts.write_text(json.dumps({**several, "original": wrong}) + "\n")
        assert main(["steer", *few, "--input", str(prompts)]) == 2
        assert "original should be a text" in capsys.readouterr().err
    prompts.write_text('{"text": "the"}\n')
    assert main(["steer", *few, "--input", str(prompts)]) == 2
    assert "prompts.jsonl:1: edit should be a text" in capsys.readouterr().err
