"""Gated DeltaNet (Yang et al. 2025, "Gated Delta Networks: Improving Mamba2 with Delta Rule"), a linear attention.

Each head keeps a matrix S that maps keys to values. At each token S decays, is corrected so that it maps the token's
key k closer to the token's value v, and is read with the token's query q:

    S ← exp(g) · S,    S ← S + k (β (v - Sᵀ k))ᵀ,    out = Sᵀ q

One segment of tokens passes this state on to the next. Padding does not change the state.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nlae_jax.lm.arch import DeltaNet
from nlae_jax.lm.norms import rms_norm
from nlae_jax.lm.products import einsum
from nlae_jax.lm.segments import DeltaState

CHUNK = 64

# The name of a linear layer -> its output for the block's input.
Product = Callable[[str], jax.Array]


def mix(
    delta: DeltaNet,
    eps: float,
    weights: dict[str, jax.Array],
    product: Product,
    x: jax.Array,
    valid: jax.Array,
    state: DeltaState,
) -> tuple[jax.Array, DeltaState]:
    """Computes the input [*batch, T, value_heads · value_dim] of the matrix "delta_o", and the state after the segment.

    x: [*batch, T, d], `valid`: [*batch, T] bool. Padding stands before or after a row's tokens, not between them.
    `state` is the state before the segment; its rows are the batch axes as one.
    """
    batch, length = x.shape[:-2], x.shape[-2]
    rows = state.memory.shape[0]
    valid = valid.reshape(rows, length)
    mixed, tails = [], []
    for name, tail in zip(("delta_q", "delta_k", "delta_v"), state.tails, strict=True):
        flat = product(name).reshape(rows, length, -1)
        out, tail = convolved(flat, weights[f"{name}_conv"], tail, valid)
        mixed.append(out.astype(jnp.float32))
        tails.append(tail)
    heads = lambda y, count: y.reshape(rows, length, count, -1)  # noqa: E731
    q, k = (_unit(heads(y, delta.key_heads)) for y in mixed[:2])
    v = heads(mixed[2], delta.value_heads)
    narrow = lambda name: einsum("...i,io->...o", x, weights[name]).reshape(rows, length, -1)  # noqa: E731
    step = jax.nn.sigmoid(narrow("delta_b").astype(jnp.float32))
    time = jax.nn.softplus(narrow("delta_a").astype(jnp.float32) + weights["delta_bias"].astype(jnp.float32))
    log_decay = -jnp.exp(weights["delta_rate"].astype(jnp.float32)) * time
    step, log_decay = (jnp.where(valid[..., None], y, 0.0) for y in (step, log_decay))
    rule = token_by_token if length == 1 else in_chunks
    out, memory = rule(q * delta.key_dim**-0.5, k, v, log_decay, step, state.memory)
    out = rms_norm(out, weights["delta_norm"], eps)
    gate = jax.nn.silu(product("delta_z").astype(jnp.float32)).reshape(out.shape)
    out = (out * gate).astype(x.dtype).reshape(*batch, length, -1)
    return out, DeltaState((tails[0], tails[1], tails[2]), memory)


def _unit(x: jax.Array) -> jax.Array:
    """Scales vectors to length 1. A zero vector stays zero."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


def convolved(x: jax.Array, weight: jax.Array, tail: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes SiLU of a causal convolution of each channel, like x, and the `tail` for the next segment.

    x: [rows, T, channels]; `weight`: [width, channels], whose last entry is that of the token itself; `tail`: [rows,
    width - 1, channels], the inputs right before the first valid token, wherever padding puts that token.
    """
    length, before = x.shape[1], tail.shape[1]
    first = jnp.argmax(valid, axis=1)[:, None]  # 0 in a row without tokens
    tail = tail.astype(x.dtype)
    inputs = jnp.pad(jnp.where(valid[..., None], x, 0), ((0, 0), (before, 0), (0, 0)))
    column = jnp.arange(length + before)
    for number in range(before):
        inputs = jnp.where((column == first + number)[..., None], tail[:, number, None], inputs)
    out = sum(
        inputs[:, number : number + length].astype(jnp.float32) * weight[number].astype(jnp.float32)
        for number in range(before + 1)
    )
    end = first + valid.sum(1, keepdims=True) + jnp.arange(before)
    return jax.nn.silu(out).astype(x.dtype), jnp.take_along_axis(inputs, end[..., None], axis=1)


def token_by_token(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, step: jax.Array, memory: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the delta rule as it is defined, token by token, in float32.

    q, k: [rows, T, key_heads, key_dim]; v: [rows, T, value_heads, value_dim]; `log_decay` (g) and `step` (β): [rows, T,
    value_heads]; `memory` (S): [rows, value_heads, key_dim, value_dim]. Returns the output, of v's shape, and the
    memory after the tokens.
    """
    q, k = (_per_value_head(x, v.shape[2]) for x in (q, k))

    def body(memory: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, log_decay, step = token
        memory = memory * jnp.exp(log_decay)[..., None, None]
        missing = (v - einsum("nhkv,nhk->nhv", memory, k)) * step[..., None]
        memory = memory + k[..., None] * missing[..., None, :]
        return memory, einsum("nhkv,nhk->nhv", memory, q)

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, log_decay, step))
    memory, out = jax.lax.scan(body, memory, tokens)
    return jnp.moveaxis(out, 0, 1), memory


