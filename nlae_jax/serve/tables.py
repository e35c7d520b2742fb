"""Tables of rows on the device, of a few compiled sizes, in which explanations and completions are written.

A program is compiled for a size, and an empty row costs as much as a used one. So a table has one of `SIZES` rows and
room for one of `CAPACITIES` tokens, and changes its size as rows come, grow and go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from nlae_jax.lm.arch import Arch
from nlae_jax.lm.rows import RowTable, advance, put, resized, spread
from nlae_jax.lm.segments import bytes_of_row
from nlae_jax.lm.transformer import for_decoding
from nlae_jax.mesh import platform_of

SIZES = (1, 4, 16, 32, 64, 128, 256)
CAPACITIES = (128, 256, 1024, 4096)
_ROOM_BYTES = 3 << 29  # the most bytes of a table's keys and values, where the device does not report its memory
_ROOM_PART = 0.15  # the most of the device's memory for them, where it does
_PREFILL = 16  # rows that begin together: few, because the other rows wait for their prefill


def bucket(number: int, sizes: Sequence[int]) -> int:
    """Returns the smallest of the ascending `sizes` that has room for `number`, or the largest where none has."""
    return next((size for size in sizes if size >= number), sizes[-1])


def room_for(limit: int, most: int) -> int:
    """Returns the capacity of the table for a row of up to `limit` tokens: one of few sizes, at most `most`."""
    return min(bucket(max(limit, CAPACITIES[1]), CAPACITIES), most)


def most_rows(arch: Arch, capacity: int, itemsize: int) -> int:
    """Returns the most rows, one of `SIZES`, of a table whose rows may become `capacity` tokens long."""
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    room = _ROOM_BYTES if memory is None else int(memory * _ROOM_PART)
    row = bytes_of_row(arch, capacity, itemsize)
    return max((size for size in SIZES if size * row <= room), default=1)


class Entry(NamedTuple):
    """The beginning of a row. `source` is one row of the input of the program's prefill."""

    source: Any
    limit: int
    temperature: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Program:
    """How a role begins rows and feeds tokens. Parameters are arguments of all compiled functions.

    `prefill(variables, sources)` returns logits [B, V] and contexts. `caches(sources, capacity, dtype)` returns empty
    caches of the rows. `decode(variables, weights, token, step, contexts, growing)` feeds a token to each
    row, whose caches are `growing`.
    """

    role: nn.Module
    variables: Any
    prefill: Callable[[Any, Any], tuple[jax.Array, Any]]
    caches: Callable[[Any, int, Any], Any]
    decode: Callable[..., tuple[jax.Array, Any]]
    closing: tuple[int, ...]
    stops: tuple[int, ...]

    def compiled(self, weights: Any = None) -> Compiled:
        """Compiles the program. `weights` may be those of another compiled program with the same base model."""
        return Compiled(self, weights)


class Compiled:
    """A program's jitted functions, each compiled once for each size of a table."""

    def __init__(self, program: Program, weights: Any = None) -> None:
        self.variables, self.arch = program.variables, program.role.arch
        self._itemsize = program.variables["params"]["lm"]["embed"].dtype.itemsize
        self._most_rows: dict[int, int] = {}
        role = program.role
        on_cpu = platform_of(jax.tree.leaves(program.variables["params"])[0]) == "cpu"
        block_weights = jax.jit(lambda v: role.apply(v, method=lambda role: role.lm.block_weights()))
        # On a CPU decoding is faster with each block's weights in separate arrays; see `for_decoding`.
        self.weights: Any = None
        if on_cpu and weights is not None:
            self.weights = [(base, {}) for base, _ in weights]
        elif on_cpu:
            self.weights = block_weights(program.variables)

        sharding = program.variables["params"]["lm"]["embed"].sharding
        many = isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1
        mesh = sharding.mesh if many else None

        def laid_out(rows: RowTable) -> RowTable:
            return rows if mesh is None else spread(rows, mesh)

        def begun(variables: Any, entries: Any, used: jax.Array, capacity: int) -> RowTable:
            source, limit, temperature, seed = entries
            logits, contexts = program.prefill(variables, source)
            caches = program.caches(source, capacity, contexts[0].k.dtype)
            decoding = for_decoding(role, variables, contexts, caches)
            count = logits.shape[0]
            new = RowTable(
                logits=logits,
                tokens=jnp.zeros((count, capacity), jnp.int32),
                steps=jnp.zeros(count, jnp.int32),
                limit=limit,
                temperature=temperature,
                seed=seed,
                done=~used,
                contexts=decoding.contexts,
                growing=decoding.growing,
            )
            return laid_out(new)

        def joined(variables: Any, rows: RowTable, entries: Any, used: jax.Array, places: jax.Array) -> RowTable:
            return laid_out(put(rows, begun(variables, entries, used, rows.tokens.shape[1]), places))

        def advanced(variables: Any, weights: Any, rows: RowTable, count: jax.Array) -> RowTable:
            decode = partial(program.decode, variables, weights)
            return laid_out(advance(decode, rows, count, program.closing, program.stops))

        def moved(rows: RowTable, kept: jax.Array, capacity: int) -> RowTable:
            return laid_out(resized(rows, kept, capacity))

        self.begun = jax.jit(begun, static_argnums=3)
        self.joined = jax.jit(joined, donate_argnums=1)
        self.advanced = jax.jit(advanced, donate_argnums=2)
        self.resized = jax.jit(moved, static_argnums=2)

    def most_rows(self, capacity: int) -> int:
        """Returns the most rows of a table of this program, see the function `most_rows`."""
        if capacity not in self._most_rows:  # it is traced, which every round would wait for
            self._most_rows[capacity] = most_rows(self.arch, capacity, self._itemsize)
        return self._most_rows[capacity]


