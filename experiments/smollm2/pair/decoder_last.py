"""Fifteenth stage: the decoder learns from 2,400 explanations of the encoder as it then is (descriptions.py samples).

nlae sft --config experiments/smollm2/pair/decoder_last.py --workdir runs/pair/decoder_last
nlae export --workdir runs/pair/decoder_last --out runs/pair/after_decoder_last --adapters --dtype bfloat16
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("decoder_again.py", beside=__file__)
    config.seed = 2
    config.corpus.max_documents = 480
    config.init.pair = "runs/pair/after_rl_settled"
    config.describe.path = "runs/pair/last_samples.jsonl"
    config.views.leading = 0.4
    config.sft.decoder_steps = 320
    return config
