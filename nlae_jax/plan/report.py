"""Makes the plan of a config for a topology: compiles every step, caches the result, and shows it as a table."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from nlae_jax.config import Config, flatten
from nlae_jax.lm.arch import Arch
from nlae_jax.lm.families import read_hf_config
from nlae_jax.lm.pretrained import TOKENIZER_FILES, cache_directory, resolve_model
from nlae_jax.plan.abstract import STEPS, Planned, make_planned, programs, sft_width
from nlae_jax.plan.advice import advise
from nlae_jax.plan.chips import Topology, open_topology
from nlae_jax.plan.measure import measure
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import read_json, write_json
from nlae_jax.runtime.progress import say

ASSUMPTIONS = (
    "published peaks of compute, main memory and links; in a loop's trip, and outside loops, the three overlap",
    "a float32 product takes as long as six bfloat16 ones",
    "collectives run as rings on the two links of one torus dimension; latency and hosts cost nothing",
    "every response runs to rl.max_new_tokens; vector units cost nothing beside the memory that they read",
)

QUICK_MEMORY = "memory is a lower bound with --quick: the whole program takes more"


def plan(config: Config, topology_name: str, names: Sequence[str] = STEPS, quick: bool = False) -> dict[str, Any]:
    """Returns the numbers of `nlae plan` for the steps `names`.

    A plan that these versions and this code have made before is read from the cache. With `quick`, steps are compiled
    by `plan.schedule`, and memory is a lower bound. Raises UserError for an impossible topology, mesh or batch size.
    """
    if unknown := set(names) - set(STEPS):
        raise UserError(f"--steps: {min(unknown)!r} should be one of {', '.join(STEPS)}")
    path = cache_directory() / "plans" / f"{_key(config, topology_name, names, quick)}.json"
    if path.exists():
        say(f"plan: made before, read from {path}")
        return read_json(path)
    topology = open_topology(topology_name)
    planned = make_planned(config, topology.devices)
    if planned.mesh.size != len(topology.devices):
        raise UserError(
            f"config.mesh: {'×'.join(map(str, planned.mesh.shape.values()))} is not the {len(topology.devices)} "
            f"devices of {topology_name}; mesh.fsdp=-1 takes what is left"
        )
    if planned.assumed:
        say(f"plan: {planned.assumed}")
    steps = {name: measure(name, programs(planned, name), topology, planned, quick) for name in STEPS if name in names}
    header = {**_header(config, planned, topology), "compiled": "as far as the schedule" if quick else "whole"}
    header["assumed"] += [QUICK_MEMORY] * quick
    result = {**header, **_verdict(config, planned, topology, steps)}
    write_json(path, result)
    return result


def _header(config: Config, planned: Planned, topology: Topology) -> dict[str, Any]:
    chip = topology.chip
    return {
        "topology": topology.name,
        "chips": topology.chips,
        "hbm_bytes_per_chip": chip.memory_bytes,
        "peak_flops_per_chip": chip.flops,
        "hbm_bytes_per_second": chip.memory_bandwidth,
        "ici_bytes_per_second": chip.link_bandwidth,
        "model": Path(config.subject.model).name,
        "mesh": dict(planned.mesh.shape),
        "shapes": {**planned.shapes._asdict(), "sft_response": sft_width(config)},
        "settings": {name: flatten(dataclasses.asdict(config))[name] for name in _TELLING},
        "recomputed": recomputed(config.remat, planned.arch),
        "versions": _versions(),
        "assumed": [planned.assumed] * bool(planned.assumed) + list(ASSUMPTIONS),
    }


# The reason why `flops_ratio` exceeds 1, beside padding and the masked half of attention in the fused kernel.
_RECOMPUTED = {
    "none": "the backward pass computes every block's forward pass again",
    "linear": "the backward pass computes attention's scores and what is no matrix product again",
    "dots": "the backward pass computes what is no matrix product again",
}


def recomputed(remat: str, arch: Arch) -> str:
    """Says what the backward pass computes again. "dots" does not keep ragged products, which those of experts are."""
    experts = ", and the products of experts" if arch.experts and remat == "dots" else ""
    return _RECOMPUTED[remat] + experts


_TELLING = (
    *("subject.layer", "subject.dtype", "lora.rank", "lora.experts", "remat", "attention"),
    *("optimizer.moment_dtype", "rl.fused", "rl.microbatches", "sft.microbatches"),
    *("extract.batch_tokens", "extract.max_tokens"),
)


def _verdict(config: Config, planned: Planned, topology: Topology, steps: dict[str, Any]) -> dict[str, Any]:
    sizes, memory = dict(planned.mesh.shape), topology.chip.memory_bytes
    advice = [line for name, step in steps.items() for line in advise(name, step, config, sizes, memory)]
    return {"steps": steps, "fits": all(step["fits"] for step in steps.values()), "advice": advice}


def _versions() -> dict[str, str]:
    versions = {"nlae_jax": importlib.metadata.version("nlae_jax"), "jax": jax.__version__}
    for name in ("libtpu", "libtpu-nightly"):
        try:
            return {**versions, "libtpu": importlib.metadata.version(name)}
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _key(config: Config, topology: str, names: Sequence[str], quick: bool = False) -> str:
    """Returns a hash of everything that the plan depends on."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        source.update(path.read_bytes())
    directory = resolve_model(config.subject.model, weights=False)
    for path in filter(Path.is_file, (directory / name for name in TOKENIZER_FILES)):  # how long prompts are
        source.update(path.name.encode() + path.read_bytes())
    model = read_hf_config(directory)
    telling = [
        flatten(dataclasses.asdict(config)),
        model,
        topology,
        sorted(names),
        quick,
        _versions(),
        source.hexdigest(),
    ]
    return hashlib.sha256(json.dumps(telling, sort_keys=True).encode()).hexdigest()[:24]


