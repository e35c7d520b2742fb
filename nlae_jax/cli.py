"""The `nlae` command."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import math
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlae_jax.runtime import processes, signals, supervision, world
from nlae_jax.runtime.errors import UserError, one_line

if TYPE_CHECKING:  # importing it takes half a second, and `nlae --help` need not wait
    from nlae_jax.runtime.files import AnyPath

_STAGES = {
    "train": "every stage that is not finished: extract, describe, sft, rl, eval, report",
    "extract": "read the subject's activations from the text",
    "describe": "describe the contexts that the warm start learns from",
    "sft": "warm-start encoder and decoder on the descriptions",
    "rl": "train both on how well the round trip works",
    "eval": "measure the round trip on held-out documents",
    "report": "write report.html from what is there so far",
}

# Of --workdir, --model, --av, --ar: which are given.
_PAIRS = ((True, False, False, False), (False, True, False, False), (False, False, True, True))

_MOST_TEXT_BYTES = 16 << 20  # of a text to explain; far more than its tokens may be
_SILENT_SECONDS = 60.0  # that a pipe may take to give more of it

# What an error of the system says, with or without its number: libraries hand some on as text -> what to do.
_SYSTEM_ERRORS = (
    (
        (errno.ENOSPC, errno.EDQUOT),
        ("No space left on device", "RESOURCE_EXHAUSTED: Disk", "Disk quota exceeded"),
        "no space left; free some and run the same command again",
    ),
    ((errno.EFBIG,), ("File too large",), "a file there would be larger than allowed (ulimit -f); raise that limit"),
    ((errno.EMFILE, errno.ENFILE), ("Too many open files",), "too many open files (ulimit -n); raise that limit"),
    ((errno.EIO,), ("Input/output error",), "the disk gives input/output errors"),
    ((errno.ESTALE,), ("Stale file handle",), "the network file system is gone (stale file handle)"),
)


def entry() -> int:
    """The `nlae` command."""
    _with_huge_pages()
    for descriptor in range(3):  # a file opened where a standard stream was closed would get what is printed
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    code = main()
    if code:
        # What fails in finalizers now, as asyncio's tasks on a loop that is closed, would bury the line that says why.
        sys.unraisablehook = lambda _: None
        logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. 0: done. 2: something the user can put right, said in one line. 130: interrupted by hand.

    `supervision.PREEMPTED`: told to stop by SIGTERM, and what was reached is saved if there was time.
    `supervision.LOST`: another process of the run is gone. After these three the same command continues.
    """
    options, overrides = _parse(sys.argv[1:] if arguments is None else arguments)
    with contextlib.suppress(AttributeError, ValueError, OSError):  # there is none, it is closed, or somebody else's
        getattr(sys.stdout, "reconfigure")(errors="replace")  # noqa: B009 (a stream of another kind has none)
    try:
        with signals.interruptible(supervision.interrupt, supervision.grace, world.tell):
            return _run(options, overrides)
    except KeyboardInterrupt:  # while the end was being told
        return supervision.INTERRUPTED


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    """The command and its exit code."""
    try:
        _resolve_paths(options)
        with supervision.preemptible() if hasattr(options, "distributed") else contextlib.nullcontext():
            return supervision.end(options.run(options, overrides))
    except supervision.Preempted:
        return supervision.end(_fail("preempted; the same command continues", None, False, code=supervision.PREEMPTED))
    except KeyboardInterrupt:
        return _fail("interrupted; the same command continues", None, False, code=supervision.INTERRUPTED)
    except Exception as error:
        if signals.interrupted():  # within a library that made another error of it
            return _fail("interrupted; the same command continues", None, False, code=supervision.INTERRUPTED)
        if supervision.severed(error) and not isinstance(error, UserError):
            supervision.wait_for_verdict()  # back only where the error is this process's own
        if (message := _explained(error, options)) is not None:
            return _fail(message, error, options.debug)
        if world.count() > 1:
            traceback.print_exception(error)
            return supervision.end(1, _line(f"{type(error).__name__}: {error}"))
        raise


