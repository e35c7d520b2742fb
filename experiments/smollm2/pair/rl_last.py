"""Reinforcement learning after rl_broad.py, nearer to the greedy explanations that commands show by default.

python experiments/smollm2/mix.py runs/pair/texts/train runs/pair/last_mix --seed 8
nlae rl --config experiments/smollm2/pair/rl_last.py --workdir runs/pair/rl_last
nlae export --workdir runs/pair/rl_last --out runs/pair/after_rl_last --adapters --dtype bfloat16
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("rl_broad.py", beside=__file__)
    config.seed = 8
    config.corpus.path = "runs/pair/last_mix/*.jsonl"
    config.corpus.max_documents = 160
    config.init.pair = "runs/pair/after_rl_broad"
    config.rl.temperature = 0.5
    config.rl.num_steps = 20
    return config
