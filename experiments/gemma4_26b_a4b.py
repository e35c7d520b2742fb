"""The recipe of `llama3_3_70b.py` for Gemma-4-26B-A4B (text), with adapters on attention and shared MLPs.

    nlae train --config experiments/gemma4_26b_a4b.py --workdir runs/gemma4_26b_a4b

Hardware: a TPU slice v5p-2x2x1 (4 chips, at least 74 GB used of each) by `nlae plan --quick` with block 19.

Expected: no published numbers for this model. This file has not been run to its end yet. Needs what `qwen2_5_7b.py`
needs.
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("llama3_3_70b.py", beside=__file__)
    # Block 17 has full attention: transformers loads a decoder of Gemma 4 only if its last block has.
    config.subject.model, config.subject.layer = "google/gemma-4-26B-A4B-it", 17
    return config
