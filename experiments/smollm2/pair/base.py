"""What all stages of the carried pair share. The stages, in order, with what each reached: docs/carried-pair.md."""

from ml_collections import ConfigDict

from nlae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.remat = "linear"
    config.corpus.path = "runs/pair/texts/train/*.jsonl"  # experiments/smollm2/texts.py runs/pair/texts
    config.corpus.max_documents = 2400
    config.extract.positions_per_document, config.extract.min_position, config.extract.max_tokens = 8, 3, 128
    config.sft.buckets = 2
    config.sft.encoder_steps = config.sft.decoder_steps = 0
    config.views.leading, config.views.unquoted = 0.25, 0.25
    config.rl.num_steps, config.rl.activations_per_step, config.rl.samples_per_activation = 0, 16, 4
    config.rl.max_new_tokens = 96
    config.checkpoint.every_steps = 25
    config.eval.num_activations, config.eval.temperature = 64, 0.6
    return config
