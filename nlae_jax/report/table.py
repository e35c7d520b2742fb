"""Held-out samples and health as tables, for terminal and report; text made safe to show in either."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from nlae_jax.evaluate.health import MEASURES

LARGEST = 1e300  # what is larger overflows as soon as it is computed with
CONTEXT_CHARACTERS = 100
EXPLANATION_CHARACTERS = 280
HTML_CONTEXT_CHARACTERS = 260
HTML_ROWS = 200
HTML_OPEN_ROWS = 12  # the rest is in a drawer
# Characters that reorder their neighbours: a line could be made to read as something it is not.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_WHITESPACE_TOKENS = {" ": "␣", "\n": "↵", "\t": "⇥"}


def printable(text: Any) -> str:
    """The text with everything that is no character to a reader as U+FFFD; newlines and tabs stay.

    Control characters would drive the terminal, reordering marks would disguise the text, and unpaired
    surrogates cannot be written as UTF-8.
    """
    return "".join(
        "\ufffd" if (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in _REORDERING else c
        for c in str(text).replace("\r\n", "\n")
    )


def split_at_token(context: str, token: str, width: int) -> tuple[str, str]:
    """The last `width` characters before the token, and the token in a form that can be seen.

    The context ends with the token, unless the token is a part of a character; then it stands after the context.
    Whitespace tokens are shown as signs, and an empty one as ∅.
    """
    context, token = printable(context), printable(token)
    ending = next((end for end in (token, token.strip()) if end and context.endswith(end)), "")
    before = context.removesuffix(ending)
    if len(before) > width:
        cut = before[-width:]
        before = "…" + (cut.split(" ", 1)[1] if " " in cut[:16] else cut)  # begin with a whole word where one is near
    if not token.strip():
        token = "".join(_WHITESPACE_TOKENS.get(c, c) for c in token) or "∅"
    return before, token


def is_shown(value: Any) -> bool:
    """Whether `number` writes it as a number: evaluations write null without a figure, and a file may hold anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def number(value: Any, digits: int = 3) -> str:
    """A number with a true minus sign, or a dash for what is not a finite number (or hardly one)."""
    if not is_shown(value):
        return "–"
    return (f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}").replace("-", "−")


def significant(value: float) -> str:
    """Three digits of a measured value."""
    text = f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return tidy(text)


def tidy(text: str) -> str:
    """A written number with true minus signs and no leading zeros in its exponent."""
    return text.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("-", "−")


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _context_cell(row: Mapping[str, Any]) -> Text:
    before, token = split_at_token(row.get("context", ""), row.get("token", ""), CONTEXT_CHARACTERS)
    before = " ".join(before.split()) + (" " if before[-1:].isspace() else "")
    space = " " if token[:1].isspace() else ""
    # The marks are characters, not colour alone, so that a log shows them too.
    return Text.assemble(before, space, ("«" + token.strip() + "»", "bold yellow"))


def _explanation_cell(row: Mapping[str, Any]) -> Text:
    words = " ".join(printable(row.get("explanation") or "").split())
    text = Text(_clipped(words, EXPLANATION_CHARACTERS) or "(empty)")
    if not row.get("closed", True):
        text.append(" (not closed)", "red")
    return text


def held_out_table(rows: Sequence[Mapping[str, Any]], limit: int) -> Table:
    """The first `limit` held-out samples for a terminal: end of the context, the read token in «», explanation, scores.

    Rows are those of `samples/held_out.jsonl`. They are taken in order, not picked: choosing by score would flatter.
    Fits 80 columns, and reads the same without colour.
    """
    shown = rows[: max(0, limit)]
    title = f"Held-out samples: the first {len(shown)} of {len(rows)}, in order"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.show_lines = True
    table.add_column("text up to «token»", ratio=4, overflow="fold")
    table.add_column("explanation", ratio=6, overflow="fold")
    table.add_column("cos", justify="right", no_wrap=True, min_width=6)
    table.add_column("mse", justify="right", no_wrap=True, min_width=5)
    table.expand = True
    for row in shown:
        table.add_row(_context_cell(row), _explanation_cell(row), number(row.get("cos")), number(row.get("mse")))
    return table


def remarks(row: Mapping[str, Any]) -> list[str]:
    """What a reader of an explained token should know of it; rows are those of `NLA.explain_text`."""
    said = []
    if row.get("position") == 0:
        said.append("position 0 is an attention sink: its activation holds nothing of the text")
    elif row.get("outside") == "position 0":
        said.append("position 0 is in the span: an attention sink, whose length drowns the rest")
    elif row.get("outside"):
        said.append("the activation's length is unusual: the pair was not trained on such")
    if row.get("cut"):
        said.append("cut at the limit")
    if row.get("repeated"):
        said.append("repeats itself")
    return said


