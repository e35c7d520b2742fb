"""The metrics log: exact floats, and no kill, at any byte, that a resumed run does not repair."""

import json
import math
import os
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlae_jax.runtime.errors import UserError
from nlae_jax.train.metrics import MetricsLog, read

FINITE = st.floats(allow_nan=False, allow_infinity=False)
NOTES = st.text(st.characters(exclude_categories=("Cs",)), max_size=4)
ROWS = st.lists(st.tuples(st.sampled_from(["encoder_sft", "rl"]), FINITE, NOTES), max_size=6)


def write(path, rows):
    log = MetricsLog(path)
    for row in rows:
        log.append(row)
    return log


def numbered(values):
    """Rows whose step counts up within each stage, from 1."""
    steps = {}
    rows = []
    for stage, loss, note in values:
        steps[stage] = steps.get(stage, 0) + 1
        rows.append({"stage": stage, "step": steps[stage], "loss": loss, "note": note})
    return rows


@settings(deadline=None, max_examples=60)
@given(ROWS)
def test_rows_come_back_exactly(values):
    rows = numbered(values)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "metrics.jsonl"
        write(path, rows)
        assert read(path) == rows


@settings(deadline=None, max_examples=80)
@given(ROWS, st.data())
def test_a_kill_at_any_byte_leaves_the_rows_before_it(values, data):
    rows = numbered(values)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "metrics.jsonl"
        write(path, rows)
        whole = path.read_bytes() if path.exists() else b""
        cut = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:cut])

        # A row counts once its closing brace is there; only its newline may be missing.
        survived, end = 0, 0
        for line in whole.splitlines(keepends=True):
            end += len(line)
            survived += end - 1 <= cut
        assert read(path) == rows[:survived]

        # The next writer starts on a line of its own.
        log = MetricsLog(path)
        log.append({"stage": "rl", "step": 99})
        assert read(path) == [*rows[:survived], {"stage": "rl", "step": 99}]


@settings(deadline=None, max_examples=80)
@given(st.lists(FINITE, min_size=1, max_size=6), st.data())
def test_resuming_after_a_kill_gives_the_uninterrupted_bytes(losses, data):
    before = [{"stage": "decoder_sft", "step": step, "loss": 0.5} for step in (1, 2, 900)]
    rows = [{"stage": "rl", "step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "metrics.jsonl"
        write(path, before + rows)
        whole = path.read_bytes()
        restored = data.draw(st.integers(0, len(rows)))  # the step of the last checkpoint
        kept = b"".join(whole.splitlines(keepends=True)[: len(before) + restored])
        path.write_bytes(whole[: data.draw(st.integers(len(kept), len(whole)))])

        log = MetricsLog(path)
        log.rewind("rl", restored)
        assert path.read_bytes() == kept
        for row in rows[restored:]:
            log.append(row)
        assert path.read_bytes() == whole


@settings(deadline=None, max_examples=60)
@given(ROWS, st.sampled_from(["encoder_sft", "rl", "other"]), st.integers(-1, 7))
def test_rewind_keeps_other_stages_and_can_be_repeated(values, stage, step):
    rows = numbered(values)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "metrics.jsonl"
        log = write(path, rows)
        for _ in range(2):
            log.rewind(stage, step)
            assert read(path) == [row for row in rows if row["stage"] != stage or row["step"] <= step]
        assert os.listdir(directory) in ([], ["metrics.jsonl"])


def test_rewind_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = write(path, [{"stage": "rl", "step": step} for step in range(4)])
    before = path.read_bytes()

    def die(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="no space"):
        log.rewind("rl", 1)
    assert path.read_bytes() == before
    monkeypatch.undo()
    log.rewind("rl", 1)  # what the first try left behind is no obstacle
    assert len(read(path)) == 2
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_array_scalars_and_numbers_that_json_lacks(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    row = {"stage": "rl", "step": np.int64(3), "loss": jnp.float32(0.1), "kl": np.float64(0.2), "ok": np.bool_(True)}
    log.append(row | {"fve": math.nan, "reward_mean": jnp.float32(-math.inf), "by_group": [1.0, math.inf]})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "stage": "rl",
        "step": 3,
        "loss": float(np.float32(0.1)),
        "kl": 0.2,
        "ok": True,
        "fve": None,
        "reward_mean": None,
        "by_group": [1.0, None],
    }


@pytest.mark.parametrize("row", [{"step": 1}, {"stage": "rl"}, {"stage": "rl", "step": 1.5}, {"stage": 1, "step": 1}])
def test_a_row_names_its_stage_and_step(tmp_path, row):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="stage"):
        log.append(row)
    assert read(log.path) == []


def test_damage_before_the_last_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "rl", "step": 1}\n{"stage": "r\n{"stage": "rl", "step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read(path)
    with pytest.raises(UserError, match="line 2"):
        MetricsLog(path)


def test_no_file_is_no_rows(tmp_path):
    assert read(tmp_path / "absent.jsonl") == []


def test_rows_of_a_stage_that_is_done_again_stand_in_its_place(tmp_path):
    """Say because its checkpoints were damaged after later stages had run."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"stage": stage, "step": step} for stage in ("encoder_sft", "decoder_sft", "rl") for step in (1, 2, 3)]
    log = write(path, rows)
    whole = path.read_bytes()
    for stage, step in (("encoder_sft", 0), ("decoder_sft", 1), ("encoder_sft", 2), ("rl", 0)):
        log.rewind(stage, step)
        for row in rows:
            if row["stage"] == stage and row["step"] > step:
                log.append(row)
        log.sort()
        assert path.read_bytes() == whole


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["rl", "toy", "encoder_sft", "decoder_sft", "other"]), max_size=12))
def test_sorting_keeps_every_row_and_the_order_within_a_stage(stages):
    rows = [{"stage": stage, "step": number} for number, stage in enumerate(stages)]
    with tempfile.TemporaryDirectory() as directory:
        log = write(Path(directory) / "metrics.jsonl", rows)
        log.sort()
        found = read(log.path)
    order = ["encoder_sft", "decoder_sft", "rl"]
    assert [row for row in found if row["stage"] in order] == sorted(
        (row for row in rows if row["stage"] in order), key=lambda row: (order.index(row["stage"]), row["step"])
    )
    assert [row for row in found if row["stage"] not in order] == [row for row in rows if row["stage"] not in order]


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5000, '{"a": ' * 5000, "[]", "null", "\0"])
def test_lines_that_are_no_rows(tmp_path, line):
    """In the middle they are damage; at the end, a row that was never written."""
    path, row = tmp_path / "metrics.jsonl", '{"stage": "rl", "step": 1}'
    path.write_text(f"{row}\n{line}\n{row}\n")
    with pytest.raises(UserError, match="line 2: not a JSON object"):
        read(path)
    path.write_text(f"{row}\n{line}")
    assert read(path) == [{"stage": "rl", "step": 1}]


def test_a_log_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: should be a regular file"):
        read(tmp_path / "metrics.jsonl")
