"""Attention over segments as one fused kernel forward and one backward (Pallas, TPU).

All keys of a few hundred tokens fit into the chip's memory, so keys are not streamed. A grid step has a block of
queries and, side by side, all keys that it sees. It takes one plain softmax, which the backward pass computes again.
Scores never reach main memory, and only the inputs are kept for the backward pass. The index map finds a segment's
keys: row i of the queries reads block i // sharers. Gradients of keys are summed over the grid steps that share them.
The grid goes over key heads, then rows, then query blocks, so each key is read once per head. On devices other than
TPUs the kernels are interpreted, which is slow and meant for tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, PartitionSpec

from nlae_jax.lm.products import precision_of
from nlae_jax.mesh import split

if TYPE_CHECKING:
    from nlae_jax.lm.segments import KeyValues

_ROWS, _LANES = 16, 128  # arrays in vector memory have rows and a last axis that are multiples of these
_SCORE_BYTES = 2**21  # the most of one float32 array of scores, of which the backward pass holds about six
_KEY_NUMBERS = 2**19  # the most numbers in all keys of a head
_VMEM_BYTES = 64 * 2**20
_ABSENT = 2**30  # position of keys that no query may see
_PADDING = _ABSENT + 1  # position of keys that fill up a block
# Score of a key that the query does not see. Padding has twice that: its weight is 0 even where no key is seen.
_UNSEEN = -1e30


class _Static(NamedTuple):
    """The constants that a kernel is compiled for."""

    mesh: AbstractMesh  # of the queries
    rank: int  # number of batch axes of the queries
    ranks: tuple[int, ...]  # number of batch axes of each segment's keys
    block: int  # number of queries of a grid step, in each head that shares the keys
    blocks: int
    scale: float
    softcap: float
    windowed: bool


class _Shape(NamedTuple):
    """Sizes of one call, after splitting over devices."""

    total: int
    kv_heads: int
    repeats: int
    length: int
    head_dim: int
    width: int
    lengths: tuple[int, ...]
    sharers: tuple[int, ...]  # query rows per key row, by segment


def attend(
    q: jax.Array,
    q_positions: jax.Array,
    segments: Sequence[KeyValues],
    scale: float | None = None,
    softcap: float = 0.0,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """Computes `attention.attend` by fused kernels, with the same arguments, result and gradients, on any mesh.

    As in `attention.attend`, weights are rounded to the values' dtype before they are multiplied. Sums are float32.
    """
    *batch, length, heads, head_dim = q.shape
    kv_heads = segments[0].k.shape[0]
    lengths, width = _sizes(segments)
    blocks = -(-length // _most_queries(width, heads // kv_heads))
    block = _up(-(-length // blocks), _ROWS)
    static = _Static(
        jax.typeof(q).sharding.mesh,
        len(batch),
        tuple(kv.positions.ndim - 1 for kv in segments),
        block,
        blocks,
        head_dim**-0.5 if scale is None else float(scale),
        float(softcap),
        window is not None,
    )
    query_places = _padded(q_positions, blocks * block).reshape(*batch, blocks, 1, block)
    places = [
        _padded(jnp.where(kv.valid, kv.positions, _ABSENT), size, _PADDING)
        for kv, size in zip(segments, lengths, strict=True)
    ]
    shared = [
        jnp.broadcast_to(p.reshape(*p.shape[:-1], *[1] * (len(batch) + 1 - p.ndim), -1), (*batch, p.shape[-1]))
        for p in places
    ]
    place = _padded(jnp.concatenate(shared, -1), width, _PADDING)[..., None, :]
    limit = jnp.full(1, _ABSENT if window is None else window, jnp.int32)
    rows = q.swapaxes(-2, -3).reshape(*batch, kv_heads, heads // kv_heads, length, head_dim)
    keys, values = (tuple(jnp.moveaxis(getattr(kv, name), 0, -3) for kv in segments) for name in ("k", "v"))
    out = _fused(static, limit, _padded(query_places, _up(block, _LANES)), place, rows, keys, values)
    out = checkpoint_name(out, "attention")
    return out.reshape(*batch, heads, length, head_dim).swapaxes(-2, -3)


def fits(q: jax.Array, segments: Sequence[KeyValues]) -> bool:
    """Returns whether all keys and the smallest block of queries fit into vector memory."""
    width, repeats = _sizes(segments)[1], q.shape[-2] // segments[0].k.shape[0]
    return _most_queries(width, repeats) > 0 and width * q.shape[-1] <= _KEY_NUMBERS


def _sizes(segments: Sequence[KeyValues]) -> tuple[list[int], int]:
    """Returns the padded number of each segment's keys, and their padded sum."""
    lengths = [_up(kv.k.shape[-2], _ROWS) for kv in segments]
    return lengths, _up(sum(lengths), _LANES)


