"""The recipe of `qwen2_5_7b.py` for the language model of Gemma-4-26B-A4B, with adapters on attention and shared MLPs.

    nlae train --config experiments/gemma4_26b_a4b.py --workdir runs/gemma4_26b_a4b

Hardware: a TPU slice v5p-2x2x1 (4 chips, at least 74 GB used of each) by `nlae plan --quick`.

Expected: no published numbers for this model. This file has not been run to its end yet. Needs what `qwen2_5_7b.py`
needs.
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("qwen2_5_7b.py", beside=__file__)
    config.subject.model, config.subject.layer = "google/gemma-4-26B-A4B-it", 19
    config.lora.rank, config.lora.alpha = 64, 64.0
    config.sft.encoder_learning_rate, config.sft.decoder_learning_rate = 1e-4, 1e-4
    config.rl.encoder_learning_rate, config.rl.decoder_learning_rate = 1e-4, 1e-4
    config.rl.num_steps = 2400
    config.sft.microbatches, config.rl.microbatches = 4, 4  # for memory
    return config
