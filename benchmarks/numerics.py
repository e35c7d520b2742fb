"""Whether this machine's accelerator computes what a CPU computes: logits, residual streams and an RL step.

    JAX_PLATFORMS=cpu python benchmarks/numerics.py --out cpu.npz
    python benchmarks/numerics.py --against cpu.npz --json checks.json

The first command keeps a CPU's numbers. The second one computes the same on jax's default device, with the CPU's
sampled tokens, prints one line for each check and ends with 1 where one fails. An error is the largest difference as a
fraction of the largest value; of a metric, as a fraction of the metric or of 1; of a gradient's norm, of that norm.
Beside names that every command knows, models may be `random:experts`, `random:delta` and `random:sinks` (see `MADE`).
Of these, a gradient takes the place of the RL step, whose programs would take minutes to compile.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nlae_jax.bench.steps import Workload, make_workload
from nlae_jax.cli.command import start_jax
from nlae_jax.config import load_experiment
from nlae_jax.lm.arch import Arch, ClampedGate, DeltaNet, Experts
from nlae_jax.lm.families import read_arch
from nlae_jax.lm.lora import init_adapters
from nlae_jax.lm.sampling import Samples
from nlae_jax.lm.tiny import write_tiny_model
from nlae_jax.lm.transformer import Transformer
from nlae_jax.lm.weights import load_params
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import write_json
from nlae_jax.train import steps
from nlae_jax.train.state import rl_optimizers

ROOT = Path(__file__).resolve().parent.parent
# float32 is as exact on every backend. bfloat16 has 8 bits, and backends round sums of different orders.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
ROWS, LENGTH, PADDING = 3, 40, 9

# What `random:tiny` has too, and what these models have beside it: experts, DeltaNet, and windows with sinks.
MADE: dict[str, dict[str, Any]] = {
    "random:experts": {"family": "qwen3_moe", "qk_norm": "head", "experts": Experts(5, 2)},
    "random:delta": {
        **{"family": "qwen3_5_text", "qk_norm": "head", "norm_offset": 1.0, "attention_gate": True},
        **{"mixers": ("delta", "attention"), "delta": DeltaNet(2, 4, 16, 16)},
    },
    "random:sinks": {
        **{"family": "gpt_oss", "windows": (16, 0), "sinks": True, "experts": Experts(4, 2, True)},
        **{"biases": ("q", "k", "v", "o", "router", "gate", "up", "down"), "clamped_gate": ClampedGate(1.702, 7.0)},
    },
}

Arrays = dict[str, np.ndarray]


def make(model: str, dtype: str, directory: Path) -> None:
    """Writes a model of `MADE`.

    In bfloat16 all experts are chosen, because rounding would choose others on another machine.
    """
    changes = dict(MADE[model])
    if dtype == "bfloat16" and (experts := changes.get("experts")):
        changes["experts"] = dataclasses.replace(experts, per_token=experts.count)
    write_tiny_model(directory, **changes)


def forward(model: str, dtype: str) -> Arrays:
    """Logits and the residual streams of the first, a middle and the last block; one row is padded on each side."""
    lm = LanguageModel.from_pretrained(model, dtype)
    ids, mask = batch_of(lm.arch)
    layers = sorted({0, lm.arch.num_layers // 2, lm.arch.num_layers - 1})
    arrays = {f"residual {layer}": lm.residual(ids, layer, mask) for layer in layers} | {"logits": lm.logits(ids, mask)}
    return {name: np.asarray(x, np.float32)[mask] for name, x in arrays.items()}


def dtypes_of(model: str) -> tuple[str, ...]:
    """The dtypes that a model is checked in.

    DeltaNet norms outputs that are nearly zero too: of a random model, a tenth of the logits is rounding in bfloat16.
    """
    return ("float32",) if "delta" in MADE.get(model, {}) else tuple(TOLERANCE)


def gradient(model: str, dtype: str) -> Arrays:
    """Residual streams, logits and the gradient of adapters, all of one program; one row is padded on each side."""
    arch, params = read_arch(Path(model)), load_params(Path(model), read_arch(Path(model)), dtype)
    lm, (ids, mask) = Transformer(arch), batch_of(arch)
    adapters = {"blocks": jax.tree.map(lambda a: a + 0.01, init_adapters(jax.random.PRNGKey(1), arch, 4))}

    def run(lm: Transformer) -> tuple[jax.Array, jax.Array]:
        (hidden,), _ = lm.run((lm.padded(ids, mask),))
        return hidden, lm.logits(hidden)

    def loss(adapters: Any, params: Any) -> tuple[jax.Array, Any]:
        hidden, logits = lm.apply({"params": params, "lora": adapters}, method=run)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)[..., 0]
        return -jnp.where(mask[:, :-1] & mask[:, 1:], log_p, 0.0).mean(), (hidden, logits)

    (_, (hidden, logits)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters, params)
    arrays = {"residual": hidden[mask], "logits": logits[mask]}
    arrays |= {f"gradient of {name} {part}": x for name, two in grads["blocks"].items() for part, x in two.items()}
    return {name: np.asarray(x, np.float32) for name, x in arrays.items()}


def batch_of(arch: Arch) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [ROWS, LENGTH]; one row is padded on each side."""
    ids = np.random.default_rng(0).integers(3, arch.vocab_size, (ROWS, LENGTH))
    mask = np.ones(ids.shape, bool)
    mask[0, :PADDING], mask[1, -PADDING:] = False, False
    return ids, mask


