"""Sixteenth and last stage: reinforcement learning at the temperature that the pair is used at.

At temperature 1 the encoder hardly repeats words, but at 0.6 it still does. The sharper distribution is another policy.

python experiments/smollm2/mix.py runs/pair/texts/train runs/pair/mix
nlae rl --config experiments/smollm2/pair/rl_cooler.py --workdir runs/pair/rl_cooler
nlae export --workdir runs/pair/rl_cooler --out runs/pair/carried --adapters --dtype bfloat16
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("rl_anchored.py", beside=__file__)
    config.seed = 5
    config.corpus.path = "runs/pair/mix/*.jsonl"
    config.corpus.max_documents = None
    config.init.pair = "runs/pair/after_decoder_last"
    config.extract.positions_per_document = 3
    config.split.encoder_sft, config.split.decoder_sft, config.split.rl, config.split.held_out = 0.01, 0.01, 0.96, 0.02
    config.rl.temperature = 0.6
    config.rl.encoder_learning_rate, config.rl.decoder_learning_rate = 4e-4, 3e-4
    config.rl.kl_coef, config.rl.repeat_penalty = 0.03, 1.0
    config.rl.num_steps = 50
    config.checkpoint.every_steps = 10
    return config
