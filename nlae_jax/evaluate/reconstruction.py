"""Measures how much of held-out activations the explanations carry: FVE, its controls and its uncertainty."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from nlae_jax.data.english import FUNCTION_WORDS
from nlae_jax.evaluate.wording import has_unspaced
from nlae_jax.roles import direction
from nlae_jax.train import objectives

# The names of the vectors that `uninformed` makes.
UNINFORMED = ("zero", "mean_vector", "random_vector")


def direction_mse(reconstruction: np.ndarray, target: np.ndarray, readable: np.ndarray | None = None) -> np.ndarray:
    """Returns the direction mse of `reconstruction` [N, d] and `target` [N, d]: [N] float64.

    See `roles.direction.direction_mse`. Where `readable` [N] is False, the mse is 2, as of orthogonal vectors.
    """
    mse = np.asarray(direction.direction_mse(_scaled(reconstruction), _scaled(target)), np.float64)
    return mse if readable is None else np.where(readable, mse, objectives.FAILED_MSE)


def _scaled(rows_NxD: np.ndarray) -> np.ndarray:
    """Scales rows by powers of two, which changes no digit, to about 1000.

    Their directions then do not depend on their lengths: the small number that `unit_direction` adds to a mean square
    would count beside that of a very short row.
    """
    rows_NxD = np.asarray(rows_NxD, np.float32)
    exponent_N = np.frexp(np.abs(rows_NxD).max(-1, keepdims=True, initial=0))[1]
    scaled_NxD: np.ndarray = np.ldexp(rows_NxD, 10 - exponent_N)
    return scaled_NxD


def variances(h_NxD: np.ndarray) -> np.ndarray:
    """Returns, for each row of `h` [N, d], ‖u(h) − mean(u(h))‖² / d: [N] float64.

    u(h) is the activation scaled to norm √d. The mean is not renormalised.
    """
    directions = np.asarray(direction.unit_direction(_scaled(h_NxD)), np.float64)
    variance_N: np.ndarray = np.square(directions - directions.mean(0)).mean(-1)
    return variance_N


def fve(mse: np.ndarray, variance: np.ndarray) -> float:
    """Returns the FVE of `mse` [N] and `variance` [N]: 1 − mean(mse) / mean(variance) (Fraser-Taliente et al. 2026)."""
    return float(1.0 - mse.mean() / variance.mean())


def uninformed(h_NxD: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Returns vectors [N, d] float32 that carry nothing about the activations `h` [N, d], by name.

    Explanations of activations should do better than explanations of these vectors. `zero` is zero. `mean_vector` is
    the mean direction of `h`. `random_vector` is a random direction, another one in each row. The last two have the
    median norm of `h`.
    """
    directions = np.stack(
        [
            np.broadcast_to(np.asarray(direction.unit_direction(jnp.asarray(h_NxD))).mean(0), h_NxD.shape),
            np.random.default_rng(seed).standard_normal(h_NxD.shape),
        ]
    )
    lengths = np.maximum(np.linalg.norm(directions, axis=-1, keepdims=True), 1e-30)
    mean, random = (directions / lengths * np.median(np.linalg.norm(h_NxD, axis=-1))).astype(np.float32)
    return {"zero": np.zeros_like(mean), "mean_vector": mean, "random_vector": random}


def bootstrap(
    statistic: Callable[[np.ndarray], float], documents: np.ndarray, samples: int, seed: int
) -> tuple[float, float]:
    """Returns the 95 % percentile interval of `statistic(rows)` over `samples` resamplings of whole documents.

    `documents` [N] names each row's document. `statistic` gets an array of row numbers, in which rows may be repeated.
    """
    rng = np.random.default_rng(seed)
    rows_of = [np.flatnonzero(documents == name) for name in np.unique(documents)]
    values = [
        statistic(np.concatenate([rows_of[i] for i in rng.integers(len(rows_of), size=len(rows_of))]))
        for _ in range(samples)
    ]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


# `summarise` gives these errors names of their own. Every other error is that of a part of the explanations.
_NAMED = ("after", "before", "text", "shuffled", "gold")


