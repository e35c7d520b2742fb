"""The plan of a small model through the real TPU compiler, which runs without a TPU."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from nlae_jax.cli import main
from nlae_jax.lm.arch import Arch, Experts
from nlae_jax.lm.families import hf_config
from nlae_jax.mesh import platform_of, replicated
from nlae_jax.plan import chips, report
from nlae_jax.plan.abstract import make_planned, programs, resident_bytes, sft_width
from nlae_jax.plan.measure import measure, needed_memory
from nlae_jax.plan.schedule import buffer_bytes
from nlae_jax.roles.protocol import assumed_protocol
from nlae_jax.runtime.errors import UserError
from tests.conftest import tiny_config
from tests.tiny_run import EXPERIMENT, ROOT

pytest.importorskip("libtpu")

PLANS = ROOT / "experiments/plans"

SMALL = {
    "extract__max_tokens": 64,
    "extract__batch_tokens": 512,
    "sft__batch_size": 8,
    "rl__max_new_tokens": 17,
    "mesh__fsdp": -1,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a model whose directory holds a config.json and nothing else."""
    directory = tmp_path_factory.mktemp("arch")
    arch = Arch(vocab_size=512, d_model=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, d_ff=256)
    (directory / "config.json").write_text(json.dumps(hf_config(arch)))
    return tiny_config(**SMALL, subject__model=str(directory), subject__layer=2)


QUICK = ["extract", "decoder_sft"]


