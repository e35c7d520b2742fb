"""How much of held-out activations the words carry: FVE, its controls and its uncertainty."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from nlae_jax.data.english import FUNCTION_WORDS
from nlae_jax.roles import direction
from nlae_jax.train import objectives

# Vectors that `uninformed` makes.
UNINFORMED = ("zero", "mean_vector", "random_vector")


def direction_mse(reconstruction: np.ndarray, target: np.ndarray, readable: np.ndarray | None = None) -> np.ndarray:
    """[N] float64; `direction.direction_mse`, with 2 where `readable` is False."""
    mse = np.asarray(direction.direction_mse(jnp.asarray(reconstruction), jnp.asarray(target)), np.float64)
    return mse if readable is None else np.where(readable, mse, objectives.FAILED_MSE)


def variances(h_NxD: np.ndarray) -> np.ndarray:
    """[N] float64: each direction's squared distance from the mean direction (not renormalised), per element."""
    directions = np.asarray(direction.unit_direction(jnp.asarray(h_NxD)), np.float64)
    variance_N: np.ndarray = np.square(directions - directions.mean(0)).mean(-1)
    return variance_N


def fve(mse: np.ndarray, variance: np.ndarray) -> float:
    """1 - mean(mse) / mean(variance)."""
    return float(1.0 - mse.mean() / variance.mean())


