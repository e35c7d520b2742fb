"""A whole run on the tiny model, made once per session; for the tests that look at workdirs and commands.

A plugin: a test module says `pytest_plugins = ["tests.tiny_run"]` and asks for the fixture `tiny_run`.

The model is trained hard enough that it closes its tags: with explanations that are all empty, the steps that learn
from them would have nothing to get wrong.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest

from nlae_jax.cli import main

ROOT = Path(__file__).parent.parent
EXPERIMENT = ROOT / "experiments/tiny.py"
NUM_DOCUMENTS = 24

SETTINGS = {
    "corpus.min_characters": 20,
    "extract.min_position": 4,
    "extract.max_tokens": 48,
    "extract.batch_tokens": 192,
    "lora.rank": 0,
    "sft.encoder_steps": 60,
    "sft.encoder_learning_rate": 1e-2,
    "sft.decoder_learning_rate": 1e-2,
    "rl.encoder_learning_rate": 1e-3,
    "rl.max_new_tokens": 48,
    "checkpoint.every_steps": 2,
    "eval.num_activations": 12,
    "eval.bootstrap_samples": 50,
}


def write_corpus(path: Path) -> None:
    """Few different words, so that descriptions of them are short and quickly learned."""
    rng = random.Random(0)
    words = ["the", "of", "to", "in", "is", "that", "it", "for"]
    texts = [" ".join(rng.choice(words) for _ in range(30)) + f" {number}" for number in range(NUM_DOCUMENTS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class TinyRun:
    """`workdir` holds a finished run; `arguments(workdir)` are those of the same run elsewhere."""

    workdir: Path
    corpus: Path
    model: Path
    settings: ClassVar[dict[str, Any]] = SETTINGS
    num_documents: ClassVar[int] = NUM_DOCUMENTS

    def arguments(self, workdir: Path, command: str = "train", **settings: Any) -> list[str]:
        """Command line of a stage; settings name fields with `__` for the dot."""
        changed = {name.replace("__", "."): value for name, value in settings.items()}
        values = {"subject.model": self.model, "corpus.path": self.corpus, **SETTINGS, **changed}
        overrides = [f"--config.{name}={value}" for name, value in values.items()]
        return [command, "--config", str(EXPERIMENT), "--workdir", str(workdir), *overrides]

    @staticmethod
    def metrics(workdir: Path) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl without what depends on the clock, in the order of stage and step."""
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for row in rows:
            del row["step_seconds"], row["tokens_per_second"]
        return sorted(rows, key=lambda row: (row["stage"], row["step"]))

    @staticmethod
    def samples(workdir: Path) -> list[dict[str, Any]]:
        """The rows of the evaluation's explanations."""
        return [json.loads(line) for line in (workdir / "samples" / "held_out.jsonl").open(encoding="utf-8")]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    write_corpus(path)
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tiny_dir: Path) -> TinyRun:
    run = TinyRun(tmp_path_factory.mktemp("run") / "W", corpus_file, tiny_dir)
    assert main(run.arguments(run.workdir)) == 0
    return run
