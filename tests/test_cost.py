"""What is counted in modules whose FLOPs, bytes and collectives are known exactly."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from nlae_jax.config import MeshConfig
from nlae_jax.mesh import AXES, make_mesh
from nlae_jax.plan import cost, products
from nlae_jax.plan import groups as device_groups
from nlae_jax.plan.cost import cost_of
from nlae_jax.plan.groups import axes_of
from nlae_jax.plan.hlo import parse

ONE = dict.fromkeys(AXES, 1)


def counted(function, *arguments, axes=ONE, **options):
    return cost_of(parse(jax.jit(function, **options).lower(*arguments).compile().as_text()), axes)


def array(*shape, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


@pytest.mark.parametrize("layers", [1, 7])
def test_a_scanned_product_counts_every_trip(layers):
    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    whole = counted(run, array(16, 32), array(layers, 32, 32)).total()
    assert whole.flops == 2 * layers * 16 * 32 * 32


@pytest.mark.parametrize(("precision", "passes"), [(None, 1), ("high", 3), ("highest", 6)])
def test_float32_products_take_several_passes(precision, passes):
    def run(x, weights):
        product = lambda x, w: jnp.matmul(x, w, precision=precision)  # noqa: E731
        return jax.lax.scan(lambda x, w: (jnp.tanh(product(x, w)), None), x, weights)[0]

    whole = counted(run, array(16, 32), array(7, 32, 32)).total()
    assert whole.flops == 2 * 7 * 16 * 32 * 32
    assert whole.repeated_flops == (passes - 1) * whole.flops


@pytest.mark.parametrize(("left", "right", "passes"), [("bf16", "bf16", 1), ("f32", "bf16", 3), ("f32", "f32", 6)])
def test_only_what_is_float32_takes_more_than_one_pass(left, right, passes):
    """As the TPU compiler writes products, and kernels."""
    given = f"(a: {left}[8,16], b: {right}[16,4]) -> f32[8,4] {{"
    operands = f"  %a = {left}[8,16]{{1,0}} parameter(0)\n  %b = {right}[16,4]{{1,0}} parameter(1)\n"
    precision = "dim_labels=bf_io->bf, operand_precision={highest,highest}"
    estimate = """custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"1024"}}"""
    for operation in (f"convolution(%a, %b), {precision}", f"custom-call(%a, %b), {estimate}"):
        text = f"HloModule m\n\nENTRY %main {given}\n{operands}  ROOT %c = f32[8,4]{{1,0}} {operation}\n}}\n"
        found = cost_of(parse(text), ONE)
        assert (found.flops, found.repeated_flops) == (1024, 1024 * (passes - 1))


@pytest.mark.parametrize("gradient", [False, True])
def test_a_ragged_product_counts_the_rows_that_there_are(gradient):
    """48 rows of 16, each times its expert's own 16 × 4 matrix of 8; and the gradient of the matrices."""
    sizes, rows = "%s = s32[8]{0} parameter(2)", "%a = bf16[48,16]{1,0} parameter(0)"
    if gradient:
        other, out = "%b = bf16[48,4]{1,0} parameter(1)", "bf16[8,16,4]{2,1,0}"
        dims = "lhs_contracting_dims={0}, rhs_contracting_dims={0}, lhs_ragged_dims={0}"
    else:
        other, out = "%b = bf16[8,16,4]{2,1,0} parameter(1)", "bf16[48,4]{1,0}"
        dims = "lhs_contracting_dims={1}, rhs_contracting_dims={1}, lhs_ragged_dims={0}, rhs_group_dims={0}"
    lines = [rows, other, sizes, f"ROOT %c = {out} ragged-dot(%a, %b, %s), {dims}"]
    shapes = ", ".join(line[1:].split("{")[0].replace(" =", ":") for line in lines[:3])
    body = "\n".join(f"  {line}" for line in lines)
    found = cost_of(parse(f"HloModule m\n\nENTRY %main ({shapes}) -> {out.split('{')[0]} {{\n{body}\n}}\n"), ONE)
    assert found.flops == 2 * 48 * 16 * 4


def test_loops_in_loops_multiply():
    def run(x, w):
        inner = lambda x: jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)  # noqa: E731
        return jax.lax.fori_loop(0, 3, lambda _, x: inner(x) + 1, x)

    whole = counted(run, array(8, 24), array(24, 24)).total()
    assert whole.flops == 2 * 15 * 8 * 24 * 24


