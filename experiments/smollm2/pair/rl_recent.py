"""Thirteenth stage: reinforcement learning on other activations, after the drafts with recent words.

nlae rl --config experiments/smollm2/pair/rl_recent.py --workdir runs/pair/rl_recent
nlae export --workdir runs/pair/rl_recent --out runs/pair/after_rl_recent --adapters --dtype float32
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("rl_anchored.py", beside=__file__)
    config.seed = 2
    config.init.pair = "runs/pair/after_recent"
    return config
