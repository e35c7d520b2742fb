"""Section `reconstruction`: measures how much of the activations explanations carry, and how specific it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from nlae_jax.data.mismatch import of_others
from nlae_jax.evaluate import reconstruction
from nlae_jax.evaluate.estimate import first, fve_of
from nlae_jax.evaluate.reconstruction import direction_mse
from nlae_jax.evaluate.rows import by_part, kinds
from nlae_jax.evaluate.work import Work
from nlae_jax.roles import direction

_SAMPLES_SHOWN = (1, 2, 4, 8)
_DISTRACTORS = 63


def measure(work: Work) -> None:
    """Adds the section's figures to the ledger."""
    rows, put = work.rows, work.ledger.put
    matched, permuted = work.with_variance(work.mse), work.with_variance(work.mse_permuted)
    controls = {"permuted": permuted, **{name: work.with_variance(mse) for name, mse in _uninformed(work).items()}}
    if work.gold is not None:
        known = np.isfinite(work.gold).all(-1)
        controls["gold"] = work.with_variance(np.where(known, direction_mse(np.nan_to_num(work.gold), rows.h), np.nan))
    fve = put("reconstruction", "fve", matched, fve_of, controls)
    baseline = np.full(len(work.mse), float(direction.baselines(rows.h).mean_norm))
    with_baseline = lambda mse: np.stack([mse, baseline], -1)  # noqa: E731
    permuted_columns = {"permuted": with_baseline(work.mse_permuted)}
    put("reconstruction", "fve_meannorm", with_baseline(work.mse), fve_of, permuted_columns)
    put("reconstruction", "cos", 1 - work.mse / 2, first, {"permuted": 1 - work.mse_permuted / 2})
    _by_part(work, matched, permuted)
    cos, permuted_cos = _centred(work, np.arange(len(rows.h))), work.permuted(_centred(work, work.other))
    put("reconstruction", "centred_gap", cos - permuted_cos, first, {"own": cos, "permuted": permuted_cos})
    _retrieval(work)
    ranks = reconstruction.principal_fve(rows.h, rows.document, rows.reference, rows.reference_document)
    _rank(work, fve, ranks)
    _samples(work)


def _uninformed(work: Work) -> dict[str, np.ndarray]:
    """Returns the mse [N] of explanations of the vectors of `reconstruction.uninformed`, by the vectors' names.

    Each mse is NaN outside the sampled rows.
    """
    sampled, errors = work.some(work.sizes.sampled), {}
    for name, vectors in reconstruction.uninformed(work.rows.h, work.seed).items():
        written = work.written(name, vectors[sampled], sampled)
        mse = direction_mse(written["rebuilt"], work.rows.h[sampled], written["length"] > 0)
        errors[name] = work.full(mse, sampled)
    return errors


def _by_part(work: Work, matched: np.ndarray, permuted: np.ndarray) -> None:
    """Adds FVE by kind of text, by position and by token. `matched` and `permuted` [N, 2] are columns of `fve_of`."""
    rows = work.rows

    def put(key: str, names: Sequence[str], order: Sequence[str]) -> None:
        parts, part_controls = by_part(matched, names), {"permuted": by_part(permuted, names)}
        parts = {name: parts[name] for name in order if name in parts}
        work.ledger.put("reconstruction", key, None, fve_of, parts=parts, part_controls=part_controls)

    named = kinds(rows.domain, rows.document)
    if len(set(named)) > 1:
        put("fve_by_domain", named, [name for name, _ in Counter(named).most_common()])
    if rows.position.any():
        tenths = [str(tenth + 1) for tenth in reconstruction.deciles(rows.position)]
        put("fve_by_position", tenths, [str(tenth + 1) for tenth in range(10)])
    decode = work.pair.tokenizer.decode
    classes = [
        reconstruction.token_class(context, decode(ids[-1:]), decode(after[:4])) if ids else ""
        for context, ids, after in zip(rows.contexts, rows.context_ids, rows.following_ids, strict=True)
    ]
    if any(classes):
        put("fve_by_token", classes, reconstruction.TOKEN_CLASSES)


