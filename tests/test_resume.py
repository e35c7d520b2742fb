"""Killed at any moment and started again, a run ends with the numbers of a run that was never killed, bit for bit."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlae_jax.cli import main
from nlae_jax.config import Config, DescribeConfig, load_config, resolve
from nlae_jax.data.answers import AnswerCache
from nlae_jax.data.describer import Context, DescribeResources
from nlae_jax.data.pipeline import batches
from nlae_jax.data.providers import subject_provider
from nlae_jax.lm.arch import Experts
from nlae_jax.lm.families import hf_config, read_arch
from nlae_jax.lm.transformer import random_params
from nlae_jax.lm.weights import save_params
from nlae_jax.mesh import make_mesh
from nlae_jax.run import training
from nlae_jax.run.resources import open_run
from nlae_jax.train import loop
from nlae_jax.train.checkpoint import is_sealed
from nlae_jax.train.loop import Stage, compiled, last_checkpoint, run_stage
from tests.killed import POINTS

pytest_plugins = ["tests.tiny_run"]

ROOT = Path(__file__).parent.parent


# --- the loop alone, on a state that mixes batch, step and a key, so that anything lost shows

STEPS = 11


class Killed(Exception):
    pass


def toy_step(state, frozen, batch):
    noise = jax.random.normal(jax.random.fold_in(state["key"], state["step"]), state["w"].shape)
    w = 0.9 * state["w"] + frozen["scale"] * noise + batch["x"].sum()
    return {**state, "w": w, "step": state["step"] + 1}, {"loss": (w * w).mean(), "tokens": batch["x"].size}


def toy_config(every=4) -> Config:
    return resolve({"checkpoint.every_steps": every})


def run_toy(workdir, kill=lambda number: False, config=None):
    """Runs what is left of the stage; `kill` says before which steps (counted from 1 in this process) to die."""
    config = config or toy_config()
    mesh = make_mesh(config.mesh)
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = {"w": jnp.zeros(5), "step": jnp.zeros((), jnp.int32), "key": jax.random.PRNGKey(3)}
    state, frozen = jax.device_put(state, placed), jax.device_put({"scale": jnp.float32(0.3)}, placed)
    step, count = compiled(toy_step, state, mesh), iter(range(1, 1000))

    class Dying:
        def __call__(self, *arguments):
            if kill(next(count)):
                raise Killed
            return step(*arguments)

        def _cache_size(self):
            return step._cache_size()

    iterator = batches(7, 3, 1, lambda i: {"x": i.astype(np.float32)})
    return run_stage(Stage("toy", STEPS, Dying(), iterator), state, frozen, mesh, config, workdir)


def rows_of(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("toy")
    return np.asarray(run_toy(workdir)["w"]), rows_of(workdir)


@pytest.mark.parametrize("stop", [1, 4, 5, 8, STEPS])
def test_loop_stopped_before_a_step(tmp_path, uninterrupted, stop):
    with pytest.raises(Killed):
        run_toy(tmp_path, lambda number: number == stop)
    assert not is_sealed(last_checkpoint(tmp_path, "toy", STEPS))
    w, rows = uninterrupted
    np.testing.assert_array_equal(run_toy(tmp_path)["w"], w)
    assert rows_of(tmp_path) == rows
    assert is_sealed(last_checkpoint(tmp_path, "toy", STEPS))


def test_loop_stopped_again_and_again(tmp_path, uninterrupted):
    for _ in range(STEPS):
        try:
            run_toy(tmp_path, lambda number: number == 6)
        except Killed:
            continue
        break
    assert rows_of(tmp_path) == uninterrupted[1]


def test_rows_beyond_the_checkpoint_are_written_once(tmp_path, uninterrupted):
    with pytest.raises(Killed):
        run_toy(tmp_path, lambda number: number == 8)
    assert rows_of(tmp_path) == uninterrupted[1][:6]  # the seventh was on its way; the checkpoint is of step 4
    run_toy(tmp_path)
    assert rows_of(tmp_path) == uninterrupted[1]


def test_finished_loop_runs_no_step(tmp_path, uninterrupted):
    run_toy(tmp_path)
    np.testing.assert_array_equal(run_toy(tmp_path, lambda number: True)["w"], uninterrupted[0])
    assert rows_of(tmp_path) == uninterrupted[1]


def test_checkpoints_may_come_more_often_on_resuming(tmp_path, uninterrupted):
    with pytest.raises(Killed):
        run_toy(tmp_path, lambda number: number == 8)
    np.testing.assert_array_equal(run_toy(tmp_path, config=toy_config(every=3))["w"], uninterrupted[0])


def test_saves_count_as_soon_as_they_are_finished(tmp_path, monkeypatch):
    """Not when the next one begins: a killed run loses no more than the steps since the last save."""
    poll, sealed = loop.Checkpoints.poll, []

    def patient(self):
        self._manager.wait_until_finished()  # as if steps took long
        poll(self)

    def look(number):
        sealed.append(is_sealed(tmp_path / "checkpoints/toy/4"))
        return False

    monkeypatch.setattr(loop.Checkpoints, "poll", patient)
    run_toy(tmp_path, look)
    assert sealed == [False] * 5 + [True] * (STEPS - 5)


# --- descriptions


@pytest.mark.parametrize("killed_at", [0, 5, 31, 32, 40, 69])
def test_descriptions_by_the_subject_killed_in_a_batch(tmp_path, killed_at):
    """What is sampled for one prompt depends on its batch: batches must be asked anew as they were."""

    def generate(prompts):
        batch = sum(map(len, prompts))
        return [f"<explanation>Number {i} of {len(prompts)}, {batch} long.</explanation>" for i in range(len(prompts))]

    def describe(directory, stored=None):
        resources = DescribeResources({}, 1, generate, directory)
        describer = subject_provider(DescribeConfig(provider="subject"), resources, done.append)
        with pytest.MonkeyPatch.context() as patch:
            put, count = AnswerCache.put, iter(range(1000))

            def dying(self, *answer):
                if next(count) == stored:
                    raise Killed
                put(self, *answer)

            patch.setattr(AnswerCache, "put", dying)
            return describer(contexts)

    contexts = [Context(str(i), "text " * (1 + i % 70) + str(i % 70), ()) for i in range(80)]
    done: list[int] = []
    whole = describe(tmp_path / "whole")
    assert sum(done) == len(contexts)
    with pytest.raises(Killed):
        describe(tmp_path / "killed", killed_at)
    done.clear()
    assert describe(tmp_path / "killed") == whole
    assert sum(done) == len(contexts)


# --- a real run, in this process


@pytest.mark.parametrize("stage", ["encoder_sft", "rl"])
def test_stage_resumed_from_its_last_but_one_checkpoint(tiny_run, tmp_path, capsys, stage):
    workdir = tmp_path / "W"
    shutil.copytree(tiny_run.workdir, workdir)
    (newest,) = (path for path in (workdir / "checkpoints" / stage).iterdir() if path.name in ("6", "60"))
    damaged = max(newest.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    with damaged.open("r+b") as file:
        file.truncate(damaged.stat().st_size // 2)
    (workdir / "eval.json").unlink()
    (workdir / "samples/held_out.jsonl").unlink()
    assert main(tiny_run.arguments(workdir)) == 0
    shown = capsys.readouterr().err
    assert shown.count("warning: checkpoint") == 1
    assert str(newest) in shown
    assert_same(tiny_run, workdir)


def assert_same(tiny_run, workdir):
    assert tiny_run.metrics(workdir) == tiny_run.metrics(tiny_run.workdir)
    for name in ("eval.json", "samples/held_out.jsonl"):
        assert (workdir / name).read_bytes() == (tiny_run.workdir / name).read_bytes()


def test_split_step_gives_the_same_numbers_after_resuming(tiny_run, tmp_path):
    """rl.fused may change between two starts: its results are equal."""
    workdir = tmp_path / "W"
    shutil.copytree(tiny_run.workdir, workdir)
    shutil.rmtree(workdir / "checkpoints/rl/6")
    assert main(tiny_run.arguments(workdir, "rl", rl__fused=False)) == 0
    for ours, theirs in zip(tiny_run.metrics(workdir), tiny_run.metrics(tiny_run.workdir), strict=True):
        for name, value in ours.items():
            assert value == (theirs[name] if name == "stage" else pytest.approx(theirs[name], rel=1e-3, abs=1e-4))


@pytest.mark.slow
def test_a_run_without_a_kl_term_resumes_too(tiny_run, tmp_path):
    """In one program and in three: rows have no `kl`, and no other number is missing."""
    settings, workdir = {"rl__kl_coef": 0.0}, tmp_path / "W"
    shutil.copytree(tiny_run.workdir, workdir)
    shutil.rmtree(workdir / "checkpoints/rl")
    (workdir / "eval.json").unlink()
    assert main(tiny_run.arguments(workdir, "rl", **settings)) == 0
    whole = tiny_run.metrics(workdir)
    for row, before in zip(whole, tiny_run.metrics(tiny_run.workdir), strict=True):
        assert before.keys() - row.keys() == ({"kl"} if row["stage"] == "rl" else set())
    shutil.rmtree(workdir / "checkpoints/rl/6")
    assert main(tiny_run.arguments(workdir, "rl", **settings, rl__fused=False)) == 0
    for ours, theirs in zip(tiny_run.metrics(workdir), whole, strict=True):
        assert ours == {k: v if isinstance(v, str) else pytest.approx(v, rel=1e-3, abs=1e-4) for k, v in theirs.items()}
    assert main(["report", "--workdir", str(workdir)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True])
def test_adapters_on_a_shared_base_resume_too(tiny_run, tmp_path, experts):
    """The other tests fine-tune fully; people mostly do not. Experts may have adapters, too."""
    settings = {"lora__rank": 4, "sft__encoder_steps": 12}
    if experts:
        settings |= {"lora__experts": True, "subject__model": mixture_like(tiny_run.model, tmp_path / "mixture")}
    whole, workdir = tmp_path / "whole", tmp_path / "W"
    assert main(tiny_run.arguments(whole, **settings)) == 0
    shutil.copytree(whole, workdir)
    for stage, last in (("encoder_sft", 12), ("decoder_sft", 6), ("rl", 6)):
        shutil.rmtree(workdir / "checkpoints" / stage / str(last))
    (workdir / "eval.json").unlink()
    assert main(tiny_run.arguments(workdir, **settings)) == 0
    assert tiny_run.metrics(workdir) == tiny_run.metrics(whole)
    assert (workdir / "eval.json").read_bytes() == (whole / "eval.json").read_bytes()


def mixture_like(model, directory):
    """Writes a random mixture of experts of the sizes and with the tokenizer of another model."""
    shutil.copytree(model, directory)
    mixture = {"family": "qwen3_moe", "qk_norm": "head", "experts": Experts(count=4, per_token=2, normalised=True)}
    arch = dataclasses.replace(read_arch(model), **mixture)
    save_params(directory, random_params(jax.random.PRNGKey(0), arch), arch)
    (directory / "config.json").write_text(json.dumps(hf_config(arch)))
    return directory


@pytest.mark.slow
def test_batches_of_several_widths_resume_too(tiny_run, tmp_path, monkeypatch):
    original, met = training.bucketed_batches, []
    watched = lambda length, widths, *rest: met.append(len(widths)) or original(length, widths, *rest)  # noqa: E731
    monkeypatch.setattr(training, "bucketed_batches", watched)
    settings = {"lora__rank": 4, "sft__encoder_steps": 8, "sft__decoder_steps": 8, "sft__buckets": 2}
    whole, workdir = tmp_path / "whole", tmp_path / "W"
    assert main(tiny_run.arguments(whole, "sft", **settings)) == 0
    shutil.copytree(whole, workdir)
    for stage in ("encoder_sft", "decoder_sft"):
        shutil.rmtree(workdir / "checkpoints" / stage / "8")
    assert main(tiny_run.arguments(workdir, "sft", **settings)) == 0
    assert tiny_run.metrics(workdir) == tiny_run.metrics(whole)
    assert met == [2, 2]  # the decoder's stage, twice: the encoder's responses are all of one width


def test_two_looks_at_one_workdir_in_one_process(tiny_run):
    config = load_config(tiny_run.workdir / "config.json")
    first = open_run(config, tiny_run.workdir)
    assert open_run(config, tiny_run.workdir).held_out_rows().tolist() == first.held_out_rows().tolist()


# --- real processes, really killed


def test_a_stage_that_is_lost_is_done_again_in_its_place(tiny_run, tmp_path):
    """Its checkpoints are damaged after RL: the same rows, where they were."""
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "W")
    for path in workdir.glob("checkpoints/encoder_sft/*/manifest.json"):
        path.write_text("{}")
    (workdir / "eval.json").unlink()
    assert main(tiny_run.arguments(workdir)) == 0
    before, after = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (tiny_run.workdir, workdir)
    )
    assert [(row["stage"], row["step"]) for row in after] == [(row["stage"], row["step"]) for row in before]
    assert_same(tiny_run, workdir)


def start(module, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(tiny_run, workdir, **settings):
    process = start("nlae_jax", *tiny_run.arguments(workdir, **settings))
    _, shown = process.communicate(timeout=600)
    assert process.returncode == 0, shown
    assert not list(workdir.rglob("*tmp*"))  # whatever was half-written has been replaced


@pytest.mark.slow
def test_killed_at_every_point_of_every_stage(tiny_run, tmp_path):
    """One run, killed at each point: each start gets to the next point."""
    workdir = tmp_path / "W"
    for point in POINTS:
        process = start("tests.killed", point, *tiny_run.arguments(workdir))
        _, shown = process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL, f"{point} was not reached: {shown}"
    finish(tiny_run, workdir)
    assert_same(tiny_run, workdir)


@pytest.mark.slow
def test_interrupted_by_hand(tiny_run, tmp_path):
    """Control-C ends in one line; what is being saved is finished first."""
    workdir = tmp_path / "W"
    process = start("tests.killed", "never", *tiny_run.arguments(workdir))
    while process.poll() is None and "encoder_sft" not in read_or_empty(workdir / "metrics.jsonl"):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=600)
    assert process.returncode == 130, shown
    assert shown.splitlines()[-1] == "nlae: interrupted; the same command continues"
    assert "Traceback" not in shown
    finish(tiny_run, workdir)
    assert_same(tiny_run, workdir)


def read_or_empty(path):
    return path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.mark.slow
def test_killed_from_outside_whenever(tiny_run, tmp_path):
    """A clock that knows nothing of the run."""
    workdir, rng = tmp_path / "W", random.Random(0)
    for _ in range(8):
        seen = len(read_or_empty(workdir / "metrics.jsonl"))
        process = start("nlae_jax", *tiny_run.arguments(workdir))
        while process.poll() is None:  # until it has got further than the one before
            if len(read_or_empty(workdir / "metrics.jsonl")) > seen:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2))
        process.kill()
        process.communicate()
    finish(tiny_run, workdir)
    assert_same(tiny_run, workdir)
