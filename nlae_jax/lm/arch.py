"""The architecture of a decoder-only language model as one frozen dataclass, and the weights that follow from it.

Differences between families are fields of this dataclass, so the transformer never looks at a family's name.
`families.py` reads an `Arch` from an HF `config.json`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nlae_jax.mesh import Weight


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """`rope_type: llama3`: long wavelengths are stretched by `factor`, short ones kept, the rest interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """`rope_type: linear`: all wavelengths are stretched by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class YarnRope:
    """`rope_type: yarn` (Peng et al. 2023): slow pairs are stretched by `factor`, fast ones are kept.

    A pair is slow if it makes fewer than `beta_slow` turns in `original_max_positions`, and fast if it makes more than
    `beta_fast`. Between them the stretching grows linearly; with `truncate` that ramp begins and ends at whole
    dimensions. Cosines and sines are multiplied by `attention_factor`.
    """

    factor: float
    attention_factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class LongRope:
    """`rope_type: longrope` (Ding et al. 2024): each pair's wavelength has its own factor.

    Sequences of up to `original_max_positions` tokens use the short factors. A longer sequence would use the long ones
    from its first token on, so that all cached keys would change; such sequences are not supported. Cosines and sines
    are multiplied by `attention_factor`.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    attention_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class QueryGrowth:
    """A query at position p is multiplied by 1 + `beta` · log(1 + ⌊p / `every`⌋) (Llama 4, Ministral 3)."""

    beta: float
    every: int


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of `count` MLPs, of which each token uses `per_token`, weighted by the router's softmax.

    `normalised` says whether the weights of a token's experts are scaled to sum to 1. `shared` is the width of one more
    MLP that every token uses (0: none). The MLP's output is multiplied by the sigmoid of a projection of its input.

    `apart` (Gemma 4) says that the experts and the shared MLP have their own norms of inputs and outputs, and that
    their outputs are added without a gate. The router then reads the residual stream through its own norm, and each
    expert has a number that its weight is multiplied by.
    """

    count: int
    per_token: int
    normalised: bool = False
    shared: int = 0
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class ClampedGate:
    """gpt-oss's SwiGLU: min(gate, limit) · σ(alpha · min(gate, limit)) · (1 + clip(up, ±limit))."""

    alpha: float
    limit: float


