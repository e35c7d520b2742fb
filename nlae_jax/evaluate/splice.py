"""What reconstructions do to the model in the activation's place: the vectors spliced in, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nlae_jax.evaluate.controls import isotropic_error, mean_vector, scaled
from nlae_jax.lm.tokens import pad
from nlae_jax.roles.language_model import LanguageModel

FOLLOWING = 16  # tokens after the position that are looked at
BATCH = 4
_WIDTH = 128  # contexts are padded to multiples of it


def ways(
    h: np.ndarray, rebuilt: np.ndarray, readable: np.ndarray, other: np.ndarray, gold: np.ndarray | None, seed: int
) -> dict[str, np.ndarray]:
    """By name the vectors [N, d] that are put in the activations' place, each as long as its activation.

    An explanation that cannot be read says nothing: the mean stands for it. `gold` [N, d] has NaN where a row has no
    description; so has the result.
    """
    mean = mean_vector(h)
    said = np.where(readable[:, None], scaled(rebuilt, h), mean)
    return {
        "true": h.astype(np.float32),
        "reconstruction": said,
        "permuted": scaled(said[other], h),
        "mean": mean,
        "zero": np.zeros_like(mean),
        "isotropic": isotropic_error(h, said, seed),
        **({} if gold is None else {"gold": scaled(gold, h)}),
    }


class Effects(NamedTuple):
    """Per row and way: `kl` [N, C, 1 + F] nats, `loss` [N, C, 1 + F] nats, `true_loss` [N, 1 + F]; NaN past the text.

    Columns are the predictions at the position itself, then at the tokens that follow it.
    """

    kl: np.ndarray
    loss: np.ndarray
    true_loss: np.ndarray


def effects(
    lm: LanguageModel,
    layer: int,
    context_ids: Sequence[Sequence[int]],
    following_ids: Sequence[Sequence[int]],
    vectors_NxCxD: np.ndarray,
    run: Callable[[int, Callable[[slice], dict[str, np.ndarray]]], dict[str, np.ndarray]],
) -> Effects:
    """Splices every vector in the place of its row's last context token.

    `run(N, compute)` calls `compute` for slices of the rows and joins what it gives; it may keep what is done. Rows
    are taken in the order of their lengths, so that little is padded.
    """
    order = np.argsort([len(ids) for ids in context_ids], kind="stable")

    def compute(part: slice) -> dict[str, np.ndarray]:
        rows = order[part]
        # A text that ends here has no next token, but the distribution of one.
        read = [[context_ids[row][-1], *following_ids[row][: FOLLOWING + 1]] for row in rows]
        width = max(_WIDTH, -(-max(len(context_ids[row]) - 1 for row in rows) // _WIDTH) * _WIDTH)
        context, length = pad([context_ids[row][:-1] for row in rows], width)
        ids, read_length = pad(read, FOLLOWING + 2)
        given = np.where(np.isfinite(vectors_NxCxD[rows]), vectors_NxCxD[rows], 0.0)
        context_mask, mask = np.arange(width) < length[:, None], np.arange(FOLLOWING + 2) < read_length[:, None]
        context, context_mask, ids, mask, given = (_filled(x, BATCH) for x in (context, context_mask, ids, mask, given))
        spliced = lm.splice(context, context_mask, ids, mask, given, layer)
        kl, loss = (np.asarray(x, np.float64)[: len(rows), :, : FOLLOWING + 1] for x in (spliced.kl, -spliced.log_p))
        columns = np.arange(FOLLOWING + 1)
        here, known = columns < read_length[:, None], columns < read_length[:, None] - 1
        blank = ~np.isfinite(vectors_NxCxD[rows]).all(-1)[..., None]
        return {
            "row": rows,
            "kl": np.where(here[:, None] & ~blank, kl, np.nan),
            "loss": np.where(known[:, None] & ~blank, loss[:, 1:], np.nan),
            "true_loss": np.where(known, loss[:, 0], np.nan),
        }

    found = run(len(context_ids), compute)
    back = np.argsort(found["row"])
    return Effects(*(found[name][back] for name in Effects._fields))


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    """A last batch filled up with its first row: one shape is compiled once."""
    missing = max(0, size - len(rows))
    return np.concatenate([rows, np.repeat(rows[:1], missing, axis=0)])