def _explained(error: Exception, options: argparse.Namespace) -> str | None:
    """The line for an error that a person can put right; None for a mistake of ours."""
    if isinstance(error, UserError):
        return str(error)
    place = str(getattr(options, "out", None) or getattr(options, "workdir", None) or "the disk")
    if isinstance(error, OSError) and error.filename is not None and not str(error.filename).startswith(place):
        place = str(error.filename)  # the cache, say
    for numbers, texts, message in _SYSTEM_ERRORS:
        if getattr(error, "errno", None) in numbers or any(text in str(error) for text in texts):
            return f"{place}: {message}"
    if "RESOURCE_EXHAUSTED" in str(error):  # after the disk, which says the same
        return "out of device memory; more devices need less of each, and so do smaller batches or bfloat16"
    if isinstance(error, MemoryError):
        return "out of memory; smaller batches or bfloat16 need less"
    if isinstance(error, OSError) and error.filename is not None:  # denied, no directory, a directory, ...
        return f"{error.filename}: {error.strerror}"
    return None


def _resolve_paths(options: argparse.Namespace) -> None:
    """Paths as a person writes them, `~` and all, as paths. Raises UserError naming the option."""
    from nlae_jax.runtime.files import local_path, workdir_path

    if getattr(options, "workdir", None) is not None:
        options.workdir = workdir_path(options.workdir)
    if str(getattr(options, "out", "") or "").startswith("gs:/"):
        raise UserError("--out: should be a path here; `gcloud storage cp -r` takes it to a bucket")
    for name in ("config", "out", "file", "html"):
        if getattr(options, name, None) is not None:
            setattr(options, name, local_path(getattr(options, name), f"--{name}"))


def _with_huge_pages() -> None:
    """Starts the process again with glibc told to ask for large blocks in pages of 2 MB, unless it was told already.

    XLA on a CPU takes and returns gigabytes at every step; in pages of 4 kB that alone is a ninth of an RL step. The
    setting is read before anything runs, so it cannot be made later. Other C libraries ignore it, and so does whoever
    sets GLIBC_TUNABLES=glibc.malloc.hugetlb=0.
    """
    setting = "glibc.malloc.hugetlb"
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or not sys.executable or sys.gettrace() or setting in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{setting}=1"]))
    with contextlib.suppress(OSError):  # it works without, only slower
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _fail(message: str, error: BaseException | None, debug: bool, code: int = 2) -> int:
    """Says it in one line. Where other processes take part, they end likewise, and this one here."""
    if debug and error is not None:
        if world.count() == 1:
            raise error
        traceback.print_exception(error)
    if code != supervision.PREEMPTED or world.is_first():
        world.tell(f"nlae: {_line(message)}")
    return code if code == supervision.PREEMPTED else supervision.end(code, _line(message))


