"""The one exception that reaches a user as a single line, and what makes text safe to be in one."""

from __future__ import annotations

import re

_BREAKS = re.compile(r"[ \t]*[\r\n\t]\s*")
_LONGEST = 2000  # characters of a message: whatever it quotes, it stays one that can be read


def one_line(text: object, longest: int = _LONGEST) -> str:
    """Text from outside as part of a line that is safe to print, and at most so many characters of it.

    Line breaks become spaces. Everything else that is not printable (control characters, marks that reorder their
    neighbours, lone surrogates) is written as an escape, such as `\\x1b`.
    """
    # Cut before the work and after it: an escape is up to ten characters long.
    whole = str(text)
    line = _BREAKS.sub(" ", whole[: longest + 1])
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


class UserError(Exception):
    """Something the user can put right: names the field or file, and what would be right.

    The command line prints the message alone and exits with code 2; `--debug` shows the traceback. Messages quote
    what files and servers say, so all of them are made safe to print here, once.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing; at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
