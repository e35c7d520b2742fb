"""The report and the terminal table: what is there is shown, what is not is said, and no text becomes markup."""

import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nlae_jax.report.curves import curve, smoothed, thinned
from nlae_jax.report.page import write_report
from nlae_jax.report.suite import suite_table
from nlae_jax.report.table import held_out_table, html_samples, printable, split_at_token
from nlae_jax.runtime.errors import UserError
from nlae_jax.train.metrics import MetricsLog

VOID = {"meta", "br"}
EVALUATION = {
    "fve": 0.4231,
    "fve_ci95": [0.391, 0.452],
    "fve_meannorm": 0.489,
    "fve_text": 0.4188,
    "fve_shuffled": -0.512,
    "fve_gold": 0.352,
    "fve_before_rl": 0.118,
    "fve_gain": 0.3051,
    "fve_gain_ci95": [0.27, 0.34],
    "cos": 0.861,
    "num_activations": 256,
    "num_documents": 117,
}
SAMPLE = {
    "doc_id": "doc-1",
    "position": 57,
    "context": "return np.sum(x) / len(",
    "token": "(",
    "explanation": "Python source; a bracket is open.",
    "gold": "Next: x.",
    "cos": 0.81,
    "mse": 0.38,
    "closed": True,
}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects tags and the text that a reader sees."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def workdir(path, evaluation=EVALUATION, samples=(SAMPLE,), rl_steps=60, subject="some/model"):
    (path / "samples").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"seed": 7, "subject": {"model": subject, "layer": 20}}))
    log = MetricsLog(path / "metrics.jsonl")
    log.append({"stage": "encoder_sft", "step": 1, "loss": 4.5})
    for step in range(1, rl_steps + 1):
        norm = math.nan if step == 7 else 10.0 ** (step % 4)
        row = {"fve": 0.01 * step, "fve_meannorm": 0.012 * step, "kl": 2e-7 * step, "grad_norm_decoder": norm}
        log.append({"stage": "rl", "step": step, "skipped_updates": int(step == 7), **row})
    if evaluation is not None:
        (path / "eval.json").write_text(json.dumps(evaluation))
    if samples:
        (path / "samples" / "held_out.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def render(path):
    return write_report(path).read_text(encoding="utf-8")


def cards(html):
    """Title, value and what stands beside the value, of each card."""
    found = re.findall(r'<h4>([^<]*)</h4><b class="value">([^<]*)</b><span class="sub">([^<]*)</span>', html)
    return {title: (value, beside) for title, value, beside in found}


def test_a_whole_run(tmp_path):
    html = render(workdir(tmp_path / "w"))
    page = Page(html)
    assert cards(html) == {
        "Variance explained": ("0.423", "95% interval 0.391 to 0.452"),
        "Before RL": ("0.118", ""),
        "Gained by RL": ("0.305", "95% interval 0.270 to 0.340"),
        "Shuffled": ("−0.512", ""),
        "Through text": ("0.419", ""),
        "Gold text": ("0.352", ""),
        "Other definition": ("0.489", ""),
        "Cosine": ("0.861", ""),
        "Activations": ("256", "from 117 documents"),
    }
    assert "some/model block 20" in page.text
    assert "<mark>(</mark>" in html
    assert "<summary>gold text</summary><q>Next: x.</q>" in html
    assert "Null values (not finite when written), left out: 1. Updates skipped: 1." in page.text
    assert "before clipping, log scale" in page.text
    assert 'class="changed"><th>seed</th><td>7<' in html
    assert "Not there yet: metrics.jsonl has no rows of this stage" in page.text  # decoder_sft
    assert os.listdir(tmp_path / "w").count("report.html") == 1
    assert not [name for name in os.listdir(tmp_path / "w") if name.endswith(".tmp")]


def test_nothing_is_fetched_and_nothing_runs(tmp_path):
    html = render(workdir(tmp_path / "w"))
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "a"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "onload", "onclick"} & {name for name, _ in page.attributes}
    assert "url(" not in html and "@import" not in html and "//" not in html.replace("</", "")
    assert "default-src 'none'" in html


def test_an_empty_workdir_says_what_is_missing(tmp_path):
    html = render(tmp_path)
    text = Page(html).text
    for absent in ("eval.json", "samples/held_out.jsonl", "config.json", "metrics.jsonl has no rows of this stage"):
        assert f"Not there yet: {absent}" in text
    assert text.count("no rows of this stage") == 3
    assert 'class="value"' not in html and "<svg" not in html
    assert "unknown subject" in text


