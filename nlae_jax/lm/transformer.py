"""The decoder-only transformer, as a Linen module over explicit parameters.

`Transformer` declares its weights from `arch.model_weights` and runs any range of its blocks on any tuple of segments
(see `attention.py`). A role with fewer blocks than the base runs the base's first blocks, without a copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nlae_jax.lm import head
from nlae_jax.lm.arch import MIXERS, Arch, model_weights
from nlae_jax.lm.block import Block, BlockWeights, LayerCache, Segment, cached, layer_of, layers_of, residual
from nlae_jax.lm.lora import adapter_weights
from nlae_jax.lm.mixed import of_layer, over_blocks, stacked_caches
from nlae_jax.lm.modules import apply
from nlae_jax.lm.norms import norm
from nlae_jax.lm.segments import KeyValues, of_block, of_kind
from nlae_jax.mesh import DECODE_RULES, Weight, constrained_tree, platform_of
from nlae_jax.runtime.errors import UserError

REMAT = {
    "none": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.checkpoint_dots,
    # The outputs of linear layers and attention. That is less than half of what "dots" keeps, and as fast.
    "linear": jax.checkpoint_policies.save_only_these_names(
        *("q", "k", "v", "attention", "o", "gate", "up", "q_gate"),
        *("delta_q", "delta_k", "delta_v", "delta_z", "delta_o", "shared_gate", "shared_up"),
        *("global_q", "global_k", "global_v", "global_o"),
    ),
}


def init_weight(key: jax.Array, weight: Weight, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Draws a normal matrix of standard deviation `fan_in ** -0.5`. Returns ones for a weight whose `fan_in` is 0."""
    if weight.fan_in == 0:
        return jnp.ones(weight.shape, dtype)
    return (jax.random.normal(key, weight.shape, jnp.float32) * weight.fan_in**-0.5).astype(dtype)


class Push(NamedTuple):
    """What is added to the output of block `layer`: `added`, which spreads to the residual stream's shape."""

    added: jax.Array
    layer: int


def pushed(x: jax.Array, push: Push | None, index: jax.Array) -> jax.Array:
    """Adds the push to the output `x` of block `index`, if it is meant for this block."""
    return x if push is None else jnp.where(index == push.layer, x + push.added.astype(x.dtype), x)


def check_tokens(arch: Arch, count: int) -> None:
    """Raises UserError if the model cannot be run on a sequence of `count` tokens."""
    if 0 < arch.most_tokens < count:
        raise UserError(
            f"a sequence of {count} tokens is too long for this model, which can be run on {arch.most_tokens}"
        )


def is_weight(node: Any) -> bool:
    """Returns whether a node of a tree is a declared weight, for `jax.tree.map(..., is_leaf=is_weight)`."""
    return isinstance(node, Weight)


