"""`report.html`: one self-contained page about a run, made from the files of its workdir.

Text in it comes from a corpus and from a model, so everything is escaped, and the page's own policy forbids
scripts and the network. What a workdir does not hold yet is shown as not there yet.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nlae_jax.config import Config
from nlae_jax.report.curves import Point, curve, smoothed, thinned
from nlae_jax.report.table import (
    LARGEST,
    html_health,
    html_samples,
    html_text,
    html_values,
    number,
    significant,
    tidy,
)
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath, read_json, remove_abandoned, workdir_path, write_text
from nlae_jax.train.metrics import read

SAMPLES = "samples/held_out.jsonl"

STAGES = {
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
    Panel("Variance explained", ("fve", "fve_meannorm"), "of the batch, by both definitions"),
    Panel("Reward", ("reward_mean",), "mean over the batch"),
    Panel("Spread of the reward", ("reward_std",), "standard deviation"),
    Panel("Loss", ("loss",), "what the stage minimises"),
    Panel("KL to the warm start", ("kl",), "nats per token"),
    Panel("Entropy", ("entropy",), "of the next token, in nats"),
    Panel("Length", ("explanation_tokens",), "tokens in an explanation"),
    Panel("Closed and cut", ("extraction_rate", "truncated_rate"), "share of the explanations"),
    Panel("Repetition", ("repeated_item_rate", "repeated_sentence_rate"), "share of the explanations"),
    Panel("Different from each other", ("distinct_explanations", "distinct_2"), "explanations; pairs of their words"),
    Panel("Changed", ("changed_words", "changed_candidates"), "against the previous activation's explanation"),
    Panel("Strange characters", ("marker_rate", "cjk_rate"), "share of the explanations"),
    Panel("Gradient norms", ("grad_norm_encoder", "grad_norm_decoder"), "before clipping", log=True),
    Panel("Log-probability gap", ("logp_gap",), "sampler against trainer"),
    Panel("Without signal", ("zero_variance_groups", "skipped_updates"), "groups of equal reward; updates not finite"),
    Panel("Seconds per step", ("step_seconds",), "wall time", log=True),
    Panel("Tokens per second", ("tokens_per_second",), "wall time"),
)

CARDS = (
    ("Variance explained", "fve", "What the words carry of the differences between activations; 1 is perfect."),
    ("Before RL", "fve_before_rl", "The same measure for the warm-started pair."),
    ("Gained by RL", "fve_gain", "After minus before, paired over documents."),
    ("Shuffled", "fve_shuffled", "Each explanation scored against another activation: 0 or below is right."),
    ("Through text", "fve_text", "Explanations turned into strings and tokenised again, as a reader gets them."),
    ("Gold text", "fve_gold", "The decoder on the warm-start descriptions, whose writer saw the text."),
    ("Other definition", "fve_meannorm", "fve_meannorm, always the higher one; never compare it with the first."),
    ("Cosine", "cos", "The mean. All activations share a direction, so a high cosine alone says little."),
    ("Activations", "num_activations", "Held out by document: nothing was trained on them."),
)

# Geometry of a chart, in its own units; the page scales it to its column.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 178, 46, 10, 8, 32

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark"><title>{model}, block {layer}: what the words carry</title>
<style>{style}</style></head><body><main>
<header><p class="kicker">Natural language autoencoder</p><h1>{model} <span>block {layer}</span></h1>
<p class="lede">The encoder reads one activation from the output of block {layer} and writes what it holds. The decoder
rebuilds the activation from those words alone. What it gets right, the words have carried.</p></header>
<section><h2>How much the words carry</h2>{headline}</section>
<section><h2>Explanations of held-out activations</h2>{samples}</section>
<section><h2>Training</h2>{stages}</section>
<section><h2>Configuration</h2>{config}</section>
<footer><h2>Definitions</h2>
<p>An activation <var>h</var> and its reconstruction are both scaled to the norm √<var>d</var>: only directions are
compared. <code>mse</code> is then the mean squared error per element, equal to 2(1 − cos): 0 is perfect, 2 is
orthogonal, 4 is opposite. <var>ĥ</var> is the scaled activation; means run over the activations that are measured.</p>
<p class="formula">fve = 1 − mean(mse) / mean(‖ĥ − mean(ĥ)‖² / d)</p>
<p class="formula">fve_meannorm = 1 − mean(mse) / mean(‖ĥ − normalise(mean(ĥ))‖² / d)</p>
<p>In <code>fve</code> the mean keeps its own, shorter norm: predicting it for every activation is 0, and less is worse
than saying nothing. In <code>fve_meannorm</code> the mean is scaled to √<var>d</var> as well, which makes a weaker
baseline and so a higher figure. The curves are of each step's own batch; the headline is of held-out activations, its
interval from resampling whole documents.</p>
<p>An explanation without its closing tag, or cut by the length limit, gets the reward −2 in training and is learned
from. A true reconstruction does not make each sentence true: explanations tend to name the right theme and invent
details. Thin lines are raw values, heavy lines their moving average over a twentieth of the stage; the number beside
a name is the last step's.</p></footer>
</main></body></html>
"""

