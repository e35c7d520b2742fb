"""`nlae export`, `nlae bench` and `nlae plan`: write a pair, time its steps, and compile them for a pod."""

from __future__ import annotations

import argparse

from nlae_jax.cli.command import Command, add_distributed, show_result, start_jax
from nlae_jax.runtime import supervision, world
from nlae_jax.runtime.errors import UserError


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("--workdir", required=True, help="workdir of a trained run")
    export.add_argument("--out", required=True, help="directory that gets av/ and ar/")
    export.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32", "float16"),
        help="dtype of the exported weights (default bfloat16)",
    )
    export.add_argument("--adapters", action="store_true", help="write only the LoRA adapters, in PEFT's layout")
    export.add_argument("--datasets", action="store_true", help="also write the activations as parquet files")


def _run_export(options: argparse.Namespace, _: list[str]) -> int:
    start_jax()
    from nlae_jax.explore.sources import open_trained
    from nlae_jax.run.export import export
    from nlae_jax.run.training import trained_pair
    from nlae_jax.runtime.output import afterwards, show

    run = open_trained(options.workdir)
    export(run, trained_pair(run), options.out, options.dtype, options.datasets, options.adapters)
    afterwards("stdout", lambda: show("\n".join(str(path) for path in sorted(options.out.iterdir()))))
    return 0


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--config", required=True, help="experiment file with get_config()")
    bench.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="calls of each phase that are timed; bench reports the median (default 3)",
    )
    bench.add_argument(
        "--phases",
        help="time only these phases, of rollout,score,reference,policy,encoder_sft,rl_step,unshared,extraction",
    )
    bench.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_distributed(bench)


def _run_bench(options: argparse.Namespace, overrides: list[str]) -> int:
    from nlae_jax.config import load_experiment

    config = load_experiment(str(options.config), overrides)
    if options.repeats < 1:
        raise UserError(f"--repeats: {options.repeats} should be at least 1")
    supervision.set_grace(config.checkpoint.grace_seconds)
    start_jax(options.distributed)
    from nlae_jax.bench.steps import PHASES, as_table, bench

    phases = options.phases.split(",") if options.phases else PHASES
    if unknown := set(phases) - set(PHASES):
        raise UserError(f"--phases: {sorted(unknown)[0]!r} should be one of {', '.join(PHASES)}")
    result = bench(config, options.repeats, phases)
    if not world.is_first():
        return 0
    show_result(result, as_table, options.json)
    return 0


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--config", required=True, help="experiment file with get_config()")
    plan.add_argument("--topology", required=True, help="the slice as GENERATION:SHAPE, such as v5e:2x4 or v5p:4x4x8")
    plan.add_argument("--steps", help="compile only these steps: extract,encoder_sft,decoder_sft,rl (default: all)")
    plan.add_argument(
        "--quick",
        action="store_true",
        help="stop before machine code is made: faster, but memory is only a lower bound",
    )
    plan.add_argument("--out", help="also write the plan to this file, as JSON")
    plan.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _run_plan(options: argparse.Namespace, overrides: list[str]) -> int:
    from nlae_jax.config import load_experiment
    from nlae_jax.runtime.output import check_file

    config = load_experiment(str(options.config), overrides)
    if options.out:
        check_file(options.out, "--out")
    start_jax()
    from nlae_jax.plan.report import STEPS, as_table, plan
    from nlae_jax.runtime.files import write_json

    names = options.steps.split(",") if options.steps else STEPS
    result = plan(config, options.topology, names, options.quick)
    if options.out:
        write_json(options.out, result)
    show_result(result, as_table, options.json)
    return 0


COMMANDS = (
    Command(
        "export",
        "write the trained pair as model directories that transformers and the PyTorch reference load",
        _add_export,
        _run_export,
    ),
    Command(
        "bench",
        "time the phases of the training steps, beside this machine's measured peaks",
        _add_bench,
        _run_bench,
        takes_overrides=True,
    ),
    Command(
        "plan",
        "compile the training steps for a TPU slice on this machine: memory, FLOPs and time, and whether they fit",
        _add_plan,
        _run_plan,
        takes_overrides=True,
    ),
)
