"""Steering, audits and comparisons as self-contained HTML pages, and as tables for a terminal.

Pages have no scripts and load nothing. Text in them comes from anywhere, so the template escapes everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.table import Table
from rich.text import Text

from nlae_jax.assets import AUDIT_PAGE
from nlae_jax.report.ruler import interval_text
from nlae_jax.report.table import number, printable, split_at_token
from nlae_jax.runtime.files import write_text

_TIMELINE = 600  # width of a timeline, in the units of its drawing
_PLACES = 40  # the most places of one term that a page shows


def write_audit_page(path: Path, kind: str, reports: Sequence[Mapping[str, Any]], title: str) -> None:
    """Writes the page of `audit_page` to a file."""
    write_text(path, audit_page(kind, reports, title))


def audit_page(kind: str, reports: Sequence[Mapping[str, Any]], title: str) -> str:
    """Makes a page of reports of one `kind`: steer, audit or compare. Each report is the result of its `row`."""
    return _rendered(kind, reports, title, page=True)


def steer_card(report: Mapping[str, Any]) -> str:
    """Makes the part of a page that shows one steering report, for notebooks."""
    return _rendered("steer", [report], "", page=False)


def audit_card(report: Mapping[str, Any]) -> str:
    """Makes the part of a page that shows one audit, for notebooks."""
    return _rendered("audit", [report], "", page=False)


def comparison_card(report: Mapping[str, Any]) -> str:
    """Makes the part of a page that shows one comparison, for notebooks."""
    return _rendered("compare", [report], "", page=False)


def _rendered(kind: str, reports: Sequence[Mapping[str, Any]], title: str, page: bool) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(AUDIT_PAGE.read_text(encoding="utf-8"))
    shown = {"steer": _steered, "audit": _audited, "compare": _compared}[kind]
    return template.render(kind=kind, reports=[shown(report) for report in reports], title=printable(title), page=page)


def _line(text: str) -> str:
    return " ".join(printable(text).split())


def _visible(token: str) -> str:
    return split_at_token(token, token, 0)[1].strip() or "␣"


# --- steering


def steer_verdict(report: Mapping[str, Any]) -> str:
    """Says in a sentence whether the edit beats the controls. It is empty if the report has no pattern."""
    if report["beats_controls"] is None:
        return ""
    alpha = report["best_alpha"]
    edit = max(outcome["hits"] for outcome in report["edits"] if outcome["alpha"] == alpha)
    rival = max(outcome["hits"] for outcome in report["controls"] if outcome["alpha"] == alpha)
    count = len(report["before"]["continuations"])
    verdict = "beats" if report["beats_controls"] else "does not beat"
    alphas = len({outcome["alpha"] for outcome in report["edits"]})
    chosen = f", the one of {alphas} with most hits of the edit," if alphas > 1 else ""
    return (
        f"At α = {alpha:g}{chosen} the edit has {edit} of {count} hits and {verdict} the best random direction's "
        f"{rival}; with nothing added there are {report['before']['hits']}."
    )


def _outcomes(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "kind": {"none": "nothing", "edit": "the edit", "random": "random direction"}[outcome["kind"]],
            "alpha": "" if outcome["kind"] == "none" else f"{outcome['alpha']:g}",
            "hits": "–" if outcome["hits"] is None else outcome["hits"],
            "interval": interval_text(outcome["hit_rate_ci95"], 2),
            "nll": number(outcome["nll"], 2),
            "distinct_2": number(outcome["distinct_2"], 2),
            "continuation": _line(outcome["continuations"][0]),
        }
        for outcome in (report["before"], *report["edits"], *report["controls"])
    ]


def _steered(report: Mapping[str, Any]) -> dict[str, Any]:
    at = report["at"]
    return {
        "at": f"token {at[0]}" if len(at) == 1 else f"tokens {at[0]} to {at[-1]}",
        **{name: _line(report[name]) for name in ("text", "edited", "pattern")},
        "originals": [_line(original) for original in report["originals"]],
        "count": len(report["before"]["continuations"]),
        "verdict": steer_verdict(report),
        "outcomes": _outcomes(report),
    }


def steer_tables(report: Mapping[str, Any]) -> list[Any]:
    """Makes a steering report for a terminal."""
    head = Text()
    for original in report["originals"]:
        head.append_text(Text.assemble(("before: ", "dim"), _line(original), "\n"))
    head.append_text(Text.assemble(("edited: ", "dim"), _line(report["edited"]), "\n"))
    head.append(steer_verdict(report))
    table = _table(("added", 0), ("α", 0), ("hits", 0), ("NLL", 0), ("distinct-2", 0), ("a continuation", 1))
    for outcome in _outcomes(report):
        hits = f"{outcome['hits']} {outcome['interval']}".strip()
        cells = outcome["kind"], outcome["alpha"], hits, outcome["nll"], outcome["distinct_2"]
        table.add_row(*map(str, cells), Text(outcome["continuation"]))
    return [head, table]


# --- audits


def audit_lead(report: Mapping[str, Any]) -> list[str]:
    """Returns sentences that compare the explanations with the placebos."""
    placebos = report["unsaid_placebos"]
    unsaid = 100 * report["unsaid_share"]
    share = f"{unsaid:.0f} % of an explanation's content words are not in the text up to its token"
    if not placebos:
        return [f"{share}. Run the audit with a placebo to judge this share."]
    beside = ", ".join(f"{name} {100 * value:.0f} %" for name, value in placebos.items())
    lines = [f"{share}; of placebos {beside}. Only a share below theirs shows words from the activations."]
    for term in report["terms"]:
        others = ", ".join(f"{name} {100 * value:.1f} %" for name, value in term["placebos"].items())
        lines.append(f"“{printable(term['term'])}”: {100 * term['share']:.1f} % of explanations; placebos {others}.")
    return lines


def _audited(report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_explanations": report["num_explanations"],
        "num_texts": report["num_texts"],
        "lead": audit_lead(report),
        "terms": [_term(term, report["explanations"]) for term in report["terms"]],
        "recurring": [
            {
                "word": printable(recurring["word"]),
                "explanations": recurring["explanations"],
                "placebos": ", ".join(f"{name} {count}" for name, count in recurring["placebos"].items()) or "–",
            }
            for recurring in report["recurring"]
        ],
    }


def _term(term: Mapping[str, Any], explanations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    lengths: dict[str, int] = {}
    for place in explanations:
        lengths[place["text"]] = max(lengths.get(place["text"], 0), place["position"])
    named = dict.fromkeys(place["text"] for place in term["places"])
    timelines = []
    for name in named:
        scale = (_TIMELINE - 4) / max(1, lengths[name])
        hits = [place["position"] for place in term["places"] if place["text"] == name]
        said = term["first_said"].get(name)
        words = "never says it" if said is None else f"says it itself from position {said} on"
        timelines.append(
            {
                "text": f"{_line(name)}: {len(hits)} explanations say it; the text {words}",
                "label": f"Positions {', '.join(map(str, hits[:20]))} of {lengths[name] + 1}",
                "hits": [round(position * scale, 1) for position in hits],
                "said": None if said is None else round(said * scale, 1),
            }
        )
    difference = term["difference"]
    return {
        "term": printable(term["term"]),
        "hits": term["hits"],
        "count": term["count"],
        "interval": interval_text(term["share_ci95"], 2),
        "difference": "" if difference is None else f"{100 * difference:+.1f} %".replace("-", "−"),
        "timelines": timelines,
        "places": [
            {
                **place,
                "text": _line(place["text"]),
                "token": _visible(place["token"]),
                "explanation": _line(place["explanation"]),
            }
            for place in term["places"][:_PLACES]
        ],
    }


def audit_tables(report: Mapping[str, Any]) -> list[Any]:
    """Makes an audit for a terminal, with the comparison with placebos first."""
    parts: list[Any] = [Text("\n".join(audit_lead(report)))]
    for term in report["terms"]:
        table = _table(("text", 0), ("#", 0), ("token", 0), ("explanation", 1), ("in the text so far", 0))
        for place in term["places"][:_PLACES]:
            said = Text(_line(place["explanation"]))
            token = Text(_visible(place["token"]))
            table.add_row(
                Text(_line(place["text"])), str(place["position"]), token, said, "yes" if place["in_text"] else "no"
            )
        unsaid = f"{term['unsaid']} of them where the text does not have it so far"
        parts += [Text(f"{printable(term['term'])}: {term['hits']} of {term['count']}, {unsaid}"), table]
    words = ", ".join(f"{printable(word['word'])} {word['explanations']}" for word in report["recurring"][:15])
    return [*parts, Text(f"words of explanations that are not in the texts: {words or 'none'}")]


def places_table(places: Sequence[Mapping[str, Any]]) -> Table:
    """Makes a table of the places that a search found, for a terminal."""
    table = _table(("text", 0), ("#", 0), ("token", 0), ("explanation", 1))
    for place in places:
        cells = Text(_line(place["text"])), str(place["position"]), Text(_visible(place["token"]))
        table.add_row(*cells, Text(_line(place["explanation"])))
    return table


# --- comparisons


def _compared(report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "names": [printable(name) for name in report["names"]],
        "layers": report["layers"],
        "notes": [printable(note) for note in report["notes"]],
        "tokens": [
            {
                "place": "–".join(map(str, token["a"]["span"])) if token["a"].get("span") else token["a"]["position"],
                "token": _visible(token["a"]["token"]),
                "a": _line(token["a"]["explanation"]) or "(empty)",
                "b": _line(token["b"]["explanation"]) or "(empty)",
                "mse_a": number(token["a"]["mse"], 2),
                "mse_b": number(token["b"]["mse"], 2),
                "overlap": number(token["overlap"], 2),
            }
            for token in report["tokens"]
        ],
    }


def comparison_tables(report: Mapping[str, Any]) -> list[Any]:
    """Makes a comparison for a terminal."""
    shown = _compared(report)
    first, second = (f"{name}, block {layer}" for name, layer in zip(shown["names"], shown["layers"], strict=True))
    table = _table(("#", 0), ("token", 0), (first, 1), ("mse", 0), (second, 1), ("mse", 0), ("shared", 0))
    for token in shown["tokens"]:
        words = Text(token["a"]), token["mse_a"], Text(token["b"]), token["mse_b"]
        table.add_row(str(token["place"]), Text(token["token"]), *words, token["overlap"])
    return [Text("\n".join(shown["notes"])), table] if shown["notes"] else [table]


def _table(*columns: tuple[str, int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), expand=True)
    for name, ratio in columns:
        table.add_column(Text(printable(name)), ratio=ratio or None, overflow="fold", no_wrap=not ratio)
    return table
