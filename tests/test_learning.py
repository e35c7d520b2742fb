"""That RL learns: against a decoder that stays as it is, words come to carry more of the activation."""

import shutil

import jax
import numpy as np
import pytest

from nlae_jax.cli import main
from nlae_jax.explore.sources import open_trained
from nlae_jax.run.training import trained_pair, warm_started_pair

pytest_plugins = ["tests.tiny_run"]
pytestmark = pytest.mark.slow

STEPS, WINDOW = 30, 6


@pytest.fixture(scope="module")
def learned(tiny_run, tmp_path_factory):
    """A workdir whose encoder went on from the warm start while the decoder's learning rate was 0."""
    workdir = shutil.copytree(tiny_run.workdir, tmp_path_factory.mktemp("learning") / "W")
    shutil.rmtree(workdir / "checkpoints/rl")
    (workdir / "eval.json").unlink()
    settings = {
        "rl__num_steps": STEPS,
        "rl__decoder_learning_rate": 0.0,
        "rl__encoder_learning_rate": 3e-3,
        "rl__kl_coef": 0.0,
        "rl__activations_per_step": 8,
        "rl__samples_per_activation": 8,
        "checkpoint__every_steps": STEPS,
    }
    assert main(tiny_run.arguments(workdir, "rl", **settings)) == 0
    return workdir


def test_the_reward_rises(tiny_run, learned):
    rewards = [row["reward_mean"] for row in tiny_run.metrics(learned) if row["stage"] == "rl"]
    assert len(rewards) == STEPS
    before, after = np.mean(rewards[:WINDOW]), np.mean(rewards[-WINDOW:])
    noise = np.std(rewards[:WINDOW]) / np.sqrt(WINDOW) + np.std(rewards[-WINDOW:]) / np.sqrt(WINDOW)
    assert after > before + 2 * noise, rewards


def test_the_decoder_stayed_and_the_encoder_did_not(learned):
    run = open_trained(learned)
    before, after = warm_started_pair(run), trained_pair(run)
    same = lambda a, b: jax.tree.map(lambda x, y: bool((x == y).all()), a, b)  # noqa: E731
    assert all(jax.tree.leaves(same(before.decoder, after.decoder)))
    assert not any(jax.tree.leaves(same(before.encoder["lm"]["blocks"], after.encoder["lm"]["blocks"])))