def test_before_rl_no_number_is_made_up(tmp_path):
    partial = {"fve": 0.12, "fve_ci95": None, "fve_gold": math.nan, "num_activations": 8, "num_documents": "many"}
    html = render(workdir(tmp_path / "w", evaluation=partial, rl_steps=0))
    assert cards(html) == {
        "Variance explained": ("0.120", ""),
        "Before RL": ("–", ""),
        "Gained by RL": ("–", ""),
        "Shuffled": ("–", ""),
        "Through text": ("–", ""),
        "Gold text": ("–", ""),
        "Other definition": ("–", ""),
        "Cosine": ("–", ""),
        "Activations": ("8", "from – documents"),
    }
    ruler = re.findall(r'<div class="\w*"><span>([^<]+)</span><span class="track">', html)
    assert ruler == ["mean prediction", "explanations"]


def health_table(html):
    """Of each line of the table of health: its value, what it should be, what to do."""
    lines = re.findall(r"<tr><td><code>(\w+)</code> (.*?)</td><td>([^<]*)</td><td>([^<]*)</td></tr>", html)
    advice = {key: re.findall(r'<span class="flag">([^<]+)</span>', text) for key, text, _, _ in lines}
    return {key: (value, bound, *advice[key]) for key, _, value, bound in lines}


def test_health_is_beside_its_bounds(tmp_path):
    measured = {
        "repeated_rate": 0.31,
        "distinct_explanations": 1.0,
        "distinct_2": 0.8,
        "changed_candidates": None,
        "fve_gold_gap": -0.07,
    }
    html = render(workdir(tmp_path / "w", evaluation=EVALUATION | measured))
    text = Page(html).text
    lines = health_table(html)
    assert lines.keys() == measured.keys() - {"changed_candidates"}
    assert lines["distinct_explanations"] == ("1.000", "at least 0.95")
    assert lines["distinct_2"] == ("0.800", "–")
    assert lines["repeated_rate"][:2] == ("0.310", "at most 0.02") and "rl.repeat_penalty" in lines["repeated_rate"][2]
    assert lines["fve_gold_gap"][:2] == ("−0.070", "above 0 where fve is above 0") and len(lines["fve_gold_gap"]) == 3
    assert "Bounds crossed: 2." in text
    healthy = render(workdir(tmp_path / "healthy", evaluation=EVALUATION | {"repeated_rate": 0.0}))
    assert "No bound is crossed." in Page(healthy).text and 'class="flag"' not in healthy
    assert "Health of the explanations" not in render(workdir(tmp_path / "old"))  # made before there were measures


def test_health_during_training_is_drawn(tmp_path):
    path = workdir(tmp_path / "w")
    log = MetricsLog(path / "metrics.jsonl")
    for step in range(61, 64):
        log.append(
            {"stage": "rl", "step": step, "repeated_item_rate": 0.1 * (step - 60), "cjk_rate": 0.0, "distinct_2": 0.9}
        )
    html = render(path)
    Page(html)
    assert '<span class="key k0">repeated_item_rate <b>0.3</b>' in html
    assert '<span class="key k1">cjk_rate <b>0</b>' in html and "distinct_2 <b>0.9</b>" in html
    assert "Repetition" not in render(workdir(tmp_path / "old"))


def test_a_gain_that_may_be_none_is_said_to_be(tmp_path):
    html = render(workdir(tmp_path / "w", evaluation=EVALUATION | {"fve_gain_ci95": [-0.02, 0.34]}))
    assert cards(html)["Gained by RL"][1] == "95% interval −0.020 to 0.340; it contains 0, so RL may have added nothing"


NASTY = '<script>alert(1)</script><img src=x onerror="alert(2)">\'"&amp;</td></q></table><!-- \x00\x1b[31m\u202e\ud800'


def test_hostile_text_stays_text(tmp_path):
    sample = SAMPLE | {key: NASTY for key in ("doc_id", "position", "context", "token", "explanation", "gold")}
    path = workdir(tmp_path / "w", evaluation=EVALUATION | {NASTY: NASTY}, samples=[sample], subject=NASTY)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {NASTY: {NASTY: NASTY}, "{model}": "{style}"}))
    MetricsLog(path / "metrics.jsonl").append({"stage": NASTY, "step": 1, "loss": 1.0, NASTY: NASTY})
    html = render(path)
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert not re.search("[\x00\x1b\u202e]", html)
    assert "&amp;amp;" in html  # text that looks escaped is escaped once more


