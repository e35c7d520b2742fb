"""Steers the subject by an edited explanation: adds the edit's change of the reconstruction to the residual stream.

Random directions of the same length serve as controls, because any push changes a model's continuations.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nlae_jax.evaluate.estimate import estimate, share_of
from nlae_jax.evaluate.wording import words
from nlae_jax.explore.directions import unit
from nlae_jax.explore.explainer import Explainer, check_explanation
from nlae_jax.explore.frames import frame
from nlae_jax.explore.passage import Passage
from nlae_jax.explore.surprisal import mean_nll_after
from nlae_jax.lm.sampling import check_temperature
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted
from nlae_jax.runtime.progress import progress

_LEAST_CONTROLS = 3
_MOST_ALPHA = 1e6  # float32 could not hold the push of much larger ones
_LONGEST_PATTERN = 200
_ROWS = 16  # rows that the subject continues together


@dataclasses.dataclass(frozen=True)
class SteerSettings:
    """How steering is done and measured.

    `alphas` are the lengths of the added vector, in units of ‖h‖. `controls` is the number of random directions, at
    least 3. For each condition, `samples` continuations of up to `max_new_tokens` tokens are drawn. With `generated`,
    the vector is also added at the generated tokens. Raises UserError for invalid values.
    """

    alphas: tuple[float, ...] = (0.15, 0.25, 0.35)
    controls: int = 3
    samples: int = 8
    max_new_tokens: int = 32
    temperature: float = 1.0
    seed: int = 0
    generated: bool = False

    def __post_init__(self) -> None:
        if self.controls < _LEAST_CONTROLS:
            raise UserError(f"controls: {self.controls} should be at least {_LEAST_CONTROLS}")
        for name in ("samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} should be at least 1")
        check_temperature(self.temperature)
        if not self.alphas or not all(0 < abs(alpha) < _MOST_ALPHA for alpha in self.alphas):
            raise UserError(f"alphas: should be numbers other than 0 of less than {_MOST_ALPHA:,.0f}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The subject's continuations under one condition.

    `kind` is "none" (nothing added), "edit" or "random". `hits` is the number of continuations that match the pattern.
    `hit_rate_ci95` is Wilson's 95 % interval of `hit_rate`. `nll` is the mean −log p per token of the continuations
    under the unsteered subject, in nats; it is high for unusual text. `distinct_2` is the number of different pairs of
    words / the number of all pairs, within a continuation; it is low for text that repeats itself.
    """

    kind: str
    alpha: float
    continuations: tuple[str, ...]
    hits: int | None
    hit_rate: float | None
    hit_rate_ci95: tuple[float, float] | None
    nll: float | None
    distinct_2: float | None


@dataclasses.dataclass(frozen=True)
class SteerReport:
    """The continuations without and with the edit, and with random directions.

    `originals` are the explanations before the edit. `best_alpha` is the α at which the edit has most hits.
    `beats_controls` says whether the edit has more hits at this α than every random direction. Both are None without a
    pattern. With several α, choosing the best one favours the edit, because some of its hits are luck. A single α gives
    a fair comparison.
    """

    text: str
    at: tuple[int, ...]
    originals: tuple[str, ...]
    edited: str
    pattern: str
    layer: int
    before: Outcome
    edits: tuple[Outcome, ...]
    controls: tuple[Outcome, ...]
    beats_controls: bool | None
    best_alpha: float | None

    def row(self) -> dict[str, Any]:
        """Returns the report as JSON has it."""
        return dataclasses.asdict(self)

    def to_frame(self) -> Any:
        """Returns a pandas data frame with one row per condition. Raises UserError where pandas is missing."""
        return frame([dataclasses.asdict(outcome) for outcome in (self.before, *self.edits, *self.controls)])

    def _repr_html_(self) -> str:
        from nlae_jax.report.audit_page import steer_card

        return steer_card(self.row())


