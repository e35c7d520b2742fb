"""Sixth stage: more steps on the drafts. The first warm start was too short: the loss on drafts had not levelled off.

nlae sft --config experiments/smollm2/pair/drafts_again.py --workdir runs/pair/drafts_again
nlae export --workdir runs/pair/drafts_again --out runs/pair/after_drafts_again --adapters --dtype float32
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("drafts.py", beside=__file__)
    config.seed = 1
    config.init.pair = "runs/pair/after_rl"
    config.split.encoder_sft, config.split.decoder_sft, config.split.rl, config.split.held_out = 0.7, 0.26, 0.02, 0.02
    config.sft.encoder_steps, config.sft.encoder_learning_rate = 700, 3e-3
    config.sft.decoder_steps, config.sft.decoder_learning_rate = 250, 2e-3
    return config
