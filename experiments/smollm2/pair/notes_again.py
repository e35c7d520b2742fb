"""Fourth stage: the notes with what the subject itself expects (descriptions.py notes).

nlae sft --config experiments/smollm2/pair/notes_again.py --workdir runs/pair/notes_again
nlae export --workdir runs/pair/notes_again --out runs/pair/after_notes_again --adapters
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("notes.py", beside=__file__)
    config.init.pair = "runs/pair/after_drafts"
    config.corpus.path = config.describe.path = "runs/pair/notes.jsonl"
    config.split.encoder_sft, config.split.decoder_sft, config.split.rl, config.split.held_out = 0.7, 0.26, 0.02, 0.02
    config.sft.encoder_steps, config.sft.encoder_learning_rate = 130, 2e-3
    config.sft.decoder_steps, config.sft.decoder_learning_rate = 60, 1e-3
    return config