@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """Gated DeltaNet (Yang et al. 2025) in the place of attention: each head keeps a matrix instead of keys.

    There are `key_heads` heads of queries and keys of size `key_dim`, and `value_heads` heads of values of size
    `value_dim`. Each key head serves the same number of value heads. Queries, keys and values pass a causal convolution
    over `width` tokens, channel by channel.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    width: int = 4


@dataclasses.dataclass(frozen=True)
class GlobalAttention:
    """Attention of blocks of the kind "global", whose heads have other sizes than those of the other blocks.

    RoPE turns the first `turned_pairs` pairs of a head. Their frequencies are the whole head's, over `rope_factor`.
    """

    num_kv_heads: int
    head_dim: int
    rope_theta: float
    turned_pairs: int
    rope_factor: float = 1.0
    keys_are_values: bool = False  # values are the keys before norm and RoPE; there is no projection to values


@dataclasses.dataclass(frozen=True)
class Arch:
    """Sizes and constants of one decoder-only transformer of `num_layers` blocks, counted from 0.

    Fields hold all differences between families. The defaults are Llama's.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int  # width of an MLP, or of one expert
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Rope | LinearRope | YarnRope | LongRope | None = None  # of blocks whose RoPE is "global"
    tied_head: bool = True
    family: str = "llama"
    activation: str = "silu"  # of the gate, or in an MLP without gate of "up": silu, gelu_tanh, gelu or relu
    biases: tuple[str, ...] = ()  # names of the linear layers that have a bias
    qk_norm: str = ""  # RMS norm of queries and keys: "head" (each head by itself) or "all" (all heads as one vector)
    pre_norms: bool = True  # norms of the inputs of attention and MLP
    post_norms: bool = False  # norms of the outputs of attention and MLP
    norm_offset: float = 0.0  # added to the weights of all norms
    embed_scale: float = 1.0  # factor of embeddings
    attention_scale: float = 0.0  # factor of attention's scores; 0: head_dim ** -0.5
    attention_softcap: float = 0.0  # scores pass through cap · tanh(score / cap); 0: they do not
    logit_softcap: float = 0.0  # logits pass through cap · tanh(logit / cap); 0: they do not
    local_rope_theta: float = 0.0  # RoPE base of blocks whose RoPE is "local"
    ropes: tuple[str, ...] = ()  # per block: "global", "local" or "none"; empty: all global
    windows: tuple[int, ...] = ()  # per block: number of keys that a query sees, its own included, 0: all; empty: all 0
    layer_norm: bool = False  # norms subtract the mean and add a bias (norms of queries and keys never do)
    gated: bool = True  # the MLP has a gate; without one, the activation is that of "up"
    parallel: bool = False  # the MLP reads the residual stream from before attention
    positions: int = 0  # number of positions with a learned embedding; 0: there are none
    rotary_dim: int | None = None  # leading dimensions of a head that RoPE turns; None: all, 0: none
    residual_scale: float = 1.0  # factor of the outputs of attention and MLP
    logit_divisor: float = 1.0  # divisor of logits
    query_growth: QueryGrowth | None = None
    clip_qkv: float = 0.0  # queries, keys and values are clipped to ± this number; 0: they are not
    sinks: bool = False  # each head has the score of one more key, whose value is zero
    experts: Experts | None = None
    clamped_gate: ClampedGate | None = None  # in the place of the activation
    attention_gate: bool = False  # attention's output is multiplied by the sigmoid of a projection of its input
    mixers: tuple[str, ...] = ()  # per block a kind of `MIXERS`; empty: "attention" in all
    delta: DeltaNet | None = None
    global_attention: GlobalAttention | None = None
    value_norm: bool = False  # RMS norm of each head's values, without weights
    layer_scales: bool = False  # each block multiplies its output by a constant number of the model

    @property
    def most_tokens(self) -> int:
        """The largest supported number of tokens of a sequence; 0: any number."""
        return self.rope_scaling.original_max_positions if isinstance(self.rope_scaling, LongRope) else self.positions

    def within(self, count: int) -> int:
        """Returns `count`, or the largest supported number of tokens of a sequence if that is smaller."""
        return min(count, self.most_tokens or count)

    def tempered(self, temperature: float) -> Arch:
        """Returns the architecture whose logits are those of this one, divided by `temperature` T.

        With a soft cap c, c tanh(z/c) / T = (c/T) tanh((z/T) / (c/T)), so the cap is divided too.
        """
        divisor, softcap = self.logit_divisor * temperature, self.logit_softcap / temperature
        return dataclasses.replace(self, logit_divisor=divisor, logit_softcap=softcap)

    def truncated(self, num_layers: int) -> Arch:
        """Returns the architecture of the first `num_layers` blocks."""
        windows, mixers = self.windows[:num_layers], self.mixers[:num_layers]
        return dataclasses.replace(
            self,
            num_layers=num_layers,
            ropes=self.ropes[:num_layers],
            windows=windows if any(windows) else (),
            mixers=mixers,
        )

    def count(self, blocks: str, stop: int | None = None) -> int:
        """Counts the blocks among the first `stop` (None: all) that have an entry in stacks with the axis `blocks`."""
        stop = self.num_layers if stop is None else stop
        return self.mixers[:stop].count(MIXERS[blocks]) if blocks in MIXERS else stop

    def place(self, blocks: str, layer: int) -> int | None:
        """Returns the entry of block `layer` in stacks with the axis `blocks`, or None where it has none."""
        if blocks in MIXERS and self.mixers[layer] != MIXERS[blocks]:
            return None
        return self.count(blocks, layer)


# A block mixes tokens by attention, DeltaNet or "global" attention. The weights of each are stacked over its blocks:
# name of the stacks' leading axis, kind of the blocks.
MIXERS = {"attention_layers": "attention", "delta_layers": "delta", "global_layers": "global"}


