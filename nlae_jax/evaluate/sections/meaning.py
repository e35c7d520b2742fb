"""Section `meaning`: measures how predictions change if the reconstruction takes the activation's place."""

from __future__ import annotations

import numpy as np

from nlae_jax.evaluate import splice
from nlae_jax.evaluate.estimate import first, recovered
from nlae_jax.evaluate.work import Work
from nlae_jax.runtime.progress import warn

_ROUNDING = 1e-3  # nats: rounding alone changes predictions by less


def measure(work: Work) -> None:
    """Adds the section's figures to the ledger. Does nothing if no text is known."""
    rows, known_rows = work.rows, work.has_context
    if not len(known_rows):
        return
    ways = splice.ways(rows.h, work.main["rebuilt"], work.readable, work.other, work.gold, work.seed)
    vectors_NxCxD = np.stack([vectors[known_rows] for vectors in ways.values()], axis=1)
    contexts, following_ids = ([ids[row] for row in known_rows] for ids in (rows.context_ids, rows.following_ids))
    # Parts named "splice" are of former versions, in which the true activation's divergence is above 0 by rounding.
    run = lambda count, compute: work.kept.run("spliced", count, splice.BATCH, compute, of=vectors_NxCxD)  # noqa: E731
    effects = splice.effects(work.pair.subject(), work.pair.layer, contexts, following_ids, vectors_NxCxD, run)
    names = list(ways)
    if apart := int((effects.kl[:, names.index("true"), 0] > _ROUNDING).sum()):
        warn(
            f"eval: in {apart} of {len(known_rows)} rows the stored activation is not the subject's for the text, so "
            "the section meaning is wrong for them; check the subject, and that the texts belong to the activations"
        )
    for kl_key, loss_key, averaged in (
        ("kl_next", "loss_recovered", lambda values: values[..., 0]),
        ("kl_following", "loss_recovered_following", _mean_of_following),
    ):
        kl_NxC, loss_NxC, true_loss_N = (averaged(values) for values in effects)
        kl = {name: work.full(kl_NxC[:, way], known_rows) for way, name in enumerate(names)}
        kl["permuted"] = work.permuted(kl["permuted"])
        work.ledger.put("meaning", kl_key, kl.pop("reconstruction"), first, kl)
        mean_loss_N = loss_NxC[:, names.index("mean")]
        losses = {
            name: work.full(np.stack([mean_loss_N, loss_NxC[:, way], true_loss_N], -1), known_rows)
            for way, name in enumerate(names)
            if name != "mean"
        }
        losses["permuted"] = work.permuted(losses["permuted"])
        work.ledger.put("meaning", loss_key, losses.pop("reconstruction"), recovered, losses)


def _mean_of_following(values: np.ndarray) -> np.ndarray:
    """Averages predictions [..., 1 + F] over the F tokens after the position: [...]. Tokens beyond the text are NaN."""
    known = np.isfinite(values[..., 1:])
    total = np.where(known, values[..., 1:], 0.0).sum(-1)
    return np.where(known.any(-1), total / np.maximum(known.sum(-1), 1), np.nan)
