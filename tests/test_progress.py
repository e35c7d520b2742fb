"""The progress line: its numbers, how often it is written, and that all of it goes to stderr."""

import io
import sys

import numpy as np
import pytest

from nlae_jax.runtime.progress import Progress, clock_text, metric_text, progress, rate_text, say, warn


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def tick(self, seconds):
        self.now += seconds


def run(clock, total=40, start=0, name="rl", unit="step"):
    return Progress(total, name, unit, start, clock)


def test_the_pace_leaves_out_the_first_units_compilation(capsys):
    clock = Clock()
    with run(clock) as bar:
        clock.tick(60)  # the first unit compiles
        bar.advance(fve=-0.3)
        assert bar.seconds_per_unit() is None
        for _ in range(11):
            clock.tick(3.1)
            bar.advance(fve=0.12)
        assert bar.seconds_per_unit() == pytest.approx(3.1)
        assert bar.line() == "rl 12/40  3.1 s/step  1:27 left  fve 0.12"
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "rl 1/40  1:00 elapsed  fve -0.3"
    assert err.splitlines()[-1] == "rl 12/40  3.1 s/step  1:34 elapsed  fve 0.12"


def test_units_done_by_an_earlier_run_do_not_count_as_pace(capsys):
    clock = Clock()
    with run(clock, start=10, total=20) as bar:
        for _ in range(4):
            clock.tick(2)
            bar.advance()
        assert bar.line() == "rl 14/20  2.0 s/step  0:12 left"


def test_the_pace_is_that_of_the_recent_units(capsys):
    clock = Clock()
    with run(clock, total=200) as bar:
        for seconds in [9.0] * 30 + [1.5] * 30:
            clock.tick(seconds)
            bar.advance()
        assert bar.seconds_per_unit() == pytest.approx(1.5)


def test_a_log_gets_a_line_every_ten_seconds_at_most(capsys):
    clock = Clock()
    with run(clock, total=300) as bar:
        for _ in range(300):
            clock.tick(0.25)
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 7 + 1  # the first call, seven times ten seconds, the end
    assert lines[-1] == "rl 300/300  4.0 step/s  1:15 elapsed"


def test_several_units_a_call_and_an_unknown_total(capsys):
    clock = Clock()
    with run(clock, total=None, name="extract", unit="document") as bar:
        for _ in range(3):
            clock.tick(0.5)
            bar.advance(250)
    assert capsys.readouterr().err.splitlines()[-1] == "extract 750 document  500 document/s  0:02 elapsed"


def test_an_error_passes_and_leaves_the_last_state(capsys):
    clock = Clock()
    with pytest.raises(KeyError), run(clock) as bar:
        bar.advance(3)
        clock.tick(1)
        raise KeyError("x")
    assert capsys.readouterr().err.splitlines()[-1].startswith("rl 3/40")


def test_no_work_at_all(capsys):
    with progress(0, "sft"):
        pass
    assert capsys.readouterr().err == "sft 0/0  0:00 elapsed\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (87, "1:27"), (3600, "1:00:00"), (-1, "0:00")]
)
def test_clock_text(seconds, text):
    assert clock_text(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.14, "3.1 s/step"), (1.0, "1.0 s/step"), (0.08, "12.5 step/s"), (5e-4, "2,000 step/s")]
)
def test_rate_text(seconds, text):
    assert rate_text(seconds, "step") == text


def test_metric_text():
    metrics = {"fve": np.float32(0.12345), "rows": 12000, "kl": None, "phase": "[a]", "lr": 1e-5, "n": np.int64(3)}
    assert metric_text(metrics) == "fve 0.123  rows 12,000  kl –  phase [a]  lr 1e-05  n 3"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_on_stderr(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress(40, "rl", start=12) as bar:
        say("resumed at step 12")
        bar.advance(fve=0.12, note="[red]")
    shown = terminal.getvalue()
    assert "13/40" in shown and "fve 0.12" in shown and "[red]" in shown and "resumed at step 12" in shown
    assert sys.stderr is terminal  # rich gave it back
    assert capsys.readouterr().out == ""


def test_in_a_narrow_terminal_only_the_metrics_give_way(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    with progress(40, "rl") as bar:
        bar.advance(40, fve=0.12, **{f"metric_{n}": n for n in range(9)})
    shown = terminal.getvalue()
    assert "40/40" in shown and "rl" in shown and "fve 0.12" in shown and "metric_8" not in shown


def test_say_and_warn(monkeypatch, capsys):
    say("reading 3 files")
    warn("layer 21 of 22")
    assert capsys.readouterr() == ("", "reading 3 files\nwarning: layer 21 of 22\n")
    monkeypatch.setattr(sys, "stderr", Terminal())
    warn("careful")
    assert sys.stderr.getvalue() == "\x1b[33mwarning:\x1b[0m careful\n"


class Broken(io.StringIO):
    """A stderr that takes nothing: a full disk, a terminal that is gone."""

    def __init__(self, terminal):
        super().__init__()
        self._terminal = terminal

    def isatty(self):
        return self._terminal

    def write(self, text):
        raise OSError(5, "Input/output error")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize(
    "stream", [None, closed(), Broken(False), Broken(True), io.TextIOWrapper(io.BytesIO(), "ascii")]
)
def test_what_cannot_be_said_ends_no_work(monkeypatch, capsys, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with progress(3, "rl") as bar:
        say("é «»")
        warn("é «»")
        for _ in range(3):
            bar.advance(note="é")
    assert bar.done == 3
    assert capsys.readouterr().out == ""
