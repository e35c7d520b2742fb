"""Reads the comment at the end of a dataclass field's line as the field's documentation."""

from __future__ import annotations

import ast
import functools
import io
import tokenize
from pathlib import Path
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """For `name: type = default  # meaning`, as the configuration is written."""

    def on_attribute_instance(self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: Any) -> None:
        in_class = attr.parent is not None and attr.parent.is_class
        if in_class and attr.docstring is None and isinstance(attr.filepath, Path) and attr.endlineno:
            comment = _comments(attr.filepath).get(attr.endlineno, "")
            attr.docstring = griffe.Docstring(comment, parent=attr) if comment else None


@functools.cache
def _comments(path: Path) -> dict[int, str]:
    """Line number -> the comment that ends it."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
