"""Explanations of what is selected: their scores and flags, samples, spans, files of many texts."""

import csv
import dataclasses
import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nlae_jax
from nlae_jax.cli import main
from nlae_jax.explore import explainer, items
from nlae_jax.explore.explain import (
    Options,
    agreement,
    consensus,
    explain_passages,
    explain_vectors,
    repeats,
)
from nlae_jax.explore.items import Results, read_items, read_rows
from nlae_jax.explore.passage import read_text
from nlae_jax.explore.select import picks_of
from nlae_jax.explore.statistics import load_statistics, statistics_of
from nlae_jax.report.explanation_page import explanation_page
from nlae_jax.runtime.errors import UserError
from tests.conftest import vectors

pytest_plugins = ["tests.tiny_run", "tests.planted"]


def read(pair, text, **selected):
    passage = read_text(pair.tokenizer, pair.subject.arch.vocab_size, text)
    return passage, picks_of(passage, **selected)


def test_scores_and_flags(planted):
    (rows,) = explain_passages(planted, [read(planted, "of the list is")], Options())
    listed = next(row for row in rows if row.token.strip() == "list")
    assert listed.explanation == "it is about list" and listed.cos > 0.9
    assert listed.mse == pytest.approx(2 * (1 - listed.cos))
    assert listed.relative_mse == pytest.approx(listed.mse / planted.statistics.variance)
    assert rows[0].outside == "position 0" and not listed.cut and not listed.repeated
    assert set(listed.row()) == {
        *("position", "token", "explanation", "cos", "mse", "relative_mse", "norm", "outside", "cut", "repeated")
    }


def test_a_span_is_the_mean_of_its_tokens(planted):
    passage, picks = read(planted, "of the list is", span="1:4")
    (explained,) = explain_passages(planted, [(passage, picks)], Options())[0]
    assert explained.span == (1, 3) and explained.token == passage.shown(1, 4)
    passage, picks = read(planted, "of the list is", span="0:3")
    (explained,) = explain_passages(planted, [(passage, picks)], Options())[0]
    assert explained.outside == "position 0"


def test_several_samples(planted):
    assert agreement(["about cats and dogs", "about cats and birds"]) == pytest.approx(1 / 3)
    assert agreement(["about cats"]) is None and agreement(["of the", "of"]) == 1.0
    assert consensus(["cats and dogs", "cats, birds", "fish"]) == "cats 2/3"
    assert "no content word" in consensus(["cats", "dogs"])
    h = (planted.statistics.mean + 10 * planted.direction("list"))[None]
    (explained,) = explain_vectors(planted, h, Options(samples=3))
    assert len(explained.samples) == 3 and explained.agreement == 1.0 and "list 3/3" in explained.consensus
    assert explained.position is None and explained.token == ""
    with pytest.raises(UserError, match="several samples need more than 0"):
        Options(samples=2, temperature=0.0)
    assert (Options().heat, Options(samples=2).heat, Options(temperature=0.5).heat) == (0.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("response", "text", "closed"),
    [
        ("<explanation>\na cat\n</explanation>", "a cat", True),
        ("<explanation>\na cat and", "a cat and", False),
        ("<explanation>\na cat\n</expl", "a cat", False),
        ("<explanation>\na cat <", "a cat", False),
        ("<explanation>\n</explanation>", "", True),
    ],
)
def test_an_explanation_as_far_as_it_goes(response, text, closed):
    assert explainer._written(response) == (text, closed)


def test_repetition_is_told():
    assert repeats('Next comes "of", "of" or "of".') and not repeats("It is about cats and dogs.")


def test_statistics_outlive_a_file(tmp_path):
    h = vectors(600, 16)
    made = statistics_of(h, "somewhere")
    made.save(tmp_path / "statistics.safetensors")
    kept = load_statistics(tmp_path / "statistics.safetensors")
    np.testing.assert_array_equal(kept.mean, h.mean(0, dtype=np.float64).astype(np.float32))
    assert (kept.variance, kept.norm_low, kept.norm_high) == (made.variance, made.norm_low, made.norm_high)
    assert (kept.count, kept.source) == (600, "somewhere")
    directions = h / np.linalg.norm(h, axis=1, keepdims=True)
    assert made.variance == pytest.approx(1 - np.linalg.norm(directions.mean(0)) ** 2, rel=1e-3)
    assert kept.outside(kept.norm_median, 5) == "" and kept.outside(100 * kept.norm_high, 5) == "norm"
    for change in (
        {"variance": float("nan")},
        {"norm_low": float("inf")},
        {"norm_low": 2 * made.norm_high},
        {"mean": np.full_like(made.mean, np.nan)},
        {"mean": made.mean[:-1]},
    ):
        dataclasses.replace(made, **change).save(tmp_path / "wrong.safetensors")
        with pytest.raises(UserError, match="not the statistics of a pair"):
            load_statistics(tmp_path / "wrong.safetensors", 16)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="not the statistics of a pair"):
        load_statistics(tmp_path / "broken.safetensors")


