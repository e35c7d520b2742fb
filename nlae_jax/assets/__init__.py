"""Data that the package carries, and the names it is known by: the warm-start set, trained pairs, the describer."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent

WARMSTART = "warmstart"  # the name of the texts as a corpus, and of the notes as descriptions

# Texts with notes on them, and the passages that they are the beginnings of.
WARMSTART_NOTES = _HERE / "warmstart" / "notes.jsonl"
WARMSTART_PASSAGES = _HERE / "warmstart" / "passages.jsonl"

# The template of report.html.
REPORT_PAGE = _HERE / "report.html.jinja"

# The template of the page that `nlae explain --html` writes.
EXPLANATION_PAGE = _HERE / "explanation.html.jinja"

# The page that `nlae serve` shows: one file, with nothing to load.
VIEWER = _HERE / "viewer.html"

# Of the page that `nlae neuron --html` and `nlae direction --html` write.
DIRECTION_PAGE = _HERE / "direction.html.jinja"

# Of the pages of `nlae steer`, `nlae audit` and `nlae compare`.
AUDIT_PAGE = _HERE / "audit.html.jinja"


def pair_directory(name: str) -> Path | None:
    """The directory with `av` and `ar` of the trained pair that is shipped under `name`; None where there is none."""
    return next((path for path in _shipped_pairs() if path.name == name), None)


def pair_names() -> list[str]:
    """The names of the shipped pairs."""
    return [path.name for path in _shipped_pairs()]


def describer_directory() -> Path:
    """The adapters of the shipped describer."""
    return _HERE / "describer"


def _shipped_pairs() -> list[Path]:
    return sorted(path.parent for path in (_HERE / "pairs").glob("*/av"))
