"""What a command prints on stdout. A stdout that takes it badly, or not at all, is told from a command that failed."""

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
    """What follows when everything asked for is done and on disk: it may fail, but the command has not."""
    try:
        work()
    except Exception as error:
        warn(f"{missing}: {' '.join(str(error).split()) or type(error).__name__}")


def check_file(path: Path, option: str) -> None:
    """Before the work whose result goes into a file. Raises UserError where it could not be written."""
    if path.exists() and not path.is_file():
        raise UserError(f"{option} {path}: should be a file; it is a directory, a pipe or a device")
    _check_parent(path, option)


def check_directory(path: Path, option: str) -> None:
    """The same of a directory."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {path}: should be a directory; it is a file")
    _check_parent(path / "file", option)


def _check_parent(path: Path, option: str) -> None:
    parent = next(one for one in path.absolute().parents if one.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{option} {path}: nothing can be written into {parent}")


def show(text: str) -> None:
    """A text on stdout. Raises UserError where that does not take it."""
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
    """One JSON object on stdout, in characters that it can say."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    show(json.dumps(plain(value), ensure_ascii=not unicode, allow_nan=False))


def show_rich(*parts: Any) -> None:
    """Tables and texts on stdout, as wide as the terminal. Nothing in a text is markup.

    Raises UserError where stdout does not take them.
    """
    try:
        console = Console(markup=False, emoji=False, highlight=False)
        with console.capture() as shown:
            for part in parts:
                console.print(part)
    except ValueError as error:  # of a stdout that is closed, which a console looks at first
        raise UserError(f"stdout: {error}") from None
    show(shown.get().removesuffix("\n"))
