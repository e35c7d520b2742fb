"""Reads and writes the sidecar `nla_meta.yaml` of released models and datasets: prompts, slot and scales.

The format is that of the PyTorch reference, in both of its spellings of roles and templates. Its templates are Python
format strings, in which a brace of the text is doubled.
"""

from __future__ import annotations

import dataclasses
import math
import re
import string
from pathlib import Path
from typing import Any

import yaml

from nlae_jax.config import ProtocolConfig
from nlae_jax.roles.protocol import Protocol, make_protocol
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import write_atomically
from nlae_jax.runtime.outside import fits_float32, quoted, read_yaml

NAME = "nla_meta.yaml"
SCALE = "injection_scale"
MOST_NEW_TOKENS = 4096  # of an explanation; a sidecar that names more means this many

_ROLES = {"av": "av", "actor": "av", "ar": "ar", "critic": "ar"}
_SLOTS = {"av": "{injection_char}", "ar": "{explanation}"}
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?")
_SPELLINGS = {"av": ("av", "actor"), "ar": ("ar", "critic")}


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """The content of a sidecar, under one spelling. A field is None where the sidecar has none.

    `role` is "av" (encoder), "ar" (decoder) or "" (a dataset). `layer` is K. `injection_scale` is a norm, or 0 for
    activations injected unscaled. `neighbours` are the token ids on both sides of the slot. Templates contain their
    placeholder once; other braces are single. `max_new_tokens` is the length of explanations that RL allowed; only
    sidecars of this package have it.
    """

    path: Path
    role: str
    d_model: int
    base_model: str | None
    layer: int | None
    injection_scale: float | None
    marker: str
    marker_id: int
    neighbours: tuple[int, int]
    suffix_ids: tuple[int, ...] | None
    encoder_template: str
    decoder_template: str | None
    max_new_tokens: int | None


def path_of(target: Path) -> Path:
    """Returns the path of the sidecar of a model directory or a dataset file."""
    return target / NAME if target.is_dir() else target.with_name(f"{target.name}.{NAME}")


def read_sidecar(target: Path) -> Sidecar:
    """Reads the sidecar of a model directory or dataset file.

    Raises UserError that names the field that is missing or wrong.
    """
    path = path_of(target)
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a released model or dataset has this sidecar") from None
    kind = _get(path, content, "kind", str)
    if kind not in ("nla_model", "nla_dataset"):
        raise UserError(f"{path}: kind {quoted(kind)} should be nla_model or nla_dataset")
    role = _get(path, content, "role", str) if kind == "nla_model" else ""
    if role and role not in _ROLES:
        raise UserError(f"{path}: role {quoted(role)} should be one of {', '.join(_ROLES)}")
    width = "d_model" if kind == "nla_model" else "extraction.d_model"
    if (d_model := _get(path, content, width, int)) < 1:
        raise UserError(f"{path}: {width} should be at least 1; it is {d_model}")
    templates = {role: _template(path, content, role) for role in _SLOTS}
    if templates["av"] is None:
        raise UserError(f"{path}: prompt_templates.av (or actor) is missing")
    suffix = _get(path, content, "tokens.critic_suffix_ids", list, optional=True)
    if any(type(token) is not int for token in suffix or []):
        raise UserError(f"{path}: tokens.critic_suffix_ids should be a list of numbers")
    limit = _get(path, content, "max_new_tokens", int, optional=True)
    if limit is not None and limit < 1:
        raise UserError(f"{path}: max_new_tokens should be at least 1; it is {limit}")
    return Sidecar(
        path=path,
        role=_ROLES.get(role, ""),
        d_model=d_model,
        base_model=_get(path, content, "extraction.base_model", str, optional=True)
        or _get(path, content, "base_checkpoint", str, optional=True),
        layer=_layer(path, content),
        injection_scale=_scale(path, content, d_model),
        marker=_get(path, content, "tokens.injection_char", str),
        marker_id=_get(path, content, "tokens.injection_token_id", int),
        neighbours=(
            _get(path, content, "tokens.injection_left_neighbor_id", int),
            _get(path, content, "tokens.injection_right_neighbor_id", int),
        ),
        suffix_ids=tuple(suffix) if suffix else None,
        encoder_template=templates["av"],
        decoder_template=templates["ar"],
        max_new_tokens=None if limit is None else min(limit, MOST_NEW_TOKENS),
    )


