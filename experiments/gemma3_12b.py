"""The recipe of `qwen2_5_7b.py` for the language model of Gemma-3-12B-it.

    nlae train --config experiments/gemma3_12b.py --workdir runs/gemma3_12b

Hardware: one machine with 8 accelerators of 80 GB (8 H100): parameters, Adam moments and the KL reference are 289 GB
in float32, gradients 81 GB.

Expected: the PyTorch reference released a pair for this layer; its numbers are not published. This file has not been
run to its end yet. Needs what `qwen2_5_7b.py` needs, and access to the gated weights.

Activations are about 80,000 long here, because the family scales its embeddings; the injection scale is measured
from the data.
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("qwen2_5_7b.py", beside=__file__)
    config.subject.model, config.subject.layer = "google/gemma-3-12b-it", 32
    return config
