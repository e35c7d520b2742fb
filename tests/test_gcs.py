"""A workdir in a bucket: the same run as in a directory, killed and resumed too, against a server on localhost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlae_jax.api import NLA
from nlae_jax.cli import main
from nlae_jax.data.activations import open_vectors
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import children, read_json, read_text, workdir_path
from nlae_jax.train import checkpoint, metrics
from nlae_jax.train.checkpoint import Checkpoints, is_sealed, newest_sealed, restore_part
from nlae_jax.train.metrics import MetricsLog, read

pytest_plugins = ["tests.fake_gcs", "tests.tiny_run"]

ROOT = Path(__file__).parent.parent
WORKDIR = "gs://bucket/runs/W"


@pytest.fixture
def workdir(gcs):
    return workdir_path(WORKDIR)


# --- metrics


def row(step, stage="rl"):
    return {"stage": stage, "step": step, "loss": step / 3}


def test_rows_wait_and_are_written_before_a_checkpoint(workdir, gcs):
    log = MetricsLog(workdir / "metrics.jsonl")
    for step in range(1, 501):
        log.append(row(step))
    assert len(gcs.uploads) <= 2  # the first at once; a second if half a second became ten
    log.sync()
    log.sync()
    assert read(log.path) == [row(step) for step in range(1, 501)]
    assert len(gcs.uploads) <= 3


def test_what_was_not_written_is_as_never_logged(workdir):
    log = MetricsLog(workdir / "metrics.jsonl")
    log.append(row(1, "sft"))
    log.append(row(1))
    log.append(row(2))
    log.sync()
    log.append(row(3))  # and the process is killed
    again = MetricsLog(log.path)
    again.rewind("rl", 1)
    again.append(row(2))
    again.sync()
    assert read(log.path) == [row(1, "sft"), row(1), row(2)]


def test_an_end_in_an_error_loses_no_row(workdir):
    with pytest.raises(KeyError, match="broken"), MetricsLog(workdir / "metrics.jsonl") as log:
        for step in range(1, 4):
            log.append(row(step))
        raise KeyError("broken")
    assert [r["step"] for r in read(log.path)] == [1, 2, 3]


def test_a_long_log_is_written_less_often():
    assert metrics._pause(1000) == 10
    assert metrics._pause(3_000_000) == 30  # 5000 steps of 600 bytes: 100 kB a second


# --- arrays and checkpoints


def test_activations_are_kept(workdir, gcs):
    values = np.random.default_rng(0).standard_normal((700, 8)).astype(np.float32)
    array = open_vectors(workdir / "activations", 700, 8, create=True)
    for start in range(0, 700, 70):
        array[start : start + 70].write(values[start : start + 70]).result()
    np.testing.assert_array_equal(open_vectors(workdir / "activations", 700, 8)[:].read().result(), values)
    assert {"runs/W/activations/vectors/zarr.json", "runs/W/activations/vectors/c/1/0"} <= set(gcs.names())
    with pytest.raises(UserError, match="activations/elsewhere/vectors: missing or damaged"):
        open_vectors(workdir / "activations/elsewhere", 700, 8)


def state_at(step):
    values = np.random.default_rng(step).standard_normal((4096,)).astype(np.float32)
    return {"weights": jnp.asarray(values), "step": jnp.asarray(step, jnp.int32)}


def save(directory, *steps):
    with Checkpoints(directory, 2) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step), {"iterator": {"next": step}})


def assert_newest(directory, step):
    with Checkpoints(directory, 2) as checkpoints:
        number, state, data = checkpoints.restore(jax.tree.map(jnp.zeros_like, state_at(0)))
    assert number == step == state["step"] and data == {"iterator": {"next": step}}
    np.testing.assert_array_equal(state["weights"], state_at(step)["weights"])


def test_nothing_saved_is_nothing_restored(workdir):
    with Checkpoints(workdir / "new", 2) as checkpoints:
        assert checkpoints.newest() is None
    assert newest_sealed(workdir / "new") is None


def test_newest_is_restored_and_older_ones_go(workdir, gcs):
    save(workdir, 2, 4, 6)
    assert sorted(path.name for path in children(workdir)) == ["4", "6"]
    assert all(is_sealed(workdir / name) for name in "46") and newest_sealed(workdir).name == "6"
    gcs.uploads.clear()
    assert_newest(workdir, 6)
    part = restore_part(workdir / "6", {"weights": jnp.zeros(4096)})
    np.testing.assert_array_equal(part["weights"], state_at(6)["weights"])
    assert gcs.uploads == []


def test_no_checkpoint_is_read_back_to_be_sealed(workdir, gcs):
    """Its checksums come from the store, however large it is."""
    save(workdir, 2)
    manifest = read_json(workdir / "2/manifest.json")
    gcs.refuse = lambda method, path: 400 if "alt=media" in path else 0
    assert checkpoint._hashes(workdir / "2") == manifest
    assert len(manifest) > 3 and all(value.startswith("crc32c:") for value in manifest.values())


@pytest.mark.parametrize("harm", ["changed", "missing", "unsealed", "unfinished"])
def test_damage_falls_back_and_is_saved_again(workdir, gcs, harm, capsys):
    save(workdir, 2, 4)
    largest = max(gcs.names("runs/W/4/state"), key=lambda name: len(gcs.read(name)))
    if harm == "changed":
        gcs.write(largest, gcs.read(largest)[:-1] + b"?", {})
    elif harm == "missing":
        gcs.delete(largest, {})
    else:
        gcs.delete("runs/W/4/manifest.json", {})
    if harm == "unfinished":
        gcs.delete("runs/W/4/commit_success.txt", {})
    kept = {name: gcs.read(name) for name in gcs.names("runs/W/4/")}
    assert_newest(workdir, 2)
    if harm != "unfinished":  # it is set aside, as it is
        aside = f"runs/W/4.{'unfinished' if harm == 'unsealed' else 'damaged'}/"
        assert {name.replace("runs/W/4/", aside): data for name, data in kept.items()} == {
            name: gcs.read(name) for name in gcs.names(aside)
        }
    assert ("4 is damaged" in capsys.readouterr().err) == (harm != "unfinished")  # that one orbax passes over itself
    save(workdir, 4)
    assert_newest(workdir, 4)
    assert bool(gcs.names("runs/W/4.")) == (harm in ("changed", "missing"))


def test_a_copy_of_a_bucket_counts_here(workdir, gcs, tmp_path, capsys):
    save(workdir, 2, 4)
    for name in gcs.names("runs/W/"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gcs.read(name))
    assert_newest(tmp_path / "runs/W", 4)
    largest = max((tmp_path / "runs/W/4/state").rglob("*"), key=lambda path: path.stat().st_size)
    largest.unlink()
    assert_newest(tmp_path / "runs/W", 2)


# --- whole runs


def test_a_missing_bucket_ends_in_one_line(gcs, capsys):
    assert main(["report", "--workdir", "gs://elsewhere/W"]) == 2
    assert capsys.readouterr().err == (
        "nlae: --workdir gs://elsewhere/W: bucket elsewhere cannot be read (there is no such bucket)\n"
    )
    assert main(["explain", "--workdir", WORKDIR, "--text", "x"]) == 2
    assert "no config.json there" in capsys.readouterr().err


def assert_same(tiny_run, workdir):
    assert tiny_run.metrics(workdir) == tiny_run.metrics(tiny_run.workdir)
    assert read_json(workdir / "eval.json") == read_json(tiny_run.workdir / "eval.json")
    for name in ("samples/held_out.jsonl", "config.json", "protocol.json", "activations/meta.json"):
        assert read_text(workdir / name) == read_text(tiny_run.workdir / name)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_in_a_directory(tiny_run, workdir, gcs, tmp_path, capsys):
    assert main(tiny_run.arguments(WORKDIR)) == 0
    assert f"report: {WORKDIR}/report.html" in "".join(capsys.readouterr().out.split("\n"))
    assert_same(tiny_run, workdir)
    writes = [name for name, _ in gcs.uploads]
    checkpoints = sum(name.endswith("commit_success.txt") for name in writes)
    assert writes.count("runs/W/metrics.jsonl") <= checkpoints + 30  # not once for each of its rows
    assert writes.count("runs/W/activations/progress.json") <= 4
    assert not [name for name in gcs.names() if not name.startswith("runs/W/")]

    gcs.uploads.clear()
    texts = [NLA.from_workdir(place).explain_text("the of to in") for place in (WORKDIR, tiny_run.workdir)]
    assert texts[0] == texts[1]
    assert main(["export", "--workdir", WORKDIR, "--out", str(tmp_path / "pair"), "--datasets"]) == 0
    assert main(["export", "--workdir", str(tiny_run.workdir), "--out", str(tmp_path / "same"), "--datasets"]) == 0
    assert (tmp_path / "pair/av/model.safetensors").read_bytes() == (
        tmp_path / "same/av/model.safetensors"
    ).read_bytes()
    assert gcs.uploads == []

    capsys.readouterr()
    assert main([*tiny_run.arguments(WORKDIR, "eval"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_json(tiny_run.workdir / "eval.json")
    assert main(["report", "--workdir", WORKDIR]) == 0
    assert main(tiny_run.arguments(WORKDIR, lora__rank=4)) == 2
    assert "made with another config: lora.rank 0 -> 4 (checkpoints/encoder_sft/" in capsys.readouterr().err


# (name that is about to be written, how often it has been before)
KILLS = (
    ("activations/progress.json", 0),
    ("checkpoints/encoder_sft/8/state/", 1),
    ("checkpoints/encoder_sft/10/manifest.json", 0),
    ("metrics.jsonl", 1),
    ("checkpoints/rl/4/commit_success.txt", 0),
    ("eval.json", 0),
)


class Killer:
    """Kills a process when it begins to write a name for the `times + 1`st time, and takes nothing of it."""

    def __init__(self, name, times):
        self.name, self.left, self.process = f"runs/W/{name}", iter(range(times)), None

    def __call__(self, written):
        if written.startswith(self.name) and next(self.left, None) is None:
            self.process.kill()
            return 503
        return 0


@pytest.mark.slow
def test_killed_while_it_writes_to_a_bucket(tiny_run, workdir, gcs):
    """One run, killed at each point by the server that it writes to: each start gets to the next one."""
    for name, times in KILLS:
        gcs.refuse_upload = killer = Killer(name, times)
        killer.process = process = start(gcs, tiny_run.arguments(WORKDIR))
        _, shown = process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL, f"{name} was not reached: {shown}"
    gcs.refuse_upload = lambda name: 0
    process = start(gcs, tiny_run.arguments(WORKDIR))
    _, shown = process.communicate(timeout=600)
    assert process.returncode == 0, shown
    assert_same(tiny_run, workdir)


def start(gcs, arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "nlae_jax", *arguments],
        cwd=ROOT,
        env={**os.environ, **gcs.environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
