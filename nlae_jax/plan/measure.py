"""Compiles a step for a topology and measures the memory and work that it takes on each chip."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nlae_jax.bench.flops import block_flops, needed_flops
from nlae_jax.mesh import batch_parts
from nlae_jax.plan.abstract import Planned, Program, read_shape, resident_bytes, sft_width
from nlae_jax.plan.chips import UNITS, Topology, alone_seconds, nothing_kept, seconds
from nlae_jax.plan.cost import Cost, cost_of
from nlae_jax.plan.hlo import parse
from nlae_jax.plan.schedule import scheduled
from nlae_jax.runtime.progress import say

# The compiler's messages for a program that needs too much memory: for temporaries, or in all.
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LOOPS_SHOWN = 8
# Numbers that are unknown where the compiler refuses a program.
_UNKNOWN = ("flops_per_chip", "hbm_bytes_moved_per_chip", "collective_bytes_per_chip", "estimated_seconds")
_SUMMED = ("flops_per_chip", "moved_per_chip", "collective_bytes_per_chip", "_seconds")  # over a step's programs


def needed(planned: Planned) -> dict[str, float]:
    """Returns the FLOPs that the mathematics of each step needs on all devices (`bench.flops.needed_flops`)."""
    config, arch, shapes, layer = planned.config, planned.arch, planned.shapes, planned.config.subject.layer
    flops_of = partial(needed_flops, arch, layer, config.lora.rank)
    described = shapes._replace(response=sft_width(config))
    rl = flops_of(shapes)
    size, width = read_shape(config, batch_parts(planned.mesh))
    of_blocks = lambda depth: depth * size * block_flops(arch.truncated(depth), width, width * (width + 1) / 2)  # noqa: E731
    read = of_blocks(layer + 1)
    if config.describe.provider == "template":
        rows = size * config.extract.positions_per_document
        read = of_blocks(arch.num_layers) + 2.0 * rows * arch.d_model * arch.vocab_size
    return {
        "extract": read,
        "encoder_sft": flops_of(described)["encoder_sft"],
        "decoder_sft": flops_of(described._replace(activations=shapes.sft_batch, group=1))["score"],
        "rl": sum(rl[phase] for phase in ("rollout", "score", "policy", *["reference"] * bool(config.rl.kl_coef))),
    }


def measure(
    name: str, programs: Sequence[Program], topology: Topology, planned: Planned, quick: bool = False
) -> dict[str, Any]:
    """Returns one step's numbers per chip. A step of several programs has the sum of their work and their highest peak.

    With `quick`, programs are compiled by `plan.schedule`, without machine code.
    """
    parts = []
    with nothing_kept():
        for index, program in enumerate(programs):
            compiled = partial(_scheduled, planned, topology, name, index) if quick else partial(_whole, program)
            parts.append(_program(name, program, topology, planned, compiled))
    numbers = parts[0] if len(parts) == 1 else _joined(parts, [program.name for program in programs])
    flops, work = needed(planned)[name] / topology.chips, numbers.get("flops_per_chip")
    numbers["needed_flops_per_chip"] = flops
    if work is not None:
        numbers["flops_ratio"] = work / flops
        numbers["mfu_bound"] = flops / topology.chip.flops / numbers["estimated_seconds"]
    return {**dict.fromkeys(_UNKNOWN), **numbers}


# A module's text, and the bytes of a device's main memory by their use.
Compiled = tuple[str, dict[str, int]]


def _program(
    step: str, program: Program, topology: Topology, planned: Planned, compiled: Callable[[], Compiled]
) -> dict[str, Any]:
    per_chip, limit = topology.devices_per_chip, topology.chip.usable_bytes
    begin = time.perf_counter()
    resident = resident_bytes((program.arguments, program.kept))
    try:
        text, sizes = compiled()
    except RuntimeError as error:  # also jax's own error, a subclass
        if (needed := needed_memory(str(error), resident)) is None:
            raise
        say(f"plan: {step} ({program.name}): needs {needed * per_chip / 1e9:.1f} of {limit / 1e9:.1f} GB a chip")
        return {"fits": False, "peak_bytes_per_chip": needed * per_chip, "held_bytes": resident * per_chip}
    compiling = time.perf_counter() - begin
    cost = cost_of(parse(text), dict(planned.mesh.shape), planned.config.rl.max_new_tokens)
    # The devices hold more than the arguments counted here, because jit leaves out arguments that are not read.
    sizes["kept_bytes"] = max(0, resident - sizes["argument_bytes"])
    peak = sum(sizes.values()) - 2 * sizes["reused_bytes"]
    say(
        f"plan: {step} ({program.name}): {peak * per_chip / 1e9:.1f} of {limit / 1e9:.1f} GB a chip; "
        f"compiled in {compiling:.0f} s"
    )
    return {
        "peak_bytes_per_chip": peak * per_chip,
        "fits": peak * per_chip <= limit,
        **{name: size * per_chip for name, size in sizes.items()},
        **work(cost, topology),
        "compile_seconds": round(compiling, 1),
    }


def _whole(program: Program) -> Compiled:
    compiled, text = _compiled(program.function.lower(*program.arguments))
    memory = compiled.memory_analysis()
    return text, {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "reused_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }


def _scheduled(planned: Planned, topology: Topology, step: str, index: int) -> Compiled:
    program = scheduled(planned.config, topology.name, step, index)
    sizes = {"argument_bytes": program.argument_bytes, "temporary_bytes": program.temporary_bytes}
    return program.text, {**dict.fromkeys(("output_bytes", "reused_bytes", "code_bytes"), 0), **sizes}


def needed_memory(message: str, resident: int) -> int | None:
    """Returns the bytes that a program needs according to the compiler's refusal; None for other errors.

    The message names only temporaries, or all bytes in use. `resident` are the bytes of the arguments.
    """
    if temporaries := _TEMPORARIES.search(message):
        return resident + int(float(temporaries[1]) * _UNITS[temporaries[2]])
    used = _USED.search(message)
    return int(float(used[1]) * _UNITS[used[2]]) if used else None


def _compiled(lowered: Any) -> tuple[Any, str]:
    """Compiles a program and returns it with its module's text.

    The TPU compiler itself writes the text: the module that it returns for `as_text` may hold instructions that
    jaxlib's XLA cannot read (several collectives in one). The names of its files are not documented, so `as_text` is
    used where none is found.
    """
    with tempfile.TemporaryDirectory(prefix="nlae-plan-") as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        texts = [path.read_text(encoding="utf-8") for path in Path(directory).glob("*.after_codegen.txt")]
    return compiled, max(texts, key=len, default="") or compiled.as_text()


def work(cost: Cost, topology: Topology) -> dict[str, Any]:
    """Returns the work of a chip, and the least time that it takes."""
    per_chip, sums, device = topology.devices_per_chip, cost.total(), topology.device
    times = seconds(cost, device)
    collectives: dict[str, dict[str, Any]] = {}
    for (kind, axes), (count, size) in sorted(sums.collectives.items()):
        collectives.setdefault(kind, {})[axes] = {"count": round(count), "bytes": round(size * per_chip)}
    loops: list[dict[str, Any]] = [
        {
            "name": name or "outside loops",
            "trips": trips,
            "seconds": trips * max(by_unit.values()),
            "bound": max(by_unit, key=by_unit.__getitem__),
            "flops": trips * part.flops * per_chip,
            "hbm_bytes": trips * part.bytes * per_chip,
            "collective_bytes": trips * part.sent * per_chip,
        }
        for name, trips, part in cost.flattened()
        for by_unit in [alone_seconds(part, device)]
    ]
    return {
        "flops_per_chip": sums.flops * per_chip,
        "kernel_flops_per_chip": sums.kernel_flops * per_chip,
        "hbm_bytes_moved_per_chip": round(sums.bytes * per_chip),
        "collective_bytes_per_chip": round(sums.sent * per_chip),
        "collectives": collectives,
        "estimated_seconds": times.pop("step"),
        "seconds_alone": times,
        "loops": sorted(loops, key=lambda loop: -loop["seconds"])[:_LOOPS_SHOWN],
    }


def _joined(parts: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Joins the numbers of a step's programs: the highest peak, the sum of all work, and each under `parts`."""
    step = dict(max(parts, key=lambda part: part["peak_bytes_per_chip"]))
    step["fits"] = all(part["fits"] for part in parts)
    step["parts"] = dict(zip(names, parts, strict=True))
    summed = [name for name, value in step.items() if name.endswith(_SUMMED) and isinstance(value, int | float)]
    if not all("flops_per_chip" in part for part in parts):
        return {name: step[name] for name in ("fits", "peak_bytes_per_chip", "held_bytes", "parts") if name in step}
    for name in summed:
        step[name] = sum(part[name] for part in parts)
    step["seconds_alone"] = {unit: sum(part["seconds_alone"][unit] for part in parts) for unit in UNITS}
    step["collectives"] = {}
    for part in parts:
        for kind, by_axes in part["collectives"].items():
            for axes, amount in by_axes.items():
                known = step["collectives"].setdefault(kind, {}).setdefault(axes, {"count": 0, "bytes": 0})
                known["count"], known["bytes"] = known["count"] + amount["count"], known["bytes"] + amount["bytes"]
    loops = [loop for part in parts for loop in part["loops"]]
    step["loops"] = sorted(loops, key=lambda loop: -loop["seconds"])[:_LOOPS_SHOWN]
    return step
