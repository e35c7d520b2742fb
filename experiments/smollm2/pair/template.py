"""First stage: the encoder learns the template's descriptions of broad text.

nlae sft --config experiments/smollm2/pair/template.py --workdir runs/pair/template
nlae export --workdir runs/pair/template --out runs/pair/after_template --adapters --dtype float32
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("base.py", beside=__file__)
    config.split.encoder_sft, config.split.decoder_sft, config.split.rl, config.split.held_out = 0.6, 0.2, 0.12, 0.08
    config.sft.max_response_tokens = 56
    config.sft.encoder_steps, config.sft.encoder_learning_rate = 150, 4e-3
    return config
