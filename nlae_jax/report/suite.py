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
    """Returns the numbers of eval.json that the run's stage eval wrote, without the suite's figures."""
    return {name: value for name, value in evaluation.items() if name not in (*SECTIONS, "suite")}


def _entry(evaluation: Mapping[str, Any], figure: Figure) -> dict[str, Any]:
    """Returns a figure of eval.json, or {} if the file lacks it."""
    section = evaluation.get(figure.section)
    entry = section.get(figure.key) if isinstance(section, dict) else None
    return entry if isinstance(entry, dict) else {}


def _named(entry: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """Returns a figure's `controls` or `parts` whose value can be shown, in the order of `_place`.

    The file has them in alphabetical order.
    """
    entries = entry.get(kind)
    entries = entries if isinstance(entries, dict) else {}
    shown = {
        name: estimate
        for name, estimate in entries.items()
        if isinstance(estimate, dict) and is_shown(estimate.get("value"))
    }
    return {name: shown[name] for name in sorted(shown, key=_place)}


# All controls, in the order of the table of figures.
_CONTROLS = tuple(dict.fromkeys(control for figure in FIGURES for control in figure.controls))


def _place(name: str) -> tuple[int, int]:
    """Returns the sort key of a control or part: controls as in `FIGURES`, then numbers by size, then the others."""
    if name in _CONTROLS:
        return 0, _CONTROLS.index(name)
    return (1, int(name)) if name.isdecimal() and len(name) < 10 else (2, 0)


def _with_interval(estimate: Mapping[str, Any], digits: int = 3) -> str:
    return (
        f"{number(estimate.get('value'), digits)} {interval_text(interval_of(estimate.get('ci95')), digits)}".rstrip()
    )


def _values(entry: Mapping[str, Any]) -> str:
    """Returns the values of the controls of a figure or of a part, without intervals, as text."""
    return ", ".join(f"{name} {number(control['value'])}" for name, control in _named(entry, "controls").items())


def suite_table(evaluation: Mapping[str, Any]) -> Table:
    """Makes a table with one line for every figure and every part: value, interval and controls."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), expand=True)
    table.add_column("figure", overflow="fold", ratio=3)
    table.add_column("value and 95 % interval", overflow="fold", ratio=3)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("controls", overflow="fold", ratio=4)
    for figure in FIGURES:
        if not (entry := _entry(evaluation, figure)):
            continue
        value, count = _with_interval(entry) if "value" in entry else "", number(entry.get("n"))
        table.add_row(Text(f"{figure.section}: {figure.key}"), value, count if value else "", _values(entry))
        for name, part in _named(entry, "parts").items():
            table.add_row(Text(f"    {printable(name)}"), _with_interval(part), number(part.get("n")), _values(part))
    return table


class _Chart(NamedTuple):
    """A chart of one figure.

    `marks` makes its marks from the figure's entry in eval.json and from `label`, which formats the name of a part.
    `says` tells the reader what the chart shows and what it does not show.
    """

    title: str
    section: str
    key: str
    marks: Callable[[Mapping[str, Any], str], list[Mark]]
    says: str
    label: str = "{}"
    ends: tuple[float, float] = (0.0, 1.0)


def _mark(name: str, estimate: Mapping[str, Any], kind: str = "", control: float | None = None) -> Mark:
    return Mark(name, float(estimate["value"]), interval_of(estimate.get("ci95")), kind, control)


def _beside(entry: Mapping[str, Any], label: str) -> list[Mark]:
    """Returns the marks of the figure and of its controls."""
    explanations = [_mark("explanations", entry, "main")] if is_shown(entry.get("value")) else []
    controls = _named(entry, "controls").items()
    return explanations + [_mark(_WORDS.get(name, name.replace("_", " ")), control) for name, control in controls]


def _divided(entry: Mapping[str, Any], label: str) -> list[Mark]:
    """Returns the marks of the figure's parts, each with the control of another document's explanation."""
    marks = []
    for name, part in _named(entry, "parts").items():
        control = _named(part, "controls").get("permuted")
        shown = label.format(name) if name.isdigit() else name
        marks.append(_mark(shown, part, "part", None if control is None else float(control["value"])))
    return marks


def _commonest(entry: Mapping[str, Any], label: str) -> list[Mark]:
    """Returns the marks of the figure's parts, with the part of the most activations first."""
    parts = _named(entry, "parts")
    counts = {name: part["n"] if is_shown(part.get("n")) else 0 for name, part in parts.items()}
    ordered = sorted(parts, key=lambda name: -counts[name])
    return [mark for name in ordered for mark in _divided({"parts": {name: parts[name]}}, label)]


# The charts show these words in the place of the names of controls.
_WORDS = {"permuted": "of other texts", "isotropic": "random error", "gold": "gold text", "true": "the activation"}
_RINGS = "Rings: explanations of other texts."


_CHARTS = (
    _Chart(
        "Against controls",
        "reconstruction",
        "fve",
        _beside,
        "Explanations carry something about their own activation as far as their FVE is above that of explanations of "
        "other texts and of vectors without information, but the chart does not show whether as words or as a code.",
    ),
    _Chart(
        "By sentence",
        "text",
        "marginal_fve",
        _divided,
        "Each mark is the FVE that a sentence adds to those before it, and their sum is the FVE of the whole "
        "explanation, but the chart does not show whether a sentence is true.",
        "sentence {}",
    ),
    _Chart(
        "By length",
        "text",
        "fve_tokens",
        _divided,
        "Each mark is the FVE of an explanation's first tokens, but a low one does not show that they carry nothing, "
        "because the decoder was trained on whole explanations.",
        "{} tokens",
    ),
    _Chart(
        "In the model's place",
        "meaning",
        "loss_recovered",
        _beside,
        "In the activation's place, a vector at 1 predicts the next token as well as the activation, and one at 0 as "
        "badly as the mean vector, but the chart does not show effects on later tokens.",
    ),
    _Chart(
        "By kind of text",
        "reconstruction",
        "fve_by_domain",
        _commonest,
        "Each mark is the FVE on one kind of text, relative to the variance of this kind, and says nothing about other "
        "kinds.",
    ),
    _Chart(
        "By kind of token",
        "reconstruction",
        "fve_by_token",
        _commonest,
        "Each mark is the FVE on one kind of token, but a higher one does not show that its explanations are better, "
        "because its activations may be easier to explain.",
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
    head = "<thead><tr><th>figure</th><th>value and 95 % interval</th><th>n</th><th>controls</th></tr></thead>"
    table = f'<table class="health">{head}<tbody>{"".join(rows)}</tbody></table>'
    every = f"<details><summary>All figures with their meanings</summary>{table}</details>"
    return f"<section><h2>Is it true?</h2>{''.join(charts)}{every}</section>"


def _html_row(figure: Figure, entry: Mapping[str, Any]) -> str:
    parts = _named(entry, "parts")
    values = [_with_interval(entry)] if "value" in entry else []
    values += [f"{html_text(name)}: {_with_interval(part)}" for name, part in parts.items()]
    controls = [f"{html_text(name)}: {_with_interval(item)}" for name, item in _named(entry, "controls").items()]
    for part, estimate in parts.items():
        of_part = _named(estimate, "controls").items()
        controls += [f"{html_text(part)}, {html_text(name)}: {_with_interval(item)}" for name, item in of_part]
    counts = [int(item["n"]) for item in (entry, *parts.values()) if is_shown(item.get("n"))]
    count = "–" if not counts else " to ".join(dict.fromkeys(number(end) for end in (min(counts), max(counts))))
    return (
        f"<tr><td><code>{figure.key}</code> {html_text(figure.meaning)}</td><td>{'<br>'.join(values)}</td>"
        f"<td>{count}</td><td>{'<br>'.join(controls) or '–'}</td></tr>"
    )
