"""Directions and neurons as one self-contained HTML page, and as tables for a terminal.

The page has no scripts and loads nothing. Text in it comes from anywhere, so the template escapes everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.table import Table
from rich.text import Text

from nlae_jax.assets import DIRECTION_PAGE
from nlae_jax.report.table import number, printable, split_at_token
from nlae_jax.runtime.files import write_text

_MEASURES = {
    "heard": "heard: cosine of the push and of what its explanation changes",
    "agreement": "agreement with the explanations of its top contexts",
    "auc": "surprisal AUC: tells its contexts from others",
}
_WIDTH, _HEIGHT = 20, 70  # width of the histogram's bars, and height of its highest bar


def direction_page(reports: Sequence[Mapping[str, Any]], title: str) -> str:
    """Makes a page of reports, each of them the result of `DirectionReport.row`."""
    return _rendered(reports, title, page=True)


def direction_card(report: Mapping[str, Any]) -> str:
    """Makes the part of a page that shows one report, for notebooks."""
    return _rendered([report], "", page=False)


def write_direction_page(path: Path, reports: Sequence[Mapping[str, Any]], title: str) -> None:
    """Writes the page of `direction_page` to a file."""
    write_text(path, direction_page(reports, title))


def _rendered(reports: Sequence[Mapping[str, Any]], title: str, page: bool) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(DIRECTION_PAGE.read_text(encoding="utf-8"))
    shown = [_shown(report, f"d{index}") for index, report in enumerate(reports)]
    beating = sum(bool(report["explained"]) for report in reports)
    return template.render(reports=shown, title=printable(title), page=page, beating=beating)


def measures(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns the three measures that decide the verdict, each beside its best control."""
    sweep, controls = report["sweep"], report["controls"]
    values = {
        "heard": (_most(sweep), max(map(_most, controls), default=None)),
        **{
            name: (sweep[name], max((control[name] for control in controls), default=None))
            for name in ("agreement", "auc")
        },
    }
    return [
        {"name": _MEASURES[name], "own": number(value), "control": number(control), "key": name}
        for name, (value, control) in values.items()
    ]


def _most(sweep: Mapping[str, Any]) -> float:
    return max(point["heard"] for point in sweep["points"])


def heard_at(report: Mapping[str, Any]) -> str:
    """Says in a sentence at which r the direction is heard."""
    steps = [f"{r:g}" for r in report["heard_at"]]
    if not steps:
        return "Heard at no r of the sweep better than every control."
    return f"Heard better than every control at r = {', '.join(steps)}; the explanation is that at r = {report['r']:g}."


def _shown(report: Mapping[str, Any], anchor: str) -> dict[str, Any]:
    edges, counts = report["histogram"]["edges"], report["histogram"]["counts"]
    most = max([1, *counts])
    return {
        **{name: report[name] for name in ("layer", "explained")},
        **{name: printable(report[name]) for name in ("name", "explanation", "mean_explanation", "corpus")},
        "id": anchor,
        "notes": [printable(note) for note in report["notes"]],
        "measures": measures(report),
        "heard_at": heard_at(report),
        **{name: [(_visible(token), number(z, 1)) for token, z in report[name]] for name in ("promoted", "suppressed")},
        "bars": [
            {"x": _WIDTH * index, "y": _HEIGHT - height, "height": height}
            for index, count in enumerate(counts)
            for height in [round(_HEIGHT * count / most, 1)]
        ],
        "low": number(edges[0], 2),
        "high": number(edges[-1], 2),
        "contexts": [
            {**{name: printable(text) if isinstance(text, str) else number(text, 2) for name, text in context.items()}}
            for context in report["contexts"]
        ],
        "sweep": _sweep(report["sweep"]),
        "controls": [_sweep(control) for control in report["controls"]],
    }


def _sweep(sweep: Mapping[str, Any]) -> dict[str, Any]:
    points = [
        {
            "r": f"{point['r']:g}",
            "heard": number(point["heard"]),
            "explanation": printable(point["explanation"]) or "(empty)",
            "cut": point["cut"],
        }
        for point in sweep["points"]
    ]
    return {"kind": printable(sweep["kind"]), "points": points}


def _visible(token: str) -> str:
    return split_at_token(token, token, 0)[1].strip() or "␣"


def direction_tables(report: Mapping[str, Any]) -> list[Any]:
    """Makes a report for a terminal: the verdict, the sweep, the contexts and the tokens."""
    verdict = "beats its controls" if report["explained"] else "not told from its controls: do not believe it"
    head = Text.assemble((printable(report["name"]), "bold"), f", block {report['layer']}: {verdict}\n")
    head.append(f"{printable(report['explanation']) or '(empty)'}\n")
    for row in measures(report):
        head.append(f"  {row['name']}: {row['own']}, best control {row['control']}\n", "dim")
    head.append(f"{heard_at(report)} {'. '.join(printable(note) for note in report['notes'])}")
    sweep = _table("r", "heard", "explanation")
    for point in _sweep(report["sweep"])["points"]:
        sweep.add_row(point["r"], point["heard"], Text(" ".join(point["explanation"].split())))
    contexts = _table("value", "context", "explanation there")
    for context in report["contexts"]:
        text = f"{printable(context['before'])}«{_visible(context['token'])}»{printable(context['after'])}"
        said = Text(" ".join(printable(context["explanation"]).split()))
        contexts.add_row(number(context["value"], 2), Text(" ".join(text.split())), said)
    tokens = [
        Text(f"{label}: " + ", ".join(f"{_visible(token)} {number(z, 1)}" for token, z in report[name]))
        for label, name in (("promotes", "promoted"), ("suppresses", "suppressed"))
    ]
    return [head, sweep, contexts, *tokens]


def _table(first: str, second: str, third: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), expand=True)
    table.add_column(first, justify="right", no_wrap=True)
    table.add_column(second, ratio=3 if second == "context" else None, overflow="fold", no_wrap=second != "context")
    table.add_column(third, ratio=4, overflow="fold")
    return table
