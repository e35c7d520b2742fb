"""`nlae eval` on a run, an exported pair, texts and parquet files: what a user calls, and what a user gets wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nlae_jax.api import NLA
from nlae_jax.cli import main
from nlae_jax.data.corpus import read_documents
from nlae_jax.evaluate.figures import SECTIONS
from nlae_jax.evaluate.rows import documents_of, rows_of_documents
from nlae_jax.explore.sources import open_trained
from nlae_jax.report.page import write_report
from nlae_jax.run.suite import rows_of_run, write_figures
from nlae_jax.runtime.errors import UserError
from tests.planted_pairs import documents
from tests.servers import chat, serving

pytest_plugins = ["tests.tiny_run"]


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "pair"
    command = ["export", "--workdir", str(tiny_run.workdir), "--out", str(out), "--dtype", "float32", "--datasets"]
    assert main(command) == 0
    return out


@pytest.fixture(scope="module")
def on_workdir(tiny_run, tmp_path_factory):
    """The whole suite on a copy of the run: (workdir, eval.json before, eval.json after)."""
    workdir = shutil.copytree(tiny_run.workdir, tmp_path_factory.mktemp("suite") / "W")
    before = json.loads((workdir / "eval.json").read_text())
    command = ["eval", "--workdir", str(workdir), "--suite", ",".join(SECTIONS), "--control-steps", "2"]
    assert main(command) == 0
    return workdir, before, json.loads((workdir / "eval.json").read_text())


def test_a_runs_own_numbers_stay_and_sections_are_added(on_workdir):
    _, before, after = on_workdir
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {*SECTIONS, "suite"}
    assert after["suite"]["num_activations"] == before["num_activations"]
    # Both measure the same pair on the same activations; the draws are others.
    assert after["reconstruction"]["fve"]["controls"]["gold"]["value"] == pytest.approx(before["fve_gold"], abs=1e-4)
    assert after["meaning"]["kl_next"]["controls"]["true"]["value"] == 0
    assert set(after["text"]["trained_decoder"]["parts"]) == {"explanations", "last_words", "next_tokens"}
    assert after["meaning"]["kl_next"]["controls"]["zero"]["value"] > 1e-4


def test_the_report_shows_it(on_workdir):
    workdir, *_ = on_workdir
    page = (workdir / "report.html").read_text()
    assert "Is it true?" in page and "loss_recovered" in page and "marginal_fve" in page


def test_as_many_held_out_rows_are_measured_as_are_asked_for(tiny_run):
    """Also more than the run's own evaluation looked at, which are the first of them."""
    run = open_trained(tiny_run.workdir)
    own, held_out = run.held_out_rows(), run.store.index.rows_of("held_out")
    assert len(own) < len(held_out)
    every = run.held_out_rows(10**6)
    assert sorted(every) == held_out.tolist() and every[: len(own)].tolist() == own.tolist()
    assert len(rows_of_run(run, 10**6).h) == len(held_out) and len(rows_of_run(run, 3).h) == 3


def test_kinds_of_text_of_a_run_are_those_of_its_corpus(tiny_run):
    run = open_trained(tiny_run.workdir)
    documents = read_documents(run.config.corpus)
    assert {document.domain for document in documents} == {"texts"}  # the name of its one file
    rows = rows_of_run(run, 12)
    assert set(rows.domain) == {"texts"}
    ids = [run.store.index.doc_ids[document] for document in rows.document]
    named = [f"kind {number % 2}" for number in range(len(run.store.index.doc_ids))]
    run.store.index = dataclasses.replace(run.store.index, domain=named)
    found = rows_of_run(run, 12)
    assert found.domain == [named[run.store.index.doc_ids.index(doc_id)] for doc_id in ids]
    assert set(found.domain) == {"kind 0", "kind 1"}
    assert found.digest() == rows.digest()  # how rows are put together changes no work


