"""Loading straight into sharded arrays: the same values on every mesh, no byte too many, and no second copy."""

import itertools
import os
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from nlae_jax.config import MeshConfig
from nlae_jax.lm import reading, tensors
from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.weights import load_params
from nlae_jax.mesh import AXES, Weight, make_mesh
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.runtime.errors import UserError
from tests.checkpoints import DTYPES, MATRICES, drawn, flattened, put_together, save_shards, shardings_on

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4), (1, 2, 2)]
ARCHS = {
    "tied": Arch(48, 16, 3, 4, 2, 8, 40),
    "untied": Arch(50, 24, 2, 3, 1, 8, 40, tied_head=False),  # lengths that eight or four devices do not divide
    "biases": Arch(48, 16, 2, 4, 2, 8, 40, biases=MATRICES, qk_norm="all"),
    "post_norms": Arch(48, 16, 2, 4, 2, 8, 40, family="gemma2", post_norms=True, qk_norm="head"),
}


def assert_loaded(params, shardings, expected) -> None:
    ours, wanted = flattened(params), flattened(shardings)
    assert ours.keys() == expected.keys()
    for name, leaf in ours.items():
        assert leaf.dtype == expected[name].dtype and leaf.sharding == wanted[name], name
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[name][shard.index], err_msg=name)


@pytest.fixture
def read(monkeypatch):
    """A list that grows by (offset, number of bytes) with every read of values."""
    calls, original = [], reading._read_exactly

    def counted(file, offset, buffer):
        calls.append((offset, len(buffer)))
        original(file, offset, buffer)

    monkeypatch.setattr(reading, "_read_exactly", counted)
    return calls


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("case", ARCHS)
def test_every_device_gets_its_part(case, sizes, tmp_path):
    arch = ARCHS[case]
    weights = drawn(arch, "bfloat16")
    save_shards(tmp_path, weights, 3)
    shardings = shardings_on(arch, sizes)
    params = load_params(tmp_path, arch, "bfloat16", shardings=shardings)
    assert_loaded(params, shardings, put_together(arch, weights, "bfloat16"))


