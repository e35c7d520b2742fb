"""Tenth stage: reinforcement learning with a KL term, which keeps the form of the explanations.

nlae train --config experiments/smollm2/pair/rl_anchored.py --workdir runs/pair/rl_anchored
nlae export --workdir runs/pair/rl_anchored --out runs/pair/after_rl_anchored --adapters --dtype float32
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("rl_again.py", beside=__file__)
    config.init.pair = "runs/pair/after_rl_again"
    config.rl.encoder_learning_rate, config.rl.kl_coef = 5e-4, 0.05
    return config
