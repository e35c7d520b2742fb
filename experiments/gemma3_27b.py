"""The recipe of `qwen2_5_7b.py` for the language model of Gemma-3-27B-it.

    nlae train --config experiments/gemma3_27b.py --workdir runs/gemma3_27b

Hardware: a TPU slice v5p-2x4x4 (32 chips, 66 GB used of each) by `nlae plan`, or one machine with 8 accelerators of 141
GB (8 H200): parameters, Adam moments and the KL reference are 657 GB in float32, gradients 183 GB.

Expected: the PyTorch reference reports FVE 0.38 after the warm start, 0.70 after 1.5 days of RL on 16 H100 and 0.75
after a week. This file has not been run to its end yet. Needs what `qwen2_5_7b.py` needs, and access to the gated
weights.
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("qwen2_5_7b.py", beside=__file__)
    config.subject.model, config.subject.layer = "google/gemma-3-27b-it", 41
    config.rl.num_steps = 6000
    return config
