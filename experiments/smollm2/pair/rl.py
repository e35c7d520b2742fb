"""Fifth stage: reinforcement learning on broad text. The carried pair has had 45 steps of it.

nlae train --config experiments/smollm2/pair/rl.py --workdir runs/pair/rl
nlae export --workdir runs/pair/rl --out runs/pair/after_rl --adapters --dtype bfloat16
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("base.py", beside=__file__)
    config.init.pair = "runs/pair/after_notes_again"
    config.corpus.max_documents, config.extract.positions_per_document = 800, 3
    config.split.encoder_sft, config.split.decoder_sft, config.split.rl, config.split.held_out = 0.01, 0.01, 0.95, 0.03
    config.rl.num_steps = 45
    config.rl.encoder_learning_rate, config.rl.decoder_learning_rate = 2e-4, 1e-3
    config.rl.kl_coef, config.rl.repeat_penalty = 0.0, 0.3
    config.checkpoint.every_steps = 5
    config.eval.num_activations = 64
    return config