@pytest.fixture(scope="module")
def result(config, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        made = report.plan(config, "v5e:2x2", QUICK)
        patch.setattr(report, "open_topology", None)  # the second time nothing is compiled
        assert report.plan(config, "v5e:2x2", QUICK) == made
    return made


def test_every_step_is_planned(result):
    assert (result["topology"], result["chips"], result["mesh"]["fsdp"]) == ("v5e:2x2", 4, 4)
    assert list(result["steps"]) == QUICK
    for step in result["steps"].values():
        assert step["fits"]
        sizes = ("argument_bytes", "output_bytes", "temporary_bytes", "code_bytes", "kept_bytes")
        assert step["peak_bytes_per_chip"] == sum(step[name] for name in sizes) - step["reused_bytes"]
        assert 0 < step["peak_bytes_per_chip"] < result["hbm_bytes_per_chip"]
        assert step["collective_bytes_per_chip"] > 0
        assert step["estimated_seconds"] >= max(step["seconds_alone"].values()) > 0
        assert 0 < step["mfu_bound"] < 1
    assert result["fits"]
    assert result["advice"] == []
    assert "no tokenizer" in result["assumed"][0]


def test_a_quick_plan_has_the_same_numbers(config, result, monkeypatch, tmp_path):
    """All but memory, which is a lower bound, and says so."""
    monkeypatch.setenv("NLAE_CACHE", str(tmp_path))
    quick = report.plan(config, "v5e:2x2", ["decoder_sft"], quick=True)
    assert (quick["compiled"], result["compiled"]) == ("as far as the schedule", "whole")
    found, whole = quick["steps"]["decoder_sft"], result["steps"]["decoder_sft"]
    assert found["code_bytes"] == 0
    assert found["argument_bytes"] == pytest.approx(whole["argument_bytes"], rel=0.01)
    assert found["argument_bytes"] < found["peak_bytes_per_chip"] <= whole["peak_bytes_per_chip"]
    assert report.QUICK_MEMORY in quick["assumed"] and report.QUICK_MEMORY not in result["assumed"]
    for name in ("flops_per_chip", "collectives", "collective_bytes_per_chip", "needed_flops_per_chip"):
        assert found[name] == whole[name]
    assert found["estimated_seconds"] == pytest.approx(whole["estimated_seconds"], rel=0.02)


def test_a_quick_plan_says_what_does_not_fit(config):
    many = dataclasses.replace(config, extract=dataclasses.replace(config.extract, batch_tokens=2**28))
    topology = chips.open_topology("v5e:2x2")
    planned = make_planned(many, topology.devices)
    step = measure("extract", programs(planned, "extract"), topology, planned, quick=True)
    assert not step["fits"]
    assert step["peak_bytes_per_chip"] > topology.chip.memory_bytes


def test_of_a_buffer_assignment_main_memory_counts():
    """Without what other memories hold, and what belongs to one thread or to the program's text."""
    lines = [
        *("size 512, thread-local:", "size 100, parameter 3, shape |f32[25]| at ShapeIndex {}:"),
        *("size 20, parameter 0, shape |f32[5]| at ShapeIndex {}, maybe-live-out:", "size 3, maybe-live-out:"),
        *("size 7000, color 1, preallocated-temp:", "size 4000, preallocated-temp:", "size 9, constant:"),
        "size 8, output shape is |(s32[], f32[3,4])|, maybe-live-out:",
    ]
    text = "".join(f"allocation {n}: {line}\n value: <1 x @0> (size=99,offset=0)\n" for n, line in enumerate(lines))
    assert buffer_bytes(f"BufferAssignment:\n{text}") == (120, 4011)
    with pytest.raises(UserError, match="leave --quick out"):
        buffer_bytes(text.replace("allocation", "buffer"))


def test_flops_are_near_what_is_needed(result):
    """More by what is padded, masked or recomputed."""
    for name, step in result["steps"].items():
        assert 0.9 < step["flops_ratio"] < 3, name


def test_what_is_computed_again_is_said_of_experts_too():
    sizes = {"vocab_size": 64, "d_model": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
    dense, mixed = Arch(**sizes, d_ff=8), Arch(**sizes, d_ff=8, experts=Experts(count=4, per_token=2))
    assert "experts" not in report.recomputed("dots", dense)
    assert report.recomputed("dots", mixed).endswith("and the products of experts")
    for remat in ("none", "linear"):
        assert report.recomputed(remat, mixed) == report.recomputed(remat, dense)


@pytest.mark.slow
def test_adapters_of_experts_are_counted(config, tmp_path):
    """Their bytes with both moments, and their FLOPs in both directions, which the compiler's kernels count themselves.

    The upper bound is loose: the count was six times the forward pass, where the products alone are three to four.
    """
    sizes = {"vocab_size": 512, "d_model": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    arch = Arch(**sizes, d_ff=64, family="qwen3_moe", qk_norm="head", experts=Experts(count=4, per_token=2))
    (tmp_path / "config.json").write_text(json.dumps(hf_config(arch)))
    subject, topology = dataclasses.replace(config.subject, model=str(tmp_path)), chips.open_topology("v5e:2x2")
    held, flops = [], []
    for experts in (False, True):
        lora = dataclasses.replace(config.lora, experts=experts)
        planned = make_planned(dataclasses.replace(config, subject=subject, lora=lora), topology.devices)
        (program,) = programs(planned, "decoder_sft")
        held.append(resident_bytes(program.arguments))
        flops.append(measure("decoder_sft", [program], topology, planned)["flops_per_chip"])
    a_and_b = 3 * config.lora.rank * (128 / 4 + 64)  # of three matrices; the model's width is split over four chips
    blocks, rows = config.subject.layer + 1, 8 * (planned.shapes.wrap + sft_width(config)) * 2 / 4
    assert held[1] - held[0] == 3 * 4 * blocks * 4 * a_and_b
    forward = 2 * blocks * rows * 3 * config.lora.rank * (128 + 64)
    assert 2.9 * forward < flops[1] - flops[0] < 8 * forward


def test_the_fused_kernel_is_compiled_only_where_it_is_asked_for(config, result, monkeypatch, tmp_path):
    """No chip has run it; although the machine at hand is a CPU, it is not interpreted."""
    assert all(step["kernel_flops_per_chip"] == 0 for step in result["steps"].values())
    monkeypatch.setenv("NLAE_CACHE", str(tmp_path))
    asked = dataclasses.replace(config, attention="pallas")
    step = report.plan(asked, "v5e:2x2", ["decoder_sft"])["steps"]["decoder_sft"]
    assert 0 < step["kernel_flops_per_chip"] < step["flops_per_chip"]
    assert step["fits"]


def test_nothing_of_a_plan_is_kept_by_jax(tmp_path):
    """Not in a process that has compiled and kept another program before either."""
    kept = lambda: len([*tmp_path.glob("*-cache")])  # noqa: E731
    changes = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: jax.config.values[name] for name in changes}
    try:
        for name, value in changes.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jax.jit(lambda x: x + 1).lower(1.0).compile()
        count = kept()
        assert count > 0
        with chips.nothing_kept():
            jax.jit(lambda x: x + 2).lower(1.0).compile()
        assert kept() == count
        jax.jit(lambda x: x + 3).lower(1.0).compile()
        assert kept() > count
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_float32_products_take_six_times_as_long(config, result):
    """They are taken whole, in six passes of bfloat16 ones, and the plan counts them as the compiler writes them."""
    topology, narrow = chips.open_topology("v5e:2x2"), dataclasses.replace(config.subject, dtype="bfloat16")
    planned = make_planned(dataclasses.replace(config, subject=narrow), topology.devices)
    step = measure("extract", programs(planned, "extract"), topology, planned)
    exact = result["steps"]["extract"]
    assert step["flops_per_chip"] == pytest.approx(exact["flops_per_chip"], rel=0.05)
    assert exact["seconds_alone"]["compute"] == pytest.approx(6 * step["seconds_alone"]["compute"], rel=0.05)


def test_collectives_are_along_the_mesh(result):
    for step in result["steps"].values():
        for by_axes in step["collectives"].values():
            assert set(by_axes) == {"fsdp"}


@pytest.mark.slow
def test_the_rl_step_whole_and_in_parts(config, monkeypatch, tmp_path):
    """Responses are decoded to the cap; the split step is the sum of its parts and computes the same."""
    monkeypatch.setenv("NLAE_CACHE", str(tmp_path))
    split = dataclasses.replace(config, rl=dataclasses.replace(config.rl, fused=False))
    whole, step = (report.plan(one, "v5e:2x2", ["rl"])["steps"]["rl"] for one in (config, split))
    assert any(loop["trips"] % config.rl.max_new_tokens == 0 for loop in whole["loops"])
    assert whole["kernel_flops_per_chip"] == 0
    assert 0.9 < whole["flops_ratio"] < 3
    parts = step["parts"]
    assert list(parts) == ["rollout", "train_decoder", "train_encoder"]
    assert step["peak_bytes_per_chip"] == max(part["peak_bytes_per_chip"] for part in parts.values())
    assert step["flops_per_chip"] == sum(part["flops_per_chip"] for part in parts.values())
    assert step["flops_per_chip"] == pytest.approx(whole["flops_per_chip"], rel=0.1)


@pytest.mark.slow
def test_the_encoder_s_step(config, monkeypatch, tmp_path):
    monkeypatch.setenv("NLAE_CACHE", str(tmp_path))
    step = report.plan(config, "v5e:2x2", ["encoder_sft"])["steps"]["encoder_sft"]
    assert step["fits"]
    assert 0.9 < step["flops_ratio"] < 3


def test_what_does_not_fit_is_told_with_what_to_change(config):
    many = dataclasses.replace(config, extract=dataclasses.replace(config.extract, batch_tokens=2**28))
    topology = chips.open_topology("v5e:2x2")
    planned = make_planned(many, topology.devices)
    step = measure("extract", programs(planned, "extract"), topology, planned)
    assert not step["fits"]
    assert step["peak_bytes_per_chip"] > topology.chip.memory_bytes
    verdict = report._verdict(many, planned, topology, {"extract": step})
    (advice,) = verdict["advice"]
    tokens = int(advice.split("extract.batch_tokens=")[1].split()[0])
    assert 2**20 < tokens < 2**28


def test_refusals_are_read():
    message = "the total memory required for HLO temporaries (435.09G) exceeds available HBM (15.75G)"
    assert needed_memory(message, 1000) == 1000 + int(435.09 * 2**30)
    assert needed_memory("Used 20.5M of 15.75G hbm. Exceeded", 1000) == int(20.5 * 2**20)
    assert needed_memory("INTERNAL: something else", 0) is None


def test_the_platform_is_that_of_the_mesh():
    topology = chips.open_topology("v5e:2x2")
    mesh = jax.sharding.Mesh(topology.devices, ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    seen = []

    @jax.jit
    def run(x):
        seen.append(platform_of(x @ x))
        return x

    run.lower(jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=replicated(mesh)))
    run(jnp.zeros((8, 8)))
    assert seen == ["tpu", "cpu"]


def test_two_devices_of_a_chip_count_as_one():
    topology = chips.open_topology("tpu7x:2x2x1")
    assert (topology.chips, topology.devices_per_chip) == (4, 2)
    assert topology.device.flops == topology.chip.flops / 2


@pytest.mark.parametrize(
    ("name", "message"), [("v5e", "GENERATION:SHAPE"), ("h100:8", "generations: v4"), ("v5e:3x7", "v5e:3x7")]
)
def test_topologies_that_are_not(name, message):
    with pytest.raises(UserError, match=message):
        chips.open_topology(name)


def test_the_assumed_prompt(config):
    protocol = assumed_protocol(config.protocol)
    assert len(protocol.encoder_prefix) + 1 + len(protocol.encoder_tail) == 125
    assert len(protocol.decoder_prefix) + len(protocol.decoder_suffix) == 12


def test_what_is_committed_fits_and_scales():
    """Of 7B on 8 to 256 chips with as many samples a chip, none sends over a quarter more than each of the 8."""
    plans = [json.loads(path.read_text(encoding="utf-8")) for path in PLANS.rglob("*.json")]
    assert all(plan["fits"] for plan in plans)
    scaling = [json.loads(path.read_text(encoding="utf-8")) for path in PLANS.glob("weak-scaling/*.json")]
    sent = {plan["chips"]: plan["steps"]["rl"]["collective_bytes_per_chip"] for plan in scaling}
    assert sorted(sent) == [8, 16, 32, 64, 128, 256]
    assert max(sent.values()) <= 1.25 * sent[8]


def test_a_plan_is_of_its_tokenizer_too(config, tmp_path):
    keys = []
    for text in (None, "{}", "{ }"):
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_bytes((Path(config.subject.model) / "config.json").read_bytes())
        if text:
            (model / "vocab.json").write_text(text)
        named = dataclasses.replace(config, subject=dataclasses.replace(config.subject, model=str(model)))
        keys.append(report._key(named, "v5e:1x1", ["rl"]))
    assert len(set(keys)) == 3


def test_the_command(config, capsys, tmp_path):
    command = ["plan", "--config", str(EXPERIMENT), f"--config.subject.model={config.subject.model}"]
    assert main([*command, "--topology", "v9:1"]) == 2
    assert "v9:1" in capsys.readouterr().err
    assert main([*command, "--topology", "v5e:1x1", "--steps", "rll"]) == 2
    assert "'rll' should be one of extract, encoder_sft, decoder_sft, rl" in capsys.readouterr().err
    settings = [f"--config.{name.replace('__', '.')}={value}" for name, value in SMALL.items()]
    command += [*settings, "--config.rl.activations_per_step=8", "--steps", "extract"]
    out = tmp_path / "plan.json"
    assert main([*command, "--topology", "v5e:1x1", "--json", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(out.read_text())
    assert "compiled in" in captured.err
    assert main([*command, "--topology", "v5e:1x1"]) == 0
    assert "fits" in capsys.readouterr().out
    assert main([*command, "--config.mesh.fsdp=2", "--topology", "v5e:2x2"]) == 2
    assert "mesh.fsdp=-1" in capsys.readouterr().err
