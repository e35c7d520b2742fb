"""Decoding of rows that come and go, for serving. Each row has its own length, limit, temperature and seed.

`sampling.sample` decodes a batch until all its rows have ended. Here rows stand in a table. New rows are put into free
places, all rows are advanced by a few tokens at a time, and finished rows are taken out. So a new request need not wait
for older ones. Up to rounding, a row draws the same tokens whatever other rows are in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nlae_jax.lm.sampling import categorical
from nlae_jax.lm.segments import KeyValues, row_axis, rows_of
from nlae_jax.mesh import split

# (token [R], step [R], contexts, growing) -> (logits [R, V] float32, growing).
# Feeds token number `step` of each row's response.
RowStep = Callable[[jax.Array, jax.Array, Any, Any], tuple[jax.Array, Any]]


class RowTable(NamedTuple):
    """A table of R rows with room for C tokens each.

    `logits` [R, V] float32 are those of each row's next token. `tokens` [R, C] int32 are the tokens drawn so far, and
    `steps` [R] int32 their number. `limit` [R] int32, `temperature` [R] float32 and `seed` [R] uint32 are the row's
    settings. Rows that are `done` [R] bool are not advanced: they ended with the closing tag, an end of sequence or
    their limit, or the place is free. `contexts` and `growing` are keys and values as in `transformer.Decoding`.
    """

    logits: jax.Array
    tokens: jax.Array
    steps: jax.Array
    limit: jax.Array
    temperature: jax.Array
    seed: jax.Array
    done: jax.Array
    contexts: Any
    growing: Any


def put(rows: RowTable, new: RowTable, places: jax.Array) -> RowTable:
    """Puts the rows of `new` into the table at `places` [B] int32. A row whose place is R or more is dropped.

    The rows of `new` have drawn no token yet. Contexts with a batch axis are replaced; a constant context stays. Only
    the positions of `growing` are replaced. Keys that an earlier row left there have later positions than the new row's
    queries, until the new row overwrites them. The new row's first token begins with the state of its contexts.
    """

    def at(old: jax.Array, fresh: jax.Array, axis: int = 0) -> jax.Array:
        index = (*[slice(None)] * axis, places)
        return old.at[index].set(fresh.astype(old.dtype), mode="drop")

    def keys(old: KeyValues, fresh: KeyValues) -> KeyValues:
        if old.positions.ndim == 1:  # the context is the constant prompt
            return old
        axis = row_axis(old)
        each = lambda part, fresh, axis: jax.tree.map(lambda a, b: at(a, b, axis), part, fresh)  # noqa: E731
        return KeyValues(
            each(old.k, fresh.k, axis),
            each(old.v, fresh.v, axis),
            at(old.positions, fresh.positions),
            at(old.valid, fresh.valid),
            each(old.state, fresh.state, axis - 1),
            each(old.global_kv, fresh.global_kv, axis),
        )

    is_keys = lambda x: isinstance(x, KeyValues)  # noqa: E731
    positions = lambda old, fresh: old._replace(positions=at(old.positions, fresh.positions))  # noqa: E731
    return RowTable(
        logits=at(rows.logits, new.logits),
        tokens=rows.tokens,
        steps=at(rows.steps, new.steps),
        limit=at(rows.limit, new.limit),
        temperature=at(rows.temperature, new.temperature),
        seed=at(rows.seed, new.seed),
        done=at(rows.done, new.done),
        contexts=jax.tree.map(keys, rows.contexts, new.contexts, is_leaf=is_keys),
        growing=jax.tree.map(positions, rows.growing, new.growing, is_leaf=is_keys),
    )


def resized(rows: RowTable, kept: jax.Array, capacity: int) -> RowTable:
    """Returns a table of the rows at `kept` [R'] int32, with room for `capacity` tokens. -1 makes a free place."""
    index = jnp.maximum(kept, 0)

    def room(x: jax.Array, axis: int) -> jax.Array:
        size = x.shape[axis]
        if size >= capacity:
            return jax.lax.slice_in_dim(x, 0, capacity, axis=axis)
        return jnp.pad(x, [(0, capacity - size if axis == n else 0) for n in range(x.ndim)])

    def widened(kv: KeyValues) -> KeyValues:
        kv = rows_of(kv, index)
        positions = kv.positions[:, :1] + jnp.arange(capacity, dtype=jnp.int32)
        k, v, wide = jax.tree.map(lambda x: room(x, x.ndim - 2), (kv.k, kv.v, kv.global_kv))
        return KeyValues(k, v, positions, jnp.ones(positions.shape, bool), kv.state, wide)

    is_keys = lambda x: isinstance(x, KeyValues)  # noqa: E731
    return RowTable(
        logits=rows.logits[index],
        tokens=room(rows.tokens[index], 1),
        steps=rows.steps[index],
        limit=rows.limit[index],
        temperature=rows.temperature[index],
        seed=rows.seed[index],
        done=rows.done[index] | (kept < 0),
        contexts=jax.tree.map(lambda kv: rows_of(kv, index), rows.contexts, is_leaf=is_keys),
        growing=jax.tree.map(widened, rows.growing, is_leaf=is_keys),
    )


def spread(rows: RowTable, mesh: Mesh) -> RowTable:
    """Splits the rows of a table over devices, and keys, values and states over heads too, inside a jitted function.

    Functions that return tables end with this. Left to itself, XLA returns new tables whole and advanced ones split, so
    that every function that takes tables would be compiled for both. A constant context stays as it is.
    """

    def over(x: jax.Array, axes: dict[int, str]) -> jax.Array:
        spec = [axes.get(n) and split(mesh, axes[n], length) for n, length in enumerate(x.shape)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def keys(kv: KeyValues) -> KeyValues:
        if kv.positions.ndim == 1:
            return kv
        axis = row_axis(kv)
        k, v, wide = jax.tree.map(lambda x: over(x, {axis - 1: "kv_heads", axis: "batch"}), (kv.k, kv.v, kv.global_kv))
        state = kv.state
        if state is not None:
            tails = jax.tree.map(lambda x: over(x, {axis - 1: "batch", x.ndim - 1: "heads"}), state.tails)
            state = state._replace(tails=tails, memory=over(state.memory, {axis - 1: "batch", axis: "heads"}))
        return KeyValues(k, v, over(kv.positions, {0: "batch"}), over(kv.valid, {0: "batch"}), state, wide)

    return jax.tree.map(
        lambda part: keys(part) if isinstance(part, KeyValues) else over(part, {0: "batch"}),
        rows,
        is_leaf=lambda part: isinstance(part, KeyValues),
    )


def advance(
    decode: RowStep, rows: RowTable, count: jax.Array, closing: Sequence[int], stops: Sequence[int]
) -> RowTable:
    """Draws up to `count` more tokens in each row that is not done.

    A row is done after the `closing` tokens (if any), after one of `stops`, or at its limit. At temperature 0, and at
    those that float32 rounds to 0, each token is the likeliest one.
    """
    closing_ids, stop_ids = jnp.asarray(closing, jnp.int32), jnp.asarray(stops, jnp.int32)
    number = jnp.arange(rows.steps.shape[0])

    def draw(rows: RowTable) -> jax.Array:
        greedy = rows.temperature < jnp.finfo(jnp.float32).tiny
        heat = jnp.where(greedy, 1.0, rows.temperature)[:, None]
        # The largest logit is subtracted, so that a quotient can only overflow to -inf.
        heated = (rows.logits - rows.logits.max(-1, keepdims=True)) / heat
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.PRNGKey(seed), step))(rows.seed, rows.steps)
        uniform = jax.vmap(jax.random.uniform)(keys)
        return jnp.where(greedy, jnp.argmax(rows.logits, -1), categorical(uniform, heated)).astype(jnp.int32)

    def body(state: tuple[jax.Array, RowTable]) -> tuple[jax.Array, RowTable]:
        turn, rows = state
        going = ~rows.done
        token = draw(rows)
        # The place of a row that is done is beyond the end, which drops its token.
        place = jnp.where(going, rows.steps, rows.tokens.shape[1])
        tokens = rows.tokens.at[number, place].set(token, mode="drop")
        steps = rows.steps + going
        ended = (token[:, None] == stop_ids).any(-1) | (steps >= rows.limit)
        if len(closing):
            start = steps - len(closing)
            window = jnp.take_along_axis(tokens, jnp.maximum(start, 0)[:, None] + jnp.arange(len(closing)), axis=1)
            ended = ended | ((window == closing_ids).all(-1) & (start >= 0))
        logits, growing = decode(token, jnp.minimum(rows.steps, tokens.shape[1] - 1), rows.contexts, rows.growing)
        rows = rows._replace(
            logits=jnp.where(going[:, None], logits, rows.logits),
            tokens=tokens,
            steps=steps,
            done=rows.done | ended,
            growing=growing,
        )
        return turn + 1, rows

    going = lambda state: (state[0] < count) & ~state[1].done.all()  # noqa: E731
    return jax.lax.while_loop(going, body, (jnp.zeros((), jnp.int32), rows))[1]
