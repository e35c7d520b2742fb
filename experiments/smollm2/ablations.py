"""Compares short trainings that differ in one setting, on the same validation activations.

    python experiments/smollm2/texts.py runs/pair/texts
    python experiments/smollm2/ablations.py runs/pair/texts --out runs/ablations
    python experiments/smollm2/ablations.py runs/pair/texts --out runs/ablations --only rl --pair runs/pair/after_broad

RL starts from `--pair`, and the warm start from SmolLM2. A pair without RL, as after pair/broad.py, shows more of
what a setting does than the carried pair. Each training has a workdir under `--out`, so the same command goes on after
an interruption. Every setting is trained with each seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mix
from card import GROUPS, drawn, read

from nlae_jax import NLA
from nlae_jax.assets import WARMSTART_NOTES
from nlae_jax.data.corpus import read_json_lines
from nlae_jax.evaluate.claims import claims
from nlae_jax.evaluate.health import health
from nlae_jax.evaluate.reconstruction import fve, variances

SEEDS = (0, 1)
ACTIVATIONS = 32  # of each group of domains
HERE = Path(__file__).parent
WARM_START = {
    "template": (("pair/base.py", {}),),
    "describer": (("pair/base.py", {"describe.provider": "describer"}),),
    "written notes": (("pair/notes.py", {}),),
    "template, then written notes": (("pair/base.py", {}), ("pair/notes.py", {})),
}
WARM_START_STEPS = {"sft.encoder_steps": 60, "sft.decoder_steps": 40}  # of all stages of a setting together
WARM_START_COMMON = {
    "corpus.max_documents": 200,
    "sft.encoder_learning_rate": 3e-3,
    "sft.decoder_learning_rate": 2e-3,
    "sft.max_response_tokens": 64,
}
RL: dict[str, dict[str, Any]] = {
    "neg_mse": {},
    "neg_log_mse": {"rl.reward": "neg_log_mse"},
    "half contrastive": {"rl.contrastive": 0.5},
    "length penalty 0.001": {"rl.length_penalty": 0.001},
    "no charge on repeats": {"rl.repeat_penalty": 0.0},
}
RL_STEPS = {
    "rl.num_steps": 12,
    "rl.activations_per_step": 8,
    "corpus.max_documents": 100,
    "extract.positions_per_document": 4,
}
COLUMNS = ("fve", "fve_shuffled", "candidates_hold_top1", "ending_in_context", "repeated_rate", "distinct_2")


class Training(NamedTuple):
    """One `nlae train`: its experiment file, what it changes, and the pair that it starts from."""

    name: str
    experiment: str
    changes: dict[str, Any]
    after: str = ""


def trainings(kind: str, seed: int) -> Iterator[tuple[str, list[Training]]]:
    """Yields each setting of the warm start or of RL with its trainings, in order."""
    if kind == "rl":
        for setting, changes in RL.items():
            yield setting, [Training(directory(setting, seed), "pair/rl_cooler.py", RL_STEPS | changes)]
        return
    for setting, stages in WARM_START.items():
        share = {name: count // len(stages) for name, count in WARM_START_STEPS.items()}
        yield (
            setting,
            [
                Training(
                    directory(setting, seed) + (f"_{number}" if len(stages) > 1 else ""),
                    experiment,
                    WARM_START_COMMON | share | changes,
                    f"{directory(setting, seed)}_{number - 1}" if number else "",
                )
                for number, (experiment, changes) in enumerate(stages)
            ],
        )


def directory(setting: str, seed: int) -> str:
    return setting.replace(", ", "_").replace(" ", "_") + f"_{seed}"


def trained(texts: Path, out: Path, training: Training, start: str, seed: int) -> Path:
    """Trains and exports a pair, unless that is done already, and returns its directory. RL begins with `start`."""
    pair = out / "pairs" / training.name
    if (pair / "ar").exists():
        return pair
    changes = training.changes | {"seed": seed, "eval.num_activations": 8}
    if "notes" in training.experiment:
        changes |= {"corpus.path": str(notes_of_training(texts, out)), "corpus.max_documents": None}
        changes["describe.path"] = changes["corpus.path"]
    elif "rl" in training.experiment:
        changes |= {"corpus.path": f"{mixed(texts, out)}/*.jsonl", "init.pair": start}
    else:
        changes["corpus.path"] = f"{texts}/train/*.jsonl"
    if training.after:
        changes["init.pair"] = str(out / "pairs" / training.after)
    overrides = [f"--config.{name}={value}" for name, value in changes.items()]
    workdir = out / training.name
    stage = "train" if "rl" in training.experiment else "sft"
    run("nlae", stage, "--config", str(HERE / training.experiment), "--workdir", str(workdir), *overrides)
    run("nlae", "export", "--workdir", str(workdir), "--out", str(pair), "--adapters", "--dtype", "float32")
    return pair


def notes_of_training(texts: Path, out: Path) -> Path:
    """Writes the notes whose passages are training texts to a JSONL file, and returns its path."""
    file = out / "notes.jsonl"
    passages = {row["id"] for _, row in read_json_lines(texts / "train/passages.jsonl")}
    rows = [row for _, row in read_json_lines(WARMSTART_NOTES) if row["passage"] in passages]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def mixed(texts: Path, out: Path) -> Path:
    """Draws the documents of mix.py, unless that is done already, and returns their directory."""
    directory = out / "mix"
    if not directory.exists():
        unfinished = out / "mix.unfinished"
        mix.draw(texts / "train", unfinished)
        unfinished.rename(directory)
    return directory


def run(*command: str) -> None:
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def measured(pair: Path, texts: Path, seed: int) -> dict[str, float]:
    """Measures the figures of `COLUMNS` on validation activations of all groups. Explanations have temperature 0.6."""
    nla = NLA.from_pretrained(str(pair))
    places = [place for domains in GROUPS.values() for place in drawn(nla, texts, domains, ACTIVATIONS)]
    h_NxD, expected = read(nla, places)
    written = nla.explain(h_NxD, 0.6, 64, seed)
    contexts = [place.context.text for place in places]
    other = [*range(ACTIVATIONS, len(places)), *range(ACTIVATIONS)]  # of another group
    shares = health(written, nla.protocol.marker) | claims(written, contexts, expected, other)
    variance = variances(h_NxD)
    errors = {"fve": written, "fve_shuffled": [written[index] for index in other]}
    return shares | {name: fve(nla.score_written(texts, h_NxD)[0], variance) for name, texts in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="directory with train/ and validation/, which texts.py makes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pair", default="smollm2-135m", help="the pair that RL starts from")
    parser.add_argument("--only", choices=("warm_start", "rl"), help="only these settings")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "ablations.json"
    results: dict[str, list[dict[str, float]]] = json.loads(file.read_text()) if file.exists() else {}
    for seed in SEEDS:
        for kind in [options.only] if options.only else ["rl", "warm_start"]:
            for setting, stages in trainings(kind, seed):
                if len(results.get(setting, [])) > seed:
                    continue
                pair = [trained(options.texts, options.out, stage, options.pair, seed) for stage in stages][-1]
                found = measured(pair, options.texts / "validation", seed)
                results.setdefault(setting, []).append(found)
                file.write_text(json.dumps(results, indent=1))
    print("| setting | " + " | ".join(COLUMNS) + " |\n|---" + "|---" * len(COLUMNS) + "|")
    for setting, seeds in results.items():
        cells = [", ".join(f"{found[name]:.3f}" for found in seeds) for name in COLUMNS]
        print(f"| {setting} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
