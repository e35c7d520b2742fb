"""What a decoder-only language model looks like: one frozen dataclass, and the weights that follow from it.

Differences between families are data here, so that the transformer has no branches on a family's name.
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
class Arch:
    """Shape and constants of one decoder-only transformer. `num_layers` blocks, counted from 0.

    What sets the families apart is here, as data; the defaults are Llama's.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Rope | LinearRope | None = None  # of global rope
    tied_head: bool = True
    family: str = "llama"
    activation: str = "silu"  # of the gate; or "gelu_tanh"
    biases: tuple[str, ...] = ()  # linear layers that have one
    qk_norm: str = ""  # RMS norm of queries and keys: "head" (each head by itself) or "all" (all heads as one vector)
    pre_norms: bool = True  # norms of what attention and MLP read
    post_norms: bool = False  # norms of what they add to the residual stream
    norm_offset: float = 0.0  # added to the weights of all norms
    embed_scale: float = 1.0  # embeddings are multiplied by it
    attention_scale: float = 0.0  # of scores; 0: head_dim ** -0.5
    attention_softcap: float = 0.0  # scores pass through cap · tanh(score / cap); 0: not
    logit_softcap: float = 0.0  # and so do logits
    local_rope_theta: float = 0.0  # RoPE base of blocks whose rope is "local"
    ropes: tuple[str, ...] = ()  # per block: "global", "local" or "none"; empty: all global
    windows: tuple[int, ...] = ()  # per block: how many keys a query sees, itself included, 0: all; empty: all 0

    def truncated(self, num_layers: int) -> Arch:
        """The same model with its first `num_layers` blocks only."""
        windows = self.windows[:num_layers]
        return dataclasses.replace(
            self, num_layers=num_layers, ropes=self.ropes[:num_layers], windows=windows if any(windows) else ()
        )


def block_weights(arch: Arch) -> dict[str, Weight]:
    """The weights of all blocks, stacked on a leading axis of length `num_layers`; matrices are [in, out]."""
    heads, kv_heads = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    matrices = {
        "q": (arch.d_model, heads, "embed", "heads"),
        "k": (arch.d_model, kv_heads, "embed", "kv_heads"),
        "v": (arch.d_model, kv_heads, "embed", "kv_heads"),
        "o": (heads, arch.d_model, "heads", "embed"),
        "gate": (arch.d_model, arch.d_ff, "embed", "mlp"),
        "up": (arch.d_model, arch.d_ff, "embed", "mlp"),
        "down": (arch.d_ff, arch.d_model, "mlp", "embed"),
    }
    weights = {
        name: Weight((arch.num_layers, rows, cols), ("layers", row_axis, col_axis), fan_in=rows)
        for name, (rows, cols, row_axis, col_axis) in matrices.items()
    }
    for name in arch.biases:
        _, cols, _, col_axis = matrices[name]
        weights[f"{name}_bias"] = Weight((arch.num_layers, cols), ("layers", col_axis))
    pre, post = ("attn_norm", "mlp_norm"), ("attn_post_norm", "mlp_post_norm")
    for norm in (*(pre if arch.pre_norms else ()), *(post if arch.post_norms else ())):
        weights[norm] = Weight((arch.num_layers, arch.d_model), ("layers", "norm"))
    if arch.qk_norm:
        whole = arch.qk_norm == "all"
        for name, width in (("q_norm", heads), ("k_norm", kv_heads)):
            weights[name] = Weight((arch.num_layers, width if whole else arch.head_dim), ("layers", "norm"))
    return weights


def model_weights(arch: Arch) -> dict[str, Any]:
    """Every weight of the model: `embed` [V, d], `blocks`, `final_norm` [d] and, if untied, `head` [V, d]."""
    vocab = Weight((arch.vocab_size, arch.d_model), ("vocab", "embed"), fan_in=arch.d_model)
    weights: dict[str, Any] = {
        "embed": vocab,
        "blocks": block_weights(arch),
        "final_norm": Weight((arch.d_model,), ("norm",)),
    }
    if not arch.tied_head:
        weights["head"] = vocab
    return weights
