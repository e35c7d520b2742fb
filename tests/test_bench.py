"""The benchmark counts the FLOPs that are needed, and compares with a step that computes the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from nlae_jax.bench import flops, steps
from nlae_jax.cli import main
from nlae_jax.lm.arch import Arch, DeltaNet, Experts, GlobalAttention, model_weights
from nlae_jax.lm.transformer import Transformer
from tests.conftest import drawn_params, tiny_config, vectors
from tests.tiny_run import EXPERIMENT

pytest_plugins = ["tests.tiny_run"]


@pytest.fixture(autouse=True)
def _small_peaks(monkeypatch):
    """Peaks of small arrays, which are measured in milliseconds: no test depends on their values."""
    monkeypatch.setattr(steps, "_ON_CPU", steps._Peaks(256, 1, 1 << 22, 1))


@pytest.fixture(scope="module")
def workload(tiny_dir):
    return steps.make_workload(tiny_config(subject__model=str(tiny_dir), lora__rank=0, rl__activations_per_step=3))


def test_flops_are_those_of_the_compiled_forward_pass(arch, params):
    """Of matrices and attention; the compiler counts masked scores too, and norms and activations beside them."""
    time = 64
    ids, mask = np.zeros((2, time), np.int32), np.ones((2, time), bool)
    forward = jax.jit(lambda p: Transformer(arch).apply({"params": p}, ids, mask))
    counted = forward.lower(params).compile().cost_analysis()["flops"]
    # A scanned block is counted once.
    mine = 2 * flops.block_flops(arch, time, time * time) + 2 * time * 2 * arch.d_model * arch.vocab_size
    assert counted == pytest.approx(mine, rel=0.15)


def test_flops_of_blocks_that_differ_are_those_of_both():
    """Wide matrices and few tokens: the longer DeltaNet's chunks are, the more they compute beyond the rule."""
    delta = DeltaNet(key_heads=2, value_heads=4, key_dim=8, value_dim=8)
    sizes = {"vocab_size": 64, "d_model": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    arch = Arch(**sizes, d_ff=256, mixers=("delta", "attention"), delta=delta, attention_gate=True)
    time, ids = 8, np.zeros((1, 8), np.int32)
    params = drawn_params(model_weights(arch), 0)
    forward = jax.jit(lambda p: Transformer(arch).apply({"params": p}, ids, ids == 0))
    counted = forward.lower(params).compile().cost_analysis()["flops"]
    mine = 2 * flops.block_flops(arch, time, time * time) + time * 2 * arch.d_model * arch.vocab_size
    assert counted == pytest.approx(mine, rel=0.15)
    attention = dataclasses.replace(arch, mixers=("attention",) * 2)
    assert flops.block_flops(attention, 0, 10) == 2 * flops.block_flops(arch, 0, 10) > 0


def test_flops_of_heads_of_another_size_count():
    sizes = {"vocab_size": 64, "d_model": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    wide = GlobalAttention(num_kv_heads=1, head_dim=64, rope_theta=1e4, turned_pairs=8, keys_are_values=True)
    arch = Arch(**sizes, d_ff=256, mixers=("attention", "global"), qk_norm="head", global_attention=wide)
    time, ids = 32, np.zeros((1, 32), np.int32)
    params = drawn_params(model_weights(arch), 0)
    forward = jax.jit(lambda p: Transformer(arch).apply({"params": p}, ids, ids == 0))
    counted = forward.lower(params).compile().cost_analysis()["flops"]
    mine = 2 * flops.block_flops(arch, time, time * time) + time * 2 * arch.d_model * arch.vocab_size
    assert counted == pytest.approx(mine, rel=0.15)
    # Keys and values of 10 tokens: of 2 heads of 32 in one block, of 1 of 64 in the other.
    shapes = flops.Shapes(prefix=10, act=0, response=1, wrap=0, activations=1, group=1, sft_batch=1)
    longer = flops.decode_bytes(arch, shapes, 2) - flops.decode_bytes(arch, shapes._replace(prefix=0), 2)
    assert longer == 2 * 2 * 10 * (2 * 32 + 64)


def test_of_experts_those_count_that_a_token_passes():
    """Two of eight experts are an MLP twice as wide as one, and a router."""
    sizes = {"vocab_size": 64, "d_model": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    biased = ("q", "router", "gate", "up", "down")
    arch = Arch(**sizes, d_ff=256, experts=Experts(count=8, per_token=2), biases=biased)
    dense, tokens, router = Arch(**sizes, d_ff=512, biases=("q",)), 10, 128 * 8
    mine = flops.block_flops(arch, tokens, 100.0)
    assert mine == flops.block_flops(dense, tokens, 100.0) + 2 * tokens * router
    # One sample reads two experts of each block at every token, four samples may read all.
    shapes = flops.Shapes(prefix=0, act=0, response=1, wrap=0, activations=1, group=1, sft_batch=1)
    for samples, width in ((1, 512), (4, 2048), (40, 2048)):
        shapes = shapes._replace(activations=samples)
        read = flops.decode_bytes(dataclasses.replace(dense, d_ff=width), shapes, 2) + 2 * arch.num_layers * router
        assert flops.decode_bytes(arch, shapes, 2) == read


def test_the_unshared_step_computes_the_same(workload):
    alone, rng = steps.unshared(workload), np.random.default_rng(0)
    group, length = workload.shapes.group, 6
    tokens = rng.integers(3, 300, (workload.shapes.activations, group, length)).astype(np.int32)
    h = vectors(workload.shapes.activations, workload.roles.encoder.arch.d_model)
    trained = workload.rl_state().encoder.trained

    def log_probs(roles, h, tokens):
        variables = roles.encoder_variables(workload.frozen["base"], trained)
        return roles.encoder.apply(variables, h, tokens, method="log_probs")[0]

    shared = log_probs(workload.roles, h, tokens)
    each = log_probs(alone.roles, np.repeat(h, group, axis=0), tokens.reshape(-1, 1, length))
    np.testing.assert_allclose(np.asarray(each).reshape(shared.shape), shared, atol=1e-4)


def test_sharing_needs_fewer_flops(arch):
    shapes = flops.Shapes(prefix=95, act=30, response=48, wrap=12, activations=4, group=8, sft_batch=16)
    for rank, passes in ((0, 3), (16, 2)):
        shared, alone = (flops.needed_flops(arch, 1, rank, s) for s in (shapes, shapes.unshared()))
        assert shared["policy"] == passes * shared["reference"]
        assert shared["score"] == alone["score"]
        assert 1.2 < alone["policy"] / shared["policy"] < 3.5
    one = shapes._replace(activations=32, group=1, act=125, prefix=0)
    assert shapes.unshared() == one


@pytest.mark.slow
def test_the_command(tiny_dir, corpus_file, capsys):
    settings = {"subject.model": tiny_dir, "corpus.path": corpus_file, "corpus.min_characters": 20}
    settings |= {"rl.max_new_tokens": 16, "rl.samples_per_activation": 2, "lora.rank": 2}
    command = ["bench", "--config", str(EXPERIMENT), "--repeats", "1"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["phases"]) == {"rollout", "score", "reference", "policy", "encoder_sft"}
    for phase in result["phases"].values():
        assert phase["seconds"] > 0
        assert phase["peak_fraction"] > 0
    assert result["speedup_of_sharing"] == result["rl_step_seconds_unshared"] / result["rl_step_seconds"]
    assert result["peak_memory_bytes"] > 0
    assert set(result["extraction"]) == {"tokens_per_second", "bare_tokens_per_second", "ratio"}
    phases = "rollout,score,reference,policy,encoder_sft,rl_step"
    assert main([*command, "--json", "--config.rl.kl_coef=0", "--phases", phases]) == 0
    without = json.loads(capsys.readouterr().out)
    assert result["phases"].keys() - without["phases"].keys() == {"reference"}
    assert without["peak_memory_bytes"] < result["peak_memory_bytes"]
    assert main([*command, "--repeats", "0"]) == 2
    assert "--repeats" in capsys.readouterr().err


def test_a_config_json_alone_is_timed_in_the_phases_that_are_named(tiny_dir, tmp_path, capsys):
    """Of a speed nothing is known but from shapes: random weights, prompts of the usual lengths."""
    (tmp_path / "config.json").write_text((tiny_dir / "config.json").read_text())
    command = ["bench", "--config", str(EXPERIMENT), "--repeats", "1", f"--config.subject.model={tmp_path}"]
    command += ["--config.rl.max_new_tokens=8", "--config.lora.rank=2"]
    assert main([*command, "--json", "--phases", "rollout"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["assumed"] == "random weights; no tokenizer"
    assert set(result["phases"]) == {"rollout"} and 0 < result["rollout_bandwidth_fraction"] < 1
    assert result["shapes"]["prefix"] == 95 and "rl_step_seconds" not in result and "extraction" not in result
    assert main([*command, "--phases", "rollout,polcy"]) == 2
    assert "--phases: 'polcy' should be one of" in capsys.readouterr().err


def test_a_table_says_what_was_timed():
    phase = {"seconds": 0.5, "flops": 1e9, "peak_fraction": 0.5, "compile_seconds": 1.0}
    shapes = {"activations": 1, "group": 2, "prefix": 3, "act": 4, "response": 5}
    peaks = {"matmul_peak_flops": 4e9, "memory_bandwidth_bytes_per_second": 1e10}
    result = {"device": "1 cpu", "assumed": "random weights", "shapes": shapes, "phases": {"policy": phase}, **peaks}
    table = steps.as_table(result)
    assert table.caption == "random weights; matmul peak 4 GFLOP/s, bandwidth 10.0 GB/s" and table.row_count == 1
