"""Adapters as directories: written, read back equal, loaded by name, trained on, and refused where they do not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nlae_jax
from nlae_jax import assets
from nlae_jax.cli import main
from nlae_jax.interop.released import open_released
from nlae_jax.lm.adapters import CONFIG, WEIGHTS, has_adapters, open_adapters, write_adapters
from nlae_jax.lm.arch import expert_layers
from nlae_jax.lm.families import arch_from_hf, read_arch
from nlae_jax.lm.layout import flat_weights, hf_name
from nlae_jax.lm.lora import init_adapters, merge
from nlae_jax.lm.pretrained import load_tokenizer, resolve_model
from nlae_jax.lm.weights import load_params, save_model
from nlae_jax.runtime.errors import UserError

pytest_plugins = ["tests.tiny_run"]


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict]:
    """A directory of adapters for the tiny model, and the adapters."""
    arch = read_arch(resolve_model("random:tiny"))
    adapters = jax.tree.map(lambda x: x + 0.1, init_adapters(jax.random.PRNGKey(0), arch, 3))
    write_adapters(tmp_path, arch, adapters, 6.0, "random:tiny", "float32")
    return tmp_path, adapters


def test_adapters_are_read_back_equal(written: tuple[Path, dict]) -> None:
    directory, adapters = written
    assert has_adapters(directory)
    file = open_adapters(directory)
    assert (file.rank, file.alpha, file.base_model) == (3, 6.0, "random:tiny")
    back = file.read(read_arch(resolve_model("random:tiny")))
    jax.tree.map(np.testing.assert_array_equal, adapters, back)


def test_tensors_are_those_of_the_peft_library(written: tuple[Path, dict]) -> None:
    """W + (alpha / r) B A on HF's [out, in] is the transpose of what `lora.merge` makes of ours."""
    directory, adapters = written
    model = resolve_model("random:tiny")
    arch, tensors = read_arch(model), load_file(directory / WEIGHTS)
    base = load_params(model, arch)
    for name in ("q", "down"):
        module = "base_model.model." + hf_name(arch, name, 1).removesuffix(".weight")
        a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        weight = base["blocks"][name][1]
        expected = np.asarray(weight).T + 2.0 * b @ a
        layer = jax.tree.map(lambda x: x[1], adapters[name])
        np.testing.assert_allclose(np.asarray(merge(weight, layer, 2.0)).T, expected, atol=1e-5)


CHECKPOINTS = {
    "phi3": {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2},
    "gpt_neox": {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2},
    "gpt2": {"n_embd": 24, "n_head": 3, "n_layer": 2},
    "gemma4_text": {
        **{"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 6, "global_head_dim": 8},
        **{"num_hidden_layers": 3, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True},
        **{"num_global_key_value_heads": 1, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    },
    "gemma4_text+experts": {
        **{"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 6, "global_head_dim": 8},
        **{"num_hidden_layers": 2, "hidden_size_per_layer_input": 0, "layer_types": ["full_attention"] * 2},
        **{"enable_moe_block": True, "num_experts": 3, "top_k_experts": 2, "moe_intermediate_size": 7},
    },
    "qwen3_5_text": {
        **{"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8},
        **{"num_hidden_layers": 3, "full_attention_interval": 2, "linear_num_key_heads": 1},
        **{"linear_num_value_heads": 2, "linear_key_head_dim": 6, "linear_value_head_dim": 4},
    },
}


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_adapters_of_tensors_that_hold_several_are_one_of_their_ranks_together(tmp_path: Path, family: str) -> None:
    """On the joined HF matrix, (alpha / r) B A of the pattern's rank is what ours are on the parts."""
    width = "n_inner" if family == "gpt2" else "intermediate_size"
    arch = arch_from_hf({"model_type": family.partition("+")[0], "vocab_size": 32, width: 40, **CHECKPOINTS[family]})
    adapters = jax.tree.map(lambda x: x + 0.1, init_adapters(jax.random.PRNGKey(0), arch, 3))
    write_adapters(tmp_path, arch, adapters, 6.0, "some/model", "float32")
    jax.tree.map(np.testing.assert_array_equal, adapters, open_adapters(tmp_path).read(arch))
    content, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    zeros = {name: np.zeros(weight.shape, np.float32) for name, weight in flat_weights(arch).items()}
    merged = dict(zeros)
    for name, pair in adapters.items():
        merged[name] = merge(zeros[name], pair, 2.0)
    save_model(tmp_path / "M", arch, lambda name, layer: merged[name] if layer is None else merged[name][layer])
    whole = load_file(tmp_path / "M/model.safetensors")
    modules = {name.rsplit(".lora_", 1)[0] for name in tensors}
    counts = {"phi3": 8, "gpt_neox": 8, "gpt2": 8, "qwen3_5_text": 19, "gemma4_text": 19, "gemma4_text+experts": 14}
    assert len(modules) == counts[family]
    for module in modules:
        a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        short = module.rpartition(".")[2]
        rank, alpha = (
            content.get(f"{name}_pattern", {}).get(short, own) for name, own in (("rank", 3), ("alpha", 6.0))
        )
        assert a.shape[0] == rank
        weight = whole[module.removeprefix("base_model.model.") + ".weight"]
        weight = weight.T if family == "gpt2" else weight
        np.testing.assert_allclose(alpha / rank * b @ a, weight, atol=1e-5)


MIXTURES = {
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 7, "head_dim": 8},
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 7},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 7, "head_dim": 8},
    "gemma4_text": CHECKPOINTS["gemma4_text+experts"] | {"intermediate_size": 9},
    "qwen3_5_moe_text": CHECKPOINTS["qwen3_5_text"]
    | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 7, "shared_expert_intermediate_size": 5},
}


