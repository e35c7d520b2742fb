"""What readers of several families ask of a `config.json`: sizes, RoPE, biases, windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nlae_jax.lm.fields import Fields, table
from nlae_jax.lm.rope_fields import rope_of, turned_of, whole_heads_turn
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted


def common_fields(fields: Fields, default_theta: float = 10_000.0, partial: bool = False) -> dict[str, Any]:
    """What every family has: sizes, RoPE (transformers 5 keeps it in `rope_parameters`), a tied head or not.

    `partial`: transformers lets a part of each head turn in this family; others should not say so.
    """
    parameters = rope_parameters(fields)
    context = fields.get("max_position_embeddings")
    theta, scaling = rope_of(parameters, fields.number("rope_theta", default_theta), context)
    heads, d_model = fields.size("num_attention_heads"), fields.size("hidden_size")
    head_dim = fields.size("head_dim", 0, least=0) or d_model // heads
    turned = head_dim
    if partial:
        turned = turned_of(parameters, fields.number("partial_rotary_factor", 1.0), head_dim)
    else:
        fields.only("partial_rotary_factor", 1.0)
        whole_heads_turn(parameters)
    return {
        "vocab_size": fields.size("vocab_size"),
        "d_model": d_model,
        "num_layers": fields.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.size("num_key_value_heads", heads, least=0),
        "head_dim": head_dim,
        "d_ff": fields.size("intermediate_size"),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rotary_dim": None if turned == head_dim else turned,
        "tied_head": fields.flag("tie_word_embeddings"),
        "family": fields.family,
    }


# Families whose `rope_parameters` have a set for each kind of block. A set for all is none to transformers.
_ROPE_BY_KIND = ("gemma3_text", "gemma4_text", "gemma4_unified_text", "olmo3")


def rope_parameters(fields: Fields, kind: str = "full_attention") -> dict[str, Any]:
    """Those of one kind of block, where each has a set of its own; else those of all."""
    new, old = fields.get("rope_parameters"), fields.get("rope_scaling")
    if new and old and new != old:
        raise UserError("config.json: rope_parameters and rope_scaling differ; it should have one of them")
    name = "rope_parameters" if new else "rope_scaling"
    parameters = fields.table(name)
    if "full_attention" not in parameters and "sliding_attention" not in parameters:
        if new and fields.family in _ROPE_BY_KIND:
            raise UserError(
                "config.json: rope_parameters should have full_attention and sliding_attention for model_type "
                f"{fields.family}"
            )
        return parameters if kind == "full_attention" else {}
    # transformers looks for `truncate` beside the sets.
    truncate = {"truncate": parameters.get("truncate", True)}
    return table(f"{name}.{kind}", parameters.get(kind) or {}) | truncate


def local_theta(fields: Fields, otherwise: float) -> float:
    """The RoPE base of sliding blocks."""
    theta, scaling = rope_of(rope_parameters(fields, "sliding_attention"), otherwise)
    if scaling is not None:
        raise UserError("config.json: a scaled rope of sliding_attention is not supported")
    return theta


def biases_of(fields: Fields) -> tuple[str, ...]:
    """Linear layers with a bias, by the two flags that Llama and its relatives have."""
    attention = ("q", "k", "v", "o") if fields.flag("attention_bias") else ()
    return attention + (("gate", "up", "down") if fields.flag("mlp_bias") else ())


def sliding_blocks(fields: Fields, otherwise: Sequence[bool]) -> list[bool]:
    """Which blocks have a window, by `layer_types` if it is there."""
    kinds = fields.items("layer_types")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(f"config.json: layer_types {quoted(kind)} is not supported")
    return [kind == "sliding_attention" for kind in kinds] or list(otherwise)


def windows_of(fields: Fields, sliding: Sequence[bool]) -> tuple[int, ...]:
    """Per block its window: `sliding_window` where it slides, none where that is null."""
    size = fields.size("sliding_window", 0, least=0)
    return tuple(size if one else 0 for one in sliding) if size and any(sliding) else ()