def test_a_loop_that_may_end_early_has_its_bound():
    def run(x, w):
        going = lambda state: (state[0] < 11) & (state[1].sum() < 1e6)  # noqa: E731
        return jax.lax.while_loop(going, lambda state: (state[0] + 1, state[1] @ w), (0, x))

    found = counted(run, array(8, 24), array(24, 24))
    assert [(loop.trips, loop.known) for loop in found.loops] == [(11, True)]
    assert found.total().flops == 11 * 2 * 8 * 24 * 24


def test_an_unrolled_loop_has_fewer_trips():
    text = """
%body (t: (f32[8,8], s32[])) -> (f32[8,8], s32[]) {
  %t = (f32[8,8], s32[]) parameter(0)
  %x = f32[8,8] get-tuple-element(%t), index=0
  %i = s32[] get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  %k = s32[] add(%j, %one)
  %d = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}
  ROOT %r = (f32[8,8], s32[]) tuple(%d, %k)
}

%condition (t: (f32[8,8], s32[])) -> pred[] {
  %t = (f32[8,8], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=1
  %n = s32[] constant(7)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %e (t: (f32[8,8], s32[])) -> (f32[8,8], s32[]) {
  %t = (f32[8,8], s32[]) parameter(0)
  ROOT %w = (f32[8,8], s32[]) while(%t), condition=%condition, body=%body
}
"""
    assert cost_of(parse(text), ONE).total().flops == 4 * 2 * 8**3


def test_what_a_condition_reduces_does_not_bound_its_loop():
    def run(x, w):
        going = lambda state: (state[0] < 11) & ((state[1] * 97 + state[0] % 64).sum() < 1e6)  # noqa: E731
        return jax.lax.while_loop(going, lambda state: (state[0] + 1, state[1] @ w), (0, x))

    assert [loop.trips for loop in counted(run, array(8, 24), array(24, 24)).loops] == [11]


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_batched_products(batch, rows, inner, columns):
    text = f"""
ENTRY %e (a: f32[{batch},{rows},{inner}], b: f32[{batch},{inner},{columns}]) -> f32[{batch},{rows},{columns}] {{
  %a = f32[{batch},{rows},{inner}] parameter(0)
  %b = f32[{batch},{inner},{columns}] parameter(1)
  ROOT %d = f32[{batch},{rows},{columns}] dot(%a, %b), lhs_batch_dims={{0}}, lhs_contracting_dims={{2}}
}}
"""
    assert cost_of(parse(text), ONE).flops == 2 * batch * rows * inner * columns


def test_gradients_count_both_products():
    loss = lambda w, x: jnp.square(x @ w).sum()  # noqa: E731
    whole = counted(jax.grad(loss, argnums=(0, 1)), array(32, 48), array(8, 32)).total()
    assert whole.flops == 3 * 2 * 8 * 32 * 48


def naive_convolution(image, out, size, stride, before, spread, kernel_spread):
    dilated = [i % spread == 0 for i in range((image - 1) * spread + 1)]
    places = (o * stride + k * kernel_spread - before for o in range(out) for k in range(size))
    return sum(0 <= place < len(dilated) and dilated[place] for place in places)


@given(*[st.integers(1, 6)] * 4, st.integers(0, 5), st.integers(1, 4), st.integers(1, 3))
def test_windows_count_no_padding(image, out, size, stride, before, spread, kernel_spread):
    given = image, out, size, stride, before, spread, kernel_spread
    assert products._valid(*given) == naive_convolution(*given)


def test_a_batched_product_written_as_a_convolution():
    """As TPUs write it: the batch is a dimension of the window, and all but the diagonal is padding."""
    text = """
ENTRY %e (a: f32[6,8,16], b: f32[6,16,4]) -> f32[6,8,4] {
  %a = f32[6,8,16] parameter(0)
  %b = f32[6,16,4] parameter(1)
  ROOT %c = f32[6,8,4] convolution(%a, %b), window={size=6 stride=5 pad=0_0 lhs_dilate=6}, dim_labels=0bf_0io->0bf
}
"""
    assert cost_of(parse(text), ONE).flops == 2 * 6 * 8 * 16 * 4


def test_kernels_say_what_they_cost():
    text = """
ENTRY %e (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128] parameter(0)
  ROOT %k = f32[8,128] custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config": \
{"body":"TUzv(", "cost_estimate":{"flops":"640","transcendentals":"3","bytes_accessed":"77"}}}
}
"""
    found = cost_of(parse(text), ONE)
    assert (found.flops, found.kernel_flops, found.bytes) == (640, 640, 2 * 8 * 128 * 4)


