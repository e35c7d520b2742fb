"""What the plan says to change: the field and the value, from the numbers."""

from nlae_jax.plan.advice import advise
from tests.conftest import tiny_config

GB = 10**9
SIZES = {"data": 1, "fsdp": 8, "tensor": 1}


def advice(step="rl", peak=120, held=40, sizes=SIZES, **overrides):
    config = tiny_config(rl__activations_per_step=64, sft__batch_size=256, **overrides)
    numbers = {"fits": peak <= 95, "peak_bytes_per_chip": peak * GB, "held_bytes": held * GB}
    return advise(step, numbers, config, sizes, 95 * GB)


def test_what_fits_is_left_alone():
    assert advice(peak=90) == []


def test_microbatches_are_as_many_as_are_needed():
    lines = advice(peak=250, held=40, remat="none", rl__fused=False)
    assert "rl.microbatches=8 computes 8 of 64" in lines[0]
    assert "250.0 GB of 95.0 GB a chip, 210.0 GB of it temporary" in lines[0]
    assert "sft.microbatches=2 computes 128 of 256" in advice("encoder_sft", remat="none", peak=120)[0]


def test_cheaper_changes_come_first():
    lines = advice()
    assert "remat=none" in lines[0]
    assert "rl.fused=False" in lines[1]
    assert "rl.microbatches=2" in lines[2]


def test_when_parts_cannot_be_smaller_rows_are_shared():
    lines = advice(peak=400, held=80, remat="none", rl__fused=False, rl__microbatches=8)
    assert "mesh.fsdp=4 mesh.tensor=2" in lines[0]
    assert "rl.activations_per_step=" in lines[1]


def test_state_that_is_too_large_is_split_or_shrunk():
    lines = advice(peak=200, held=180, sizes={"data": 2, "fsdp": 4, "tensor": 1}, lora__rank=0)
    assert "mesh.data=1 mesh.fsdp=8" in lines[0]
    assert "subject.dtype=bfloat16" in lines[1]
    assert "optimizer.moment_dtype=bfloat16" in lines[2]
    assert "lora.rank=64" in lines[3]
    assert "2.0 times as many chips (about 16)" in lines[4]


def test_extraction_reads_less_at_a_time():
    (line,) = advice("extract", peak=110, held=20)
    assert "extract.batch_tokens=" in line