def _most_queries(width: int, repeats: int) -> int:
    """Returns the largest block of queries for which an array of scores has at most `_SCORE_BYTES`."""
    return _SCORE_BYTES // (4 * width * repeats) // _ROWS * _ROWS


def _up(size: int, multiple: int) -> int:
    """Rounds a size up to a multiple."""
    return -(-size // multiple) * multiple


def _padded(x: jax.Array, size: int, fill: int = 0) -> jax.Array:
    """Fills the last axis up to `size`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])], constant_values=fill)


# The operation: static, limit [1], at [*batch, blocks, 1, lanes], place [*batch, 1, width],
# q [*batch, kv_heads, repeats, T, head_dim], keys and values [*batch[:rank], kv_heads, length, head_dim] -> like q.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static: _Static, *operands: Any) -> jax.Array:
    return _split_over_devices(_forward, static, _flat(operands))


def _fused_forward(static: _Static, *operands: Any) -> tuple[jax.Array, Any]:
    return _fused(static, *operands), operands


def _fused_backward(static: _Static, operands: Any, gradient: jax.Array) -> tuple[Any, ...]:
    keys, values = operands[-2:]
    dq, *rest = _split_over_devices(_backward, static, (*_flat(operands), gradient))
    like = [d.astype(x.dtype) for d, x in zip(rest, (*keys, *values), strict=True)]
    return None, None, None, dq, tuple(like[: len(keys)]), tuple(like[len(keys) :])


_fused.defvjp(_fused_forward, _fused_backward)


def _flat(operands: Any) -> tuple[jax.Array, ...]:
    *rest, keys, values = operands
    return (*rest, *keys, *values)


def _split_over_devices(function: Callable[..., Any], static: _Static, operands: tuple[jax.Array, ...]) -> Any:
    """Runs `function` on the rows and key heads of each device. Gradients of keys that devices share are summed.

    An axis that the devices do not divide stays whole, and all of them compute it.
    """
    mesh = static.mesh
    if mesh.size < 2:
        return function(static, *operands)
    q, *rest = operands[3:]
    gradient = rest[2 * len(static.ranks) :]
    rows = split(mesh, "batch", q.shape[0]) if static.rank else None
    heads = split(mesh, "kv_heads", q.shape[static.rank])

    def spec(rank: int, *tail: Any) -> PartitionSpec:
        return PartitionSpec(*[rows, *[None] * rank][:rank], *tail)

    key_specs = [spec(rank, heads) for rank in static.ranks * 2]
    like_q = spec(static.rank, heads)

    def local(*operands: jax.Array) -> Any:
        results = function(static, *operands)
        if not gradient or rows is None:
            return results
        shared = [
            jax.lax.psum(d, rows) if rank == 0 else d for d, rank in zip(results[1:], static.ranks * 2, strict=True)
        ]
        return results[0], *shared

    in_specs = (PartitionSpec(), spec(static.rank), spec(static.rank), like_q, *key_specs, *[like_q] * len(gradient))
    out_specs = (like_q, *key_specs) if gradient else like_q
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*operands)


def _forward(static: _Static, *operands: jax.Array) -> jax.Array:
    limit, rows, shape = _rows(static, operands)
    out = jax.ShapeDtypeStruct(rows[2].shape, rows[2].dtype)
    return _call(_forward_kernel, static, shape, out, rows)(limit, *rows).reshape(operands[3].shape)


def _backward(static: _Static, *operands: jax.Array) -> tuple[jax.Array, ...]:
    limit, rows, shape = _rows(static, operands[:-1])
    unshared = [rank == static.rank and static.blocks == 1 for rank in static.ranks] * 2
    dtypes = [x.dtype if a else jnp.float32 for x, a in zip(rows[3:], unshared, strict=True)]
    out = [jax.ShapeDtypeStruct(rows[2].shape, rows[2].dtype)]
    out += [jax.ShapeDtypeStruct(x.shape, dtype) for x, dtype in zip(rows[3:], dtypes, strict=True)]
    rows.append(operands[-1].reshape(rows[2].shape))
    gradients = _call(_backward_kernel, static, shape, out, rows)(limit, *rows)
    return tuple(x.reshape(like.shape) for x, like in zip(gradients, operands[3:-1], strict=True))


def _rows(static: _Static, operands: Sequence[jax.Array]) -> tuple[jax.Array, list[jax.Array], _Shape]:
    """Returns the window, the other operands with their batch axes as one, and the sizes."""
    limit, *rest = operands
    rank = static.rank
    rows = [x.reshape(-1, *x.shape[r:]) for x, r in zip(rest, (*[rank] * 3, *static.ranks * 2), strict=True)]
    _, place, q, *kv = rows
    keys = kv[: len(static.ranks)]
    lengths, sharers = tuple(k.shape[2] for k in keys), tuple(q.shape[0] // k.shape[0] for k in keys)
    total, kv_heads, repeats, length, head_dim = q.shape
    return limit, rows, _Shape(total, kv_heads, repeats, length, head_dim, place.shape[-1], lengths, sharers)


def _call(
    kernel: Callable[..., None], static: _Static, shape: _Shape, out: Any, rows: Sequence[jax.Array]
) -> Callable[..., Any]:
    """Returns the kernel on a grid of key heads, rows and query blocks. It is compiled on a TPU, else interpreted.

    The last block of an axis may reach beyond the axis. Values that are read there are undefined, and values that are
    written there are dropped.
    """
    queries = pl.BlockSpec((None, None, shape.repeats, static.block, shape.head_dim), lambda h, i, j: (i, h, 0, j, 0))
    keys = [
        pl.BlockSpec(
            (None, None, _up(length, _ROWS), shape.head_dim),
            lambda h, i, j, sharers=sharers: (jax.lax.div(i, sharers), h, 0, 0),
        )
        for length, sharers in zip(shape.lengths, shape.sharers, strict=True)
    ] * 2
    backward = isinstance(out, list)
    order: Literal["arbitrary", "parallel"] = "arbitrary" if backward else "parallel"
    moved = sum(x.size * x.dtype.itemsize for x in (*rows, *jax.tree.leaves(out)))
    products = 5 if backward else 2
    scores = shape.kv_heads * shape.total * shape.repeats * static.block * static.blocks * shape.width
    arguments = dict(
        grid=(shape.kv_heads, shape.total, static.blocks),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((None, None, 1, _up(static.block, _LANES)), lambda h, i, j: (i, j, 0, 0)),
            pl.BlockSpec((None, 1, shape.width), lambda h, i, j: (i, 0, 0)),
            queries,
            *keys,
            *([queries] if backward else []),
        ],
        out_specs=[queries, *keys] if backward else queries,
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", order, order), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * shape.head_dim,
            transcendentals=scores,
            bytes_accessed=moved,
        ),
    )
    body = functools.partial(kernel, static, shape)
    compiled, interpreted = (pl.pallas_call(body, interpret=i, **arguments) for i in (False, True))
    return lambda *operands: jax.lax.platform_dependent(*operands, tpu=compiled, default=interpreted)


class _Softmax(NamedTuple):
    """The softmax of one block of queries: `weights` are exponentials, which `sums` normalise. All are float32."""

    seen: jax.Array  # [1, block, width]
    weights: jax.Array  # [repeats, block, width]
    sums: jax.Array  # [repeats, block, 1]
    slope: jax.Array | float  # derivative of the scores by the products of queries and keys


def _softmax(
    static: _Static, shape: _Shape, limit_ref: Any, at_ref: Any, place_ref: Any, q: jax.Array, k: jax.Array
) -> _Softmax:
    scores = _product(q, k, 1, 1).reshape(shape.repeats, static.block, shape.width) * static.scale
    slope: jax.Array | float = static.scale
    if static.softcap:
        squashed = jnp.tanh(scores / static.softcap)
        scores, slope = static.softcap * squashed, static.scale * (1 - squashed * squashed)
    # In main memory positions lie along the lanes, because a column would be padded to 128 times its size.
    at = jnp.broadcast_to(at_ref[...], (_LANES, at_ref.shape[-1])).T[: static.block, :1]
    place = place_ref[...]
    age = at - place
    seen = age >= 0
    if static.windowed:
        seen &= age < limit_ref[0]
    unseen = jnp.where(place == _PADDING, 2 * _UNSEEN, _UNSEEN)
    scores = jnp.where(seen[None], scores, unseen[None])
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return _Softmax(seen[None], weights, weights.sum(-1, keepdims=True), slope)


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Multiplies two arrays and sums over one axis of each, in float32."""
    axes = ((axis_a,), (axis_b,)), ((), ())
    return jax.lax.dot_general(a, b, axes, precision_of(a, b), preferred_element_type=jnp.float32)


def _within(x: jax.Array, count: jax.Array | int) -> jax.Array:
    """Replaces the rows after the first `count` by zeros, because values beyond an array's end may be NaN."""
    if isinstance(count, int) and count >= x.shape[-2]:
        return x
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 2) < count, x, jnp.zeros_like(x))


