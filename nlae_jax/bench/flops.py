"""FLOPs and bytes that the mathematics of the steps needs, from shapes alone and without recomputation."""

from __future__ import annotations

import math
from typing import NamedTuple

from nlae_jax.config import Config
from nlae_jax.lm.arch import Arch, block_weights
from nlae_jax.roles.protocol import Protocol


class Shapes(NamedTuple):
    """Tokens of the constant prompt, of slot and tail, of a response, of the decoder's frame; B, G and SFT's batch."""

    prefix: int
    act: int
    response: int
    wrap: int
    activations: int
    group: int
    sft_batch: int

    @property
    def samples(self) -> int:
        return self.activations * self.group

    def unshared(self) -> Shapes:
        """As many samples, each with a prompt of its own."""
        return self._replace(prefix=0, act=self.prefix + self.act, activations=self.samples, group=1)


def shapes_of(config: Config, protocol: Protocol) -> Shapes:
    """Those of a config's steps."""
    return Shapes(
        prefix=len(protocol.encoder_prefix),
        act=1 + len(protocol.encoder_tail),
        response=config.rl.max_new_tokens,
        wrap=len(protocol.decoder_prefix) + len(protocol.decoder_suffix),
        activations=config.rl.activations_per_step,
        group=config.rl.samples_per_activation,
        sft_batch=config.sft.batch_size,
    )


def block_flops(arch: Arch, tokens: int, seen: float) -> float:
    """Forward FLOPs of one block on so many tokens that see `seen` keys in all: matrices, scores, weighted values.

    Where blocks differ, of their mean. DeltaNet corrects and reads its matrix once a token, however many came before.
    Of experts those count that a token passes.
    """
    matrices = _matrices(arch, arch.experts.per_token if arch.experts else 0) / arch.num_layers
    queries, _ = _widths(arch)
    delta = arch.count("delta_layers") / arch.num_layers if arch.mixers else 0.0
    return 2.0 * matrices * tokens + 4.0 * queries / arch.num_layers * seen + delta * 6.0 * _memory(arch) * tokens


def _matrices(arch: Arch, experts: int) -> float:
    """Numbers in the matrices of all blocks together, with so many of each block's experts."""
    share = experts / arch.experts.count if arch.experts else 0.0
    return sum(
        math.prod(weight.shape) * (share if "experts" in weight.axes else 1.0)
        for weight in block_weights(arch).values()
        if weight.fan_in
    )


def _widths(arch: Arch) -> tuple[int, int]:
    """Numbers of one token's queries, and of its keys, in all blocks together."""
    count = arch.count("attention_layers") if arch.mixers else arch.num_layers
    queries, keys = count * arch.num_heads * arch.head_dim, count * arch.num_kv_heads * arch.head_dim
    if (wide := arch.global_attention) is not None:
        count = arch.count("global_layers") * wide.head_dim
        queries, keys = queries + count * arch.num_heads, keys + count * wide.num_kv_heads
    return queries, keys


def _memory(arch: Arch) -> int:
    """Numbers in the matrices that a block of DeltaNet keeps for one row."""
    return arch.delta.value_heads * arch.delta.key_dim * arch.delta.value_dim if arch.delta else 0


def _causal(tokens: int, before: int) -> float:
    """Keys seen by consecutive tokens with `before` keys before them."""
    return tokens * before + tokens * (tokens + 1) / 2


def needed_flops(arch: Arch, layer: int, rank: int, shapes: Shapes) -> dict[str, float]:
    """FLOPs of every phase. A backward pass takes the forward's once for inputs, and again for weights that train."""
    s, head = shapes, 2.0 * arch.d_model * arch.vocab_size
    prompt = block_flops(arch, s.prefix, _causal(s.prefix, 0))
    prompt += s.activations * block_flops(arch, s.act, _causal(s.act, s.prefix))
    response = s.samples * block_flops(arch, s.response, _causal(s.response, s.prefix + s.act))
    forward = arch.num_layers * (prompt + response) + s.samples * s.response * head
    decoder_tokens = s.wrap + s.response
    decoder = (
        (layer + 1) * s.samples * block_flops(arch.truncated(layer + 1), decoder_tokens, _causal(decoder_tokens, 0))
    )
    passes = 2 if rank else 3
    described = s.sft_batch * block_flops(arch, s.act + s.response, _causal(s.act + s.response, s.prefix))
    sft = arch.num_layers * (block_flops(arch, s.prefix, _causal(s.prefix, 0)) + described)
    return {
        "rollout": forward,
        "score": passes * decoder,
        "reference": forward,
        "policy": passes * forward,
        "encoder_sft": passes * (sft + s.sft_batch * s.response * head),
    }


def decode_bytes(arch: Arch, shapes: Shapes, itemsize: int) -> float:
    """Bytes that decoding has to read: every weight, key and value once a token; states are also written.

    Of experts as many count as a token of all samples can pass at most.
    """
    passed = min(arch.experts.count, shapes.samples * arch.experts.per_token) if arch.experts else 0
    weights = shapes.response * (_matrices(arch, passed) + arch.d_model * arch.vocab_size)
    of_responses = shapes.samples * shapes.response * (shapes.response + 1) / 2
    of_prompts = shapes.response * (shapes.prefix + shapes.activations * shapes.act)
    _, keys = _widths(arch)
    delta = arch.count("delta_layers") if arch.mixers else 0
    states = 2 * 4 * delta * _memory(arch) * shapes.samples * shapes.response  # float32
    read = weights + 2 * keys * (of_responses + of_prompts)
    return itemsize * read + states