@settings(deadline=None, max_examples=50)
@given(st.text(), st.text(), st.text(), st.floats(), st.booleans())
def test_any_sample_gives_balanced_html(context, token, explanation, cos, closed):
    row = SAMPLE | {
        "context": context + token,
        "token": token,
        "explanation": explanation,
        "cos": cos,
        "closed": closed,
    }
    html = html_samples([row], "samples/held_out.jsonl")
    page = Page(html)
    assert page.tags.count("mark") == 1
    html.encode("utf-8")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e12, 1e12)), min_size=1, max_size=90))
def test_any_curve_is_drawn_inside_its_chart(points):
    from nlae_jax.report.page import PANELS, _chart

    rows = [
        {"stage": "rl", "step": step, "grad_norm_encoder": y, "grad_norm_decoder": abs(y) + 1e-9} for step, y in points
    ]
    panel = next(panel for panel in PANELS if "grad_norm_encoder" in panel.keys)
    html = _chart(panel, rows)
    Page(html)
    coordinates = [
        point for path in re.findall(r'class="(?:line|raw) c\d" d="M([^"]+)"', html) for point in path.split("L")
    ]
    assert "nan" not in html and "inf" not in html.replace("infin", "")
    for point in coordinates:
        x, y = map(float, point.split())
        assert 46 <= x <= 330 and 8 <= y <= 146


def test_curves_keep_their_last_word_and_their_extremes():
    rows = [{"step": 2, "fve": 0.2}, {"step": 1, "fve": 0.1}, {"step": 2, "fve": 0.3}, {"step": 3, "fve": None}]
    assert curve(rows, "fve") == [(1.0, 0.1), (2.0, 0.3)]
    spiky = [(float(x), 100.0 if x == 5_001 else float(x % 3)) for x in range(20_000)]
    assert (5001.0, 100.0) in thinned(spiky) and len(thinned(spiky)) <= 401
    assert [x for x, _ in thinned(spiky)] == sorted(x for x, _ in thinned(spiky))
    flat = smoothed([(float(x), 1.0) for x in range(100)])
    assert flat == [(float(x), 1.0) for x in range(100)]


def test_many_samples_are_cut_and_counted(tmp_path):
    html = render(workdir(tmp_path / "w", samples=[SAMPLE | {"doc_id": f"doc-{n}"} for n in range(260)]))
    assert "The first 200 of 260, in the order of the file" in html
    assert "<summary>188 more</summary>" in html
    assert "doc-199," in html and "doc-200," not in html


def test_a_damaged_file_is_named_and_the_old_report_stays(tmp_path):
    path = workdir(tmp_path / "w")
    before = render(path)
    (path / "eval.json").write_text('{"fve": 0.')
    with pytest.raises(UserError, match=r"eval\.json"):
        write_report(path)
    assert (path / "report.html").read_text() == before


def test_no_workdir_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such workdir"):
        write_report(tmp_path / "absent")


@pytest.mark.parametrize(
    ("context", "token", "expected"),
    [
        ("the list is", " is", ("the list", " is")),
        ("the list is", "▁is", ("the list is", "▁is")),  # a token that is written otherwise is not cut off
        ("the list is", " is ", ("the list ", " is ")),
        ("def f():\r\n", "\n", ("def f():", "↵")),
        ("a\t", "\t", ("a", "⇥")),
        ("a", "", ("a", "∅")),
        ("one two three four five six", " six", ("…three four five", " six")),
    ],
)
def test_the_token_is_marked(context, token, expected):
    assert split_at_token(context, token, 18) == expected


@given(st.text())
def test_printable_text_can_be_shown(text):
    shown = printable(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    assert printable(shown) == shown


def table_text(rows, limit, width, terminal=False):
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=terminal).print(held_out_table(rows, limit))
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_and_needs_no_colour(width):
    hostile = SAMPLE | {"explanation": "[bold]not markup[/] \x1b[2J", "closed": False, "cos": math.nan}
    text = table_text([SAMPLE, hostile, SAMPLE | {"cos": 0.111}], 2, width)
    assert max(map(len, text.splitlines())) <= width
    assert "len«(»" in text and "0.810" in text and "0.380" in text
    assert "[bold]not markup[/]" in " ".join(text.split())
    assert "(not" in text and "closed)" in text
    assert "\x1b" not in text
    assert "0.111" not in text and "the first 2 of 3" in text


