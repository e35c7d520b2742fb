"""The paper's recipe for Qwen2.5-7B-Instruct: web text, full fine-tuning, thousands of RL steps.

    nlae train --config experiments/qwen2_5_7b.py --workdir runs/qwen2_5_7b

Hardware: a TPU slice v5p-2x2x2 (8 chips, 62 GB used of each) by `nlae plan`, or one machine with 8 accelerators of 80
GB (8 H100): parameters, two Adam moments and the KL reference are 187 GB in float32, gradients 52 GB. On one
accelerator train adapters instead: `--config.lora.rank=64
--config.lora.alpha=64 --config.sft.encoder_learning_rate=1e-4 --config.sft.decoder_learning_rate=1e-4
--config.rl.encoder_learning_rate=1e-4 --config.rl.decoder_learning_rate=1e-4 --config.mesh.fsdp=1`.

Expected: the PyTorch reference reports FVE 0.3 to 0.4 after the warm start, 0.64 after 150 RL steps and 0.752 after
4200, spread 0.03 from run to run. This file has not been run to its end yet.

Needs ANTHROPIC_API_KEY for 480,000 descriptions (fewer: `--config.corpus.max_documents=10000`; a server of your own:
`--config.describe.provider=openai --config.describe.base_url=URL`), and the extra [hub] for the text.
"""

from ml_collections import ConfigDict

from nlae_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.subject.model, config.subject.layer = "Qwen/Qwen2.5-7B-Instruct", 20
    config.subject.dtype = "bfloat16"
    config.corpus.hub, config.corpus.max_documents = "HuggingFaceFW/fineweb:sample-10BT", 100_000
    config.extract.positions_per_document, config.extract.max_tokens = 10, 2048
    config.extract.batch_tokens = 65_536
    config.describe.provider, config.describe.model = "anthropic", "claude-sonnet-4-6"
    config.describe.concurrency, config.describe.max_new_tokens = 64, 300
    config.lora.rank = 0
    # One epoch of the 240,000 examples that each warm start has; a second overfits.
    config.sft.max_response_tokens = 200
    config.sft.batch_size, config.sft.encoder_steps, config.sft.decoder_steps = 256, 900, 900
    config.sft.encoder_learning_rate, config.sft.decoder_learning_rate = 2e-5, 2e-5
    config.rl.num_steps, config.rl.activations_per_step, config.rl.samples_per_activation = 4000, 64, 8
    config.rl.encoder_learning_rate, config.rl.decoder_learning_rate = 1e-5, 5e-5
    config.sft.microbatches, config.rl.microbatches = 2, 2  # for memory
    config.mesh.fsdp = -1
    config.checkpoint.every_steps = 100
    config.eval.num_activations, config.eval.batch_size = 2048, 64
    return config