class Table:
    """The rows of one program. `longest` is the most tokens of a row, from `room_for`."""

    def __init__(self, compiled: Compiled, longest: int) -> None:
        self._compiled, self._longest, self._most = compiled, longest, compiled.most_rows(longest)
        self._rows: RowTable | None = None
        self._holders: list[Any] = []  # the holder of each place, None for a free one
        self._steps = np.zeros(0, np.int32)
        self.drawn = 0  # tokens that the last round drew in its longest row

    def __len__(self) -> int:
        return sum(holder is not None for holder in self._holders)

    @property
    def size(self) -> tuple[int, int]:
        """The number of rows and the capacity in tokens; zeros while the table is empty."""
        if self._rows is None:
            return 0, 0
        rows, capacity = self._rows.tokens.shape
        return rows, capacity

    @property
    def holders(self) -> list[Any]:
        """The holders of the rows."""
        return [holder for holder in self._holders if holder is not None]

    @property
    def room(self) -> int:
        """The number of rows that may be added now."""
        return min(_PREFILL, self._most - len(self))

    def add(self, entries: Sequence[Entry], holders: Sequence[Any]) -> None:
        """Begins at most `room` rows. `holders` identify them in the results of `advance`."""
        size = bucket(len(self) + len(entries), SIZES)
        batch = bucket(len(entries), SIZES)
        filled = [*entries, *[entries[0]] * (batch - len(entries))]
        source = jax.tree.map(lambda *rows: np.stack(rows), *(entry.source for entry in filled))
        limit = np.array([entry.limit for entry in filled], np.int32)
        temperature = np.array([entry.temperature for entry in filled], np.float32)
        arrays = source, limit, temperature, np.array([entry.seed for entry in filled], np.uint32)
        used = np.arange(batch) < len(entries)
        if self._rows is None:
            self._rows = self._compiled.begun(self._compiled.variables, arrays, used, self._first_capacity)
            self._holders = [*holders, *[None] * (batch - len(holders))]
            self._steps = np.zeros(batch, np.int32)
            self._resize(size)
            return
        if size > len(self._holders):
            self._resize(size)
        free = [place for place, holder in enumerate(self._holders) if holder is None]
        places = np.full(batch, len(self._holders), np.int32)
        places[: len(entries)] = free[: len(entries)]
        self._rows = self._compiled.joined(self._compiled.variables, self._rows, arrays, used, places)
        for place, holder in zip(free, holders, strict=False):
            self._holders[place], self._steps[place] = holder, 0

    def advance(self, count: int) -> list[tuple[Any, np.ndarray, bool]]:
        """Draws up to `count` tokens in each row. Returns (holder, all tokens so far, whether it has ended) of each."""
        if self._rows is None:
            return []
        capacity = self._rows.tokens.shape[1]
        longest = int(max(self._steps[place] for place, holder in enumerate(self._holders) if holder is not None))
        if longest >= capacity:
            self.grow(longest + 1)
            capacity = self._rows.tokens.shape[1]
        count = min(count, capacity - longest)
        self._rows = self._compiled.advanced(
            self._compiled.variables, self._compiled.weights, self._rows, np.int32(count)
        )
        steps_before = self._steps
        tokens, self._steps, done = (
            np.array(x) for x in jax.device_get((self._rows.tokens, self._rows.steps, self._rows.done))
        )
        self.drawn = int((self._steps - steps_before).max())
        return [
            (holder, tokens[place, : self._steps[place]], bool(done[place]))
            for place, holder in enumerate(self._holders)
            if holder is not None
        ]

    def grow(self, tokens: int) -> None:
        """Gives all rows room for that many tokens, as far as rows of this table may have them."""
        self._resize(len(self._holders), min(bucket(tokens, CAPACITIES), self._longest))

    def remove(self, gone: Callable[[Any], bool]) -> None:
        """Frees the places of all holders that are `gone`, and the table's memory if it becomes empty."""
        self._holders = [None if holder is None or gone(holder) else holder for holder in self._holders]
        if not len(self):
            self._rows, self._holders = None, []
        elif (size := bucket(len(self), SIZES)) < len(self._holders):
            self._resize(size)

    @property
    def _first_capacity(self) -> int:
        """The capacity of a new table. It does not depend on `longest`, so all limits begin with the same programs."""
        return min(CAPACITIES[0], self._longest)

    def _resize(self, size: int, capacity: int | None = None) -> None:
        """Changes the number of rows and the capacity, and moves the used rows together."""
        if self._rows is None:
            return
        capacity = capacity or self.size[1]
        if (size, capacity) == self.size and len(self._holders) == size:
            return
        places = [place for place, holder in enumerate(self._holders) if holder is not None]
        places += [-1] * (size - len(places))
        self._rows = self._compiled.resized(self._rows, np.array(places, np.int32), capacity)
        self._holders = [None if place < 0 else self._holders[place] for place in places]
        self._steps = np.array([0 if place < 0 else self._steps[place] for place in places], np.int32)
