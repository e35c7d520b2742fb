"""Splices vectors into the subject in the activation's place, and measures how its predictions change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nlae_jax.evaluate.controls import isotropic_error, mean_vector, scaled
from nlae_jax.lm.tokens import pad
from nlae_jax.roles.language_model import LanguageModel

FOLLOWING = 16  # predictions are measured at the activation's position and at so many tokens after it
BATCH = 4
_WIDTH = 128  # contexts are padded to multiples of this length


def ways(
    h: np.ndarray, rebuilt: np.ndarray, readable: np.ndarray, other: np.ndarray, gold: np.ndarray | None, seed: int
) -> dict[str, np.ndarray]:
    """Returns, by name, the vectors [N, d] that take the place of the activations `h` [N, d].

    Each vector has the norm of its activation, except `zero`. `rebuilt` [N, d] are the reconstructions. `readable` [N]
    says which explanations could be read; the mean vector takes the place of the other reconstructions. `other` [N] is
    the row whose reconstruction `permuted` uses. `gold` [N, d] are reconstructions from descriptions, with NaN where a
    row has no description. The result has NaN in the same rows.
    """
    mean = mean_vector(h)
    reconstruction = np.where(readable[:, None], scaled(rebuilt, h), mean)
    return {
        "true": h.astype(np.float32),
        "reconstruction": reconstruction,
        "permuted": scaled(reconstruction[other], h),
        "mean": mean,
        "zero": np.zeros_like(mean),
        "isotropic": isotropic_error(h, reconstruction, seed),
        **({} if gold is None else {"gold": scaled(gold, h)}),
    }


class Effects(NamedTuple):
    """The effects of splicing C vectors into each of N rows, in nats, float64.

    `kl` [N, C, 1 + F] is the divergence of the prediction with the spliced vector from the unchanged prediction.
    `loss` [N, C, 1 + F] is the loss on the true next token with the spliced vector. `true_loss` [N, 1 + F] is the loss
    without a change. The last axis has the prediction at the activation's position, then those at the F tokens after
    it. Entries beyond the end of the text are NaN, as are those of vectors with NaN.
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
    """Splices each vector into the output of block `layer` at the last context token of its row.

    `context_ids` are the N contexts up to and including the activation's token. `following_ids` are the tokens after
    it, if they are known. `vectors_NxCxD` are the C vectors of each row.

    `run(N, compute)` should call `compute` for slices of the N rows and join the results. It may keep finished slices
    on disk. Rows are computed in the order of their lengths, so that little is padded.
    """
    order = np.argsort([len(ids) for ids in context_ids], kind="stable")

    def compute(part: slice) -> dict[str, np.ndarray]:
        rows = order[part]
        # A text that ends at the activation has no next token, but the model still predicts one.
        read = [[context_ids[row][-1], *following_ids[row][: FOLLOWING + 1]] for row in rows]
        width = max(_WIDTH, -(-max(len(context_ids[row]) - 1 for row in rows) // _WIDTH) * _WIDTH)
        context, length = pad([context_ids[row][:-1] for row in rows], width)
        ids, read_length = pad(read, FOLLOWING + 2)
        vectors = np.where(np.isfinite(vectors_NxCxD[rows]), vectors_NxCxD[rows], 0.0)
        context_mask, mask = np.arange(width) < length[:, None], np.arange(FOLLOWING + 2) < read_length[:, None]
        batch = context, context_mask, ids, mask, vectors
        context, context_mask, ids, mask, vectors = (_filled(values, BATCH) for values in batch)
        spliced = lm.splice(context, context_mask, ids, mask, vectors, layer)
        kl, loss = (np.asarray(x, np.float64)[: len(rows), :, : FOLLOWING + 1] for x in (spliced.kl, -spliced.log_p))
        columns = np.arange(FOLLOWING + 1)
        in_text, known = columns < read_length[:, None], columns < read_length[:, None] - 1
        blank = ~np.isfinite(vectors_NxCxD[rows]).all(-1)[..., None]
        return {
            "row": rows,
            "kl": np.where(in_text[:, None] & ~blank, kl, np.nan),
            "loss": np.where(known[:, None] & ~blank, loss[:, 1:], np.nan),
            "true_loss": np.where(known, loss[:, 0], np.nan),
        }

    measured = run(len(context_ids), compute)
    original_order = np.argsort(measured["row"])
    return Effects(*(measured[name][original_order] for name in Effects._fields))


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    """Fills the last batch up with copies of its first row, so that only one shape is compiled."""
    missing = max(0, size - len(rows))
    return np.concatenate([rows, np.repeat(rows[:1], missing, axis=0)])