def summarise(
    h: np.ndarray,
    documents: np.ndarray,
    mse: dict[str, np.ndarray],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Returns the numbers of the run's evaluation, by their names in `eval.json`.

    `h` [N, d] are the activations. `documents` [N] names their documents. `samples` is the number of resamplings for
    intervals. `mse` maps names to errors [N], NaN where a row has none:

    - `after` and `before`: the explanations after and before RL;
    - `text`: the explanations after RL, decoded to text and tokenised again;
    - `shuffled`: the explanations of other documents;
    - `gold`: the descriptions;
    - the names of `UNINFORMED`: the explanations of these vectors;
    - any other name: a part of the explanations.

    `fve_gold_gap` and `fve_vector_gap` compare values of the same rows. A number is None if no row has it.
    """
    variance = variances(h)
    mean_norm = float(direction.baselines(jnp.asarray(h)).mean_norm)
    after, before = mse["after"], mse["before"]

    def gain(rows: np.ndarray) -> float:
        return fve(after[rows], variance[rows]) - fve(before[rows], variance[rows])

    def on_measured(name: str) -> tuple[float | None, float | None]:
        """Returns the FVE of `name` on the rows that have it, and the FVE of the explanations on the same rows."""
        if not (rows := np.isfinite(mse.get(name, np.full(len(after), np.nan)))).any():
            return None, None
        return fve(mse[name][rows], variance[rows]), fve(after[rows], variance[rows])

    gold, explained_beside_gold = on_measured("gold")
    controls = {name: on_measured(name) for name in UNINFORMED}
    gaps = [
        explained - control for control, explained in controls.values() if control is not None and explained is not None
    ]
    return {
        "fve": fve(after, variance),
        "fve_ci95": bootstrap(lambda rows: fve(after[rows], variance[rows]), documents, samples, seed),
        "fve_meannorm": float(1 - after.mean() / mean_norm),
        "fve_text": fve(mse["text"], variance),
        "fve_shuffled": on_measured("shuffled")[0],
        "fve_gold": gold,
        "fve_gold_gap": None if gold is None or explained_beside_gold is None else gold - explained_beside_gold,
        **{f"fve_{name}": control for name, (control, _) in controls.items()},
        **{f"fve_{name}": on_measured(name)[0] for name in mse if name not in (*_NAMED, *UNINFORMED)},
        "fve_vector_gap": min(gaps, default=None),
        "fve_before_rl": fve(before, variance),
        "fve_gain": gain(np.arange(len(after))),
        "fve_gain_ci95": bootstrap(gain, documents, samples, seed),
        "cos": float(1 - after.mean() / 2),
        "num_activations": len(after),
        "num_documents": len(np.unique(documents)),
    }


# --- figures that FVE does not replace


def centred_cos(rebuilt: np.ndarray, h: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Returns cos(u(h) − μ, u(ĥ) − μ) of reconstructions ĥ [N, d] and activations h [N, d]: [N] float64.

    u scales a vector to norm √d. `mean` [d] is μ, the mean of the activations' directions u(h). All activations share
    this direction, so the plain cosine is high even for a bad reconstruction.
    """
    rebuilt_NxD, h_NxD = (np.asarray(direction.unit_direction(v), np.float64) - mean for v in (rebuilt, h))
    norms = np.linalg.norm(rebuilt_NxD, axis=-1) * np.linalg.norm(h_NxD, axis=-1)
    return np.asarray((rebuilt_NxD * h_NxD).sum(-1) / np.maximum(norms, 1e-12))


def distractors(documents: np.ndarray, count: int, seed: int, same: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` distractors for each row, and returns them after the row itself.

    Returns the row numbers of the candidates [N, 1 + count] int, and a mask [N, 1 + count] bool, which is False where
    there are too few rows. `documents` [N] names each row's document. Distractors are rows of other documents, or with
    `same` other rows of the same document. A row never has the same distractor twice.
    """
    rng = np.random.default_rng(seed)
    rows = np.arange(len(documents))
    candidates = np.repeat(rows[:, None], 1 + count, axis=1)
    valid = np.zeros(candidates.shape, bool)
    valid[:, 0] = True
    for row in rows:
        pool = np.flatnonzero((documents == documents[row]) == same)
        pool = pool[pool != row]
        drawn = rng.permutation(pool)[:count]
        candidates[row, 1 : 1 + len(drawn)], valid[row, 1 : 1 + len(drawn)] = drawn, True
    return candidates, valid


def mse_to(rebuilt: np.ndarray, h: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Returns the direction mse of each reconstruction and the activations of its candidates: [N, B] float64.

    `rebuilt` and `h` are [N, d]. `candidates` [N, B] are row numbers of `h`.
    """
    rebuilt_NxD, h_NxD = (np.asarray(direction.unit_direction(v), np.float64) for v in (rebuilt, h))
    return np.asarray(2 - 2 * np.einsum("nd,nbd->nb", rebuilt_NxD, h_NxD[candidates]) / h_NxD.shape[-1])


def retrieval_bits(mse_NxB: np.ndarray, valid_NxB: np.ndarray, tau: float | np.ndarray) -> np.ndarray:
    """Returns log2 B + log2 softmax(−mse / τ) of the first candidate: [N], in bits.

    The first candidate is the row's own activation. B is the number of the row's valid candidates; rows with B = 1 are
    NaN. `tau` is one number, or [N]. The mean over rows is a lower bound on the mutual information between activation
    and explanation, and at most log2 B (InfoNCE, van den Oord et al. 2018).
    """
    scores = np.where(valid_NxB, -mse_NxB / np.asarray(tau).reshape(-1, 1), -np.inf)
    top = scores.max(-1)
    log_sum = top + np.log(np.exp(scores - top[:, None]).sum(-1))
    count = valid_NxB.sum(-1)
    return np.where(count > 1, np.log2(count) + (scores[:, 0] - log_sum) / np.log(2), np.nan)


def top1(mse_NxB: np.ndarray, valid_NxB: np.ndarray) -> np.ndarray:
    """Returns [N]: 1 where the first candidate is the nearest, else 0. If k candidates are equally near, it is 1/k.

    Rows without a second valid candidate are NaN.
    """
    distance = np.where(valid_NxB, mse_NxB, np.inf)
    nearest = np.isclose(distance, distance.min(-1, keepdims=True), rtol=0, atol=1e-9)
    return np.where(valid_NxB.sum(-1) > 1, nearest[:, 0] / nearest.sum(-1), np.nan)


_TAUS = np.geomspace(0.003, 30, 25)


def cross_fitted_tau(mse_NxB: np.ndarray, valid_NxB: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Chooses τ for each half of the documents by the most retrieval bits on the other half: [N].

    A row's own bits therefore do not influence its τ. τ is NaN if no row of the other half has a distractor, for
    example if there is only one document.
    """
    _, index = np.unique(documents, return_inverse=True)
    half, tau = index % 2, np.full(len(documents), np.nan)
    for fold in (0, 1):
        fitting = half != fold
        if fitting.any() and (valid_NxB[fitting].sum(-1) > 1).any():
            bits = [np.nanmean(retrieval_bits(mse_NxB[fitting], valid_NxB[fitting], candidate)) for candidate in _TAUS]
            tau[half == fold] = _TAUS[int(np.argmax(bits))]
    return tau


def principal_fve(
    h: np.ndarray, documents: np.ndarray, reference: np.ndarray, reference_documents: np.ndarray, most: int = 512
) -> np.ndarray:
    """Returns the FVE of reconstructions from the first 0, 1, … K principal directions: [K + 1] float64.

    `h` [N, d] are measured. The directions are fitted on `reference` [M, d]. `documents` [N] and `reference_documents`
    [M] name the documents. The documents of `h` are divided into two halves. The directions that are measured on one
    half are fitted without its documents. K is at most `most`. If nothing can be fitted, the result is [0].

    The reconstructions are not renormalised. The one from no direction is the mean of the fitted activations.
    """
    h_NxD, reference_MxD = (np.asarray(direction.unit_direction(v), np.float64) for v in (h, reference))
    names, index = np.unique(documents, return_inverse=True)
    errors: np.ndarray | None = None
    for fold in (0, 1):
        measured = h_NxD[index % 2 == fold]
        fitted = reference_MxD[~np.isin(reference_documents, names[fold::2])]
        if not len(measured) or len(fitted) < 2:
            continue
        fold_errors = _principal_errors(measured, fitted, most)
        errors = fold_errors if errors is None else errors[: len(fold_errors)] + fold_errors[: len(errors)]
    if errors is None:
        return np.zeros(1)
    return np.asarray(1 - errors / np.square(h_NxD - h_NxD.mean(0)).sum())


def _principal_errors(measured: np.ndarray, fitted: np.ndarray, most: int) -> np.ndarray:
    """Returns the summed squared errors of `measured` [N, d] with 0, 1, … K principal directions of `fitted` [M, d]."""
    mean = fitted.mean(0)
    _, _, axes_KxD = np.linalg.svd(fitted - mean, full_matrices=False)
    centred = measured - mean
    explained_K = np.square(centred @ axes_KxD[:most].T).sum(0)
    return np.asarray(np.square(centred).sum() - np.concatenate([[0.0], np.cumsum(explained_K)]))


def equivalent_rank(fve_of_rank: np.ndarray, value: float) -> int | None:
    """Returns the smallest number of principal directions whose FVE is at least `value`, or None if there is none.

    `fve_of_rank` is the result of `principal_fve`. A value of 0 or less needs no direction.
    """
    reached = np.flatnonzero(fve_of_rank >= value) if value > 0 else np.zeros(1, int)
    return int(reached[0]) if len(reached) else None


def best_of(mse_NxS: np.ndarray, count: int) -> np.ndarray:
    """Returns the smallest mse among `count` of each row's S samples, averaged over all choices of samples: [N].

    `mse_NxS` are the errors of the samples. The formula generalises the estimator of pass@k by Chen et al. 2021.
    """
    samples = mse_NxS.shape[1]
    # In so many choices of `count` samples, the sample of this rank is the best.
    choices = [math.comb(samples - 1 - rank, count - 1) for rank in range(samples)]
    total = np.sort(mse_NxS, axis=1) @ np.array(choices, np.float64)
    return np.asarray(total / math.comb(samples, count))


def agreement(rebuilt_NxSxD: np.ndarray, mean: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean centred cosine of two samples' reconstructions, for samples of the same and of two activations.

    `rebuilt_NxSxD` are the reconstructions from S samples of each activation. Samples that could not be read are zero:
    their cosine with any sample counts as 0, and so does that of the mean direction. `mean` [d] is the mean direction
    of the activations. `other` [N] gives each row a row of another document.

    The first array [N] averages over pairs of different samples of one activation; it is NaN if S is 1. The second
    array [N] averages over pairs of a sample of row n and a sample of row `other[n]`.
    """
    count, readable = rebuilt_NxSxD.shape[1], np.asarray(rebuilt_NxSxD.any(-1))
    centred = np.asarray(direction.unit_direction(rebuilt_NxSxD), np.float64) - mean
    centred /= np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-12)
    # The cosines of all pairs sum to the dot product of the summed unit vectors.
    centred = np.where(readable[..., None], centred, 0.0)
    total_NxD = centred.sum(1)
    # Pairs of a sample with itself are left out.
    same = (np.square(total_NxD).sum(-1) - np.square(centred).sum((1, 2))) / max(count * (count - 1), 1)
    return (same if count > 1 else np.full(len(same), np.nan)), (total_NxD * total_NxD[other]).sum(-1) / count**2


# --- kinds of tokens

_CODE = re.compile(r"[{};]|\w\(|==|->|::|\w_\w|^\s*(?:def|class|import|from|return|if|for|#)\b")


_PIECE_OF_CHARACTER = "\ufffd"  # a tokenizer decodes incomplete bytes to it

TOKEN_CLASSES = ("content", "function", "punctuation", "inside", "code")


def token_class(context: str, token: str, following: str = "") -> str:
    """Returns the class of the token that a context ends with, one of `TOKEN_CLASSES`.

    `context` ends with `token`. `following` is the text after it. The class is `code` if the context's last line looks
    like code, `punctuation` if the token has no letter or digit, and `inside` if its word has begun before it, or if it
    holds only some of a character's bytes. The other tokens are `function` or `content`, by the word that begins with
    the token.
    """
    if _PIECE_OF_CHARACTER in token:
        return "inside"
    line = context[context.rfind("\n") + 1 :]
    core, before = token.strip(), context[: len(context) - len(token)]
    if len(_CODE.findall(line)) > 1:
        return "code"
    if not any(character.isalnum() for character in core):
        return "punctuation"
    # Chinese and Japanese text has no spaces between words, so a letter before such a token tells nothing.
    if token[:1].isalnum() and before[-1:].isalnum() and not has_unspaced(before[-1:] + token[:1]):
        return "inside"
    rest = re.match(r"\w*", following)
    word = (core + (rest[0] if rest else "")).casefold()
    return "function" if word in FUNCTION_WORDS else "content"


def deciles(position: np.ndarray) -> np.ndarray:
    """Returns which tenth of the positions each position is in: [N] int from 0 to 9. Equal positions share a tenth."""
    order = np.sort(position)
    return np.asarray(np.minimum(np.searchsorted(order, position, side="left") * 10 // max(len(position), 1), 9))
