"""Every stage in seconds, on a random two-block model: for tests and for trying changes. Its numbers mean nothing.

nlae train --config experiments/tiny.py --workdir runs/tiny
"""

from ml_collections import ConfigDict

from nlae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.subject.model, config.subject.layer = "random:tiny", 1
    config.corpus.max_documents = 40
    config.extract.positions_per_document = 4
    config.extract.min_position = 8
    config.extract.max_tokens = 64
    config.split.encoder_sft, config.split.decoder_sft, config.split.rl, config.split.held_out = 0.3, 0.3, 0.2, 0.2
    config.lora.rank = 4
    config.sft.encoder_steps, config.sft.decoder_steps, config.sft.batch_size = 6, 6, 8
    config.sft.encoder_learning_rate = config.sft.decoder_learning_rate = 1e-3
    config.rl.num_steps, config.rl.activations_per_step, config.rl.samples_per_activation = 6, 4, 3
    config.rl.max_new_tokens = 24
    config.checkpoint.every_steps = 2
    config.eval.num_activations, config.eval.batch_size, config.eval.bootstrap_samples = 24, 8, 200
    return config
