"""The exception that a user sees as a single line, and the functions that make text safe to print in one."""

from __future__ import annotations

import re

_BREAKS = re.compile(r"[ \t]*[\r\n\t]\s*")
_LONGEST = 2000  # characters of a message: it stays readable whatever it quotes


def one_line(text: object, longest: int = _LONGEST) -> str:
    """Makes text from outside safe to print within a line, and cuts it to `longest` characters.

    Line breaks become spaces. Everything else that is not printable (control characters, marks that reorder their
    neighbours, lone surrogates) is written as an escape, such as `\\x1b`.
    """
    # Cut before the work and after it: an escape is up to ten characters long.
    raw = str(text)
    line = _BREAKS.sub(" ", raw[: longest + 1])
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


class UserError(Exception):
    """An error that the user can correct. Its message names the field or file, and says what would be right.

    The command line prints only the message and exits with code 2; `--debug` shows the traceback. Messages quote text
    from files and servers, so every message is made safe to print here.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type where it has none; at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