def linear_layers(arch: Arch) -> dict[str, Weight]:
    """Declares the matrices [blocks, in, out] that every token uses: no experts, no router."""
    heads, kv_heads = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    matrices = {
        "q": (arch.d_model, heads, "embed", "heads"),
        "k": (arch.d_model, kv_heads, "embed", "kv_heads"),
        "v": (arch.d_model, kv_heads, "embed", "kv_heads"),
        "o": (heads, arch.d_model, "heads", "embed"),
    }
    if arch.attention_gate:
        matrices["q_gate"] = matrices["q"]
    attention = _attention_blocks(arch)
    weights = {name: _matrix(arch, attention, *matrix) for name, matrix in matrices.items()}
    if arch.delta is not None:
        weights |= {name: _matrix(arch, "delta_layers", *matrix) for name, matrix in _delta_matrices(arch, arch.delta)}
    if arch.global_attention is not None:
        matrices = _global_matrices(arch, arch.global_attention)
        weights |= {name: _matrix(arch, "global_layers", *matrix) for name, matrix in matrices.items()}
    if arch.experts is None:
        weights |= {name: _matrix(arch, "layers", *shape, *axes) for name, shape, axes in _mlp(arch)}
    elif arch.experts.shared:
        shared = _mlp(dataclasses.replace(arch, d_ff=arch.experts.shared))
        weights |= {f"shared_{name}": _matrix(arch, "layers", *shape, *axes) for name, shape, axes in shared}
    return {name: weight for name, weight in weights.items() if weight.shape[0]}


def expert_layers(arch: Arch) -> dict[str, Weight]:
    """Declares the experts' matrices [L, experts, in, out], which devices split by experts; {} in a dense model."""
    if arch.experts is None:
        return {}
    weights = {}
    for name, shape, axes in _mlp(arch):
        inside = ["none" if axis == "mlp" else axis for axis in axes]
        stacked = (arch.num_layers, arch.experts.count, *shape)
        weights[name] = Weight(stacked, ("layers", "experts", *inside), fan_in=shape[0])
    return weights


def _attention_blocks(arch: Arch) -> str:
    """Returns the name of the leading axis of attention's weights."""
    return "attention_layers" if arch.mixers else "layers"


def _matrix(arch: Arch, blocks: str, rows: int, cols: int, row_axis: str, col_axis: str) -> Weight:
    return Weight((arch.count(blocks), rows, cols), (blocks, row_axis, col_axis), fan_in=rows)


def _global_matrices(arch: Arch, attention: GlobalAttention) -> dict[str, tuple[int, int, str, str]]:
    heads, kv_heads = arch.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    values = {} if attention.keys_are_values else {"global_v": (arch.d_model, kv_heads, "embed", "kv_heads")}
    return {
        "global_q": (arch.d_model, heads, "embed", "heads"),
        "global_k": (arch.d_model, kv_heads, "embed", "kv_heads"),
        **values,
        "global_o": (heads, arch.d_model, "heads", "embed"),
    }


def _delta_matrices(arch: Arch, delta: DeltaNet) -> list[tuple[str, tuple[int, int, str, str]]]:
    """Returns name, sizes and axes of DeltaNet's wide matrices: q, k, v, the output's gate z and the output o."""
    keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
    widths = {"q": keys, "k": keys, "v": values, "z": values}
    into = [(f"delta_{name}", (arch.d_model, width, "embed", "heads")) for name, width in widths.items()]
    return [*into, ("delta_o", (values, arch.d_model, "heads", "embed"))]


def _delta_weights(arch: Arch, delta: DeltaNet, matrices: dict[str, Weight]) -> dict[str, Weight]:
    """Declares DeltaNet's other weights: per head the projections to step and decay, and the decay's rate and bias.

    `matrices` are the linear layers. The outputs of delta_q, delta_k and delta_v each pass a convolution
    [width, channels].
    """
    count, heads = arch.count("delta_layers"), delta.value_heads
    narrow = Weight((count, arch.d_model, heads), ("delta_layers", "embed", "none"), arch.d_model)
    per_head = Weight((count, heads), ("delta_layers", "none"))
    weights = {"delta_b": narrow, "delta_a": narrow, "delta_rate": per_head, "delta_bias": per_head}
    weights["delta_norm"] = Weight((count, delta.value_dim), ("delta_layers", "norm"))
    for name in ("delta_q", "delta_k", "delta_v") if count else ():
        channels = matrices[name].shape[-1]
        weights[f"{name}_conv"] = Weight(
            (count, delta.width, channels), ("delta_layers", "none", "heads"), fan_in=delta.width
        )
    return {name: weight for name, weight in weights.items() if weight.shape[0]}


