"""A whole run: the files and fields that users hold on to, and that a second run does nothing anew."""

import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from nlae_jax.cli import main
from nlae_jax.config import load_config
from nlae_jax.data.activations import ActivationStore
from nlae_jax.data.index import SPLITS
from nlae_jax.evaluate.health import MEASURES, Watch, health
from nlae_jax.evaluate.reconstruction import UNINFORMED
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.protocol import Protocol
from nlae_jax.roles.roundtrip import RoundTrip
from nlae_jax.run import stages
from nlae_jax.run.resources import open_run, prepare
from nlae_jax.run.suite import sections_in
from nlae_jax.run.training import _described_rows, health_of_samples
from nlae_jax.train import metrics
from tests.conftest import of_few_tokens

pytest_plugins = ["tests.tiny_run"]

STEPS = {"encoder_sft": 60, "decoder_sft": 6, "rl": 6}

TIMES = {"stage", "step", "step_seconds", "tokens_per_second"}
FIELDS = {
    "encoder_sft": {"loss", "skipped_updates", "grad_norm_encoder"},
    "decoder_sft": {"loss", "fve", "fve_meannorm", "skipped_updates", "grad_norm_decoder"},
    "rl": {
        "loss",
        "fve",
        "fve_meannorm",
        "reward_mean",
        "reward_std",
        "kl",
        "entropy",
        "logp_gap",
        "explanation_tokens",
        "extraction_rate",
        "truncated_rate",
        "zero_variance_groups",
        "skipped_updates",
        "grad_norm_encoder",
        "grad_norm_decoder",
        "repeated_rate",
        "repeated_item_rate",
        "repeated_sentence_rate",
        "marker_rate",
        "cjk_rate",
    },
}
EVAL_FIELDS = {
    "fve",
    "fve_ci95",
    "fve_meannorm",
    "fve_text",
    "fve_shuffled",
    "fve_gold",
    "fve_before_rl",
    "fve_gain_ci95",
    "fve_gold_gap",
    "fve_zero",
    "fve_mean_vector",
    "fve_random_vector",
    "fve_vector_gap",
    "cos",
    "num_activations",
    "num_documents",
}


@pytest.fixture(scope="module")
def result(tiny_run):
    return json.loads((tiny_run.workdir / "eval.json").read_text())


def test_workdir_has_the_files_of_the_contract(tiny_run):
    names = {path.name for path in tiny_run.workdir.iterdir()} - {".lock"}
    assert names == {
        "activations",
        "checkpoints",
        "config.json",
        "eval.json",
        "metrics.jsonl",
        "protocol.json",
        "report.html",
        "samples",
    }
    assert not list(tiny_run.workdir.rglob("*tmp*"))


def test_config_json_is_the_resolved_config(tiny_run):
    config = load_config(tiny_run.workdir / "config.json")
    assert config.sft.encoder_steps == tiny_run.settings["sft.encoder_steps"]
    assert config.subject.model == str(tiny_run.model)
    assert config.corpus.path == str(tiny_run.corpus)


@pytest.mark.parametrize("stage", STEPS)
def test_metrics_have_every_step_once_with_the_fields_of_the_contract(tiny_run, stage):
    rows = [row for row in metrics.read(tiny_run.workdir / "metrics.jsonl") if row["stage"] == stage]
    assert [row["step"] for row in rows] == list(range(1, STEPS[stage] + 1))
    for row in rows:
        assert FIELDS[stage] | TIMES <= row.keys()
        assert all(math.isfinite(value) for name, value in row.items() if name != "stage")
        assert row["skipped_updates"] == 0


