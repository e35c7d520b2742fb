"""The recipe of `qwen2_5_7b.py` for the language model of Qwen3.6-27B.

nlae train --config experiments/qwen3_6_27b.py --workdir runs/qwen3_6_27b
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("qwen2_5_7b.py", beside=__file__)
    config.subject.model, config.subject.layer = "Qwen/Qwen3.6-27B", 43
    config.rl.num_steps = 6000
    return config
