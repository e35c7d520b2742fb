"""The shipped pair trained on, in a few minutes on two CPU cores: `make quickstart`.

    nlae train --config experiments/quickstart.py --workdir runs/quickstart

Reinforcement learning goes on from the pair smollm2-135m, on the documentation that this Python installation carries.
What to expect: docs/results.md. A pair from nothing: experiments/scratch.py.
"""

from ml_collections import ConfigDict

from nlae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.init.pair = "smollm2-135m"
    config.remat = "linear"
    config.corpus.max_documents = 160
    config.extract.positions_per_document = 2
    config.extract.min_position = 16
    config.extract.max_tokens = 96
    config.split.encoder_sft, config.split.decoder_sft = 0.01, 0.01  # no warm start: the pair has had one
    config.split.rl, config.split.held_out = 0.58, 0.4
    config.sft.encoder_steps = config.sft.decoder_steps = 0
    config.rl.num_steps, config.rl.activations_per_step, config.rl.samples_per_activation = 8, 8, 4
    config.rl.max_new_tokens = 48  # the pair's explanations have 28 tokens, and it was trained with this bound
    config.rl.temperature = 0.6  # the pair's last training was at this temperature, and it is evaluated at it
    config.rl.kl_coef = 0.0  # so few steps cannot lead far away
    config.rl.repeat_penalty = 0.5
    # The pair has settled at low rates; high ones would first undo that.
    config.rl.encoder_learning_rate, config.rl.decoder_learning_rate = 1e-4, 3e-4
    config.checkpoint.every_steps = 8
    config.eval.num_activations, config.eval.batch_size = 64, 32
    config.eval.temperature = 0.6
    return config
