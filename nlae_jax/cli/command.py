"""The definition of a command, and functions that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

from nlae_jax.runtime import processes, world

# Options whose values are paths on this machine.
PATHS = ("config", "out", "file", "html", "chat", "input", "vectors", "corpus", "terms")

# Those of them that are written.
WRITTEN = ("out", "html")

# Options whose values are lists of numbers or ranges, which may begin with a minus sign.
LISTS = ("--positions", "--span", "--at", "--steps", "--alphas")


@dataclasses.dataclass(frozen=True)
class Command:
    """The command `nlae NAME`. `run` gets the options and the `--config` overrides, and returns the exit code.

    `check` returns one line that says what is wrong with the combination of options, or "".
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[str]], int]
    takes_overrides: bool = False
    check: Callable[[argparse.Namespace], str] = lambda options: ""


def seed(text: str) -> int:
    """Parses the value of a --seed: a whole number that every random number generator here accepts."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text} should be a whole number from 0 to {2**31 - 1}")
    return int(text)


def add_distributed(command: argparse.ArgumentParser) -> None:
    """Adds the option --distributed."""
    command.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="auto|HOST:PORT,COUNT,INDEX",
        help="run as one of several processes on one mesh; auto (default) finds the other processes on a TPU pod, "
        "Slurm, Open MPI or Kubernetes, or from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )


def start_jax(distributed: str | None = None) -> None:
    """Sets JAX up before anything is compiled: compiled programs are stored between runs.

    `distributed` is the value of the option. With it, this process joins the run's other processes.
    """
    import jax

    from nlae_jax.lm.pretrained import cache_directory
    from nlae_jax.runtime.outside import clean_log

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Otherwise transformers warns at every start that PyTorch is missing, which is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logger = logging.getLogger("nlae_jax")
    if not logger.handlers:  # shows our counts of dropped items; other libraries' logs stay as they are
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
        clean_log("nlae_jax")
    jax.config.update("jax_enable_x64", False)  # with JAX_ENABLE_X64, numbers without a dtype would not be float32
    if jax.config.values["jax_compilation_cache_dir"] is None:  # not chosen by JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if distributed is not None:
        processes.start(distributed)
        if not world.is_first():
            logger.setLevel(logging.WARNING)


def show_result(result: dict[str, Any], as_table: Callable[[dict[str, Any]], Any], as_json: bool) -> None:
    """Prints numbers on stdout as one JSON object or as a table."""
    from nlae_jax.runtime.output import show_json, show_rich

    if as_json:
        show_json(result)
    else:
        show_rich(as_table(result))
