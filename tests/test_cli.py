"""The command line: whatever a user gets wrong ends in one line that names it and code 2, with nothing half-written."""

import contextlib
import dataclasses
import fcntl
import gzip
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from nlae_jax import cli
from nlae_jax.cli import main, texts
from nlae_jax.cli.command import start_jax
from nlae_jax.data.activations import open_vectors
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.run import stages
from nlae_jax.runtime.errors import UserError

pytest_plugins = ["tests.tiny_run"]

ROOT = Path(__file__).parent.parent


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "W"


@pytest.fixture
def refused(capsys):
    """Runs the command and returns its complaint: one line, after at most lines that say what was being done."""

    def run(arguments, doing=()):
        capsys.readouterr()
        assert main(arguments) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        *before, last = shown.err.splitlines()
        assert [line.split("  ")[0] for line in before] == list(doing)
        assert last.startswith("nlae: ")
        return last.removeprefix("nlae: ")

    return run


def untouched(workdir):
    """Whether a failed run has left nothing that a corrected one could trip over."""
    return not workdir.exists() or [path.name for path in workdir.iterdir()] in ([], [".lock"])


# --- configuration


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rl.num_stepz=5", "config.rl.num_stepz: no such field; did you mean rl.num_steps?"),
        ("seed=many", "config.seed: 'many' should be of type int"),
        ("rl.kl_coef=-1", "config.rl.kl_coef"),
        ("rl.reward=cos", "config.rl.reward"),
        ("subject.layer=2", "config.subject.layer: 2 should be from 0 to 1"),
        ("lora.experts=True", "config.lora.experts: the model (llama) has no experts"),
        ("subject.layer=-1", "config.subject.layer"),
        ("subject.model=/no/such/place", "/no/such/place"),
        ("mesh.data=3", "mesh"),
        ("mesh.data=16", "mesh"),
        ("mesh.tensor=0", "mesh"),
        ("protocol.encoder_prompt=no slot", "protocol.encoder_prompt"),
        ("protocol.decoder_prompt=no place", "protocol.decoder_prompt"),
    ],
)
def test_bad_config(tiny_run, workdir, refused, override, named):
    arguments = [*tiny_run.arguments(workdir), f"--config.{override}"]
    if override == "mesh.data=3":  # fits eight devices, but not with what is left over
        arguments.append("--config.mesh.fsdp=-1")
    assert named in refused(arguments)
    assert untouched(workdir)


def test_batch_that_the_mesh_does_not_divide(tiny_run, workdir, refused):
    arguments = tiny_run.arguments(workdir, mesh__data=4, sft__batch_size=6)
    assert refused(arguments).startswith("config.sft.batch_size: 6")
    arguments = tiny_run.arguments(workdir, mesh__data=4, rl__microbatches=4)
    assert refused(arguments).startswith("config.rl.microbatches: 4 leave 1 of rl.activations_per_step")
    assert untouched(workdir)


def test_experiment_file(tmp_path, workdir, refused):
    arguments = ["train", "--workdir", str(workdir), "--config"]
    assert str(tmp_path / "no.py") in refused([*arguments, str(tmp_path / "no.py")])
    (tmp_path / "bad.py").write_text("def get_config():\n    raise RuntimeError('not\\ntoday')\n")
    assert "RuntimeError: not" in refused([*arguments, str(tmp_path / "bad.py")])
    assert untouched(workdir)


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["train", "--config", "x.py"], ["fly"], ["explain", "--workdir", "W"]]
)
def test_incomplete_commands(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("nlae")


# --- the model's directory


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def no_weights(model):
    (model / "model.safetensors").unlink()
    return "model.safetensors"


def missing_shard(model):
    tensors = load_file(model / "model.safetensors")
    shards = {"model-1-of-2.safetensors": {}, "model-2-of-2.safetensors": {}}
    for number, (name, tensor) in enumerate(tensors.items()):
        list(shards.values())[number % 2][name] = tensor
    for name, shard in shards.items():
        save_file(shard, model / name)
    weight_map = {tensor: name for name, shard in shards.items() for tensor in shard}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (model / "model.safetensors").unlink()
    (model / "model-2-of-2.safetensors").unlink()
    return "model-2-of-2.safetensors"


def wrong_shape(model):
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:-1].copy()}, model / "model.safetensors")
    return name


def missing_tensor(model):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")
    return "model.norm.weight"


def truncated_weights(model):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    return "model.safetensors"


def unsupported_architecture(model):
    edit_json(model / "config.json", model_type="mamba")
    return "model_type 'mamba'"


def unsupported_variant(model):
    edit_json(model / "config.json", hidden_act="relu")
    return "hidden_act"


def config_not_json(model):
    (model / "config.json").write_text("{")
    return "config.json"


def no_config(model):
    (model / "config.json").unlink()
    return "config.json"


def no_tokenizer(model):
    (model / "tokenizer.json").unlink()
    return "tokenizer"


BEFORE_WEIGHTS = [
    unsupported_architecture,
    unsupported_variant,
    config_not_json,
    no_config,
    no_tokenizer,
    no_weights,
    missing_shard,
]
IN_WEIGHTS = [wrong_shape, missing_tensor, truncated_weights]


@pytest.mark.parametrize("damage", [*BEFORE_WEIGHTS, *IN_WEIGHTS])
def test_bad_model_directory(tiny_run, tmp_path, workdir, refused, damage):
    shutil.copytree(tiny_run.model, tmp_path / "model")
    named = damage(tmp_path / "model")
    arguments = tiny_run.arguments(workdir, subject__model=tmp_path / "model")
    assert named in refused(arguments, ["reading the corpus"] if damage in IN_WEIGHTS else [])
    assert untouched(workdir)


# --- the corpus

LINE = json.dumps({"text": "the of to in " * 20})


def empty(directory):
    (directory / "c.jsonl").write_text("")
    return "c.jsonl", "c.jsonl: the file is empty"


def empty_text(directory):
    (directory / "c.txt").write_text("\n \n")
    return "c.txt", "c.txt: the file is empty"


def not_utf8(directory):
    (directory / "c.jsonl").write_bytes(LINE.encode() + b'\n{"text": "caf\xe9"}\n')
    return "c.jsonl", f"c.jsonl: byte {len(LINE) + 14} is not valid UTF-8"


