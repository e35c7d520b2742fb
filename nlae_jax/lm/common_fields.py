"""Fields of a `config.json` that the readers of several families use: sizes, RoPE, biases, windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nlae_jax.lm.arch import YarnRope
from nlae_jax.lm.fields import Fields, table
from nlae_jax.lm.rope_fields import rope_of, turned_of, whole_heads_turn
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted


def common_fields(fields: Fields, default_theta: float = 10_000.0, partial: bool = False) -> dict[str, Any]:
    """Reads the fields of `Arch` that every family has: sizes, RoPE, and whether the head is tied.

    transformers 5 has RoPE's fields in `rope_parameters`. `partial` says that RoPE may turn a part of each head in this
    family; in other families a file that says so is refused with UserError.
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
    if isinstance(scaling, YarnRope) and turned % 2:  # transformers has a ramp for whole pairs alone
        raise UserError(
            f"config.json: rope_type yarn of {turned} dimensions of a head is not supported; of an even number it is"
        )
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


# Families whose `rope_parameters` have a set for each kind of block. transformers ignores a common set there.
_ROPE_BY_KIND = ("gemma3_text", "gemma4_text", "gemma4_unified_text", "olmo3")


def rope_parameters(fields: Fields, kind: str = "full_attention") -> dict[str, Any]:
    """Returns RoPE's fields for one kind of block. A file may have one set for each kind, or one set for all."""
    new, old = fields.get("rope_parameters"), fields.get("rope_scaling")
    if new and old and new != old:
        raise UserError("config.json: rope_parameters and rope_scaling differ; it should have one of them")
    name = "rope_parameters" if new else "rope_scaling"
    parameters = fields.table(name)
    by_kind = "full_attention" in parameters or "sliding_attention" in parameters
    if by_kind and not (new and fields.family in _ROPE_BY_KIND):
        raise UserError(f"config.json: {name} by kind of block is not supported for model_type {fields.family}")
    if fields.family not in _ROPE_BY_KIND:
        return parameters
    if new and not by_kind:
        raise UserError(
            "config.json: rope_parameters should have full_attention and sliding_attention for model_type "
            f"{fields.family}"
        )
    if "type" in parameters and "rope_type" not in parameters:  # transformers would take it for no scaling
        raise UserError(f"config.json: rope_scaling should have rope_type, not type, for model_type {fields.family}")
    sets = parameters if by_kind else {"full_attention": parameters}  # the old name has one set
    # transformers looks for `truncate` beside the sets.
    return table(f"{name}.{kind}", sets.get(kind) or {}) | {"truncate": sets.get("truncate", True)}


def local_theta(fields: Fields, otherwise: float) -> float:
    """Reads the RoPE base of blocks with a window, by default `otherwise`. Raises UserError if their RoPE is scaled."""
    parameters = rope_parameters(fields, "sliding_attention")
    theta, scaling = rope_of(parameters, otherwise)
    if scaling is not None:
        kind = parameters.get("rope_type") or parameters.get("type")
        raise UserError(f"config.json: rope_type {quoted(kind)} of sliding_attention is not supported; default is")
    return theta


def attention_biases(fields: Fields) -> tuple[str, ...]:
    """Returns the names of attention's linear layers with a bias, by the flag `attention_bias`."""
    return ("q", "k", "v", "o") if fields.flag("attention_bias") else ()


def biases_of(fields: Fields) -> tuple[str, ...]:
    """Returns the names of linear layers with a bias, by the flags `attention_bias` and `mlp_bias`."""
    return attention_biases(fields) + (("gate", "up", "down") if fields.flag("mlp_bias") else ())


def block_kinds(fields: Fields, *allowed: str) -> list[str]:
    """Returns the kind of each block by `layer_types`, or nothing if that field is missing.

    Raises UserError for a kind that is not allowed, or if there is not one kind for each block.
    """
    kinds, count = fields.items("layer_types"), fields.size("num_hidden_layers")
    for kind in kinds:
        if kind not in allowed:
            right = " or ".join(map(quoted, allowed))
            raise UserError(f"config.json: layer_types {quoted(kind)} is not supported; each kind should be {right}")
    if kinds and len(kinds) != count:
        raise UserError(f"config.json: layer_types should name each of the {count} blocks, and no more")
    return kinds


def sliding_blocks(fields: Fields, otherwise: Sequence[bool]) -> list[bool]:
    """Returns for each block whether it has a window, by `layer_types`, or `otherwise` if that field is missing."""
    kinds = block_kinds(fields, "full_attention", "sliding_attention")
    return [kind == "sliding_attention" for kind in kinds] or list(otherwise)


def one_window(fields: Fields) -> tuple[int, ...]:
    """Returns the window of each block where blocks are alike: transformers does not read `layer_types` there.

    Raises UserError if that field says something else.
    """
    count = fields.size("num_hidden_layers")
    windows = windows_of(fields, [True] * count)
    fields.only("layer_types", ["sliding_attention" if windows else "full_attention"] * count)
    return windows


def windows_of(fields: Fields, sliding: Sequence[bool]) -> tuple[int, ...]:
    """Returns the window of each block: `sliding_window` if it is sliding, else 0. Empty if no block has a window."""
    size = fields.size("sliding_window", 0, least=0)
    return tuple(size if slides else 0 for slides in sliding) if size and any(sliding) else ()