def wilson(hits: float, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of the share hits / count (Wilson 1927). It has a width above 0 for any count."""
    z = 1.959964
    share, spread = hits / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    # The share itself must stay inside the interval, in spite of rounding.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def compile_pattern(word: str | None, pattern: str | None) -> re.Pattern[str] | None:
    """Compiles a pattern for a whole word, ignoring case, or for a regular expression. Returns None if both are None.

    Raises UserError if the word is empty or the expression is invalid.
    """
    if word is not None:
        if not word.strip():
            raise UserError("--word: empty; should be a word to look for")
        return re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE)
    if pattern is None:
        return None
    if not pattern:
        raise UserError("--pattern: empty; it would match everything")
    if len(pattern) > _LONGEST_PATTERN:
        raise UserError(f"--pattern: {len(pattern)} characters; at most {_LONGEST_PATTERN}")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"--pattern {quoted(pattern)}: not a regular expression ({error})") from None


def distinct_2(texts: Sequence[str]) -> float | None:
    """Returns the mean over texts of different pairs of words / all pairs of words; None where no text has a pair."""
    shares = []
    for text in texts:
        text_words = words(text)
        pairs = list(itertools.pairwise(text_words))
        if pairs:
            shares.append(len(set(pairs)) / len(pairs))
    return float(np.mean(shares)) if shares else None


def check_explanations(edited: str, original: str | Sequence[str] | None) -> None:
    """Raises UserError where the edit or an original is too long for the decoder, or no text."""
    check_explanation(edited, "edit")
    for text in (original,) if isinstance(original, str) else original or ():
        check_explanation(text, "original")


def steer(
    nla: Explainer,
    passage: Passage,
    positions: Sequence[int],
    edited: str,
    original: str | Sequence[str] | None = None,
    pattern: re.Pattern[str] | None = None,
    settings: SteerSettings | None = None,
) -> SteerReport:
    """Adds α‖h‖·Δ/‖Δ‖ at `positions`, Δ = u(edited) − u(original), and lets the subject continue.

    u(x) is the decoder's reconstruction from x, scaled to length 1, because the decoder's loss ignores lengths. With
    several originals, the mean of their u is subtracted, so that Δ contains less of the words of a single original. The
    default `original` is the encoder's explanation of the mean activation of these positions. If an activation has an
    unusual norm (position 0), ‖h‖ is the median norm of the pair's data. A span works better than a single token,
    because the other tokens still carry the original meaning. Raises UserError if the edit does not change the
    reconstruction, and for an adapted pair.
    """
    nla.check_own_subject("steer")
    settings = settings or SteerSettings()
    (h_TxD,) = nla.read([passage])
    at = sorted(set(positions))
    check_explanations(edited, original)
    if original is None:
        ((original, _),) = nla.write(h_TxD[at].mean(0, keepdims=True))
    originals = (original,) if isinstance(original, str) else tuple(original)
    *before_NxD, after = (unit(row) for row in np.asarray(nla.rebuild([*originals, edited]), np.float64))
    delta = after - np.mean(before_NxD, axis=0)
    if not np.linalg.norm(delta) > 1e-6:
        raise UserError(
            "--edit: the decoder rebuilds the same activation as from the original explanation; change more words"
        )
    rng = np.random.default_rng(settings.seed)
    directions = [("edit", unit(delta))]
    directions += [("random", unit(rng.standard_normal(len(delta)))) for _ in range(settings.controls)]
    norms = np.linalg.norm(h_TxD, axis=-1)
    lengths = [
        float(norms[p]) if not nla.statistics.outside(float(norms[p]), p) else nla.statistics.norm_median for p in at
    ]

    def condition(kind: str, alpha: float, direction: np.ndarray) -> _Condition:
        push = np.zeros(h_TxD.shape, np.float32)
        push[at] = alpha * np.array(lengths)[:, None] * direction
        later = settings.generated * alpha * np.median(lengths) * direction
        return _Condition(kind, alpha, push, later.astype(np.float32))

    conditions = [condition("none", 0.0, directions[0][1])]
    conditions += [condition(kind, alpha, u) for kind, u in directions for alpha in settings.alphas]
    outcomes = _outcomes(nla, passage, conditions, pattern, settings)
    edits = [outcome for outcome in outcomes if outcome.kind == "edit"]
    controls = [outcome for outcome in outcomes if outcome.kind == "random"]
    best = max(edits, key=_hits) if pattern is not None else None
    control_hits = [_hits(control) for control in controls if best is not None and control.alpha == best.alpha]
    return SteerReport(
        text=passage.shown(),
        at=tuple(at),
        originals=originals,
        edited=edited,
        pattern=pattern.pattern if pattern is not None else "",
        layer=nla.layer,
        before=outcomes[0],
        edits=tuple(edits),
        controls=tuple(controls),
        beats_controls=None if best is None else _hits(best) > max(control_hits),
        best_alpha=None if best is None else best.alpha,
    )


class _Condition(NamedTuple):
    """The added vectors: `push` [T, d] at the passage's tokens, `later` [d] at each generated token."""

    kind: str
    alpha: float
    push: np.ndarray
    later: np.ndarray


def _hits(outcome: Outcome) -> int:
    """Returns the number of hits, 0 where there is no pattern."""
    return outcome.hits or 0


def summary(reports: Sequence[SteerReport]) -> dict[str, Any]:
    """Counts the prompts on which the edit beats the best random direction, and pools the hits of all prompts.

    The share of such prompts has Wilson's interval. `hit_rate` (of the edit) and `control_hit_rate` (of the best random
    direction) are means over prompts at each prompt's best α. `conditions` has, for each kind of outcome, the hits
    among all continuations at each prompt's best α, with a 95 % interval of their share over prompts, and the means of
    NLL and distinct-2. `alpha_chosen` says whether a prompt had several α. The edit's share of hits is then higher than
    it would be in new samples, because its own hits chose the α. The random directions have no such advantage.
    """
    judged = [report for report in reports if report.beats_controls is not None]
    rates: list[tuple[float, float, float]] = []
    for report in judged:
        edit, control = (
            max(_hits(item) / len(item.continuations) for item in outcomes if item.alpha == report.best_alpha)
            for outcomes in (report.edits, report.controls)
        )
        rates.append((_hits(report.before) / len(report.before.continuations), edit, control))
    count = len(judged)
    beaten = sum(edit > control for _, edit, control in rates)
    means = np.mean(rates, axis=0).tolist() if rates else [None] * 3
    return {
        "prompts": count,
        "alpha_chosen": any(len({edit.alpha for edit in report.edits}) > 1 for report in judged),
        "beaten": beaten,
        "lost": sum(edit < control for _, edit, control in rates),
        "equal": sum(edit == control for _, edit, control in rates),
        "beaten_share_ci95": wilson(beaten, count) if count else None,
        "hit_rate_before": means[0],
        "hit_rate": means[1],
        "control_hit_rate": means[2],
        "conditions": {kind: _pooled(judged, kind) for kind in ("none", "edit", "random")} if judged else {},
    }


def _pooled(reports: Sequence[SteerReport], kind: str) -> dict[str, Any]:
    """Pools the outcomes of one kind at each report's best α. "none" has no α."""
    of_prompts = [
        [
            outcome
            for outcome in (report.before, *report.edits, *report.controls)
            if outcome.kind == kind and (kind == "none" or outcome.alpha == report.best_alpha)
        ]
        for report in reports
    ]
    counts_Px2 = np.array(
        [
            (sum(map(_hits, outcomes)), sum(len(outcome.continuations) for outcome in outcomes))
            for outcomes in of_prompts
        ]
    )
    hits, count = counts_Px2.sum(0).tolist()
    outcomes = list(itertools.chain.from_iterable(of_prompts))
    nlls = [outcome.nll for outcome in outcomes if outcome.nll is not None]
    distinct = [outcome.distinct_2 for outcome in outcomes if outcome.distinct_2 is not None]
    return {
        "hits": hits,
        "continuations": count,
        "hit_rate_ci95": _interval_over_prompts(counts_Px2),
        "nll": float(np.mean(nlls)) if nlls else None,
        "distinct_2": float(np.mean(distinct)) if distinct else None,
    }


def _interval_over_prompts(counts_Px2: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of the share of hits over resampled prompts.

    `counts_Px2` are each prompt's hits and continuations. Whole prompts are resampled, because continuations of one
    prompt are alike. If all prompts have the same share, resampling shows no spread, and the interval is Wilson's with
    each prompt as one case. For a single prompt, the interval is Wilson's over its continuations and is valid for this
    prompt only.
    """
    prompts = len(counts_Px2)
    if prompts == 1:
        return wilson(*counts_Px2[0].tolist())
    shares = counts_Px2[:, 0] / counts_Px2[:, 1]
    if np.ptp(shares) == 0:
        return wilson(prompts * float(shares[0]), prompts)
    low, high = estimate(counts_Px2, np.arange(prompts), share_of)["ci95"]
    return low, high


def _outcomes(
    nla: Explainer,
    passage: Passage,
    conditions: Sequence[_Condition],
    pattern: re.Pattern[str] | None,
    settings: SteerSettings,
) -> list[Outcome]:
    """Lets the subject continue the passage under every condition, `settings.samples` times each."""
    subject, count = nla.subject, settings.samples
    written: list[list[int]] = []
    with progress(len(conditions), "steer", unit="condition") as bar:
        conditions_per_call = max(1, _ROWS // count)
        for start in range(0, len(conditions), conditions_per_call):
            sampled = [condition for condition in conditions[start : start + conditions_per_call] for _ in range(count)]
            # All calls have the same seed, so that only the added vectors differ between them.
            written += subject.steer(
                [passage.ids] * len(sampled),
                [condition.push for condition in sampled],
                nla.layer,
                settings.max_new_tokens,
                settings.temperature,
                settings.seed,
                [condition.later for condition in sampled],
            )
            bar.advance(len(sampled) // count)
    nll = mean_nll_after(subject, [(passage.ids, ids) for ids in written])
    outcomes = []
    for number, (kind, alpha, *_) in enumerate(conditions):
        rows = slice(number * count, (number + 1) * count)
        texts = [nla.tokenizer.decode(ids) for ids in written[rows]]
        hits = None if pattern is None else sum(pattern.search(text) is not None for text in texts)
        finite = nll[rows][np.isfinite(nll[rows])]
        outcomes.append(
            Outcome(
                kind,
                alpha,
                tuple(texts),
                hits,
                None if hits is None else hits / count,
                None if hits is None else wilson(hits, count),
                float(finite.mean()) if len(finite) else None,
                distinct_2(texts),
            )
        )
    return outcomes