def not_json(directory):
    (directory / "c.jsonl").write_text(LINE + "\n{text}\n")
    return "c.jsonl", "c.jsonl:2: not valid JSON"


def without_field(directory):
    (directory / "c.jsonl").write_text('{"body": "x"}\n')
    return "c.jsonl", "'body'"


def no_such_file(directory):
    return "c.jsonl", "matches no file"


def no_match(directory):
    return "*.jsonl", "matches no file"


def a_directory(directory):
    return "", "is a directory"


def unknown_ending(directory):
    (directory / "c.pdf").write_text("x")
    return "c.pdf", "c.pdf"


def gone(directory):
    (directory / "c.jsonl").symlink_to(directory / "nowhere")
    return "*.jsonl", "c.jsonl: cannot be read"


def truncated_gzip(directory):
    data = gzip.compress((LINE * 50).encode())
    (directory / "c.jsonl.gz").write_bytes(data[: len(data) // 2])
    return "c.jsonl.gz", "c.jsonl.gz: cannot be read"


def parquet_without_column(directory):
    pq.write_table(pa.table({"body": ["x"]}), directory / "c.parquet")
    return "c.parquet", "no column 'text'"


def not_parquet(directory):
    (directory / "c.parquet").write_bytes(b"PAR1 no PAR1")
    return "c.parquet", "c.parquet: cannot be read"


def too_short(directory):
    (directory / "c.jsonl").write_text('{"text": "short"}\n')
    return "c.jsonl", "corpus.min_characters"


def too_few_tokens(directory):
    (directory / "c.jsonl").write_text(json.dumps({"text": "a" * 3 + " " * 30}) + "\n" + LINE + "\n")
    return "c.jsonl", "extract.min_position"


CORPORA = [
    empty,
    empty_text,
    not_utf8,
    not_json,
    without_field,
    no_such_file,
    no_match,
    a_directory,
    unknown_ending,
    gone,
    truncated_gzip,
    parquet_without_column,
    not_parquet,
    too_short,
    too_few_tokens,
]


@pytest.mark.parametrize("make", CORPORA)
def test_bad_corpus(tiny_run, tmp_path, workdir, refused, make):
    name, named = make(tmp_path)
    complaint = refused(tiny_run.arguments(workdir, corpus__path=tmp_path / name), ["reading the corpus"])
    assert named in complaint
    assert untouched(workdir)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_corpus_that_may_not_be_read(tiny_run, tmp_path, workdir, refused):
    (tmp_path / "c.jsonl").write_text(LINE)
    (tmp_path / "c.jsonl").chmod(0)
    complaint = refused(tiny_run.arguments(workdir, corpus__path=tmp_path / "c.jsonl"), ["reading the corpus"])
    assert "c.jsonl: cannot be read" in complaint


def test_a_corrected_command_works_in_the_same_workdir(tiny_run, tmp_path, workdir, refused):
    wrong = tiny_run.arguments(workdir, "extract", corpus__path=tmp_path / "tpyo.jsonl")
    assert "tpyo.jsonl" in refused(wrong, ["reading the corpus"])
    assert main(tiny_run.arguments(workdir, "extract")) == 0
    assert (workdir / "activations/meta.json").exists()


# --- the workdir


def contents(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 5}, "seed 0 -> 5 (config.json was made with it)"),
        ({"rl__num_steps": 5}, "rl.num_steps 6 -> 5 (checkpoints/rl/"),
        ({"eval__temperature": 0.5}, "eval.temperature 1.0 -> 0.5 (eval.json was made with it)"),
        ({"lora__rank": 4, "sft__encoder_steps": 61}, "sft.encoder_steps 60 -> 61 (checkpoints/encoder_sft/"),
        ({"describe__model": "other"}, "describe.model '' -> 'other'"),
    ],
)
def test_workdir_of_another_config(tiny_run, refused, changed, named):
    before = contents(tiny_run.workdir)
    complaint = refused(tiny_run.arguments(tiny_run.workdir, **changed))
    assert str(tiny_run.workdir) in complaint
    assert named in complaint
    assert contents(tiny_run.workdir) == before


def test_what_has_gone_into_nothing_yet_can_be_put_right(tiny_run, tmp_path, capsys):
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "W")
    shutil.rmtree(workdir / "checkpoints/rl")
    (workdir / "eval.json").unlink()
    changed = {"rl__kl_coef": 0.5, "rl__num_steps": 2, "eval__temperature": 0.5}
    assert main(tiny_run.arguments(workdir, "sft", **changed)) == 0
    written = json.loads((workdir / "config.json").read_text())
    assert (written["rl"]["kl_coef"], written["rl"]["num_steps"], written["eval"]["temperature"]) == (0.5, 2, 0.5)


def test_rl_can_go_on_for_more_steps(tiny_run, tmp_path, capsys):
    """And ends as if it had been meant to from the beginning; the evaluation is made again."""
    workdir, longer = shutil.copytree(tiny_run.workdir, tmp_path / "W"), {"rl__num_steps": 8}
    assert main(tiny_run.arguments(workdir, **longer)) == 0
    assert "the evaluation will be made again" in capsys.readouterr().err
    rows = tiny_run.metrics(workdir)
    assert [row for row in rows if row["step"] <= 6 or row["stage"] != "rl"] == tiny_run.metrics(tiny_run.workdir)
    assert max(row["step"] for row in rows if row["stage"] == "rl") == 8
    assert (workdir / "eval.json").read_bytes() != (tiny_run.workdir / "eval.json").read_bytes()
    assert main(tiny_run.arguments(workdir, **longer)) == 0


def test_settings_bind_what_comes_after_a_stage_of_no_steps(tiny_run, tmp_path, refused):
    """Without encoder SFT the decoder is the first that is made with lora and optimizer."""
    workdir, none = tmp_path / "W", {"sft__encoder_steps": 0, "lora__rank": 2, "rl__num_steps": 0}
    assert main(tiny_run.arguments(workdir, "sft", **none)) == 0
    assert "lora.alpha 16.0 -> 32.0 (checkpoints/decoder_sft/" in refused(
        tiny_run.arguments(workdir, lora__alpha=32.0, **none)
    )
    assert "sft.encoder_steps 0 -> 60 (checkpoints/decoder_sft/" in refused(
        tiny_run.arguments(workdir, **none | {"sft__encoder_steps": 60})
    )