def test_the_table_of_no_rows():
    assert "the first 0 of 0" in table_text([], 8, 80, terminal=True)


# --- values that no run writes

NUMBERS = st.one_of(
    st.integers(),
    st.integers(10**399, 10**400),
    st.floats(),
    st.sampled_from([1e308, -1e308, 5e-324, 2.0**53, -(10**400), 1e300, True, None]),
)
VALUES = st.recursive(
    st.one_of(NUMBERS, st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [*EVALUATION, "stage", "step", "loss", "grad_norm_decoder", "context", "token", "gold", "closed"]
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=8)


@settings(deadline=None, max_examples=150)
@given(OBJECTS, st.lists(OBJECTS, max_size=4), st.lists(OBJECTS, max_size=3), OBJECTS)
def test_any_values_give_a_page(tmp_path_factory, evaluation, rows, samples, config):
    path = tmp_path_factory.mktemp("any")
    (path / "samples").mkdir()
    (path / "eval.json").write_text(json.dumps(evaluation))
    (path / "config.json").write_text(json.dumps(config))
    for name, lines in (("metrics.jsonl", rows), ("samples/held_out.jsonl", samples)):
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    Page(render(path))
    Console(file=io.StringIO(), width=80).print(held_out_table(samples, 8))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=60))
def test_any_curve_can_be_drawn(tmp_path_factory, points):
    path = tmp_path_factory.mktemp("curve")
    rows = [{"stage": "rl", "step": step, "grad_norm_encoder": y, "fve": z} for step, y, z in points]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = render(path)
    Page(html)
    coordinates = [
        point for line in re.findall(r'class="(?:line|raw) c\d" d="M([^"]+)"', html) for point in line.split("L")
    ]
    for point in coordinates:
        x, y = map(float, point.split())
        assert 46 <= x <= 330 and 8 <= y <= 146


def nested(depth, opening="[", closing="]"):
    return opening * depth + "1" + closing * depth


@pytest.mark.parametrize("depth", [50, 500, 900, 990])
@pytest.mark.parametrize("ends", [("[", "]"), ('{"a": ', "}")])
def test_what_is_nested_deeply_is_shown_or_named(tmp_path, depth, ends):
    path = workdir(tmp_path / "w")
    deep = nested(depth, *ends)
    (path / "samples/held_out.jsonl").write_text(f'{{"gold": {deep}, "context": {deep}, "cos": {deep}}}\n')
    (path / "eval.json").write_text(f'{{"fve": {deep}, "other": {deep}, "fve_ci95": {deep}}}')
    with (path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"stage": {deep}, "step": {deep}, "loss": {deep}}}\n')
    try:
        Page(render(path))
    except UserError as error:
        assert depth > 500 and str(path) in str(error)


