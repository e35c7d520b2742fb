"""What a direction of the residual stream says, held against directions that should say nothing.

A direction by itself lies far from any activation. So the encoder is given μ + r·‖h‖·u for several r: the mean
activation, pushed along the unit direction u. What it then says of the push is *heard* as far as the decoder rebuilds
the push from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nlae_jax.explore.corpus import Corpus
from nlae_jax.explore.explainer import Explainer
from nlae_jax.explore.frames import frame
from nlae_jax.explore.surprisal import Surprisal

STEPS = (0.25, 0.5, 1.0, 2.0)  # r of the sweep

# Sentences that have nothing to do with any context: what an explanation's surprisal is held against.
_UNRELATED = (
    "The text goes on in the way that it began.",
    "Somebody wrote this down a while ago, and nobody has changed it since.",
)
_BINS = 24
_LEAST_CHANGE = 1e-5  # of a unit vector: float32 rounds to less


@dataclasses.dataclass(frozen=True)
class Settings:
    """How thoroughly a direction is looked at.

    `steps`: r of the sweep. `controls`: random directions, and as many shuffles of the direction's own components.
    `contexts`: top activating ones; as many that do not activate are drawn for the surprisal.
    """

    steps: tuple[float, ...] = STEPS
    controls: int = 3
    contexts: int = 8
    seed: int = 0
    max_new_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Point:
    """One r of a sweep: what the encoder says there.

    `heard`: the cosine of the push (what r·u changes in the direction of the activation) and of what the explanation
    changes in the direction of the reconstruction, both against r = 0. 0 where the explanation is that of the mean.
    Changes are taken across the direction that they start from: any change at all leads away from it.
    """

    r: float
    explanation: str
    heard: float
    cut: bool


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All points of one direction. `kind`: "direction", "random" or "shuffled".

    `agreement`: the cosine of what its explanation, and of what those of the top contexts, change in the reconstruction
    against the mean's explanation. `auc`: how well its explanation tells activating from other contexts by surprisal.
    """

    kind: str
    points: tuple[Point, ...]
    agreement: float
    auc: float

    @property
    def best(self) -> Point:
        """Where it is heard most."""
        return max(self.points, key=lambda point: point.heard)


@dataclasses.dataclass(frozen=True)
class Context:
    """A token of the corpus at which the direction is active, and what the pair says of the activation there."""

    before: str
    token: str
    after: str
    value: float
    explanation: str


@dataclasses.dataclass(frozen=True)
class DirectionReport:
    """What a direction says, and whether to believe it.

    `explained` is True only where the direction beats every control, and chance, in all three measures: `heard`,
    `agreement` and `auc`. Chance is 3/√d for a cosine, which two random directions seldom reach, and a half for the
    AUC. `beats` says in which of them it does. `heard_at` are the r at which it is
    heard better than every control at that r.
    """

    name: str
    layer: int
    explanation: str
    explained: bool
    beats: dict[str, bool]
    heard_at: tuple[float, ...]
    sweep: Sweep
    controls: tuple[Sweep, ...]
    mean_explanation: str
    contexts: tuple[Context, ...]
    histogram: dict[str, list[float]]
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    corpus: str
    notes: tuple[str, ...] = ()

    def row(self) -> dict[str, Any]:
        """As JSON has it."""
        row = dataclasses.asdict(self)
        row["r"] = self.sweep.best.r
        return row

    def to_frame(self) -> Any:
        """Every point of every sweep as a pandas data frame."""
        rows = [
            {"kind": sweep.kind, "number": number, **dataclasses.asdict(point)}
            for number, sweep in enumerate((self.sweep, *self.controls))
            for point in sweep.points
        ]
        return frame(rows)

    def _repr_html_(self) -> str:
        from nlae_jax.report.direction_page import direction_card

        return direction_card(self.row())


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scaled to length 1 along the last axis; zero stays zero."""
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Along the last axis; 0 where either is zero."""
    return (unit(a) * unit(b)).sum(-1)


def change(directions: np.ndarray, origin_D: np.ndarray) -> np.ndarray:
    """Directions minus the one they start from, without their part along it: [..., d] float64, zero where equal."""
    origin_D = unit(origin_D)
    whole = unit(directions)
    across = whole - (whole @ origin_D)[..., None] * origin_D
    # What rounding leaves of equal directions would be a direction like any other.
    return np.where(np.linalg.norm(across, axis=-1, keepdims=True) > _LEAST_CHANGE, across, 0.0)


def heard_of(rebuilt: np.ndarray, pushed: np.ndarray) -> np.ndarray:
    """`Point.heard` of all rows but the first, which is the mean's: [N, d] and [N, d] -> [N - 1] float64."""
    return cosine(change(rebuilt[1:], rebuilt[0]), change(pushed[1:], pushed[0]))


def control_directions(u_D: np.ndarray, count: int, seed: int) -> list[tuple[str, np.ndarray]]:
    """Directions of the same length that nobody looked for: `count` isotropic ones, and `count` shuffles of u's own."""
    rng = np.random.default_rng(seed)
    random = [("random", unit(rng.standard_normal(len(u_D)))) for _ in range(count)]
    return [*random, *(("shuffled", unit(rng.permutation(u_D))) for _ in range(count))]