def test_a_slip_in_the_number_of_rl_steps_can_be_taken_back(tiny_run, tmp_path):
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "W")
    assert main(tiny_run.arguments(workdir, "extract", rl__num_steps=6000)) == 0
    assert main(tiny_run.arguments(workdir)) == 0
    assert (workdir / "eval.json").read_bytes() == (tiny_run.workdir / "eval.json").read_bytes()
    assert tiny_run.metrics(workdir) == tiny_run.metrics(tiny_run.workdir)


def test_other_weights_under_the_same_name(tiny_run, tmp_path, refused):
    model = shutil.copytree(tiny_run.model, tmp_path / "model")
    workdir = tmp_path / "W"
    assert main(tiny_run.arguments(workdir, "extract", subject__model=model)) == 0
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    complaint = refused(tiny_run.arguments(workdir, subject__model=model))
    assert str(workdir / "activations/subject.json") in complaint


def test_report_of_what_is_there_so_far(tiny_run, workdir, capsys):
    shutil.copytree(tiny_run.workdir, workdir)
    shutil.rmtree(workdir / "checkpoints")
    for name in ("metrics.jsonl", "eval.json"):
        (workdir / name).unlink()
    with (workdir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as a run that goes on meanwhile holds it
        assert main(["report", "--workdir", str(workdir)]) == 0
    assert "Not there yet" in (workdir / "report.html").read_text()
    assert not (workdir / "checkpoints").exists()


def test_how_a_run_is_computed_may_change(tiny_run, tmp_path):
    workdir = tmp_path / "W"
    shutil.copytree(tiny_run.workdir, workdir)
    arguments = tiny_run.arguments(workdir, "eval", mesh__data=2, remat="none", checkpoint__every_steps=3)
    assert main(arguments) == 0
    written = json.loads((workdir / "config.json").read_text())
    assert (written["mesh"]["data"], written["remat"]) == (2, "none")  # config.json is the last run's


def test_workdir_that_is_a_file(tiny_run, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refused(tiny_run.arguments(tmp_path / "file"))
    assert str(tmp_path / "file") in refused(tiny_run.arguments(tmp_path / "file/below"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sede": 1}'])
def test_damaged_config_json(tiny_run, workdir, refused, text):
    workdir.mkdir()
    (workdir / "config.json").write_text(text)
    assert str(workdir / "config.json") in refused(tiny_run.arguments(workdir))
    assert (workdir / "config.json").read_text() == text


@pytest.mark.parametrize("name", ["documents.parquet", "rows.parquet", "descriptions.parquet", "meta.json"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_damaged_file_of_the_activations(tiny_run, tmp_path, refused, name, keep):
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "W")
    shutil.rmtree(workdir / "checkpoints")
    path = workdir / "activations" / name
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    before = contents(workdir)
    assert str(path) in refused(tiny_run.arguments(workdir, "sft"))
    assert contents(workdir) == before


def shard_missing(vectors):
    next(path for path in (vectors / "c").rglob("*") if path.is_file()).unlink()


def bit_flipped(vectors):
    path = next(path for path in (vectors / "c").rglob("*") if path.is_file())
    data = bytearray(path.read_bytes())
    data[5::50] = [byte ^ 1 for byte in data[5::50]]  # in every row
    path.write_bytes(bytes(data))


def nan(vectors):
    rows = json.loads((vectors.parent / "meta.json").read_text())["num_activations"]
    open_vectors(vectors.parent, rows, 64).write(np.nan).result()


@pytest.mark.parametrize("damage", [shard_missing, bit_flipped, nan])
@pytest.mark.parametrize("stage", ["sft", "rl", "eval"])
def test_damaged_activations_end_every_stage(tiny_run, tmp_path, refused, damage, stage):
    """Wherever they are read, in threads too: nothing is trained on them."""
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "W")
    (workdir / "eval.json").unlink()
    for name in {"sft": ["encoder_sft", "decoder_sft", "rl"], "rl": ["rl"], "eval": []}[stage]:
        shutil.rmtree(workdir / "checkpoints" / name)
    damage(workdir / "activations/vectors")
    before = contents(workdir)
    complaint = refused(tiny_run.arguments(workdir, stage))
    assert complaint.startswith(f"{workdir / 'activations/vectors'}: ") and "restore it, or delete" in complaint
    changed = {path.name for path, data in contents(workdir).items() if before.get(path) != data}
    assert changed <= {"metrics.jsonl"}  # whose rows of the stage are taken back


def test_workdir_in_use(tiny_run, workdir, refused):
    workdir.mkdir()
    with (workdir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another nlae process" in refused(tiny_run.arguments(workdir))
    assert untouched(workdir)


# --- no space


@contextlib.contextmanager
def disk_of(kilobytes, directory):
    """A file system of its own at `directory`; the test is skipped where none can be mounted."""
    directory.mkdir()
    options = f"size={kilobytes}k,mode=0777"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def enlarge(directory, kilobytes=100_000):
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(directory)], check=True)


def test_no_space_left(tiny_run, tmp_path, capsys):
    disk = tmp_path / "disk"
    with disk_of(12, disk):
        arguments = tiny_run.arguments(disk / "W", "extract")
        assert main(arguments) == 2
        complaint = capsys.readouterr().err.splitlines()[-1]
        assert complaint == f"nlae: {disk / 'W'}: no space left; free some and run the same command again"
        enlarge(disk)
        assert main(arguments) == 0
        for name in ("documents.parquet", "rows.parquet", "meta.json"):
            expected = (tiny_run.workdir / "activations" / name).read_bytes()
            assert (disk / "W/activations" / name).read_bytes() == expected


@pytest.mark.slow
def test_no_space_for_checkpoints(tiny_run, tmp_path, capfd):
    """Stopped by a full disk in one stage after another, each time with one line, and it ends as if never stopped."""
    disk = tmp_path / "disk"
    with disk_of(500, disk):
        arguments = tiny_run.arguments(disk / "W")
        stages = []
        for kilobytes in (4_000, 6_000, 9_500, 100_000):
            assert main(arguments) == 2
            complaint = capfd.readouterr().err
            assert (
                complaint.splitlines()[-1]
                == f"nlae: {disk / 'W'}: no space left; free some and run the same command again"
            )
            assert "Traceback" not in complaint
            stages.append(sum(1 for _ in (disk / "W/checkpoints").iterdir()))
            enlarge(disk, kilobytes)
        assert stages == [1, 1, 2, 3]
        assert main(arguments) == 0
        assert tiny_run.metrics(disk / "W") == tiny_run.metrics(tiny_run.workdir)
        assert (disk / "W/eval.json").read_bytes() == (tiny_run.workdir / "eval.json").read_bytes()


# --- providers

KEY = "sk-test-not-to-be-shown"


class Server(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible server that behaves as `mode` says."""

    mode = "good"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        mode = self.server.mode
        if mode == "slow":
            time.sleep(1)
        text = "<explanation>It counts small words, and the last one is short.</explanation>"
        bodies = {"good": json.dumps({"choices": [{"message": {"content": text}}]}), "no tags": '{"choices": []}'}
        body = bodies.get(mode, "<html>\n\x00 garbage").encode()
        with contextlib.suppress(OSError):  # the client has given up
            self.send_response({"key": 401, "broken": 500, "model": 404}.get(mode, 200))
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def extracted(tiny_run, tmp_path_factory):
    """A workdir whose descriptions are to come from a server."""
    workdir = tmp_path_factory.mktemp("served") / "W"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        arguments = tiny_run.arguments(workdir, "extract", describe__provider="openai", describe__model="m")
        assert main(arguments) == 0
    return workdir


@pytest.fixture
def described(tiny_run, extracted, tmp_path, server, monkeypatch):
    """(workdir, command) of describing with `server`."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    workdir = tmp_path / "W"
    shutil.copytree(extracted, workdir)
    settings = {
        "describe__provider": "openai",
        "describe__model": tmp_path.parent.name + tmp_path.name,  # answers are kept for every run that asks this model
        "describe__base_url": f"http://127.0.0.1:{server.server_port}/v1",
        "describe__max_retries": 0,
        "describe__timeout_seconds": 0.3,
    }
    return workdir, tiny_run.arguments(workdir, "describe", **settings)


@pytest.mark.parametrize(
    ("mode", "named"),
    [
        ("garbage", "no JSON"),
        ("no tags", "without text"),
        ("broken", "status 500"),
        ("slow", "timeouts"),
        ("key", "OPENAI_API_KEY"),
        ("model", "check describe.base_url and describe.model"),
    ],
)
def test_provider_that_fails(described, server, capsys, mode, named):
    workdir, arguments = described
    before = contents(workdir / "activations")
    server.mode = mode
    assert main(arguments) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("nlae: describe.provider openai: ")
    assert named in complaint
    assert KEY not in complaint
    assert contents(workdir / "activations") == before
    server.mode = "good"
    assert main(arguments) == 0  # nothing was lost, and the same command goes on
    lines = pq.read_table(workdir / "activations/descriptions.parquet")["description"].to_pylist()
    assert set(lines) == {"It counts small words, and the last one is short."}


def test_wrong_name_of_the_providers_model_can_be_put_right(described, server, capsys):
    """Extraction is not lost: nothing has been computed with that name."""
    workdir, arguments = described
    server.mode = "model"
    assert main(arguments) == 2
    server.mode = "good"
    assert main([*arguments, "--config.describe.model=n"]) == 0
    assert json.loads((workdir / "config.json").read_text())["describe"]["model"] == "n"


def test_provider_without_key(workdir, tiny_run, monkeypatch, refused):
    """Said before the work that the provider is needed after."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    arguments = tiny_run.arguments(workdir, describe__provider="openai", describe__model="m")
    assert "OPENAI_API_KEY is not set" in refused(arguments)
    assert untouched(workdir)


def test_explain_while_the_descriptions_are_missing(extracted, refused, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    complaint = refused(["explain", "--workdir", str(extracted), "--text", "the"])
    assert "encoder_sft is not finished" in complaint


# --- explain


def explain(tiny_run, *arguments):
    return ["explain", "--workdir", str(tiny_run.workdir), *arguments]


def test_explain_json(tiny_run, capsys, tokenizer):
    text = "the of to in is"
    capsys.readouterr()
    assert main(explain(tiny_run, "--text", text, "--json")) == 0
    shown = capsys.readouterr()
    tokens = json.loads(shown.out)["tokens"]
    assert [token["position"] for token in tokens] == list(range(len(tokenizer.encode(text))))
    assert "".join(token["token"] for token in tokens) == text
    for token in tokens:
        assert token.keys() == {
            *("position", "token", "explanation", "cos", "mse", "relative_mse", "norm", "outside", "cut", "repeated")
        }
        assert (token["outside"] == "position 0") == (token["position"] == 0) or token["outside"] == "norm"
        assert token["mse"] == pytest.approx(2 * (1 - token["cos"]))
        assert np.isfinite(token["mse"])
    assert any(token["explanation"] for token in tokens)


def test_explain_table_of_a_file(tiny_run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the of to", encoding="utf-8")
    before = contents(tiny_run.workdir)
    assert main(explain(tiny_run, "--file", str(tmp_path / "text.txt"))) == 0
    shown = capsys.readouterr().out
    assert "explanation" in shown
    assert "cos" in shown
    assert contents(tiny_run.workdir) == before  # looking changes nothing


def bad_file(directory):
    (directory / "t.txt").write_bytes(b"caf\xe9")
    return ["--file", str(directory / "t.txt")], "t.txt: not UTF-8 at byte 3"


def missing_text_file(directory):
    return ["--file", str(directory / "t.txt")], "t.txt: cannot be read"


def directory_as_file(directory):
    return ["--file", str(directory)], "cannot be read"


def empty_file(directory):
    (directory / "t.txt").write_text(" \n")
    return ["--file", str(directory / "t.txt")], "t.txt: empty"


def no_text(directory):
    return ["--text", ""], "--text: empty"


def cold(directory):
    return ["--text", "the", "--temperature", "-1"], "--temperature"


@pytest.mark.parametrize("make", [bad_file, missing_text_file, directory_as_file, empty_file, no_text, cold])
def test_explain_refuses(tiny_run, tmp_path, refused, make):
    arguments, named = make(tmp_path)
    assert named in refused(explain(tiny_run, *arguments))


def test_explain_without_a_run(tiny_run, tmp_path, refused):
    complaint = refused(["explain", "--workdir", str(tmp_path / "none"), "--text", "the"])
    assert str(tmp_path / "none") in complaint
    assert not (tmp_path / "none").exists()


def test_explain_takes_no_overrides(tiny_run, capsys):
    with pytest.raises(SystemExit) as caught:
        main(explain(tiny_run, "--text", "the", "--config.seed=1"))
    assert caught.value.code == 2
    assert "--config" in capsys.readouterr().err


# --- the rest


def test_eval_json(tiny_run, capsys):
    capsys.readouterr()
    assert main([*tiny_run.arguments(tiny_run.workdir, "eval"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tiny_run.workdir / "eval.json").read_text())


def test_debug_shows_the_traceback(tiny_run, workdir):
    arguments = [*tiny_run.arguments(workdir), "--config.rl.num_stepz=1"]
    with pytest.raises(UserError, match="num_stepz"):
        main([*arguments, "--debug"])


def test_the_process_itself(tiny_run, workdir):
    """One line and code 2 from the real command; a traceback only with --debug."""
    command = [sys.executable, "-m", "nlae_jax", *tiny_run.arguments(workdir), "--config.rl.num_stepz=1"]
    plain = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    debug = subprocess.run([*command, "--debug"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert plain.returncode == 2
    assert plain.stdout == ""
    assert plain.stderr == "nlae: config.rl.num_stepz: no such field; did you mean rl.num_steps?\n"
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr


# --- what follows when all is done


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """A workdir of its own, whose samples hold what splits lines elsewhere."""
    workdir = shutil.copytree(tiny_run.workdir, tmp_path_factory.mktemp("finished") / "W")
    path = workdir / "samples/held_out.jsonl"
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for sample, character in zip(samples, "\u2028\u2029\x85\x1c\x1d\x1e\x0b\x0c\r", strict=False):
        sample["explanation"] = sample["context"] = f"before{character}after é «[/b]» :smile:"
    path.write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples), encoding="utf-8", newline="")
    return workdir


def test_lines_end_where_the_writer_ended_them(tiny_run, finished, capsys):
    """Not at every character that Unicode calls a line break."""
    capsys.readouterr()
    assert main(tiny_run.arguments(finished)) == 0
    shown = capsys.readouterr()
    assert "held-out FVE after RL" in shown.out and "before" in shown.out and "warning" not in shown.err
    assert main(["report", "--workdir", str(finished)]) == 0


class Full(io.RawIOBase):
    """As /dev/full, or a pipe that nobody reads."""

    def __init__(self, number):
        self._number = number

    def writable(self):
        return True

    def write(self, data):
        raise OSError(self._number, os.strerror(self._number))


def stdout(kind):
    """A stdout of that kind and a function that gives what arrived there."""
    arrived = io.BytesIO()
    if kind == "none":
        return None, bytes
    if kind == "closed":
        stream = io.TextIOWrapper(arrived, encoding="utf-8")
        stream.close()
        return stream, bytes
    if kind in ("full", "broken"):
        stream = io.TextIOWrapper(io.BufferedWriter(Full({"full": 28, "broken": 32}[kind])), encoding="utf-8")
        return stream, bytes
    return io.TextIOWrapper(arrived, encoding=kind, errors="strict"), arrived.getvalue


ENCODINGS = ("ascii", "latin-1", "cp1252", "utf-16")
UNWRITABLE = ("none", "closed", "full", "broken")


@pytest.mark.parametrize("kind", [*ENCODINGS, *UNWRITABLE])
@pytest.mark.parametrize("command", ["train", "eval", "report"])
def test_what_cannot_be_printed_fails_no_run(tiny_run, finished, monkeypatch, capsys, kind, command):
    (finished / "report.html").unlink(missing_ok=True)
    arguments = ["report", "--workdir", str(finished)] if command == "report" else tiny_run.arguments(finished, command)
    stream, arrived = stdout(kind)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main([*arguments, "--json"] if command == "eval" else arguments) == 0
    if kind in ENCODINGS:
        text = arrived().decode(kind)
        assert {"train": "held-out FVE after RL", "eval": '"fve"', "report": "report.html"}[command] in text
    else:
        (warned,) = (line for line in capsys.readouterr().err.splitlines() if "stdout" in line)
        assert warned.startswith("warning: ") and str(finished) not in warned
    assert command == "eval" or (finished / "report.html").exists()


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_what_was_asked_for_and_cannot_be_printed_is_said(tiny_run, finished, monkeypatch, capsys, kind):
    """And not blamed on the workdir."""
    monkeypatch.setattr(sys, "stdout", stdout(kind)[0])
    assert main(["explain", "--workdir", str(finished), "--text", "the of", "--json"]) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("nlae: stdout: ") and str(finished) not in complaint


@pytest.mark.parametrize("kind", ["ascii", "latin-1"])
def test_json_is_whole_in_any_encoding(tiny_run, finished, monkeypatch, kind):
    stream, arrived = stdout(kind)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["explain", "--workdir", str(finished), "--text", "the é 中", "--json"]) == 0
    tokens = json.loads(arrived().decode("ascii"))["tokens"]
    assert "?" not in "".join(token["token"] for token in tokens)


@pytest.mark.parametrize(
    "name", ["x[/b]y", "[red]", "a:smile:b", "\x1b[31m", "é" * 3, "a b", "{x}%s", "[link=file:///etc/passwd]x"]
)
def test_any_name_of_a_workdir_is_printed_as_it_is(tiny_run, finished, tmp_path, capsys, name):
    workdir = shutil.copytree(finished, tmp_path / name)
    capsys.readouterr()
    assert main(tiny_run.arguments(workdir)) == 0
    shown = capsys.readouterr()
    assert "warning" not in shown.err
    assert workdir.name.replace("\x1b", "") in "".join(shown.out.replace("\x1b", "").split("\n"))


def lost_samples(workdir):
    (workdir / "samples/held_out.jsonl").unlink()


def lost_directory(workdir):
    shutil.rmtree(workdir / "samples")


def empty_evaluation(workdir):
    (workdir / "eval.json").write_text("{}")


def no_object(workdir):
    (workdir / "eval.json").write_text("[]")


def no_json(workdir):
    (workdir / "eval.json").write_text("{")


def other_fields(workdir):
    (workdir / "eval.json").write_text('{"num_activations": "many"}')


@pytest.mark.parametrize(
    "lose", [lost_samples, lost_directory, empty_evaluation, no_object, no_json, other_fields], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("command", ["train", pytest.param("eval", marks=pytest.mark.slow)])
def test_results_that_are_lost_are_made_again(tiny_run, tmp_path, capsys, lose, command):
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "W")
    lose(workdir)
    assert main(tiny_run.arguments(workdir, command)) == 0
    assert "made again" in capsys.readouterr().err
    for name in ("eval.json", "samples/held_out.jsonl"):
        assert (workdir / name).read_bytes() == (tiny_run.workdir / name).read_bytes()


@pytest.mark.parametrize(
    "text", ["[]\n" * 2, "{}\n", '{"explanation": 3, "cos": "x", "context": [1], "closed": null}\n']
)
def test_samples_that_cannot_be_shown_fail_no_run(tiny_run, tmp_path, text, capsys):
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "W")
    (workdir / "samples/held_out.jsonl").write_text(text)
    assert main(tiny_run.arguments(workdir)) == 0


def test_a_report_that_cannot_be_written_fails_no_run(tiny_run, tmp_path, capsys):
    workdir = shutil.copytree(tiny_run.workdir, tmp_path / "W")
    (workdir / "report.html").unlink()
    (workdir / "report.html").mkdir()
    assert main(tiny_run.arguments(workdir)) == 0
    shown = capsys.readouterr()
    assert "warning: no report: " in shown.err and "held-out FVE" in shown.out
    assert main(["report", "--workdir", str(workdir)]) == 2  # that was all that it was for


def test_activations_that_are_all_alike(tiny_run, tmp_path, monkeypatch, capsys):
    """Numbers that JSON lacks are null, and it is said."""
    from nlae_jax.run import preparation

    def alike(arch, config, mesh, num_next):
        read = original(arch, config, mesh, num_next)
        return lambda *batch: tuple(part * 0 for part in read(*batch))

    original = preparation.jitted_reader
    monkeypatch.setattr(preparation, "jitted_reader", alike)
    steps = {"sft__encoder_steps": 1, "sft__decoder_steps": 1, "rl__num_steps": 1}
    assert main(tiny_run.arguments(tmp_path / "W", **steps)) == 0
    shown = capsys.readouterr()
    assert "every activation is zero" in shown.err
    assert "warning: eval: no finite number, null in eval.json: fve, fve_ci95" in shown.err
    assert "held-out FVE after RL   unknown" in shown.out
    for name in ("eval.json", "activations/meta.json"):
        result = json.loads((tmp_path / "W" / name).read_text(), parse_constant=pytest.fail)
    for line in (tmp_path / "W/samples/held_out.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert result["norm_mean"] == 0


STREAMS = [
    (">&-", "stdout: it is closed"),
    ("> /dev/full", "stdout: No space left on device"),
    ("2>&-", ""),
    ("2> /dev/full", ""),
    (">&- 2>&- <&-", ""),
    ("> /dev/full 2> /dev/full", ""),
]


@pytest.mark.parametrize(("redirection", "named"), STREAMS)
def test_the_process_without_streams(finished, redirection, named):
    """Nothing is printed into whatever file happens to be opened in the place of a closed stream."""
    before = contents(finished)
    command = f'exec "$0" -m nlae_jax report --workdir "$1" {redirection}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, str(finished)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert named in done.stderr and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert {path: data for path, data in contents(finished).items() if path.name != "report.html"} == {
        path: data for path, data in before.items() if path.name != "report.html"
    }


# --- limits of the system


ENDED = "--- ended with code 2\n"
LIMITED = f"""
import resource, sys
from nlae_jax.cli import main
split = sys.argv.index("train")
for blocks in sys.argv[1:split]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (512 * int(blocks), resource.RLIM_INFINITY))
    assert main(sys.argv[split:]) == 2
    sys.stderr.write({ENDED!r})
    sys.stderr.flush()
"""


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(tiny_run, tmp_path):
    """`ulimit -f` for every stage, raised from one start to the next in one process; without it the command goes on."""
    arguments = tiny_run.arguments(tmp_path / "W", sft__encoder_steps=2, rl__num_steps=2)
    limits = [4, 40, 400]  # blocks of 512 bytes
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, limits), *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    *starts, rest = done.stderr.split(ENDED)
    assert len(starts) == len(limits) and not rest.strip()
    for shown in starts:
        assert shown.splitlines()[-1] == (
            f"nlae: {tmp_path / 'W'}: a file there would be larger than allowed (ulimit -f); raise that limit"
        )
    assert main(arguments) == 0


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(27, "File too large"), "larger than allowed (ulimit -f)"),
        (ValueError("OUT_OF_RANGE: Error writing: [OS error 27: EFBIG File too large]"), "larger than allowed"),
        (ValueError("RESOURCE_EXHAUSTED: Failed to open: [OS error 24: Too many open files]"), "too many open files"),
        (OSError(5, "Input/output error"), "input/output errors"),
        (OSError(116, "Stale file handle"), "stale file handle"),
        (ValueError("UNKNOWN: [OS error 107: ENOTCONN Transport endpoint is not connected]"), "file system is gone"),
        (ValueError("FAILED_PRECONDITION: Error: [OS error 30: EROFS Read-only file system]"), "read-only file system"),
        (ValueError("PERMISSION_DENIED: Error opening: [OS error 13: EACCES Permission denied]"), "permission denied"),
        (OSError(28, "No space left on device"), "no space left"),
        (OSError(28, "No space left on device", "/cache/model"), "/cache/model: no space left"),
        (MemoryError(), "out of memory"),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes"), "out of device memory"),
    ],
)
def test_errors_of_the_system_are_one_line(tiny_run, workdir, monkeypatch, refused, error, says):
    def fail(run):
        raise error

    monkeypatch.setitem(stages.STAGES, "extract", fail)
    assert says in refused(tiny_run.arguments(workdir))


# --- paths and texts of the command line


@pytest.mark.parametrize("name", ["", " ", "~nobody-of-this-name/W"])
@pytest.mark.parametrize("command", ["train", "report", "export"])
def test_a_workdir_that_is_none(tiny_run, tmp_path, monkeypatch, refused, name, command):
    monkeypatch.chdir(tmp_path)
    arguments = tiny_run.arguments(name) if command == "train" else [command, "--workdir", name]
    more = ["--out", "pair"] if command == "export" else []
    assert refused([*arguments, *more]).startswith("--workdir")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", " ", "~nobody-of-this-name/x"])
@pytest.mark.parametrize("option", ["--out", "--config", "--file"])
def test_a_path_that_is_none(tiny_run, tmp_path, monkeypatch, refused, name, option):
    monkeypatch.chdir(tmp_path)
    arguments = {
        "--out": ["export", "--workdir", str(tiny_run.workdir)],
        "--config": ["bench"],
        "--file": ["explain", "--workdir", str(tiny_run.workdir)],
    }[option]
    assert refused([*arguments, option, name]).startswith(option)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("option", ["--model", "--av"])
def test_a_home_that_is_nobodys(tiny_run, refused, option):
    """Of names that may be paths, too."""
    nobody = ["--model", "~nobody-of-this-name/x"]
    arguments = {
        "--model": nobody,
        "--av": ["--av", nobody[1], "--ar", "random:tiny"],
    }
    complaint = refused(["explain", *arguments[option], "--text", "the"])
    assert "~nobody-of-this-name/x: the home directory of ~ cannot be found" in complaint
    if option == "--model":
        assert "~nobody" in refused(
            ["adapt", "--model", "random:tiny", "--layer", "0", "--to", nobody[1], "--out", "o"]
        )


@pytest.mark.parametrize("command", ["explain", "steer", "direction", "compare"])
def test_where_a_page_goes_is_looked_at_first(tiny_run, tmp_path, monkeypatch, refused, command):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    os.mkfifo("pipe")
    more = {
        "explain": ["--text=the"],
        "steer": ["--text=the", "--edit=of"],
        "direction": ["d.npy"],
        "compare": ["--text=the", "--workdir=no/such/place"],
    }[command]
    for page in (".", "..", "pipe", "file/page.html"):
        complaint = refused([command, *more, "--workdir=no/such/place", f"--html={page}"])
        assert complaint.startswith(f"--html {page}: ")


@pytest.mark.parametrize(
    "command",
    [
        ["explain", "--input=t.jsonl", "--out=."],
        ["neuron", "--all=0", "--out=pipe.jsonl"],
        ["neuron", "--all=0", "--out=n.jsonl"],
    ],
)
def test_where_results_go_is_looked_at_first(tiny_run, tmp_path, monkeypatch, refused, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nlae_jax.api.NLA.from_workdir", None)
    os.mkfifo("pipe.jsonl")
    Path("n.html").mkdir()
    assert refused([*command, f"--workdir={tiny_run.workdir}"]).startswith("--out ")


def test_a_page_is_there_whatever_stdout_takes(tiny_run, finished, tmp_path, monkeypatch, capsys):
    page = tmp_path / "below" / "page.html"
    monkeypatch.setattr(sys, "stdout", stdout("full")[0])
    assert main(["explain", "--workdir", str(finished), "--text", "the of", "--html", str(page)]) == 2
    assert page.exists() and capsys.readouterr().err.splitlines()[-1].startswith("nlae: stdout: ")


@pytest.mark.parametrize("value", ["0", "-3"])
@pytest.mark.parametrize("command", ["explain", "serve"])
def test_no_tokens_are_no_explanation(capsys, command, value):
    """And not the run's own number of them."""
    text = ["--text=the"] if command == "explain" else []
    with pytest.raises(SystemExit):
        main([command, "--workdir=W", *text, f"--max-new-tokens={value}"])
    assert f"--max-new-tokens: {value} should be at least 1" in capsys.readouterr().err


def test_a_text_is_measured_before_it_is_gone_on_with(tiny_run, monkeypatch, refused):
    monkeypatch.setattr(LanguageModel, "generate", None)
    for text, tokens in (("the of " * 2000, 1), ("the", 10_000)):
        complaint = refused(["explain", "--workdir", str(tiny_run.workdir), "--text", text, f"--generate={tokens}"])
        assert f"and {tokens} are to follow; at most 2048 are explained at once" in complaint


def test_all_prompts_are_read_before_one_is_steered(tiny_run, tmp_path, monkeypatch, refused):
    monkeypatch.setattr("nlae_jax.explore.steer.steer", None)
    path = tmp_path / "p.jsonl"
    fine = {"text": "the of", "edit": "in"}
    for line, named in (
        ({**fine, "at": "9"}, "position 9 out of range"),
        ({**fine, "pattern": "("}, "not a regular expression"),
        ({**fine, "pattern": ""}, "--pattern: empty"),
        ({"text": "the " * 3000, "edit": "in"}, "at most 2048"),
    ):
        path.write_text("".join(json.dumps(one) + "\n" for one in (fine, line)))
        complaint = refused(["steer", "--workdir", str(tiny_run.workdir), "--input", str(path)])
        assert complaint.startswith(f"{path}:2: ") and named in complaint


@pytest.mark.parametrize("option", ["--placebo-model", "--placebo-workdir"])
@pytest.mark.parametrize("name", ["", "/no/such/place"])
def test_placebos_are_loaded_before_anything_is_explained(tiny_run, tmp_path, monkeypatch, refused, option, name):
    monkeypatch.setattr("nlae_jax.explore.audit.explained_passages", None)
    (tmp_path / "t.jsonl").write_text('{"text": "the of to"}\n')
    arguments = ["audit", "--workdir", str(tiny_run.workdir), "--input", str(tmp_path / "t.jsonl"), option, name]
    assert refused(arguments)


def test_home_in_every_path(tiny_run, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    (home / "texts").mkdir(parents=True)
    (home / "texts/t.txt").write_text("the of")
    shutil.copy(ROOT / "experiments/tiny.py", home / "tiny.py")
    shutil.copytree(tiny_run.workdir, home / "W")
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["explain", "--workdir=~/W", "--file=~/texts/t.txt", "--json"]) == 0
    assert main(["export", "--workdir=~/W", "--out=~/pair"]) == 0
    assert main(["explain", "--av=~/pair/av", "--ar=~/pair/ar", "--text=the", f"--subject={tiny_run.model}"]) == 0
    arguments = tiny_run.arguments("~/W", "extract")
    arguments[arguments.index("--config") + 1] = "~/tiny.py"
    assert main(arguments) == 0
    assert os.listdir() == [] and (home / "pair/av/config.json").exists()


def test_a_byte_order_mark_is_not_explained(tiny_run, tmp_path, capsys):
    text, found = "the of to", []
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "plain.txt").write_text(text)
    for source in (
        ["--file", str(tmp_path / "bom.txt")],
        ["--file", str(tmp_path / "plain.txt")],
        ["--text", "\ufeff" + text],
    ):
        capsys.readouterr()
        assert main(explain(tiny_run, *source, "--json")) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2]


def only_a_mark(directory):
    (directory / "t.txt").write_bytes(b"\xef\xbb\xbf")
    return directory / "t.txt", "t.txt: empty"


def without_end(directory):
    return Path("/dev/zero"), "/dev/zero: more than 16,777,216 bytes"


def nobody_writes(directory):
    os.mkfifo(directory / "t.txt")
    return directory / "t.txt", "t.txt: empty"


def utf16(directory):
    (directory / "t.txt").write_text("the", encoding="utf-16")
    return directory / "t.txt", "t.txt: not UTF-8 at byte 0"


@pytest.mark.parametrize("make", [only_a_mark, without_end, nobody_writes, utf16])
def test_files_that_hold_nothing_to_explain(tiny_run, tmp_path, refused, make):
    path, named = make(tmp_path)
    assert named in refused(explain(tiny_run, "--file", str(path)))


def test_a_pipe_can_be_explained(tmp_path):
    """As `--file <(command)` is one; and one whose writer says nothing has a limit."""
    os.mkfifo(tmp_path / "pipe")

    def write(*pieces):
        with (tmp_path / "pipe").open("wb", buffering=0) as pipe:
            for piece in pieces:
                time.sleep(0.01)
                pipe.write(piece)
            done.wait(60)

    done = threading.Event()
    holder = os.open(tmp_path / "pipe", os.O_RDWR)  # so that the writer is there before the reader
    thread = threading.Thread(target=write, args=("thé".encode()[:3], "thé".encode()[3:], b" of"))
    thread.start()
    found = []
    read = threading.Thread(target=lambda: found.append(texts.read_text(tmp_path / "pipe")))
    read.start()
    time.sleep(0.2)
    os.close(holder)
    done.set()
    read.join(60)
    thread.join(60)
    assert found == ["thé of"]


def test_a_pipe_that_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_SILENT_SECONDS", 0.05)
    os.mkfifo(tmp_path / "pipe")
    holder = os.open(tmp_path / "pipe", os.O_RDWR)
    with pytest.raises(UserError, match=r"pipe: nothing more came within 0 s"):
        texts.read_text(tmp_path / "pipe")
    os.close(holder)


def test_interrupted(tiny_run, workdir, monkeypatch, capsys):
    def interrupt(run):
        raise KeyboardInterrupt

    monkeypatch.setitem(stages.STAGES, "extract", interrupt)
    assert main(tiny_run.arguments(workdir)) == 130
    assert capsys.readouterr().err == "nlae: interrupted; the same command continues\n"


def test_our_own_mistakes_are_not_hidden(tiny_run, workdir, monkeypatch):
    def mistake(run):
        raise ZeroDivisionError

    monkeypatch.setitem(stages.STAGES, "extract", mistake)
    with pytest.raises(ZeroDivisionError):
        main(tiny_run.arguments(workdir))


def test_the_command_starts_itself_once_more_with_large_pages(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda *what: started.append(what))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "nlae_jax", "bench"])
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    cli._with_huge_pages()
    cli._with_huge_pages()
    assert started == [(sys.executable, [sys.executable, "-m", "nlae_jax", "bench"])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"


def test_float32_stays_float32_whatever_the_environment_says():
    jax.config.update("jax_enable_x64", True)
    try:
        start_jax()
        assert not jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Unable to initialize backend 'foo': it is not in the list of known backends: ['cpu']"),
        ValueError('Invalid value "nonsense" for JAX flag jax_default_matmul_precision'),
    ],
)
def test_settings_of_jax_that_cannot_be_are_one_line(capsys, monkeypatch, error):
    def run(*_):
        raise error

    report = next(command for command in cli.COMMANDS if command.name == "report")
    monkeypatch.setattr(cli, "COMMANDS", (dataclasses.replace(report, run=run),))
    assert main(["report", "--workdir", "w"]) == 2
    assert capsys.readouterr().err == f"nlae: JAX's settings in the environment: {error}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--file", "a.html", "--html", "a.html"], "--html a.html: is the file of --file too"),
        (["--chat", "a.json", "--html", "./a.json"], "--html a.json: is the file of --chat too"),
        (["--input", "a.jsonl", "--out", "a.jsonl"], "--out a.jsonl: is the file of --input too"),
    ],
)
def test_a_result_never_replaces_the_input(tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text("[]")
    assert main(["explain", "--model", "smollm2-135m", *arguments]) == 2
    assert named in capsys.readouterr().err and Path("a.json").read_text() == "[]"


@pytest.mark.parametrize("option", ["--file", "--chat", "--input", "--vectors"])
def test_a_link_to_itself_is_one_line(tmp_path, monkeypatch, capsys, option):
    monkeypatch.chdir(tmp_path)
    Path("circle.jsonl").symlink_to("circle.jsonl")
    more = ["--out", "out.jsonl"] if option == "--input" else []
    assert main(["explain", "--model", "smollm2-135m", option, "circle.jsonl", *more]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("nlae: ") and "circle.jsonl" in lines[-1]
