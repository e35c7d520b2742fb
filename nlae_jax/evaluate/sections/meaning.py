"""Section `meaning`: what reconstructions do to the model in the activation's place."""

from __future__ import annotations

import numpy as np

from nlae_jax.evaluate import splice
from nlae_jax.evaluate.estimate import first, recovered
from nlae_jax.evaluate.work import Work


def measure(work: Work) -> None:
    """Divergence and loss with every vector in the activation's place."""
    rows, some = work.rows, work.has_context
    if not len(some):
        return
    ways = splice.ways(rows.h, work.main["rebuilt"], work.readable, work.other, work.gold, work.seed)
    given = np.stack([of[some] for of in ways.values()], axis=1)
    contexts, after = ([of[row] for row in some] for of in (rows.context_ids, rows.following_ids))
    run = lambda count, compute: work.kept.run("splice", count, splice.BATCH, compute, of=given)  # noqa: E731
    found = splice.effects(work.pair.subject(), work.pair.layer, contexts, after, given, run)
    names = list(ways)

    def following(values: np.ndarray) -> np.ndarray:
        """The mean over the tokens after the position that the text has."""
        known = np.isfinite(values[..., 1:])
        total = np.where(known, values[..., 1:], 0.0).sum(-1)
        return np.where(known.any(-1), total / np.maximum(known.sum(-1), 1), np.nan)

    for suffix, of in (("next", lambda values: values[..., 0]), ("following", following)):
        kl, loss, true = of(found.kl), of(found.loss), of(found.true_loss)
        by_way = {name: work.full(kl[:, way], some) for way, name in enumerate(names)}
        by_way["permuted"] = work.permuted(by_way["permuted"])
        work.ledger.put("meaning", f"kl_{suffix}", by_way.pop("reconstruction"), first, by_way)
        mean = loss[:, names.index("mean")]
        by_way = {
            name: work.full(np.stack([mean, loss[:, way], true], -1), some)
            for way, name in enumerate(names)
            if name != "mean"
        }
        by_way["permuted"] = work.permuted(by_way["permuted"])
        key = "loss_recovered" if suffix == "next" else "loss_recovered_following"
        work.ledger.put("meaning", key, by_way.pop("reconstruction"), recovered, by_way)
