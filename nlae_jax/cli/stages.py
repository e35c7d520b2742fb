"""`nlae train`, the commands of its single stages, and `nlae report`."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from nlae_jax.cli.command import Command, add_distributed, start_jax
from nlae_jax.runtime import supervision, world

if TYPE_CHECKING:  # the import takes half a second, for which `nlae --help` should not wait
    from nlae_jax.runtime.files import AnyPath

_STAGES = {
    "train": "run every unfinished stage: extract, describe, sft, rl, eval, report",
    "extract": "read the subject's activations from the texts",
    "describe": "write the descriptions that the warm start learns from",
    "sft": "warm start: train encoder and decoder on the descriptions",
    "rl": "train encoder and decoder by reinforcement learning",
}


def _add_workdir(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workdir",
        required=True,
        help="directory or gs://BUCKET/NAME for all files of the run; run the command again to resume",
    )


def _add_stage(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, help="experiment file with get_config()")
    _add_workdir(command)
    add_distributed(command)


def run_stage_command(options: argparse.Namespace, overrides: list[str]) -> int:
    """Runs `nlae train` or the command of one stage."""
    from nlae_jax.config import load_experiment

    config = load_experiment(str(options.config), overrides)
    supervision.set_grace(config.checkpoint.grace_seconds)
    start_jax(options.distributed)
    from nlae_jax.report.page import write_report
    from nlae_jax.run.resources import open_run
    from nlae_jax.run.stages import run_stage, run_stages
    from nlae_jax.runtime.files import read_json
    from nlae_jax.runtime.output import afterwards, show_json
    from nlae_jax.runtime.progress import say

    clock = time.perf_counter()
    run = open_run(config, options.workdir)
    if options.command == "train":
        run_stages(run)
        if world.is_first():
            afterwards("no report", lambda: write_report(options.workdir))
            afterwards("no results shown", lambda: _print_result(options.workdir))
        say(f"nlae train: {(time.perf_counter() - clock) / 60:.1f} minutes")
    else:
        run_stage(run, options.command)
        if getattr(options, "json", False) and world.is_first():
            afterwards("no results shown", lambda: show_json(read_json(options.workdir / "eval.json")))
    return 0


def _print_result(workdir: AnyPath) -> None:
    """Prints the result of a run: held-out samples, the FVE with its controls, and the path of the report."""
    from nlae_jax.report.page import SAMPLES
    from nlae_jax.report.table import held_out_table
    from nlae_jax.runtime.files import read_fields
    from nlae_jax.runtime.output import show_rich
    from nlae_jax.train.metrics import read

    result = read_fields(workdir / "eval.json", {})
    numbers = {name: _decimals(value) for name, value in result.items()}
    show_rich(
        held_out_table(read(workdir / SAMPLES), 8),
        f"held-out FVE after RL   {numbers['fve']}  {numbers['fve_ci95']}   "
        f"({result['num_activations']} activations of {result['num_documents']} documents)\n"
        f"             before RL   {numbers['fve_before_rl']}   gain {numbers['fve_gain']} {numbers['fve_gain_ci95']}\n"
        f"             shuffled    {numbers['fve_shuffled']}   (explanations permuted across activations)\n"
        f"             as text     {numbers['fve_text']}   (decoded and tokenised again)\n"
        f"report: {workdir / 'report.html'}",
    )


def _decimals(value: Any) -> str:
    """Writes a number of eval.json, or an interval, with three decimals; null becomes `unknown`."""
    if isinstance(value, list):
        return f"[{', '.join(map(_decimals, value))}]"
    return f"{value:.3f}" if isinstance(value, int | float) else "unknown"


def _run_report(options: argparse.Namespace, _: list[str]) -> int:
    """Writes the report. It locks nothing, so a run may be training in the workdir."""
    from nlae_jax.report.page import write_report
    from nlae_jax.runtime.output import afterwards, show

    path = write_report(options.workdir)
    afterwards("stdout", lambda: show(str(path)))
    return 0


COMMANDS = (
    *(
        Command(name, help_text, _add_stage, run_stage_command, takes_overrides=True)
        for name, help_text in _STAGES.items()
    ),
    Command("report", "write report.html from the results so far", _add_workdir, _run_report),
)
