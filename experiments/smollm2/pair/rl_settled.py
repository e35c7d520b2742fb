"""Fourteenth stage: a few more steps of reinforcement learning with a third of the learning rates.

A constant learning rate leaves the weights where the last noisy steps have pushed them. Lower rates let both settle.

nlae rl --config experiments/smollm2/pair/rl_settled.py --workdir runs/pair/rl_settled
nlae export --workdir runs/pair/rl_settled --out runs/pair/after_rl_settled --adapters --dtype float32
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("rl_recent.py", beside=__file__)
    config.seed = 4
    config.corpus.max_documents = 70
    config.init.pair = "runs/pair/after_rl_recent"
    config.rl.num_steps = 14
    config.rl.encoder_learning_rate, config.rl.decoder_learning_rate = 1.5e-4, 3e-4
    return config
