"""Ninth stage: reinforcement learning on broad text, with short explanations and a charge on repeated items.

nlae train --config experiments/smollm2/pair/rl_again.py --workdir runs/pair/rl_again
nlae export --workdir runs/pair/rl_again --out runs/pair/after_rl_again --adapters --dtype float32
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("rl.py", beside=__file__)
    config.init.pair = "runs/pair/after_last_word"
    config.extract.positions_per_document = 5
    config.rl.num_steps = 25
    config.rl.max_new_tokens = 48
    config.rl.encoder_learning_rate = 8e-4
    config.rl.repeat_penalty = 0.5
    return config
