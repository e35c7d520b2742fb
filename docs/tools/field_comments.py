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
            f"| `{name}` | {_kind(field)} | {_default(field)} | {_meaning(comments, field)} |"
            for name, field in cls.attributes.items()
            if not str(field.annotation).endswith("Config") and "property" not in field.labels
        ]
        said = f"{cls.docstring.value}\n\n" if cls.docstring else ""
        table = "\n".join(("| field | type | default | meaning |", "|---|---|---|---|", *rows))
        cls.docstring = griffe.Docstring(said + table, parent=cls)


def _kind(field: griffe.Attribute) -> str:
    """Its type, without the character that would end a cell of the table."""
    return str(field.annotation).replace(" | ", " or ")


def _option(field: griffe.Attribute) -> tuple[Any, dict[str, str]]:
    """A field's default, and the bounds that `option` puts beside it."""
    value = field.value
    if not isinstance(value, griffe.ExprCall) or str(value.function) != "option":
        return value, {}
    default, *rules = value.arguments
    return default, {rule.name: str(rule.value) for rule in rules if isinstance(rule, griffe.ExprKeyword)}


def _default(field: griffe.Attribute) -> str:
    text = str(_option(field)[0])
    return f"`{text}`" if len(text) <= _LONGEST else "a text, see the source"


def _meaning(comments: dict[int, tuple[bool, str]], field: griffe.Attribute) -> str:
    """The field's comment, and in what bounds it may be."""
    _, rules = _option(field)
    bounds = [f"{name.replace('_', ' ')} {rules[name]}" for name in ("at_least", "at_most", "above") if name in rules]
    return "; ".join(filter(None, (_comment(comments, field), ", ".join(bounds))))


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
