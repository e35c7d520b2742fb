"""`nlae train` and its stages one by one, `nlae report`."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from nlae_jax.cli.command import Command, add_distributed, start_jax
from nlae_jax.runtime import supervision, world

if TYPE_CHECKING:  # importing it takes half a second, and `nlae --help` need not wait
    from nlae_jax.runtime.files import AnyPath

_STAGES = {
    "train": "every stage that is not finished: extract, describe, sft, rl, eval, report",
    "extract": "read the subject's activations from the text",
    "describe": "describe the contexts that the warm start learns from",
    "sft": "warm-start encoder and decoder on the descriptions",
    "rl": "train both on how well the round trip works",
    "eval": "measure the round trip on held-out documents",
}


def _add_workdir(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workdir", required=True, help="directory or gs://BUCKET/NAME that keeps everything; run again to resume"
    )


def _add_stage(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, help="experiment file with get_config()")
    _add_workdir(command)
    add_distributed(command)


def _add_eval(command: argparse.ArgumentParser) -> None:
    _add_stage(command)
    command.add_argument("--json", action="store_true", help="print eval.json on stdout")


def _run_stage(options: argparse.Namespace, overrides: list[str]) -> int:
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
    """What a run shows for it: held-out samples, the FVE with its controls, where the report is."""
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
    """A number of eval.json to three decimals, or an interval of two; `unknown` for null."""
    if isinstance(value, list):
        return f"[{', '.join(map(_decimals, value))}]"
    return f"{value:.3f}" if isinstance(value, int | float) else "unknown"


def _run_report(options: argparse.Namespace, _: list[str]) -> int:
    """Also of a run that is under way: nothing is run, nothing locked."""
    from nlae_jax.report.page import write_report
    from nlae_jax.runtime.output import afterwards, show

    path = write_report(options.workdir)
    afterwards("stdout", lambda: show(str(path)))
    return 0


COMMANDS = (
    *(
        Command(name, help_text, _add_eval if name == "eval" else _add_stage, _run_stage, takes_overrides=True)
        for name, help_text in _STAGES.items()
    ),
    Command("report", "write report.html from what is there so far", _add_workdir, _run_report),
)
