"""Drafts of 14,500 other activations, of a mix in which no domain dominates. The kinds of passages are told apart.

python experiments/smollm2/mix.py runs/pair/texts/train runs/pair/broad_mix --times 4 --seed 6
nlae describe --config experiments/smollm2/pair/broad.py --config.describe.provider template \\
    --workdir runs/pair/broad_template
python experiments/smollm2/descriptions.py drafts runs/pair/broad_template runs/pair/broad_mix runs/pair/d.jsonl
python experiments/smollm2/descriptions.py short runs/pair/d.jsonl runs/pair/d1.jsonl --words 1
python experiments/smollm2/descriptions.py recent runs/pair/d1.jsonl runs/pair/broad_template runs/pair/broad.jsonl
nlae sft --config experiments/smollm2/pair/broad.py --workdir runs/pair/broad
nlae export --workdir runs/pair/broad --out runs/pair/after_broad --adapters --dtype float32
"""

from ml_collections import ConfigDict

from nlae_jax.config import inherit


def get_config() -> ConfigDict:
    config = inherit("recent.py", beside=__file__)
    config.seed = 6
    config.corpus.path = "runs/pair/broad_mix/*.jsonl"
    config.corpus.max_documents = None
    config.corpus.min_characters = 200
    config.extract.positions_per_document = 5
    config.init.pair = "runs/pair/after_rl_cooler"
    config.describe.path = "runs/pair/broad.jsonl"
    config.split.encoder_sft, config.split.decoder_sft, config.split.rl, config.split.held_out = 0.76, 0.2, 0.02, 0.02
    config.sft.encoder_steps, config.sft.encoder_learning_rate = 800, 2e-3
    config.sft.decoder_steps, config.sft.decoder_learning_rate = 200, 2e-3
    return config
