"""The recipe of `qwen2_5_7b.py` for the language model of Gemma-3-12B-it.

    nlae train --config experiments/gemma3_12b.py --workdir runs/gemma3_12b

Hardware: 16 accelerators of 80 GB or more (a TPU v5p-32, 16 H100): parameters, Adam moments and the KL reference are
about 300 GB in float32, and the vocabulary of 262,208 wants room for logits.

Expected: the PyTorch reference released a pair for this layer; its numbers are not published. This file has not been
run to its end yet. Needs the extra [hub] for the text, and access to the gated weights.

Activations are about 80,000 long here, because the family scales its embeddings; the injection scale is measured
from the data.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_RECIPE = Path(__file__).with_name("qwen2_5_7b.py")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(_RECIPE))["get_config"]()
    config.subject.model, config.subject.layer = "google/gemma-3-12b-it", 32
    return config