def test_an_exported_pair_on_texts_is_evaluated_and_goes_on(exported, tmp_path, capsys):
    texts = [text.text for _, text in documents(6, 40)]
    path = tmp_path / "rivers.jsonl"
    path.write_text("".join(json.dumps({"text": text * 3}) + "\n" for text in texts[3:]))
    command = ["eval", "--av", str(exported / "av"), "--ar", str(exported / "ar"), "--out", str(tmp_path / "out")]
    command += ["--input", str(path), "--num-activations", "24", "--suite", "health,reconstruction", "--json"]
    command += ["--max-new-tokens", "48", "--sampled", "3"]
    command += [part for text in texts[:3] for part in ("--text", text)]
    assert main(command) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert "about" in shown.err and "activations" in shown.err  # what it will cost
    assert result.keys() == {
        *("reconstruction", "health", "suite", "fve", "fve_ci95", "fve_meannorm", "cos", "fve_shuffled", "fve_gold"),
        *("num_activations", "num_documents"),
    }
    assert result["reconstruction"]["agreement"]["n"] == 3
    assert result["suite"]["num_sampled"] == {"reconstruction": 3}
    assert result["suite"]["explanations"] == {"reconstruction": 24 + 3 * (10 + 3), "health": 0}
    assert result["fve"] == result["reconstruction"]["fve"]["value"] and result["num_activations"] == 24
    assert set(result["reconstruction"]["fve_by_domain"]["parts"]) == {"text", "rivers"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "By kind of text" in page and "rivers" in page and "Not there yet" not in page
    parts = sorted(tmp_path.rglob("*.npz"))
    times = [part.stat().st_mtime_ns for part in parts]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["reconstruction"] == result["reconstruction"]
    assert [part.stat().st_mtime_ns for part in parts] == times
    # A config may be given for its server or settings: its corpus is not read where there is something else to read.
    assert main([*command, "--config", str(Path(__file__).parent.parent / "experiments/tiny.py")]) == 0
    assert json.loads(capsys.readouterr().out)["fve"] == pytest.approx(result["fve"])
    assert sorted(tmp_path.rglob("*.npz")) == parts


def test_a_parquet_of_activations(exported, tmp_path, monkeypatch):
    held_out = exported / "held_out.parquet"
    nla = NLA.from_pretrained(exported / "av", exported / "ar")
    found = nla.evaluate(tmp_path, files=[held_out], sections=("reconstruction",), num_activations=6)
    assert found["suite"]["num_activations"] == min(6, pq.read_metadata(held_out).num_rows)
    assert "fve_by_token" in found["reconstruction"]  # the file has the texts
    with pytest.raises(UserError, match="should be given alone"):
        nla.evaluate(tmp_path, texts=["a text"], files=[held_out])
    # The file of the encoder's warm start has descriptions, too.
    found = nla.evaluate(tmp_path, files=[exported / "av_sft.parquet"], sections=("reconstruction",), num_activations=6)
    assert found["reconstruction"]["fve"]["controls"]["gold"]["n"] == found["suite"]["num_activations"] > 1
    table = pq.read_table(held_out)
    kinds = pa.array(["prose" if row % 2 else None for row in range(len(table))], pa.string())
    pq.write_table(table.append_column("domain", kinds), tmp_path / "named.parquet")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = nla.evaluate(tmp_path, files=["~/named.parquet"], sections=("reconstruction",), num_activations=6)
    assert set(found["reconstruction"]["fve_by_domain"]["parts"]) == {"prose", "text"}


def test_a_run_is_judged_by_the_server_of_another_config(tiny_run, tmp_path):
    """The run's own descriptions are a template's: the given config says who is asked, and changes nothing else."""
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "W")

    def reply(number, body):
        choice = "Below are two notes" in body["messages"][0]["content"]
        sentence = "The note about the text is A." if choice else "The text supports 1 of 2 claims."
        return chat(f"<explanation>{sentence}</explanation>")

    with serving() as start:
        url, script = start(reply)
        asked = [f"--config.describe.{name}" for name in ("provider=openai", "model=m", f"base_url={url}")]
        command = [
            "eval",
            "--workdir",
            str(workdir),
            "--config",
            str(Path(__file__).parent.parent / "experiments/tiny.py"),
            "--suite",
            "truth",
            "--judge",
            *asked,
        ]
        assert main(command) == 0
        count = len(script.requests)
        found = json.loads((workdir / "eval.json").read_text())["truth"]
        assert found["judged_support"]["value"] == 0.5 and found["judged_choice"]["n"] > 0
        assert main(command) == 0 and len(script.requests) == count  # answers are kept
    assert (workdir / "config.json").read_bytes() == (tiny_run.workdir / "config.json").read_bytes()