def _side_by_side(refs: Sequence[Any], shape: _Shape) -> jax.Array:
    """Joins all segments' keys (or values) to [width, head_dim], filled up with zeros."""
    parts = [_within(ref[...], length) for ref, length in zip(refs, shape.lengths, strict=True)]
    missing = shape.width - sum(part.shape[0] for part in parts)
    return jnp.concatenate([*parts, *([jnp.zeros((missing, shape.head_dim), parts[0].dtype)] if missing else [])])


def _queries(ref: Any, static: _Static, shape: _Shape) -> jax.Array:
    """Returns a block of queries, [repeats · block, head_dim], with zeros beyond the end."""
    whole = shape.length == static.block * static.blocks
    count = shape.length if whole else shape.length - pl.program_id(2) * static.block
    x = ref[...] if whole else _within(ref[...], count)
    return x.reshape(shape.repeats * static.block, shape.head_dim)


def _forward_kernel(
    static: _Static, shape: _Shape, limit_ref: Any, at_ref: Any, place_ref: Any, q_ref: Any, *refs: Any
) -> None:
    *kv, out_ref = refs
    count = len(shape.lengths)
    q, k, v = _queries(q_ref, static, shape), _side_by_side(kv[:count], shape), _side_by_side(kv[count:], shape)
    softmax = _softmax(static, shape, limit_ref, at_ref, place_ref, q, k)
    mixed = _product(_flattened(softmax.weights).astype(v.dtype), v, 1, 0).reshape(out_ref.shape)
    out_ref[...] = (mixed / softmax.sums).astype(out_ref.dtype)