def test_rl_has_something_to_learn_from(tiny_run):
    """Otherwise the tests of resuming would compare zeros."""
    rows = [row for row in metrics.read(tiny_run.workdir / "metrics.jsonl") if row["stage"] == "rl"]
    assert all(row["extraction_rate"] > 0 and row["grad_norm_encoder"] > 0.01 for row in rows)
    assert all(row["grad_norm_decoder"] > 0 and row["explanation_tokens"] > 0 for row in rows)
    assert rows[0]["kl"] < 1e-10 < 1e-8 < rows[-1]["kl"]  # the reference is the encoder before RL, up to rounding


def test_rl_says_how_different_explanations_are(tiny_run):
    """Where a step has readable ones of several activations."""
    rows = [row for row in metrics.read(tiny_run.workdir / "metrics.jsonl") if row["stage"] == "rl"]
    measured = {"distinct_1", "distinct_2", "distinct_3", "distinct_explanations", "changed_words"}
    assert sum(measured <= row.keys() for row in rows) >= len(rows) / 2
    assert all(0 <= row[name] <= 1 for row in rows for name in measured & row.keys())
    assert any(row["distinct_1"] < row["distinct_3"] for row in rows if "distinct_3" in row)


def test_rl_warns_of_samples_that_cannot_be_read(tiny_run):
    """Where none can be read, there is nothing else to measure."""
    model = LanguageModel.from_pretrained(str(tiny_run.model))
    protocol = Protocol.from_json((tiny_run.workdir / "protocol.json").read_text(encoding="utf-8"))
    tokens = np.zeros((2, 2, 5), np.int32)
    said = []
    watch = Watch("rl", said.append)
    for step, lengths in enumerate(([[3, 5], [1, 2]], [[0, 0], [0, 0]]), start=1):
        samples = {"tokens": tokens, "lengths": np.array(lengths)}
        watch.add(health_of_samples(model.tokenizer, protocol, samples, 2))
        watch.review(step)
    assert [line.split(" (")[0] for line in said if "extraction_rate" in line] == ["rl: extraction_rate 0"]


def test_logp_gap_is_small(tiny_run):
    """Sampler and trainer are one program in float32."""
    rows = [row for row in metrics.read(tiny_run.workdir / "metrics.jsonl") if row["stage"] == "rl"]
    assert all(row["logp_gap"] < 1e-4 for row in rows)


def test_warm_start_learns(tiny_run):
    losses = [row["loss"] for row in metrics.read(tiny_run.workdir / "metrics.jsonl") if row["stage"] == "encoder_sft"]
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("stage", STEPS)
def test_checkpoints_keep_the_last_two(tiny_run, stage):
    names = {path.name for path in (tiny_run.workdir / "checkpoints" / stage).iterdir()}
    assert {name for name in names if name.isdigit()} == {str(STEPS[stage] - 2), str(STEPS[stage])}


def test_eval_json(tiny_run, result):
    assert result.keys() >= EVAL_FIELDS | {measure.key for measure in MEASURES}
    low, high = result["fve_ci95"]
    assert low <= result["fve"] <= high
    low, high = result["fve_gain_ci95"]
    assert low <= result["fve"] - result["fve_before_rl"] <= high
    assert result["fve"] < result["fve_meannorm"]
    assert result["num_activations"] == tiny_run.settings["eval.num_activations"]
    assert 2 <= result["num_documents"] <= tiny_run.num_documents