def explanation_table(tokens: Sequence[Mapping[str, Any]]) -> Table:
    """One line per token of an explained text; rows are those of `NLA.explain_text`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), expand=True)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("token", ratio=1, overflow="fold")
    table.add_column("explanation", ratio=6, overflow="fold")
    table.add_column("cos", justify="right", no_wrap=True, min_width=6)
    table.add_column("mse", justify="right", no_wrap=True, min_width=5)
    table.add_column("rel.", justify="right", no_wrap=True, min_width=4)
    for row in tokens:
        _, token = split_at_token(row["token"], row["token"], 0) if row["token"] else ("", "")
        cell = _explanation_cell(row)
        notes = remarks(row)
        if row.get("agreement") is not None:
            notes.append(f"agreement {number(row['agreement'], 2)}; {printable(row['consensus'])}")
        if notes:
            cell.append(f" ({'; '.join(notes)})", "dim")
        place = f"{row['span'][0]}–{row['span'][1]}" if row.get("span") else row.get("position")
        scores = number(row["cos"]), number(row["mse"]), number(row.get("relative_mse"), 2)
        table.add_row("–" if place is None else str(place), Text(token.strip(), "bold"), cell, *scores)
    table.caption = "rel.: mse / the data's variance; 0 is perfect, 1 no better than the mean"
    table.caption_justify = "left"
    return table


def adaptation_table(result: Mapping[str, Any]) -> Table:
    """What a map between two models is worth on held-out texts, beside its controls; see `interop.adapt.adapt`."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        title=f"{result['held_out']} held-out activations; fitted on {result['fitted_on']}",
    )
    table.add_column("prediction")
    for name in ("FVE", "cos"):
        table.add_column(name, justify="right", no_wrap=True)
    names = {"map": "the map", "mean": "the mean", "chance": "the map, of other texts", "random_map": "a random map"}
    for name, label in names.items():
        table.add_row(label, number(result[name]["fve"]), number(result[name]["cos"]))
    return table


def html_text(value: Any) -> str:
    """The one way for text onto the page: unprintable characters replaced, then HTML escaped."""
    return escape(printable(value), quote=True)


def _html_row(row: Mapping[str, Any]) -> str:
    before, token = split_at_token(str(row.get("context") or ""), str(row.get("token") or ""), HTML_CONTEXT_CHARACTERS)
    explanation = str(row.get("explanation") or "").strip()
    words = f"<q>{html_text(explanation)}</q>" if explanation else '<q class="absent">empty</q>'
    flag = "" if row.get("closed", True) else ' <span class="flag">not closed</span>'
    gold = str(row.get("gold") or "").strip()
    drawer = f"<details><summary>gold text</summary><q>{html_text(gold)}</q></details>" if gold else ""
    where = f"{html_text(row.get('doc_id', ''))}, position {html_text(row.get('position', '–'))}"
    return (
        f'<tr><td class="context">{html_text(before)}<mark>{html_text(token)}</mark><small>{where}</small></td>'
        f"<td>{words}{flag}{drawer}</td>"
        f'<td class="score" data-name="cos">{number(row.get("cos"))}</td>'
        f'<td class="score" data-name="mse">{number(row.get("mse"))}</td></tr>'
    )


def html_samples(rows: Sequence[Mapping[str, Any]], name: object) -> str:
    """The same samples for the report: longer contexts, gold text in a drawer. `name` is the file they should be in."""
    if not rows:
        return f'<p class="absent">Not there yet: {html_text(name)}.</p>'
    shown = rows[:HTML_ROWS]
    unclosed = sum(not row.get("closed", True) for row in shown)
    note = f"The first {len(shown):,} of {len(rows):,}, in the order of the file: none is picked."
    note += f" {unclosed:,} of them were not closed." if unclosed else ""
    first, rest = _html_table(shown[:HTML_OPEN_ROWS]), shown[HTML_OPEN_ROWS:]
    more = f"<details><summary>{len(rest):,} more</summary>{_html_table(rest)}</details>" if rest else ""
    return f'<p class="note">{note}</p>{first}{more}'


def _html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "<th>text up to the read token</th><th>explanation</th><th>cos</th><th>mse</th>"
    body = "".join(_html_row(row) for row in rows)
    return f'<table class="samples"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def html_values(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Names and values; bold where `defaults` has another value."""
    lines = []
    for key, value in values.items():
        shown = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
        changed = ' class="changed"' if key in defaults and defaults[key] != value else ""
        lines.append(f"<tr{changed}><th>{html_text(key)}</th><td>{html_text(shown)}</td></tr>")
    return f'<table class="values">{"".join(lines)}</table>'


def html_health(evaluation: Mapping[str, Any]) -> str:
    """The measures of `health.MEASURES` that an evaluation has, each beside its bound and, if crossed, what to do."""
    measured = [measure for measure in MEASURES if is_shown(evaluation.get(measure.key))]
    if not measured:
        return ""
    crossed, lines = 0, []
    for measure in measured:
        healthy = measure.is_healthy(evaluation)
        crossed += healthy is False
        advice = f'<span class="flag">{html_text(measure.advice)}</span>' if healthy is False else ""
        lines.append(
            f"<tr><td><code>{measure.key}</code> {html_text(measure.meaning)}{advice}</td>"
            f"<td>{number(evaluation[measure.key])}</td><td>{measure.bound or '–'}</td></tr>"
        )
    note = f"Bounds crossed: {crossed}." if crossed else "No bound is crossed."
    note += " FVE may rise while explanations repeat themselves or all become one: read both."
    head = "<thead><tr><th>measure</th><th>value</th><th>should be</th></tr></thead>"
    table = f'<table class="health">{head}<tbody>{"".join(lines)}</tbody></table>'
    return f'<h3>Health of the explanations</h3><p class="note">{note}</p>{table}'