@pytest.mark.parametrize("asked", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_dtypes_are_cast_on_the_way(stored, asked, tmp_path):
    arch = ARCHS["untied"]
    weights = drawn(arch, stored)
    save_file(weights, tmp_path / "model.safetensors")
    shardings = shardings_on(arch, (2, 2, 2))
    params = load_params(tmp_path, arch, asked, shardings=shardings)
    assert_loaded(params, shardings, put_together(arch, weights, asked))


def test_a_trunk_takes_the_shardings_of_the_whole_model(tmp_path):
    arch = ARCHS["untied"]
    weights = drawn(arch, "float32")
    save_file(weights, tmp_path / "model.safetensors")
    shardings = shardings_on(arch, (1, 2, 2))
    expected = put_together(arch, weights, "float32")
    del expected["head"], expected["final_norm"]
    assert_loaded(load_params(tmp_path, arch, trunk=True, shardings=shardings), shardings, expected)


def test_names_beside_a_vision_tower(tmp_path):
    arch = ARCHS["post_norms"]
    weights = drawn(arch, "float16")
    nested = {name.replace("model.", "model.language_model.", 1): value for name, value in weights.items()}
    save_shards(tmp_path, nested | {"model.vision_tower.patch.weight": np.ones(3, np.float16)}, 2)
    shardings = shardings_on(arch, (2, 2, 2))
    params = load_params(tmp_path, arch, "float32", shardings=shardings)
    assert_loaded(params, shardings, put_together(arch, weights, "float32"))


def test_without_shardings_it_goes_wherever_it_is_used(tmp_path):
    arch = ARCHS["tied"]
    save_file(drawn(arch, "float32"), tmp_path / "model.safetensors")
    embed = load_params(tmp_path, arch)["embed"]
    assert embed.devices() == {jax.devices()[0]}
    there = jax.device_put(np.ones((), np.float32), jax.devices()[3])
    assert (embed * there).devices() == {jax.devices()[3]}


@st.composite
def layouts(draw):
    """An architecture, sizes of a mesh, and over which of its axes each axis of each weight is split, if it can be."""
    groups, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    size = st.integers(1, 12)
    arch = Arch(
        draw(size), draw(size), draw(st.integers(1, 5)), groups * kv_heads, kv_heads, draw(st.integers(1, 4)),
        draw(size), tied_head=draw(st.booleans()), biases=draw(st.sampled_from([(), ("q", "down")])),
    )  # fmt: skip
    sizes = draw(st.permutations(draw(st.sampled_from([(1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 2), (1, 2, 3)]))))
    mesh = make_mesh(MeshConfig(*sizes))

    def sharding(weight):
        axes = draw(st.permutations(AXES))
        free = iter(axes)
        spec = [axis if length % mesh.shape[axis := next(free)] == 0 else None for length in weight.shape]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return arch, jax.tree.map(sharding, model_weights(arch), is_leaf=lambda node: isinstance(node, Weight))


@settings(max_examples=40)
@given(
    layout=layouts(), stored=st.sampled_from(list(DTYPES)), asked=st.sampled_from(list(DTYPES)), pieces=st.booleans()
)
def test_any_shape_and_any_sharding(tmp_path_factory, layout, stored, asked, pieces):
    arch, shardings = layout
    directory = tmp_path_factory.mktemp("model")
    weights = drawn(arch, stored)
    save_shards(directory, weights, 2)
    with pytest.MonkeyPatch.context() as patch:
        if pieces:  # as large tensors are read
            patch.setattr(reading, "_PIECE_ROWS", 2)
            patch.setattr(reading, "_PIECE_BYTES", 1)
        params = load_params(directory, arch, asked, shardings=shardings)
    assert_loaded(params, shardings, put_together(arch, weights, asked))


@pytest.mark.parametrize("sizes", MESHES)
def test_every_byte_is_read_once(sizes, tmp_path, read):
    """However many devices of the process hold it, and although they hold different columns of a row."""
    arch = ARCHS["untied"]
    weights = drawn(arch, "float16")
    save_file(weights, tmp_path / "model.safetensors")
    load_params(tmp_path, arch, shardings=shardings_on(arch, sizes))
    covered = sorted(read)
    assert all(first + count == after for (first, count), (after, _) in itertools.pairwise(covered))
    assert sum(count for _, count in read) == sum(value.nbytes for value in weights.values())
    assert len(read) <= 8 * len(weights)  # not each row for each device


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_only_the_needed_part_of_a_tensor_is_read(axis, tmp_path, read):
    values = np.arange(80, dtype=np.float32).reshape(8, 10)
    save_file({"a": values}, tmp_path / "a.safetensors")
    (stored,) = tensors.stored_tensors(tmp_path / "a.safetensors")
    target = np.zeros((2, 10) if axis == "rows" else (8, 3), np.float32)
    part = reading.Part((4, 6), (0, 10), target) if axis == "rows" else reading.Part((0, 8), (5, 8), target)
    with stored.path.open("rb", buffering=0) as file:
        reading._read_parts({stored.path: file}, stored, [part])
    np.testing.assert_array_equal(target, values[4:6] if axis == "rows" else values[:, 5:8])
    assert sum(count for _, count in read) == target.nbytes


def test_on_a_cpu_devices_take_over_the_memory_that_was_read_into(tmp_path):
    """Copies of one part, too: eight devices with the same values hold them once."""
    arch = ARCHS["tied"]
    save_file(drawn(arch, "float32"), tmp_path / "model.safetensors")
    for leaf in jax.tree.leaves(load_params(tmp_path, arch, shardings=shardings_on(arch, (8, 1, 1)))):
        assert len({shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}) == 1


@pytest.mark.parametrize("fault", ["missing", "surplus", "double", "shape", "dtype", "damaged"])
def test_faults_are_found_before_values_are_read(fault, tmp_path, read):
    arch = ARCHS["tied"]
    weights = drawn(arch, "float32")
    last = list(weights)[-1]
    if fault == "missing":
        del weights[last]
    save_shards(tmp_path, weights, 2)
    path = tmp_path / "model-00002-of-00002.safetensors"
    there = {name: weights[name] for name in list(weights)[1::2]}
    name = next(iter(there))
    changed = {
        "surplus": {"score.weight": np.zeros(3, np.float32)},
        "double": {next(iter(weights)): next(iter(weights.values()))},
        "shape": {name: there[name][..., :-1].copy()},
        "dtype": {name: there[name].astype(np.int8)},
    }
    save_file(there | changed.get(fault, {}), path)
    if fault == "damaged":
        os.truncate(path, path.stat().st_size - 4)
    culprit = {"surplus": "score.weight", "double": next(iter(weights)), "missing": last, "damaged": path.name}
    with pytest.raises(UserError, match=re.escape(culprit.get(fault, name))) as error:
        load_params(tmp_path, arch)
    assert "\n" not in str(error.value)
    assert not read


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path, monkeypatch):
    arch = ARCHS["tied"]
    path = tmp_path / "model.safetensors"
    save_file(drawn(arch, "float32"), path)

    def cut(path):
        found = tensors.stored_tensors(path)
        os.truncate(path, path.stat().st_size - 4)
        return found

    monkeypatch.setattr("nlae_jax.lm.weights.stored_tensors", cut)
    with pytest.raises(UserError, match=r"model\.safetensors: the tensor '.*' cannot be read \(it ends at byte \d+\)"):
        load_params(tmp_path, arch)


def test_a_language_model_on_a_mesh(tiny_dir, tiny_lm):
    mesh = make_mesh(MeshConfig(1, 2, 2))
    split = LanguageModel.from_pretrained(str(tiny_dir), mesh=mesh)
    assert split.params["blocks"]["up"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    ids = np.arange(3, 19).reshape(2, 8)
    np.testing.assert_allclose(split.logits(ids), tiny_lm.logits(ids), atol=1e-4)
