"""Draws a mix of training documents in which no domain dominates, for the last stages of the pair.

    python experiments/smollm2/mix.py runs/pair/texts/train runs/pair/mix
    python experiments/smollm2/mix.py runs/pair/texts/train runs/pair/broad_mix --times 4 --seed 6

texts.py holds 12,568 texts of documentation and 879 passages. A plain draw would hardly ever meet a passage.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from texts import write

from nlae_jax.data.corpus import read_json_lines

DOCUMENTS = {
    "documentation": 126,
    "passages": 216,
    "novels": 72,
    "news": 54,
    "fiction": 54,
    "reference": 43,
    "essays": 28,
    "learned": 28,
    "manuals": 36,
    "code": 36,
    "politics": 21,
    "speeches": 21,
    "drama": 21,
}


def draw(texts: Path, out: Path, times: int = 1, seed: int = 5) -> None:
    """Writes `times` `DOCUMENTS` documents of each domain in `texts` to `out`, or all that there are."""
    rng = random.Random(seed)
    for domain, count in DOCUMENTS.items():
        rows = [row for _, row in read_json_lines(texts / f"{domain}.jsonl")]
        drawn = rng.sample(rows, min(times * count, len(rows)))
        write(drawn, out / f"{domain}.jsonl")
        print(json.dumps({"domain": domain, "documents": len(drawn)}))


def main() -> None:
    parser = argparse.ArgumentParser(description="A mix of training documents in which no domain dominates.")
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--times", type=int, default=1, help="how many times as many documents as the table says")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    draw(options.texts, options.out, options.times, options.seed)


if __name__ == "__main__":
    main()
