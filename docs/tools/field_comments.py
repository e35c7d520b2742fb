"""Shows the fields of a configuration dataclass as a table, each with its comment: at its line's end or above it."""

from __future__ import annotations

import functools
import io
import tokenize
from pathlib import Path
from typing import Any

import griffe

_LONGEST = 40  # characters of a default that is shown


class FieldComments(griffe.Extension):
    """For dataclasses whose fields are explained by comments, as `nlae_jax/config.py` has them."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.module.path != "nlae_jax.config" or not isinstance(cls.filepath, Path):
            return
        comments = _comments(cls.filepath)
        rows = [
            f"| `{name}` | {field.annotation} | {_default(field)} | {_comment(comments, field)} |"
            for name, field in cls.attributes.items()
            if not str(field.annotation).endswith("Config")
        ]
        said = f"{cls.docstring.value}\n\n" if cls.docstring else ""
        table = "\n".join(("| field | type | default | meaning |", "|---|---|---|---|", *rows))
        cls.docstring = griffe.Docstring(said + table, parent=cls)


def _default(field: griffe.Attribute) -> str:
    value = field.value
    if isinstance(value, griffe.ExprCall) and str(value.function) == "option":
        value = value.arguments[0]
    text = str(value)
    return f"`{text}`" if len(text) <= _LONGEST else "a text, see the source"


def _comment(comments: dict[int, tuple[bool, str]], field: griffe.Attribute) -> str:
    """What ends the field's last line, or the whole lines right above its first."""
    if field.endlineno in comments:
        return comments[field.endlineno][1]
    above, line = [], (field.lineno or 0) - 1
    while comments.get(line, (False, ""))[0]:
        above.insert(0, comments[line][1])
        line -= 1
    return " ".join(above)


@functools.cache
def _comments(path: Path) -> dict[int, tuple[bool, str]]:
    """Line number -> whether the comment is all of the line, and its text, fit for a table."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    found = (token for token in tokens if token.type == tokenize.COMMENT)
    return {
        token.start[0]: (token.line.lstrip().startswith("#"), token.string.lstrip("# ").replace("|", "\\|"))
        for token in found
    }
