"""A real NLA for SmolLM2-135M-Instruct on a laptop.

nlae train --config experiments/quickstart.py --workdir runs/quickstart
"""

from ml_collections import ConfigDict

from nlae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.corpus.max_documents = 800
    config.extract.positions_per_document = 10
    config.extract.min_position = 24
    config.extract.max_tokens = 96
    config.split.encoder_sft, config.split.decoder_sft = 0.5, 0.25
    config.split.rl, config.split.held_out = 0.15, 0.1
    config.sft.encoder_steps, config.sft.decoder_steps, config.sft.sampled_text_steps = 200, 80, 20
    config.sft.encoder_learning_rate = config.sft.decoder_learning_rate = 1e-3
    config.rl.num_steps, config.rl.activations_per_step, config.rl.samples_per_activation = 20, 8, 4
    config.rl.max_new_tokens = 64
    config.rl.encoder_learning_rate, config.rl.decoder_learning_rate = 1e-4, 3e-4
    config.eval.num_activations = 128
    return config
