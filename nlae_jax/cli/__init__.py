"""The `nlae` command: it parses the arguments, runs the command that they name, and reports errors."""

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
from nlae_jax.cli.command import LISTS, PATHS, WRITTEN, Command
from nlae_jax.runtime import signals, supervision, world
from nlae_jax.runtime.errors import UserError, first_line, one_line

# The commands of `nlae`, in the order of its help. Their modules import JAX and other slow packages only when a command
# runs, so that `nlae --help` need not wait for them.
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

_NEGATIVE = re.compile(r"-[\d.:]")  # a list of numbers may begin like this

# (error numbers, texts of errors, what to do): some libraries pass a system's error on as text, without its number.
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
    # Only as tensorstore reports it: a broken connection between processes has the same number.
    ((), ("ENOTCONN",), "the network file system is gone (transport endpoint is not connected)"),
    ((errno.EROFS,), ("Read-only file system",), "a read-only file system; nothing can be written there"),
    ((), ("PERMISSION_DENIED",), "permission denied; this user may not write or read there"),
)


# In errors of JAX about what its environment variables (JAX_PLATFORMS and others) say.
_JAX_SETTINGS = ("Unable to initialize backend", " for JAX flag ")


def entry() -> int:
    """Runs the command of this process's arguments and returns its exit code."""
    _with_huge_pages()
    for descriptor in range(3):  # a file that takes a closed standard stream's number would get the output
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    code = main()
    if code:
        # Errors in finalizers, such as those of asyncio's tasks on a closed loop, would hide the line with the reason.
        sys.unraisablehook = lambda _: None
        logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command of `arguments` (default: this process's) and returns its exit code.

    0 means done. 2 means that the user must correct something, which one line names. 130 means interrupted.
    `supervision.PREEMPTED` means asked to stop by SIGTERM; the state is saved if there was time. `supervision.LOST`
    means that another process of the run is gone. After the last three the same command continues.
    """
    options, overrides = _parse(sys.argv[1:] if arguments is None else arguments)
    with contextlib.suppress(AttributeError, ValueError, OSError):  # stdout is missing, closed, or of another type
        getattr(sys.stdout, "reconfigure")(errors="replace")  # noqa: B009 (a stream of another type has none)
    try:
        with signals.interruptible(supervision.interrupt, supervision.grace, world.tell):
            return _run(options, overrides)
    except KeyboardInterrupt:  # pressed again while the end was being reported
        return supervision.INTERRUPTED


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Runs the command, turns its errors into lines on stderr, and returns the exit code."""
    try:
        _resolve_paths(options)
        with supervision.preemptible() if hasattr(options, "distributed") else contextlib.nullcontext():
            return supervision.end(options.run(options, overrides))
    except supervision.Preempted:
        return supervision.end(_fail("preempted; the same command continues", None, False, code=supervision.PREEMPTED))
    except KeyboardInterrupt:
        return _fail("interrupted; the same command continues", None, False, code=supervision.INTERRUPTED)
    except Exception as error:
        if signals.interrupted():  # a library has turned KeyboardInterrupt into another error
            return _fail("interrupted; the same command continues", None, False, code=supervision.INTERRUPTED)
        if supervision.severed(error) and not isinstance(error, UserError):
            supervision.wait_for_verdict()  # returns only where no other process is the cause
        if (message := _explained(error, options)) is not None:
            return _fail(message, error, options.debug)
        if world.count() > 1:
            traceback.print_exception(error)
            return supervision.end(1, _line(f"{type(error).__name__}: {error}"))
        raise


def _explained(error: Exception, options: argparse.Namespace) -> str | None:
    """Returns the line for an error that a user can correct, or None for a fault of this program."""
    if isinstance(error, UserError):
        return str(error)
    place = str(getattr(options, "out", None) or getattr(options, "workdir", None) or "the disk")
    if isinstance(error, OSError) and error.filename is not None and not str(error.filename).startswith(place):
        place = str(error.filename)  # such as a file of the cache
    for numbers, texts, message in _SYSTEM_ERRORS:
        if getattr(error, "errno", None) in numbers or any(text in str(error) for text in texts):
            return f"{place}: {message}"
    if "RESOURCE_EXHAUSTED" in str(error):  # checked after the disk, whose errors contain the same word
        return "out of device memory; more devices need less of each, and so do smaller batches or bfloat16"
    if any(text in str(error) for text in _JAX_SETTINGS):
        return f"JAX's settings in the environment: {first_line(error)}"
    if isinstance(error, MemoryError):
        return "out of memory; smaller batches or bfloat16 need less"
    if isinstance(error, OSError) and error.filename is not None:  # permission denied, not a directory, ...
        return f"{error.filename}: {error.strerror}"
    return None


def _resolve_paths(options: argparse.Namespace) -> None:
    """Turns the texts of path options, with `~`, into paths. Raises UserError that names the option."""
    from nlae_jax.runtime.files import local_path, workdir_path
    from nlae_jax.runtime.output import check_file

    if getattr(options, "workdir", None) is not None:
        names = options.workdir
        options.workdir = [workdir_path(name) for name in names] if isinstance(names, list) else workdir_path(names)
    if str(getattr(options, "out", "") or "").startswith("gs:/"):
        raise UserError("--out: should be a path here; `gcloud storage cp -r` takes it to a bucket")
    for name in PATHS:
        if (value := getattr(options, name, None)) is not None:
            several = isinstance(value, list)
            paths = [local_path(path, f"--{name}") for path in (value if several else [value])]
            setattr(options, name, paths if several else paths[0])
    if getattr(options, "html", None) is not None:
        check_file(options.html, "--html")
    _refuse_overwriting(options)


def _refuse_overwriting(options: argparse.Namespace) -> None:
    """Raises UserError where a file that is to be written is another option's file too."""
    names: dict[str, str] = {}
    for name in (*(name for name in PATHS if name not in WRITTEN), *WRITTEN):
        value = getattr(options, name, None)
        for path in value if isinstance(value, list) else [value] if value is not None else []:
            # Unlike Path.resolve, this raises nothing for links that form a circle.
            other = names.setdefault(os.path.realpath(path), name)
            if name in WRITTEN and other != name:
                raise UserError(f"--{name} {path}: is the file of --{other} too, and would be written over")


def _with_huge_pages() -> None:
    """Restarts the process with glibc set to allocate large blocks in pages of 2 MB, unless it is set already.

    XLA on a CPU allocates and frees gigabytes at every step. In pages of 4 kB that alone takes a ninth of an RL step.
    glibc reads the setting at the start of a process, so it cannot be made later. Other C libraries ignore it.
    GLIBC_TUNABLES=glibc.malloc.hugetlb=0 switches it off.
    """
    setting = "glibc.malloc.hugetlb"
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or not sys.executable or sys.gettrace() or setting in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{setting}=1"]))
    with contextlib.suppress(OSError):  # without the restart the command works, but slower
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _fail(message: str, error: BaseException | None, debug: bool, code: int = 2) -> int:
    """Prints the message in one line and returns the exit code. The run's other processes end with the same one.

    With `debug` a single process raises the error instead.
    """
    if debug and error is not None:
        if world.count() == 1:
            raise error
        traceback.print_exception(error)
    if code != supervision.PREEMPTED or world.is_first():
        world.tell(f"nlae: {_line(message)}")
    return code if code == supervision.PREEMPTED else supervision.end(code, _line(message))


def _line(message: str) -> str:
    """Makes a message one line that is safe to print."""
    return one_line(" ".join(message.split()))


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the arguments into options and `--config.a.b=v` (or `--config.a.b v`) overrides.

    Overrides are split off first, because argparse cannot know the config's fields.
    """
    rest: list[str] = []
    overrides: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument in LISTS and remaining and _NEGATIVE.match(remaining[0]):
            argument += f"={remaining.pop(0)}"  # argparse takes -1,2 for an option, although not -1
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
