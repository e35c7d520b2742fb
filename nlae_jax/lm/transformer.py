"""The decoder-only transformer, as a Linen module over explicit parameters.

`Transformer` declares its weights from `arch.model_weights` and runs any range of its blocks on any tuple of
segments (see `attention.py`). A role that needs fewer blocks than the base has runs the first ones of it in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from nlae_jax.lm import head
from nlae_jax.lm.arch import Arch, block_weights, model_weights
from nlae_jax.lm.attention import apply_rope, attend, rope_table
from nlae_jax.lm.lora import adapter_weights, linear
from nlae_jax.lm.modules import apply
from nlae_jax.lm.segments import KeyValues
from nlae_jax.mesh import DECODE_RULES, Weight, constrained, constrained_tree, platform_of

REMAT = {
    "none": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.checkpoint_dots,
    # Neither attention's scores nor what is cheaply made again: less than half of what "dots" keeps, and no slower.
    "linear": jax.checkpoint_policies.save_only_these_names("q", "k", "v", "attention", "o", "gate", "up"),
}


class Segment(NamedTuple):
    """Tokens that share batch axes: `x` [*batch, T, d], `positions` [*batch, T] int32, `valid` [*batch, T] bool."""

    x: jax.Array
    positions: jax.Array
    valid: jax.Array


class LayerCache(NamedTuple):
    """Room for one block's keys and values of a growing segment: [kv_heads, *batch, capacity, head_dim]."""

    k: jax.Array
    v: jax.Array


# One block's weights and its adapters, none or by the linear layer's name.
BlockWeights = tuple[dict[str, jax.Array], dict[str, Any]]


class Layer(NamedTuple):
    """What sets one block apart from the others: its window (None: none has one), its index into `rope_kinds`."""

    window: Any = None
    rope: Any = 0


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}

_NO_WINDOW = 2**30  # further back than any position


def rope_kinds(arch: Arch) -> list[str]:
    """The kinds of rope that the blocks have, each once."""
    return sorted(set(arch.ropes)) or ["global"]


