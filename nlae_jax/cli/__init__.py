"""The `nlae` command: what is typed, the command that it names, and how an error ends."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence

from nlae_jax.cli import adapt, audit, directions, evaluate, explain, measures, serve, stages, steer
from nlae_jax.cli.command import LISTS, PATHS, Command
from nlae_jax.runtime import signals, supervision, world
from nlae_jax.runtime.errors import UserError, one_line

# What `nlae` knows to do, in the order of its help. Their modules import what they need when they run: `nlae --help`
# need not wait for it.
COMMANDS: tuple[Command, ...] = (
    *stages.COMMANDS,
    *evaluate.COMMANDS,
    *explain.COMMANDS,
    *directions.COMMANDS,
    *steer.COMMANDS,
    *audit.COMMANDS,
    *serve.COMMANDS,
    *adapt.COMMANDS,
    *measures.COMMANDS,
)

_NEGATIVE = re.compile(r"-[\d.:]")  # how a list of numbers may begin

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
    """The `nlae` command: what is typed, the command that it names, and how an error ends."""
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
    from nlae_jax.runtime.output import check_file

    if getattr(options, "workdir", None) is not None:
        given = options.workdir
        options.workdir = [workdir_path(one) for one in given] if isinstance(given, list) else workdir_path(given)
    if str(getattr(options, "out", "") or "").startswith("gs:/"):
        raise UserError("--out: should be a path here; `gcloud storage cp -r` takes it to a bucket")
    for name in PATHS:
        if (given := getattr(options, name, None)) is not None:
            several = isinstance(given, list)
            paths = [local_path(path, f"--{name}") for path in (given if several else [given])]
            setattr(options, name, paths if several else paths[0])
    if getattr(options, "html", None) is not None:
        check_file(options.html, "--html")


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
        if argument in LISTS and remaining and _NEGATIVE.match(remaining[0]):
            argument += f"={remaining.pop(0)}"  # argparse takes -1,2 for options, though not -1
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        override = argument.removeprefix("--config.")
        if "=" not in override and remaining:
            override += f"={remaining.pop(0)}"
        overrides.append(override)
    parser = argparse.ArgumentParser(prog="nlae", description="Train and use Natural Language Autoencoders.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=command.run, definition=command)
    options = parser.parse_args(rest)
    definition: Command = options.definition
    if overrides and not definition.takes_overrides:
        parser.error(f"{definition.name} takes no --config overrides: the workdir has its own config")
    if problem := definition.check(options):
        parser.error(problem)
    return options, overrides