@pytest.mark.parametrize("name", ["eval.json", "config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"fve": ' + "1" * 5000 + "}", "\0", "NaN"])
def test_what_is_no_object_is_named_with_the_remedy(tmp_path, name, text):
    path = workdir(tmp_path / "w")
    (path / name).write_text(text)
    remedy = {"eval.json": "delete it and run `nlae eval` again", "config.json": "restore it"}[name]
    with pytest.raises(UserError, match=f"{name}: .*{remedy}"):
        write_report(path)


@pytest.mark.parametrize("name", ["eval.json", "config.json", "metrics.jsonl", "samples/held_out.jsonl"])
def test_what_may_never_end_is_not_read(tmp_path, name):
    path = workdir(tmp_path / "w")
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(UserError, match=f"{name}: should be a regular file"):
        write_report(path)


@pytest.mark.parametrize("name", ["", " "])
def test_a_workdir_without_a_name_is_none(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--workdir: empty"):
        write_report(name)
    assert os.listdir(tmp_path) == []


def test_many_reports_at_once(tmp_path):
    """As of a person, of a cron job and of the run's end."""
    path = workdir(tmp_path / "w")
    expected = render(path)
    code = (
        "import pathlib, sys; from nlae_jax.report.page import write_report\n"
        "for _ in range(40): write_report(pathlib.Path(sys.argv[1]))"
    )
    root = Path(__file__).parent.parent
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=root, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        _, shown = process.communicate(timeout=600)
        assert process.returncode == 0, shown
    assert (path / "report.html").read_text() == expected
    assert not [name for name in os.listdir(path) if name.endswith(".tmp")]


# --- the suite


def figure(value=0.4, **more):
    return {"value": value, "ci95": [value - 0.1, value + 0.1], "n": 32, "documents": 16, **more}


SUITE = {
    "reconstruction": {
        "fve": figure(controls={"permuted": figure(-0.5)}),
        "fve_by_domain": {"parts": {"<b>novels": figure(0.6), "code": figure(0.2)}},
        "fve_by_token": {"parts": {"content": figure(0.6, controls={"permuted": figure(-0.7)})}},
    },
    "text": {
        "marginal_fve": {"parts": {"1": figure(0.1), "2": figure(0.3)}},
        "fve_tokens": {"parts": {"4": figure(-1)}},
    },
    "meaning": {"loss_recovered": figure(0.7, controls={"zero": figure(-2.0)})},
}


def test_the_suite_is_shown_as_charts_and_as_a_table(tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps(EVALUATION | SUITE))
    page = Page(write_report(tmp_path).read_text())
    for shown in (
        "Is it true?",
        "Against controls",
        "By sentence",
        "In the model's place",
        "By kind of text",
        "By kind of token",
        "sentence 2",
        "4 tokens",
        "<b>novels",
        "content, permuted: −0.700 [−0.800, −0.600]",
    ):
        assert shown in page.text
    # A ring stands beside a part that has a control, and is explained there alone.
    assert page.text.count("Rings: explanations of other texts.") == 1
    assert "0.700 [0.600, 0.800]" in page.text
    table = Console(width=160, file=io.StringIO())
    table.print(suite_table(SUITE))
    assert "meaning: loss_recovered" in table.file.getvalue() and "−2.000" in table.file.getvalue()


def test_what_stands_in_the_order_of_the_alphabet_is_shown_in_that_of_its_meaning(tmp_path):
    cut = {str(n): figure(-0.001) for n in (16, 32, 4, 64, 8)}
    kinds = {"a few": figure(0.1) | {"n": 3}, "many": figure(0.2) | {"n": 30}}
    controls = {name: figure() for name in ("gold", "mean_vector", "permuted", "zero")}
    (tmp_path / "eval.json").write_text(
        json.dumps(
            {
                "text": {"fve_tokens": {"parts": cut}},
                "reconstruction": {"fve": figure(controls=controls), "fve_by_domain": {"parts": kinds}},
            }
        )
    )
    html = write_report(tmp_path).read_text()
    names = re.findall(r'<div class="\w*"><span>([^<]+)</span><span class="track">', html)
    assert [name for name in names if "tokens" in name] == [f"{n} tokens" for n in (4, 8, 16, 32, 64)]
    assert [name for name in names if name in kinds] == ["many", "a few"]
    beside = ["of other texts", "zero", "mean vector", "gold text"]
    assert [name for name in names if name in beside] == beside
    assert "<span>0.00</span>" in html and "<span>−0.00</span>" not in html


def _spaced(directory, evaluation):
    (directory / "eval.json").write_text(json.dumps(evaluation))
    return " ".join(Page(write_report(directory).read_text()).text.split())


def test_figures_of_a_pair_without_a_run_are_a_page_of_their_own(tmp_path):
    about = {"suite": {"pair": "a <pair>", "layer": 3, "num_activations": 4}}
    (tmp_path / "eval.json").write_text(json.dumps({"fve": 0.4, "fve_ci95": [0.3, 0.5]} | SUITE | about))
    page = Page(write_report(tmp_path).read_text())
    assert "a <pair>" in page.text and "block 3" in page.text and "Against controls" in page.text
    assert "may have been trained on it" in _spaced(tmp_path, {"num_activations": 4} | about)
    absent = ("Training", "Configuration", "Not there yet", "Before RL", "held-out activations:")
    assert not [heading for heading in absent if heading in page.text]


def test_without_the_suite_nothing_is_said_of_it(tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps(EVALUATION))
    assert "Is it true?" not in write_report(tmp_path).read_text()


@pytest.mark.parametrize("damaged", [3, "x", None, {"fve": 3}, {"fve": {"value": "x", "controls": 3, "parts": [1]}}])
def test_a_damaged_section_is_no_error(tmp_path, damaged):
    (tmp_path / "eval.json").write_text(json.dumps(EVALUATION | {name: damaged for name in SUITE}))
    Page(write_report(tmp_path).read_text())


def test_a_config_whose_fields_are_sections_is_shown(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": {"a": 1}, "rl": 3}')
    assert "<h4>seed</h4>" in write_report(tmp_path).read_text()