def exchanged(function, sizes, spec, *shapes):
    """Collectives of a function that each device of a mesh runs on its parts, all split by one spec."""
    mesh = make_mesh(MeshConfig(*sizes))
    run = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False)
    placed = [array(*shape, sharding=NamedSharding(mesh, spec)) for shape in shapes]
    return counted(run, *placed, axes=dict(mesh.shape)).total().collectives


@pytest.mark.parametrize(
    ("axis", "sizes"), [("fsdp", (2, 4, 1)), ("fsdp", (1, 8, 1)), ("tensor", (1, 2, 4)), ("data", (2, 2, 2))]
)
def test_an_all_gather_over_one_axis(axis, sizes):
    parts = sizes[AXES.index(axis)]
    found = exchanged(lambda x: jax.lax.all_gather(x, axis, tiled=True), sizes, PartitionSpec(axis), (64, 32))
    assert found == {("all-gather", axis): (1, 64 * 32 * 4 * (parts - 1) / parts)}


def test_an_all_reduce_over_two_axes():
    found = exchanged(lambda x: jax.lax.psum(x, ("data", "fsdp")), (2, 2, 2), PartitionSpec("tensor"), (64, 32))
    assert found == {("all-reduce", "data+fsdp"): (1, 2 * 32 * 32 * 4 * 3 / 4)}


def test_a_reduce_scatter():
    scatter = lambda x: jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)  # noqa: E731
    found = exchanged(scatter, (2, 4, 1), PartitionSpec("data"), (64, 32))
    assert found == {("reduce-scatter", "fsdp"): (1, 32 * 32 * 4 * 3 / 4)}


def test_collectives_in_loops_count_every_trip():
    gather = lambda w: jax.lax.all_gather(w, "fsdp", axis=1, tiled=True)  # noqa: E731

    def run(weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ gather(w)), None), jnp.ones((16, 32)), weights)[0]

    found = exchanged(run, (2, 4, 1), PartitionSpec(None, None, "fsdp"), (5, 32, 32))
    assert found == {("all-gather", "fsdp"): (5, 5 * 32 * 32 * 4 * 3 / 4)}


def test_permutations():
    turn = partial(jax.lax.ppermute, axis_name="tensor", perm=[(i, (i + 1) % 4) for i in range(4)])
    found = exchanged(turn, (2, 1, 4), PartitionSpec("tensor"), (64, 4))
    assert found == {("collective-permute", "tensor"): (1, 16 * 4 * 4)}


@given(st.tuples(*[st.sampled_from([1, 2, 3])] * 3), st.sets(st.sampled_from(AXES)))
def test_axes_of_groups(sizes, along):
    """Groups made from the axes are told to be along those of them that have more than one device."""
    axes, numbers = dict(zip(AXES, sizes, strict=True)), np.arange(math.prod(sizes)).reshape(sizes)
    kept = [number for number, axis in enumerate(AXES) if axis not in along]
    moved = numbers.transpose(*kept, *(number for number in range(3) if number not in kept))
    groups = moved.reshape(math.prod(sizes[number] for number in kept), -1).tolist()
    assert axes_of(groups, axes) == "+".join(axis for axis in AXES if axis in along and axes[axis] > 1)


def group_of(attributes, devices=8):
    lines = "%a = f32[4] parameter(0)", f"ROOT %r = f32[4] all-reduce(%a), {attributes}"
    text = "ENTRY %e (a: f32[4]) -> f32[4] {\n  " + "\n  ".join(lines) + "\n}\n"
    return device_groups.groups_of(parse(text).computations["e"].root, devices)


def test_forms_of_groups():
    assert group_of("replica_groups={{0,1},{2,3}}, to_apply=%add") == [[0, 1], [2, 3]]
    assert group_of("replica_groups=[2,4]<=[8], to_apply=%add") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert group_of("replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert group_of("replica_groups={}, to_apply=%add", 3) == [[0, 1, 2]]
    mesh = "replica_groups=mesh['a'=2,'b'=4]"
    assert group_of(mesh + " {'a'}, to_apply=%add") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert group_of(mesh + " {'b','a'}, to_apply=%add") == [[0, 4, 1, 5, 2, 6, 3, 7]]
    assert group_of(mesh + " {'b':(1)2}, to_apply=%add") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert group_of(mesh + " {'b':(2)2}, to_apply=%add") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    in_order = mesh + ", device_ids=([4,2]T(1,0))"
    assert group_of(in_order + " {'b'}, to_apply=%add") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert group_of(in_order + " {'a'}, to_apply=%add") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="not known"):
        group_of("replica_groups=everyone, to_apply=%add")


