"""`nlae neuron` and `nlae direction`: explain a vector of the residual stream, with controls."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nlae_jax.cli.command import Command, seed, start_jax
from nlae_jax.cli.pairs import add_pair, check_pair, check_workdir, load_pair
from nlae_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from nlae_jax.api import NLA
    from nlae_jax.explore.corpus import Corpus
    from nlae_jax.explore.directions import DirectionReport, DirectionSettings


def _add_shared(command: argparse.ArgumentParser) -> None:
    add_pair(command)
    command.add_argument(
        "--steps",
        default="0.25,0.5,1,2",
        help="lengths of the push, relative to the median norm of activations (default 0.25,0.5,1,2)",
    )
    command.add_argument(
        "--controls", type=int, default=3, help="number of random directions, and of shuffled directions (default 3)"
    )
    command.add_argument("--contexts", type=int, default=8, help="number of top activating contexts (default 8)")
    command.add_argument(
        "--corpus",
        help=".txt, .jsonl or .parquet file of contexts (default: the run's corpus, or texts of the package)",
    )
    command.add_argument("--texts", type=int, default=128, help="number of texts of the corpus to search (default 128)")
    command.add_argument("--seed", type=seed, default=0, help="seed of the controls and the drawn contexts (default 0)")
    command.add_argument("--html", help="file for a page of the results")
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _add_direction(command: argparse.ArgumentParser) -> None:
    command.add_argument("direction", help="FILE.npy, or FILE.safetensors:KEY[ROW], such as a dictionary's W_dec[7]")
    _add_shared(command)


def _add_neuron(command: argparse.ArgumentParser) -> None:
    command.add_argument("neuron", nargs="?", help="BLOCK:NEURON, as 20:7, both counted from 0")
    command.add_argument(
        "--all", type=int, metavar="BLOCK", help="explain several neurons of this block, and write them to --out"
    )
    command.add_argument("--top", type=int, default=16, metavar="N", help="with --all: number of neurons (default 16)")
    command.add_argument(
        "--choose",
        choices=("peak", "random"),
        default="peak",
        help="with --all: the neurons whose largest value stands out most, or random neurons (default peak)",
    )
    command.add_argument(
        "--out", help="with --all: .jsonl file with one neuron a line, beside a page; the same command continues it"
    )
    help_text = "which weights to explain: the neuron's output (write, default) or its gate or up input"
    command.add_argument("--side", choices=("write", "gate", "up"), default="write", help=help_text)
    _add_shared(command)


def _check_neuron(options: argparse.Namespace) -> str:
    if (options.neuron is None) == (options.all is None):
        return "neuron takes BLOCK:NEURON, or --all BLOCK"
    if (options.all is None) != (options.out is None):
        return "--all and --out belong together: many neurons go into a file"
    if options.all is not None and (options.json or options.html):
        return "--all writes --out and a page beside it; --json and --html are for a single neuron"
    return check_pair(options)


def _settings(options: argparse.Namespace) -> DirectionSettings:
    from nlae_jax.explore.directions import DirectionSettings

    try:
        steps = tuple(float(step) for step in options.steps.split(","))
    except ValueError:
        raise UserError(f"--steps {options.steps}: should be numbers, as 0.25,0.5,1") from None
    if not all(0 < abs(step) < 1e6 for step in steps):
        raise UserError(f"--steps {options.steps}: should be finite numbers other than 0")
    for name in ("controls", "contexts", "texts"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: {getattr(options, name)} should be at least 1")
    return DirectionSettings(steps, options.controls, options.contexts, options.seed)


def _opened(options: argparse.Namespace) -> tuple[NLA, DirectionSettings]:
    """Loads the pair and reads the settings. Raises UserError for an adapted pair."""
    check_workdir(options)
    start_jax()
    settings = _settings(options)
    nla = load_pair(options)
    nla.check_own_subject(options.command)
    return nla, settings


def _corpus(nla: NLA, options: argparse.Namespace) -> Corpus:
    from nlae_jax.explore.corpus import read_corpus

    return read_corpus(nla, options.corpus, options.texts)


def _run_direction(options: argparse.Namespace, _: list[str]) -> int:
    nla, settings = _opened(options)
    from nlae_jax.explore.directions import explain_direction
    from nlae_jax.explore.vector_files import read_direction

    direction = read_direction(options.direction, nla.d_model)
    report = explain_direction(nla, direction.name, direction.vector, _corpus(nla, options), settings)
    _show(nla, report, options)
    return 0


def _run_neuron(options: argparse.Namespace, _: list[str]) -> int:
    from nlae_jax.runtime.output import check_file

    if options.out is not None:
        if options.out.suffix != ".jsonl":
            raise UserError(f"--out {options.out}: should be a .jsonl file; a page goes beside it")
        for path in (options.out, options.out.with_suffix(".html")):
            check_file(path, "--out")
    nla, settings = _opened(options)
    from nlae_jax.explore.neurons import explain_neuron, parse_neuron

    if options.all is not None:
        return _run_all(nla, options, settings)
    layer, index = parse_neuron(options.neuron, nla.subject.arch)
    report = explain_neuron(nla, layer, index, _corpus(nla, options), settings, side=options.side)
    _show(nla, report, options)
    return 0


def _run_all(nla: NLA, options: argparse.Namespace, settings: DirectionSettings) -> int:
    """Explains several neurons of a block into a file, and writes a page of all of them.

    An incomplete file of the same settings is continued.
    """
    import dataclasses

    from nlae_jax.data.corpus import read_json_lines
    from nlae_jax.explore.items import Results
    from nlae_jax.explore.neurons import check_layer, choose_neurons, explain_neuron, values_of
    from nlae_jax.explore.steer import wilson
    from nlae_jax.report.direction_page import write_direction_page
    from nlae_jax.runtime.progress import progress, say

    layer = check_layer(nla.subject.arch, options.all)
    explanations = 1 + (1 + 2 * settings.controls) * len(settings.steps) + settings.contexts
    count = min(options.top, nla.subject.arch.d_ff)
    say(
        f"{count} neurons, each {explanations} explanations of up to {nla.max_new_tokens} tokens and "
        f"{2 * settings.contexts * (3 + 2 * settings.controls)} short texts to score"
    )
    corpus = _corpus(nla, options)
    neurons = choose_neurons(nla, corpus, layer, options.top, options.choose == "random", options.seed)
    values = values_of(nla, corpus, layer, neurons)
    made_with = [nla.identity, corpus.digest(), layer, neurons, options.side, dataclasses.asdict(settings)]
    results = Results(options.out, {"neurons": [*made_with, nla.max_new_tokens]})
    with progress(len(neurons), f"neurons of block {layer}", unit="neuron", start=results.done) as bar:
        for place in range(results.done, len(neurons)):
            neuron = neurons[place]
            report = explain_neuron(nla, layer, neuron, corpus, settings, values[:, place], options.side)
            results.add(report.row(), ())
            bar.advance()
    reports = [row for _, row in read_json_lines(options.out)]
    page = options.out.with_suffix(".html")
    write_direction_page(page, reports, f"Neurons of block {layer}, {nla.name}")
    explained = sum(row["explained"] for row in reports)
    low, high = wilson(explained, len(reports))
    say(f"{explained} of {len(reports)} beat their controls (share {low:.2f} to {high:.2f}); page: {page}")
    return 0


def _show(nla: NLA, report: DirectionReport, options: argparse.Namespace) -> None:
    from nlae_jax.report.direction_page import direction_tables, write_direction_page
    from nlae_jax.runtime.output import show_json, show_rich
    from nlae_jax.runtime.progress import say

    row = report.row()
    if options.html:  # written first, because printing may fail
        write_direction_page(options.html, [row], f"{report.name}, {nla.name}")
        say(f"page: {options.html}")
    if options.json:
        show_json({**row, "pair": nla.description()})
    else:
        show_rich(*direction_tables(row))


COMMANDS = (
    Command("neuron", "explain an MLP neuron, beside controls", _add_neuron, _run_neuron, check=_check_neuron),
    Command(
        "direction",
        "explain a direction (probe, difference of means, row of a dictionary), beside controls",
        _add_direction,
        _run_direction,
        check=check_pair,
    ),
)