def protocol_of(sidecar: Sidecar, tokenizer: Any, config: ProtocolConfig, injection_scale: float) -> Protocol:
    """Makes the protocol that a sidecar describes, with the ids of `tokenizer`.

    `config` provides the decoder's template where the sidecar has none. Raises UserError where the tokenizer is not the
    one that the sidecar was written with.
    """
    templates = dataclasses.replace(
        config,
        encoder_prompt=sidecar.encoder_template,
        decoder_prompt=sidecar.decoder_template or config.decoder_prompt,
    )
    path, marker = sidecar.path, sidecar.marker
    if (ids := tokenizer.encode(marker, add_special_tokens=False)) != [sidecar.marker_id]:
        raise UserError(
            f"{path}: tokens.injection_token_id: {quoted(marker)} is {quoted(ids)} to this tokenizer, not "
            f"[{sidecar.marker_id}]"
        )
    if sidecar.marker_id == tokenizer.unk_token_id:
        raise UserError(f"{path}: tokens.injection_char: {quoted(marker)} is unknown to this tokenizer")
    protocol = make_protocol(tokenizer, templates, injection_scale, marker)
    actual_ids = neighbours(protocol)
    for name, actual, stored in zip(("left", "right"), actual_ids, sidecar.neighbours, strict=True):
        if actual != stored:
            raise UserError(f"{path}: tokens.injection_{name}_neighbor_id: {stored}, but this tokenizer gives {actual}")
    suffix = sidecar.suffix_ids
    if suffix is not None and sidecar.decoder_template and protocol.decoder_suffix[-len(suffix) :] != suffix:
        raise UserError(
            f"{path}: tokens.critic_suffix_ids: {list(suffix)}, but this tokenizer ends the decoder's prompt with "
            f"{list(protocol.decoder_suffix)}"
        )
    return protocol


def combined(encoder: Sidecar, decoder: Sidecar) -> Sidecar:
    """Combines two sidecars: slot and encoder's prompt of `encoder`, layer and decoder's prompt of `decoder`.

    Where `decoder` has no layer or no decoder's prompt, that of `encoder` is used.
    """
    source = decoder if decoder.decoder_template else encoder
    return dataclasses.replace(
        encoder,
        layer=encoder.layer if decoder.layer is None else decoder.layer,
        decoder_template=source.decoder_template,
        suffix_ids=source.suffix_ids,
    )


def neighbours(protocol: Protocol) -> tuple[int, int]:
    """Returns the token ids on both sides of the slot."""
    return protocol.encoder_prefix[-1], protocol.encoder_tail[0]


def tokens_and_templates(protocol: Protocol) -> dict[str, Any]:
    """Returns the sections of a sidecar that models and datasets share."""
    left, right = neighbours(protocol)
    # The reference leaves out the suffix's first token, which may merge with the text before it.
    suffix = list(protocol.decoder_suffix[1:])
    return {
        "tokens": {
            "injection_char": protocol.marker,
            "injection_token_id": protocol.marker_id,
            "injection_left_neighbor_id": left,
            "injection_right_neighbor_id": right,
            "critic_suffix_ids": suffix or None,
        },
        "prompt_templates": {
            "actor": _format_string(protocol.encoder_template, _SLOTS["av"]),
            "critic": _format_string(protocol.decoder_template, _SLOTS["ar"]),
        },
    }