STYLE = """
:root{--bg:#faf9f6;--ink:#20242a;--dim:#676c73;--line:#e3e0d9;--card:#fff;--mark:#fbe6a6;--bad:#a8342a;
  --c0:#22668f;--c1:#bd6420;--serif:ui-serif,Charter,"Iowan Old Style",Georgia,"Liberation Serif",serif;
  --sans:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;--mono:ui-monospace,Menlo,Consolas,monospace}
@media(prefers-color-scheme:dark){:root{--bg:#14161a;--ink:#e4e2dc;--dim:#9a9ea5;--line:#2d3137;--card:#1b1e23;
  --mark:#5e4b12;--bad:#f08a7e;--c0:#7cb8e0;--c1:#e8a463}}
*{box-sizing:border-box} html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 var(--sans)}
main{max-width:1120px;margin:0 auto;padding:56px 28px 72px} section,footer{margin-top:56px}
h1,h2,h3,h4{font-weight:600;margin:0} h1,h2,q,.lede,.formula{font-family:var(--serif)}
h1{font-size:34px;line-height:1.2;margin:4px 0 12px;overflow-wrap:anywhere} h1 span{color:var(--c0)}
h2{font-size:22px;margin-bottom:16px} h3{font-size:16px;margin:32px 0 4px} h4{font-size:13px}
p{margin:0 0 10px;max-width:74ch} .lede{font-size:18px} .formula{font-style:italic;padding-left:20px}
code{font:.88em var(--mono);color:var(--dim)} .note{max-width:100ch} .kicker{margin:0}
.kicker,.note,.absent,small,summary,figcaption i{color:var(--dim);font-size:13px;font-style:normal}
p.absent{border:1px dashed var(--line);border-radius:6px;padding:10px 14px;max-width:none}
details{margin-top:8px} summary{cursor:pointer} details q{display:block;color:var(--dim);padding:4px 0}
.ruler>div{display:grid;grid-template-columns:130px 1fr 52px;gap:12px;align-items:center;height:26px}
.ruler span{white-space:nowrap} .ruler span:last-child{text-align:right}
.track{position:relative;height:100%;border-bottom:1px solid var(--line)} .track *{position:absolute}
.track u{top:0;bottom:-1px;border-left:1px solid var(--dim)} .scale .track{border:0}
.track i{width:10px;height:10px;margin:-5px;top:50%;border-radius:5px;background:var(--dim)}
.track s{top:50%;height:16px;margin-top:-8px;border-radius:3px;background:var(--c0);opacity:.3}
.track em{transform:translateX(-50%);font:12px var(--sans);color:var(--dim);top:4px}
.main{font-weight:600} .main i{background:var(--c0)} .zero i{background:var(--bg);border:2px solid var(--dim)}
.cards,.charts{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));
  margin:24px 0 16px} .config{columns:3 280px;column-gap:32px} .config div{break-inside:avoid;padding-bottom:24px}
.card,figure{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px 16px;margin:0}
.value{display:block;font-size:27px;line-height:1.35} .card:first-child .value{color:var(--c0)}
.card p,.sub{display:block;font-size:13px;line-height:1.45} .card p{color:var(--dim);margin:4px 0 0}
.value,.score,.values td,.ruler{font-variant-numeric:tabular-nums}
figure{display:flex;flex-direction:column;padding:12px 12px 6px} figcaption{font-size:14px;padding:0 4px 4px}
.key{font-size:12.5px;margin-right:14px;color:var(--dim);white-space:nowrap} .key b{color:var(--ink)}
.key:before{content:"";display:inline-block;width:14px;border-top:2.5px solid;margin-right:6px;vertical-align:4px}
.k0:before{color:var(--c0)} .k1:before{color:var(--c1)} circle.c0{fill:var(--c0)} circle.c1{fill:var(--c1)}
svg{display:block;width:100%;height:auto;margin-top:auto} svg text{font:11px var(--sans);fill:var(--dim)}
svg path{fill:none} .grid{stroke:var(--line)} path.zero{stroke:var(--dim);stroke-width:.8}
.c0{stroke:var(--c0)} .c1{stroke:var(--c1)} .line{stroke-width:1.8} .raw{stroke-width:.8;opacity:.35}
.hit{fill:var(--ink);opacity:0} .hit:hover{opacity:.07}
table{border-collapse:collapse;width:100%} th{text-align:left;font-weight:600;font-size:13px} td,th{vertical-align:top}
.samples td,.samples th{padding:12px 20px 12px 0;border-top:1px solid var(--line)}
.samples thead th{border:0;padding-bottom:6px;color:var(--dim)}
.samples .score,.samples th:nth-child(n+3){padding-right:0;padding-left:16px;text-align:right;white-space:nowrap}
.samples .context{width:42%;font:13px/1.55 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere}
.context small{display:block;font:12px var(--sans);margin-top:6px}
mark{background:var(--mark);color:inherit;border-radius:3px;padding:1px 2px}
q{quotes:none;font-size:16px;white-space:pre-line;overflow-wrap:anywhere}
.flag{font-size:12px;color:var(--bad);border:1px solid;border-radius:9px;padding:0 7px;white-space:nowrap}
.values{font-size:13px;table-layout:fixed} .values td{white-space:pre-wrap} .values th{color:var(--dim);width:50%}
.values th,.values td{padding:3px 8px 3px 0;border-bottom:1px solid var(--line);overflow-wrap:anywhere;font-weight:400}
.health td,.health th{font-size:13px;padding:4px 16px 4px 0;border-bottom:1px solid var(--line)}
.health td:nth-child(2){font-variant-numeric:tabular-nums} .health .flag{display:table;white-space:normal;margin:2px 0}
.changed th,.changed td{font-weight:650;color:var(--ink)}
@media(max-width:680px){main{padding:32px 16px 48px} h1{font-size:26px} .card{padding:12px}
  .cards{grid-template-columns:1fr 1fr;gap:10px} .card:first-child{grid-column:1/-1}
  .ruler>div{grid-template-columns:112px 1fr 42px;gap:10px;font-size:13.5px}
  .samples thead{display:none} .samples tr{display:block;border-top:1px solid var(--line);padding:14px 0}
  .samples td,.samples .context{display:block;width:auto;border:0;padding:0 0 10px}
  .samples .score{display:inline;padding:0 16px 0 0} .score:before{content:attr(data-name) " ";color:var(--dim)}}
"""


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high], `count` or a few more or less."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick_text(value: float, ticks: Sequence[float]) -> str:
    """A tick's label with as many decimals as tell the ticks apart."""
    for decimals in range(5):
        if all(abs(round(tick, decimals) - tick) <= 1e-6 * abs(tick) for tick in ticks):
            return tidy(f"{value:,.{decimals}f}")
    return tidy(f"{value:.3g}")


