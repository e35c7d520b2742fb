"""The recipe of `qwen2_5_7b.py` for Qwen2.5-0.5B-Instruct: the cheapest way to see it work at full length.

    nlae train --config experiments/qwen2_5_0_5b.py --workdir runs/qwen2_5_0_5b

Hardware: one accelerator of 40 GB or more: parameters, Adam moments and the KL reference are about 13 GB in float32.

Expected: the PyTorch reference reports FVE 0.44 after the warm start and 0.594 after 1000 RL steps. This file has
not been run to its end yet. Needs what `qwen2_5_7b.py` needs.
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("qwen2_5_7b.py", beside=__file__)
    config.subject.model, config.subject.layer = "Qwen/Qwen2.5-0.5B-Instruct", 16
    config.rl.num_steps = 1000
    return config
