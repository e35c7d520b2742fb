"""The recipe of `llama3_3_70b.py` for the language model of Qwen3.6-27B, with adapters.

    nlae train --config experiments/qwen3_6_27b.py --workdir runs/qwen3_6_27b

Hardware: a TPU slice v5p-2x2x2 (8 chips, at least 43 GB used of each) by `nlae plan --quick`. In full
(`lora.rank = 0`) v5p-2x4x4 fits (32 chips, at least 40 GB of each; `experiments/plans/make.sh` has the mesh).

Expected: no published numbers for this model. This file has not been run to its end yet. Needs what `qwen2_5_7b.py`
needs.
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("llama3_3_70b.py", beside=__file__)
    config.subject.model, config.subject.layer = "Qwen/Qwen3.6-27B", 43
    config.sft.microbatches, config.rl.microbatches = 8, 8  # for memory
    return config