def uninformed(h_NxD: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Vectors [N, d] float32 that say nothing about their row, by name: what an encoder must not do as well from.

    `zero`; `mean_vector`, the mean direction of `h`; `random_vector`, another isotropic direction in each row. The
    latter two are as long as `h`'s median row.
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
    """95 % percentile interval of `statistic(rows)` over resampled documents."""
    rng = np.random.default_rng(seed)
    rows_of = [np.flatnonzero(documents == name) for name in np.unique(documents)]
    values = [
        statistic(np.concatenate([rows_of[i] for i in rng.integers(len(rows_of), size=len(rows_of))]))
        for _ in range(samples)
    ]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


# What `summarise` has of every row, and the descriptions; any other mse is of parts of the explanations.
_OF_ALL = ("after", "before", "text", "shuffled", "gold")


def summarise(
    h: np.ndarray,
    documents: np.ndarray,
    mse: dict[str, np.ndarray],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """The numbers of `eval.json`.

    `mse` holds [N] arrays: `after` and `before` RL, `text` (through decode and re-encode), and, NaN on rows that have
    none, `shuffled` (another document's), `gold` (descriptions), those of explanations of `UNINFORMED` vectors,
    and any others: of parts of the explanations. Gaps are between the same rows. A number is None where no row
    has what it is of.
    """
    variance = variances(h)
    mean_norm = float(direction.baselines(jnp.asarray(h)).mean_norm)
    after, before = mse["after"], mse["before"]

    def gain(rows: np.ndarray) -> float:
        return fve(after[rows], variance[rows]) - fve(before[rows], variance[rows])

    def on_measured(name: str) -> tuple[float | None, float | None]:
        """FVE of `name` on the rows that have it, and of the explanations on the same rows."""
        if not (rows := np.isfinite(mse.get(name, np.full(len(after), np.nan)))).any():
            return None, None
        return fve(mse[name][rows], variance[rows]), fve(after[rows], variance[rows])

    gold, beside_gold = on_measured("gold")
    controls = {name: on_measured(name) for name in UNINFORMED}
    gaps = [beside - control for control, beside in controls.values() if control is not None and beside is not None]
    return {
        "fve": fve(after, variance),
        "fve_ci95": bootstrap(lambda rows: fve(after[rows], variance[rows]), documents, samples, seed),
        "fve_meannorm": float(1 - after.mean() / mean_norm),
        "fve_text": fve(mse["text"], variance),
        "fve_shuffled": on_measured("shuffled")[0],
        "fve_gold": gold,
        "fve_gold_gap": None if gold is None or beside_gold is None else gold - beside_gold,
        **{f"fve_{name}": control for name, (control, _) in controls.items()},
        **{f"fve_{name}": on_measured(name)[0] for name in mse if name not in (*_OF_ALL, *UNINFORMED)},
        "fve_vector_gap": min(gaps, default=None),
        "fve_before_rl": fve(before, variance),
        "fve_gain": gain(np.arange(len(after))),
        "fve_gain_ci95": bootstrap(gain, documents, samples, seed),
        "cos": float(1 - after.mean() / 2),
        "num_activations": len(after),
        "num_documents": len(np.unique(documents)),
    }


# --- what FVE alone does not show


def centred_cos(rebuilt: np.ndarray, h: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """cos(h - μ, ĥ - μ) of directions [N, d] x [N, d] -> [N] float64; `mean` [d] is μ, that of the directions.

    All activations share a direction, which makes the plain cosine high whatever was said.
    """
    a, b = (np.asarray(direction.unit_direction(v), np.float64) - mean for v in (rebuilt, h))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / np.maximum(norms, 1e-12))


def distractors(documents: np.ndarray, count: int, seed: int, same: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Candidates [N, 1 + count] for each row, itself first, and which of them there are [N, 1 + count] bool.

    The others are drawn without replacement from rows of other documents, or of the `same` one.
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
    """[N, B] float64: the direction mse between row n's reconstruction and the activation of each of its candidates."""
    a, b = (np.asarray(direction.unit_direction(v), np.float64) for v in (rebuilt, h))
    return np.asarray(2 - 2 * np.einsum("nd,nbd->nb", a, b[candidates]) / a.shape[-1])


def retrieval_bits(mse_NxB: np.ndarray, valid_NxB: np.ndarray, tau: float | np.ndarray) -> np.ndarray:
    """[N]: log2 B + log2 softmax(-mse / τ) of the first candidate, B the number of valid ones; NaN where it is 1.

    Its mean is a lower bound on the information between activation and explanation (InfoNCE, van den Oord et al. 2018),
    at most log2 B.
    """
    scores = np.where(valid_NxB, -mse_NxB / np.asarray(tau).reshape(-1, 1), -np.inf)
    top = scores.max(-1)
    log_sum = top + np.log(np.exp(scores - top[:, None]).sum(-1))
    count = valid_NxB.sum(-1)
    return np.where(count > 1, np.log2(count) + (scores[:, 0] - log_sum) / np.log(2), np.nan)


def top1(mse_NxB: np.ndarray, valid_NxB: np.ndarray) -> np.ndarray:
    """[N]: 1 where the first candidate is the nearest, a share of 1 where others are as near; NaN without others."""
    distance = np.where(valid_NxB, mse_NxB, np.inf)
    nearest = np.isclose(distance, distance.min(-1, keepdims=True), rtol=0, atol=1e-9)
    return np.where(valid_NxB.sum(-1) > 1, nearest[:, 0] / nearest.sum(-1), np.nan)


_TAUS = np.geomspace(0.003, 30, 25)


def cross_fitted_tau(mse_NxB: np.ndarray, valid_NxB: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """[N]: for each half of the documents the τ with the most bits on the other half: no row chooses its own.

    NaN where the other half has nothing to choose it by, as where there is one document.
    """
    _, index = np.unique(documents, return_inverse=True)
    half, tau = index % 2, np.full(len(documents), np.nan)
    for fold in (0, 1):
        if (half != fold).any() and (valid_NxB[half != fold].sum(-1) > 1).any():
            bits = [np.nanmean(retrieval_bits(mse_NxB[half != fold], valid_NxB[half != fold], t)) for t in _TAUS]
            tau[half == fold] = _TAUS[int(np.argmax(bits))]
    return tau


def principal_fve(
    h: np.ndarray, documents: np.ndarray, reference: np.ndarray, reference_documents: np.ndarray, most: int = 512
) -> np.ndarray:
    """[K + 1]: FVE of the first 0 … K principal directions, fitted on `reference` activations of other documents.

    Directions are fitted twice, each time without the documents of one half of the rows, and measured on that half.
    The reconstruction is not renormalised: that of no directions is the reference's mean.
    """
    directions = np.asarray(direction.unit_direction(h), np.float64)
    others = np.asarray(direction.unit_direction(reference), np.float64)
    names, index = np.unique(documents, return_inverse=True)
    left: np.ndarray | None = None
    for fold in (0, 1):
        rows = index % 2 == fold
        fitted = others[~np.isin(reference_documents, names[np.arange(len(names)) % 2 == fold])]
        if not rows.any() or len(fitted) < 2:
            continue
        mean = fitted.mean(0)
        _, _, axes = np.linalg.svd(fitted - mean, full_matrices=False)
        axes = axes[:most]
        centred = directions[rows] - mean
        explained = np.square(centred @ axes.T).sum(0)
        remaining = np.square(centred).sum() - np.concatenate([[0.0], np.cumsum(explained)])
        left = remaining if left is None else left[: len(remaining)] + remaining[: len(left)]
    if left is None:
        return np.zeros(1)
    return np.asarray(1 - left / np.square(directions - directions.mean(0)).sum())


def equivalent_rank(fve_of_rank: np.ndarray, value: float) -> int | None:
    """The smallest number of principal directions whose FVE is at least `value`; None where none is."""
    reached = np.flatnonzero(fve_of_rank >= value) if value > 0 else np.zeros(1, int)
    return int(reached[0]) if len(reached) else None


def best_of(mse_NxS: np.ndarray, count: int) -> np.ndarray:
    """[N]: the expected smallest mse among `count` of the S samples of each row, over all choices of them."""
    samples = mse_NxS.shape[1]
    choices = [math.comb(samples - 1 - rank, count - 1) for rank in range(samples)]
    chosen = np.sort(mse_NxS, axis=1) @ np.array(choices, np.float64)
    return np.asarray(chosen / math.comb(samples, count))


def agreement(rebuilt_NxSxD: np.ndarray, mean: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean centred cosine of two samples' reconstructions, each [N]: of one activation, and of `other[n]`'s samples.

    Rows of zeros are samples that could not be read: they agree with none, not even with each other.
    """
    count, readable = rebuilt_NxSxD.shape[1], np.asarray(rebuilt_NxSxD.any(-1))
    centred = np.asarray(direction.unit_direction(rebuilt_NxSxD), np.float64) - mean
    centred /= np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-12)
    total = np.where(readable[..., None], centred, 0.0).sum(1)
    own = (np.square(total).sum(-1) - readable.sum(-1)) / max(count * (count - 1), 1)
    return (own if count > 1 else np.full(len(own), np.nan)), (total * total[other]).sum(-1) / count**2


# --- which tokens

_CODE = re.compile(r"[{};]|\w\(|==|->|::|\w_\w|^\s*(?:def|class|import|from|return|if|for|#)\b")


TOKEN_CLASSES = ("content", "function", "punctuation", "inside", "code")


def token_class(context: str, token: str, following: str = "") -> str:
    """What kind of token a context ends with: code, punctuation, inside (a word's), function or content (a word).

    `context` ends with the token. `following` is the text after it. The line that the token stands in says whether it
    is code. A token is inside a word if the word has begun before it.
    """
    line = context[context.rfind("\n") + 1 :]
    core, before = token.strip(), context[: len(context) - len(token)]
    if len(_CODE.findall(line)) > 1:
        return "code"
    if not any(character.isalnum() for character in core):
        return "punctuation"
    if token[:1].isalnum() and before[-1:].isalnum():
        return "inside"
    rest = re.match(r"\w*", following)
    word = (core + (rest[0] if rest else "")).casefold()
    return "function" if word in FUNCTION_WORDS else "content"


def deciles(position: np.ndarray) -> np.ndarray:
    """[N] int from 0 to 9: which tenth of the positions each is in; equal positions are in one."""
    order = np.sort(position)
    return np.asarray(np.minimum(np.searchsorted(order, position, side="left") * 10 // max(len(position), 1), 9))
