"""Module texts as compilers write them: shapes with layouts, nested parentheses, attributes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.plan.hlo import Array, arrays, bits, parse

TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=8

%inner (p.0: bf16[8,128], p.1: s32[]) -> (bf16[8,128], /*index=1*/f32[]) {
  %p.0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1), metadata={op_name="jit(f)/a(b)/c"}
  %two = f32[] constant(2)
  ROOT %t = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]) tuple(%p.0, %two)
}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[] constant(3)
  %f = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[]) fusion(%x, %i), kind=kLoop, calls=%inner, metadata={op_name="a"}
  ROOT %g = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%f), index=0
}
"""


def test_a_module_is_read():
    module = parse(TEXT)
    assert (module.entry, set(module.computations)) == ("main", {"inner", "main"})
    fusion = module.computations["main"].instructions["f"]
    assert fusion.opcode == "fusion"
    assert fusion.operands == ("x", "i")
    assert fusion.called == {"calls": "inner"}
    assert fusion.outputs == (Array("bf16", (8, 128), 1), Array("f32", ()))
    inner = module.computations["inner"]
    assert inner.root.name == "t"
    assert [inner.parameters[number].name for number in (0, 1)] == ["p.0", "p.1"]
    assert [user.name for user in inner.users["p.0"]] == ["t"]
    assert inner.instructions["two"].operand_text == "2"


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        parse("nothing of the kind")


def test_attributes():
    line = "%d = f32[4,4]{1,0} dot(%a, %b), lhs_contracting_dims={1,2}, rhs_contracting_dims={0}"
    dot = parse(f"ENTRY %e () -> f32[] {{\n  {line}\n}}\n").computations["e"].instructions["d"]
    assert dot.dims("lhs_contracting_dims") == (1, 2)
    assert dot.dims("lhs_batch_dims") == ()


@pytest.mark.parametrize(
    ("dtype", "size"), [("bf16", 16), ("f32", 32), ("pred", 8), ("s4", 4), ("f8e4m3fn", 8), ("c64", 64), ("token", 0)]
)
def test_bits(dtype, size):
    assert bits(dtype) == size


SHAPES = st.lists(st.tuples(st.sampled_from(["f32", "bf16", "s8"]), st.lists(st.integers(0, 300), max_size=4)))


@given(SHAPES)
def test_tuples_of_arrays(shapes):
    text = ", ".join(
        f"/*index={i}*/{dtype}[{','.join(map(str, dims))}]{{0:T(8)}}" for i, (dtype, dims) in enumerate(shapes)
    )
    assert arrays(f"({text})") == tuple(Array(dtype, tuple(dims)) for dtype, dims in shapes)
