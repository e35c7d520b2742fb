"""Advises what to change in a config whose steps do not fit, from the numbers of the plan. All functions are pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nlae_jax.config import Config, RlConfig, SftConfig, microbatches

# The share of a chip's memory that a plan may use. The rest is for memory that the compiler does not count (its
# runtime, fragmentation).
_AIM = 0.95


def advise(step: str, numbers: dict[str, Any], config: Config, sizes: dict[str, int], memory: int) -> list[str]:
    """Returns changes as `field=value` with a reason, the cheapest first; none where the step fits.

    `sizes` are those of the mesh's axes. The saving is an estimate, which assumes that microbatches divide all
    temporaries.
    """
    if numbers["fits"]:
        return []
    peak, resident = numbers["peak_bytes_per_chip"], numbers.get("held_bytes", numbers.get("argument_bytes", 0))
    resident += numbers.get("kept_bytes", 0)
    room, temporary = _AIM * memory - resident, max(0, peak - resident)
    over = f"needs {_gb(peak)} of {_gb(memory)} a chip"
    if room <= 0:
        return [
            f"{step} {over}, {_gb(resident)} of it parameters and state: {advice}"
            for advice in _smaller_state(config, sizes, resident / (_AIM * memory))
        ]
    return [
        f"{step} {over}, {_gb(temporary)} of it temporary: {advice}"
        for advice in _smaller_temporaries(step, config, sizes, temporary / room)
    ]


def _smaller_state(config: Config, sizes: dict[str, int], factor: float) -> Iterator[str]:
    """Yields changes that reduce parameters and state, which must shrink by `factor`."""
    if sizes["data"] > 1:
        fsdp = sizes["data"] * sizes["fsdp"]
        yield f"mesh.data=1 mesh.fsdp={fsdp} splits parameters {sizes['data']} times further"
    if config.subject.dtype == "float32":
        yield "subject.dtype=bfloat16 halves frozen weights"
    if not config.lora.rank and config.optimizer.moment_dtype == "float32":
        yield "optimizer.moment_dtype=bfloat16 halves Adam's moments"
    if not config.lora.rank:
        yield "lora.rank=64 lora.alpha=64 trains adapters on one frozen model instead of whole copies"
    devices = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    yield f"a topology of {factor:.1f} times as many chips (about {round(devices * factor + 0.5)}) with mesh.fsdp=-1"


def _smaller_temporaries(step: str, config: Config, sizes: dict[str, int], factor: float) -> Iterator[str]:
    """Yields changes that reduce temporaries, which must shrink by `factor`."""
    if step == "extract":
        tokens = int(config.extract.batch_tokens / factor)
        yield f"extract.batch_tokens={tokens} reads so much less at a time"
        return
    if config.remat != "none":
        yield "remat=none keeps only what enters each block"
    if step == "rl" and config.rl.fused:
        yield "rl.fused=False never holds both roles' gradients"
    name = "rl.activations_per_step" if step == "rl" else "sft.batch_size"
    section: RlConfig | SftConfig = config.rl if step == "rl" else config.sft
    batch = config.rl.activations_per_step if step == "rl" else config.sft.batch_size
    parts = sizes["data"] * sizes["fsdp"]
    fitting = [m for m in range(section.microbatches + 1, batch + 1) if batch % m == 0 and batch // m % parts == 0]
    enough = [m for m in fitting if m >= section.microbatches * factor]
    if enough or fitting:
        count = enough[0] if enough else fitting[-1]
        yield f"{microbatches()[name]}={count} computes {batch // count} of {batch} at a time"
    if not enough:
        if sizes["tensor"] == 1 and sizes["fsdp"] > 1:
            yield f"mesh.fsdp={sizes['fsdp'] // 2} mesh.tensor=2 leaves {batch * 2 // parts} rows to two devices"
        yield f"{name}={max(1, int(batch / factor))} is as much as fits"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