def layers_of(arch: Arch) -> Layer | None:
    """Every block's `Layer`, as arrays [L]; None where all are alike."""
    if not arch.ropes and not arch.windows:
        return None
    kinds, count = rope_kinds(arch), arch.num_layers
    return Layer(
        np.array([window or _NO_WINDOW for window in arch.windows], np.int32) if arch.windows else None,
        np.array([kinds.index(rope) for rope in arch.ropes] or [0] * count, np.int32),
    )


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    scaled = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    return (scaled * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


def init_weight(key: jax.Array, weight: Weight, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """A random matrix of standard deviation `fan_in ** -0.5`, or ones."""
    if weight.fan_in == 0:
        return jnp.ones(weight.shape, dtype)
    return (jax.random.normal(key, weight.shape, jnp.float32) * weight.fan_in**-0.5).astype(dtype)


def is_weight(node: Any) -> bool:
    return isinstance(node, Weight)


class Block:
    """One block as a pure function; holds what does not differ between blocks.

    `weights` and `adapters` are one block's slices. `contexts` are the keys and values of segments processed earlier
    (a prefilled cache). `own` is set while decoding: room for the only segment's keys, written at `offset`; with a
    `place`, the room of all blocks, of which this one's is there.
    """

    def __init__(
        self, arch: Arch, lora_scale: float, segments: Sequence[Segment], implementation: str = "auto"
    ) -> None:
        self.arch, self.lora_scale, self.implementation = arch, lora_scale, implementation
        self.positions = [s.positions for s in segments]
        self.valid = [s.valid for s in segments]
        # Of each matrix, what its input and its output are split by; residual streams are by rows alone.
        axes = {name: weight.axes[1:] for name, weight in block_weights(arch).items() if len(weight.shape) == 3}
        self._axes = {name: [axis if axis != "embed" else None for axis in both] for name, both in axes.items()}
        self.ropes = [[rope_table(arch, s.positions, kind) for kind in rope_kinds(arch)] for s in segments]

    def __call__(
        self,
        weights: dict[str, jax.Array],
        adapters: dict[str, Any],
        xs: tuple[jax.Array, ...],
        contexts: Sequence[KeyValues] = (),
        own: KeyValues | None = None,
        offset: jax.Array | int = 0,
        layer: Layer | None = None,
        place: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, ...], tuple[LayerCache, ...]]:
        layer, decoding = layer or Layer(), own is not None
        seen, outs, caches = list(contexts), [], []
        for i, x in enumerate(xs):
            x = _residual(x, decoding)
            with jax.named_scope("attention"):
                normed = self._norm(x, weights, "attn_norm")
                q, k, v = self._project(weights, adapters, normed, _one_of(self.ropes[i], layer.rope), decoding)
                if own is None:
                    keys = KeyValues(k, v, self.positions[i], self.valid[i])
                    grown = LayerCache(k, v)
                else:
                    grown = LayerCache(_write(own.k, k, offset, place), _write(own.v, v, offset, place))
                    read = grown if place is None else _layer(grown, place)
                    keys = own._replace(k=read.k, v=read.v)
                seen.append(keys)
                caches.append(grown)
                scale = self.arch.attention_scale or None
                mixed = attend(
                    q,
                    self.positions[i],
                    seen,
                    scale,
                    self.arch.attention_softcap,
                    layer.window,
                    self.implementation,
                )
                mixed = mixed.reshape(*x.shape[:-1], -1)
                if decoding:
                    mixed = _by_column(self._by_row(mixed))
                mixed = _residual(self._linear(mixed, weights, adapters, "o", decoding), decoding)
                x = x + self._norm(mixed, weights, "attn_post_norm")
            with jax.named_scope("mlp"):
                mixed = self.neurons(x, weights, adapters, decoding)
                mixed = self._linear(mixed, weights, adapters, "down", decoding)
                x = x + self._norm(_residual(mixed, decoding), weights, "mlp_post_norm")
            outs.append(x)
        return tuple(outs), tuple(caches)

    def neurons(
        self, x: jax.Array, weights: dict[str, jax.Array], adapters: dict[str, Any], decoding: bool = False
    ) -> jax.Array:
        """What the MLP's neurons make of the residual stream after attention, [*batch, T, d_ff]."""
        normed = self._norm(x, weights, "mlp_norm")
        gate, up = (self._linear(normed, weights, adapters, name, decoding) for name in ("gate", "up"))
        return ACTIVATIONS[self.arch.activation](gate) * up

    def _norm(self, x: jax.Array, weights: dict[str, jax.Array], name: str) -> jax.Array:
        """x itself where the architecture has no such norm."""
        if name not in weights:
            return x
        return rms_norm(x, weights[name], self.arch.norm_eps, self.arch.norm_offset)

    def _linear(
        self, x: jax.Array, weights: dict[str, jax.Array], adapters: dict[str, Any], name: str, decoding: bool
    ) -> jax.Array:
        """Where training holds copies of the weights, rows stay split at both ends of a product and of its gradient's.

        Told that of residual streams alone, XLA gathered rows of the activations' segment from all copies on slices of
        64 and 128 chips: 60 % more was sent. Inside one copy it weighs rows against weights, and does so well.
        """
        rows, columns = self._axes[name]
        constrain = not decoding and jax.typeof(x).sharding.mesh.shape.get("data", 1) > 1
        if constrain:
            x = _training_rows(x, rows)
        y = linear(x, weights[name], adapters.get(name), self.lora_scale)
        y = y + weights[f"{name}_bias"] if name in self.arch.biases else y
        return checkpoint_name(_training_rows(y, columns) if constrain else y, name)

    def _by_row(self, y: jax.Array) -> jax.Array:
        """Queries, keys, values or what attention makes of them [*batch, T, heads · head_dim], split as it works."""
        axes = ("batch", *[None] * (y.ndim - 2), "kv_heads")
        return constrained(y, axes, together=y.shape[-1] // self.arch.num_kv_heads)

    def _project(
        self,
        weights: dict[str, jax.Array],
        adapters: dict[str, Any],
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        decoding: bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated q [*batch, T, heads, head_dim], and k, v in cache layout [kv_heads, *batch, T, head_dim].

        Decoding's matrices are split over more devices than there are heads: attention splits the rows instead.
        """

        def heads(name: str, count: int) -> jax.Array:
            y, norm = self._linear(x, weights, adapters, name, decoding), f"{name}_norm"
            if decoding:  # the product where its matrix is, or that would be gathered
                y = self._by_row(_by_column(y))
            if self.arch.qk_norm == "all":
                y = self._norm(y, weights, norm)
            y = y.reshape(*x.shape[:-1], count, self.arch.head_dim)
            return self._norm(y, weights, norm) if self.arch.qk_norm == "head" else y

        q = apply_rope(heads("q", self.arch.num_heads), rope)
        k = apply_rope(heads("k", self.arch.num_kv_heads), rope)
        return q, jnp.moveaxis(k, -2, 0), jnp.moveaxis(heads("v", self.arch.num_kv_heads), -2, 0)


class Transformer(nn.Module):
    """A decoder-only LM. Variables: `params` (`arch.model_weights`) and, optionally, `lora` (`lora.adapter_weights`).

    `lora_scale` is alpha / rank. `remat` names what the backward pass keeps of a block (`REMAT`), `attention` how it
    attends (`attention.attend`).
    """

    arch: Arch
    lora_scale: float = 1.0
    remat: str = "linear"
    attention: str = "auto"
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        def declare(name: str, weights: Any) -> Any:
            def init(key: jax.Array) -> Any:
                leaves, tree = jax.tree.flatten(weights, is_leaf=is_weight)
                keys = jax.random.split(key, len(leaves))
                drawn = [init_weight(k, w, self.param_dtype) for k, w in zip(keys, leaves, strict=True)]
                return jax.tree.unflatten(tree, drawn)

            return self.param(name, init)

        weights = model_weights(self.arch)
        self.embedding = declare("embed", weights["embed"])
        self.blocks = declare("blocks", weights["blocks"])
        self.final_norm = declare("final_norm", weights["final_norm"])
        self.head = self.embedding if self.arch.tied_head else declare("head", weights["head"])

    def _adapters(self) -> dict[str, Any]:
        return self.get_variable("lora", "blocks") if self.has_variable("lora", "blocks") else {}

    def embed(self, ids: jax.Array) -> jax.Array:
        """[...] int -> [..., d]."""
        embedded = self.embedding[ids]
        return (
            embedded if self.arch.embed_scale == 1.0 else embedded * jnp.asarray(self.arch.embed_scale, embedded.dtype)
        )

    def run(
        self, segments: Sequence[Segment], start: int = 0, stop: int | None = None, keep_caches: bool = False
    ) -> tuple[tuple[jax.Array, ...], tuple[LayerCache, ...]]:
        """Blocks `start` to `stop` (exclusive) on all segments at once, scanned over layers.

        Returns the residual streams after the last of them, [*batch, T, d] each, and, with `keep_caches`, each
        segment's keys and values stacked over layers.
        """
        stop = self.arch.num_layers if stop is None else stop
        block = Block(self.arch, self.lora_scale, segments, self.attention)

        def body(xs: tuple[jax.Array, ...], inputs: tuple[Any, Any, Any]) -> tuple[tuple[jax.Array, ...], Any]:
            weights, adapters, layer = inputs
            weights = weights if not partial else _layer(self.blocks, weights)
            xs, caches = block(weights, adapters, xs, layer=layer)
            return xs, jax.tree.map(_cache, caches) if keep_caches else ()

        # A part of the stack is read in place, block by block: slicing it first would copy it.
        partial = (start, stop) != (0, self.arch.num_layers)
        weights = jnp.arange(start, stop) if partial else self.blocks
        adapters = self._adapters()
        if adapters and partial:
            adapters = jax.tree.map(lambda a: a[start:stop], adapters)
        body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
        layers = jax.tree.map(lambda a: a[start:stop], layers_of(self.arch))
        return jax.lax.scan(body, tuple(s.x for s in segments), (weights, adapters, layers))

    def neurons(self, segment: Segment, layer: int) -> jax.Array:
        """What the MLP's neurons of block `layer` make of a segment, [*batch, T, d_ff]."""
        (hidden,), _ = self.run((segment,), stop=layer)
        block = Block(self.arch, self.lora_scale, [segment], self.attention)
        weights, adapters = _layer(self.blocks, layer), _layer(self._adapters(), layer)
        # Without its MLP's output, what leaves the block is what its MLP reads.
        silent = {**weights, "down": jnp.zeros_like(weights["down"])}
        if "down_bias" in weights:
            silent["down_bias"] = jnp.zeros_like(weights["down_bias"])
        own = {name: adapter for name, adapter in adapters.items() if name != "down"}
        kind = jax.tree.map(lambda a: int(a[layer]), layers_of(self.arch))
        (middle,), _ = block(silent, own, (hidden,), layer=kind)
        return block.neurons(middle, weights, adapters)

    def block_weights(self) -> list[BlockWeights]:
        """Each block's weights and adapters by themselves."""
        adapters = self._adapters()
        return [(_layer(self.blocks, index), _layer(adapters, index)) for index in range(self.arch.num_layers)]

    def decode(
        self,
        segment: Segment,
        contexts: Any,
        own: Any,
        offset: jax.Array,
        weights: Sequence[BlockWeights] | None = None,
    ) -> tuple[jax.Array, Any]:
        """One token for every row; keys and values are written into `own` at `offset`, a scalar or one for each row.

        With the blocks' `weights` one by one, layers are unrolled, and `contexts[l]`, a `KeyValues` per segment, and
        `own[l]` belong to block l. Without, layers are scanned, and `contexts` and `own` have keys and values of all
        blocks on a leading axis (see `for_decoding`). Returns the last residual stream and the grown caches.
        """
        block = Block(self.arch, self.lora_scale, [segment], self.attention)
        if weights is None:
            return self._scanned_decode(block, segment.x, contexts, own, offset)
        xs: tuple[jax.Array, ...] = (segment.x,)
        grown = []
        layers = layers_of(self.arch)
        for index, (base, adapters) in enumerate(weights):
            layer = jax.tree.map(lambda a, index=index: int(a[index]), layers)
            xs, (cache,) = block(base, adapters, xs, contexts[index], own[index], offset, layer)
            grown.append(own[index]._replace(k=cache.k, v=cache.v))
        return xs[0], grown

    def _scanned_decode(
        self, block: Block, x: jax.Array, contexts: Sequence[KeyValues], own: KeyValues, offset: jax.Array
    ) -> tuple[jax.Array, KeyValues]:
        """The stacked caches are carried from layer to layer and written in place: as outputs they would be copied."""

        def body(carry: tuple[jax.Array, LayerCache], inputs: Any) -> tuple[Any, None]:
            (x, grown), (place, base, adapters, layer, read) = carry, inputs
            seen = [kv._replace(k=k, v=v) for kv, (k, v) in zip(contexts, read, strict=True)]
            room = own._replace(k=grown.k, v=grown.v)
            (x,), (grown,) = block(base, adapters, (x,), seen, room, offset, layer, place)
            return (x, grown), None

        places, read = jnp.arange(self.arch.num_layers), [(kv.k, kv.v) for kv in contexts]
        inputs = places, self.blocks, self._adapters(), layers_of(self.arch), read
        (x, grown), _ = jax.lax.scan(body, (x, LayerCache(own.k, own.v)), inputs)
        return x, own._replace(k=grown.k, v=grown.v)

    def logits(self, x: jax.Array) -> jax.Array:
        """Final norm and head: [..., d] -> [..., V] float32."""
        return head.logits(self._normed(x), self.head, self.arch.logit_softcap)

    def token_log_probs(self, x: jax.Array, targets: jax.Array, chunk: int = 256) -> tuple[jax.Array, jax.Array]:
        """log p(target) and entropy, each [B, ...] float32, from x [B, ..., d]; see `head.log_probs`."""
        return head.log_probs(self._normed(x), self.head, targets, self.arch.logit_softcap, chunk)

    def token_loss(
        self, x: jax.Array, targets: jax.Array, loss_of: head.LossOf, *extras: jax.Array, chunk: int = 256
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """`loss_of(log-probs, *extras)` summed over tokens, and their log-probs and entropies; see `head.loss`."""
        return head.loss(loss_of, self.arch.logit_softcap, chunk, self._normed(x), self.head, targets, extras)

    def _normed(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.final_norm, self.arch.norm_eps, self.arch.norm_offset)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """ids, mask: [B, T] -> logits [B, T, V] float32, padding on either side."""
        xs, _ = self.run((self.padded(ids, mask),))
        return self.logits(xs[0])

    def padded(self, ids: jax.Array, mask: jax.Array) -> Segment:
        """A batch padded on either side as one segment; positions count the real tokens from 0."""
        return Segment(self.embed(ids), jnp.maximum(jnp.cumsum(mask, -1) - 1, 0).astype(jnp.int32), mask.astype(bool))


def _by_column(y: jax.Array) -> jax.Array:
    """What decoding's matrices read or give [*batch, T, columns], split as they are."""
    return constrained(y, ("rows", *[None] * (y.ndim - 2), "heads"), DECODE_RULES)


def _training_rows(x: jax.Array, columns: str | None) -> jax.Array:
    """What training's matrices read or give [*batch, T, columns], split by its rows and as they are."""
    rows = "batch" if x.ndim > 2 else None  # the constant prompt has no rows
    return constrained(x, (rows, *[None] * (x.ndim - 2), columns))


def _residual(x: jax.Array, decoding: bool) -> jax.Array:
    """A residual stream [*batch, T, d] split over devices by its rows alone."""
    return constrained(x, ("rows", *[None] * (x.ndim - 1)), DECODE_RULES) if decoding else _training_rows(x, None)


def _write(cache: jax.Array, new: jax.Array, offset: jax.Array | int, place: jax.Array | None = None) -> jax.Array:
    """`cache` [kv_heads, rows, capacity, head_dim] with `new` [kv_heads, *batch, T, head_dim] from `offset` on.

    With a `place`, the cache has all blocks' on a leading axis. An `offset` [rows] is each row's own, for one token.
    """
    before = () if place is None else (place,)
    kv_heads, rows = cache.shape[len(before) : len(before) + 2]
    if jnp.ndim(offset):
        every, number = jnp.arange(kv_heads)[:, None], jnp.arange(rows)
        written = cache.at[(*before, every, number, offset)].set(new.reshape(kv_heads, rows, new.shape[-1]))
        return _cache(written, len(before))
    new = new.reshape(*(1 for _ in before), kv_heads, rows, *new.shape[-2:])
    return _cache(jax.lax.dynamic_update_slice(cache, new, (*before, 0, 0, offset, 0)), len(before))


def _cache(x: jax.Array, stacked: int = 0) -> jax.Array:
    """Keys or values [kv_heads, *batch, T, head_dim] as decoding's attention reads them, `stacked` axes before."""
    batch = ("batch",) if x.ndim - stacked > 3 else ()
    axes = (*[None] * stacked, "kv_heads", *batch)
    return constrained(x, (*axes, *[None] * (x.ndim - len(axes))))


def _one_of(tables: Sequence[Any], index: jax.Array | int) -> Any:
    """`tables[index]`, where the index may be traced."""
    if len(tables) == 1 or isinstance(index, int):
        return tables[index if isinstance(index, int) else 0]
    return jax.tree.map(lambda *parts: jnp.stack(parts)[index], *tables)


def _layer(stacked: Any, index: Any) -> Any:
    """One layer's slice of every array in a stacked tree."""
    if isinstance(index, int):
        return jax.tree.map(lambda w: w[index], stacked)
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), stacked)


def key_values(caches: Sequence[LayerCache], segments: Sequence[Segment]) -> tuple[KeyValues, ...]:
    """What `Transformer.run` kept of segments, as later ones attend to it: stacked over blocks."""
    pairs = zip(caches, segments, strict=True)
    return tuple(KeyValues(cache.k, cache.v, segment.positions, segment.valid) for cache, segment in pairs)


class Decoding(NamedTuple):
    """What a decode loop reads and grows: `Transformer.decode` says how `contexts` and `own` look."""

    variables: Any
    weights: list[BlockWeights] | None
    contexts: Any
    own: Any


def for_decoding(role: nn.Module, variables: Any, contexts: Sequence[KeyValues], own: KeyValues) -> Decoding:
    """What a decode loop of a module with an `lm` should read, from its variables and stacked keys and values.

    On a mesh the variables are laid out anew (`mesh.DECODE_RULES`), once for all tokens. On a CPU blocks are taken
    apart: a slice of a stack is a copy there, made at every token if inside the loop (2.0 of a rollout's 4.7 s).
    Elsewhere copies would take the base's memory once more, for what the compiler can make part of the product that
    reads it, and a loop over layers compiles as quickly for 80 of them as for one.
    """
    lm = constrained_tree(variables["params"]["lm"], model_weights(role.arch), DECODE_RULES)
    variables = {**variables, "params": {**variables["params"], "lm": lm}}
    if adapters := variables.get("lora", {}).get("lm", {}).get("blocks"):
        rank = next(iter(adapters.values()))["a"].shape[1]
        adapters = constrained_tree(adapters, adapter_weights(role.arch, rank), DECODE_RULES)
        variables["lora"] = {"lm": {"blocks": adapters}}
    if platform_of(jax.tree.leaves(lm)[0]) != "cpu":
        return Decoding(variables, None, contexts, own)
    apart = lambda kv, index: kv._replace(k=kv.k[index], v=kv.v[index])  # noqa: E731
    return Decoding(
        variables,
        apply(role, variables, method=lambda role: role.lm.block_weights()),
        [tuple(apart(kv, index) for kv in contexts) for index in range(role.arch.num_layers)],
        [apart(own, index) for index in range(role.arch.num_layers)],
    )


def random_params(key: jax.Array, arch: Arch, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A randomly initialised model."""
    leaves, tree = jax.tree.flatten(model_weights(arch), is_leaf=is_weight)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [init_weight(k, w, dtype) for k, w in zip(keys, leaves, strict=True)])
