"""What a workdir says of how it was made: missing is never nothing to check, and the same place is the same place."""

import fcntl
import json
import os
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from nlae_jax.cli import main
from nlae_jax.config import Config, flatten, load_config, resolve
from nlae_jax.explore.sources import open_trained
from nlae_jax.run.workdir import check_trained_with, located, recorded
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import read_json
from nlae_jax.train.checkpoint import read_data

pytest_plugins = ["tests.tiny_run"]


@pytest.fixture
def workdir(tiny_run, tmp_path):
    """A copy of a finished run, to lose something."""
    return shutil.copytree(tiny_run.workdir, tmp_path / "W")


@pytest.fixture
def refused(capsys):
    """Runs a command and returns its complaint of one line."""

    def run(arguments):
        capsys.readouterr()
        assert main(arguments) == 2
        shown = capsys.readouterr().err.splitlines()
        assert shown[-1].startswith("nlae: ")
        return shown[-1]

    return run


def forget_what_checkpoints_say(workdir):
    """As checkpoints of older runs are: they hold no record of what they were made with."""
    for path in workdir.glob("checkpoints/*/*/data/metadata"):
        path.write_text(json.dumps({"iterator": json.loads(path.read_text())["iterator"]}))
        manifest = path.parents[1] / "manifest.json"
        manifest.write_text(json.dumps({name: "bytes:1" for name in json.loads(manifest.read_text())}))


# --- config.json


def test_config_that_is_missing_is_made_again_and_binds(tiny_run, workdir, refused, capsys):
    (workdir / "config.json").unlink()
    assert "seed 0 -> 5 (config.json was made with it)" in refused(tiny_run.arguments(workdir, seed=5))
    assert (workdir / "config.json").read_bytes() == (tiny_run.workdir / "config.json").read_bytes()
    (workdir / "config.json").unlink()
    assert main(tiny_run.arguments(workdir)) == 0
    assert "config.json is missing: made again, as the newest checkpoint has it" in capsys.readouterr().err
    for name in ("config.json", "eval.json"):
        assert (workdir / name).read_bytes() == (tiny_run.workdir / name).read_bytes()


@pytest.mark.parametrize("left", ["checkpoints", "activations", "protocol.json", "eval.json"])
@pytest.mark.parametrize("changed", [{}, {"seed": 5}])
def test_config_that_is_missing_and_recorded_nowhere_is_refused(tiny_run, workdir, refused, left, changed):
    forget_what_checkpoints_say(workdir)
    for path in list(workdir.iterdir()):
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    complaint = refused(tiny_run.arguments(workdir, **changed))
    assert f"{workdir / 'config.json'}: missing, but {left}" in complaint and "restore it" in complaint
    assert sorted(path.name for path in workdir.iterdir()) == sorted([".lock", left])


def test_a_directory_with_other_things_is_no_workdir_yet(tiny_run, tmp_path):
    (tmp_path / "W/samples").mkdir(parents=True)
    (tmp_path / "W/notes.txt").write_text("mine")
    (tmp_path / "W/report.html").write_text("of nothing yet")
    assert main(tiny_run.arguments(tmp_path / "W", "extract")) == 0


@pytest.mark.parametrize("command", ["explain", "export"])
def test_using_a_pair_whose_config_is_missing_is_refused(workdir, tmp_path, refused, command):
    (workdir / "config.json").unlink()
    more = {"explain": ["--text", "the"], "export": ["--out", str(tmp_path / "pair")]}[command]
    assert "no config.json there" in refused([command, "--workdir", str(workdir), *more])


