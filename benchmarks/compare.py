"""Our RL step and warm-start step beside the PyTorch peer's, in one run on this machine.

    python benchmarks/compare.py [--rank 16] [--response 48] [--rounds 2]

Runs `nlae bench` and `torch_step.py` in turn, `rounds` times, and prints medians and ratios. Needs torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from nlae_jax.config import load_experiment
from nlae_jax.lm.pretrained import resolve_model

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = ROOT / "experiments/bench.py"


def run(*command: str) -> dict[str, Any]:
    """The JSON object that a command prints last."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"rank": 0, "response": 48, "rounds": 2, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    config = load_experiment(str(EXPERIMENT))
    model = str(resolve_model(config.subject.model))
    overrides = [f"--config.lora.rank={options.rank}", f"--config.rl.max_new_tokens={options.response}"]
    repeats = ["--repeats", str(options.repeats)]
    rounds = []
    for _ in range(options.rounds):
        ours = run("-m", "nlae_jax", "bench", "--config", str(EXPERIMENT), "--json", *repeats, *overrides)
        shapes = ours["shapes"]
        sizes = {
            "rank": options.rank,
            "layer": config.subject.layer,
            "prompt": shapes["prefix"] + shapes["act"],
            "slot": shapes["prefix"],
            "wrap": shapes["wrap"],
            "response": shapes["response"],
            "activations": shapes["activations"],
            "group": shapes["group"],
            "sft_batch": shapes["sft_batch"],
        }
        flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
        theirs = run("benchmarks/torch_step.py", "--model", model, *flags, *repeats)["seconds"]
        phases = {name: phase["seconds"] for name, phase in ours["phases"].items()}
        rounds.append(
            {
                "RL step": (ours["rl_step_seconds"], theirs["rl_step"]),
                "rollout": (phases["rollout"], theirs["rollout"]),
                "policy": (phases["policy"], theirs["policy"]),
                "reference": (phases["reference"], theirs["reference"]),
                "score and decoder": (phases["score"], theirs["reward"] + theirs["decoder"]),
                "encoder SFT": (phases["encoder_sft"], theirs["encoder_sft"]),
                "unshared RL step": (ours["rl_step_seconds"], ours["rl_step_seconds_unshared"]),
            }
        )
        fractions = {name: round(phase["peak_fraction"], 3) for name, phase in ours["phases"].items()}
        print(json.dumps({"seconds": rounds[-1], "peak_fraction": fractions}), flush=True)
    for name in rounds[0]:
        mine, other = (statistics.median(r[name][side] for r in rounds) for side in (0, 1))
        ratio = statistics.median(r[name][1] / r[name][0] for r in rounds)
        print(f"{name:18} {mine:8.2f} s {other:8.2f} s {ratio:6.2f}x")


if __name__ == "__main__":
    main()
