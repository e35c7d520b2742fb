"""Counts the FLOPs and bytes that the mathematics of the steps needs, from shapes alone and without recomputation."""

from __future__ import annotations

import math
from typing import NamedTuple

from nlae_jax.config import Config
from nlae_jax.lm.arch import Arch, block_weights
from nlae_jax.roles.protocol import Protocol


class Shapes(NamedTuple):
    """The sizes of a config's steps, in tokens and rows."""

    prefix: int  # tokens of the encoder's prompt before the slot
    act: int  # the slot and the prompt's tail
    response: int
    wrap: int  # the decoder's prompt without the explanation
    activations: int  # B, of an RL step
    group: int  # G, samples of each activation
    sft_batch: int

    @property
    def samples(self) -> int:
        """The number of samples of an RL step, B · G."""
        return self.activations * self.group

    def unshared(self) -> Shapes:
        """Returns the sizes for as many samples, each with its own prompt."""
        return self._replace(prefix=0, act=self.prefix + self.act, activations=self.samples, group=1)


def shapes_of(config: Config, protocol: Protocol) -> Shapes:
    """Returns the sizes of a config's steps."""
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
    """Returns the forward FLOPs of one block on `tokens` tokens, which attend to `seen` keys in all.

    They are those of matrices, scores and weighted values. If blocks differ, it is their mean. DeltaNet corrects and
    reads its matrix once a token, however many tokens came before. Only the experts that a token passes count.
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
    """Returns how many numbers one token's queries have, and its keys, in all blocks together."""
    count = arch.count("attention_layers") if arch.mixers else arch.num_layers
    queries, keys = count * arch.num_heads * arch.head_dim, count * arch.num_kv_heads * arch.head_dim
    if (wide := arch.global_attention) is not None:
        count = arch.count("global_layers") * wide.head_dim
        queries, keys = queries + count * arch.num_heads, keys + count * wide.num_kv_heads
    return queries, keys


def _memory(arch: Arch) -> int:
    """Returns how many numbers a DeltaNet block's state of one row has."""
    return arch.delta.value_heads * arch.delta.key_dim * arch.delta.value_dim if arch.delta else 0


def _causal(tokens: int, before: int) -> float:
    """Counts the keys that consecutive tokens attend to in all, with `before` keys before the first."""
    return tokens * before + tokens * (tokens + 1) / 2


def needed_flops(arch: Arch, layer: int, rank: int, shapes: Shapes) -> dict[str, float]:
    """Returns the FLOPs of every phase.

    A backward pass takes as many as the forward pass for the inputs, and as many again for weights that are trained.
    """
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
