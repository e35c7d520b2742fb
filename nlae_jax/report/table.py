"""Tables of held-out samples and of health for the terminal and the report, and text that is safe to show in both."""

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

LARGEST = 1e300  # larger numbers overflow as soon as one computes with them
CONTEXT_CHARACTERS = 100
EXPLANATION_CHARACTERS = 280
HTML_CONTEXT_CHARACTERS = 260
HTML_ROWS = 200
HTML_OPEN_ROWS = 12  # further rows are in a drawer
# Characters that reorder their neighbours, which can make a line look like another one.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_WHITESPACE_TOKENS = {" ": "␣", "\n": "↵", "\t": "⇥"}


def printable(text: Any) -> str:
    """Replaces characters that must not be shown by U+FFFD. Newlines and tabs stay.

    Control characters would drive the terminal, reordering marks would disguise the text, and unpaired surrogates
    cannot be written as UTF-8.
    """
    return "".join(
        "\ufffd" if (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in _REORDERING else c
        for c in str(text).replace("\r\n", "\n")
    )


def split_at_token(context: str, token: str, width: int) -> tuple[str, str]:
    """Returns the last `width` characters before the token, and the token in a visible form.

    The context ends with the token. If the token is a part of a character, it does not, and all of the context is
    before the token. Tokens of white space are shown as signs, and an empty token as ∅.
    """
    context, token = printable(context), printable(token)
    ending = next((end for end in (token, token.strip()) if end and context.endswith(end)), "")
    before = context.removesuffix(ending)
    if len(before) > width:
        cut = before[-width:]
        before = "…" + (cut.split(" ", 1)[1] if " " in cut[:16] else cut)  # begins with a whole word if one is near
    if not token.strip():
        token = "".join(_WHITESPACE_TOKENS.get(c, c) for c in token) or "∅"
    return before, token


def token_label(row: Mapping[str, Any]) -> str:
    """Returns an explained row's token in a visible form, or "" for a vector without a text.

    Where several tokens make a character, all have this character as text, and the label counts them.
    """
    if not row["token"]:
        return ""
    _, token = split_at_token(row["token"], row["token"], 0)
    index = row.get("fragment_index", 0)
    return f"{token.strip()} (part {index + 1})" if index else token.strip()


def is_shown(value: Any) -> bool:
    """Returns whether a value is a number that can be shown. Evaluations write null where they have no figure."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def number(value: Any, digits: int = 3) -> str:
    """Writes a number with a true minus sign. The text is a dash for a value that is not a number below `LARGEST`."""
    if not is_shown(value):
        return "–"
    return (f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}").replace("-", "−")


def significant(value: float) -> str:
    """Writes a measured value with three significant digits."""
    text = f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return tidy(text)


def tidy(text: str) -> str:
    """Gives a written number true minus signs, and takes leading zeros out of its exponent."""
    return text.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("-", "−")


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _context_cell(row: Mapping[str, Any]) -> Text:
    before, token = split_at_token(row.get("context", ""), row.get("token", ""), CONTEXT_CHARACTERS)
    before = " ".join(before.split()) + (" " if before[-1:].isspace() else "")
    space = " " if token[:1].isspace() else ""
    # The token is marked by characters too, so that a log without colours shows it.
    return Text.assemble(before, space, ("«" + token.strip() + "»", "bold yellow"))


def _explanation_cell(row: Mapping[str, Any]) -> Text:
    words = " ".join(printable(row.get("explanation") or "").split())
    text = Text(_clipped(words, EXPLANATION_CHARACTERS) or "(empty)")
    if not row.get("closed", True):
        text.append(" (not closed)", "red")
    return text


def held_out_table(rows: Sequence[Mapping[str, Any]], limit: int) -> Table:
    """Makes a table of the first `limit` held-out samples, for a terminal.

    `rows` are the rows of `samples/held_out.jsonl`. A line shows the end of the context with the read token in «», the
    explanation and its scores. Samples are taken in order, because a choice by score would flatter. The table fits 80
    columns and can be read without colour.
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
    """Returns warnings about an explained token, such as a cut explanation. `row` is one of `NLA.explain_text`."""
    warnings = []
    if row.get("position") == 0:
        warnings.append("position 0 is an attention sink: its activation carries nothing of the text")
    elif row.get("outside") == "position 0":
        warnings.append("the span has position 0, an attention sink, whose large norm dominates the mean")
    elif row.get("outside"):
        warnings.append("the activation's norm is unusual: the pair was not trained on such activations")
    if row.get("cut"):
        warnings.append("cut at the limit")
    if row.get("repeated"):
        warnings.append("repeats itself")
    return warnings


def explanation_table(tokens: Sequence[Mapping[str, Any]]) -> Table:
    """Makes a table with one line per token of an explained text. `tokens` are the rows of `NLA.explain_text`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), expand=True)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("token", ratio=1, overflow="fold")
    table.add_column("explanation", ratio=6, overflow="fold")
    table.add_column("cos", justify="right", no_wrap=True, min_width=6)
    table.add_column("mse", justify="right", no_wrap=True, min_width=5)
    table.add_column("rel.", justify="right", no_wrap=True, min_width=4)
    for row in tokens:
        cell = _explanation_cell(row)
        notes = remarks(row)
        if row.get("agreement") is not None:
            notes.append(f"agreement {number(row['agreement'], 2)}; {printable(row['consensus'])}")
        if notes:
            cell.append(f" ({'; '.join(notes)})", "dim")
        place = f"{row['span'][0]}–{row['span'][1]}" if row.get("span") else row.get("position")
        scores = number(row["cos"]), number(row["mse"]), number(row.get("relative_mse"), 2)
        table.add_row("–" if place is None else str(place), Text(token_label(row), "bold"), cell, *scores)
    table.caption = "rel.: mse / variance of the data; 0 is perfect, 1 is no better than the mean"
    table.caption_justify = "left"
    return table


def adaptation_table(result: Mapping[str, Any]) -> Table:
    """Makes a table of the scores of a map between two models on held-out texts, beside its controls.

    `result` is that of `interop.adapt.adapt`.
    """
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
    """Makes any text safe for the page: replaces unprintable characters and escapes HTML."""
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
    """Makes the report's table of held-out samples, with longer contexts and the gold text in a drawer.

    `name` is the file of the samples, which is named if there are none.
    """
    if not rows:
        return f'<p class="absent">Not there yet: {html_text(name)}.</p>'
    shown = rows[:HTML_ROWS]
    unclosed = sum(not row.get("closed", True) for row in shown)
    note = f"The first {len(shown):,} of {len(rows):,}, in the order of the file, not chosen by score."
    note += f" {unclosed:,} of them were not closed." if unclosed else ""
    first, rest = _html_table(shown[:HTML_OPEN_ROWS]), shown[HTML_OPEN_ROWS:]
    more = f"<details><summary>{len(rest):,} more</summary>{_html_table(rest)}</details>" if rest else ""
    return f'<p class="note">{note}</p>{first}{more}'


def _html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "<th>text up to the read token</th><th>explanation</th><th>cos</th><th>mse</th>"
    body = "".join(_html_row(row) for row in rows)
    return f'<table class="samples"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def html_values(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Makes a table of names and values. A value that differs from `defaults` is marked as changed."""
    lines = []
    for key, value in values.items():
        shown = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
        changed = ' class="changed"' if key in defaults and defaults[key] != value else ""
        lines.append(f"<tr{changed}><th>{html_text(key)}</th><td>{html_text(shown)}</td></tr>")
    return f'<table class="values">{"".join(lines)}</table>'


def html_health(evaluation: Mapping[str, Any]) -> str:
    """Makes the table of an evaluation's `health.MEASURES`, each beside its bound, with advice if it is crossed."""
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
    note += " FVE can rise while explanations repeat themselves or all become the same, so look at both."
    head = "<thead><tr><th>measure</th><th>value</th><th>should be</th></tr></thead>"
    table = f'<table class="health">{head}<tbody>{"".join(lines)}</tbody></table>'
    return f'<h3>Health of the explanations</h3><p class="note">{note}</p>{table}'
