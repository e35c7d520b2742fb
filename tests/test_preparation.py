"""The stage that describes, ended in the middle and continued elsewhere: no server is asked anything twice."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from nlae_jax.cli import main
from nlae_jax.data import model_server, trained_describer
from nlae_jax.data.index import read_index
from nlae_jax.explore.sources import open_trained
from nlae_jax.lm.tiny import write_tiny_model
from nlae_jax.run import preparation
from nlae_jax.runtime import supervision
from tests.conftest import of_few_tokens
from tests.servers import GOOD, chat, serving

pytest_plugins = ["tests.fake_gcs", "tests.tiny_run"]

ROOT = Path(__file__).parent.parent
KEY = "sk-test-not-to-be-shown"
CONCURRENCY = 4


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="session")
def tiny(corpus_file, tiny_dir):
    """Command lines of a tiny run that has not been made."""
    from tests.tiny_run import TinyRun  # a plugin: pytest imports it first

    return TinyRun(Path(), corpus_file, tiny_dir)


@pytest.fixture
def serve():
    with serving() as start:
        yield start


def command(tiny, workdir, url="http://127.0.0.1:1", **settings):
    asked = {
        "describe__provider": "openai",
        "describe__model": "m",
        "describe__base_url": f"{url}/v1",
        "describe__concurrency": CONCURRENCY,
    }
    return tiny.arguments(workdir, "describe", **asked, **settings)


@pytest.fixture(scope="module")
def extracted(tiny, tmp_path_factory):
    """A workdir whose descriptions are to come from a server."""
    workdir = tmp_path_factory.mktemp("extracted") / "W"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        arguments = command(tiny, workdir)
        arguments[0] = "extract"
        assert main(arguments) == 0
    return workdir


@pytest.fixture
def workdir(extracted, tmp_path):
    return shutil.copytree(extracted, tmp_path / "W")


def other_machine(monkeypatch, tmp_path):
    """From here on nothing is known of what this machine asked."""
    monkeypatch.setenv("NLAE_CACHE", str(tmp_path / "other machine"))


def descriptions(workdir):
    return pq.read_table(workdir / "activations/descriptions.parquet")["description"].to_pylist()


def test_killed_and_continued_on_another_machine(tiny, workdir, tmp_path, serve, monkeypatch):
    """SIGKILL loses what was under way, and nothing that had arrived."""

    def steps(n, body):
        if n == 40:
            process.kill()
            process.wait()
        return chat()

    url, script = serve(steps)
    process = subprocess.Popen([sys.executable, "-m", "nlae_jax", *command(tiny, workdir, url)], cwd=ROOT)
    assert process.wait(300) == -signal.SIGKILL
    moved = shutil.move(workdir, tmp_path / "elsewhere")
    other_machine(monkeypatch, tmp_path)
    assert main(command(tiny, moved, url)) == 0
    assert set(descriptions(moved)) == {GOOD}
    asked = script.asked
    assert len(asked) > 60 and max(asked.values()) <= 2
    assert sum(count == 2 for count in asked.values()) <= CONCURRENCY


@pytest.mark.parametrize("end", ["terminated", "interrupted", "refused"])
def test_ended_and_continued_on_another_machine(tiny, workdir, tmp_path, serve, monkeypatch, capsys, end):
    """Told to stop, or its key refused, the run keeps all that it was answered: nothing is asked again."""

    def steps(n, body):
        if n == 40 and end == "refused":
            refused.append(body["messages"][0]["content"])
            return 401, {}, b""
        if n == 40:
            os.kill(os.getpid(), signal.SIGTERM if end == "terminated" else signal.SIGINT)
        return chat()

    monkeypatch.setattr(model_server, "_DRAIN_SECONDS", 60.0)  # however slow this machine is
    refused = []
    url, script = serve(steps)
    code = {"terminated": supervision.PREEMPTED, "interrupted": 130, "refused": 2}[end]
    assert main(command(tiny, workdir, url)) == code
    assert "OPENAI_API_KEY" in capsys.readouterr().err or end != "refused"
    moved = shutil.copytree(workdir, tmp_path / "elsewhere")
    assert len(script.requests) < 60 and not (moved / "activations/descriptions.parquet").exists()
    other_machine(monkeypatch, tmp_path)
    assert main(command(tiny, moved, url)) == 0
    assert set(descriptions(moved)) == {GOOD} and len(script.asked) > 60
    assert script.asked - Counter(refused) == Counter(set(script.asked))


def test_terminated_with_a_server_that_says_nothing(tiny, workdir, serve, monkeypatch, capsys):
    """The run ends without waiting for an answer."""

    def steps(n, body):
        os.kill(os.getpid(), signal.SIGTERM)
        return script.hang

    monkeypatch.setattr(model_server, "_DRAIN_SECONDS", 1.0)
    url, script = serve(steps)
    assert main(command(tiny, workdir, url, describe__timeout_seconds=3600.0)) == supervision.PREEMPTED
    assert "describe: waiting 1 s at most for answers under way\n" in capsys.readouterr().err


def test_another_workdir_of_this_machine_asks_nothing(tiny, workdir, tmp_path, serve, monkeypatch):
    """And has the answers itself from then on."""
    monkeypatch.setenv("NLAE_CACHE", str(tmp_path / "machine"))
    url, script = serve(lambda n, body: chat())
    second = shutil.copytree(workdir, tmp_path / "second")
    assert main(command(tiny, workdir, url)) == 0
    before = len(script.requests)
    assert main(command(tiny, second, url)) == 0
    other_machine(monkeypatch, tmp_path)
    (second / "activations/descriptions.parquet").unlink()
    assert main(command(tiny, second, url)) == 0
    assert len(script.requests) == before and descriptions(second) == descriptions(workdir)


def test_answers_live_in_the_bucket(tiny, gcs, tmp_path, serve, monkeypatch):
    """A machine is told to go in the middle of describing, and another one continues with what is in the bucket."""

    def steps(n, body):
        if n == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        return chat()

    monkeypatch.setattr(model_server, "_DRAIN_SECONDS", 60.0)
    url, script = serve(steps)
    assert main(command(tiny, "gs://bucket/W", url)) == supervision.PREEMPTED
    assert len(gcs.names("W/activations/answers/part-00000-")) == 1
    other_machine(monkeypatch, tmp_path)
    assert main(command(tiny, "gs://bucket/W", url)) == 0
    assert len(gcs.names("W/activations/answers/part-00001-")) == 1 and len(script.asked) > 60
    assert max(script.asked.values()) == 1


def test_words_of_the_corpus_are_counted_for_the_template_alone(tiny, workdir, serve, monkeypatch):
    def never(texts):
        raise AssertionError("this goes over the whole corpus")

    monkeypatch.setattr(preparation, "document_frequencies", never)
    url, _ = serve(lambda n, body: chat())
    assert main(command(tiny, workdir, url)) == 0
    assert set(descriptions(workdir)) == {GOOD}


@pytest.mark.parametrize(("template", "begins"), [("{{ messages[0].content }}<think>\n", "<think>"), ("", "")])
def test_replies_begin_where_the_template_ends(tokenizer, monkeypatch, template, begins):
    """A template that opens the thinking leaves its tag out of the reply."""
    if template:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    describe = SimpleNamespace(max_new_tokens=9)
    run = SimpleNamespace(seed=int, config=SimpleNamespace(describe=describe), tokenizer=tokenizer)
    model = SimpleNamespace(chat=lambda prompts, limit, seed: [f"to {prompt}" for prompt in prompts])
    assert preparation._chat(run, model, ["a", "b"]) == [f"{begins}to a", f"{begins}to b"]


# --- what is damaged is made again, and nothing is paid for again


def follow(advice, directory):
    """Deletes what the advice in a complaint names."""
    if every := re.search(r"delete all of .* but (\S+)/", advice):
        names = [path.name for path in directory.iterdir() if path.name != every[1]]
    else:
        names = re.search(r"delete (\S+) and (\S+) beside it", advice).groups()
    for name in names:
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("damaged", ["vectors", "a chunk of vectors", "rows.parquet", "documents.parquet"])
def test_the_advice_for_damaged_activations_keeps_what_was_paid_for(
    tiny, workdir, tmp_path, serve, monkeypatch, capsys, damaged
):
    url, script = serve(lambda n, body: chat())
    assert main(command(tiny, workdir, url)) == 0
    before, asked = descriptions(workdir), len(script.requests)
    directory = workdir / "activations"
    if damaged.endswith("vectors"):
        path = next(path for path in (directory / "vectors").rglob("*") if path.is_file() and path.name != "zarr.json")
        path = path if "chunk" in damaged else directory / "vectors/zarr.json"
    else:
        path = directory / damaged
    path.write_bytes(path.read_bytes()[:-40])
    sft = command(tiny, workdir, url)
    sft[0] = "sft"
    capsys.readouterr()
    assert main(sft) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    follow(complaint, directory)
    other_machine(monkeypatch, tmp_path)
    arguments = command(tiny, workdir, url)
    assert main(["extract", *arguments[1:]]) == 0 and main(arguments) == 0
    assert descriptions(workdir) == before and len(script.requests) == asked
    run = open_trained(workdir)
    assert np.isfinite(run.store.vectors(np.arange(len(run.store.index.position)))).all()


# --- what cannot describe is refused before anything is read


def without_template(model, directory):
    """A copy of the model as base models are."""
    shutil.copytree(model, directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize(
    ("provider", "says"),
    [
        ("file", "notes.jsonl: cannot be read: No such file or directory"),
        ("file of other things", "notes.jsonl:2: not valid JSON"),
        ("subject", "describe.provider subject: .* has no chat template"),
        ("describer", "no such file or directory, and not a hub id"),
    ],
)
def test_a_provider_that_cannot_describe_is_refused_before_extraction(
    tiny, tmp_path, monkeypatch, capsys, provider, says
):
    notes, settings = tmp_path / "notes.jsonl", {"describe__provider": provider.split()[0]}
    if "other things" in provider:
        notes.write_text('{"text": "the of", "note": "A list."}\nnone\n')
    if settings["describe__provider"] == "file":
        settings["describe__path"] = notes
    if provider == "subject":
        settings["subject.model"] = without_template(tiny.model, tmp_path / "base")
    if provider == "describer":
        about = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": f"{tmp_path}/no/model"}
        (tmp_path / "adapter_config.json").write_text(json.dumps(about))
        monkeypatch.setattr(trained_describer, "describer_directory", lambda: tmp_path)
    assert main(tiny.arguments(tmp_path / "W", "train", **settings)) == 2
    shown = capsys.readouterr().err
    assert re.search(f"^nlae: .*{says}", shown.splitlines()[-1]), shown
    assert "reading the corpus" not in shown and not (tmp_path / "W/activations").exists()


def test_a_file_that_comes_after_the_positions_are_fixed_is_refused_at_once(tiny, tmp_path, capsys):
    notes = tmp_path / "notes.jsonl"
    text = json.loads(tiny.corpus.read_text().splitlines()[0])["text"]
    notes.write_text(json.dumps({"text": text, "note": "A list of short words."}) + "\n")
    arguments = tiny.arguments(tmp_path / "W", "extract", describe__provider="file", describe__path=notes)
    assert main(arguments) == 0
    for name in ("descriptions.parquet", "meta.json"):
        (tmp_path / "W/activations" / name).unlink()
    assert main(arguments) == 2
    advice = capsys.readouterr().err.splitlines()[-1]
    follow(advice, tmp_path / "W/activations")
    assert main(arguments) == 0 and (tmp_path / "W/activations/descriptions.parquet").exists()


def test_texts_are_cut_to_what_the_model_can_be_run_on(tiny, arch, tmp_path):
    model = tmp_path / "model"
    write_tiny_model(model, family="phi3", rope_scaling=of_few_tokens(arch, 20).rope_scaling)
    settings = {"subject.model": model, "extract.max_tokens": 512, "describe__provider": "template"}
    assert main(tiny.arguments(tmp_path / "W", "extract", **settings)) == 0
    assert max(map(len, read_index(tmp_path / "W/activations").ids)) == 20
