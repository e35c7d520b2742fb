"""Prints the plans of this directory as the tables of docs/pods.md: python experiments/plans/table.py"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def row(plan: dict[str, Any]) -> str:
    rl, memory = plan["steps"]["rl"], plan["hbm_bytes_per_chip"]
    peak = max(step["peak_bytes_per_chip"] for step in plan["steps"].values())
    training = f"LoRA {plan['settings']['lora.rank']}" if plan["settings"]["lora.rank"] else "full"
    mesh = "×".join(str(size) for size in plan["mesh"].values())
    least = "at least " if plan.get("compiled", "whole") != "whole" else ""
    cells = [
        f"{plan['model']}, {training}",
        plan["topology"],
        mesh,
        f"{least}{peak / 1e9:.0f} of {memory / 1e9:.0f} GB",
        f"{rl['estimated_seconds']:.1f} s",
        f"{100 * rl['mfu_bound']:.0f} %",
        f"{rl['flops_ratio']:.2f}",
        f"{rl['collective_bytes_per_chip'] / 1e9:.0f} GB",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print("| model | slice | mesh | memory | RL step, at least | MFU, at most | FLOPs / needed | sent |")
    print("|---|---|---|---|---|---|---|---|")
    for path in sorted(HERE.glob("*.json")):
        print(row(json.loads(path.read_text(encoding="utf-8"))))
    scaling = [json.loads(path.read_text(encoding="utf-8")) for path in HERE.glob("weak-scaling/*.json")]
    scaling.sort(key=lambda plan: plan["chips"])
    sent = [f"{plan['steps']['rl']['collective_bytes_per_chip'] / 1e9:.0f} GB" for plan in scaling]
    print(f"\n| chips of v5p | {' | '.join(str(plan['chips']) for plan in scaling)} |")
    print("|---" * (len(scaling) + 1) + "|")
    print(f"| sent by each | {' | '.join(sent)} |")


if __name__ == "__main__":
    main()
