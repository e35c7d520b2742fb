"""Audits hold explanations against placebos; two pairs are compared on the same tokens."""

import dataclasses
import json

import numpy as np
import pytest

import nlae_jax
from nlae_jax.cli import main
from nlae_jax.explore import audit as audits
from nlae_jax.explore.audit import (
    audit,
    explained_passages,
    kept_passages,
    permuted,
    read_terms,
    term_pattern,
    unused_name,
)
from nlae_jax.explore.compare import BASES_DIFFER, LAYERS_DIFFER, compare
from nlae_jax.explore.passage import read_text
from nlae_jax.report.audit_page import audit_lead, audit_page, audit_tables, comparison_tables, places_table
from nlae_jax.runtime.errors import UserError
from tests.planted import Planted

pytest_plugins = ["tests.tiny_run", "tests.planted"]

# The list is in the one text, the array in the other.
TEXTS = {"lists": "of the list is for the list in", "arrays": "of the array is for the array in"}


@pytest.fixture(scope="module")
def found(planted):
    vocab_size = planted.subject.arch.vocab_size
    return explained_passages(planted, [read_text(planted.tokenizer, vocab_size, t, n) for n, t in TEXTS.items()])


@pytest.fixture(scope="module")
def report(found):
    terms = {term: term_pattern(term) for term in ("list", "string")}
    return audit(found, terms, {"permuted": permuted(found, seed=0)})


def test_terms_are_found_where_explanations_say_them(report):
    lists, strings = report.terms
    assert lists.hits and {place.text for place in lists.places} == {"lists"}
    assert all("list" in place.explanation for place in lists.places)
    assert lists.unsaid == 0 and lists.first_said == {"lists": lists.places[0].position}
    assert (strings.hits, strings.share, strings.places) == (0, 0.0, ())
    assert lists.share_ci95[0] < lists.share < lists.share_ci95[1]


def test_a_placebo_says_what_the_texts_do_not(report, found):
    """Permuted, as many explanations have the term, but in the wrong text: that is what tells them apart."""
    (lists, _) = report.terms
    assert lists.placebos["permuted"] == pytest.approx(lists.share) and lists.difference == pytest.approx(0)
    assert lists.placebos_unsaid["permuted"] > 0
    assert report.unsaid_share < report.unsaid_placebos["permuted"]
    shown = dict(zip(found.names, permuted(found, seed=0), strict=True))
    assert "list" not in shown["lists"].split()


def test_a_placebo_is_of_another_text_whatever_their_lengths(found):
    names, rows = np.array(found.names), found.rows
    kept = np.r_[np.flatnonzero(names == "lists"), np.flatnonzero(names == "arrays")[:2]]
    named = [dataclasses.replace(rows[index], explanation=f"of {names[index]}") for index in kept]
    few = dataclasses.replace(found, names=names[kept].tolist(), rows=named, texts=[found.texts[i] for i in kept])
    assert all(text != f"of {name}" for text, name in zip(permuted(few, 0), few.names, strict=True))


def test_one_text_has_no_placebo(tiny_run, tmp_path, capsys):
    nla = nlae_jax.NLA.from_workdir(tiny_run.workdir)
    nla.max_new_tokens = 24
    with pytest.raises(UserError, match=r"^--placebo: .* give at least two$"):
        nla.audit({"lists": TEXTS["lists"]})
    assert nla.audit({"lists": TEXTS["lists"]}, placebo=False, every=8).unsaid_placebos == {}
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": TEXTS["lists"]}) + "\n")
    command = ["audit", "--workdir", str(tiny_run.workdir), "--input", str(tmp_path / "t.jsonl"), "--placebo"]
    assert main(command) == 2
    assert "--placebo: takes explanations of other texts" in capsys.readouterr().err


def test_explanations_that_are_placebos_do_not_look_better(found):
    """An audit of permuted explanations against others of the same kind finds no difference."""
    rng = np.random.default_rng(0)
    texts = [row.explanation for row in found.rows]
    draw = lambda: [texts[index] for index in rng.permutation(len(texts))]  # noqa: E731
    report = audit(found, {}, {"a": draw(), "b": draw()})
    assert report.unsaid_placebos["a"] == pytest.approx(report.unsaid_placebos["b"], abs=0.1)


def test_a_search(report):
    assert len(report.search("LIST")) == report.terms[0].hits
    assert report.search("no such words") == []


def test_the_report_leads_with_the_difference(report):
    row = report.row()
    assert next(iter(row)) == "differences" and row["differences"]["unsaid_share_minus_placebo"] < 0
    assert "of placebos permuted" in audit_lead(row)[0]
    page = audit_page("audit", [row], "<script>")
    assert "<script>" not in page and page.index("of placebos permuted") < page.index("list:")
    assert audit_tables(row) and places_table(row["explanations"]) and "<article" in report._repr_html_()
    assert json.dumps(row)


