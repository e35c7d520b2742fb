"""The recipe of `qwen2_5_7b.py` for the language model of Qwen3.6-27B, with adapters.

    nlae train --config experiments/qwen3_6_27b.py --workdir runs/qwen3_6_27b

Hardware: not planned yet. The frozen base that all roles share is 54 GB in bfloat16, and there twice while it decodes;
DeltaNet's states of 512 samples are 77 GB beside it.

Expected: no published numbers for this model. This file has not been run to its end yet. Needs what `qwen2_5_7b.py`
needs.
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("qwen2_5_7b.py", beside=__file__)
    config.subject.model, config.subject.layer = "Qwen/Qwen3.6-27B", 43
    config.lora.rank, config.lora.alpha = 64, 64.0
    config.sft.encoder_learning_rate, config.sft.decoder_learning_rate = 1e-4, 1e-4
    config.rl.encoder_learning_rate, config.rl.decoder_learning_rate = 1e-4, 1e-4
    config.rl.num_steps = 2400
    config.sft.microbatches, config.rl.microbatches = 8, 8  # for memory
    return config
