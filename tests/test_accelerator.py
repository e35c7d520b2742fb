"""What an accelerator is measured with: a dry run of all of it, and what becomes of parts that end badly."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nlae_jax.lm.families import read_arch
from tests.conftest import slow_but

ROOT = Path(__file__).parent.parent


def script(name):
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


accelerator, numerics = script("accelerator"), script("numerics")


@pytest.mark.slow
def test_a_dry_run_measures_everything(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    command = [ROOT / "benchmarks/accelerator.sh", "--dry-run", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "accelerator.json").read_text())
    names = ["CPU reference", "numerics", "bench SmolLM2-135M", "bench 1.5B", "quickstart RL"]
    assert list(report["parts"]) == names
    assert {part["status"] for part in report["parts"].values()} == {"done"}
    checks = report["parts"]["numerics"]["result"]["checks"]
    assert {row["dtype"] for row in checks} == {"float32", "bfloat16"} and all(row["passed"] for row in checks)
    assert {"logits", "residual 0", "RL grad_norm_encoder", "RL mse", "RL own gap"} <= {row["check"] for row in checks}
    kept = np.load(tmp_path / "cpu.npz")
    for name in ("reward_std", "grad_norm_encoder", "grad_norm_decoder", "extraction_rate"):  # zeros would be equal
        assert kept[f"random:tiny float32 RL {name}"] > 0, name
    assert {row["model"] for row in checks} == {"random:tiny", *numerics.MADE} == set(accelerator.RANDOM)
    assert not report["parts"]["numerics"]["result"]["left_out"]
    for name in names[2:4]:
        result = report["parts"][name]["result"]
        assert set(result["phases"]) == {"rollout", "policy"} and result["rollout_bandwidth_fraction"] > 0
        assert result["assumed"] == "random weights; no tokenizer"
    assert report["parts"]["quickstart RL"]["result"]["steps"] == 2
    table = (tmp_path / "accelerator.md").read_text()
    assert table == done.stdout == accelerator.table(report)
    assert all(f"| {name} | done | " in table for name in names) and "bandwidth while decoding" in table


@pytest.mark.parametrize("model", numerics.MADE)
@pytest.mark.parametrize("dtype", numerics.TOLERANCE)
def test_models_with_other_blocks_are_made(tmp_path, model, dtype):
    """Each family reads what it is given; in bfloat16 no expert is left out."""
    numerics.make(model, dtype, tmp_path)
    arch = read_arch(tmp_path)
    for name, value in numerics.MADE[model].items():
        if name != "experts":
            assert getattr(arch, name) == value, name
    if (experts := numerics.MADE[model].get("experts")) is not None:
        assert arch.experts.per_token == (experts.count if dtype == "bfloat16" else 2)


@pytest.mark.parametrize("model", slow_but([], numerics.MADE))
def test_gradients_of_models_with_other_blocks_are_checked(model):
    """Of the adapters of every linear layer; none is zero, which any machine would get right."""
    found = numerics.compute(model, "float32", None)
    assert {"residual", "logits"} < found.keys() and len(found) > 8
    assert all(np.abs(value).max() > 0 for value in found.values())
    rows = numerics.checks(model, "float32", numerics.compute(model, "float32", found), found)
    assert all(row["passed"] for row in rows) and len(rows) == len(found)


def test_settings_without_sense_are_one_line(tmp_path):
    for name, value, says in (
        ("JAX", "rocm", "JAX=rocm: should be cuda12"),
        ("WHEELS", "/nowhere", "WHEELS=/nowhere: no such"),
    ):
        command = [ROOT / "benchmarks/accelerator.sh", tmp_path]
        done = subprocess.run(command, env=os.environ | {name: value}, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"benchmarks/accelerator.sh: {says}")


def part(code, limit=60.0):
    return accelerator.Part("a part", limit, (sys.executable, "-c", code), accelerator.last_object)


def test_a_part_that_fails_says_why(tmp_path):
    done = accelerator.run(part("import sys; print('{}'); sys.exit('no such device')"), 60, tmp_path)
    assert (done["status"], done["result"], done["last_lines"]) == ("failed", {}, ["{}", "no such device"])
    assert accelerator.summary("a part", done) == "no such device"


def test_a_part_is_cut_with_all_that_it_started(tmp_path):
    child = "import time; print('begun', flush=True); time.sleep(100)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    done = accelerator.run(part(code), 2, tmp_path)  # ends only when the child's stdout is closed too
    assert done["status"] == "cut" and done["seconds"] < 60


def test_limits_are_nine_minutes_in_all(tmp_path):
    options = type("", (), {"python": "python", "out": tmp_path, "dry_run": False, "install": True})
    assert sum(part.limit for part in accelerator.parts(options)) <= 540


def test_steps_are_read_from_a_run_that_was_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert accelerator.steps_of(path) is None
    row = {"stage": "rl", "fve": 0.1, "tokens_per_second": 10.0}
    rows = [{"stage": "extract"}, *({**row, "step_seconds": seconds} for seconds in (50.0, 1.0, 3.0))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = accelerator.steps_of(path)
    assert (read["steps"], read["step_seconds"]) == (3, 2.0)  # without the first, which compiles


def test_what_differs_fails():
    there = {"logits": np.array([1.0, -4.0], np.float32), "RL loss": np.float32(0.5), "RL grad_norm_encoder": 0.01}
    there = {name: np.asarray(value) for name, value in there.items()}
    here = {name: value + 3e-4 for name, value in there.items()} | {"RL own gap": np.array(3e-4)}

    def passed(dtype, **changed):
        rows = numerics.checks("m", dtype, here | changed, there)
        return {row["check"]: row["passed"] for row in rows}

    assert passed("float32") == {
        "logits": True,
        "RL loss": False,
        "RL grad_norm_encoder": False,
        "RL own gap": False,
    }
    assert not passed("bfloat16", **{"RL grad_norm_encoder": np.array(0.012)})["RL grad_norm_encoder"]
    assert set(passed("bfloat16").values()) == {True}
    assert not passed("bfloat16", logits=np.array([1.0, np.nan], np.float32))["logits"]
