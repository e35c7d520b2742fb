"""Section `reconstruction`: how much of activations the words carry, of which ones, and how specifically."""

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
    """FVE, its controls, its parts, and what FVE alone does not show."""
    rows, put = work.rows, work.ledger.put
    own, wrong = work.with_variance(work.mse), work.with_variance(work.mse_permuted)
    beside = {"permuted": wrong, **{name: work.with_variance(m) for name, m in _uninformed(work).items()}}
    if work.gold is not None:
        known = np.isfinite(work.gold).all(-1)
        beside["gold"] = work.with_variance(np.where(known, direction_mse(np.nan_to_num(work.gold), rows.h), np.nan))
    fve = put("reconstruction", "fve", own, fve_of, beside)
    baseline = np.full(len(work.mse), float(direction.baselines(rows.h).mean_norm))
    against = lambda mse: np.stack([mse, baseline], -1)  # noqa: E731
    put("reconstruction", "fve_meannorm", against(work.mse), fve_of, {"permuted": against(work.mse_permuted)})
    put("reconstruction", "cos", 1 - work.mse / 2, first, {"permuted": 1 - work.mse_permuted / 2})
    _by_part(work, own, wrong)
    near, far = _centred(work, np.arange(len(rows.h))), work.permuted(_centred(work, work.other))
    put("reconstruction", "centred_gap", near - far, first, {"own": near, "permuted": far})
    _retrieval(work)
    ranks = reconstruction.principal_fve(rows.h, rows.document, rows.reference, rows.reference_document)
    _rank(work, fve, ranks)
    _samples(work)


def _uninformed(work: Work) -> dict[str, np.ndarray]:
    """By name the mse [N] of explanations of vectors that say nothing, NaN beyond some rows."""
    some, found = work.some(work.sizes.sampled), {}
    for name, vectors in reconstruction.uninformed(work.rows.h, work.seed).items():
        written = work.written(name, vectors[some], some)
        mse = direction_mse(written["rebuilt"], work.rows.h[some], written["length"] > 0)
        found[name] = work.full(mse, some)
    return found


def _by_part(work: Work, own: np.ndarray, wrong: np.ndarray) -> None:
    """FVE of the same explanations, and of those of other documents, by what they are of."""
    rows = work.rows

    def put(key: str, names: Sequence[str], order: Sequence[str]) -> None:
        parts, permuted = by_part(own, names), by_part(wrong, names)
        parts = {name: parts[name] for name in order if name in parts}
        work.ledger.put("reconstruction", key, None, fve_of, parts=parts, part_controls={"permuted": permuted})

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
    """[N]: centred cosine of reconstruction `index[n]` and activation n; 0 where nothing was readable."""
    found = reconstruction.centred_cos(work.main["rebuilt"][index], work.rows.h, work.mean)
    return np.where(work.readable[index], found, 0.0)


def _retrieval(work: Work) -> None:
    rebuilt = np.where(work.readable[:, None], work.main["rebuilt"], 0.0)
    for key, same in (("retrieval_bits", False), ("retrieval_bits_same_document", True)):
        candidates, valid = reconstruction.distractors(work.rows.document, _DISTRACTORS, work.seed, same)
        distance = reconstruction.mse_to(rebuilt, work.rows.h, candidates)
        tau = reconstruction.cross_fitted_tau(distance, valid, work.rows.document)
        wrong = reconstruction.mse_to(rebuilt[work.other], work.rows.h, candidates)
        # Each with the temperature that is best for it: what finds nothing has no bits then, rather than very few.
        valid_wrong = valid.copy()
        valid_wrong[work.rows.document[work.other] == work.rows.document, 1:] = False
        tau_wrong = reconstruction.cross_fitted_tau(wrong, valid_wrong, work.rows.document)
        count = valid.sum(-1)
        most = np.where(count > 1, np.log2(np.maximum(count, 1)), np.nan)
        beside = {"permuted": reconstruction.retrieval_bits(wrong, valid_wrong, tau_wrong), "most": most}
        work.ledger.put("reconstruction", key, reconstruction.retrieval_bits(distance, valid, tau), first, beside)
        chance = np.where(count > 1, 1 / count, np.nan)
        beside = {"permuted": reconstruction.top1(wrong, valid_wrong), "chance": chance}
        own = reconstruction.top1(distance, valid)
        work.ledger.put("reconstruction", key.replace("bits", "top1"), own, first, beside)


def _rank(work: Work, fve: dict[str, Any], ranks: np.ndarray) -> None:
    """The rank that the FVE and both ends of its interval are worth."""

    def worth(of: dict[str, Any]) -> dict[str, Any]:
        rank = lambda value: None if value is None else reconstruction.equivalent_rank(ranks, value)  # noqa: E731
        return {**of, "value": rank(of["value"]), "ci95": of["ci95"] and [rank(end) for end in of["ci95"]]}

    bare = {name: value for name, value in fve.items() if name != "controls"}
    permuted = worth(fve["controls"]["permuted"])
    work.ledger.put_result("reconstruction", "equivalent_rank", worth(bare), {"permuted": permuted})


def _samples(work: Work) -> None:
    rows, _, rebuilt = work.sampled
    h, documents = work.rows.h[rows], work.rows.document[rows]
    other = work.others(rows)
    readable: np.ndarray = np.asarray(rebuilt.any(-1))
    spread = lambda of: np.broadcast_to(of[:, None], rebuilt.shape)  # noqa: E731
    mse = direction_mse(rebuilt, spread(h), readable)
    wrong = of_others(direction_mse(rebuilt[other], spread(h), readable[other]), documents, other)
    counts = [count for count in _SAMPLES_SHOWN if count <= rebuilt.shape[1]]
    best = {count: [work.full(reconstruction.best_of(m, count), rows) for m in (mse, wrong)] for count in counts}
    work.ledger.put(
        "reconstruction",
        "best_of",
        work.with_variance(best[counts[-1]][0]),
        fve_of,
        {"permuted": work.with_variance(best[counts[-1]][1])},
        {str(count): work.with_variance(own) for count, (own, _) in best.items()},
        {"permuted": {str(count): work.with_variance(wrong) for count, (_, wrong) in best.items()}},
    )
    same, others = reconstruction.agreement(rebuilt, work.mean, other)
    own, others = work.full(same, rows), work.full(of_others(others, documents, other), rows)
    work.ledger.put("reconstruction", "agreement", own, first, {"other": others})
