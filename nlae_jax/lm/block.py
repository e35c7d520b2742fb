"""One block of the transformer: attention and an MLP, each added to the residual stream of every segment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from nlae_jax.lm.arch import Arch, GlobalAttention, linear_layers
from nlae_jax.lm.attention import attend
from nlae_jax.lm.delta import mix
from nlae_jax.lm.experts import mixture
from nlae_jax.lm.lora import linear
from nlae_jax.lm.mlp import activated
from nlae_jax.lm.norms import norm, rms_norm
from nlae_jax.lm.products import einsum
from nlae_jax.lm.rope import apply_rope, global_rope_table, query_growth, rope_table
from nlae_jax.lm.segments import DeltaState, KeyValues, empty_state
from nlae_jax.mesh import DECODE_RULES, constrained


class Segment(NamedTuple):
    """Tokens that share batch axes: `x` [*batch, T, d], `positions` [*batch, T] int32, `valid` [*batch, T] bool."""

    x: jax.Array
    positions: jax.Array
    valid: jax.Array


class LayerCache(NamedTuple):
    """One block's keys and values of a growing segment, [kv_heads, *batch, capacity, head_dim].

    In a block of DeltaNet, `state` is there instead of `k` and `v`.
    """

    k: Any
    v: Any
    state: DeltaState | None = None
    global_kv: tuple[jax.Array, jax.Array] | None = None  # for all blocks together only, as in `KeyValues`


# One block's weights by name, and its adapters by the linear layer's name; empty without adapters.
BlockWeights = tuple[dict[str, jax.Array], dict[str, Any]]


class Layer(NamedTuple):
    """The constants in which blocks differ: the window (None: no block has one) and the index into `rope_kinds`."""

    window: Any = None
    rope: Any = 0


_NO_WINDOW = 2**30  # larger than any distance of two positions


def rope_kinds(arch: Arch) -> list[str]:
    """Returns the kinds of RoPE that the blocks have, each once."""
    return sorted(set(arch.ropes)) or ["global"]


def layers_of(arch: Arch) -> Layer | None:
    """Returns every block's `Layer` as arrays [L] int32, or None where all blocks are alike."""
    if not arch.ropes and not arch.windows:
        return None
    kinds, count = rope_kinds(arch), arch.num_layers
    return Layer(
        np.array([window or _NO_WINDOW for window in arch.windows], np.int32) if arch.windows else None,
        np.array([kinds.index(rope) for rope in arch.ropes] or [0] * count, np.int32),
    )


