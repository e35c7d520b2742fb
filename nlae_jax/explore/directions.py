"""Explains a direction of the residual stream, beside control directions that should mean nothing.

A direction by itself lies far from any activation. The encoder therefore reads μ + r·‖h‖·u for several r: the mean
activation μ, pushed along the unit direction u by r times the median norm ‖h‖. `heard` measures how well the decoder
rebuilds the push from the explanation.
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

# Sentences unrelated to any context. An explanation's effect on surprisal is compared with theirs.
_UNRELATED = (
    "The text goes on in the way that it began.",
    "Somebody wrote this down a while ago, and nobody has changed it since.",
)
_BINS = 24
_LEAST_CHANGE = 1e-5  # smaller changes of a unit vector may come from float32 rounding


@dataclasses.dataclass(frozen=True)
class DirectionSettings:
    """How thoroughly a direction is examined.

    `steps` are the values of r in a sweep. `controls` is the number of random directions, and also the number of
    shuffles of the direction's components. `contexts` is the number of top activating contexts. The same number of
    inactive contexts is drawn for the surprisal. `max_new_tokens` is the token limit of an explanation (default: the
    pair's).
    """

    steps: tuple[float, ...] = STEPS
    controls: int = 3
    contexts: int = 8
    seed: int = 0
    max_new_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Point:
    """One value of r in a sweep, and the encoder's explanation of the activation pushed by r.

    `heard` is the cosine between two changes from r = 0 to r: the change of the pushed activation's direction, and the
    change of the reconstruction's direction. It is 0 if the explanation is the same as at r = 0. Each change is first
    made orthogonal to its direction at r = 0, because every change leads away from that direction. `cut` says that the
    encoder did not end the explanation within the limit.
    """

    r: float
    explanation: str
    heard: float
    cut: bool


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All points of one direction. `kind` is "direction", "random" or "shuffled".

    `agreement` is the cosine between two changes of the reconstruction, both from the reconstruction of the mean
    activation's explanation: the change to the direction's explanation, and the change to the explanations of the top
    contexts. `auc` says how well the explanation separates activating contexts from other contexts by surprisal; 0.5
    is chance.
    """

    kind: str
    points: tuple[Point, ...]
    agreement: float
    auc: float

    @property
    def best(self) -> Point:
        """The point of the sweep at which the direction is heard most."""
        return max(self.points, key=lambda point: point.heard)


@dataclasses.dataclass(frozen=True)
class Context:
    """A token of the corpus at which the direction is active, and the pair's explanation of the activation there."""

    before: str
    token: str
    after: str
    value: float
    explanation: str


@dataclasses.dataclass(frozen=True)
class DirectionReport:
    """The explanation of a direction, and the measures that say whether to believe it.

    `explained` is True only if the direction beats every control, and chance, in all three measures: `heard`,
    `agreement` and `auc`. Chance is 3/√d for a cosine, which two random directions seldom reach, and 0.5 for the AUC.
    `beats` says in which measures the direction beats them. `heard_at` lists the values of r at which `heard` is higher
    than that of every control at the same r. `promoted` and `suppressed` are the tokens of `token_effects`.
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
        """Returns the report as JSON has it."""
        row = dataclasses.asdict(self)
        row["r"] = self.sweep.best.r
        return row

    def to_frame(self) -> Any:
        """Returns a pandas data frame with every point of every sweep. Raises UserError where pandas is missing."""
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
    """Scales vectors [..., d] to length 1 along the last axis, float64; zero stays zero."""
    vectors = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1.0)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosine along the last axis, float64; 0 where either vector is zero."""
    return (unit(a) * unit(b)).sum(-1)


def change(directions: np.ndarray, origin_D: np.ndarray) -> np.ndarray:
    """Returns the part of unit directions [..., d] orthogonal to `origin_D`, float64; zero where they are equal."""
    origin_D = unit(origin_D)
    units = unit(directions)
    orthogonal = units - (units @ origin_D)[..., None] * origin_D
    # Equal directions differ by rounding only, which must not count as a direction.
    return np.where(np.linalg.norm(orthogonal, axis=-1, keepdims=True) > _LEAST_CHANGE, orthogonal, 0.0)


def heard_of(rebuilt: np.ndarray, pushed: np.ndarray) -> np.ndarray:
    """Returns `Point.heard` for all rows after the first, which is r = 0: [N, d] and [N, d] -> [N - 1] float64."""
    return cosine(change(rebuilt[1:], rebuilt[0]), change(pushed[1:], pushed[0]))


def control_directions(u_D: np.ndarray, count: int, seed: int) -> list[tuple[str, np.ndarray]]:
    """Returns control directions of length 1: `count` isotropic ones, and `count` shuffles of u's components."""
    rng = np.random.default_rng(seed)
    random = [("random", unit(rng.standard_normal(len(u_D)))) for _ in range(count)]
    return [*random, *(("shuffled", unit(rng.permutation(u_D))) for _ in range(count))]


def token_effects(nla: Explainer, u_D: np.ndarray, count: int = 10) -> tuple[Any, Any]:
    """Returns the tokens that u promotes and suppresses most, with the effect on their logits in standard deviations.

    u is scaled by the final norm's weights and multiplied by the unembedding, like a small part of the residual stream.
    """
    subject = nla.subject
    head = np.asarray(subject.params.get("head", subject.params["embed"]), np.float32)
    scale = np.asarray(subject.params["final_norm"], np.float32) + subject.arch.norm_offset
    effect = head @ (unit(u_D).astype(np.float32) * scale)
    effect = (effect - effect.mean()) / max(float(effect.std()), 1e-30)
    num_tokens = min(len(effect), len(subject.tokenizer))
    order = np.argsort(-effect[:num_tokens])
    named = lambda rows: tuple((subject.tokenizer.decode([int(row)]), float(effect[row])) for row in rows)  # noqa: E731
    return named(order[:count]), named(order[::-1][:count])


def explain_direction(
    nla: Explainer,
    name: str,
    u_D: np.ndarray,
    corpus: Corpus,
    settings: DirectionSettings | None = None,
    values_N: np.ndarray | None = None,
    notes: Sequence[str] = (),
) -> DirectionReport:
    """Explains a direction of the pair's layer, of any length, beside controls.

    `values_N` are the direction's activations on the corpus (default: the projections (h − μ)·u). Raises UserError for
    an adapted pair.
    """
    nla.check_own_subject("direction")
    settings = settings or DirectionSettings()
    u_D = unit(u_D)
    if values_N is None:
        values_N = (corpus.h_NxD - nla.statistics.mean) @ u_D
    order = np.argsort(-values_N, kind="stable")
    top = corpus.spaced_rows(order, settings.contexts)
    directions = [("direction", u_D), *control_directions(u_D, settings.controls, settings.seed)]
    pushed = pushed_along(nla, [direction for _, direction in directions], settings.steps)
    limit = settings.max_new_tokens
    written = nla.write(np.concatenate([pushed, corpus.h_NxD[top]]), 0.0, limit)
    texts, count = [text for text, _ in written], len(pushed)
    rebuilt = np.asarray(nla.rebuild(texts))
    changes = change(rebuilt, rebuilt[0])
    contexts_change = changes[count:].mean(0)
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
        agreement = float(cosine(changes[best], contexts_change))
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


def _report(nla: Explainer, name: str, sweeps: Sequence[Sweep], **fields: Any) -> DirectionReport:
    """Compares the direction's sweep, which is the first, with the controls' and makes the report."""
    sweep, controls = sweeps[0], sweeps[1:]
    chance = 3 / math.sqrt(nla.d_model)
    beats = {
        "heard": sweep.best.heard > max([chance, *(control.best.heard for control in controls)]),
        "agreement": sweep.agreement > max([chance, *(control.agreement for control in controls)]),
        "auc": sweep.auc > max([0.5, *(control.auc for control in controls)]),
    }
    heard_at = tuple(
        point.r
        for index, point in enumerate(sweep.points)
        if point.heard > max([chance, *(control.points[index].heard for control in controls)])
    )
    return DirectionReport(
        name=name,
        layer=nla.layer,
        explanation=sweep.best.explanation,
        explained=all(beats.values()),
        beats=beats,
        heard_at=heard_at,
        sweep=sweep,
        controls=tuple(controls),
        **fields,
    )


def pushed_along(nla: Explainer, directions: Sequence[np.ndarray], steps: Sequence[float]) -> np.ndarray:
    """Returns μ, then μ + r·‖h‖·u for every direction and r: [1 + directions · steps, d] float32.

    ‖h‖ is the median norm of the pair's data.
    """
    mean, norm = nla.statistics.mean, nla.statistics.norm_median
    return np.stack([mean, *(mean + r * norm * u for u in directions for r in steps)]).astype(np.float32)


def _surprisal(
    nla: Explainer, corpus: Corpus, values_N: np.ndarray, top: Sequence[int], settings: DirectionSettings
) -> Surprisal:
    """Makes the surprisal of the top contexts against contexts drawn from the less active half of the corpus."""
    low = np.flatnonzero(values_N <= np.median(values_N))
    drawn = np.random.default_rng([settings.seed, 1]).permutation(low)
    inactive = corpus.spaced_rows(drawn, len(top))
    active, others = ([corpus.window(row) for row in rows] for rows in (top, inactive))
    return Surprisal(nla.subject, active, others, _UNRELATED)


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    """Counts values in `_BINS` equal bins."""
    counts, edges = np.histogram(values, _BINS)
    return {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]}
