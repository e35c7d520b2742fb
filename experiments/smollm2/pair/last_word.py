"""Eighth stage: drafts that quote the last word alone (descriptions.py short), which the encoder mostly gets right.

nlae sft --config experiments/smollm2/pair/last_word.py --workdir runs/pair/last_word
nlae export --workdir runs/pair/last_word --out runs/pair/after_last_word --adapters --dtype float32
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("drafts_again.py", beside=__file__)
    config.seed = 3
    config.corpus.max_documents = 600
    config.init.pair = "runs/pair/after_short_drafts"
    config.describe.path = "runs/pair/last_word_drafts.jsonl"
    config.sft.max_response_tokens = 48
    config.sft.encoder_steps, config.sft.encoder_learning_rate = 130, 2e-3
    config.sft.decoder_steps = 80
    return config