def _mlp(arch: Arch) -> list[tuple[str, tuple[int, int], tuple[str, str]]]:
    """Returns name, shape and axes of an MLP's matrices."""
    widening = [(name, (arch.d_model, arch.d_ff), ("embed", "mlp")) for name in ("gate", "up")]
    return [*widening[0 if arch.gated else 1 :], ("down", (arch.d_ff, arch.d_model), ("mlp", "embed"))]


def _expert_weights(arch: Arch, experts: Experts) -> dict[str, Weight]:
    """Declares the experts' matrices, the router and norms."""
    layers = arch.num_layers
    weights = {"router": Weight((layers, arch.d_model, experts.count), ("layers", "embed", "none"), arch.d_model)}
    if experts.apart:
        weights["expert_scale"] = Weight((layers, experts.count), ("layers", "none"))
        for name in ("router_norm", "experts_norm", "experts_post_norm", "shared_post_norm"):
            weights[name] = Weight((layers, arch.d_model), ("layers", "norm"))
    elif experts.shared:
        weights["shared_share"] = Weight((layers, arch.d_model, 1), ("layers", "embed", "none"), arch.d_model)
    return weights | expert_layers(arch)


def block_weights(arch: Arch) -> dict[str, Weight]:
    """Declares the weights of all blocks, stacked on a leading axis over the blocks that have them.

    Matrices are [in, out].
    """
    weights = linear_layers(arch)
    if arch.delta is not None:
        weights |= _delta_weights(arch, arch.delta, weights)
    if arch.experts is not None:
        weights |= _expert_weights(arch, arch.experts)
    for name in arch.biases:
        if name not in weights:  # because no block is of the kind that has this linear layer
            continue
        shape, axes = weights[name].shape, weights[name].axes
        weights[f"{name}_bias"] = Weight((*shape[:-2], shape[-1]), (*axes[:-2], axes[-1]))
    pre, post = ("attn_norm", "mlp_norm"), ("attn_post_norm", "mlp_post_norm")
    for norm in (*(pre if arch.pre_norms else ()), *(post if arch.post_norms else ())):
        for name in (norm, f"{norm}_bias") if arch.layer_norm else (norm,):
            weights[name] = Weight((arch.num_layers, arch.d_model), ("layers", "norm"))
    attention = _attention_blocks(arch)
    blocks = arch.count(attention)
    if arch.qk_norm and blocks:
        whole = arch.qk_norm == "all"
        for name, count in (("q_norm", arch.num_heads), ("k_norm", arch.num_kv_heads)):
            width = count * arch.head_dim if whole else arch.head_dim
            weights[name] = Weight((blocks, width), (attention, "norm"))
    if arch.global_attention is not None and arch.qk_norm and (global_blocks := arch.count("global_layers")):
        for name in ("global_q_norm", "global_k_norm"):
            weights[name] = Weight((global_blocks, arch.global_attention.head_dim), ("global_layers", "norm"))
    if arch.layer_scales:
        weights["layer_scale"] = Weight((arch.num_layers, 1), ("layers", "none"))
    if arch.sinks and blocks:
        weights["sinks"] = Weight((blocks, arch.num_heads), (attention, "heads"))
    return weights


def first_blocks(arch: Arch, blocks: dict[str, Any], depth: int) -> dict[str, Any]:
    """Returns the parameters of the first `depth` blocks, stacked as `block_weights(arch.truncated(depth))` says."""
    declared, kept = block_weights(arch), block_weights(arch.truncated(depth))
    return {name: x[: arch.count(declared[name].axes[0], depth)] for name, x in blocks.items() if name in kept}


def model_weights(arch: Arch) -> dict[str, Any]:
    """Declares every weight of the model: `embed` [V, d], `blocks` and `final_norm` [d].

    Where the architecture has them also `final_norm_bias` [d], `positions` [P, d] and an untied `head` [V, d].
    """
    vocab = Weight((arch.vocab_size, arch.d_model), ("vocab", "embed"), fan_in=arch.d_model)
    norm = Weight((arch.d_model,), ("norm",))
    weights: dict[str, Any] = {"embed": vocab, "blocks": block_weights(arch), "final_norm": norm}
    if arch.layer_norm:
        weights["final_norm_bias"] = norm
    if arch.positions:
        weights["positions"] = Weight((arch.positions, arch.d_model), ("none", "embed"), fan_in=arch.d_model)
    if not arch.tied_head:
        weights["head"] = vocab
    return weights