def test_a_page_of_samples_and_chats(planted):
    h = np.stack([planted.statistics.mean + 10 * planted.direction("list")])
    row = explain_vectors(planted, h, Options(samples=2))[0].row()
    chat = {**row, "role": "<b>user", "section": "header", "position": 3, "cut": True}
    page = explanation_page([[row, chat]], "m", 1)
    assert "agreement 1.00" in page and "cut at the limit" in page and "&lt;b&gt;user" in page and "<b>user" not in page


# --- files of texts


def test_items_of_files(tmp_path):
    lines = [{"id": "a", "text": "the"}, {"messages": [{"role": "user", "content": "of"}]}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = read_items(tmp_path / "t.jsonl")
    assert (first.id, first.text, second.id, second.messages[0]["content"]) == ("a", "the", "1", "of")
    (tmp_path / "t.csv").write_text('id,text\nx,"the, of\nto"\ny,in\n')
    assert [(item.id, item.text) for item in read_items(tmp_path / "t.csv")] == [("x", "the, of\nto"), ("y", "in")]
    (tmp_path / "e.csv").write_text("text,edit,original,word\nthe,of,,\n")  # nothing is not an empty original
    assert [row for _, row in read_rows(tmp_path / "e.csv")] == [{"text": "the", "edit": "of"}]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("t.jsonl", '{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "t.jsonl:2: id 1 occurs twice"),
        ("t.jsonl", '{"words": "a"}\n', "t.jsonl:1: should hold"),
        ("t.jsonl", '{"messages": [3]}\n', "message 0"),
        ("t.csv", "words\na\n", "should have a column text"),
        ("t.csv", "text\n", "no texts in it"),
        ("t.csv", 'text\n"the, of', r"t.csv: not valid CSV \(unexpected end of data\)"),
        ("t.csv", "text\nthe, of\n", "t.csv:2: more cells than columns"),
        ("t.csv", "id,text,text\na,the,of\n", "column 'text' is there twice"),
    ],
)
def test_files_that_hold_no_texts(tmp_path, name, content, named):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=named):
        read_items(tmp_path / name)


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_results_go_on_where_they_are_whole(tmp_path, name):
    """Stopped within a line or between two, the file becomes what one run would have made it."""
    path, rows = tmp_path / name, [[{"id": i, "token": "a,\n"}] * 2 for i in range(3)]
    whole = Results(path, {"a": 1}, ("id", "token"))
    for i in range(3):
        whole.add({"id": i, "tokens": rows[i]}, rows[i])
    expected = path.read_bytes()
    for directory in (tmp_path / "b", tmp_path / "c"):
        directory.mkdir()
        begun = Results(directory / name, {"a": 1}, ("id", "token"))
        begun.add({"id": 0, "tokens": rows[0]}, rows[0])
        with (directory / name).open("ab") as file:
            file.write(b"half a li")
        again = Results(directory / name, {"a": 1}, ("id", "token"))
        assert again.done == 1
        for i in range(again.done, 3):
            again.add({"id": i, "tokens": rows[i]}, rows[i])
        assert (directory / name).read_bytes() == expected
    with pytest.raises(UserError, match="other options"):
        Results(path, {"a": 2}, ("id", "token"))
    shutil.copy(path, tmp_path / f"foreign{path.suffix}")
    with pytest.raises(UserError, match="was not begun by this command"):
        Results(tmp_path / f"foreign{path.suffix}", {"a": 1}, ("id", "token"))


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"items": None}, "items should be a int"),
        ({"bytes": "9"}, "bytes should be a int"),
        ({"bytes": -1}, "items and bytes should be 0 or more"),
        ({"made_with": 3}, "made_with should be a str"),
    ],
)
def test_damaged_marks_of_a_file_of_results_are_one_line(tmp_path, marks, message):
    path = tmp_path / "r.jsonl"
    Results(path, {"a": 1}).add({"id": 0}, ())
    kept, beside = path.read_bytes(), tmp_path / "r.jsonl.progress.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | marks))
    with pytest.raises(UserError, match=message):
        Results(path, {"a": 1})
    assert path.read_bytes() == kept


