"""The default corpus: the documentation that is installed with Python and its packages.

It needs no network and is prose about one broad subject. Docstrings are read from the source files' syntax trees: no
package is imported or executed.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nlae_jax.data.english import FUNCTION_WORDS

# Tests document little, a vendored copy documents twice, and this package must not describe itself.
SKIPPED_DIRECTORIES = frozenset({"__pycache__", "_vendor", "dist-packages", "idlelib", "lib2to3", "nlae_jax"}) | {
    "site-packages",
    "test",
    "testing",
    "tests",
}
MAX_FILE_BYTES = 400_000
# The bytes of source read per package: a package twenty times larger than the others must not dominate the corpus.
MAX_PACKAGE_BYTES = 4_000_000
MIN_DOCSTRING_BYTES = 300  # a file without a quoted block this long is not worth parsing

_MIN_LETTERS = 0.82  # share of the characters that are letters or white space
_MIN_FUNCTION_WORDS = 0.22  # share of the words that are function words; lists and code have few
_MAX_KNOWN_SHINGLES = 0.5

_LEGAL = re.compile(r"copyright|licen[sc]ed? |all rights reserved|spdx|warrant(y|ies)|redistribut", re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*```.*?(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_RULE = re.compile(r"^[ \t]*([-=~^*#+\"'`_])\1{2,}[ \t]*\n?", re.MULTILINE)
_DIRECTIVE = re.compile(r"^[ \t]*\.\.( .*)?$\n?", re.MULTILINE)
_ROLE = re.compile(r":[\w:.+-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`")
_EMPTY_SECTION = re.compile(r"(?:\A|\n)\s*(?:examples?|references?|see also|notes?|usage)\s*:*\s*\Z", re.IGNORECASE)
_EXAMPLE = re.compile(r"\A\s*examples?\s*:*\s*\Z", re.IGNORECASE)  # a heading whose doctest was removed
_LETTERS_OR_SPACE = re.compile(r"[^\W\d_]+|\s+")
_WORD = re.compile(r"[A-Za-z]+")


def installed_roots() -> list[Path]:
    """Returns the directories of the standard library and of the installed packages, each once."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[key]).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")))


def documentation_texts(roots: Sequence[Path] | None = None) -> list[str]:
    """Returns the docstrings and language topics below `roots` (default: everything installed), one text each.

    Texts are cleaned, mostly English prose, and ordered by a hash of their content. A text of which more than half
    occurred in earlier texts (many classes share most of their docstring) is left out, so that splits by document share
    no text.
    """
    raw: set[str] = set()
    for root in installed_roots() if roots is None else roots:
        for files in _files_by_package(root).values():
            for path in _sample(files, root):
                raw.update(_docstrings(path))
    cleaned = {text for text in map(clean, raw) if is_prose(text)}
    return list(_without_near_duplicates(sorted(cleaned, key=_digest)))


def clean(docstring: str) -> str:
    """Returns the prose of a docstring: without indentation, doctests, code fences, markup and licences."""
    text = inspect.cleandoc(docstring).encode("utf-8", "ignore").decode("utf-8")
    text = _ROLE.sub(r"\1", _DIRECTIVE.sub("", _RULE.sub("", _FENCE.sub("", text)))).replace("``", "`")
    paragraphs = (_without_doctest(paragraph) for paragraph in re.split(r"\n\s*\n", text))
    text = "\n\n".join(p for p in paragraphs if _EXAMPLE.sub("", p).strip() and not _LEGAL.search(p))
    return _EMPTY_SECTION.sub("", text).strip()


def is_prose(text: str) -> bool:
    """Returns whether `text` is mostly sentences: it has enough letters and enough function words."""
    words = _WORD.findall(text.lower())
    letters = len(text) - len(_LETTERS_OR_SPACE.sub("", text))
    joining = sum(word in FUNCTION_WORDS for word in words)
    return bool(words) and letters >= _MIN_LETTERS * len(text) and joining >= _MIN_FUNCTION_WORDS * len(words)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _files_by_package(root: Path) -> dict[str, list[tuple[str, int]]]:
    """Returns package (first part of the path, "" for single modules) -> its source files and their sizes in bytes."""
    packages: dict[str, list[tuple[str, int]]] = {}
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in SKIPPED_DIRECTORIES]
        relative = os.path.relpath(directory, root)
        package = "" if relative == "." else relative.split(os.sep)[0]
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(directory, name)
                try:
                    packages.setdefault(package, []).append((path, os.stat(path).st_size))
                except OSError:  # a dangling link
                    continue
    return packages


def _sample(files: list[tuple[str, int]], root: Path) -> Iterator[str]:
    """Yields a package's files up to `MAX_PACKAGE_BYTES`, in an order that does not depend on its layout."""
    total = 0
    for path, size in sorted(files, key=lambda file: _digest(os.path.relpath(file[0], root))):
        if path.endswith(os.path.join("pydoc_data", "topics.py")):
            yield path
        elif MIN_DOCSTRING_BYTES <= size <= MAX_FILE_BYTES and total + size <= MAX_PACKAGE_BYTES:
            total += size
            yield path


def _docstrings(path: str) -> Iterator[str]:
    """Yields the long docstrings of one file, or the values of its dict if it is pydoc's file of topics."""
    try:
        with open(path, "rb") as file:
            source = file.read()
        topics = path.endswith(os.path.join("pydoc_data", "topics.py"))
        if not topics and not _has_long_block(source):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # source for another version of Python, or not Python source
    yield from _topics(tree) if topics else _walk(tree)


def _has_long_block(source: bytes) -> bool:
    return any(len(block) >= MIN_DOCSTRING_BYTES for quotes in (b'"""', b"'''") for block in source.split(quotes)[1::2])


def _walk(node: ast.AST) -> Iterator[str]:
    """Yields the docstrings below `node`. It looks for definitions in bodies of statements only, for speed."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and len(docstring) >= MIN_DOCSTRING_BYTES:
            yield docstring
    for field in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, field, ()):
            if hasattr(child, "body"):
                yield from _walk(child)


def _topics(tree: ast.Module) -> Iterator[str]:
    """Yields the texts of pydoc's dict of language topics."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for value in node.value.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def _without_doctest(paragraph: str) -> str:
    """Returns the paragraph's lines before its first interpreter prompt; the lines after it are code and output."""
    lines = paragraph.split("\n")
    for i, line in enumerate(lines):
        if line.lstrip().startswith((">>>", "In [", "$ ")):
            return "\n".join(lines[:i])
    return paragraph


def _without_near_duplicates(texts: Iterable[str]) -> Iterator[str]:
    """Yields the texts of which at most half of the runs of six words occurred in an earlier text.

    Only one run in four is compared (those whose checksum is divisible by four), which keeps the set of runs small.
    """
    seen: set[int] = set()
    for text in texts:
        words = _WORD.findall(text.lower())
        checksums = {zlib.crc32(" ".join(words[i : i + 6]).encode()) for i in range(max(1, len(words) - 5))}
        sampled = {checksum for checksum in checksums if checksum % 4 == 0}
        if len(sampled & seen) <= _MAX_KNOWN_SHINGLES * len(sampled):
            seen |= sampled
            yield text