class Block:
    """One block as a pure function. The object holds what all blocks share, such as RoPE's tables.

    Calling it takes one block's `weights` and `adapters` and the segments' residual streams `xs`, each [*batch, T, d].
    `contexts` are the keys and values of earlier segments (a prefilled cache). While decoding there is one segment. Its
    cache is `growing`, which is written at `offset`. With a `place`, `growing` has the caches of all blocks, and this
    block's is the entry `place`. Returns the residual streams after the block, and the block's cache of each segment.
    """

    def __init__(
        self, arch: Arch, lora_scale: float, segments: Sequence[Segment], implementation: str = "auto"
    ) -> None:
        self.arch, self.lora_scale, self.implementation = arch, lora_scale, implementation
        self.positions = [s.positions for s in segments]
        self.valid = [s.valid for s in segments]
        # By matrix: the mesh axes that split its input and its output. Residual streams are split by rows only.
        axes = {name: weight.axes[1:] for name, weight in linear_layers(arch).items()}
        self._axes = {name: [axis if axis != "embed" else None for axis in sides] for name, sides in axes.items()}
        self.ropes = [[rope_table(arch, s.positions, kind) for kind in rope_kinds(arch)] for s in segments]
        if (wide := arch.global_attention) is not None:
            self.global_ropes = [global_rope_table(wide, s.positions) for s in segments]
        self.growths = [query_growth(arch, s.positions) for s in segments]

    def __call__(
        self,
        weights: dict[str, jax.Array],
        adapters: dict[str, Any],
        xs: tuple[jax.Array, ...],
        contexts: Sequence[KeyValues] = (),
        growing: KeyValues | None = None,
        offset: jax.Array | int = 0,
        layer: Layer | None = None,
        place: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, ...], tuple[LayerCache, ...]]:
        layer, decoding = layer or Layer(), growing is not None
        seen, outs, caches = list(contexts), [], []
        for i, x in enumerate(xs):
            x = residual(x, decoding)
            with jax.named_scope("attention"):
                normed = self._norm(x, weights, "attn_norm")
                out = next(name for name in ("o", "delta_o", "global_o") if name in weights)
                if out != "delta_o":
                    mixed, grown = self._attention(i, weights, adapters, normed, seen, growing, offset, layer, place)
                else:
                    mixed, grown = self._delta(i, weights, adapters, normed, seen, growing, offset, place)
                caches.append(grown)
                mixed = residual(self._linear(mixed, weights, adapters, out, decoding), decoding)
                before, x = x, _sum(x, self._added(mixed, weights, "attn_post_norm"), decoding)
            with jax.named_scope("mlp"):
                mixed = self._mlp(before if self.arch.parallel else x, weights, adapters, decoding)
                x = _sum(x, self._added(residual(mixed, decoding), weights, "mlp_post_norm"), decoding)
            if self.arch.layer_scales:
                x = x * jax.lax.stop_gradient(weights["layer_scale"]).astype(x.dtype)
            outs.append(x)
        return tuple(outs), tuple(caches)

    def _attention(
        self,
        i: int,
        weights: dict[str, jax.Array],
        adapters: dict[str, Any],
        x: jax.Array,
        seen: list[KeyValues],
        growing: KeyValues | None,
        offset: jax.Array | int,
        layer: Layer,
        place: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache]:
        """Computes the input of the matrix "o" for segment `i`, and the segment's cache.

        Adds the segment's keys to the list `seen`, which holds those of the segments before.
        """
        decoding, wide = growing is not None, self.arch.global_attention if "global_o" in weights else None
        rope = _one_of(self.ropes[i], layer.rope) if wide is None else self.global_ropes[i]
        q, k, v = self._project(weights, adapters, x, rope, decoding, wide)
        if (growth := self.growths[i]) is not None:
            q = (q * growth[..., None, None]).astype(q.dtype)
        if growing is None:
            keys = KeyValues(k, v, self.positions[i], self.valid[i])
            grown = LayerCache(k, v)
        else:
            grown = LayerCache(_write(growing.k, k, offset, place), _write(growing.v, v, offset, place))
            read = grown if place is None else layer_of(grown, place)
            keys = growing._replace(k=read.k, v=read.v)
        seen.append(keys)
        mixed = attend(
            q,
            self.positions[i],
            seen,
            self.arch.attention_scale or None,
            self.arch.attention_softcap,
            layer.window,
            self.implementation,
            weights.get("sinks"),
        )
        mixed = mixed.reshape(*x.shape[:-1], -1)
        if self.arch.attention_gate:
            gate = self._linear(x, weights, adapters, "q_gate", decoding)
            gate = _by_row(_by_column(gate), k.shape[0]) if decoding else gate
            mixed = mixed * jax.nn.sigmoid(gate)
        return _by_column(_by_row(mixed, k.shape[0])) if decoding else mixed, grown

    def _delta(
        self,
        i: int,
        weights: dict[str, jax.Array],
        adapters: dict[str, Any],
        x: jax.Array,
        seen: list[KeyValues],
        growing: KeyValues | None,
        offset: jax.Array | int,
        place: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache]:
        """Computes the input of the matrix "delta_o" for segment `i`, and the segment's cache, in a block of DeltaNet.

        The segment begins with the state of the last entry of `seen`, and its own state is added to that list. While
        decoding, the first token begins with that state, and a later token with the state in `growing`.
        """
        delta, decoding = self.arch.delta, growing is not None
        assert delta is not None  # because the block has DeltaNet's weights
        if decoding:  # XLA would split x by rows for the narrow products, and gather it for each wide product
            x = residual(x, decoding)
        rows = math.prod(x.shape[:-2])
        before = (seen[-1].state if seen else None) or empty_state(delta, rows, x.dtype)
        before = jax.tree.map(lambda s: _repeated(s, rows), before)
        if growing is not None:
            kept = growing.state if place is None else layer_of(growing.state, place)
            first = jnp.reshape(jnp.equal(offset, 0), -1)
            choose = lambda new, old: jnp.where(first.reshape(-1, *[1] * (old.ndim - 1)), new, old)  # noqa: E731
            before = jax.tree.map(lambda new, old: choose(new.astype(old.dtype), old), before, kept)

        def product(name: str) -> jax.Array:
            y = self._linear(x, weights, adapters, name, decoding)
            return constrained(_by_column(y), ("batch", *[None] * (y.ndim - 2), "heads")) if decoding else y

        mixed, state = mix(delta, self.arch.norm_eps, weights, product, x, self.valid[i], before)
        state = DeltaState(
            jax.tree.map(lambda tail: constrained(tail, ("batch", None, "heads")), state.tails),
            constrained(state.memory, ("batch", "heads", None, None)),
        )
        state = jax.tree.map(lambda new, old: new.astype(old.dtype), state, before)
        seen.append(KeyValues(None, None, self.positions[i], self.valid[i], state))
        if growing is not None and place is not None:
            update = jax.lax.dynamic_update_index_in_dim
            state = jax.tree.map(lambda stack, new: update(stack, new, place, 0), growing.state, state)
        return _by_column(mixed) if decoding else mixed, LayerCache(None, None, state)

    def _mlp(self, x: jax.Array, weights: dict[str, jax.Array], adapters: dict[str, Any], decoding: bool) -> jax.Array:
        if (experts := self.arch.experts) is None:
            return self._linear(self.neurons(x, weights, adapters, decoding), weights, adapters, "down", decoding)
        normed = self._norm(x, weights, "mlp_norm")
        if not experts.apart:
            mixed = mixture(self.arch, experts, weights, adapters, self.lora_scale, normed, decoding)
            return mixed + self._shared(normed, weights, adapters, decoding) if experts.shared else mixed
        mixed = mixture(self.arch, experts, weights, adapters, self.lora_scale, x, decoding)
        mixed = residual(mixed, decoding)
        shared = residual(self._shared(normed, weights, adapters, decoding), decoding)
        return self._norm(mixed, weights, "experts_post_norm") + self._norm(shared, weights, "shared_post_norm")

    def _shared(
        self, x: jax.Array, weights: dict[str, jax.Array], adapters: dict[str, Any], decoding: bool
    ) -> jax.Array:
        """Computes the output of the shared MLP, which every token uses beside its experts."""
        product = lambda y, name: self._linear(y, weights, adapters, f"shared_{name}", decoding)  # noqa: E731
        out = product(activated(self.arch, lambda name: product(x, name)), "down")
        if "shared_share" not in weights:
            return out
        return out * jax.nn.sigmoid(einsum("...i,io->...o", x, weights["shared_share"]))

    def neurons(
        self, x: jax.Array, weights: dict[str, jax.Array], adapters: dict[str, Any], decoding: bool = False
    ) -> jax.Array:
        """Computes the activations of the MLP's neurons, [*batch, T, d_ff], from the residual stream x."""
        normed = self._norm(x, weights, "mlp_norm")
        return activated(self.arch, lambda name: self._linear(normed, weights, adapters, name, decoding))

    def _added(self, x: jax.Array, weights: dict[str, jax.Array], name: str) -> jax.Array:
        """Applies the post-norm `name` and the residual scale to the output of attention or MLP."""
        normed = self._norm(x, weights, name)
        return normed if self.arch.residual_scale == 1.0 else normed * jnp.asarray(self.arch.residual_scale, x.dtype)

    def _norm(self, x: jax.Array, weights: dict[str, jax.Array], name: str) -> jax.Array:
        """Applies the norm `name`. Returns x if the architecture has no such norm."""
        if name not in weights:
            return x
        return norm(self.arch, x, weights[name], weights.get(f"{name}_bias"))

    def _linear(
        self, x: jax.Array, weights: dict[str, jax.Array], adapters: dict[str, Any], name: str, decoding: bool
    ) -> jax.Array:
        """Applies the linear layer `name` with its adapter and bias.

        Where the mesh's axis `data` holds copies of the weights, the product's input and output are told to stay split
        by rows. With that constraint on residual streams only, XLA gathered rows from all copies on slices of 64 and
        128 chips, and 60 % more bytes were sent. On a mesh with one copy XLA chooses well by itself.
        """
        rows, columns = self._axes[name]
        constrain = not decoding and jax.typeof(x).sharding.mesh.shape.get("data", 1) > 1
        if constrain:
            x = _training_rows(x, rows)
        y = linear(x, weights[name], adapters.get(name), self.lora_scale)
        y = y + weights[f"{name}_bias"] if name in self.arch.biases else y
        return checkpoint_name(_training_rows(y, columns) if constrain else y, name)

    def _project(
        self,
        weights: dict[str, jax.Array],
        adapters: dict[str, Any],
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        decoding: bool,
        wide: GlobalAttention | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated q [*batch, T, heads, head_dim], and k and v in cache layout [kv_heads, *batch, T, head_dim].

        `wide` is the architecture's global attention if the block is of the kind "global", else None. While decoding,
        matrices are split over more devices than there are heads, so attention splits rows instead.
        """
        prefix = "" if wide is None else "global_"
        kv_heads, head_dim = (wide or self.arch).num_kv_heads, (wide or self.arch).head_dim

        def product(name: str, count: int) -> jax.Array:
            y, own_norm = self._linear(x, weights, adapters, prefix + name, decoding), weights.get(f"{name}_norm")
            if decoding:  # computed where the matrix is, which would be gathered otherwise
                y = _by_row(_by_column(y), kv_heads)
            if own_norm is not None and self.arch.qk_norm == "all":
                y = rms_norm(y, own_norm, self.arch.norm_eps, self.arch.norm_offset)
            if self.arch.clip_qkv:
                y = jnp.clip(y, -self.arch.clip_qkv, self.arch.clip_qkv)
            return y.reshape(*x.shape[:-1], count, head_dim)

        def turned(y: jax.Array, name: str) -> jax.Array:
            own_norm = weights.get(f"{prefix}{name}_norm")
            if own_norm is not None and self.arch.qk_norm == "head":
                y = rms_norm(y, own_norm, self.arch.norm_eps, self.arch.norm_offset)
            return apply_rope(y, rope)

        q = turned(product("q", self.arch.num_heads), "q")
        keys = product("k", kv_heads)
        k = jnp.moveaxis(turned(keys, "k"), -2, 0)
        v = keys if wide is not None and wide.keys_are_values else product("v", kv_heads)
        if self.arch.value_norm:
            v = rms_norm(v, None, self.arch.norm_eps)
        return q, k, jnp.moveaxis(v, -2, 0)


def _repeated(x: jax.Array, rows: int) -> jax.Array:
    """Repeats the entries of x [outer, ...] for the rows that share each: [rows, ...]."""
    outer = x.shape[0]
    return jnp.broadcast_to(x[:, None], (outer, rows // outer, *x.shape[1:])).reshape(rows, *x.shape[1:])


def _by_row(y: jax.Array, kv_heads: int) -> jax.Array:
    """Splits queries, keys, values or attention's output [*batch, T, heads · head_dim] as attention works on them."""
    axes = ("batch", *[None] * (y.ndim - 2), "kv_heads")
    return constrained(y, axes, together=y.shape[-1] // kv_heads)


def _by_column(y: jax.Array) -> jax.Array:
    """Splits an input or output [*batch, T, columns] of a matrix as the matrix is split while decoding."""
    return constrained(y, ("rows", *[None] * (y.ndim - 2), "heads"), DECODE_RULES)


def _training_rows(x: jax.Array, columns: str | None) -> jax.Array:
    """Splits an input or output [*batch, T, columns] of a matrix in training: by rows, and by columns as the matrix."""
    rows = "batch" if x.ndim > 2 else None  # the constant prompt has no rows
    return constrained(x, (rows, *[None] * (x.ndim - 2), columns))


def residual(x: jax.Array, decoding: bool) -> jax.Array:
    """Splits a residual stream [*batch, T, d] over devices by rows only."""
    return constrained(x, ("rows", *[None] * (x.ndim - 1)), DECODE_RULES) if decoding else _training_rows(x, None)


def _sum(x: jax.Array, added: jax.Array, decoding: bool) -> jax.Array:
    """Adds to the residual stream.

    While decoding, the sum is told to keep the layout that every matrix reads. Without that, XLA split it by rows, as
    sampled tokens are, and gathered it before each product. That sent half as many bytes again as the products' sums.
    """
    return residual(x + added, decoding) if decoding else x + added


def _write(cache: jax.Array, new: jax.Array, offset: jax.Array | int, place: jax.Array | None = None) -> jax.Array:
    """Writes `new` [kv_heads, *batch, T, head_dim] into `cache` [kv_heads, rows, capacity, head_dim] at `offset`.

    With a `place`, the cache has a leading axis for all blocks. With an `offset` [rows], each row has its own, and T is
    1.
    """
    before = () if place is None else (place,)
    kv_heads, rows = cache.shape[len(before) : len(before) + 2]
    if jnp.ndim(offset):
        heads, row = jnp.arange(kv_heads)[:, None], jnp.arange(rows)
        written = cache.at[(*before, heads, row, offset)].set(new.reshape(kv_heads, rows, new.shape[-1]))
        return cached(written, len(before))
    new = new.reshape(*(1 for _ in before), kv_heads, rows, *new.shape[-2:])
    return cached(jax.lax.dynamic_update_slice(cache, new, (*before, 0, 0, offset, 0)), len(before))


def cached(x: jax.Array, stacked: int = 0) -> jax.Array:
    """Splits keys or values [kv_heads, *batch, T, head_dim], after `stacked` leading axes, as decoding reads them."""
    batch = ("batch",) if x.ndim - stacked > 3 else ()
    axes = (*[None] * stacked, "kv_heads", *batch)
    return constrained(x, (*axes, *[None] * (x.ndim - len(axes))))


def _one_of(tables: Sequence[Any], index: jax.Array | int) -> Any:
    """Returns `tables[index]`. The index may be traced."""
    if len(tables) == 1 or isinstance(index, int):
        return tables[index if isinstance(index, int) else 0]
    return jax.tree.map(lambda *parts: jnp.stack(parts)[index], *tables)


def layer_of(stacked: Any, index: Any) -> Any:
    """Returns the entry `index` of every array in a stacked tree. The index may be traced."""
    if isinstance(index, int):
        return jax.tree.map(lambda w: w[index], stacked)
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), stacked)
