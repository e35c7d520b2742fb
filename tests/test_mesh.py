"""Meshes on eight fake devices: sizes, what is split over which axis, and what stays whole."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nlae_jax.config import MeshConfig
from nlae_jax.lm.arch import model_weights
from nlae_jax.lm.lora import adapter_weights
from nlae_jax.mesh import (
    AXES,
    Weight,
    batch_parts,
    batch_sharding,
    make_mesh,
    place,
    replicated,
    tree_shardings,
    weight_sharding,
)
from nlae_jax.runtime.errors import UserError

MATRIX = Weight((2, 64, 32), ("layers", "embed", "heads"), 64)


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 1, 1), (1, 1, 1)),
        ((2, 2, 2), (2, 2, 2)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 8, -1), (1, 8, 1)),
        ((1, 2, 1), (1, 2, 1)),  # fewer than there are
    ],
)
def test_sizes(sizes, expected):
    mesh = make_mesh(MeshConfig(*sizes))
    assert tuple(mesh.shape[axis] for axis in AXES) == expected
    assert batch_parts(mesh) == expected[0] * expected[1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, -1, 1), "data 3×fsdp -1×tensor 1 does not fit 8 devices: 3 does not divide 8"),
        ((16, -1, 1), "16 does not divide 8"),
        ((4, 4, 1), "needs 16 devices, this machine has 8"),
        ((-1, -1, 1), "at most one is -1"),
        ((0, 1, 1), "sizes are positive"),
        ((1, -2, 1), "sizes are positive"),
    ],
)
def test_sizes_that_do_not_work_are_named(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(*sizes))


def test_weights_are_split_by_the_rules():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert weight_sharding(mesh, MATRIX).spec == PartitionSpec(None, "fsdp", "tensor")
    vocabulary = Weight((48, 64), ("vocab", "embed"), 64)
    assert weight_sharding(mesh, vocabulary).spec == PartitionSpec("tensor", "fsdp")
    assert weight_sharding(mesh, Weight((64,), ("norm",))).spec == PartitionSpec(None)


def test_an_axis_of_size_one_splits_nothing():
    assert weight_sharding(make_mesh(MeshConfig(8, 1, 1)), MATRIX).spec == PartitionSpec(None, None, None)


def test_a_length_that_the_devices_do_not_divide_stays_whole():
    mesh = make_mesh(MeshConfig(1, 2, 4))
    odd = Weight((2, 6, 6), ("layers", "embed", "heads"), 6)
    assert weight_sharding(mesh, odd).spec == PartitionSpec(None, "fsdp", None)


def test_matrices_into_a_block_are_split_by_column_and_out_of_it_by_row(arch):
    """Then neither attention nor the MLP needs an exchange between its two products."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    blocks = tree_shardings(mesh, model_weights(arch))["blocks"]
    assert {name: sharding.spec for name, sharding in blocks.items()} == {
        **dict.fromkeys(("q", "k", "v", "gate", "up"), PartitionSpec(None, "fsdp", "tensor")),
        **dict.fromkeys(("o", "down"), PartitionSpec(None, "tensor", "fsdp")),
        **dict.fromkeys(("attn_norm", "mlp_norm"), PartitionSpec(None, None)),
    }


def test_adapters_follow_their_matrix(arch):
    """Along its inputs and outputs; the rank stays whole."""
    adapters = tree_shardings(make_mesh(MeshConfig(2, 2, 2)), adapter_weights(arch, 4))
    assert adapters["up"]["a"].spec == PartitionSpec(None, None, "fsdp")
    assert adapters["up"]["b"].spec == PartitionSpec(None, None, "tensor")
    assert adapters["down"]["a"].spec == PartitionSpec(None, None, "tensor")


def test_placing_gives_each_device_its_part():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    values = np.arange(2 * 64 * 32, dtype=np.float32).reshape(MATRIX.shape)
    tree = place({"w": values}, tree_shardings(mesh, {"w": MATRIX}))
    assert {shard.data.shape for shard in tree["w"].addressable_shards} == {(2, 32, 16)}
    np.testing.assert_array_equal(tree["w"], values)


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    batch = jax.device_put(np.arange(24.0).reshape(8, 3), batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    constant = jax.device_put(np.ones(5), replicated(mesh))
    assert {shard.data.shape for shard in constant.addressable_shards} == {(5,)}