def model_sidecar(
    protocol: Protocol, role: str, d_model: int, layer: int, base_model: str, corpus: str, max_new_tokens: int
) -> dict[str, Any]:
    """Returns the sidecar of an exported encoder ("av") or decoder ("ar").

    `max_new_tokens` is the length of explanations that RL allowed. Scales are numbers, because the reference's client
    reads no other form.
    """
    layers = {"extraction_layer_index": layer}
    return {
        "kind": "nla_model",
        "schema_version": 2,
        "role": _SPELLINGS[role][1],
        "stage": "rl",
        "base_checkpoint": base_model,
        "d_model": d_model,
        "max_new_tokens": max_new_tokens,
        "extraction": {
            "base_model": base_model,
            "layer_index": layer,
            SCALE: protocol.injection_scale or None,
            "mse_scale": math.sqrt(d_model),
            "norm": "none",
            "corpus": corpus,
        },
        **tokens_and_templates(protocol),
        **({"critic": layers} if role == "ar" else {}),
    }


def write_sidecar(target: Path, content: dict[str, Any]) -> None:
    """Writes the sidecar of a model directory or a dataset file."""
    text = yaml.safe_dump(content, sort_keys=False)
    write_atomically(path_of(target), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _get(path: Path, content: Any, field: str, kind: type, optional: bool = False) -> Any:
    """Returns the value of a field such as `a.b`.

    Raises UserError where it is missing, unless it is optional, or of another type.
    """
    value = content
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is None and optional:
        return None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{path}: {field} should be a {kind.__name__}; it is {quoted(value)}")
    return value


def _layer(path: Path, content: dict[str, Any]) -> int | None:
    """Reads K. A decoder's field counts first. Its earlier spelling `num_hidden_layers` means K too."""
    fields = [f"{role}.{name}" for name in ("extraction_layer_index", "num_hidden_layers") for role in _SPELLINGS["ar"]]
    for field in (*fields, "extraction.layer_index", "extraction_layer_index"):
        if (layer := _get(path, content, field, int, optional=True)) is not None:
            if layer < 0:
                raise UserError(f"{path}: {field} should be the number of a block, from 0; it is {layer}")
            return layer
    return None


def _scale(path: Path, content: dict[str, Any], d_model: int) -> float | None:
    """Reads extraction.injection_scale: None where it is missing, 0 for null, which means raw vectors.

    In datasets that this project writes, the field stands outside of `extraction`.
    """
    extraction = _get(path, content, "extraction", dict, optional=True) or {}
    holder = extraction if SCALE in extraction else content
    if SCALE not in holder:
        return None
    scale = holder[SCALE]
    if scale in (None, "raw", "none"):
        return 0.0
    if scale == "sqrt_d_model":
        return math.sqrt(d_model)
    # YAML reads 1e3 as a text. Python's float() would accept more than numbers of YAML, such as 1_0.
    is_number = type(scale) in (int, float) or (isinstance(scale, str) and _NUMBER.fullmatch(scale))
    value = float(scale) if is_number else 0.0
    if value <= 0 or not fits_float32(value):
        field = SCALE if holder is content else f"extraction.{SCALE}"
        raise UserError(f"{path}: {field} {quoted(scale)} should be a positive number, null or sqrt_d_model")
    return value


def _template(path: Path, content: dict[str, Any], role: str) -> str | None:
    """Reads a prompt template as a protocol has it. Returns None where the sidecar has none."""
    for name in _SPELLINGS[role]:
        if template := _get(path, content, f"prompt_templates.{name}", str, optional=True):
            break
    else:
        return None
    slot = _SLOTS[role]
    try:
        # Parsed and not formatted, because a format string from outside may ask for a terabyte of blanks.
        parts = list(string.Formatter().parse(template))
    except ValueError:
        parts = []
    fields = [(field, spec, conversion) for _, field, spec, conversion in parts if field is not None]
    if fields != [(slot[1:-1], "", None)]:
        raise UserError(f"{path}: prompt_templates.{name} should hold {slot} once, and other braces doubled")
    plain = "".join(literal + (slot if field is not None else "") for literal, field, _, _ in parts)
    if plain.count(slot) != 1:
        raise UserError(f"{path}: prompt_templates.{name} should hold {slot} once, and not also in doubled braces")
    return plain


def _format_string(template: str, slot: str) -> str:
    """Writes a protocol's template as a Python format string, the inverse of `_template`."""
    return slot.join(part.replace("{", "{{").replace("}", "}}") for part in template.split(slot))
