"""Draws a mix of training documents in which no domain dominates, for the last reinforcement learning of the pair.

    python experiments/smollm2/mix.py runs/pair/texts/train runs/pair/mix

texts.py holds 12,568 texts of documentation and 879 passages. A plain draw would hardly ever meet a passage.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from texts import write

from nlae_jax.data.corpus import read_json_lines

SEED = 5
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


def main(texts: Path, out: Path) -> None:
    """Writes `DOCUMENTS` documents of each domain in `texts` to `out`."""
    rng = random.Random(SEED)
    for domain, count in DOCUMENTS.items():
        rows = [row for _, row in read_json_lines(texts / f"{domain}.jsonl")]
        drawn = rng.sample(rows, min(count, len(rows)))
        write(drawn, out / f"{domain}.jsonl")
        print(json.dumps({"domain": domain, "documents": len(drawn)}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
