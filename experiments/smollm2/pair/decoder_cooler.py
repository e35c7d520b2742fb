"""Last stage: the decoder learns from 1,200 explanations of the finished encoder (descriptions.py samples).

nlae sft --config experiments/smollm2/pair/decoder_cooler.py --workdir runs/pair/decoder_cooler
nlae export --workdir runs/pair/decoder_cooler --out runs/pair/carried --adapters --dtype bfloat16
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("decoder_last.py", beside=__file__)
    config.seed = 5
    config.corpus.path, config.corpus.max_documents = "runs/pair/mix/*.jsonl", 420
    config.extract.positions_per_document = 3
    config.init.pair = "runs/pair/after_rl_cooler"
    config.describe.path = "runs/pair/cooler_samples.jsonl"
    config.sft.decoder_steps = 160
    return config