def _chart(panel: Panel, rows: Sequence[Mapping[str, Any]]) -> str:
    """The chart as a figure, or nothing if the rows hold none of its metrics."""
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

    marks = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)] if log else _ticks(low, high)
    parts = [_axes(marks, [x for x in _ticks(first, last) if abs(x - round(x)) < 1e-6], place, log)]
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
    """Grid lines with their labels, and the name of the x axis."""
    parts = []
    for tick in y_ticks:
        y = place((x_ticks[0] if x_ticks else 0.0, tick))[1]
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<path class="{kind}" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        label = _tick_text(tick, [tick] if log else y_ticks)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for tick in x_ticks:
        x = place((tick, y_ticks[0] if y_ticks else 1.0))[0]
        label = _tick_text(tick, x_ticks)
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return "".join(parts) + f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">step</text>'


def _curve(line: Sequence[Point], place: Callable[[Point], Point], index: int, log: bool) -> str:
    """One metric: the raw values, faint under their moving average where there are enough of them."""
    if len(line) < 2:
        return "".join('<circle class="c{}" cx="{}" cy="{}" r="3"/>'.format(index, *place(point)) for point in line)
    drawn = [(thinned(line), "raw" if len(line) >= 40 else "line")]
    if len(line) >= 40:
        # On a log scale the average is that of the logarithms, as the eye takes it.
        logs = smoothed([(x, math.log10(y)) for x, y in line]) if log else []
        drawn.append((thinned([(x, 10**y) for x, y in logs] if log else smoothed(line)), "line"))
    return "".join(
        f'<path class="{kind} c{index}" d="M' + "L".join("{} {}".format(*place(point)) for point in points) + '"/>'
        for points, kind in drawn
    )