def test_health_is_of_the_samples_that_were_written(tiny_run, result):
    lines = (tiny_run.workdir / "samples/held_out.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["explanation"] for line in lines]
    marker = json.loads((tiny_run.workdir / "protocol.json").read_text(encoding="utf-8"))["marker"]
    measured = health(texts, marker)
    assert len(measured) >= 10
    assert {name: result[name] for name in measured} == measured
    assert all(0 <= result[f"identical_to_{name}"] <= 1 for name in UNINFORMED)
    assert result["fve_vector_gap"] == pytest.approx(result["fve"] - max(result[f"fve_{name}"] for name in UNINFORMED))
    assert result["fve_gold_gap"] == pytest.approx(result["fve_gold"] - result["fve"])  # every row is described


def test_explanations_of_other_vectors_tell_whether_the_encoder_reads_its_own(tiny_run, tmp_path, monkeypatch, capsys):
    """An encoder that is given the same vector whatever was to be injected writes the same as for a zero vector."""
    explain, given = RoundTrip.explain, []

    def blind(self, pair, vectors, *rest):
        given.append(vectors)
        return explain(self, pair, np.ones_like(vectors), *rest)

    monkeypatch.setattr(RoundTrip, "explain", blind)
    workdir = tmp_path / "W"
    shutil.copytree(tiny_run.workdir, workdir)
    (workdir / "eval.json").unlink()
    assert main(tiny_run.arguments(workdir, "eval")) == 0
    result = json.loads((workdir / "eval.json").read_text())
    assert [result[f"identical_to_{name}"] for name in UNINFORMED] == [1.0] * 3
    assert result["fve_vector_gap"] == pytest.approx(0, abs=1e-6)
    _, true, zero, mean, random = given
    assert (zero == 0).all() and (mean == mean[0]).all() and (random[0] != random[1]).any()
    assert zero.shape == mean.shape == random.shape == true.shape
    said = re.findall(r"^warning: eval: (\w+) \S+ \(12 held-out activations\) should be", capsys.readouterr().err, re.M)
    assert said == [measure.key for measure in MEASURES if measure.is_healthy(result) is False]
    assert {f"identical_to_{name}" for name in UNINFORMED} < set(said)


def test_what_the_suite_has_measured_stays_beside_what_the_stage_measures(tiny_run, tmp_path):
    """Its own sections alone: its numbers under the stage's names are measured anew."""
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "W")
    suite = {"text": {"fve_text": {"value": 0.5}}, "health": {}, "suite": {"work": "x"}}
    (workdir / "eval.json").write_text(json.dumps({"fve": 9.0, "old": 1, **suite}))
    assert main(tiny_run.arguments(workdir, "eval")) == 0
    found = json.loads((workdir / "eval.json").read_text())
    assert found == json.loads((tiny_run.workdir / "eval.json").read_text()) | suite


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_an_evaluation_that_cannot_be_read_has_no_sections(tmp_path, content):
    (tmp_path / "eval.json").write_text(content)
    assert sections_in(tmp_path) == sections_in(tmp_path / "none") == {}