@pytest.mark.slow
def test_sections_of_the_same_activations_stay_and_others_go(exported, tmp_path, capsys):
    """What it costs is said before anything is read, and how many activations there are if there are too few."""
    texts = [text.text for _, text in documents(4, 40)]
    pair = ["eval", "--av", str(exported / "av"), "--ar", str(exported / "ar"), "--out", str(tmp_path), "--json"]
    pair += ["--max-new-tokens", "24", *(part for text in texts for part in ("--text", text))]

    def run(section, count):
        assert main([*pair, "--suite", section, "--num-activations", str(count)]) == 0
        shown = capsys.readouterr()
        return json.loads(shown.out), shown.err

    health, _ = run("health", 8)
    both, said = run("meaning", 8)
    assert both["health"] == health["health"] and set(both["suite"]["seconds"]) == {"health", "meaning"}
    assert said.index("8 activations, 8 explanations, about") < said.index("eval: activations")
    only, said = run("meaning", 10**4)
    assert "health" not in only and set(only["suite"]["seconds"]) == {"meaning"}
    assert "the sections health were of another pair or of other activations" in said
    assert f"10000 activations were asked for, and the input has {only['num_activations']}" in said
    assert "an earlier run has done" not in said and "an earlier run has done" in run("meaning", 8)[1]


SUMMARY = {"fve", "fve_ci95", "fve_meannorm", "cos", "fve_text", "fve_shuffled", "fve_gold"}


def figures_of(work, *sections, sampled=4, value=0.5):
    estimate = {"value": value, "ci95": [0.4, 0.6], "controls": {"permuted": {"value": 0.1}, "gold": {"value": 0.7}}}
    keys = {"reconstruction": ("fve", "fve_meannorm", "cos"), "text": ("fve_text",), "truth": ("recurrence",)}
    about = {"num_activations": 8, "num_documents": 4, "work": work, "seconds": dict.fromkeys(sections, 1.0)}
    about |= {"explanations": dict.fromkeys(sections, 8)}
    about |= {"num_sampled": {name: sampled for name in sections if name in ("reconstruction", "truth")}}
    return {name: {key: dict(estimate) for key in keys.get(name, ("n",))} for name in sections} | {"suite": about}


def written(directory, *calls, **changed):
    """Returns eval.json after these calls, and with `changed` fields before the last of them."""
    *earlier, last = calls
    for call in earlier:
        write_figures(directory, call)
    path = directory / "eval.json"
    if changed:
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changed))
    write_figures(directory, last)
    return json.loads(path.read_text())


def test_numbers_of_another_pair_go_with_its_sections(tmp_path):
    both = figures_of("a", "reconstruction", "text"), figures_of("b", "health")
    found = written(tmp_path / "other", *both)
    assert found.keys() == {"health", "suite", "num_activations", "num_documents"}
    assert found["suite"]["num_sampled"] == {}
    same = written(tmp_path / "same", both[0], figures_of("a", "health"))
    assert same.keys() >= {*SUMMARY, "reconstruction", "text", "health"} and same["fve"] == 0.5
    # A number that the other pair has, and this one has not.
    found = written(tmp_path / "null", both[0], figures_of("b", "reconstruction", value=None))
    assert found["fve"] is None and "fve_text" not in found
    # The stage's own numbers are of the run, whichever pair the suite has measured.
    found = written(tmp_path / "stage", *both, fve_before_rl=None, fve=0.3)
    assert found["fve"] == 0.3 and found["fve_ci95"] and "reconstruction" not in found


def test_sections_keep_the_number_of_their_sampled_activations(tmp_path):
    calls = [("reconstruction", 64), ("truth", 32), ("health", 64)]
    found = written(tmp_path, *(figures_of("a", section, sampled=count) for section, count in calls))
    assert found["suite"]["num_sampled"] == {"reconstruction": 64, "truth": 32}


