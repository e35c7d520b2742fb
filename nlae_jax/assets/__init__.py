"""Paths and names of the data that the package carries: the warm-start set, trained pairs, the describer, pages."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent

WARMSTART = "warmstart"  # names the texts where a corpus is expected, and the notes where descriptions are

# Texts with notes on them, and the passages whose beginnings the texts are.
WARMSTART_NOTES = _HERE / "warmstart" / "notes.jsonl"
WARMSTART_PASSAGES = _HERE / "warmstart" / "passages.jsonl"

# The template of report.html.
REPORT_PAGE = _HERE / "report.html.jinja"

# The template of the page that `nlae explain --html` writes.
EXPLANATION_PAGE = _HERE / "explanation.html.jinja"

# The page that `nlae serve` shows. It is one file that loads no others.
VIEWER = _HERE / "viewer.html"

# The template of the page that `nlae neuron --html` and `nlae direction --html` write.
DIRECTION_PAGE = _HERE / "direction.html.jinja"

# The template of the pages of `nlae steer`, `nlae audit` and `nlae compare`.
AUDIT_PAGE = _HERE / "audit.html.jinja"


def pair_directory(name: str) -> Path | None:
    """Returns the directory with `av` and `ar` of the trained pair shipped under `name`, or None without one."""
    return next((path for path in _shipped_pairs() if path.name == name), None)


def pair_names() -> list[str]:
    """Returns the names of the shipped pairs."""
    return [path.name for path in _shipped_pairs()]


def describer_directory() -> Path:
    """Returns the directory with the adapters of the shipped describer."""
    return _HERE / "describer"


def _shipped_pairs() -> list[Path]:
    return sorted(path.parent for path in (_HERE / "pairs").glob("*/av"))