def _line(message: str) -> str:
    return one_line(" ".join(message.split()))


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits off `--config.a.b=v` (or `--config.a.b v`) overrides, which argparse cannot know."""
    rest: list[str] = []
    overrides: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        override = argument.removeprefix("--config.")
        if "=" not in override and remaining:
            override += f"={remaining.pop(0)}"
        overrides.append(override)
    parser = argparse.ArgumentParser(prog="nlae", description="Train and use Natural Language Autoencoders.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in _STAGES.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        if name != "report":
            command.add_argument("--config", required=True, help="experiment file with get_config()")
        command.add_argument(
            "--workdir", required=True, help="directory or gs://BUCKET/NAME that keeps everything; run again to resume"
        )
        if name != "report":
            _add_distributed(command)
        if name == "eval":
            command.add_argument("--json", action="store_true", help="print eval.json on stdout")
        command.set_defaults(run=_run_report if name == "report" else _run_stage)
    explain = commands.add_parser("explain", help="say what a text's activations hold, token by token")
    explain.add_argument("--workdir", help="of a trained run")
    explain.add_argument("--model", help="instead: a shipped pair (smollm2-135m), or a directory with av/ and ar/")
    explain.add_argument("--av", help="instead: a released encoder's directory or hub id, with --ar")
    explain.add_argument("--ar", help="its decoder")
    explain.add_argument("--subject", default="", help="of a released pair: the model that reads the text")
    help_text = "of a released pair's weights and the subject's (default float32)"
    explain.add_argument("--dtype", choices=("float32", "bfloat16"), help=help_text)
    explain.add_argument("--max-new-tokens", type=int, help="length of an explanation (default: the run's, or 200)")
    source = explain.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", action="append", help="the text itself; may be given several times")
    source.add_argument("--file", help="a UTF-8 text file")
    explain.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest explanation (default)")
    explain.add_argument("--html", help="file that gets a page: tokens coloured by score, words on hover")
    explain.add_argument("--json", action="store_true", help="one JSON object on stdout")
    explain.set_defaults(run=_run_explain)
    help_text = "write the trained pair as model directories that transformers and the PyTorch reference load"
    export = commands.add_parser("export", help=help_text, description=help_text)
    export.add_argument("--workdir", required=True, help="of a trained run")
    export.add_argument("--out", required=True, help="directory that gets av/ and ar/")
    export.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"), help="of the weights"
    )
    export.add_argument("--adapters", action="store_true", help="the adapters alone, which need the base model")
    export.add_argument("--datasets", action="store_true", help="also av_sft, ar_sft, rl and held_out as parquet files")
    export.set_defaults(run=_run_export)
    help_text = (
        "fit a linear map from another model's activations into those of a pair's, which then explains that model"
    )
    adapt = commands.add_parser("adapt", help=help_text, description=help_text)
    adapt.add_argument("--model", required=True, help="the model: a directory, GGUF file, hub id or pypi:WHEEL")
    adapt.add_argument("--layer", required=True, type=int, help="its block whose output is read, from 0")
    adapt.add_argument("--to", required=True, help="the pair: shipped (smollm2-135m), or a directory with av/ and ar/")
    adapt.add_argument("--out", required=True, help="directory that gets the map; `explain --model` takes it")
    adapt.add_argument("--corpus", default="", help="glob of texts, or warmstart (default: installed documentation)")
    adapt.add_argument("--documents", type=int, default=400, help="texts that both models read (default 400)")
    adapt.add_argument("--positions", type=int, default=8, help="places of each text (default 8)")
    adapt.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both models' weights")
    adapt.add_argument("--json", action="store_true", help="one JSON object on stdout")
    adapt.set_defaults(run=_run_adapt)
    help_text = "time the phases of the real steps and what of the machine's peak they use"
    bench = commands.add_parser("bench", help=help_text, description=help_text)
    bench.add_argument("--config", required=True, help="experiment file with get_config()")
    bench.add_argument(
        "--repeats", type=int, default=3, help="timed calls of each phase; the median counts (default 3)"
    )
    bench.add_argument("--json", action="store_true", help="one JSON object on stdout")
    _add_distributed(bench)
    bench.set_defaults(run=_run_bench)
    help_text = "compile the real steps for a TPU topology, here: memory and time per chip, fits or what to change"
    plan = commands.add_parser("plan", help=help_text, description=help_text)
    plan.add_argument("--config", required=True, help="experiment file with get_config()")
    plan.add_argument("--topology", required=True, help="GENERATION:SHAPE, as v5e:2x4 or v5p:4x4x8")
    plan.add_argument("--steps", help="only these, as extract,encoder_sft,decoder_sft,rl (default: all)")
    plan.add_argument("--out", help="file that gets the plan as JSON too")
    plan.add_argument("--json", action="store_true", help="one JSON object on stdout")
    plan.set_defaults(run=_run_plan)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(rest)
    if overrides and options.command in ("adapt", "explain", "export", "report"):
        parser.error(f"{options.command} takes no --config overrides: the workdir has its own config")
    if options.command == "explain":
        given = tuple(map(bool, (options.workdir, options.model, options.av, options.ar)))
        if given not in _PAIRS:
            parser.error("explain takes --workdir, or --model, or --av and --ar")
    if options.command == "explain" and options.workdir and (options.subject or options.dtype):
        parser.error("--subject and --dtype belong to a released pair; the workdir has its own")
    return options, overrides


def _add_distributed(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="auto|HOST:PORT,COUNT,INDEX",
        help="be one of several processes on one mesh: found from the TPU pod, Slurm, Open MPI, Kubernetes or "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID (auto), or as given",
    )


def _start_jax(distributed: str | None = None) -> None:
    """Compiled programs are kept between runs; set before anything is compiled. `distributed`: the flag's value."""
    import jax

    from nlae_jax.lm.pretrained import cache_directory

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers would warn at every start that there is no PyTorch; none is needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logger = logging.getLogger("nlae_jax")
    if not logger.handlers:  # counts of what was dropped; other libraries' logs stay as they are
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    if jax.config.values["jax_compilation_cache_dir"] is None:  # not chosen by JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if distributed is not None:
        processes.start(distributed)
        if not world.is_first():
            logger.setLevel(logging.WARNING)