def test_lists_of_terms():
    assert list(read_terms("# a comment\nlist\n\n array \nlist\n", "t")) == ["list", "array"]
    assert list(read_terms("a\u2028b\r\nc\x0cd\re", "t")) == ["a\u2028b", "c\x0cd", "e"]
    with pytest.raises(UserError, match="t: no terms"):
        read_terms("# none\n", "t")


def test_two_pairs_side_by_side(planted, tiny_lm):
    other = Planted(tiny_lm)
    same = compare(planted, other, TEXTS["lists"])
    assert all(one.overlap == 1 and one.a.position == one.b.position for one in same.tokens)
    assert same.notes == () and all(one.reconstruction_cos is not None for one in same.tokens)
    other.layer = 0
    elsewhere = compare(planted, other, TEXTS["lists"], positions="1,2")
    assert elsewhere.notes == (LAYERS_DIFFER,) and len(elsewhere.tokens) == 2
    assert all(one.reconstruction_cos is None for one in elsewhere.tokens)
    assert LAYERS_DIFFER in audit_page("compare", [elsewhere.row()], "a and b")
    mapped = Planted(tiny_lm, base_name="another")
    others = compare(planted, mapped, TEXTS["lists"], positions="1")
    assert others.notes == (BASES_DIFFER,) and others.tokens[0].reconstruction_cos is None
    assert comparison_tables(elsewhere.row()) and "<article" in same._repr_html_()


def test_an_audit_that_was_stopped_goes_on(planted, tmp_path, monkeypatch):
    """And says the same as one that was not; of other texts, or of another share of them, it is refused."""
    vocab_size = planted.subject.arch.vocab_size
    passages = [read_text(planted.tokenizer, vocab_size, text, name) for name, text in TEXTS.items()]
    path, asked, explain = tmp_path / "a.jsonl", [], audits.explain_every

    def stopped(nla, some, every):
        asked.append(some[0].name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return explain(nla, some, every)

    monkeypatch.setattr(audits, "explain_every", stopped)
    with pytest.raises(KeyboardInterrupt):
        kept_passages(planted, passages, 3, path)
    kept = kept_passages(planted, passages, 3, path)
    assert asked == [*TEXTS][:2] + [*TEXTS][1:]
    whole = audits.gathered(passages, [explain(planted, [passage], 3)[0] for passage in passages])
    assert (kept.names, kept.texts) == (whole.names, whole.texts)
    assert [row.explanation for row in kept.rows] == [row.explanation for row in whole.rows]
    np.testing.assert_allclose([row.cos for row in kept.rows], [row.cos for row in whole.rows], atol=1e-5)
    for other, every in ((passages[::-1], 3), (passages, 2)):
        with pytest.raises(UserError, match="begun with another input or other options"):
            kept_passages(planted, other, every, path)


def test_the_commands(tiny_run, tmp_path, capsys):
    texts = tmp_path / "t.jsonl"
    texts.write_text("".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in TEXTS.items()))
    (tmp_path / "terms.txt").write_text("of\nthe\n")
    pair = ["--workdir", str(tiny_run.workdir), "--max-new-tokens=24"]
    capsys.readouterr()
    arguments = ["audit", *pair, "--input", str(texts), "--every=4", "--terms", str(tmp_path / "terms.txt")]
    more = ["--placebo", "--placebo-workdir", str(tiny_run.workdir), "--search=of", "--html", str(tmp_path / "a.html")]
    assert main([*arguments, *more, "--out", str(tmp_path / "a.jsonl"), "--json"]) == 0
    kept = [(tmp_path / name).read_text().count("\n") for name in ("a.jsonl", "a.placebo0.jsonl")]
    assert kept == [len(TEXTS)] * 2
    row = json.loads(capsys.readouterr().out)
    assert [term["term"] for term in row["terms"]] == ["of", "the"] and (tmp_path / "a.html").exists()
    assert set(row["unsaid_placebos"]) == {"permuted", str(tiny_run.workdir)}
    both = ["--workdir", str(tiny_run.workdir)] * 2
    assert main(["compare", *both, "--text=the of to in", "--positions=-1", "--json"]) == 0
    (token,) = json.loads(capsys.readouterr().out)["tokens"]
    assert token["overlap"] == 1 and token["reconstruction_cos"] == pytest.approx(1, abs=1e-4)
    with pytest.raises(SystemExit):
        main(["compare", "--workdir", str(tiny_run.workdir), "--text=the"])
    assert "two pairs" in capsys.readouterr().err


def test_two_placebos_never_share_a_name():
    """One would take the other's place in the table, without a word."""
    assert unused_name("pair", {"permuted"}) == "pair"
    assert unused_name("permuted", {"permuted"}) == "permuted (2)"
    assert unused_name("pair", {"pair", "pair (2)"}) == "pair (3)"
