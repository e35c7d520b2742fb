"""The shapes that the tables of docs/performance.md are measured with: SmolLM2-135M, 4 activations × 8 samples.

    nlae bench --config experiments/bench.py

Full fine-tuning; `--config.lora.rank=16` for adapters. The prompt has 125 tokens, the vector's slot is number 95.
"""

from ml_collections import ConfigDict

from nlae_jax.config import default_config

_BEFORE = (
    "A vector was read from a language model in the middle of a text, at the output of one of its blocks. It holds "
    "what the model knows at this place: what the text is about, how it is written, what stands directly before, and "
    "what is likely to come next. You see it in the place of one word. Vector:"
)
_AFTER = " Say what it holds, the most important thing first, between the two given tags."


def get_config() -> ConfigDict:
    config = default_config()
    config.lora.rank = 0
    config.protocol.encoder_prompt = f"{_BEFORE} {{injection_char}}\n{_AFTER}"
    config.protocol.decoder_prompt = "Summary of the following text: <text>{explanation}</text> <summary>"
    config.rl.activations_per_step, config.rl.samples_per_activation = 4, 8
    config.rl.max_new_tokens = 48
    return config