def _readout(series: Mapping[str, Sequence[Point]], place: Callable[[Point], Point], most: int = 50) -> str:
    """Strips over the chart that show the values at a step when the pointer rests on them; no script needed."""
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
    """The curves of each stage; stages that the log does not have are named as such."""
    names = [*STAGES, *sorted({str(row["stage"]) for row in rows if "stage" in row} - set(STAGES))]
    return "".join(_stage(name, [row for row in rows if row.get("stage") == name]) for name in names)


def _stage(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    title, note = STAGES.get(name, (name, ""))
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
    pair: Any = evaluation.get(key)
    good = isinstance(pair, list) and len(pair) == 2 and all(number(end) != "–" for end in pair)
    return (float(pair[0]), float(pair[1])) if good else None


def _interval_text(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"95% interval {number(interval[0])} to {number(interval[1])}"


def _cards(evaluation: Mapping[str, Any]) -> str:
    """The headline numbers, each with what it means in one line."""
    over = _interval(evaluation, "fve_gain_ci95")
    doubt = "; it contains 0, so RL may have added nothing" if over is not None and over[0] <= 0 <= over[1] else ""
    beside = {
        "fve": _interval_text(_interval(evaluation, "fve_ci95")),
        "fve_gain": _interval_text(over) + doubt,
        "num_activations": f"from {number(evaluation.get('num_documents'))} documents",
    }
    return "".join(
        f'<div class="card"><h4>{title}</h4><b class="value">{number(evaluation.get(key))}</b>'
        f'<span class="sub">{beside.get(key, "")}</span><p>{note}</p></div>'
        for title, key, note in CARDS
    )


def _ruler(evaluation: Mapping[str, Any]) -> str:
    """The variance explained beside its controls, on one scale."""
    rows = (
        ("shuffled", "fve_shuffled"), ("mean prediction", ""), ("before RL", "fve_before_rl"),
        ("explanations", "fve"), ("through text", "fve_text"), ("gold text", "fve_gold"),
    )  # fmt: skip
    found: dict[str, Any] = {name: evaluation.get(key) if key else 0.0 for name, key in rows}
    values = {name: float(value) for name, value in found.items() if number(value) != "–"}
    interval = _interval(evaluation, "fve_ci95")
    ends = [*values.values(), *(interval or ())]
    low, high = min([0.0, *ends]) - 0.03, max([1.0, *ends]) + 0.03

    def at(value: float) -> float:
        return round((value - low) / (high - low) * 100, 2)

    lines = []
    for name, value in values.items():
        kind = "main" if name == "explanations" else "zero" if name == "mean prediction" else ""
        whisker = ""
        if kind == "main" and interval is not None:
            whisker = f'<s style="left:{at(interval[0])}%;width:{round(at(interval[1]) - at(interval[0]), 2)}%"></s>'
        lines.append(
            f'<div class="{kind}"><span>{name}</span><span class="track"><u style="left:{at(0)}%"></u>{whisker}'
            f'<i style="left:{at(value)}%"></i></span><span>{number(value, 2)}</span></div>'
        )
    ticks = _ticks(low, high)
    scale = "".join(f'<em style="left:{at(tick)}%">{_tick_text(tick, ticks)}</em>' for tick in ticks)
    lines.append(f'<div class="scale"><span></span><span class="track">{scale}</span><span></span></div>')
    return f'<div class="ruler">{"".join(lines)}</div>'


def _headline(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return '<p class="absent">Not there yet: eval.json. <code>nlae eval</code> writes it.</p>'
    everything = f"<details><summary>Everything in eval.json</summary>{html_values(evaluation, {})}</details>"
    note = '<p class="note">fve on held-out activations: 0 is the mean prediction, 1 is perfect.</p>'
    cards = f'<div class="cards">{_cards(evaluation)}</div>'
    return f"{note}{_ruler(evaluation)}{cards}{html_health(evaluation)}{everything}"


def _config(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return '<p class="absent">Not there yet: config.json.</p>'
    defaults = dataclasses.asdict(Config())
    top = {key: value for key, value in config.items() if not isinstance(value, dict)}
    groups = ([("general", top, defaults)] if top else []) + [
        (key, value, defaults.get(key, {})) for key, value in config.items() if isinstance(value, dict)
    ]
    boxes = "".join(f"<div><h4>{html_text(name)}</h4>{html_values(table, base)}</div>" for name, table, base in groups)
    return f'<p class="note">Bold: not the default.</p><div class="config">{boxes}</div>'


def _object(path: AnyPath, remedy: str) -> dict[str, Any] | None:
    """A JSON object from a file, or None if there is no file. Raises UserError with the `remedy` for anything else."""
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
    """What a page can show of a value from a file: numbers that can be computed with, lists in lists up to a depth."""
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

    The file is replaced in one move. Missing inputs are shown as not there yet; damaged ones raise UserError.
    """
    workdir = workdir_path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such workdir; --workdir names the directory of a run")
    config = _object(workdir / "config.json", "restore it: it says what everything here was made with")
    evaluation = _object(workdir / "eval.json", "delete it and run `nlae eval` again")
    subject = (config or {}).get("subject")
    subject = subject if isinstance(subject, dict) else {}
    page = PAGE.format(
        style=STYLE,
        model=html_text(subject.get("model", "unknown subject")),
        layer=html_text(subject.get("layer", "unknown")),
        headline=_headline(evaluation),
        stages=_stages(_tame(read(workdir / "metrics.jsonl"), 14)),
        samples=html_samples(_tame(read(workdir / SAMPLES), 14), SAMPLES),
        config=_config(config),
    )
    path = workdir / "report.html"
    remove_abandoned(workdir)
    write_text(path, page)
    return path
