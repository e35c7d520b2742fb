"""Reinforcement learning after broad.py, at the temperature that the pair is used at.

python experiments/smollm2/mix.py runs/pair/texts/train runs/pair/rl_mix --seed 7
nlae rl --config experiments/smollm2/pair/rl_broad.py --workdir runs/pair/rl_broad
nlae export --workdir runs/pair/rl_broad --out runs/pair/after_rl_broad --adapters --dtype float32
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("rl_cooler.py", beside=__file__)
    config.seed = 7
    config.corpus.path = "runs/pair/rl_mix/*.jsonl"
    config.corpus.min_characters = 200
    config.init.pair = "runs/pair/after_broad"
    return config