class Transformer(nn.Module):
    """A decoder-only LM. Variables: `params` (`arch.model_weights`) and, optionally, `lora` (`lora.adapter_weights`).

    `lora_scale` is alpha / rank. `remat` is the entry of `REMAT` that says what is kept of a block for the backward
    pass. `attention` is the implementation of `attention.attend`. `bounded` says that a sequence of more columns than
    the model can be run on is refused. Without it the caller calls `check_tokens`, and need not count padding.
    """

    arch: Arch
    lora_scale: float = 1.0
    remat: str = "linear"
    attention: str = "auto"
    param_dtype: Any = jnp.float32
    bounded: bool = True

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
        self.final_norm_bias = declare("final_norm_bias", weights["final_norm_bias"]) if self.arch.layer_norm else None
        self.positions = declare("positions", weights["positions"]) if self.arch.positions else None
        self.head = self.embedding if self.arch.tied_head else declare("head", weights["head"])

    def _adapters(self) -> dict[str, Any]:
        return self.get_variable("lora", "blocks") if self.has_variable("lora", "blocks") else {}

    def embed(self, ids: jax.Array) -> jax.Array:
        """Returns the scaled embeddings [..., d] of token ids [...] int."""
        embedded = self.embedding[ids]
        return (
            embedded if self.arch.embed_scale == 1.0 else embedded * jnp.asarray(self.arch.embed_scale, embedded.dtype)
        )

    def _placed(self, x: jax.Array, positions: jax.Array, length: int) -> jax.Array:
        """Adds the learned embeddings of positions [*batch, T], if the model has any, to x [*batch, T, d].

        `length` is the number of a sequence's columns. Raises UserError if the model is `bounded` and has fewer.
        """
        if self.bounded:
            check_tokens(self.arch, length)
        if self.positions is None:
            return x
        return x + self.positions[positions].astype(x.dtype)

    def run(
        self, segments: Sequence[Segment], start: int = 0, stop: int | None = None, keep_caches: bool = False
    ) -> tuple[tuple[jax.Array, ...], tuple[LayerCache, ...]]:
        """Runs the blocks from `start` to `stop` (exclusive) on all segments at once, scanned over layers.

        Returns each segment's residual stream after the last block, [*batch, T, d], and with `keep_caches` each
        segment's keys and values (and states of DeltaNet), stacked over the layers that have them.
        """
        stop = self.arch.num_layers if stop is None else stop
        length = sum(s.x.shape[-2] for s in segments)
        xs = tuple(self._placed(s.x, s.positions, length) if start == 0 else s.x for s in segments)
        block = Block(self.arch, self.lora_scale, segments, self.attention)
        if self.arch.mixers:
            return self._mixed_run(block, xs, segments, start, stop, keep_caches)

        def body(xs: tuple[jax.Array, ...], inputs: tuple[Any, Any, Any]) -> tuple[tuple[jax.Array, ...], Any]:
            weights, adapters, layer = inputs
            weights = weights if not partial else layer_of(self.blocks, weights)
            xs, caches = block(weights, adapters, xs, layer=layer)
            return xs, jax.tree.map(cached, caches) if keep_caches else ()

        # A part of the stack is read in place, block by block: slicing it first would copy it.
        partial = (start, stop) != (0, self.arch.num_layers)
        weights = jnp.arange(start, stop) if partial else self.blocks
        adapters = self._adapters()
        if adapters and partial:
            adapters = jax.tree.map(lambda a: a[start:stop], adapters)
        body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
        layers = jax.tree.map(lambda a: a[start:stop], layers_of(self.arch))
        return jax.lax.scan(body, xs, (weights, adapters, layers))

    def _mixed_run(
        self,
        block: Block,
        xs: tuple[jax.Array, ...],
        segments: Sequence[Segment],
        start: int,
        stop: int,
        keep_caches: bool,
    ) -> tuple[tuple[jax.Array, ...], tuple[LayerCache, ...]]:
        """Does `run` for a model with several kinds of blocks."""
        layers = layers_of(self.arch)

        def step(xs: Any, weights: Any, adapters: Any, number: Any, places: Any) -> tuple[Any, Any]:
            layer = jax.tree.map(lambda a: jnp.asarray(a)[number], layers)
            xs, caches = block(weights, adapters, xs, layer=layer)
            return xs, caches if keep_caches else ()

        policy = REMAT[self.remat]
        xs, outputs = over_blocks(self.arch, self.blocks, self._adapters(), step, xs, start, stop, policy)
        return xs, stacked_caches(self.arch, outputs, segments) if keep_caches else ()

    def neurons(self, segment: Segment, layer: int) -> jax.Array:
        """Returns the activations of the MLP's neurons in block `layer` on a segment, [*batch, T, d_ff].

        Raises UserError for a mixture of experts, whose neurons depend on the router.
        """
        if self.arch.experts is not None:
            raise UserError(f"the neurons of a model with experts ({self.arch.family}) cannot be read")
        (hidden,), _ = self.run((segment,), stop=layer)
        block = Block(self.arch, self.lora_scale, [segment], self.attention)
        weights, adapters = (of_layer(self.arch, stacks, layer) for stacks in (self.blocks, self._adapters()))
        if self.arch.parallel:
            return block.neurons(hidden, weights, adapters)
        # A block whose MLP gives zeros returns the residual stream that the MLP reads.
        silent = {**weights, "down": jnp.zeros_like(weights["down"])}
        if "layer_scale" in weights:
            silent["layer_scale"] = jnp.ones_like(weights["layer_scale"])
        if "down_bias" in weights:
            silent["down_bias"] = jnp.zeros_like(weights["down_bias"])
        without_down = {name: adapter for name, adapter in adapters.items() if name != "down"}
        kind = jax.tree.map(lambda a: int(a[layer]), layers_of(self.arch))
        (middle,), _ = block(silent, without_down, (hidden,), layer=kind)
        return block.neurons(middle, weights, adapters)

    def block_weights(self) -> list[BlockWeights]:
        """Returns the weights and adapters of each block."""
        adapters = self._adapters()
        block = lambda stacks, index: of_layer(self.arch, stacks, index)  # noqa: E731
        return [(block(self.blocks, index), block(adapters, index)) for index in range(self.arch.num_layers)]

    def decode(
        self,
        segment: Segment,
        contexts: Any,
        growing: Any,
        offset: jax.Array,
        weights: Sequence[BlockWeights] | None = None,
        push: Push | None = None,
    ) -> tuple[jax.Array, Any]:
        """Feeds one token to every row. Returns the last residual stream and the grown caches.

        The token's keys and values are written into the caches `growing` at `offset`, a scalar or one for each row.
        `weights` is a list of each block's weights. With it, layers are unrolled, and `contexts[l]` (a `KeyValues` per
        segment) and `growing[l]` belong to block l. Without it, layers are scanned, and `contexts` and `growing` have
        keys and values of all blocks on a leading axis (see `for_decoding`). `push` is added to the output of its
        block.
        """
        block = Block(self.arch, self.lora_scale, [segment], self.attention)
        parts = (*contexts, growing) if weights is None else (*contexts[0], growing[0])
        x = self._placed(segment.x, segment.positions, sum(kv.positions.shape[-1] for kv in parts))
        x = residual(x, decoding=True)
        if weights is None:
            return self._scanned_decode(block, x, contexts, growing, offset, push)
        xs: tuple[jax.Array, ...] = (x,)
        grown = []
        layers = layers_of(self.arch)
        for index, (base, adapters) in enumerate(weights):
            layer = jax.tree.map(lambda a, index=index: int(a[index]), layers)
            xs, (cache,) = block(base, adapters, xs, contexts[index], growing[index], offset, layer)
            xs = (pushed(xs[0], push, jnp.asarray(index)),)
            grown.append(growing[index]._replace(k=cache.k, v=cache.v, state=cache.state))
        return xs[0], grown

    def _scanned_decode(
        self,
        block: Block,
        x: jax.Array,
        contexts: Sequence[KeyValues],
        growing: KeyValues,
        offset: jax.Array,
        push: Push | None,
    ) -> tuple[jax.Array, KeyValues]:
        """Decodes in a loop over layers. It carries the stacked caches and writes in place, which copies nothing."""
        if self.arch.mixers:
            return self._mixed_decode(block, x, contexts, growing, offset, push)

        def body(carry: tuple[jax.Array, LayerCache], inputs: Any) -> tuple[Any, None]:
            (x, grown), (place, base, adapters, layer, read) = carry, inputs
            seen = [kv._replace(k=k, v=v) for kv, (k, v) in zip(contexts, read, strict=True)]
            room = growing._replace(k=grown.k, v=grown.v)
            (x,), (grown,) = block(base, adapters, (x,), seen, room, offset, layer, place)
            return (pushed(x, push, place), grown), None

        places, read = jnp.arange(self.arch.num_layers), [(kv.k, kv.v) for kv in contexts]
        inputs = places, self.blocks, self._adapters(), layers_of(self.arch), read
        (x, grown), _ = jax.lax.scan(body, (x, LayerCache(growing.k, growing.v)), inputs)
        return x, growing._replace(k=grown.k, v=grown.v)

    def _mixed_decode(
        self,
        block: Block,
        x: jax.Array,
        contexts: Sequence[KeyValues],
        growing: KeyValues,
        offset: jax.Array,
        push: Push | None,
    ) -> tuple[jax.Array, KeyValues]:
        """Does `_scanned_decode` for a model with several kinds of blocks."""
        layers = layers_of(self.arch)

        def step(carry: Any, weights: Any, adapters: Any, number: Any, places: Any) -> tuple[Any, Any]:
            x, grown = carry
            layer = jax.tree.map(lambda a: jnp.asarray(a)[number], layers)
            kind, place = next((MIXERS[axis], place) for axis, place in places.items() if axis in MIXERS)
            seen = [of_kind(kv, kind, lambda stack: layer_of(stack, place)) for kv in contexts]
            room = of_kind(growing._replace(**grown._asdict()), kind, lambda stack: stack)
            (x,), (cache,) = block(weights, adapters, (x,), seen, room, offset, layer, jnp.asarray(place))
            if kind == "global":
                cache = LayerCache(None, None, global_kv=(cache.k, cache.v))
            kept = {name: part for name, part in cache._asdict().items() if part is not None}
            return (pushed(x, push, number), grown._replace(**kept)), ()

        carry = x, LayerCache(growing.k, growing.v, growing.state, growing.global_kv)
        adapters = self._adapters()
        (x, grown), _ = over_blocks(self.arch, self.blocks, adapters, step, carry, 0, self.arch.num_layers)
        return x, growing._replace(**grown._asdict())

    def logits(self, x: jax.Array) -> jax.Array:
        """Applies final norm and head to x [..., d]: logits [..., V] float32."""
        return head.logits(self._normed(x), self.head, self.arch.logit_softcap)

    def token_log_probs(self, x: jax.Array, targets: jax.Array, chunk: int = 256) -> tuple[jax.Array, jax.Array]:
        """Returns log p(target) and entropy, each [B, ...] float32, from x [B, ..., d]; see `head.log_probs`."""
        return head.log_probs(self._normed(x), self.head, targets, self.arch.logit_softcap, chunk)

    def token_loss(
        self, x: jax.Array, targets: jax.Array, loss_of: head.LossOf, *extras: jax.Array, chunk: int = 256
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns the sum of `loss_of(log-probs, *extras)`, and log-probs and entropies; see `head.loss`."""
        return head.loss(loss_of, self.arch.logit_softcap, chunk, self._normed(x), self.head, targets, extras)

    def _normed(self, x: jax.Array) -> jax.Array:
        """Returns the head's input [..., d]: x after the final norm, divided by the architecture's logit divisor."""
        normed = norm(self.arch, x, self.final_norm, self.final_norm_bias)
        return normed if self.arch.logit_divisor == 1.0 else normed * jnp.asarray(1 / self.arch.logit_divisor, x.dtype)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns logits [B, T, V] float32. ids: [B, T] int, padded; mask: [B, T] bool, true for tokens."""
        xs, _ = self.run((self.padded(ids, mask),))
        return self.logits(xs[0])

    def padded(self, ids: jax.Array, mask: jax.Array) -> Segment:
        """Makes one segment of a padded batch: ids and mask [B, T]. Positions count a row's real tokens from 0."""
        return Segment(self.embed(ids), jnp.maximum(jnp.cumsum(mask, -1) - 1, 0).astype(jnp.int32), mask.astype(bool))


def key_values(caches: Sequence[LayerCache], segments: Sequence[Segment]) -> tuple[KeyValues, ...]:
    """Joins the caches of `Transformer.run` with positions and validity, so that later segments can attend to them."""
    pairs = zip(caches, segments, strict=True)
    return tuple(KeyValues(c.k, c.v, segment.positions, segment.valid, c.state, c.global_kv) for c, segment in pairs)


class Decoding(NamedTuple):
    """The variables and caches of a decode loop. `Transformer.decode` describes `weights`, `contexts` and `growing`."""

    variables: Any
    weights: list[BlockWeights] | None
    contexts: Any
    growing: Any


def for_decoding(role: nn.Module, variables: Any, contexts: Sequence[KeyValues], growing: KeyValues) -> Decoding:
    """Prepares a decode loop of `role`, a module with an `lm`, from its variables and stacked keys and values.

    On a mesh the variables get another layout (`mesh.DECODE_RULES`), once for all tokens. On a CPU the stacks are split
    into blocks before the loop, because a slice of a stack is a copy there; in the loop it is made at every token (2.0
    of a rollout's 4.7 s). On accelerators the stacks stay: the compiler joins the slice with the product that reads it,
    copies would take the base's memory once more, and a loop over layers compiles as quickly for 80 layers as for one.
    """
    lm = constrained_tree(variables["params"]["lm"], model_weights(role.arch), DECODE_RULES)
    variables = {**variables, "params": {**variables["params"], "lm": lm}}
    if adapters := variables.get("lora", {}).get("lm", {}).get("blocks"):
        rank = next(iter(adapters.values()))["a"].shape[-2]
        declared = adapter_weights(role.arch, rank, experts=True)
        adapters = constrained_tree(adapters, {name: declared[name] for name in adapters}, DECODE_RULES)
        variables["lora"] = {"lm": {"blocks": adapters}}
    if platform_of(jax.tree.leaves(lm)[0]) != "cpu":
        return Decoding(variables, None, contexts, growing)
    block_of = lambda kv, index: of_block(role.arch, kv, index)  # noqa: E731
    return Decoding(
        variables,
        apply(role, variables, method=lambda role: role.lm.block_weights()),
        [tuple(block_of(kv, index) for kv in contexts) for index in range(role.arch.num_layers)],
        [block_of(growing, index) for index in range(role.arch.num_layers)],
    )


def random_params(key: jax.Array, arch: Arch, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Returns random parameters of a model: the tree of `model_weights(arch)` in `dtype`."""
    leaves, tree = jax.tree.flatten(model_weights(arch), is_leaf=is_weight)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [init_weight(k, w, dtype) for k, w in zip(keys, leaves, strict=True)])
