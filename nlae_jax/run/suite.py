"""The suite on a run's own held-out activations, and where its figures are written."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from nlae_jax.evaluate.figures import SECTIONS
from nlae_jax.evaluate.rows import SUFFIX, Rows, without_following
from nlae_jax.lm.tokens import text_ids
from nlae_jax.run.resources import Run, descriptions_of
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, read_json, write_json

_REFERENCE = 4096  # activations that principal directions are fitted on

# Fields of eval.json that a run's own evaluation has, too -> where the suite has them.
_CONTRACT = {
    "fve": ("reconstruction", "fve"),
    "fve_meannorm": ("reconstruction", "fve_meannorm"),
    "cos": ("reconstruction", "cos"),
    "fve_text": ("text", "fve_text"),
}
_CONTROLS = {"fve_shuffled": "permuted", "fve_gold": "gold"}


def rows_of_run(run: Run, count: int) -> Rows:
    """At most `count` of the held-out rows, with what follows them and their descriptions.

    The first of them are those that the run's own evaluation uses: they alone have been described.
    """
    rows = run.held_out_rows(count)
    plan, h = run.store.plan, run.store.vectors(rows)
    if run.config.dataset.rl:
        texts = [run.store.contexts.get(row, "") for row in rows.tolist()]
        ids = [text_ids(run.tokenizer, text) if text else [] for text in texts]
        docs, domains = ([of[plan.document[row]] for row in rows] for of in (plan.doc_ids, plan.domain))
        return without_following(h, docs, ids, texts, domains)
    others = np.concatenate([plan.rows_of(split) for split in ("rl", "decoder_sft", "encoder_sft")])
    others = np.sort(np.random.default_rng([run.config.seed, 7]).permutation(others)[:_REFERENCE])
    context_ids = [run.store.context_ids(row).tolist() for row in rows.tolist()]
    after = [plan.ids[plan.document[row]][plan.position[row] + 1 :][:SUFFIX].tolist() for row in rows]
    described = _descriptions(run)
    return Rows(
        h=h,
        document=plan.document[rows].astype(int),
        position=plan.position[rows].astype(int),
        context_ids=context_ids,
        following_ids=after,
        contexts=[run.tokenizer.decode(ids, skip_special_tokens=True) for ids in context_ids],
        domain=[plan.domain[document] for document in plan.document[rows]],
        gold=[described.get(row, "") for row in rows.tolist()],
        reference=run.store.vectors(others) if len(others) else h,
        reference_document=plan.document[others].astype(int) if len(others) else plan.document[rows].astype(int),
    )


def _descriptions(run: Run) -> Mapping[int, str]:
    with contextlib.suppress(UserError):  # a run that starts from a pair has none
        return descriptions_of(run)
    return {}


def write_figures(directory: AnyPath, figures: Mapping[str, Any]) -> AnyPath:
    """Adds the sections to `directory/eval.json`, beside the numbers that a run's own evaluation has put there.

    Where there are none, the suite's are put there under their names.
    """
    path = directory / "eval.json"
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: should hold a JSON object; delete it and run `nlae eval` again")
    own: dict[str, Any] = {}
    for name, (section, key) in _CONTRACT.items():
        if (figure := figures.get(section, {}).get(key)) is not None:
            own[name] = figure["value"]
            if name == "fve":
                own["fve_ci95"] = figure["ci95"]
                for field, control in _CONTROLS.items():
                    own[field] = figure.get("controls", {}).get(control, {}).get("value")
    own |= {name: figures["suite"][name] for name in ("num_activations", "num_documents")}
    if "fve_before_rl" in found:
        own = {}
    directory.mkdir(parents=True, exist_ok=True)
    write_json(path, {**found, **own, **{name: figures[name] for name in (*SECTIONS, "suite") if name in figures}})
    return path
