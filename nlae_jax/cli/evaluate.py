"""`nlae eval`: runs the stage `eval` of a run, or the evaluation suite on any pair."""

from __future__ import annotations

import argparse
import math

from nlae_jax.cli.command import Command, add_distributed, start_jax
from nlae_jax.cli.pairs import add_pair, check_pair, check_workdir, load_pair
from nlae_jax.cli.stages import run_stage_command
from nlae_jax.runtime.errors import UserError

# Option -> the least value that it may have.
_LEAST = {"num_activations": 2, "temperature": 0, "sampled": 2, "control_steps": 0, "max_new_tokens": 1}


def _add_eval(command: argparse.ArgumentParser) -> None:
    help_text = "experiment file with get_config(); with --workdir, runs the stage eval of the run; without, reads "
    help_text += "the corpus of the config unless --text or --input is given"
    command.add_argument("--config", help=help_text)
    add_pair(command)
    command.add_argument(
        "--suite", metavar="A,B", help="measure only these sections, of reconstruction, text, meaning, truth, health"
    )
    command.add_argument("--text", action="append", default=[], help="a text to read; you can repeat the option")
    help_text = "file of texts (.txt, .jsonl, .parquet) or of activations (.parquet); you can repeat the option"
    command.add_argument("--input", action="append", default=[], metavar="FILE", help=help_text)
    command.add_argument("--out", help="directory for eval.json, report.html and finished work (default: the workdir)")
    command.add_argument("--num-activations", type=int, help="number of activations (default: the config's, or 256)")
    command.add_argument(
        "--temperature", type=float, help="temperature of the explanations (default: the config's, or 1)"
    )
    help_text = "number of activations that are explained several times (default 64)"
    command.add_argument("--sampled", type=int, help=help_text)
    help_text = (
        "training steps of each control decoder; 0 trains none (default: 60 if there are at least 128 activations)"
    )
    command.add_argument("--control-steps", type=int, help=help_text)
    help_text = "also measure explanations that the server of the config's describe.provider paraphrased and translated"
    command.add_argument("--reword", action="store_true", help=help_text)
    help_text = "also ask that server whether the texts support the explanations"
    command.add_argument("--judge", action="store_true", help=help_text)
    command.add_argument("--json", action="store_true", help="print eval.json on stdout")
    add_distributed(command)


# Options that the stage of a run, which goes by its config, has no use for.
_OF_SUITE = ("text", "input", "out", "num_activations", "temperature", "max_new_tokens", "sampled", "control_steps")


def _is_stage(options: argparse.Namespace) -> bool:
    """Whether the stage of a run is asked for. Where a server is to be asked, the config says which one instead."""
    return bool(options.config and options.workdir and not (options.reword or options.judge))


def _check_eval(options: argparse.Namespace) -> str:
    if problem := check_pair(options):
        return problem
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            return f"--{name.replace('_', '-')}: {value} should be at least {least}"
    for name in ("reword", "judge"):
        if getattr(options, name) and not options.config:
            return f"--{name} takes --config, whose describe.provider is the server to ask"
    used = [name for name in _OF_SUITE if getattr(options, name) not in (None, [])]
    if used and _is_stage(options) and not options.suite:
        return f"--{used[0].replace('_', '-')} is the suite's: add --suite, or leave --config out"
    if not options.workdir and not options.out:
        return "eval of a released pair takes --out, the directory that gets eval.json"
    if not options.workdir and not (options.text or options.input or options.config):
        return "eval of a released pair takes --text, --input or --config: what is read"
    return ""


def _run_eval(options: argparse.Namespace, overrides: list[str]) -> int:
    """Runs the stage where a config and a workdir are given, and the suite where --suite is, or no such config."""
    from nlae_jax.evaluate.suite import check_additions, sections_of

    if overrides and not options.config:
        raise UserError("--config.*: overrides change what --config gives, and there is none")
    if options.distributed is not None and (options.suite or not _is_stage(options)):
        raise UserError(
            "--distributed: the suite runs in one process, so leave it out; the stage (--config and --workdir without "
            "--suite) runs in several"
        )
    named = [name.strip() for name in (options.suite or "").split(",")]
    sections, as_json = sections_of([name for name in named if name]), options.json
    check_additions(sections, options.control_steps or 0, options.reword, options.judge, options.sampled)
    if _is_stage(options):
        options.json = as_json and not options.suite
        code = run_stage_command(options, overrides)
        if not options.suite:
            return code
    else:
        check_workdir(options)
        start_jax()
    _run_suite(options, overrides, sections, as_json)
    return 0


def _run_suite(options: argparse.Namespace, overrides: list[str], sections: tuple[str, ...], as_json: bool) -> None:
    """Runs `sections` of the suite on the activations that `options` name, and shows and writes the figures."""
    from nlae_jax.config import Config, load_experiment
    from nlae_jax.explore.sources import open_trained
    from nlae_jax.report.page import write_report
    from nlae_jax.report.suite import suite_table
    from nlae_jax.run.suite import rows_of_run, write_figures
    from nlae_jax.runtime.files import read_json
    from nlae_jax.runtime.output import afterwards, check_directory, show_json, show_rich
    from nlae_jax.runtime.progress import say

    if options.out:
        check_directory(options.out, "--out")
    config, rows = load_experiment(str(options.config), overrides) if options.config else Config(), None
    run = open_trained(options.workdir) if options.workdir else None
    out, nla, describe = options.out or options.workdir, load_pair(options, run), config.describe
    if run is not None:
        config = run.config
        if not (options.text or options.input):
            rows = rows_of_run(run, options.num_activations or config.eval.num_activations)
            if len(rows.h) < (options.num_activations or 0):
                say(f"eval: {options.num_activations} activations were asked for, and the run holds out {len(rows.h)}")
    figures = nla.evaluate(
        out,
        options.text,
        options.input,
        rows,
        sections,
        options.num_activations or config.eval.num_activations,
        config.eval.temperature if options.temperature is None else options.temperature,
        config.seed,
        config.eval.bootstrap_samples,
        options.control_steps,
        config.corpus if options.config and not (options.workdir or options.text or options.input) else None,
        describe if options.reword else None,
        describe if options.judge else None,
        options.sampled,
    )
    path = write_figures(out, figures)
    afterwards("no report", lambda: say(f"report: {write_report(out)}"))
    show = lambda: show_json(read_json(path)) if as_json else show_rich(suite_table(figures))  # noqa: E731
    afterwards("no results shown", show)


COMMANDS = (
    Command(
        "eval",
        "evaluate a run on held-out documents, or any pair: how much explanations carry, and whether they are true",
        _add_eval,
        _run_eval,
        takes_overrides=True,
        check=_check_eval,
    ),
)