def token_effects(nla: Explainer, u_D: np.ndarray, count: int = 10) -> tuple[Any, Any]:
    """The tokens that u promotes and suppresses most through the unembedding, with its effect in standard deviations.

    u passes the final norm's weights, as a small part of the residual stream would.
    """
    subject = nla.subject
    head = np.asarray(subject.params.get("head", subject.params["embed"]), np.float32)
    scale = np.asarray(subject.params["final_norm"], np.float32) + subject.arch.norm_offset
    effect = head @ (unit(u_D).astype(np.float32) * scale)
    effect = (effect - effect.mean()) / max(float(effect.std()), 1e-30)
    known = min(len(effect), len(subject.tokenizer))
    order = np.argsort(-effect[:known])
    shown = lambda rows: tuple((subject.tokenizer.decode([int(row)]), float(effect[row])) for row in rows)  # noqa: E731
    return shown(order[:count]), shown(order[::-1][:count])


def explain_direction(
    nla: Explainer,
    name: str,
    u_D: np.ndarray,
    corpus: Corpus,
    settings: Settings | None = None,
    values_N: np.ndarray | None = None,
    notes: Sequence[str] = (),
) -> DirectionReport:
    """A direction of any length, as the pair's layer has it.

    `values_N`: its activations on the corpus; if not given, its projections (h − μ)·u.
    """
    nla.check_own_subject("direction")
    settings = settings or Settings()
    u_D = unit(u_D)
    if values_N is None:
        values_N = (corpus.h_NxD - nla.statistics.mean) @ u_D
    order = np.argsort(-values_N, kind="stable")
    top = corpus.apart(order, settings.contexts)
    directions = [("direction", u_D), *control_directions(u_D, settings.controls, settings.seed)]
    pushed = pushed_along(nla, [direction for _, direction in directions], settings.steps)
    limit = settings.max_new_tokens
    written = nla.write(np.concatenate([pushed, corpus.h_NxD[top]]), 0.0, limit)
    texts, count = [text for text, _ in written], len(pushed)
    rebuilt = np.asarray(nla.rebuild(texts))
    said = change(rebuilt, rebuilt[0])
    contexts_change = said[count:].mean(0)
    heard = heard_of(rebuilt[:count], pushed)
    surprisal = _surprisal(nla, corpus, values_N, top, settings)
    sweeps = []
    for number, (kind, _) in enumerate(directions):
        rows = [1 + number * len(settings.steps) + step for step in range(len(settings.steps))]
        points = tuple(
            Point(r, texts[row], float(heard[row - 1]), not written[row].closed)
            for r, row in zip(settings.steps, rows, strict=True)
        )
        best = rows[int(np.argmax([point.heard for point in points]))]
        agreement = float(cosine(said[best], contexts_change))
        sweeps.append(Sweep(kind, points, agreement, surprisal.auc([texts[best]])[0]))
    promoted, suppressed = token_effects(nla, u_D)
    return _report(
        nla,
        name,
        sweeps,
        mean_explanation=texts[0],
        contexts=tuple(
            Context(*corpus.around(row), float(values_N[row]), text)
            for row, text in zip(top, texts[count:], strict=True)
        ),
        histogram=_histogram(values_N),
        promoted=promoted,
        suppressed=suppressed,
        corpus=f"{len(values_N):,} tokens of {corpus.source}",
        notes=tuple(notes),
    )


def _report(nla: Explainer, name: str, sweeps: Sequence[Sweep], **found: Any) -> DirectionReport:
    """The verdict: what is better than every control."""
    own, controls = sweeps[0], sweeps[1:]
    chance = 3 / math.sqrt(nla.d_model)
    beats = {
        "heard": own.best.heard > max([chance, *(control.best.heard for control in controls)]),
        "agreement": own.agreement > max([chance, *(control.agreement for control in controls)]),
        "auc": own.auc > max([0.5, *(control.auc for control in controls)]),
    }
    heard_at = tuple(
        point.r
        for index, point in enumerate(own.points)
        if point.heard > max([chance, *(control.points[index].heard for control in controls)])
    )
    return DirectionReport(
        name=name,
        layer=nla.layer,
        explanation=own.best.explanation,
        explained=all(beats.values()),
        beats=beats,
        heard_at=heard_at,
        sweep=own,
        controls=tuple(controls),
        **found,
    )


def pushed_along(nla: Explainer, directions: Sequence[np.ndarray], steps: Sequence[float]) -> np.ndarray:
    """μ, then μ + r·‖h‖·u for every direction and r: [1 + directions · steps, d] float32."""
    mean, norm = nla.statistics.mean, nla.statistics.norm_median
    return np.stack([mean, *(mean + r * norm * u for u in directions for r in steps)]).astype(np.float32)


def _surprisal(
    nla: Explainer, corpus: Corpus, values_N: np.ndarray, top: Sequence[int], settings: Settings
) -> Surprisal:
    """Against contexts drawn from the less active half of the corpus."""
    low = np.flatnonzero(values_N <= np.median(values_N))
    drawn = np.random.default_rng([settings.seed, 1]).permutation(low)
    inactive = corpus.apart(drawn, len(top))
    active, others = ([corpus.window(row) for row in rows] for rows in (top, inactive))
    return Surprisal(nla.subject, active, others, _UNRELATED)


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, _BINS)
    return {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]}
