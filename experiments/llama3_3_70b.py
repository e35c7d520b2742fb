"""The recipe of `qwen2_5_7b.py` for Llama-3.3-70B-Instruct, with adapters.

    nlae train --config experiments/llama3_3_70b.py --workdir runs/llama3_3_70b

Hardware: a TPU slice v5p-2x2x4 (16 chips of 95 GiB) by `nlae plan`, or one machine with 8 accelerators of 80 GB (8
H100, `--config.rl.microbatches=8 --config.sft.microbatches=8`): the frozen base that all roles share is 141 GB in
bfloat16, and there twice while it decodes. Full fine-tuning (`--config.lora.rank=0`, the rates of `qwen2_5_7b.py`,
`--config.mesh.fsdp=16 --config.mesh.tensor=4`, one microbatch) keeps 1.7 TB in float32: v5p-4x4x4 (64 chips) by a plan
of the RL step alone.

Expected: the PyTorch reference released a pair for this layer; its numbers are not published. This file has not been
run to its end yet. Needs what `qwen2_5_7b.py` needs, and access to the gated weights.
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("qwen2_5_7b.py", beside=__file__)
    config.subject.model, config.subject.layer = "meta-llama/Llama-3.3-70B-Instruct", 53
    config.lora.rank, config.lora.alpha = 64, 64.0
    config.sft.encoder_learning_rate, config.sft.decoder_learning_rate = 1e-4, 1e-4
    config.rl.encoder_learning_rate, config.rl.decoder_learning_rate = 1e-4, 1e-4
    config.rl.num_steps = 2400
    config.sft.microbatches, config.rl.microbatches = 4, 4
    return config
