"""Explained texts as one self-contained HTML page: tokens coloured by score, explanations on hover, focus or click.

The page has no scripts and loads nothing. Text in it comes from anywhere, so the template escapes everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from nlae_jax.assets import EXPLANATION_PAGE
from nlae_jax.report.table import number, printable, remarks, token_label
from nlae_jax.runtime.files import write_text

_FRAGMENT = "·"  # a further token of a character, which is shown once
_WORST = 0.6  # the mse from which a token has no colour


def explanation_page(texts: Sequence[Sequence[Mapping[str, Any]]], model: str, layer: int) -> str:
    """Makes a page of explained `texts`. Each of them is a list of rows as `NLA.explain_text` returns them."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(EXPLANATION_PAGE.read_text(encoding="utf-8"))
    scale = [(_shade(mse), number(mse, 1)) for mse in (0.0, 0.2, 0.4, 0.6)]
    rows = [[_row(token) for token in text] for text in texts]
    return template.render(texts=rows, model=printable(model), layer=layer, scale=scale)


def write_explanation_page(path: Path, texts: Sequence[Sequence[Mapping[str, Any]]], model: str, layer: int) -> None:
    """Writes the page of `explanation_page` to a file."""
    write_text(path, explanation_page(texts, model, layer))


def _row(token: Mapping[str, Any]) -> dict[str, Any]:
    explanation = " ".join(printable(token["explanation"]).split())
    if token.get("span"):
        place = f"{token['span'][0]}–{token['span'][1]}"
    else:
        place = "vector" if token["position"] is None else str(token["position"])
    notes = remarks(token)
    if token.get("agreement") is not None:
        notes.append(f"agreement {number(token['agreement'], 2)} over samples; {printable(token['consensus'])}")
    return {
        "position": place,
        "shown": _FRAGMENT if token.get("fragment_index") else printable(token["token"]) or place,
        "label": token_label(token),
        "explanation": explanation or "(empty)",
        "cos": number(token["cos"]),
        "mse": number(token["mse"]),
        "relative": number(token.get("relative_mse"), 2),
        "shade": _shade(token["mse"]),
        "role": printable(token.get("role") or ""),
        "section": printable(token.get("section") or ""),
        "remark": "; ".join(notes),
        "samples": [" ".join(printable(sample["explanation"]).split()) for sample in token.get("samples", ())],
    }


def _shade(mse: float) -> str:
    """Returns the opacity of a token's colour, from 0.5 at a perfect reconstruction to 0 at an mse of `_WORST`."""
    return f"{0.5 * min(1.0, max(0.0, 1 - mse / _WORST)):.2f}"
