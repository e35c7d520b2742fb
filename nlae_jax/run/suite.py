"""Prepares a run's held-out activations for the evaluation suite, and writes the suite's figures."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from nlae_jax.evaluate.figures import SECTIONS
from nlae_jax.evaluate.rows import SUFFIX, EvaluatedRows, without_following
from nlae_jax.lm.tokens import text_ids
from nlae_jax.run.resources import Run, descriptions_of
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, read_json, write_json
from nlae_jax.runtime.progress import say

_REFERENCE = 4096  # activations that principal directions are fitted on

# Fields of eval.json that the stage `eval` writes too -> their section and key in the suite's figures.
_CONTRACT = {
    "fve": ("reconstruction", "fve"),
    "fve_meannorm": ("reconstruction", "fve_meannorm"),
    "cos": ("reconstruction", "cos"),
    "fve_text": ("text", "fve_text"),
}
_CONTROLS = {"fve_shuffled": "permuted", "fve_gold": "gold"}
_SUMMARY = (*_CONTRACT, *_CONTROLS, "fve_ci95", "num_activations", "num_documents")
# Fields of `suite` that map sections to numbers.
_BY_SECTION = ("seconds", "explanations", "num_sampled")


def rows_of_run(run: Run, count: int) -> EvaluatedRows:
    """Returns at most `count` of the held-out rows, with the tokens that follow them and with their descriptions.

    The first of them are those that the run's own evaluation uses: they alone have been described.
    """
    rows = run.held_out_rows(count)
    index, h = run.store.index, run.store.vectors(rows)
    if run.config.dataset.rl:
        texts = [run.store.contexts.get(row, "") for row in rows.tolist()]
        ids = [text_ids(run.tokenizer, text) if text else [] for text in texts]
        docs, domains = ([values[index.document[row]] for row in rows] for values in (index.doc_ids, index.domain))
        return without_following(h, docs, ids, texts, domains)
    fitted = np.concatenate([index.rows_of(split) for split in ("rl", "decoder_sft", "encoder_sft")])
    fitted = np.sort(np.random.default_rng([run.config.seed, 7]).permutation(fitted)[:_REFERENCE])
    context_ids = [run.store.context_ids(row).tolist() for row in rows.tolist()]
    following_ids = [index.ids[index.document[row]][index.position[row] + 1 :][:SUFFIX].tolist() for row in rows]
    descriptions = _descriptions(run)
    return EvaluatedRows(
        h=h,
        document=index.document[rows].astype(int),
        position=index.position[rows].astype(int),
        context_ids=context_ids,
        following_ids=following_ids,
        contexts=[run.tokenizer.decode(ids, skip_special_tokens=True) for ids in context_ids],
        domain=[index.domain[document] for document in index.document[rows]],
        gold=[descriptions.get(row, "") for row in rows.tolist()],
        reference=run.store.vectors(fitted) if len(fitted) else h,
        reference_document=index.document[fitted].astype(int) if len(fitted) else index.document[rows].astype(int),
    )


def _descriptions(run: Run) -> Mapping[int, str]:
    """Returns row -> description, or {} where the run has none."""
    with contextlib.suppress(UserError):  # a run that starts from a pair has none
        return descriptions_of(run)
    return {}


def write_figures(directory: AnyPath, figures: Mapping[str, Any]) -> AnyPath:
    """Adds the suite's sections to `directory/eval.json` and returns its path.

    Numbers that the stage `eval` has written stay. Where there are none, the suite's are written under their names.
    What an earlier call has measured stays, if it is of the same pair and of the same activations: its sections, and
    the suite's numbers under the names of the stage. Raises UserError where the file holds no JSON object.
    """
    path = directory / "eval.json"
    stored = read_json(path) if path.exists() else {}
    if not isinstance(stored, dict):
        raise UserError(f"{path}: should hold a JSON object; delete it and run `nlae eval` again")
    directory.mkdir(parents=True, exist_ok=True)
    about, earlier = dict(figures["suite"]), stored.get("suite")
    earlier = earlier if isinstance(earlier, dict) else {}
    is_of_stage = "fve_before_rl" in stored
    if earlier.get("work") == about["work"]:
        # Sections of earlier calls stay in the file, so what belongs to them stays beside them.
        for name in _BY_SECTION:
            about[name] = {**(earlier[name] if isinstance(earlier.get(name), dict) else {}), **about[name]}
    else:
        if others := [name for name in SECTIONS if name in stored and name not in figures]:
            sections = ", ".join(others)
            say(f"{path}: the sections {sections} were of another pair or of other activations, and are left out")
        left_out = {*others, *(() if is_of_stage else _SUMMARY)}
        stored = {name: value for name, value in stored.items() if name not in left_out}
    summary = {} if is_of_stage else _summary(figures)
    sections_of_call = {name: figures[name] for name in SECTIONS if name in figures}
    write_json(path, {**stored, **summary, **sections_of_call, "suite": about})
    return path


def sections_in(directory: AnyPath) -> dict[str, Any]:
    """Returns the suite's sections in `directory/eval.json`, and `suite`, which is about them; {} without any.

    They are of the present training state: a stage of training deletes the file when it goes on.
    """
    path = directory / "eval.json"
    with contextlib.suppress(UserError):
        stored = read_json(path) if path.exists() else {}
        if isinstance(stored, dict):
            return {name: stored[name] for name in (*SECTIONS, "suite") if name in stored}
    return {}


def _summary(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the suite's numbers under the names by which the stage `eval` writes them."""
    summary: dict[str, Any] = {}
    for name, (section, key) in _CONTRACT.items():
        if (figure := figures.get(section, {}).get(key)) is not None:
            summary[name] = figure["value"]
            if name == "fve":
                summary["fve_ci95"] = figure["ci95"]
                for field, control in _CONTROLS.items():
                    summary[field] = figure.get("controls", {}).get(control, {}).get("value")
    return summary | {name: figures["suite"][name] for name in ("num_activations", "num_documents")}