@pytest.mark.parametrize("family", MIXTURES)
def test_adapters_of_experts_are_those_of_the_peft_librarys_parameters(tmp_path: Path, family: str) -> None:
    """PEFT adds einsum("ore,eri->eoi", B, A) to a parameter of all experts; gpt-oss's are [experts, in, out]."""
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2}
    arch = arch_from_hf({"model_type": family, "vocab_size": 32, **sizes, **MIXTURES[family]})
    adapters = jax.tree.map(lambda x: x + 0.1, init_adapters(jax.random.PRNGKey(0), arch, 3, experts=True))
    write_adapters(tmp_path, arch, adapters, 6.0, "some/model", "float32")
    file = open_adapters(tmp_path)
    assert file.experts
    jax.tree.map(np.testing.assert_array_equal, adapters, file.read(arch))

    content, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    assert content["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert content["rank_pattern"]["gate_up_proj"] == 6 and content["alpha_pattern"]["gate_up_proj"] == 12.0
    module = f"base_model.model.model.layers.1.{'' if family == 'gemma4_text' else 'mlp.'}experts"
    for name, inside in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        a, b = (tensors[f"{module}{inside}.lora_{part}.weight"] for part in "AB")
        change = 2.0 * np.einsum("ore,eri->eio", b.reshape(len(b), -1, 3), a.reshape(3, -1, a.shape[1]))
        members = ("down",) if name == "down_proj" else ("gate", "up")
        zeros = {member: np.zeros(expert_layers(arch)[member].shape[1:], np.float32) for member in members}
        parts = [merge(zeros[m], jax.tree.map(lambda x: x[1], adapters[m]), 2.0) for m in members]
        in_turn = np.stack(parts, -1).reshape(3, *change.shape[1:])  # gate and up alternate in gpt-oss
        expected = in_turn if family == "gpt_oss" else np.concatenate(parts, -1)
        np.testing.assert_allclose(change, expected, atol=1e-5)

    del content["target_parameters"], content["rank_pattern"]["gate_up_proj"], content["alpha_pattern"]["gate_up_proj"]
    (tmp_path / CONFIG).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"unexpected tensor .*experts"):
        open_adapters(tmp_path).read(arch)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("r", 0),
        ("r", True),
        ("r", "3"),
        ("r", 10**9),
        ("lora_alpha", None),
        ("lora_alpha", -1),
        ("base_model_name_or_path", ""),
        ("use_dora", True),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("lora_alpha", 1e60),
    ],
)
def test_what_is_not_supported_is_named(written: tuple[Path, dict], field: str, value: object) -> None:
    directory, _ = written
    content = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(content | {field: value}))
    with pytest.raises(UserError, match=rf"{CONFIG}: {field}"):
        open_adapters(directory)


def test_a_tensor_of_another_rank_is_named(written: tuple[Path, dict]) -> None:
    directory, _ = written
    content = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(content | {"r": 4}))
    with pytest.raises(UserError, match="lora_A"):
        open_adapters(directory).read(read_arch(resolve_model("random:tiny")))


@pytest.mark.parametrize(
    "name", ["base_model.model.lm_head.weight", "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"]
)
def test_what_adapters_hold_besides_is_not_left_out(written: tuple[Path, dict], name: str) -> None:
    """A head that was trained along, or blocks that the model lacks."""
    directory, _ = written
    tensors = load_file(directory / WEIGHTS)
    save_file(tensors | {name: np.ones((3, 4), np.float32)}, directory / WEIGHTS)
    with pytest.raises(UserError, match=f"unexpected tensor '{name}'"):
        open_adapters(directory).read(read_arch(resolve_model("random:tiny")))


@pytest.mark.parametrize(
    "alphas", [{"down_proj": 12.0}, {"q_proj": "6"}, [6.0], {"layers.1.self_attn.q_proj": 12.0}, {".*_proj": 6.0}]
)
def test_scales_of_single_modules_are_those_of_all(written: tuple[Path, dict], alphas: object) -> None:
    directory, adapters = written
    content = json.loads((directory / CONFIG).read_text())
    arch = read_arch(resolve_model("random:tiny"))
    (directory / CONFIG).write_text(json.dumps(content | {"alpha_pattern": {"q_proj": 6.0}}))
    jax.tree.map(np.testing.assert_array_equal, adapters, open_adapters(directory).read(arch))
    (directory / CONFIG).write_text(json.dumps(content | {"alpha_pattern": alphas}))
    with pytest.raises(UserError, match="alpha_pattern"):
        open_adapters(directory).read(arch)


