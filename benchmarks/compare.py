"""Our RL step and warm-start step beside a peer's, in one run on this machine.

    python benchmarks/compare.py [--rank 16] [--response 48] [--rounds 2]
    python benchmarks/compare.py --peer tunix --python OTHER_VENV/bin/python

Runs `nlae bench` and `torch_step.py` or `tunix_step.py` in turn, `rounds` times, and prints medians and ratios. The
peer's interpreter needs torch and transformers, or google-tunix. tunix has no decoder: its step is set against ours
less `score`, which is the decoder's passes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from nlae_jax.config import load_experiment
from nlae_jax.lm.pretrained import resolve_model

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = ROOT / "experiments/bench.py"


def run(*command: str, python: str = sys.executable) -> dict[str, Any]:
    """The JSON object that a command prints last."""
    # What `nlae` sets for itself, so that the peer's memory comes in the same large pages.
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    done = subprocess.run([python, *command], capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def side_by_side(ours: dict[str, Any], theirs: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Our seconds and the peer's of everything that both do, and our step's with and without sharing the prompt."""
    phases = {name: phase["seconds"] for name, phase in ours["phases"].items()}
    step = ours["rl_step_seconds"]
    shared = {name: (phases[name], theirs[name]) for name in ("rollout", "policy", "reference")}
    unshared = {"unshared RL step": (step, ours["rl_step_seconds_unshared"])}
    if "rl_step_without_decoder" in theirs:
        without_decoder = step - phases["score"], theirs["rl_step_without_decoder"]
        return {"RL step without decoder": without_decoder, **shared, **unshared}
    decoder = phases["score"], theirs["reward"] + theirs["decoder"]
    sft = phases["encoder_sft"], theirs["encoder_sft"]
    step_pair = {"RL step": (step, theirs["rl_step"])}
    return {**step_pair, **shared, "score and decoder": decoder, "encoder SFT": sft, **unshared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"rank": 0, "response": 48, "rounds": 2, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peer", choices=("torch", "tunix"), default="torch")
    parser.add_argument("--python", default=sys.executable, help="the peer's interpreter")
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
            "prompt": shapes["prefix"] + shapes["act"],
            "response": shapes["response"],
            "activations": shapes["activations"],
            "group": shapes["group"],
        }
        if options.peer == "torch":
            sizes |= {"layer": config.subject.layer, "slot": shapes["prefix"]}
            sizes |= {"wrap": shapes["wrap"], "sft_batch": shapes["sft_batch"]}
        flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
        script = f"benchmarks/{options.peer}_step.py"
        theirs = run(script, "--model", model, *flags, *repeats, python=options.python)["seconds"]
        rounds.append(side_by_side(ours, theirs))
        fractions = {name: round(phase["peak_fraction"], 3) for name, phase in ours["phases"].items()}
        print(json.dumps({"seconds": rounds[-1], "peak_fraction": fractions}), flush=True)
    for name in rounds[0]:
        mine, other = (statistics.median(r[name][side] for r in rounds) for side in (0, 1))
        ratio = statistics.median(r[name][1] / r[name][0] for r in rounds)
        print(f"{name:24} {mine:8.2f} s {other:8.2f} s {ratio:6.2f}x")


if __name__ == "__main__":
    main()
