"""The recipe of scratch.py for SmolLM2-135M-Instruct with three hours instead of half an hour.

    nlae train --config experiments/smollm2_135m.py --workdir runs/smollm2_135m

Hardware: 2 CPU cores, 8 GB of memory. Expected: held-out FVE 0.50, 0.37 before RL (docs/results.md).
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("scratch.py", beside=__file__)
    config.corpus.max_documents = 3000
    config.extract.positions_per_document = 12
    config.sft.encoder_steps, config.sft.encoder_learning_rate = 1000, 4e-3
    config.sft.decoder_steps = 200
    config.rl.num_steps, config.rl.activations_per_step, config.rl.samples_per_activation = 150, 16, 4
    config.checkpoint.every_steps = 25
    config.eval.num_activations = 512
    return config
