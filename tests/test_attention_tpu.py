"""The fused attention kernels through the real TPU compiler, which runs without a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from nlae_jax.lm import attention_kernel
from nlae_jax.lm.attention import attend
from nlae_jax.lm.segments import KeyValues
from nlae_jax.mesh import AXES, batch_sharding, replicated
from nlae_jax.plan.chips import nothing_kept, open_topology

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Activations, samples of each, lengths of prefix, activation and response, heads, key heads, head size, cap, window.
SHAPES = {
    "SmolLM2-135M": (4, 8, (95, 30, 48), 9, 3, 64, 0.0, False),
    "Qwen2.5-7B": (16, 8, (95, 30, 150), 28, 4, 128, 0.0, False),
    "Gemma-3-27B": (16, 8, (95, 30, 150), 32, 16, 128, 0.0, True),
    "Gemma-2-9B": (16, 8, (95, 30, 150), 16, 8, 256, 50.0, True),
}


@pytest.fixture(autouse=True)
def _not_kept():
    """Programs of devices that are not here cannot be read back from the cache."""
    with nothing_kept():
        yield


@pytest.fixture(scope="module")
def devices():
    """Four devices of a generation."""
    return lambda kind: open_topology(TOPOLOGIES[kind]).devices


def gradient(implementation, shape, dtype, sharding, rows):
    """The compiled forward and backward pass; `rows` is the sharding of what has batch axes."""
    batch, group, lengths, heads, kv_heads, head_dim, softcap, windowed = shape
    batches = ((), (batch,), (batch, group))

    def of(axes, tail, dtype):
        return jax.ShapeDtypeStruct((*axes, *tail), dtype, sharding=rows if axes else sharding)

    def keys(axes, tail):
        spec = getattr(rows, "spec", None)
        split = NamedSharding(rows.mesh, PartitionSpec(None, *spec)) if axes and spec else sharding
        return jax.ShapeDtypeStruct((kv_heads, *axes, *tail), dtype, sharding=split)

    q = of(batches[-1], (lengths[-1], heads, head_dim), dtype)
    segments = [
        KeyValues(
            *[keys(axes, (length, head_dim))] * 2,
            of(axes, (length,), jnp.int32),
            of(axes, (length,), bool),
        )
        for axes, length in zip(batches, lengths, strict=True)
    ]
    window = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding) if windowed else None

    def run(q, segments, window, cotangent):
        def out(q, keys, values):
            given = [kv._replace(k=k, v=v) for kv, k, v in zip(segments, keys, values, strict=True)]
            return attend(q, segments[-1].positions, given, None, softcap, window, implementation)

        made, pull = jax.vjp(out, q, [kv.k for kv in segments], [kv.v for kv in segments])
        return made, pull(cotangent)

    return jax.jit(run).lower(q, segments, window, q).compile()


@pytest.mark.parametrize("kind", TOPOLOGIES)
@pytest.mark.parametrize("name", SHAPES)
def test_it_compiles_for_tpus(devices, kind, name):
    one = SingleDeviceSharding(devices(kind)[0])
    dtype = jnp.float32 if name == "SmolLM2-135M" else jnp.bfloat16
    program = gradient("pallas", SHAPES[name], dtype, one, one)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2


def test_scores_do_not_reach_main_memory(devices):
    one = SingleDeviceSharding(devices("v5e")[0])
    plain, fused = (gradient(n, SHAPES["Qwen2.5-7B"], jnp.bfloat16, one, one) for n in ("xla", "pallas"))
    assert fused.cost_analysis()["bytes accessed"] < plain.cost_analysis()["bytes accessed"] / 5
    assert fused.memory_analysis().temp_size_in_bytes < plain.memory_analysis().temp_size_in_bytes / 2


def test_it_is_split_over_tpus(devices):
    mesh = Mesh(np.array(devices("v5p")).reshape(2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    program = gradient("pallas", SHAPES["Qwen2.5-7B"], jnp.bfloat16, replicated(mesh), batch_sharding(mesh))
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert "all-reduce" in text  # of the prefix's gradients
    half = SHAPES["Qwen2.5-7B"][0] // 2
    assert f"bf16[{half * 8}," in text


def test_as_many_keys_as_there_is_room_for(devices):
    """What `fits` lets through compiles, and a little more is refused."""
    one = SingleDeviceSharding(devices("v5e")[0])
    for heads, kv_heads, head_dim in ((8, 8, 256), (32, 4, 128), (16, 16, 64)):
        lengths = [n for n in range(128, 2**16, 128) if fitting(n, heads, kv_heads, head_dim)]
        assert len(lengths) * 128 == lengths[-1]
        gradient(
            "pallas", (1, 1, (16, 16, lengths[-1] - 32), heads, kv_heads, head_dim, 0.0, False), jnp.float32, one, one
        )


def fitting(keys, heads, kv_heads, head_dim):
    q = jax.ShapeDtypeStruct((1, keys, heads, head_dim), jnp.float32)
    k = jax.ShapeDtypeStruct((kv_heads, 1, keys, head_dim), jnp.float32)
    return attention_kernel.fits(q, [KeyValues(k, k, None, None)])