def as_table(result: dict[str, Any]) -> Table:
    """Makes a table of the numbers of `plan`."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    memory = result["hbm_bytes_per_chip"]
    table = Table(title=f"{result['model']} on {result['topology']} ({result['chips']} chips), mesh {mesh}")
    columns = ("per chip", "arguments", "temporary", "peak", "of memory", "TFLOP", "of needed", "moved", "sent")
    for column in (*columns, "seconds", "waits for", "MFU"):
        table.add_column(column, justify="left" if column in ("per chip", "waits for") else "right")
    for name, step in result["steps"].items():
        gb = lambda key, step=step: f"{step[key] / 1e9:.1f} GB" if key in step else "–"  # noqa: E731
        share = f"{100 * step['peak_bytes_per_chip'] / memory:.0f} %{'' if step['fits'] else ' !'}"
        cells = [name, gb("argument_bytes"), gb("temporary_bytes"), gb("peak_bytes_per_chip"), share]
        if step["flops_per_chip"] is not None:
            bounds = step["seconds_alone"]
            cells += [f"{step['flops_per_chip'] / 1e12:.2f}", f"{step['flops_ratio']:.2f}×"]
            cells += [gb("hbm_bytes_moved_per_chip"), gb("collective_bytes_per_chip")]
            cells += [f"{step['estimated_seconds']:.3g}", max(bounds, key=bounds.__getitem__)]
            cells += [f"{100 * step['mfu_bound']:.0f} %"]
        table.add_row(*cells)
    sent = [
        f"{name}: "
        + ", ".join(
            f"{kind} over {axes} {amount['bytes'] / 1e9:.2f} GB in {amount['count']}"
            for kind, by_axes in step["collectives"].items()
            for axes, amount in by_axes.items()
        )
        for name, step in result["steps"].items()
        if step.get("collectives")
    ]
    verdict = ["fits" if result["fits"] else "does not fit:", *result["advice"]]
    table.caption, table.caption_justify = (
        "\n".join([*sent, *(f"assumed: {a}" for a in result["assumed"]), *verdict]),
        "left",
    )
    table.title_justify = "left"
    return table
