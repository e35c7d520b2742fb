"""Shows the fields of a configuration dataclass as a table, each with the comment at the end of its line."""

from __future__ import annotations

import functools
import io
import tokenize
from pathlib import Path
from typing import Any

import griffe

_LONGEST = 40  # characters of a default that is shown


class FieldComments(griffe.Extension):
    """For dataclasses of fields `name: type = default  # meaning`, as `nlae_jax/config.py` has them."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.module.path != "nlae_jax.config" or not isinstance(cls.filepath, Path):
            return
        comments = _comments(cls.filepath)
        rows = [
            f"| `{name}` | {field.annotation} | {_default(field)} | {comments.get(field.endlineno or 0, '')} |"
            for name, field in cls.attributes.items()
            if not str(field.annotation).endswith("Config")
        ]
        said = f"{cls.docstring.value}\n\n" if cls.docstring else ""
        table = "\n".join(("| field | type | default | meaning |", "|---|---|---|---|", *rows))
        cls.docstring = griffe.Docstring(said + table, parent=cls)


def _default(field: griffe.Attribute) -> str:
    text = str(field.value)
    return f"`{text}`" if len(text) <= _LONGEST else "a text, see the source"


@functools.cache
def _comments(path: Path) -> dict[int, str]:
    """Line number -> the comment that ends it, fit for a table."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    comments = ((token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT)
    return {line: text.lstrip("# ").replace("|", "\\|") for line, text in comments}