def test_the_report_advises_to_restore_it(workdir):
    from nlae_jax.report.page import write_report

    (workdir / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: .*restore it") as error:
        write_report(workdir)
    assert "delete" not in str(error.value)


# --- what else says how the rest was made


def change_weights(directory):
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_identity_of_the_weights_that_is_missing(tiny_run, tmp_path, refused):
    workdir = tmp_path / "W"
    assert main(tiny_run.arguments(workdir, "extract")) == 0
    (workdir / "activations/subject.json").unlink()
    complaint = refused(tiny_run.arguments(workdir))
    assert "activations/subject.json: missing, but activations/rows.parquet was made with it" in complaint


@pytest.mark.parametrize("lost", ["activations", "activations/subject.json"])
def test_checkpoints_say_which_weights_they_are_of(tiny_run, workdir, tmp_path, refused, lost):
    """Also where whoever deletes the activations, as a complaint may advise, has other weights under the same name."""
    model = shutil.copytree(tiny_run.model, tmp_path / "model")
    path = workdir / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    change_weights(model)
    complaint = refused(tiny_run.arguments(workdir, subject__model=model))
    assert "subject" in complaint and ("weights" in complaint or "missing" in complaint)


def test_activations_are_made_again_as_they_were(tiny_run, workdir):
    shutil.rmtree(workdir / "activations")
    (workdir / "eval.json").unlink()
    assert main(tiny_run.arguments(workdir)) == 0
    for name in ("eval.json", "activations/meta.json", "activations/rows.parquet"):
        assert (workdir / name).read_bytes() == (tiny_run.workdir / name).read_bytes()


def test_activations_of_another_text_are_not_those_trained_on(tiny_run, workdir, tmp_path, refused):
    """What is held out now may have been learned from."""
    corpus = tmp_path / "texts.jsonl"
    lines = tiny_run.corpus.read_text().splitlines()
    shutil.rmtree(workdir / "activations")
    (workdir / "eval.json").unlink()
    config = json.loads((workdir / "config.json").read_text())
    config["corpus"]["path"] = str(corpus)
    (workdir / "config.json").write_text(json.dumps(config))
    corpus.write_text("\n".join(lines[:-2]) + "\n")
    complaint = refused(tiny_run.arguments(workdir, corpus__path=corpus))
    assert "other rows than" in complaint and "checkpoints was trained with" in complaint


def test_prompts_that_are_missing_are_those_trained_with(tiny_run, workdir, refused, capsys):
    (workdir / "protocol.json").unlink()
    assert main(tiny_run.arguments(workdir, "eval")) == 0
    assert "protocol.json is missing: made again" in capsys.readouterr().err
    assert read_json(workdir / "protocol.json") == read_json(tiny_run.workdir / "protocol.json")
    (workdir / "protocol.json").unlink()
    forget_what_checkpoints_say(workdir)
    complaint = refused(["explain", "--workdir", str(workdir), "--text", "the"])
    assert "protocol.json: missing, but checkpoints/" in complaint


def test_prompts_that_were_changed_are_not_those_trained_with(tiny_run, workdir, refused):
    """One token of the encoder's prompt, which no tokenizer can vouch for: templates print dates."""
    protocol = json.loads((workdir / "protocol.json").read_text())
    protocol["encoder_prefix"][0] += 1
    (workdir / "protocol.json").write_text(json.dumps(protocol))
    for arguments in (
        tiny_run.arguments(workdir, rl__num_steps=8),
        ["explain", "--workdir", str(workdir), "--text", "a"],
    ):
        complaint = refused(arguments)
        assert "protocol.json: other protocol than" in complaint and "was trained with" in complaint


def test_every_checkpoint_says_what_it_was_made_with(tiny_run):
    run = open_trained(tiny_run.workdir)
    for path in tiny_run.workdir.glob("checkpoints/*/[0-9]*"):
        record = read_data(path)["made_with"]
        role, is_warm_start = path.parent.name.removesuffix("_sft"), path.parent.name.endswith("_sft")
        assert (record.pop(f"{role} descriptions", None) is not None) == is_warm_start
        assert record == json.loads(json.dumps(run.made_with()))
        assert resolve_config(record["config"]) == load_config(tiny_run.workdir / "config.json")


def edit_config(workdir, **values):
    """As a hand does: fields named with `__` for the dot."""
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    for name, value in values.items():
        section, _, field = name.rpartition("__")
        config[section][field] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "value"), [("rl__reward", "neg_log_mse"), ("lora__alpha", 3.0), ("sft__decoder_learning_rate", 0.5)]
)
def test_a_config_edited_by_hand_is_not_what_checkpoints_were_trained_with(tiny_run, workdir, refused, name, value):
    edit_config(workdir, **{name: value})
    says = rf"{name.replace('__', '.')} .* -> {value!r} \(checkpoints/rl/6 was made with it\)"
    for arguments in (
        tiny_run.arguments(workdir, **{name: value}),
        ["explain", "--workdir", str(workdir), "--text", "a"],
    ):
        assert re.search(says, refused(arguments))
    assert "made with another config" in refused(tiny_run.arguments(workdir, "eval"))  # config.json has another value