def _centred(work: Work, index: np.ndarray) -> np.ndarray:
    """Returns [N]: the centred cosine of reconstruction `index[n]` and activation n, 0 for unreadable explanations."""
    cos = reconstruction.centred_cos(work.main["rebuilt"][index], work.rows.h, work.mean)
    return np.where(work.readable[index], cos, 0.0)


def _retrieval(work: Work) -> None:
    """Adds retrieval bits and top-1 rates, among activations of other documents and of the same document."""
    rebuilt = np.where(work.readable[:, None], work.main["rebuilt"], 0.0)
    for key, same in (("retrieval_bits", False), ("retrieval_bits_same_document", True)):
        candidates, valid = reconstruction.distractors(work.rows.document, _DISTRACTORS, work.seed, same)
        mse = reconstruction.mse_to(rebuilt, work.rows.h, candidates)
        tau = reconstruction.cross_fitted_tau(mse, valid, work.rows.document)
        permuted_mse = reconstruction.mse_to(rebuilt[work.other], work.rows.h, candidates)
        permuted_valid = valid.copy()
        permuted_valid[work.rows.document[work.other] == work.rows.document, 1:] = False
        # The control has its own temperature. With that of the explanations, its bits would be far below 0.
        permuted_tau = reconstruction.cross_fitted_tau(permuted_mse, permuted_valid, work.rows.document)
        bits = reconstruction.retrieval_bits(mse, valid, tau)
        permuted_bits = reconstruction.retrieval_bits(permuted_mse, permuted_valid, permuted_tau)
        count = valid.sum(-1)
        most_bits = np.where(count > 1, np.log2(np.maximum(count, 1)), np.nan)
        work.ledger.put("reconstruction", key, bits, first, {"permuted": permuted_bits, "most": most_bits})
        chance = np.where(count > 1, 1 / count, np.nan)
        controls = {"permuted": reconstruction.top1(permuted_mse, permuted_valid), "chance": chance}
        top1 = reconstruction.top1(mse, valid)
        work.ledger.put("reconstruction", key.replace("bits", "top1"), top1, first, controls)


def _rank(work: Work, fve: dict[str, Any], ranks: np.ndarray) -> None:
    """Adds the rank that is equivalent to `fve`, and the ranks of both ends of its interval.

    `fve` is the figure's entry. `ranks` is the result of `principal_fve`.
    """

    def ranked(estimate: dict[str, Any]) -> dict[str, Any]:
        rank = lambda value: None if value is None else reconstruction.equivalent_rank(ranks, value)  # noqa: E731
        interval = estimate["ci95"] and [rank(end) for end in estimate["ci95"]]
        return {**estimate, "value": rank(estimate["value"]), "ci95": interval}

    without_controls = {name: value for name, value in fve.items() if name != "controls"}
    permuted = ranked(fve["controls"]["permuted"])
    work.ledger.put_result("reconstruction", "equivalent_rank", ranked(without_controls), {"permuted": permuted})


def _samples(work: Work) -> None:
    """Adds the figures of several explanations of an activation: `best_of` and `agreement`."""
    rows, _, rebuilt = work.sampled
    h, documents = work.rows.h[rows], work.rows.document[rows]
    other = work.others(rows)
    readable: np.ndarray = np.asarray(rebuilt.any(-1))
    h_NxSxD = np.broadcast_to(h[:, None], rebuilt.shape)
    mse = direction_mse(rebuilt, h_NxSxD, readable)
    permuted_mse = of_others(direction_mse(rebuilt[other], h_NxSxD, readable[other]), documents, other)
    counts = [count for count in _SAMPLES_SHOWN if count <= rebuilt.shape[1]]
    best, permuted_best = (
        {str(n): work.with_variance(work.full(reconstruction.best_of(mse_NxS, n), rows)) for n in counts}
        for mse_NxS in (mse, permuted_mse)
    )
    most = str(counts[-1])
    controls, part_controls = {"permuted": permuted_best[most]}, {"permuted": permuted_best}
    work.ledger.put("reconstruction", "best_of", best[most], fve_of, controls, best, part_controls)
    same, different = reconstruction.agreement(rebuilt, work.mean, other)
    controls = {"other": work.full(of_others(different, documents, other), rows)}
    work.ledger.put("reconstruction", "agreement", work.full(same, rows), first, controls)