def in_chunks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    step: jax.Array,
    memory: jax.Array,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Computes `token_by_token` by products over chunks of tokens.

    The formulas are those of Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
    Length". Inside a chunk the corrections u of its tokens solve a triangular system: u_i = β_i (v_i - e^{G_i} S₀ᵀ k_i
    - Σ_{j<i} e^{G_i - G_j} (k_i·k_j) u_j), with S₀ the memory before the chunk and G the summed logarithms of decay.
    The system is solved for all chunks at once, for the part without S₀ and for the factor of S₀.
    """
    length = v.shape[1]
    chunk = min(chunk, length)
    q, k = (_per_value_head(x, v.shape[2]) for x in (q, k))
    q, k, v, log_decay, step = (_chunks(x, chunk) for x in (q, k, v, log_decay, step))  # [chunks, N, H, C, ...]
    summed = jnp.cumsum(log_decay, -1)
    row, column = jnp.arange(chunk)[:, None], jnp.arange(chunk)
    # G_i - G_j as a sum of its own: in float32, the difference of two long sums loses what near tokens need.
    between = jnp.cumsum(jnp.where(row > column, log_decay[..., :, None], 0.0), -2)
    decay = jnp.exp(jnp.where(row >= column, between, -jnp.inf))
    seen = einsum("cnhik,cnhjk->cnhij", q, k) * decay
    system = jnp.where(row > column, einsum("cnhik,cnhjk->cnhij", k, k) * decay * step[..., None], 0.0)
    known = jnp.concatenate([v, k * jnp.exp(summed)[..., None]], -1) * step[..., None]
    solved = einsum("cnhij,cnhjv->cnhiv", _inverse(system), known)
    values, of_memory = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    reading = q * jnp.exp(summed)[..., None]
    writing = k * decay[..., -1, :, None]

    def body(memory: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        values, of_memory, reading, writing, seen, left = inputs
        correction = values - einsum("nhck,nhkv->nhcv", of_memory, memory)
        out = einsum("nhck,nhkv->nhcv", reading, memory) + einsum("nhij,nhjv->nhiv", seen, correction)
        memory = memory * left[..., None, None] + einsum("nhck,nhcv->nhkv", writing, correction)
        return memory, out

    memory, out = jax.lax.scan(body, memory, (values, of_memory, reading, writing, seen, jnp.exp(summed[..., -1])))
    out = jnp.moveaxis(out, (0, 3), (1, 2))  # [N, chunks, C, H, value_dim]
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length], memory


def _inverse(system: jax.Array) -> jax.Array:
    """Inverts unit lower triangular matrices [..., C, C], which are given by what stands below their diagonal.

    Doubles the inverted blocks on the diagonal: the inverse of [[P, 0], [Q, R]] is [[P⁻¹, 0], [-R⁻¹ Q P⁻¹, R⁻¹]], and
    all blocks Q of one size stand in one masked matrix. Products suit matrix units better than substitution does, and
    the gradient of `lax.linalg.triangular_solve` never ended on a CPU of two cores (jaxlib 0.10, 4 rows of 512 tokens).
    """
    length = system.shape[-1]
    row, column = jnp.arange(length)[:, None], jnp.arange(length)
    inverse, size = jnp.broadcast_to(jnp.eye(length, dtype=system.dtype), system.shape), 1
    while size < length:
        below = (row // size % 2 == 1) & (column // size == row // size - 1)
        corners = jnp.where(below, system, 0.0)
        if size > 1:  # blocks of size 1 are their own inverses
            corners = einsum("...ij,...jk->...ik", einsum("...ij,...jk->...ik", inverse, corners), inverse)
        inverse, size = inverse - corners, 2 * size
    return inverse


def _per_value_head(x: jax.Array, count: int) -> jax.Array:
    """Repeats each head of queries or keys [rows, T, key_heads, key_dim] for the value heads that it serves."""
    return jnp.repeat(x, count // x.shape[2], axis=2)


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """Splits [rows, T, heads, ...] into [chunks, rows, heads, chunk, ...], with zeros after the last token."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), (1, 3), (0, 2))
