"""The suite: what a pair's explanations carry, of what kind that is, and whether it is true.

Sections are the modules of `evaluate.sections`. Each computes what it needs through `Work`, which keeps it on disk, so
that a suite that was stopped goes on, and puts its figures into one `Ledger`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

from nlae_jax.evaluate.figures import SECTIONS
from nlae_jax.evaluate.sections import health, meaning, reconstruction, text, truth
from nlae_jax.evaluate.work import Work
from nlae_jax.runtime.errors import UserError

_MODULES: dict[str, ModuleType] = {
    "reconstruction": reconstruction,
    "text": text,
    "meaning": meaning,
    "truth": truth,
    "health": health,
}


def sections_of(names: str) -> tuple[str, ...]:
    """The sections that a comma-separated list names, in the suite's order. Raises UserError for others."""
    given = [name.strip() for name in names.split(",") if name.strip()] or list(SECTIONS)
    if unknown := [name for name in given if name not in SECTIONS]:
        raise UserError(f"--suite: {unknown[0]!r} should be one of {', '.join(SECTIONS)}")
    return tuple(name for name in SECTIONS if name in given)


def check_additions(
    sections: Sequence[str], control_steps: int, reword: bool, judge: bool, sampled: int | None = None
) -> None:
    """Raises UserError where figures are asked for that belong to a section which is left out.

    Also where they would be of fewer than two activations.
    """
    asked = (("--control-steps", control_steps, "text"), ("--reword", reword, "text"), ("--judge", judge, "truth"))
    for option, is_asked, section in asked:
        if is_asked and section not in sections:
            raise UserError(f"{option}: its figures belong to the section {section}, which --suite should name")
    if sampled is not None and sampled < 2:
        raise UserError(f"--sampled: {sampled} should be at least 2")
    if sampled is not None and not {"reconstruction", "truth"} & set(sections):
        raise UserError(
            "--sampled: its figures belong to the sections reconstruction and truth; --suite should name one of them"
        )


def run_suite(
    work: Work, sections: Sequence[str] = SECTIONS, more: Mapping[str, Callable[[], None]] = MappingProxyType({})
) -> dict[str, Any]:
    """Every section's figures by section and name; under `suite` what they are of, and what each section took.

    What several sections need counts for the first of them. `more` adds to a section the figures that take training,
    or another language model.
    """
    seconds, explanations = {}, {}
    for section in SECTIONS:
        if section in sections:
            before, written = sum(work.kept.seconds.values()), work.explanations
            _MODULES[section].measure(work)
            if section in more:
                more[section]()
            seconds[section] = round(sum(work.kept.seconds.values()) - before, 1)
            explanations[section] = work.explanations - written
    rows = work.rows
    about = {
        "num_activations": len(rows.h),
        "num_documents": len(set(rows.document.tolist())),
        "num_sampled": len(work.some(work.sizes.sampled)),
        "seed": work.seed,
        "seconds": seconds,
        "explanations": explanations,
    }
    return {**work.ledger.sections, "suite": about}
