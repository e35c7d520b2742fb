"""Twelfth stage: drafts whose topic words stand just before the activation (descriptions.py recent).

nlae sft --config experiments/smollm2/pair/recent.py --workdir runs/pair/recent
nlae export --workdir runs/pair/recent --out runs/pair/after_recent --adapters --dtype float32
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("drafts_again.py", beside=__file__)
    config.corpus.max_documents = 1300
    config.init.pair = "runs/pair/after_decoder_again"
    config.describe.path = "runs/pair/recent_drafts.jsonl"
    config.sft.max_response_tokens = 56
    config.sft.encoder_steps, config.sft.encoder_learning_rate = 450, 2e-3
    config.sft.decoder_steps = 150
    return config