def test_only_what_a_checkpoint_was_trained_with_binds_it(tiny_run, workdir):
    """RL's settings may change before RL, how often is saved at any time, and names where the content is the same."""
    free = {"eval.temperature": 0.5, "checkpoint.every_steps": 7, "rl.num_steps": 9, "corpus.path": "/moved.jsonl"}
    values = flatten(json.loads((workdir / "config.json").read_text()))
    check_trained_with(workdir, resolve(values | free))
    changed = resolve(values | free | {"rl.reward": "neg_log_mse"})
    with pytest.raises(UserError, match=r"rl\.reward 'neg_mse' -> 'neg_log_mse'"):
        check_trained_with(workdir, changed)
    shutil.rmtree(workdir / "checkpoints/rl")
    check_trained_with(workdir, changed)
    forget_what_checkpoints_say(workdir)
    check_trained_with(workdir, resolve(values | {"lora.alpha": 3.0}))


def test_descriptions_that_were_replaced_are_not_those_trained_on(tiny_run, workdir, refused):
    path = workdir / "activations/descriptions.parquet"
    former = path.read_bytes()
    table = pq.read_table(path)
    texts = [f"{text} indeed" for text in table["description"].to_pylist()]
    pq.write_table(table.set_column(1, "description", [texts]), path)
    for name in ("eval.json", "checkpoints/rl", "checkpoints/decoder_sft/6"):
        target = workdir / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    complaint = refused(tiny_run.arguments(workdir, "sft"))
    assert f"{path}: other decoder descriptions than {workdir / 'checkpoints'} was trained with" in complaint
    path.write_bytes(former)
    assert main(tiny_run.arguments(workdir, "sft")) == 0


def resolve_config(tree):
    from nlae_jax.config import flatten

    return resolve(flatten(tree))


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"made_with": 3}', "{}"])
def test_a_record_that_cannot_be_read_is_passed_over(tiny_run, workdir, content):
    newest = workdir / "checkpoints/rl/6/data/metadata"
    newest.write_text(content)
    assert recorded(workdir) == read_data(workdir / "checkpoints/rl/4")["made_with"]


# --- the same place under another name


@pytest.fixture
def project(tiny_run, tmp_path, monkeypatch):
    """A directory with a model and a corpus, where the command is given relative names."""
    shutil.copytree(tiny_run.model, tmp_path / "project/mine")
    shutil.copy(tiny_run.corpus, tmp_path / "project/texts.jsonl")
    (tmp_path / "project/sub").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def test_relative_names_are_kept_in_full(tiny_run, project, monkeypatch):
    named = {"subject__model": "mine", "corpus__path": "texts.jsonl"}
    assert main(tiny_run.arguments("W", "extract", **named)) == 0
    config = load_config(project / "W/config.json")
    assert (config.subject.model, config.corpus.path) == (str(project / "mine"), str(project / "texts.jsonl"))
    assert read_json(project / "W/activations/meta.json")["model"] == str(project / "mine")
    for directory, model, corpus in (
        ("sub", "../mine", "../texts.jsonl"),
        ("/", project / "mine", project / "texts.jsonl"),
        ("sub", "../sub/../mine", "./../texts.jsonl"),
    ):
        monkeypatch.chdir(project / directory)
        assert main(tiny_run.arguments(project / "W", "extract", subject__model=model, corpus__path=corpus)) == 0


def test_a_workdir_of_an_older_run_with_relative_names(tiny_run, project, monkeypatch, refused):
    named = {"subject__model": "mine", "corpus__path": "texts.jsonl"}
    assert main(tiny_run.arguments("W", "extract", **named)) == 0
    path = project / "W/config.json"
    config = json.loads(path.read_text())
    config["subject"]["model"], config["corpus"]["path"] = "mine", "texts.jsonl"
    path.write_text(json.dumps(config))
    assert main(tiny_run.arguments("W", "extract", **named)) == 0
    assert main(tiny_run.arguments("W", "extract", subject__model=project / "mine", corpus__path="texts.jsonl")) == 0
    shutil.copy("texts.jsonl", "others.jsonl")
    complaint = refused(tiny_run.arguments("W", "extract", subject__model="mine", corpus__path="others.jsonl"))
    assert "corpus.path" in complaint and "others.jsonl" in complaint