@pytest.fixture(scope="module")
def lora_run(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A workdir whose roles have adapters, and its export of the adapters alone."""
    workdir, out = tmp_path_factory.mktemp("lora") / "W", tmp_path_factory.mktemp("adapters") / "pair"
    changed = {"lora__rank": 4, "lora__alpha": 8.0, "subject__layer": 0, "sft__encoder_steps": 12, "rl__num_steps": 2}
    assert main(tiny_run.arguments(workdir, **changed)) == 0
    assert main(["export", "--workdir", str(workdir), "--out", str(out), "--dtype", "float32", "--adapters"]) == 0
    return workdir, out


def test_a_pair_is_loaded_by_name_and_says_the_same(
    lora_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, out = lora_run
    trained, loaded = nlae_jax.NLA.from_workdir(workdir), nlae_jax.NLA.from_pretrained(out)
    trained.max_new_tokens = loaded.max_new_tokens
    text = "the text of the land"

    def only(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Without what a run says against activations of its own."""
        return [{name: row[name] for name in row if name not in ("relative_mse", "outside")} for row in rows]

    def said(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What `only` gives, for comparison."""
        return [
            {name: pytest.approx(value, abs=1e-4) if isinstance(value, float) else value for name, value in row.items()}
            for row in only(rows)
        ]

    expected = said(trained.explain_text(text))
    assert only(loaded.explain_text(text)) == expected
    monkeypatch.setattr(assets, "_HERE", tmp_path)
    shutil.copytree(out, tmp_path / "pairs/tiny")
    assert assets.pair_names() == ["tiny"]
    named = nlae_jax.NLA.from_pretrained("tiny")
    assert only(named.explain_text(text)) == expected
    assert only(named.explain_texts([text, "of the"])[0]) == expected


def test_a_directory_comes_before_a_pair_of_the_package(
    lora_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for `init.pair`, so that commands and trainings read the same files."""
    _, out = lora_run
    name = assets.pair_names()[0]
    shutil.copytree(out, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert open_released(name, "av").sidecar.path.resolve().is_relative_to(tmp_path)
    with pytest.raises(UserError, match=f"the package carries the pairs {name}"):
        open_released(f"{name}x.gguf", "av")


def test_a_pair_of_adapters_loads_one_tokenizer(lora_run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(
        "nlae_jax.interop.released.load_tokenizer", lambda path: loaded.append(path) or load_tokenizer(path)
    )
    assert nlae_jax.NLA.from_pretrained(lora_run[1]).tokenizer is not None
    assert len(loaded) == 1


def test_the_subject_of_adapters_is_the_model_that_they_sit_on(lora_run: tuple[Path, Path], tiny_run: Any) -> None:
    """Another one would be read by nobody, and nobody would know."""
    _, out = lora_run
    assert nlae_jax.NLA.from_pretrained(out, subject=str(tiny_run.model)).subject_name == str(tiny_run.model)
    with pytest.raises(UserError, match=r"subject: random:tiny: the pair's adapters sit on .*, which is its subject"):
        nlae_jax.NLA.from_pretrained(out, subject="random:tiny")


def test_training_goes_on_from_adapters(lora_run: tuple[Path, Path], tiny_run: Any, tmp_path: Path) -> None:
    workdir, out = lora_run
    changed = {"lora__rank": 4, "lora__alpha": 8.0, "subject__layer": 0, "init__pair": str(out)}
    changed |= {"sft__encoder_steps": 0, "sft__decoder_steps": 0, "rl__num_steps": 1}
    assert main(tiny_run.arguments(tmp_path / "W", **changed)) == 0
    before, after = (json.loads((path / "eval.json").read_text()) for path in (workdir, tmp_path / "W"))
    assert after["fve_before_rl"] == pytest.approx(before["fve"], abs=1e-5)


@pytest.mark.parametrize(("field", "message"), [("lora__rank", "rank: 5 should be 4"), ("lora__alpha", "should be 8")])
def test_another_rank_or_scale_is_refused(
    lora_run: tuple[Path, Path], tiny_run: Any, tmp_path: Path, capsys: Any, field: str, message: str
) -> None:
    changed = {"lora__rank": 4, "lora__alpha": 8.0, "subject__layer": 0, "init__pair": str(lora_run[1])} | {field: 5}
    assert main(tiny_run.arguments(tmp_path / "W", **changed)) == 2
    assert message in capsys.readouterr().err


def test_full_models_and_adapters_are_no_pair(lora_run: tuple[Path, Path], tmp_path: Path) -> None:
    workdir, out = lora_run
    assert main(["export", "--workdir", str(workdir), "--out", str(tmp_path / "whole")]) == 0
    with pytest.raises(UserError, match="should hold adapters"):
        nlae_jax.NLA.from_pretrained(out / "av", tmp_path / "whole/ar")