def workload(model: str, dtype: str) -> Workload:
    """An RL step of a few short samples."""
    sizes = {"subject.model": model, "subject.dtype": dtype, "rl.max_new_tokens": 12}
    sizes |= {"rl.activations_per_step": 2, "rl.samples_per_activation": 3, "lora.rank": 4, "subject.layer": 1}
    return make_workload(
        load_experiment(str(ROOT / "experiments/tiny.py"), [f"{name}={value}" for name, value in sizes.items()])
    )


def rl_step(work: Workload, given: Samples | None, given_mse: np.ndarray | None) -> tuple[Arrays, Samples]:
    """The metrics of an RL step on `given` samples, else on its own, and its own samples.

    `mse`: of each sample [B, G]. The encoder's part takes `given_mse`, since advantages make much of small differences.
    `own gap`: how far the log-probs of its own samples, from cached decoding, are from those of the plain forward pass.
    """
    optimizers = rl_optimizers(work.config)
    parts = steps.rl_step(work.roles, work.config, *optimizers)
    decoder_step, encoder_step = jax.jit(parts.train_decoder), jax.jit(parts.train_encoder)

    def metrics_of(samples: Samples) -> Arrays:
        state = work.rl_state()
        samples = samples._replace(closed=jnp.ones_like(samples.closed))  # else nothing is explained by random models
        _, (scores, metrics) = decoder_step(state.decoder, work.frozen, work.batch, samples)
        taken = scores if given_mse is None else scores._replace(mse=jnp.asarray(given_mse))
        _, metrics = encoder_step(state.encoder, work.frozen, work.batch, samples, taken, metrics)
        metrics = {name: value for name, value in metrics.items() if name != steps.OBSERVED} | {"mse": scores.mse}
        return {name: np.asarray(value) for name, value in metrics.items()}

    own = jax.jit(parts.rollout)(work.rl_state(), work.frozen, work.batch)
    metrics = metrics_of(own)
    gap = metrics["logp_gap"]
    if given is not None:
        metrics = metrics_of(given)
    return metrics | {"own gap": gap}, own


def compute(model: str, dtype: str, given: Arrays | None) -> Arrays:
    """Everything by name; `given` holds another machine's, whose samples are trained on."""
    if model in MADE:
        with tempfile.TemporaryDirectory() as directory:
            make(model, dtype, Path(directory))
            return gradient(directory, dtype)
    arrays, prefix, samples, mse = forward(model, dtype), "sample ", None, None
    if given is not None:
        samples = Samples(*(jnp.asarray(given[prefix + name]) for name in Samples._fields))
        mse = given["RL mse"]
    metrics, own = rl_step(workload(model, dtype), samples, mse)
    arrays |= {f"RL {name}": value for name, value in metrics.items()}
    return arrays | {prefix + name: np.asarray(value) for name, value in own._asdict().items()}


def checks(model: str, dtype: str, mine: Arrays, theirs: Arrays) -> list[dict[str, Any]]:
    """One row for each array: its error, its tolerance and whether it passed."""
    made = []
    for name, value in mine.items():
        if name.startswith("sample "):
            continue
        # This machine's decoding is held to this machine's forward pass.
        other = np.zeros(()) if name == "RL own gap" else theirs[name].astype(np.float64)
        metric = name.startswith("RL ") and "grad_norm" not in name
        error = float(np.max(np.abs(value - other)) / max(float(np.max(np.abs(other))), 1.0 if metric else 1e-30))
        tolerance = TOLERANCE[dtype]
        row = {"model": model, "dtype": dtype, "check": name, "error": error, "tolerance": tolerance}
        made.append(row | {"passed": bool(error <= tolerance)})  # not where the error is not a number
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="random:tiny", help="separated by commas")
    parser.add_argument("--out", type=Path, help="keep the arrays here")
    parser.add_argument("--against", type=Path, help="compare with the arrays kept here")
    parser.add_argument("--json", type=Path, help="the checks as JSON")
    options = parser.parse_args()
    start_jax()
    theirs = dict(np.load(options.against)) if options.against else None
    device, kept = jax.devices()[0], {}
    result: dict[str, Any] = {"jax": jax.__version__, "device": f"{device.platform} {device.device_kind}"}
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    result |= {"checks": rows, "left_out": missing}
    cases = [(model, dtype) for model in options.models.split(",") for dtype in dtypes_of(model)]
    for model, dtype in cases:
        key = f"{model} {dtype} "
        reference = None if theirs is None else _of(theirs, key)
        try:
            if reference == {}:
                raise UserError("not among what the CPU computed")
            mine = compute(model, dtype, reference)
        except UserError as error:  # a model that cannot be had here
            missing.append(f"{key.strip()}: {error}")
            print(f"left out  {missing[-1]}", flush=True)
        else:
            kept |= {key + name: value for name, value in mine.items()}
            checked = checks(model, dtype, mine, reference) if reference else []
            show(checked, key)
            rows += checked
        # After each: what was computed is kept where this runs out of time.
        if options.out:
            np.savez(part := options.out.with_suffix(".part.npz"), **kept)
            part.replace(options.out)
        if options.json:
            write_json(options.json, result)
    return 0 if all(row["passed"] for row in rows) and (rows or theirs is None) else 1


def _of(arrays: Arrays, key: str) -> Arrays:
    return {name.removeprefix(key): value for name, value in arrays.items() if name.startswith(key)}


def show(rows: list[dict[str, Any]], key: str) -> None:
    """One line for each."""
    for row in rows:
        says = "pass" if row["passed"] else "FAIL"
        print(f"{says}  {key}{row['check']}: {row['error']:.1e} of {row['tolerance']:.0e}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