def test_a_collective_beside_a_chain_of_products_counts_once():
    """As TPUs write it: each product of the chain hands the collective's arrays on to the next."""
    step = """
%NAME (s: f32[8,16], g: f32[32,16], a: f32[4,8]) -> (f32[4,16], f32[8,16], f32[32,16]) {
  %s = f32[8,16] parameter(0)
  %g = f32[32,16] parameter(1)
  %a = f32[4,8] parameter(2)
  %c = f32[32,16] all-gather(%s), channel_id=5, replica_groups=mesh['a'=4] {'a'}, dimensions={0}
  %d = f32[4,16] dot(%a, %s), lhs_contracting_dims={1}
  ROOT %t = (f32[4,16], f32[8,16], f32[32,16]) tuple(%d, %s, %c)
}
"""
    text = (
        step.replace("NAME", "one")
        + step.replace("NAME", "two")
        + """
ENTRY %e (s: f32[8,16], g: f32[32,16], a: f32[4,8]) -> f32[32,16] {
  %s = f32[8,16] parameter(0)
  %g = f32[32,16] parameter(1)
  %a = f32[4,8] parameter(2)
  %f = (f32[4,16], f32[8,16], f32[32,16]) fusion(%s, %g, %a), kind=kCustom, calls=%one
  %h = f32[8,16] get-tuple-element(%f), index=1
  %i = f32[32,16] get-tuple-element(%f), index=2
  %j = (f32[4,16], f32[8,16], f32[32,16]) fusion(%h, %i, %a), kind=kCustom, calls=%two
  ROOT %k = f32[32,16] get-tuple-element(%j), index=2
}
"""
    )
    found = cost_of(parse(text), {"data": 1, "fsdp": 4, "tensor": 1})
    assert found.total().collectives == {("all-gather", "fsdp"): (1, 3 * 8 * 16 * 4)}
    assert found.flops == 2 * 2 * 4 * 8 * 16
    products = 2 * (4 * 8 + 8 * 16 + 4 * 16) * 4
    assert found.bytes == products + (8 + 32) * 16 * 4


def test_copies_to_the_chip_read_main_memory_once():
    text = """
ENTRY %e (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128] parameter(0)
  %s = ((f32[8,128]), f32[2,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:2], [0:128]}
  %d = f32[2,128]{1,0:S(1)} slice-done(%s)
  %c = (f32[8,128]{1,0:S(1)}, f32[8,128], u32[]{:S(2)}) copy-start(%p)
  ROOT %r = f32[8,128]{1,0:S(1)} copy-done(%c)
}
"""
    assert cost_of(parse(text), ONE).bytes == (2 + 8) * 128 * 4


def test_a_collective_that_goes_on_beside_a_loop_counts_outside():
    def exchange(channel):
        return {channel: cost.Exchange("all-gather", "fsdp", 10.0, 0.0)}

    inner = cost.Cost(exchanges=exchange("1") | exchange("2"))
    outer = cost.Cost(exchanges=exchange("1"), loops=[cost.Loop("inner", 4, inner)])
    assert cost.Cost(loops=[cost.Loop("outer", 3, outer)]).total().collectives == {
        ("all-gather", "fsdp"): (3 + 12, (3 + 12) * 10.0)
    }


def test_a_slice_reads_what_it_takes():
    text = """
%slice (p: f32[10,64], i: s32[]) -> f32[1,64] {
  %p = f32[10,64] parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %s = f32[1,64] dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,64}
}

%update (p: f32[10,64], u: f32[1,64], i: s32[]) -> f32[10,64] {
  %p = f32[10,64] parameter(0)
  %u = f32[1,64] parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %d = f32[10,64] dynamic-update-slice(%p, %u, %i, %z)
}

ENTRY %e (p: f32[10,64], i: s32[]) -> f32[10,64] {
  %p = f32[10,64] parameter(0)
  %i = s32[] parameter(1)
  %s = f32[1,64]{1,0:S(1)} fusion(%p, %i), kind=kLoop, calls=%slice
  ROOT %u = f32[10,64] fusion(%p, %s, %i), kind=kLoop, calls=%update
}
"""
    assert (
        cost_of(parse(text), ONE).bytes == 64 * 4 + 4 + 64 * 4 + 4
    )  # the slice read, its copy on the chip written back
