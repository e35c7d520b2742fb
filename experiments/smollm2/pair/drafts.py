"""Third stage: the template's facts in the form of the notes (descriptions.py drafts), on broad text.

nlae sft --config experiments/smollm2/pair/drafts.py --workdir runs/pair/drafts
nlae export --workdir runs/pair/drafts --out runs/pair/after_drafts --adapters --dtype float32
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("base.py", beside=__file__)
    config.init.pair = "runs/pair/after_notes"
    config.describe.provider, config.describe.path = "file", "runs/pair/drafts.jsonl"
    config.split.encoder_sft, config.split.decoder_sft, config.split.rl, config.split.held_out = 0.6, 0.3, 0.05, 0.05
    config.sft.max_response_tokens = 64
    config.sft.encoder_steps, config.sft.encoder_learning_rate = 280, 3e-3
    config.sft.decoder_steps, config.sft.decoder_learning_rate = 80, 2e-3
    return config
