"""`report.html`: one self-contained page about a run, made from the files of its workdir.

Text in it comes from a corpus and from a model, so everything is escaped, and the page's own policy forbids
scripts and the network. Files that the workdir does not have yet are shown as not there yet.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from nlae_jax.assets import REPORT_PAGE
from nlae_jax.config import Config
from nlae_jax.report.curves import Point, curve, smoothed, thinned
from nlae_jax.report.ruler import Mark, interval_of, ruler, tick_text, ticks
from nlae_jax.report.suite import html_suite, without_suite
from nlae_jax.report.table import (
    LARGEST,
    html_health,
    html_samples,
    html_text,
    html_values,
    is_shown,
    number,
    printable,
    significant,
)
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, read_json, remove_abandoned, workdir_path, write_text
from nlae_jax.train.metrics import read

SAMPLES = "samples/held_out.jsonl"

TITLES = {
    "encoder_sft": ("Encoder warm start", "The encoder learns to write the descriptions from the injected activation."),
    "decoder_sft": ("Decoder warm start", "The decoder learns to rebuild the activation from the descriptions."),
    "rl": ("Reinforcement learning", "The encoder is rewarded for words that the decoder can read; both learn."),
}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One small chart: its title, the metrics it draws, what they mean, and whether a log scale may be used."""

    title: str
    keys: tuple[str, ...]
    note: str
    log: bool = False


PANELS = (
    Panel("Variance explained", ("fve", "fve_meannorm"), "of the batch, by its two definitions"),
    Panel("Reward", ("reward_mean",), "mean over the batch"),
    Panel("Spread of the reward", ("reward_std",), "standard deviation"),
    Panel("Loss", ("loss",), "what the stage minimises"),
    Panel("KL to the warm start", ("kl",), "nats per token"),
    Panel("Entropy", ("entropy",), "of the next token, in nats"),
    Panel("Length", ("explanation_tokens",), "tokens in an explanation"),
    Panel("Closed and cut", ("extraction_rate", "truncated_rate"), "share of the explanations"),
    Panel("Repetition", ("repeated_item_rate", "repeated_sentence_rate"), "share of the explanations"),
    Panel("Different from each other", ("distinct_explanations", "distinct_2"), "explanations; pairs of their words"),
    Panel("Changed", ("changed_words", "changed_candidates"), "share that the previous explanation does not have"),
    Panel("Strange characters", ("marker_rate", "cjk_rate"), "share of the explanations"),
    Panel("Gradient norms", ("grad_norm_encoder", "grad_norm_decoder"), "before clipping", log=True),
    Panel("Log-probability gap", ("logp_gap",), "mean difference between sampler and trainer, in nats"),
    Panel("Without signal", ("zero_variance_groups", "skipped_updates"), "groups with equal rewards; skipped updates"),
    Panel("Seconds per step", ("step_seconds",), "wall time", log=True),
    Panel("Tokens per second", ("tokens_per_second",), "wall time"),
)

CARDS = (
    ("Variance explained", "fve", "How much of the activations' differences explanations carry; 1 is perfect."),
    ("Before RL", "fve_before_rl", "fve of the warm-started pair, before RL."),
    ("Gained by RL", "fve_gain", "fve after RL minus fve before RL, on the same activations."),
    ("Shuffled", "fve_shuffled", "fve with explanations of other documents. It should be 0 or lower."),
    ("Through text", "fve_text", "fve if the decoder reads explanations as text that is tokenised again."),
    ("Gold text", "fve_gold", "fve of the warm-start descriptions, which were written from the text itself."),
    ("Other definition", "fve_meannorm", "fve_meannorm. It is never lower than fve; do not compare the two."),
    ("Cosine", "cos", "The mean. Activations share a direction, so it is high even for bad explanations."),
    ("Activations", "num_activations", "From held-out documents, which nothing was trained on."),
)

# Geometry of a chart, in its own units; the page scales it to its column.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 178, 46, 10, 8, 32


