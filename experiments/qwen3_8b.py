"""The recipe of `qwen2_5_7b.py` for Qwen3-8B.

    nlae train --config experiments/qwen3_8b.py --workdir runs/qwen3_8b

Hardware: one machine with 8 accelerators of 80 GB (8 H100): parameters, Adam moments and the KL reference are 197 GB
in float32, gradients 55 GB.

Expected: no published numbers for this model; those of Qwen2.5-7B are what to compare with. This file has not been
run to its end yet. Needs what `qwen2_5_7b.py` needs.
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("qwen2_5_7b.py", beside=__file__)
    config.subject.model, config.subject.layer = "Qwen/Qwen3-8B", 24
    return config
