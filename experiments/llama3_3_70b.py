"""The recipe of `qwen2_5_7b.py` for Llama-3.3-70B-Instruct.

    nlae train --config experiments/llama3_3_70b.py --workdir runs/llama3_3_70b

Hardware: a TPU v5p-64 (32 chips of 95 GB) or more: parameters, Adam moments and the KL reference are about 1.7 TB in
float32. With adapters (see `qwen2_5_7b.py`) the shared bfloat16 base of 141 GB is most of it: 4 chips.

Expected: the PyTorch reference released a pair for this layer; its numbers are not published. This file has not been
run to its end yet. Needs the extra [hub] for the text, and access to the gated weights.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_RECIPE = Path(__file__).with_name("qwen2_5_7b.py")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(_RECIPE))["get_config"]()
    config.subject.model, config.subject.layer = "meta-llama/Llama-3.3-70B-Instruct", 53
    config.rl.num_steps = 2400
    config.mesh.tensor = 4
    return config