def _chart(panel: Panel, rows: Sequence[Mapping[str, Any]]) -> str:
    """Draws the chart as an HTML figure. The text is empty if the rows have none of its metrics."""
    series = {key: curve(rows, key) for key in panel.keys}
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    log = panel.log and min(ys) > 1e-30 and max(ys) / min(ys) > 100
    scale: Callable[[float], float] = math.log10 if log else float
    low, high = scale(min(ys)), scale(max(ys))
    margin = (high - low) * 0.06 or max(abs(high), 1e-3) * 0.1
    low, high = low - margin, high + margin
    first, last = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1

    def place(point: Point) -> Point:
        x = LEFT + (point[0] - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (scale(point[1]) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    marks = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)] if log else ticks(low, high)
    parts = [_axes(marks, [x for x in ticks(first, last) if abs(x - round(x)) < 1e-6], place, log)]
    for index, line in enumerate(series.values()):
        parts.append(_curve(line, place, index, log))
    parts.append(_readout(series, place))
    legend = "".join(
        f'<span class="key k{i}">{html_text(key)} <b>{significant(line[-1][1])}</b></span>'
        for i, (key, line) in enumerate(series.items())
        if line
    )
    note = panel.note + (", log scale" if log else "")
    label = f"{panel.title}, steps {first:.0f} to {max(xs):.0f}"
    return (
        f"<figure><figcaption><b>{panel.title}</b> <i>{note}</i><div>{legend}</div></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _axes(y_ticks: Sequence[float], x_ticks: Sequence[float], place: Callable[[Point], Point], log: bool) -> str:
    """Draws the grid lines with their labels, and the name of the x axis."""
    parts = []
    for tick in y_ticks:
        y = place((x_ticks[0] if x_ticks else 0.0, tick))[1]
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<path class="{kind}" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        label = tick_text(tick, [tick] if log else y_ticks)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for tick in x_ticks:
        x = place((tick, y_ticks[0] if y_ticks else 1.0))[0]
        label = tick_text(tick, x_ticks)
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return "".join(parts) + f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">step</text>'


def _curve(line: Sequence[Point], place: Callable[[Point], Point], index: int, log: bool) -> str:
    """Draws one metric: its values and, if there are enough of them, their moving average over faint values."""
    if len(line) < 2:
        return "".join('<circle class="c{}" cx="{}" cy="{}" r="3"/>'.format(index, *place(point)) for point in line)
    drawn = [(thinned(line), "raw" if len(line) >= 40 else "line")]
    if len(line) >= 40:
        # On a log scale the logarithms are averaged, because the chart shows distances of logarithms.
        logs = smoothed([(x, math.log10(y)) for x, y in line]) if log else []
        drawn.append((thinned([(x, 10**y) for x, y in logs] if log else smoothed(line)), "line"))
    return "".join(
        f'<path class="{kind} c{index}" d="M' + "L".join("{} {}".format(*place(point)) for point in points) + '"/>'
        for points, kind in drawn
    )


def _readout(series: Mapping[str, Sequence[Point]], place: Callable[[Point], Point], most: int = 50) -> str:
    """Draws invisible strips over the chart. Where the pointer rests on one, its step's values are shown."""
    by_step: dict[float, list[str]] = {}
    heights: dict[float, float] = {}
    for key, line in series.items():
        for x, y in line:
            by_step.setdefault(x, []).append(f"{key} {significant(y)}")
            heights[x] = y
    steps = sorted(by_step)
    steps = steps[:: max(1, math.ceil(len(steps) / most))]
    width = round((WIDTH - LEFT - RIGHT) / max(1, len(steps) - 1), 1)
    return "".join(
        f'<rect class="hit" x="{place((step, heights[step]))[0] - width / 2:.1f}" y="{TOP}" width="{width}" '
        f'height="{HEIGHT - TOP - BOTTOM}"><title>step {step:.0f}: {html_text(", ".join(by_step[step]))}</title></rect>'
        for step in steps
    )


def _stages(rows: Sequence[Mapping[str, Any]]) -> str:
    """Makes the curves of each stage, and names the stages that the log does not have."""
    names = [*TITLES, *sorted({str(row["stage"]) for row in rows if "stage" in row} - set(TITLES))]
    return "".join(_stage(name, [row for row in rows if row.get("stage") == name]) for name in names)


def _stage(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    title, note = TITLES.get(name, (name, ""))
    head = f"<h3>{html_text(title)} <code>{html_text(name)}</code></h3>"
    if not rows:
        return f'{head}<p class="absent">Not there yet: metrics.jsonl has no rows of this stage.</p>'
    steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
    lost = sum(value is None for row in rows for value in row.values())
    skipped = sum(count for _, count in curve(rows, "skipped_updates"))
    missing = f" Null values (not finite when written), left out: {lost:,}." if lost else ""
    missing += f" Updates skipped: {skipped:,.0f}." if skipped else ""
    figures = "".join(_chart(panel, rows) for panel in PANELS)
    reached = f" {len(rows):,} rows, up to step {max(steps):,}." if steps else ""
    return f'{head}<p class="note">{html_text(note)}{reached}{missing}</p><div class="charts">{figures}</div>'


def _interval(evaluation: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    return interval_of(evaluation.get(key))


def _interval_text(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"95% interval {number(interval[0])} to {number(interval[1])}"


def _cards(evaluation: Mapping[str, Any], is_run: bool) -> str:
    """Makes a card for each headline number, with a sentence that explains the number."""
    over = _interval(evaluation, "fve_gain_ci95")
    doubt = "; it contains 0, so RL may have added nothing" if over is not None and over[0] <= 0 <= over[1] else ""
    beside = {
        "fve": _interval_text(_interval(evaluation, "fve_ci95")),
        "fve_gain": _interval_text(over) + doubt,
        "num_activations": f"from {number(evaluation.get('num_documents'))} documents",
    }
    notes = {} if is_run else {"num_activations": "From the given input; the pair may have been trained on it."}
    return "".join(
        f'<div class="card"><h4>{title}</h4><b class="value">{number(evaluation.get(key))}</b>'
        f'<span class="sub">{beside.get(key, "")}</span><p>{notes.get(key, note)}</p></div>'
        for title, key, note in CARDS
        if is_run or key in evaluation  # a pair without a run has no numbers from before RL
    )


def _ruler(evaluation: Mapping[str, Any]) -> str:
    """Draws the fraction of variance explained (FVE) beside its controls, on one scale."""
    rows = (
        ("shuffled", "fve_shuffled"), ("mean prediction", ""), ("before RL", "fve_before_rl"),
        ("explanations", "fve"), ("through text", "fve_text"), ("gold text", "fve_gold"),
    )  # fmt: skip
    found: dict[str, Any] = {name: evaluation.get(key) if key else 0.0 for name, key in rows}
    values = {name: float(value) for name, value in found.items() if is_shown(value)}
    kinds = {"explanations": "main", "mean prediction": "zero"}
    interval = _interval(evaluation, "fve_ci95")
    marks = [
        Mark(name, value, interval if name == "explanations" else None, kinds.get(name, ""))
        for name, value in values.items()
    ]
    return ruler(marks, 0.0, 1.0)


def _headline(evaluation: Mapping[str, Any] | None, is_run: bool) -> str:
    if evaluation is None:
        return '<p class="absent">Not there yet: eval.json. <code>nlae eval</code> writes it.</p>'
    table = html_values(without_suite(evaluation), {})
    everything = f"<details><summary>Everything in eval.json</summary>{table}</details>"
    which = "held-out activations" if is_run else "the activations that were read"
    note = f'<p class="note">fve on {which}: 0 is as good as predicting the mean, 1 is perfect.</p>'
    cards = f'<div class="cards">{_cards(evaluation, is_run)}</div>'
    return f"{note}{_ruler(evaluation)}{cards}{html_health(evaluation)}{everything}"


def _config(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return '<p class="absent">Not there yet: config.json.</p>'
    defaults = dataclasses.asdict(Config())
    top = {key: value for key, value in config.items() if not isinstance(value, dict)}
    groups = ([("general", top, defaults)] if top else []) + [
        (key, value, base if isinstance(base := defaults.get(key), dict) else {})
        for key, value in config.items()
        if isinstance(value, dict)
    ]
    boxes = "".join(f"<div><h4>{html_text(name)}</h4>{html_values(table, base)}</div>" for name, table, base in groups)
    return f'<p class="note">Bold: not the default.</p><div class="config">{boxes}</div>'


def _object(path: AnyPath, remedy: str) -> dict[str, Any] | None:
    """Reads a JSON object from a file, or returns None if there is no file.

    Raises UserError with the `remedy` if the file cannot be read or holds something else.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object; {remedy}")
    return _tame(value)


def _tame(value: Any, depth: int = 12) -> Any:
    """Returns the part of a file's value that a page can show: no numbers that overflow, no lists nested too deeply."""
    if isinstance(value, dict | list) and depth == 0:
        return "…"
    if isinstance(value, dict):
        return {key: _tame(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_tame(item, depth - 1) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float) or -(2**53) < value < 2**53:
        return value
    return float(value) if abs(value) < LARGEST else None


def write_report(workdir: str | os.PathLike[str]) -> AnyPath:
    """Writes `workdir/report.html` from its config, metrics, evaluation and held-out samples; returns its path.

    The file is replaced in one move. Missing inputs are shown as not there yet. If the directory holds figures of the
    suite but no run, the page shows only the figures. Raises UserError for a damaged input.
    """
    workdir = workdir_path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such workdir; --workdir names the directory of a run")
    config = _object(workdir / "config.json", "restore it: it says what everything here was made with")
    evaluation = _object(workdir / "eval.json", "delete it and run `nlae eval` again")
    suite = (evaluation or {}).get("suite")
    suite = suite if isinstance(suite, dict) else {}
    is_run = config is not None or not suite
    subject = (config or {}).get("subject") if is_run else {"model": suite.get("pair"), "layer": suite.get("layer")}
    subject = {name: value for name, value in subject.items() if value is not None} if isinstance(subject, dict) else {}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    page = environment.from_string(REPORT_PAGE.read_text(encoding="utf-8")).render(
        model=printable(subject.get("model", "unknown subject")),
        layer=printable(subject.get("layer", "unknown")),
        is_run=is_run,
        headline=Markup(_headline(evaluation, is_run)),
        suite=Markup(html_suite(evaluation or {})),
        stages=Markup(_stages(_tame(read(workdir / "metrics.jsonl"), 14))),
        samples=Markup(html_samples(_tame(read(workdir / SAMPLES), 14), SAMPLES)),
        config=Markup(_config(config)),
    )
    path = workdir / "report.html"
    remove_abandoned(workdir)
    write_text(path, page)
    return path