def _run_report(options: argparse.Namespace, _: list[str]) -> int:
    """Also of a run that is under way: nothing is run, nothing locked."""
    from nlae_jax.report.page import write_report
    from nlae_jax.runtime.output import afterwards, show

    path = write_report(options.workdir)
    afterwards("stdout", lambda: show(str(path)))
    return 0


def _run_stage(options: argparse.Namespace, overrides: list[str]) -> int:
    from nlae_jax.config import load_experiment

    config = load_experiment(str(options.config), overrides)
    supervision.set_grace(config.checkpoint.grace_seconds)
    _start_jax(options.distributed)
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


def _run_bench(options: argparse.Namespace, overrides: list[str]) -> int:
    from nlae_jax.config import load_experiment

    config = load_experiment(str(options.config), overrides)
    if options.repeats < 1:
        raise UserError(f"--repeats: {options.repeats} should be at least 1")
    supervision.set_grace(config.checkpoint.grace_seconds)
    _start_jax(options.distributed)
    from nlae_jax.bench.steps import as_table, bench

    result = bench(config, options.repeats)
    if not world.is_first():
        return 0
    _show(result, as_table, options.json)
    return 0


def _show(result: dict[str, Any], as_table: Callable[[dict[str, Any]], Any], as_json: bool) -> None:
    """Numbers on stdout: one JSON object, or a table."""
    from nlae_jax.runtime.output import show_json, show_rich

    if as_json:
        show_json(result)
    else:
        show_rich(as_table(result))


def _run_plan(options: argparse.Namespace, overrides: list[str]) -> int:
    from nlae_jax.config import load_experiment

    config = load_experiment(str(options.config), overrides)
    _start_jax()
    from nlae_jax.plan.report import STEPS, as_table, plan
    from nlae_jax.runtime.files import write_json

    result = plan(config, options.topology, options.steps.split(",") if options.steps else STEPS)
    if options.out:
        write_json(options.out, result)
    _show(result, as_table, options.json)
    return 0


def _run_export(options: argparse.Namespace, _: list[str]) -> int:
    _start_jax()
    from nlae_jax.api import open_run
    from nlae_jax.run.export import export
    from nlae_jax.run.training import trained_pair
    from nlae_jax.runtime.output import afterwards, show

    run = open_run(options.workdir)
    export(run, trained_pair(run), options.out, options.dtype, options.datasets, options.adapters)
    afterwards("stdout", lambda: show("\n".join(str(path) for path in sorted(options.out.iterdir()))))
    return 0


