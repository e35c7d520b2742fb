"""The recipe of `llama3_3_70b.py` for gpt-oss-20b, with adapters.

    nlae train --config experiments/gpt_oss_20b.py --workdir runs/gpt_oss_20b

Hardware: a TPU slice v5p-2x2x1 (4 chips, at least 36 GB used of each) by `nlae plan --quick`. Weights published in
MXFP4 are read as bfloat16.

Expected: no published numbers for this model. This file has not been run to its end yet. Needs what `qwen2_5_7b.py`
needs.
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("llama3_3_70b.py", beside=__file__)
    config.subject.model, config.subject.layer = "openai/gpt-oss-20b", 16
    return config
