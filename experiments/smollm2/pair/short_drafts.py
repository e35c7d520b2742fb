"""Seventh stage: drafts that quote two last words instead of five (descriptions.py short).

nlae sft --config experiments/smollm2/pair/short_drafts.py --workdir runs/pair/short_drafts
nlae export --workdir runs/pair/short_drafts --out runs/pair/after_short_drafts --adapters --dtype float32
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("drafts_again.py", beside=__file__)
    config.seed = 2
    config.corpus.max_documents = 1400
    config.init.pair = "runs/pair/after_drafts_again"
    config.describe.path = "runs/pair/short_drafts.jsonl"
    config.sft.encoder_steps, config.sft.encoder_learning_rate = 320, 2e-3
    config.sft.decoder_steps = 150
    return config