@settings(max_examples=100)
@given(st.lists(st.lists(st.text(), min_size=2, max_size=2), max_size=4))
def test_a_csv_file_of_results_says_what_was_put_into_it(tmp_path_factory, cells):
    """Line breaks of every system, quotes, null characters."""
    path = tmp_path_factory.mktemp("csv") / "r.csv"
    results = Results(path, {"a": 1}, ("id", "token"))
    results.add({}, [{"id": first, "token": second} for first, second in cells])
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["id", "token"], *cells]


HOLDER = """
import sys
from pathlib import Path
from nlae_jax.explore.items import Results
held = Results(Path(sys.argv[1]), {"a": 1})
print("held", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time_writes_a_file_of_results(tmp_path):
    path = tmp_path / "r.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=r"r\.jsonl: another nlae process is writing it"):
            Results(path, {"a": 1})
        holder.stdin.close()
    Results(path, {"a": 1}).add({"id": 0}, ())
    assert path.read_text() == '{"id": 0}\n'


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_a_run_that_was_killed_before_its_first_item_goes_on(tmp_path, monkeypatch, name):
    """Its file may hold a part of a line, or a header, and nothing has been counted yet."""
    path, columns = tmp_path / name, ("id",)
    written, fsync = itertools.count(), os.fsync

    def killed(descriptor):
        if next(written):  # marks that nothing is there yet are written first
            raise KeyboardInterrupt
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            Results(path, {"a": 1}, columns).add({"id": 0}, [{"id": 0}])
    assert path.stat().st_size
    again = Results(path, {"a": 1}, columns)
    assert again.done == 0
    again.add({"id": 0}, [{"id": 0}])
    assert path.read_text() == ("id\n0\n" if columns and name.endswith("csv") else '{"id": 0}\n')


def test_a_file_of_results_that_lost_its_end_is_left_alone(tmp_path):
    path = tmp_path / "r.jsonl"
    whole = Results(path, {"a": 1})
    for number in range(2):
        whole.add({"id": number}, ())
    path.write_text('{"id": 0}\n')
    with pytest.raises(UserError, match=r"10 bytes of the 20 that it had"):
        Results(path, {"a": 1})
    assert path.read_text() == '{"id": 0}\n'
    path.unlink()
    assert Results(path, {"a": 1}).done == 0


def test_results_need_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    for name in (".", "..", str(tmp_path), "pipe.jsonl", os.devnull):
        with pytest.raises(UserError, match="should be a file; it is a directory, a pipe or a device"):
            Results(Path(name), {"a": 1})


def test_items_do_not_come_through_pipes(tmp_path):
    for name in ("t.csv", "t.jsonl"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: should be a regular file"):
            read_items(tmp_path / name)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl.gz"])
def test_files_of_texts_have_an_end(tmp_path, monkeypatch, name):
    """What is packed may be much larger than it looks."""
    monkeypatch.setattr(items, "_MOST_CHARACTERS", 100)
    lines = ["text", *["a" * 30] * 5] if name == "t.csv" else [json.dumps({"text": "a" * 30})] * 5
    with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt") as file:
        file.writelines(f"{line}\n" for line in lines)
    with pytest.raises(UserError, match=f"{name}:[45]: more than 100 characters up to here"):
        read_items(tmp_path / name)


def test_halves_of_surrogate_pairs_in_files_of_texts(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        r'{"id": "\ud83d", "text": "a \ud83d"}' "\n" r'{"messages": [{"role": "user", "content": "\ud83d"}]}' "\n"
    )
    first, second = read_items(path)
    assert (first.id, first.text, second.messages[0]["content"]) == ("\ufffd", "a \ufffd", "\ufffd")


# --- the command and the class


def test_the_command(tiny_run, tmp_path, capsys):
    pair = ["explain", "--workdir", str(tiny_run.workdir), "--max-new-tokens=24"]
    capsys.readouterr()

    def explained(*arguments):
        assert main([*pair, *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    last = explained("--text=the of to in", "--positions=-1")
    assert len(last["tokens"]) == 1 and last["pair"]["variance"] > 0
    (span,) = explained("--text=the of to in", "--span=1:3")["tokens"]
    assert span["span"] == [1, 2]
    (tmp_path / "c.json").write_text(json.dumps([{"role": "user", "content": "the of"}]))
    chat = explained("--chat", str(tmp_path / "c.json"), "--generate=3", "--positions=4:")["tokens"]
    assert {row["role"] for row in chat} == {"user", "assistant"} and any(row.get("generated") for row in chat)
    np.save(tmp_path / "v.npy", np.ones((2, 64)))
    bare = explained("--vectors", str(tmp_path / "v.npy"), "--samples=2")["tokens"]
    assert len(bare) == 2 and all(len(row["samples"]) == 2 and row["position"] is None for row in bare)
    (tmp_path / "t.jsonl").write_text('{"id": "a", "text": "the of"}\n{"id": "b", "text": "in"}\n')
    assert main([*pair, "--text=the of to in", "--positions", "-1,-2:", "--json"]) == 0
    assert [row["position"] for row in json.loads(capsys.readouterr().out)["tokens"]] == [4, 3, 4]
    out = tmp_path / "out.csv"
    assert main([*pair, "--input", str(tmp_path / "t.jsonl"), "--out", str(out), "--positions=-1"]) == 0
    rows = list(csv.DictReader(out.open(newline="")))
    assert [row["id"] for row in rows] == ["a", "b"] and all(row["explanation"] is not None for row in rows)


@pytest.mark.parametrize(
    ("line", "options", "named"),
    [
        ({"text": "the " * 3000}, [], "at most 2048 are explained at once"),
        ({"text": "the " * 2000}, ["--generate=100"], "tokens and 100 are to follow"),
        ({"text": "the"}, ["--positions=2"], "position 2 out of range"),
        ({"text": "the"}, ["--match=of"], "'of' does not occur in text 1"),
    ],
)
def test_a_text_that_cannot_be_explained_is_named_before_others_are(
    tiny_run, tmp_path, capsys, monkeypatch, line, options, named
):
    """Behind it the file of results could never go on."""
    monkeypatch.setattr("nlae_jax.explore.explain.explain_passages", None)
    path, out = tmp_path / "t.jsonl", tmp_path / "o.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ({"text": "the of to"}, line)))
    arguments = ["explain", "--workdir", str(tiny_run.workdir), "--input", str(path), "--out", str(out), *options]
    assert main(arguments) == 2
    assert named in capsys.readouterr().err.splitlines()[-1] and out.read_bytes() == b""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--vectors=v.npy", "--positions=1"], "--vectors has no text"),
        (["--input=t.jsonl"], "--input and --out belong together"),
        (["--input=t.jsonl", "--out=o.jsonl", "--json"], "--html and --json are for single texts"),
    ],
)
def test_options_that_do_not_fit(capsys, arguments, named):
    with pytest.raises(SystemExit):
        main(["explain", "--workdir=W", *arguments])
    assert named in capsys.readouterr().err


def test_the_class(tiny_run):
    nla = nlae_jax.NLA.from_workdir(tiny_run.workdir)
    nla.max_new_tokens = 24
    rows = nla.explain_chat([{"role": "user", "content": "the of"}], positions="-3:")
    assert "<iframe sandbox" in rows._repr_html_() and "<script" not in rows._repr_html_()
    assert len(rows) == 3 and all(row["role"] == "user" for row in rows)
    assert "of the run's activations" in nla.description()["statistics_of"]
    assert [row["position"] for row in nla.explain_text("the of to", match="of")] == [2]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda nla: nla.reconstruct([None]), "text 0: should be a text; it is None"),
        (lambda nla: nla.reconstruct(["x" * 8193]), "text 0: an explanation of 8193 characters; at most 8192"),
        (lambda nla: nla.score("t", [[1.0] * nla.d_model]), "texts: should be a list of explanations"),
        (lambda nla: nla.explain([[1.0] * nla.d_model], max_new_tokens="8"), "max_new_tokens: '8'"),
        (lambda nla: nla.explain([[1.0] * nla.d_model], max_new_tokens=10**9), "max_new_tokens: 1000000000"),
        (lambda nla: nla.explain([[1.0] * nla.d_model], seed=-1), "seed: -1"),
        (lambda nla: nla.explain([[1e30] * nla.d_model]), "vectors: row 0: NaN or infinity, or numbers whose"),
        (lambda nla: nlae_jax.NLA.audit(nla, {"a": "the of", "b": "of the"}, every=0), "every: 0"),
        (lambda nla: nlae_jax.NLA.neuron(nla, 5), "neuron: 5 should be BLOCK:NEURON"),
        (
            lambda nla: nlae_jax.NLA.evaluate(nla, "out", texts=["the of"], sections=["words"]),
            "sections: 'words' should be one of",
        ),
        (
            lambda nla: nlae_jax.NLA.evaluate(nla, "out", texts=["the of"], sections=["health"], control_steps=9),
            "control_steps: its figures belong to the section text, which sections should name",
        ),
        (
            lambda nla: nlae_jax.NLA.evaluate(nla, "out", texts=["the of"], sections=["health"], sampled=4),
            "sampled: its figures belong to the sections reconstruction and truth; sections should name one of them",
        ),
    ],
)
def test_arguments_of_another_kind_are_one_line(planted, tmp_path, monkeypatch, call, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named):
        call(planted)
