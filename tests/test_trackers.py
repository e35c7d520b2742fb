"""Copies of the metrics in trackers: the real TensorBoard files, and W&B without a network."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboardX.proto import event_pb2

from nlae_jax.cli import main
from nlae_jax.runtime.errors import UserError
from nlae_jax.train.trackers import tracker

pytest_plugins = ["tests.tiny_run"]


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    """What the event files of a directory hold, by name and step; what a purge takes back is left out."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(directory.glob("events*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log"):
                found = {name: {s: v for s, v in rows.items() if s < event.step} for name, rows in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_nothing_is_tracked_by_default(tmp_path):
    with tracker("", tmp_path, "rl", 0) as log:
        log(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_tensorboard_has_the_numbers_of_the_metrics(tmp_path, tiny_run):
    workdir = tmp_path / "W"
    assert main(tiny_run.arguments(workdir, track="tensorboard")) == 0
    for stage in ("encoder_sft", "decoder_sft", "rl"):
        logged = scalars(workdir / "tensorboard" / stage)
        for row in tiny_run.metrics(workdir):
            if row["stage"] == stage:
                values = {k: v for k, v in row.items() if isinstance(v, float) and k not in ("stage", "step")}
                assert {k: logged[f"{stage}/{k}"][row["step"]] for k in values} == pytest.approx(values, rel=1e-6)
    assert tiny_run.metrics(workdir) == tiny_run.metrics(tiny_run.workdir)


def test_a_resumed_stage_takes_back_what_came_after_its_checkpoint(tmp_path):
    with tracker("tensorboard", tmp_path, "rl", 0) as log:
        for step in range(1, 6):
            log(step, {"loss": float(step)})
    with tracker("tensorboard", tmp_path, "rl", 3) as log:
        log(4, {"loss": 40.0})
    assert scalars(tmp_path / "tensorboard" / "rl") == {"rl/loss": {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0}}


def test_wandb_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with tracker("wandb", tmp_path, "rl", 0) as log:
        log(1, {"loss": 1.0, "fve": 0.5})
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(("kind", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    with (
        pytest.raises(UserError, match=rf"track: {kind} needs {package}.*nlae_jax\[{kind}\]"),
        tracker(kind, tmp_path, "rl", 0),
    ):
        pass


def test_a_tracker_that_is_missing_is_noticed_before_anything_is_read(tmp_path, tiny_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(tiny_run.arguments(tmp_path / "W", "extract", track="tensorboard")) == 2
    assert "track: tensorboard needs tensorboardX" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "W/activations").exists()


def test_one_workdir_is_one_run_of_wandb_and_another_is_another(tmp_path, monkeypatch):
    """However it is named, and whatever others are called where they are."""
    begun = []

    class Run:
        define_metric = log = finish = lambda *_, **__: None

    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **settings: begun.append(settings["id"]) or Run())
    )
    for directory, workdir in (("a", Path("W")), ("a", tmp_path / "a/W"), ("b", Path("W"))):
        (tmp_path / directory).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / directory)
        with tracker("wandb", workdir, "rl", 0):
            pass
    first, again, other = begun
    assert first == again != other


def test_a_tracker_that_cannot_begin(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match="track: tensorboard cannot begin: "), tracker("tensorboard", tmp_path, "rl", 0):
        pass


def test_what_goes_wrong_later_is_said_once(tmp_path, capsys):
    with tracker("tensorboard", tmp_path, "rl", 0) as log:
        log(1, {"loss": "no number"})
        log(2, {"loss": 1.0})
    assert capsys.readouterr().err.count("track: tensorboard has failed") == 1


def test_an_unknown_tracker_is_refused(tmp_path, tiny_run, capsys):
    assert main(tiny_run.arguments(tmp_path / "W", track="mlflow")) == 2
    assert "track" in capsys.readouterr().err
