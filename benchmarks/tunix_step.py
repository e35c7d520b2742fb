"""GRPO's training step in google-tunix on the same model: what of our RL step another JAX library does.

One step: the rollout by tunix's own sampler, the frozen reference's log-probs, a reward that costs nothing, the
policy's forward and backward pass and update. Every sample carries the whole prompt. NOT in it, and in ours: a vector
injected into the prompt, and the decoder (its score of every sample is our reward, and it trains too). So the sum is
called `rl_step_without_decoder`: set it against our RL step less our `score`.

    python benchmarks/tunix_step.py --model DIR [--rank 16] [--prompt 125 --response 48 --activations 4 --group 8]

Prints one JSON object: median seconds of each phase. Needs google-tunix (0.1.7 here), in an environment of its own: it
installs an older transformers than ours. --model is a directory in the HF layout of a Llama. Random prompts; tunix's
code fixes the rotary base, which changes the text and not the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import qwix
import tunix
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors

LINEARS = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
SPANS = {
    "rl_step_without_decoder": "global_step_time",
    "rollout": "sum/rollout_time",
    "reference": "sum/refer_inference_time",
}


class Numbers:
    """A text is its token ids; no token ends or pads one, so every response has all its tokens."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return -1

    pad_id = eos_id


def load(directory: str, mesh: jax.sharding.Mesh) -> Llama3:
    """The model in float32."""
    config = json.loads((Path(directory) / "config.json").read_text())
    shape = ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=0,  # never read: the base is fixed in tunix's code
        norm_eps=config["rms_norm_eps"],
        weight_tying=config["tie_word_embeddings"],
    )
    return create_model_from_safe_tensors(directory, shape, mesh, dtype=jax.numpy.float32)


def adapt(model: Llama3, rank: int) -> nnx.Module:
    """Adapters on every linear layer of the blocks; rank 0 leaves the model as it is."""
    if not rank:
        return model
    provider = qwix.LoraProvider(module_path=LINEARS, rank=rank, alpha=float(rank))
    return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())


def cluster_config(options: argparse.Namespace, mesh: jax.sharding.Mesh) -> tunix.ClusterConfig:
    """All roles on one mesh; an optimiser step a batch, gradients over `micro` samples at a time."""
    return tunix.ClusterConfig(
        role_to_mesh={role: mesh for role in (tunix.Role.ACTOR, tunix.Role.ROLLOUT, tunix.Role.REFERENCE)},
        training_config=tunix.RLTrainingConfig(
            actor_optimizer=optax.adamw(1e-5),
            eval_every_n_steps=10**9,
            max_steps=options.repeats + options.warmup,
            mini_batch_size=options.activations,
            train_micro_batch_size=max(1, options.micro // options.group),
            rollout_micro_batch_size=options.activations,
            compute_logps_micro_batch_size=options.activations,
        ),
        rollout_config=tunix.RolloutConfig(
            max_tokens_to_generate=options.response,
            max_prompt_length=options.prompt,
            kv_cache_size=options.prompt + options.response,
            temperature=1.0,
        ),
    )


def batches(options: argparse.Namespace, vocab_size: int) -> Iterator[dict[str, Any]]:
    """Random prompts of the given length, without end."""
    random = np.random.default_rng(0)
    while True:
        ids = random.integers(5, vocab_size - 100, (options.activations, options.prompt))
        yield {"prompts": np.array([" ".join(map(str, row)) for row in ids])}


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The first token, as a number: differs within a group, costs nothing."""
    return [float(text.split(maxsplit=1)[0]) for text in completions]


def seconds_of(spans: dict[str, Any]) -> dict[str, float]:
    """Of one step's phases. The policy's is what is left: tunix's training span holds the reference's seconds too."""
    seconds = {phase: float(spans[f"perf/{name}"][0]) for phase, name in SPANS.items()}
    policy = seconds["rl_step_without_decoder"] - seconds["rollout"] - seconds["reference"]
    return {**seconds, "policy": policy}


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of the phases over the steps after the warm-up."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    actor, reference = adapt(load(options.model, mesh), options.rank), load(options.model, mesh)
    config, steps = cluster_config(options, mesh), []
    spans_of = tunix.PerfMetricsExport.from_cluster_config(config)

    def record(query: tunix.PerfSpanQuery) -> dict[str, Any]:
        steps.append(seconds_of(spans_of(query)))
        return {}

    cluster = tunix.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=Numbers(),
        cluster_config=config,
        perf_config=tunix.PerfMetricsConfig(custom_export_fn=record),
    )
    grpo = tunix.GRPOConfig(num_generations=options.group, num_iterations=1, beta=0.01, kl_loss_mode="low_var_kl")
    learner = tunix.GRPOLearner(cluster, grpo, reward_fns=reward)
    learner.train(batches(options, actor.config.vocab_size))
    timed = steps[options.warmup :]
    return {phase: statistics.median(step[phase] for step in timed) for phase in timed[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory in the HF layout")
    for name, value in {
        "rank": 0,
        "prompt": 125,
        "response": 48,
        "activations": 4,
        "group": 8,
        "micro": 8,
        "repeats": 3,
        "warmup": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    print(json.dumps({"seconds": measure(options), "samples": options.activations * options.group}))


if __name__ == "__main__":
    main()