def _run_adapt(options: argparse.Namespace, _: list[str]) -> int:
    for name in ("documents", "positions"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: {getattr(options, name)} should be at least 1")
    _start_jax()
    from nlae_jax.config import CorpusConfig
    from nlae_jax.interop.adapt import WARNING, adapt_pair
    from nlae_jax.report.table import adaptation_table
    from nlae_jax.runtime.progress import say

    corpus = CorpusConfig(path=options.corpus, max_documents=options.documents)
    chosen = options.model, options.layer, options.to, options.out, corpus, options.positions, options.dtype
    _show(adapt_pair(*chosen), adaptation_table, options.json)
    say(f"{options.out}: `nlae explain --model {options.out}` takes it; {WARNING}")
    return 0


def _run_explain(options: argparse.Namespace, _: list[str]) -> int:
    if options.workdir and not (options.workdir / "config.json").exists():
        raise UserError(f"--workdir {options.workdir}: no config.json there; it should be the workdir of a run")
    # Bytes of an argument that are not UTF-8 arrive as lone surrogates.
    given = [text.encode("utf-8", "replace").decode() for text in options.text or ()]
    texts = [text.removeprefix("\ufeff") for text in given or [_read_text(options.file)]]  # a mark, and not text
    if not all(text.strip() for text in texts):
        raise UserError(f"{'--text' if given else options.file}: empty; there is nothing to explain")
    if not 0 <= options.temperature < math.inf:
        raise UserError(f"--temperature: {options.temperature} should be 0 or more")
    _start_jax()
    from nlae_jax.api import NLA
    from nlae_jax.config import MeshConfig
    from nlae_jax.mesh import make_mesh
    from nlae_jax.report.table import explanation_table
    from nlae_jax.runtime.output import show_json, show_rich

    if options.workdir:
        nla = NLA.from_workdir(options.workdir)
    else:
        # All devices share the weights: the larger pairs need more than one.
        mesh = make_mesh(MeshConfig(fsdp=-1))
        av, ar = (options.model, "") if options.model else (options.av, options.ar)
        nla = NLA.from_pretrained(av, ar, options.subject, options.dtype or "float32", mesh)
    nla.max_new_tokens = options.max_new_tokens or nla.max_new_tokens
    explained = nla.explain_texts(texts, temperature=options.temperature)
    if options.json:
        results = [{"tokens": tokens} for tokens in explained]
        show_json(results[0] if len(results) == 1 else {"texts": results})
    else:
        for tokens in explained:
            show_rich(explanation_table(tokens))
    if options.html:
        from nlae_jax.report.explanation_page import write_explanation_page
        from nlae_jax.runtime.progress import say

        name = options.model or str(options.workdir or options.av)
        write_explanation_page(options.html, explained, name, nla.layer)
        say(f"page: {options.html}")
    return 0


def _read_text(path: Path) -> str:
    """A UTF-8 text, from a pipe too. Raises UserError where it is none, has no end, or is too long to be explained."""
    try:
        return _read_all(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--file {path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"--file {path}: cannot be read ({error.strerror})") from None


def _read_all(path: Path) -> bytes:
    """A file, or what is written into a pipe: at most `_MOST_TEXT_BYTES` of it."""
    data = b""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # it would wait for a pipe that nobody writes into
    try:
        while True:
            try:
                piece = os.read(descriptor, 1 << 20)
            except BlockingIOError:  # there is a writer, who says nothing
                if select.select([descriptor], [], [], _SILENT_SECONDS)[0]:
                    continue
                break
            if not piece:
                return data
            data += piece
            if len(data) > _MOST_TEXT_BYTES:
                raise UserError(f"--file {path}: more than {_MOST_TEXT_BYTES:,} bytes; cut it into parts")
    finally:
        os.close(descriptor)
    raise UserError(f"--file {path}: nothing more came within {_SILENT_SECONDS:.0f} s")