@pytest.mark.parametrize("work", ["a", "b"])
@pytest.mark.parametrize(
    "changed",
    [
        {"suite": None},
        {"suite": {"work": "a", "seconds": None, "explanations": None, "num_sampled": None}},
        {"suite": {"work": "a", "num_sampled": 64}},
        {"suite": {"work": None}},
        {"reconstruction": None, "fve": None, "num_activations": None},
    ],
)
def test_an_edited_file_is_added_to(tmp_path, work, changed):
    found = written(tmp_path, figures_of("a", "reconstruction"), figures_of(work, "text"), **changed)
    assert found["suite"]["num_activations"] == 8 and found["fve_text"] == 0.5
    assert found["suite"]["explanations"]["text"] == 8
    write_report(tmp_path)


def test_rows_that_cannot_be_measured_and_several_processes_are_refused(tiny_run, tmp_path, monkeypatch):
    nla, rows = NLA.from_workdir(tiny_run.workdir), rows_of_run(open_trained(tiny_run.workdir), 4)
    h = rows.h.copy()
    h[2, 5] = np.nan
    with pytest.raises(UserError, match="row 2 should hold finite numbers"):
        nla.evaluate(tmp_path, rows=rows._replace(h=h))
    with pytest.raises(UserError, match="one activation a row"):
        nla.evaluate(tmp_path, rows=rows._replace(h=h[:, :3]))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="the suite runs in one process, and this is one of 2"):
        nla.evaluate(tmp_path, rows=rows)


def test_positions_leave_room_and_depend_on_the_seed(tiny_lm):
    rows, again, other = (rows_of_documents(tiny_lm, 0, documents(8), 16, seed) for seed in (0, 0, 1))
    assert rows.digest() == again.digest() != other.digest()
    assert all(len(ids) == 32 for ids in rows.following_ids)
    assert len(rows.h) == 16 and (rows.position >= 16).all()
    for row in range(16):
        assert tiny_lm.tokenizer.decode(rows.context_ids[row]) == rows.contexts[row]


def test_a_text_that_comes_twice_is_one_document(tmp_path):
    text, path = " ".join(["moon"] * 100), tmp_path / "a.txt"
    path.write_text(text)
    assert len(documents_of([text], [path])) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "smollm2-135m", "--text", "x"], "--out"),
        (["--model", "smollm2-135m", "--out", "o"], "--text, --input or --config"),
        ([], "--workdir, or --model, or --av and --ar"),
        (["--workdir", "w", "--config", "c", "--control-steps", "9"], "--control-steps is the suite's: add --suite"),
        (["--workdir", "w", "--config", "c", "--sampled", "9"], "--sampled is the suite's: add --suite"),
        (["--workdir", "w", "--sampled", "1"], "--sampled: 1 should be at least 2"),
        (["--workdir", "w", "--config", "c", "--text", "x"], "--text is the suite's: add --suite"),
        (["--workdir", "w", "--config", "c", "--temperature", "0"], "--temperature is the suite's: add --suite"),
        (["--workdir", "w", "--subject", "m"], "--subject and --dtype belong to a released pair"),
        (["--model", "m", "--out", "o", "--text", "x", "--num-activations", "1"], "--num-activations: 1 should be at"),
        (
            ["--model", "m", "--out", "o", "--text", "x", "--temperature", "nan"],
            "--temperature: nan should be at least 0",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["eval", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir", "nowhere", "--suite", "fve"], "--suite: 'fve' should be one of reconstruction"),
        (["--workdir", "nowhere"], "nowhere: no config.json there"),
        (["--workdir", "w", "--suite", "truth", "--control-steps", "9"], "--control-steps: its figures belong to the"),
        (["--workdir", "w", "--suite", "text", "--sampled", "9"], "--sampled: its figures belong to the sections"),
        (["--model", "m", "--out", "o", "--text", "x", "--config.seed=1"], "--config.*: overrides change what"),
        (["--workdir", "w", "--distributed"], "--distributed: the suite runs in one process"),
        (
            ["--config", "c", "--workdir", "w", "--suite", "text", "--distributed", "h:1,2,0"],
            "--distributed: the suite",
        ),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
