"""A pair for SmolLM2-135M-Instruct from nothing, in half an hour on two CPU cores: `make train`.

    nlae train --config experiments/scratch.py --workdir runs/scratch

Text: the documentation that this Python installation carries. What to expect: docs/results.md.
"""

from ml_collections import ConfigDict

from nlae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.remat = "none"  # recompute blocks in the backward pass: as fast on a CPU, and half the memory
    config.corpus.max_documents = 1200
    config.extract.positions_per_document = 5
    config.extract.min_position = 24
    config.extract.max_tokens = 96
    config.split.encoder_sft, config.split.decoder_sft = 0.45, 0.15
    config.split.rl, config.split.held_out = 0.2, 0.2
    # Half an hour goes where it pays: most of it to the encoder, which is the bottleneck, and to RL, where the decoder
    # learns to read what the encoder really writes.
    config.sft.max_response_tokens = 48
    config.sft.encoder_steps, config.sft.encoder_learning_rate = 150, 5e-3
    config.sft.decoder_steps, config.sft.decoder_learning_rate = 30, 2e-3
    config.rl.num_steps, config.rl.activations_per_step, config.rl.samples_per_activation = 26, 8, 4
    config.rl.max_new_tokens = 72
    config.rl.encoder_learning_rate, config.rl.decoder_learning_rate = 1e-4, 1e-3
    config.checkpoint.every_steps = 10
    config.eval.num_activations, config.eval.batch_size = 320, 32
    # Chosen on the RL split: the young encoder's samples are best here. At 0 it loops in 7 % of them.
    config.eval.temperature = 0.6
    return config
