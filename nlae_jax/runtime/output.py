"""Prints a command's results on stdout. A stdout that cannot take them is reported as such, not as a failed command."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from nlae_jax.runtime import world
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import plain
from nlae_jax.runtime.progress import warn


def afterwards(missing: str, work: Callable[[], Any]) -> None:
    """Does work that follows a command whose results are already on disk. A failure gives a warning `missing: …`."""
    try:
        work()
    except Exception as error:
        warn(f"{missing}: {' '.join(str(error).split()) or type(error).__name__}")


def check_file(path: Path, option: str) -> None:
    """Raises UserError where a file cannot be written. Call it before the work whose result goes into the file."""
    if path.exists() and not path.is_file():
        raise UserError(f"{option} {path}: should be a file; it is a directory, a pipe or a device")
    _check_parent(path, option)


def check_directory(path: Path, option: str) -> None:
    """Raises UserError where a directory cannot be made or written into. Call it before the work."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {path}: should be a directory; it is a file")
    _check_parent(path / "file", option)


def _check_parent(path: Path, option: str) -> None:
    """Raises UserError where the nearest existing directory above `path` cannot be written into."""
    parent = next(directory for directory in path.absolute().parents if directory.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{option} {path}: nothing can be written into {parent}")


def show(text: str) -> None:
    """Prints a text on stdout. Raises UserError where stdout is closed or broken."""
    problem = "it is closed" if sys.stdout is None else ""
    try:
        if not problem:
            print(text, flush=True)
    except (OSError, ValueError) as error:
        world.mute(sys.stdout)
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        raise UserError(f"stdout: {problem}")


def show_json(value: Any) -> None:
    """Prints one JSON object on stdout, in ASCII unless stdout takes UTF-8."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    show(json.dumps(plain(value), ensure_ascii=not unicode, allow_nan=False))


def show_rich(*parts: Any) -> None:
    """Prints tables and texts on stdout, as wide as the terminal. Texts are printed as they are, without markup.

    Raises UserError where stdout is closed or broken.
    """
    try:
        console = Console(markup=False, emoji=False, highlight=False)
        with console.capture() as shown:
            for part in parts:
                console.print(part)
    except ValueError as error:  # a console examines stdout first, and fails on a closed one
        raise UserError(f"stdout: {error}") from None
    show(shown.get().removesuffix("\n"))
