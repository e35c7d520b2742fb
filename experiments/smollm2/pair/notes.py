"""Second stage: the written notes. The encoder goes on from the first stage, the decoder starts from the subject.

nlae sft --config experiments/smollm2/pair/notes.py --workdir runs/pair/notes \
    --config.init.av=runs/pair/after_template/av
nlae export --workdir runs/pair/notes --out runs/pair/after_notes --adapters --dtype float32

The carried pair's decoder read nine in ten of the notes here, from a run of its own.
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("base.py", beside=__file__)
    config.corpus.path = config.describe.path = "warmstart"
    config.corpus.max_documents, config.corpus.min_characters = None, 1
    config.describe.provider = "file"
    config.extract.max_tokens, config.extract.min_position, config.extract.positions_per_document = 256, 2, 1
    config.split.encoder_sft, config.split.decoder_sft, config.split.rl, config.split.held_out = 0.6, 0.34, 0.02, 0.04
    config.sft.max_response_tokens = 100
    config.sft.encoder_steps, config.sft.encoder_learning_rate = 120, 3e-3
    config.sft.decoder_steps, config.sft.decoder_learning_rate = 100, 2e-3
    return config