def _flattened(x: jax.Array) -> jax.Array:
    """Joins the first two axes: [repeats, block, n] -> [repeats · block, n]."""
    return x.reshape(-1, x.shape[-1])


def _backward_kernel(
    static: _Static, shape: _Shape, limit_ref: Any, at_ref: Any, place_ref: Any, q_ref: Any, *refs: Any
) -> None:
    count = len(shape.lengths)
    key_refs, value_refs, rest = refs[:count], refs[count : 2 * count], refs[2 * count :]
    gradient_ref, dq_ref, dk_refs, dv_refs = rest[0], rest[1], rest[2 : 2 + count], rest[2 + count :]
    q, gradient = _queries(q_ref, static, shape), _queries(gradient_ref, static, shape)
    k, v = _side_by_side(key_refs, shape), _side_by_side(value_refs, shape)
    softmax = _softmax(static, shape, limit_ref, at_ref, place_ref, q, k)
    weights = softmax.weights / softmax.sums
    by_weight = _product(gradient, v, 1, 1).reshape(weights.shape)
    by_score = weights * (by_weight - (weights * by_weight).sum(-1, keepdims=True))
    by_product = _flattened(jnp.where(softmax.seen, by_score * softmax.slope, 0.0)).astype(q.dtype)
    dq_ref[...] = _product(by_product, k, 1, 0).reshape(dq_ref.shape).astype(dq_ref.dtype)
    dk, dv = _product(by_product, q, 0, 0), _product(_flattened(weights).astype(v.dtype), gradient, 0, 0)

    row, block, start = pl.program_id(1), pl.program_id(2), 0
    for dk_ref, dv_ref, sharers in zip(dk_refs, dv_refs, shape.sharers, strict=True):
        rows = slice(start, start + dk_ref.shape[0])
        start = rows.stop
        if sharers * static.blocks == 1:
            dk_ref[...], dv_ref[...] = dk[rows].astype(dk_ref.dtype), dv[rows].astype(dv_ref.dtype)
            continue

        @pl.when((jax.lax.rem(row, sharers) == 0) & (block == 0))
        def _(dk_ref: Any = dk_ref, dv_ref: Any = dv_ref) -> None:
            dk_ref[...], dv_ref[...] = jnp.zeros_like(dk_ref), jnp.zeros_like(dv_ref)

        dk_ref[...] += dk[rows]
        dv_ref[...] += dv[rows]