def test_a_model_that_has_moved_is_known_by_its_weights(tiny_run, project, refused):
    """And another one under any name is not."""
    assert main(tiny_run.arguments("W", "extract", subject__model="mine")) == 0
    shutil.move("mine", "moved")
    os.symlink("moved", "linked")
    for name in ("moved", "linked"):
        assert main(tiny_run.arguments("W", "extract", subject__model=name)) == 0
        assert load_config(project / "W/config.json").subject.model == str(project / name)
    change_weights(project / "moved")
    assert "made with other weights" in refused(tiny_run.arguments("W", "extract", subject__model="moved"))


def test_what_is_no_path_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "pypi:wheel").mkdir()
    for name in ("random:tiny", "pypi:wheel", "pypi:wheel==1", "elsewhere/name", "name", "../missing"):
        assert located(resolve({"subject.model": name})).subject.model == name
    assert located(resolve({"subject.model": "org/name"})).subject.model == str(tmp_path / "org/name")
    assert located(resolve({"corpus.path": "a/**/*.txt"})).corpus.path == str(tmp_path / "a/**/*.txt")
    assert located(resolve({"corpus.path": "gs://b/x.txt"})).corpus.path == "gs://b/x.txt"
    assert located(Config()) == Config()


def test_home_in_the_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    fields = {"subject.model": "~/mine", "corpus.path": "~/x.txt", "dataset.rl": "~/rl.parquet", "init.av": "~/mine"}
    config = located(resolve(fields))
    assert config.subject.model == config.init.av == str(tmp_path / "mine")
    assert (config.corpus.path, config.dataset.rl) == (str(tmp_path / "x.txt"), str(tmp_path / "rl.parquet"))


@pytest.mark.parametrize("field", ["subject.model", "init.ar", "corpus.path", "dataset.rl"])
def test_a_home_that_cannot_be_found_is_named_by_the_field(field):
    with pytest.raises(UserError, match=rf"config\.{field} ~nobody-of-this-name/x: the home directory of ~ cannot be"):
        located(resolve({field: "~nobody-of-this-name/x"}))


