"""Reading and writing safetensors: against the golden files, whose tensors transformers itself named."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.families import arch_from_hf
from nlae_jax.lm.reading import read_tensor
from nlae_jax.lm.tensors import TensorToWrite, is_finite, write_safetensors
from nlae_jax.lm.weights import load_params, save_params
from nlae_jax.runtime.errors import UserError

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> tuple[Arch, dict[str, np.ndarray]]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        weights = {key.removeprefix("weight/"): file[key] for key in file.files if key.startswith("weight/")}
        return arch_from_hf(json.loads(str(file["config"]))), weights


def save_shards(directory: Path, shards: list[dict[str, np.ndarray]]) -> None:
    weight_map = {}
    for index, shard in enumerate(shards):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / name)
        weight_map |= dict.fromkeys(shard, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        if name == "blocks":
            assert_same(left[name], right[name])
        else:
            assert left[name].dtype == right[name].dtype, name
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.parametrize("name", ["tied", "odd_heads", "rope_llama3"])
def test_tree_has_the_layout_of_the_architecture(name, tmp_path):
    arch, weights = golden(name)
    save_file(weights, tmp_path / "model.safetensors")
    params = load_params(tmp_path, arch)
    expected = model_weights(arch)
    assert params.keys() == expected.keys()
    assert {k: v.shape for k, v in params["blocks"].items()} == {k: w.shape for k, w in expected["blocks"].items()}
    np.testing.assert_array_equal(params["embed"], weights["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["final_norm"], weights["model.norm.weight"])
    last = arch.num_layers - 1
    layer = f"model.layers.{last}"
    for ours, theirs in {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }.items():
        np.testing.assert_array_equal(params["blocks"][ours][last], weights[f"{layer}.{theirs}.weight"].T, ours)
    np.testing.assert_array_equal(params["blocks"]["attn_norm"][last], weights[f"{layer}.input_layernorm.weight"])
    np.testing.assert_array_equal(
        params["blocks"]["mlp_norm"][last], weights[f"{layer}.post_attention_layernorm.weight"]
    )
    if not arch.tied_head:
        np.testing.assert_array_equal(params["head"], weights["lm_head.weight"])


@pytest.mark.parametrize("name", ["tied", "odd_heads", "rope_llama3"])
def test_saving_what_was_loaded_is_the_identity(name, tmp_path):
    arch, weights = golden(name)
    save_file(weights, tmp_path / "model.safetensors")
    save_params(tmp_path / "copy", load_params(tmp_path, arch), arch)
    saved = load_file(tmp_path / "copy" / "model.safetensors")
    assert saved.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["model.safetensors"]


def test_saved_file_opens_in_torch_with_its_metadata(tmp_path):
    torch_reader = pytest.importorskip("safetensors.torch", exc_type=ImportError)
    arch, weights = golden("tied")
    save_file(weights, tmp_path / "model.safetensors")
    save_params(tmp_path, load_params(tmp_path, arch), arch, dtype="bfloat16")
    with torch_reader.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        value = file.get_tensor("model.layers.1.mlp.down_proj.weight")
    expected = weights["model.layers.1.mlp.down_proj.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(value.float().numpy(), expected)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_file_dtypes_are_cast_to_the_one_asked_for(stored, asked, tmp_path):
    arch, weights = golden("tied")
    save_file({key: value.astype(stored) for key, value in weights.items()}, tmp_path / "model.safetensors")
    params = load_params(tmp_path, arch, dtype=asked)
    assert params["blocks"]["up"].dtype == params["embed"].dtype == np.dtype(asked)
    expected = weights["model.layers.0.mlp.up_proj.weight"].T.astype(stored).astype(asked)
    np.testing.assert_array_equal(params["blocks"]["up"][0], expected)


def test_shards_read_as_one_file(tmp_path):
    arch, weights = golden("odd_heads")
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    save_file(weights, tmp_path / "one" / "model.safetensors")
    items = list(weights.items())
    save_shards(tmp_path / "many", [dict(items[:5]), dict(items[5:6]), dict(items[6:])])
    assert_same(load_params(tmp_path / "many", arch), load_params(tmp_path / "one", arch))


def test_tied_head_copy_and_rotary_buffers_are_ignored(tmp_path):
    arch, weights = golden("tied")
    surplus = {
        "lm_head.weight": weights["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    save_file(weights | surplus, tmp_path / "model.safetensors")
    assert "head" not in load_params(tmp_path, arch)


def test_trunk_needs_neither_final_norm_nor_head_and_ignores_them(tmp_path):
    arch, weights = golden("odd_heads")
    save_file(weights, tmp_path / "model.safetensors")
    trunk = load_params(tmp_path, arch, trunk=True)
    assert trunk.keys() == {"embed", "blocks"}
    save_params(tmp_path / "trunk", trunk, arch)
    assert not {"model.norm.weight", "lm_head.weight"} & load_file(tmp_path / "trunk" / "model.safetensors").keys()
    assert_same(load_params(tmp_path / "trunk", arch, trunk=True), trunk)
    with pytest.raises(UserError, match=r"lack the tensor 'lm_head.weight' and 1 more"):
        load_params(tmp_path / "trunk", arch)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_missing_tensor_is_named(name, tmp_path):
    arch, weights = golden("odd_heads")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=name):
        load_params(tmp_path, arch)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight", "score.weight"]
)
def test_unexpected_tensor_is_named(name, tmp_path):
    arch, weights = golden("tied")
    save_file(weights | {name: np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"unexpected tensor '{name}'"):
        load_params(tmp_path, arch)


def test_wrong_shape_is_named_even_when_it_would_broadcast(tmp_path):
    arch, weights = golden("tied")
    wrong = {"model.layers.0.mlp.up_proj.weight": np.ones((1, 1), np.float32)}
    save_file(weights | wrong, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj.weight' has shape \(1, 1\).*\(48, 32\)"):
        load_params(tmp_path, arch)


def test_transposed_matrix_is_refused(tmp_path):
    arch, weights = golden("tied")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: np.ascontiguousarray(weights[name].T)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="up_proj"):
        load_params(tmp_path, arch)


def test_tensor_in_two_shards_is_refused(tmp_path):
    arch, weights = golden("tied")
    save_shards(tmp_path, [weights, {"model.norm.weight": weights["model.norm.weight"]}])
    with pytest.raises(UserError, match=r"'model.norm.weight' is there twice"):
        load_params(tmp_path, arch)


def test_missing_shard_is_named(tmp_path):
    arch, weights = golden("tied")
    items = list(weights.items())
    save_shards(tmp_path, [dict(items[:5]), dict(items[5:])])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: this shard"):
        load_params(tmp_path, arch)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": [1]}}', '{"weight_map": {"a": 1}}']
)
def test_broken_index_is_named(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json: .*should be"):
        load_params(tmp_path, golden("tied")[0])


def test_index_cannot_point_outside_the_directory(tmp_path):
    arch, weights = golden("tied")
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "model").mkdir()
    index = {"weight_map": dict.fromkeys(weights, "../model.safetensors")}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"\.\./model\.safetensors"):
        load_params(tmp_path / "model", arch)


def test_files_that_are_no_weights_are_refused(tmp_path):
    arch, weights = golden("tied")
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load_params(tmp_path, arch)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="not a readable safetensors"):
        load_params(tmp_path, arch)
    integers = {key: value.astype(np.int8) for key, value in weights.items()}
    save_file(integers, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is I8"):
        load_params(tmp_path, arch)
    with pytest.raises(UserError, match="dtype 'float8'"):
        load_params(tmp_path, arch, dtype="float8")


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def fail() -> np.ndarray:
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_safetensors(path, [TensorToWrite("a", (2,), lambda: np.ones(2)), TensorToWrite("b", (2,), fail)])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_saving_params_of_another_architecture_is_refused(tmp_path):
    arch, weights = golden("tied")
    save_file(weights, tmp_path / "model.safetensors")
    params = load_params(tmp_path, arch)
    with pytest.raises(ValueError, match="do not fit"):
        save_params(tmp_path, params, arch.truncated(2))
    with pytest.raises(ValueError, match="do not fit"):
        save_params(tmp_path, params, dataclasses.replace(arch, tied_head=False))


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 4),
    groups=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    d_model=st.integers(1, 9),
    layers=st.integers(1, 12),
    tied=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 99),
)
def test_round_trip_of_any_shape(tmp_path_factory, heads, groups, head_dim, d_model, layers, tied, dtype, seed):
    directory = tmp_path_factory.mktemp("model")
    arch = Arch(11, d_model, layers, heads * groups, heads, head_dim, 5, tied_head=tied)
    rng = np.random.default_rng(seed)

    def draw(weight) -> np.ndarray:
        return rng.normal(size=weight.shape).astype(dtype)

    tree = model_weights(arch)
    params = {name: draw(weight) for name, weight in tree.items() if name != "blocks"}
    params["blocks"] = {name: draw(weight) for name, weight in tree["blocks"].items()}
    save_params(directory, params, arch, dtype)
    assert_same(load_params(directory, arch, dtype), params)


# --- config and tensors that disagree, values that are no numbers, names without the model's


@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_head_that_a_tied_model_does_not_have_is_refused(trunk, sharded, tmp_path):
    """One number of the last row is enough; a decoder, which has no head, does not mind."""
    arch, weights = golden("tied")
    head = weights["model.embed_tokens.weight"].copy()
    head[-1, -1] += 0.5
    if sharded:
        save_shards(tmp_path, [weights, {"lm_head.weight": head}])
    else:
        save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    if trunk:
        assert "head" not in load_params(tmp_path, arch, trunk=True)
        return
    with pytest.raises(UserError, match=r"'lm_head.weight' is not the embedding .*tie_word_embeddings"):
        load_params(tmp_path, arch)


def test_a_head_of_another_size_or_kind_is_refused(tmp_path):
    arch, weights = golden("tied")
    head = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": head[:-1].copy()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is not the embedding"):
        load_params(tmp_path, arch)
    save_file(weights | {"lm_head.weight": head.astype(np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is I8"):
        load_params(tmp_path, arch)


def test_a_tied_head_may_be_stored_in_another_dtype(tmp_path):
    arch, weights = golden("tied")
    for dtype in (np.float16, ml_dtypes.bfloat16):
        head = weights["model.embed_tokens.weight"].astype(dtype)
        save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors")
        assert "head" not in load_params(tmp_path, arch)


NAMES = ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_is_no_number_is_named(name, stored, value, tmp_path):
    arch, weights = golden("odd_heads")
    tensors = {key: tensor.astype(stored) for key, tensor in weights.items()}
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"'{name}' holds NaN or infinity"):
        load_params(tmp_path, arch, dtype="bfloat16")


def test_a_number_that_the_dtype_asked_for_cannot_hold_is_named(tmp_path):
    arch, weights = golden("odd_heads")
    weights["model.norm.weight"][0] = 1e5
    save_file(weights, tmp_path / "model.safetensors")
    load_params(tmp_path, arch, dtype="bfloat16")
    with pytest.raises(UserError, match=r"'model\.norm\.weight' holds numbers too large for float16"):
        load_params(tmp_path, arch, dtype="float16")


def test_a_value_head_of_nan_is_named(tmp_path):
    save_file({"weight": np.full((2, 2), np.nan, np.float32)}, tmp_path / "value_head.safetensors")
    with pytest.raises(UserError, match=r"value_head\.safetensors: the tensor 'weight' holds NaN"):
        read_tensor(tmp_path / "value_head.safetensors", "weight", (2, 2))


@given(st.integers(0, 2**16 - 1), st.sampled_from([np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]))
def test_every_pattern_of_sixteen_bits_is_judged_as_numpy_does(bits, dtype):
    values = np.array([0, bits], np.uint16).view(dtype)
    assert is_finite(values) == np.isfinite(values.astype(np.float32)).all()


@given(st.integers(0, 2**32 - 1))
def test_every_pattern_of_thirty_two_bits_is_judged_as_numpy_does(bits):
    values = np.array([[0, bits]], np.uint32).view(np.float32)
    assert is_finite(values[:, ::-1]) == np.isfinite(values).all()


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_weights_saved_by_the_class_without_a_head(prefix, tmp_path):
    """As `AutoModel.save_pretrained` writes them, alone or beside a vision tower."""
    arch, weights = golden("tied")
    save_file(weights, tmp_path / "model.safetensors")
    expected = load_params(tmp_path, arch)
    items = [(prefix + name.removeprefix("model."), tensor) for name, tensor in weights.items()]
    (tmp_path / "base").mkdir()
    save_shards(tmp_path / "base", [dict(items[:5]), dict(items[5:])])
    assert_same(load_params(tmp_path / "base", arch), expected)


def test_names_with_and_without_the_model_are_the_same_tensor(tmp_path):
    arch, weights = golden("tied")
    save_file(weights | {"norm.weight": weights["model.norm.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight' is there twice"):
        load_params(tmp_path, arch)


@pytest.mark.parametrize(
    "name", ["normal.weight", "layers_of.weight", "encoder.layers.0.weight", "embed_tokens_2.weight"]
)
def test_names_that_only_begin_alike_are_unexpected(name, tmp_path):
    arch, weights = golden("tied")
    save_file(weights | {name: np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"unexpected tensor '{name}'"):
        load_params(tmp_path, arch)


def test_a_base_model_of_an_untied_one_lacks_its_head(tmp_path):
    arch, weights = golden("odd_heads")
    base = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    save_file(base, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lack the tensor 'lm_head\.weight'"):
        load_params(tmp_path, arch)
    assert load_params(tmp_path, arch, trunk=True).keys() == {"embed", "blocks"}


def test_a_name_from_a_file_is_safe_to_print(tmp_path):
    arch, weights = golden("tied")
    name = "\x1b]0;title\x07\u202e"
    save_file(weights | {name: np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="unexpected tensor") as caught:
        load_params(tmp_path, arch)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "index", ["null", "[" * 100_000, '{"weight_map": {"a": 1e999}}', '{"weight_map": {"a": 1' + "0" * 6000]
)
def test_an_index_that_no_reader_takes_is_named(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json: ") as caught:
        load_params(tmp_path, golden("tied")[0])
    assert len(str(caught.value)) < 400
