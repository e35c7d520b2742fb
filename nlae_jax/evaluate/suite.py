"""The suite measures how much a pair's explanations carry, what kind of information it is, and whether it is true.

The sections are the modules of `evaluate.sections`. Each section adds its figures to one `Ledger`. It computes its
inputs through `Work`, which keeps finished parts on disk, so that a stopped suite can continue.
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
# The sections with figures that take several explanations of an activation.
_SAMPLED = ("reconstruction", "truth")


def flag(name: str) -> str:
    """Returns the command's option with this name."""
    return f"--{name.replace('_', '-')}"


def sections_of(names: Sequence[str], spelled: Callable[[str], str] = flag) -> tuple[str, ...]:
    """Returns the sections that are named, each once and in the suite's order; all sections for an empty sequence.

    Raises UserError for an unknown name. `spelled` says how messages write the name of an option.
    """
    if unknown := [name for name in names if name not in SECTIONS]:
        raise UserError(f"{spelled('suite')}: {unknown[0]!r} should be one of {', '.join(SECTIONS)}")
    return tuple(name for name in SECTIONS if name in names or not names)


def check_additions(
    sections: Sequence[str],
    control_steps: int,
    reword: bool,
    judge: bool,
    sampled: int | None = None,
    spelled: Callable[[str], str] = flag,
) -> None:
    """Checks the options for additional figures against the chosen sections.

    Raises UserError if an option's figures belong to a section that is left out, or if `sampled`, the number of
    activations with several explanations, is below 2. `sampled` is None if the option was not given. `spelled` is as
    in `sections_of`.
    """
    additions = (("control_steps", control_steps, "text"), ("reword", reword, "text"), ("judge", judge, "truth"))
    suite = spelled("suite")
    for option, is_given, section in additions:
        if is_given and section not in sections:
            raise UserError(
                f"{spelled(option)}: its figures belong to the section {section}, which {suite} should name"
            )
    if sampled is not None and sampled < 2:
        raise UserError(f"{spelled('sampled')}: {sampled} should be at least 2")
    if sampled is not None and not set(_SAMPLED) & set(sections):
        where = f"the sections {' and '.join(_SAMPLED)}; {suite} should name one of them"
        raise UserError(f"{spelled('sampled')}: its figures belong to {where}")


def run_suite(
    work: Work, sections: Sequence[str] = SECTIONS, more: Mapping[str, Callable[[], None]] = MappingProxyType({})
) -> dict[str, Any]:
    """Measures the `sections` and returns their figures, by section and figure.

    `more` maps a section to a function that adds further figures, which need training or another language model.

    The key `suite` of the result has the numbers of activations and documents, the seed, a name of the pair and the
    activations (`Work.name`), and for each section its seconds, its explanations and, as `num_sampled`, the number of
    activations with several explanations. If several sections need the same work, it counts for the first of them.
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
        "num_sampled": {name: len(work.some(work.sizes.sampled)) for name in _SAMPLED if name in sections},
        "seed": work.seed,
        "work": work.name,
        "seconds": seconds,
        "explanations": explanations,
    }
    return {**work.ledger.sections, "suite": about}
