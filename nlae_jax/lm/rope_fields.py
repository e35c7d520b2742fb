"""Reads RoPE's fields of a `config.json`: its base, its scaling, and how many dimensions of a head it turns."""

from __future__ import annotations

import math
from typing import Any

from nlae_jax.lm.arch import LinearRope, Llama3Rope, LongRope, YarnRope
from nlae_jax.lm.fields import number, required, whole
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted

Scaling = Llama3Rope | LinearRope | YarnRope | LongRope | None


def turned_of(parameters: dict[str, Any], otherwise: float, head_dim: int) -> int:
    """Returns how many dimensions of a head turn: `partial_rotary_factor`, or `otherwise`, times `head_dim`."""
    factor = parameters.get("partial_rotary_factor")
    part = number("partial_rotary_factor", otherwise if factor is None else factor)
    turned = int(head_dim * part)
    if turned + turned % 2 > head_dim:
        raise ValueError(f"partial_rotary_factor = {part} should be at most 1, and heads of an even size")
    return turned


def whole_heads_turn(parameters: dict[str, Any]) -> None:
    """Raises UserError if only a part of each head turns, for families in which transformers turns whole heads."""
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError("config.json: a partial_rotary_factor other than 1 is not supported for this model_type")


def _theta(parameters: dict[str, Any], otherwise: float) -> float:
    theta = parameters.get("rope_theta")
    return number("rope_theta", otherwise if theta is None else theta)


def rope_of(parameters: dict[str, Any], default_theta: float, context: int | None = None) -> tuple[float, Scaling]:
    """Reads base and scaling from one set of `rope_parameters`. `context` is the model's `max_position_embeddings`."""
    theta = _theta(parameters, default_theta)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    constant = lambda key: number(key, required(parameters, key))  # noqa: E731
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRope(constant("factor"))
    if kind == "llama3":
        return theta, Llama3Rope(
            factor=constant("factor"),
            low_freq_factor=constant("low_freq_factor"),
            high_freq_factor=constant("high_freq_factor"),
            original_max_positions=_original(parameters, context),
        )
    if kind == "yarn":
        return theta, _yarn(parameters, context)
    raise UserError(f"config.json: rope_type {quoted(kind)} is not supported; default, linear, llama3 and yarn are")


def proportional_rope(parameters: dict[str, Any], default_theta: float, head_dim: int) -> tuple[float, int, float]:
    """Reads the base, how many of a head's pairs turn, and the divisor of all frequencies."""
    kind = parameters.get("rope_type", "default")
    if kind not in ("proportional", "default"):
        raise UserError(f"config.json: rope_type {quoted(kind)} of full_attention is not supported; proportional is")
    theta = _theta(parameters, default_theta)
    if kind == "default":
        return theta, head_dim // 2, 1.0
    part, factor = (number(key, parameters.get(key, 1.0)) for key in ("partial_rotary_factor", "factor"))
    if part > 1 or factor == 0:
        raise ValueError(f"partial_rotary_factor = {part} should be at most 1, and factor = {factor} above 0")
    return theta, int(part * head_dim // 2), factor


def _original(parameters: dict[str, Any], context: int | None) -> int:
    """Returns the number of positions before RoPE was stretched. By default it is the model's `context`."""
    key = "original_max_position_embeddings"
    return whole(key, required({key: parameters.get(key) or context}, key))


def _yarn(parameters: dict[str, Any], context: int | None) -> YarnRope:
    """Reads YaRN's fields. The defaults of missing ones are those of transformers."""
    fields = {key: value for key, value in parameters.items() if value is not None}
    original = _original(parameters, context)
    factor = number("factor", fields.get("factor", (context or original) / original))
    mscale, mscale_all_dim = (number(key, fields.get(key, 0.0)) for key in ("mscale", "mscale_all_dim"))
    growth = lambda scale: 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0  # noqa: E731
    attention_factor = growth(mscale) / growth(mscale_all_dim) if mscale and mscale_all_dim else growth(1.0)
    truncate = parameters.get("truncate", True)  # null is off
    if not isinstance(truncate, bool | None):
        raise ValueError(f"truncate = {quoted(truncate)} should be true or false")
    return YarnRope(
        factor=factor,
        attention_factor=number("attention_factor", fields.get("attention_factor", attention_factor)),
        original_max_positions=original,
        beta_fast=number("beta_fast", fields.get("beta_fast") or 32),
        beta_slow=number("beta_slow", fields.get("beta_slow") or 1),
        truncate=bool(truncate),
    )


def long_rope(parameters: dict[str, Any], pairs: int, original: int, context: int) -> LongRope:
    """Reads LongRoPE's fields. `context` is the model's `max_position_embeddings`.

    Raises ValueError if there is not one factor for each of the `pairs`.
    """
    factors = {}
    for key in ("short_factor", "long_factor"):
        listed = required(parameters, key)
        if not isinstance(listed, list) or len(listed) != pairs:
            raise ValueError(f"{key} should be a list of {pairs} numbers, one to each pair that turns")
        factors[key] = tuple(number(key, value) for value in listed)
        if 0.0 in factors[key]:
            raise ValueError(f"{key} should be a list of numbers above 0")
    factor = parameters.get("factor")
    factor = context / original if factor is None else number("factor", factor)
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    attention_factor = parameters.get("attention_factor")
    return LongRope(
        factors["short_factor"],
        factors["long_factor"],
        grown if attention_factor is None else number("attention_factor", attention_factor),
        original,
    )


def written_rope(scaling: Scaling) -> dict[str, Any] | None:
    """Returns the fields of `rope_scaling` for a scaling, or None without one."""
    if isinstance(scaling, LinearRope):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Rope):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    if isinstance(scaling, YarnRope):
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "original_max_position_embeddings": scaling.original_max_positions,
            "truncate": scaling.truncate,
        }
    if isinstance(scaling, LongRope):
        return {
            "rope_type": "longrope",
            "short_factor": list(scaling.short_factors),
            "long_factor": list(scaling.long_factors),
            "attention_factor": scaling.attention_factor,
        }
    return None
