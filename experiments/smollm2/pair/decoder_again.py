"""Eleventh stage: the decoder learns from the encoder's own explanations, after reinforcement learning.

An RL step gives the decoder one update. A step of this stage is twenty times cheaper, because it samples nothing.

nlae sft --config experiments/smollm2/pair/decoder_again.py --workdir runs/pair/decoder_again
nlae export --workdir runs/pair/decoder_again --out runs/pair/after_decoder_again --adapters --dtype bfloat16
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("rl_again.py", beside=__file__)
    config.init.pair = "runs/pair/after_rl_anchored"
    config.corpus.max_documents = 320
    config.describe.provider, config.describe.path = "file", "runs/pair/samples.jsonl"
    config.split.encoder_sft, config.split.decoder_sft, config.split.rl, config.split.held_out = 0.01, 0.95, 0.01, 0.03
    config.sft.max_response_tokens = 48
    config.sft.decoder_steps, config.sft.decoder_learning_rate = 200, 1e-3
    config.rl.num_steps = 0
    return config