def test_samples_are_the_held_out_activations(tiny_run, result):
    lines = (tiny_run.workdir / "samples/held_out.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    index = ActivationStore(tiny_run.workdir / "activations").index
    held_out = {index.doc_ids[index.document[row]] for row in index.rows_of("held_out")}
    assert len(samples) == result["num_activations"]
    assert {sample["doc_id"] for sample in samples} <= held_out
    assert len({sample["doc_id"] for sample in samples}) == result["num_documents"]
    assert np.mean([sample["cos"] for sample in samples]) == pytest.approx(result["cos"])
    assert np.mean([sample["closed"] for sample in samples]) == pytest.approx(result["extraction_rate"])
    assert 0 <= result["truncated_rate"] <= 1 - result["extraction_rate"] + 1e-6
    for sample in samples:
        assert sample["context"].endswith(sample["token"])
        assert sample["closed"] == bool(sample["explanation"])
        assert sample["mse"] == pytest.approx(2 * (1 - sample["cos"]))
        assert sample["closed"] or sample["mse"] == 2


def test_activations_are_the_subjects(tiny_run):
    """Read through the store, computed anew by the model alone."""
    config = load_config(tiny_run.workdir / "config.json")
    store = ActivationStore(tiny_run.workdir / "activations")
    lm = LanguageModel.from_pretrained(config.subject.model)
    rows = np.array([0, len(store.index.position) - 1])
    for row, vector in zip(rows, store.vectors(rows), strict=True):
        ids = store.context_ids(row)[None]
        np.testing.assert_allclose(lm.residual(ids, config.subject.layer)[0, -1], vector, atol=1e-4, rtol=1e-4)


def test_descriptions_are_of_the_rows_that_need_one(tiny_run):
    table = pq.read_table(tiny_run.workdir / "activations/descriptions.parquet")
    index = ActivationStore(tiny_run.workdir / "activations").index
    split_of = [SPLITS[split] for split in index.split[index.document[table["row"].to_numpy()]]]
    assert set(split_of) == {"encoder_sft", "decoder_sft", "held_out"}
    assert all(table["description"].to_pylist())


def snapshot(workdir):
    """Path -> (time of change, bytes) of every file but the report, which is always written anew."""
    files = [path for path in workdir.rglob("*") if path.is_file() and path.name not in ("report.html", ".lock")]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_second_run_does_nothing_anew(tiny_run, monkeypatch, capsys):
    def never(*arguments, **options):
        raise AssertionError("this was done in the first run")

    monkeypatch.setattr("nlae_jax.data.activations.extract", never)
    for name in ("preparation.make_describer", "preparation.read_documents", "training.run_stage"):
        monkeypatch.setattr(f"nlae_jax.run.{name}", never)
    monkeypatch.setattr("nlae_jax.roles.roundtrip.RoundTrip.explain", never)
    before, report = snapshot(tiny_run.workdir), (tiny_run.workdir / "report.html").read_bytes()
    capsys.readouterr()
    assert main(tiny_run.arguments(tiny_run.workdir)) == 0
    shown = capsys.readouterr()
    assert snapshot(tiny_run.workdir) == before
    assert (tiny_run.workdir / "report.html").read_bytes() == report
    assert "warning" not in shown.err
    assert "held-out FVE" in shown.out


@pytest.mark.parametrize("command", ["rl", "eval"])
def test_a_finished_stage_needs_nothing_of_those_before(tiny_run, tmp_path, command):
    """Whoever deletes the activations after training has what was trained."""
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "W")
    shutil.rmtree(workdir / "activations")
    before = snapshot(workdir)
    assert main(tiny_run.arguments(workdir, command)) == 0
    assert snapshot(workdir) == before


def test_stages_run_in_order_and_only_up_to_the_one_asked_for(monkeypatch):
    ran = []
    monkeypatch.setattr(stages, "prepare", lambda run: f"{run}, prepared")
    for name in stages.STAGES:
        monkeypatch.setitem(stages.STAGES, name, lambda run, name=name: ran.append((name, run)))
    monkeypatch.setattr(stages, "_FINISHED", {"rl": lambda run: True, "eval": lambda run: False})
    stages.run_stage("run", "describe")
    assert ran == [("extract", "run"), ("describe", "run")]
    ran.clear()
    stages.run_stage("run", "rl")  # it is finished
    assert ran == []
    stages.run_stage("run", "eval")
    assert ran == [
        ("extract", "run"),
        ("describe", "run"),
        ("sft", "run, prepared"),
        ("rl", "run, prepared"),
        ("eval", "run, prepared"),
    ]


def test_descriptions_that_fill_the_model_are_not_padded(tiny_run):
    """Of the encoder, which reads its prompt before them."""
    run = prepare(open_run(load_config(tiny_run.workdir / "config.json"), tiny_run.workdir))
    around = run.roles.encoder.prompt_length

    def width(most):
        arch = of_few_tokens(run.arch, most)
        bounded = dataclasses.replace(run.roles, encoder=run.roles.encoder.clone(arch=arch))
        tokenise = lambda text: run.tokenizer.encode(text)[:21]  # noqa: E731
        rows = _described_rows(dataclasses.replace(run, roles=bounded), "encoder_sft", tokenise, around=around)
        assert rows[2].max() == 21
        return rows[1].shape[1]

    assert [width(around + room) for room in (20, 21, 23, 24, 50)] == [21, 21, 23, 24, 24]