def test_the_workdir_may_be_in_the_home_directory(tiny_run, tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert main(tiny_run.arguments("~/w", "extract")) == 0
    assert not list(here.iterdir())
    assert {"config.json", "activations"} <= {path.name for path in (home / "w").iterdir()}
    assert (home / "w/activations/vectors/zarr.json").exists()
    assert main(["report", "--workdir", "~/w"]) == 0
    assert (home / "w/report.html").exists() and not list(here.iterdir())


# --- the lock


@pytest.mark.parametrize("number", [38, 37, 95, 22, 5])
def test_a_file_system_without_locks_is_warned_of(tiny_run, tmp_path, monkeypatch, capsys, number):
    """ENOSYS, ENOLCK, EOPNOTSUPP and others."""

    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    assert main(tiny_run.arguments(tmp_path / "W", "extract")) == 0
    assert f"W: cannot be locked ({os.strerror(number)}); start no second run there" in capsys.readouterr().err


def test_what_killed_runs_left_half_written_is_removed(tiny_run, workdir):
    names = [
        ".eval.json.0123.tmp",
        ".config.json.tmp",
        "activations/.meta.json.ab.tmp",
        "samples/.held_out.jsonl.c.tmp",
    ]
    names.append("checkpoints/rl/6/.manifest.json.d.tmp")
    for name in names:
        (workdir / name).write_text("half")
    assert main(tiny_run.arguments(workdir, "eval")) == 0
    assert not list(workdir.rglob(".*.tmp"))


# --- the scale that a dataset says


@pytest.fixture(scope="module")
def datasets(tiny_run, tmp_path_factory):
    """A run's activations as datasets that say no scale."""
    from nlae_jax.run.export import export_datasets

    out = tmp_path_factory.mktemp("datasets")
    export_datasets(open_trained(tiny_run.workdir), out)
    for name in ("av_sft", "ar_sft", "rl", "held_out"):
        with_scale(out, name)
    return out


def with_scale(directory, name, **scale):
    path = directory / f"{name}.parquet.nla_meta.yaml"
    content = yaml.safe_load(path.read_text())
    content.pop("injection_scale", None)
    content["extraction"].pop("injection_scale", None)
    content["extraction"] |= scale
    path.write_text(yaml.safe_dump(content))


def scale_of(tiny_run, workdir, directory, **settings):
    files = {f"dataset__{name}": directory / f"{name}.parquet" for name in ("av_sft", "ar_sft", "rl", "held_out")}
    arguments = tiny_run.arguments(workdir, "extract", **files, corpus__path="", **settings)
    assert main(arguments) == 0
    return open_trained(workdir).protocol.injection_scale


@pytest.mark.parametrize("names", [["rl"], ["av_sft"], ["held_out"], ["av_sft", "ar_sft", "rl", "held_out"]])
@pytest.mark.parametrize(("said", "means"), [(None, 0.0), (150.0, 150.0), ("sqrt_d_model", 8.0)])
def test_a_scale_of_a_dataset_is_what_it_says(tiny_run, datasets, tmp_path, names, said, means):
    """null is raw, whichever of the files says it."""
    out = shutil.copytree(datasets, tmp_path / "datasets")
    for name in names:
        with_scale(out, name, injection_scale=said)
    assert scale_of(tiny_run, tmp_path / "W", out) == means


def test_a_scale_that_no_file_says_is_taken_from_the_activations(tiny_run, datasets, tmp_path):
    vectors = np.stack(pq.read_table(datasets / "rl.parquet")["activation_vector"].to_numpy())
    scale = scale_of(tiny_run, tmp_path / "W", datasets)
    assert scale == read_json(tmp_path / "W/activations/meta.json")["norm_p75"] > np.linalg.norm(vectors, axis=1).min()


def test_the_configs_scale_goes_before_the_datasets(tiny_run, datasets, tmp_path):
    out = shutil.copytree(datasets, tmp_path / "datasets")
    with_scale(out, "rl", injection_scale=None)
    assert scale_of(tiny_run, tmp_path / "W", out, protocol__injection_scale=3.0) == 3.0


def test_files_that_say_different_scales_are_refused(tiny_run, datasets, tmp_path, refused):
    out = shutil.copytree(datasets, tmp_path / "datasets")
    with_scale(out, "rl", injection_scale=None)
    with_scale(out, "av_sft", injection_scale=150.0)
    files = {f"dataset__{name}": out / f"{name}.parquet" for name in ("av_sft", "ar_sft", "rl")}
    complaint = refused(tiny_run.arguments(tmp_path / "W", "extract", **files, corpus__path=""))
    assert "extraction.injection_scale is" in complaint and "150.0" in complaint and "None" in complaint


def test_datasets_that_have_moved_are_known_by_their_content(tiny_run, datasets, tmp_path, refused):
    out = shutil.copytree(datasets, tmp_path / "datasets")
    scale_of(tiny_run, tmp_path / "W", out)
    shutil.move(out, tmp_path / "moved")
    scale_of(tiny_run, tmp_path / "W", tmp_path / "moved")
    table = pq.read_table(tmp_path / "moved/held_out.parquet")
    pq.write_table(table.slice(0, len(table) - 1), tmp_path / "moved/held_out.parquet")
    files = {f"dataset__{name}": tmp_path / f"moved/{name}.parquet" for name in ("av_sft", "ar_sft", "rl", "held_out")}
    files["dataset__held_out"] = shutil.move(tmp_path / "moved/held_out.parquet", tmp_path / "moved/other.parquet")
    shutil.copy(tmp_path / "moved/held_out.parquet.nla_meta.yaml", tmp_path / "moved/other.parquet.nla_meta.yaml")
    complaint = refused(tiny_run.arguments(tmp_path / "W", "extract", **files, corpus__path=""))
    assert "dataset.held_out" in complaint
