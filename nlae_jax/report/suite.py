"""Shows the suite's figures: as a table for the terminal, and as charts for the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from nlae_jax.evaluate.figures import FIGURES, SECTIONS, Figure
from nlae_jax.report.ruler import Mark, interval_of, interval_text, ruler
from nlae_jax.report.table import html_text, is_shown, number, printable


def without_suite(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the numbers of eval.json that the run's own evaluation wrote, without the suite's."""
    return {name: value for name, value in evaluation.items() if name not in (*SECTIONS, "suite")}


def _entry(evaluation: Mapping[str, Any], figure: Figure) -> dict[str, Any]:
    """Returns a figure of eval.json, or {} if the file lacks it."""
    section = evaluation.get(figure.section)
    entry = section.get(figure.key) if isinstance(section, dict) else None
    return entry if isinstance(entry, dict) else {}


def _named(entry: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """Returns those of a figure's `controls` or `parts` that are numbers, in the order of `_place`.

    In the file they are in the order of the alphabet.
    """
    found = entry.get(kind)
    found = found if isinstance(found, dict) else {}
    shown = {name: of for name, of in found.items() if isinstance(of, dict) and is_shown(of.get("value"))}
    return {name: shown[name] for name in sorted(shown, key=_place)}


# Controls as the table of figures names them.
_CONTROLS = tuple(dict.fromkeys(control for figure in FIGURES for control in figure.controls))


def _place(name: str) -> tuple[int, int]:
    """Returns the sort key of a control or part: controls as in `FIGURES`, then numbers by size, then the others."""
    if name in _CONTROLS:
        return 0, _CONTROLS.index(name)
    return (1, int(name)) if name.isdecimal() and len(name) < 10 else (2, 0)


def _with_interval(of: Mapping[str, Any], digits: int = 3) -> str:
    return f"{number(of.get('value'), digits)} {interval_text(interval_of(of.get('ci95')), digits)}".rstrip()


def suite_table(evaluation: Mapping[str, Any]) -> Table:
    """Makes a table with one line for every figure and every part: value, interval and controls."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), expand=True)
    table.add_column("figure", overflow="fold", ratio=3)
    table.add_column("value and 95 % interval", overflow="fold", ratio=3)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("beside it", overflow="fold", ratio=4)
    for figure in FIGURES:
        if not (entry := _entry(evaluation, figure)):
            continue
        beside = ", ".join(f"{name} {number(of['value'])}" for name, of in _named(entry, "controls").items())
        value, count = _with_interval(entry) if "value" in entry else "", number(entry.get("n"))
        table.add_row(Text(f"{figure.section}: {figure.key}"), value, count if value else "", beside)
        for name, of in _named(entry, "parts").items():
            beside = ", ".join(f"{name} {number(other['value'])}" for name, other in _named(of, "controls").items())
            table.add_row(Text(f"    {printable(name)}"), _with_interval(of), number(of.get("n")), beside)
    return table


class _Chart(NamedTuple):
    """A chart of one figure. `says` tells what it shows and what it does not show; `label` formats a part's name."""

    title: str
    section: str
    key: str
    marks: Callable[[Mapping[str, Any], str], list[Mark]]
    says: str
    label: str = "{}"
    ends: tuple[float, float] = (0.0, 1.0)


def _mark(name: str, of: Mapping[str, Any], kind: str = "", control: float | None = None) -> Mark:
    return Mark(name, float(of["value"]), interval_of(of.get("ci95")), kind, control)


def _beside(entry: Mapping[str, Any], label: str) -> list[Mark]:
    """Returns the marks of the figure and of its controls."""
    own = [_mark("explanations", entry, "main")] if is_shown(entry.get("value")) else []
    return own + [_mark(_WORDS.get(name, name.replace("_", " ")), of) for name, of in _named(entry, "controls").items()]


def _divided(entry: Mapping[str, Any], label: str) -> list[Mark]:
    """Returns the marks of the figure's parts, each with the control of another document's explanation."""
    marks = []
    for name, of in _named(entry, "parts").items():
        control = _named(of, "controls").get("permuted")
        shown = label.format(name) if name.isdigit() else name
        marks.append(_mark(shown, of, "part", None if control is None else float(control["value"])))
    return marks


def _commonest(entry: Mapping[str, Any], label: str) -> list[Mark]:
    """Returns the marks of the figure's parts, with the part of the most activations first."""
    parts = _named(entry, "parts")
    counts = {name: of["n"] if is_shown(of.get("n")) else 0 for name, of in parts.items()}
    ordered = sorted(parts, key=lambda name: -counts[name])
    return [mark for name in ordered for mark in _divided({"parts": {name: parts[name]}}, label)]


# The names of controls in charts.
_WORDS = {"permuted": "of other texts", "isotropic": "random error", "gold": "gold text", "true": "the activation"}
_RINGS = "Rings: explanations of other texts."


_CHARTS = (
    _Chart(
        "Against controls",
        "reconstruction",
        "fve",
        _beside,
        "Explanations of the right activation should stand far above those of other texts and of vectors that say "
        "nothing; whether they carry it as words or as a code, this does not show.",
    ),
    _Chart(
        "By sentence",
        "text",
        "marginal_fve",
        _divided,
        "What each sentence adds to those before it; the sum is the FVE of the whole, and a sentence that adds nothing "
        "may still be true.",
        "sentence {}",
    ),
    _Chart(
        "By length",
        "text",
        "fve_tokens",
        _divided,
        "FVE of the first tokens alone; the decoder was trained on whole explanations, so a cut one may be worth less "
        "than its words.",
        "{} tokens",
    ),
    _Chart(
        "In the model's place",
        "meaning",
        "loss_recovered",
        _beside,
        "Share of the loss on the next token that is won back where the reconstruction stands for the activation: 0 is "
        "the mean vector, 1 the activation; what matters only later it does not show.",
    ),
    _Chart(
        "By kind of text",
        "reconstruction",
        "fve_by_domain",
        _commonest,
        "FVE by kind of text, against the variance of that kind; kinds that were not read it says nothing about.",
    ),
    _Chart(
        "By kind of token",
        "reconstruction",
        "fve_by_token",
        _commonest,
        "FVE by what the activation's token is; a higher one may be of activations that are easier to say, rather than "
        "of words that say more.",
    ),
)


def html_suite(evaluation: Mapping[str, Any]) -> str:
    """Makes the report's section: charts of the most important figures, and a table of all. Empty without figures."""
    if not any(_entry(evaluation, figure) for figure in FIGURES):
        return ""
    charts = []
    for chart in _CHARTS:
        section = evaluation.get(chart.section)
        entry = section.get(chart.key) if isinstance(section, dict) else None
        if isinstance(entry, dict) and (marks := chart.marks(entry, chart.label)):
            rings = f" {_RINGS}" if any(mark.control is not None for mark in marks) else ""
            says = f'<p class="note">{html_text(chart.says)}{rings}</p>'
            charts.append(f"<h3>{chart.title} <code>{chart.key}</code></h3>{says}{ruler(marks, *chart.ends)}")
    rows = []
    for figure in FIGURES:
        if entry := _entry(evaluation, figure):
            rows.append(_html_row(figure, entry))
    head = "<thead><tr><th>figure</th><th>value and 95 % interval</th><th>n</th><th>beside it</th></tr></thead>"
    table = f'<table class="health">{head}<tbody>{"".join(rows)}</tbody></table>'
    every = f"<details><summary>Every figure, with what it is</summary>{table}</details>"
    return f"<section><h2>Is it true?</h2>{''.join(charts)}{every}</section>"


def _html_row(figure: Figure, entry: Mapping[str, Any]) -> str:
    parts = _named(entry, "parts")
    own = [_with_interval(entry)] if "value" in entry else []
    own += [f"{html_text(name)}: {_with_interval(of)}" for name, of in parts.items()]
    beside = [f"{html_text(name)}: {_with_interval(of)}" for name, of in _named(entry, "controls").items()]
    for part, of in parts.items():
        found = _named(of, "controls").items()
        beside += [f"{html_text(part)}, {html_text(name)}: {_with_interval(other)}" for name, other in found]
    counts = [int(of["n"]) for of in (entry, *parts.values()) if is_shown(of.get("n"))]
    count = "–" if not counts else " to ".join(dict.fromkeys(number(end) for end in (min(counts), max(counts))))
    return (
        f"<tr><td><code>{figure.key}</code> {html_text(figure.meaning)}</td><td>{'<br>'.join(own)}</td>"
        f"<td>{count}</td><td>{'<br>'.join(beside) or '–'}</td></tr>"
    )
