"""Reads many texts or chats from a file, and writes a file of results that a later run of the command continues."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nlae_jax.data.corpus import read_json_lines
from nlae_jax.explore.passage import check_messages
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import json_line, plain, read_bytes, read_fields, write_json
from nlae_jax.runtime.locks import hold
from nlae_jax.runtime.outside import encodable, quoted

_FIELDS = "an object with text, or with messages"
_ANOTHER = "give another --out, or delete it"
_MOST_CHARACTERS = 1 << 28  # of one file: a packed file may be a thousand times as large as it looks
csv.field_size_limit(1 << 24)


@dataclasses.dataclass(frozen=True)
class Item:
    """One text, or one chat's `messages`. `id` comes from the file, or is the item's number if the file has no ids."""

    id: str
    text: str | None = None
    messages: list[dict[str, str]] | None = None


def read_items(path: Path) -> list[Item]:
    """Reads texts and chats from a .jsonl[.gz] or .csv file with `text` or `messages`, and perhaps `id`.

    Raises UserError that names the first line without text and messages, or with an id that occurred before.
    """
    items, names = [], set()
    for number, (where, row) in enumerate(read_rows(path)):
        name = str(row["id"]) if isinstance(row.get("id"), str | int) and row["id"] != "" else str(number)
        if name in names:
            raise UserError(f"{where}: id {name} occurs twice")
        names.add(name)
        if isinstance(row.get("text"), str) and row["text"].strip():
            items.append(Item(name, text=row["text"]))
        elif row.get("messages") is not None:
            items.append(Item(name, messages=check_messages(row["messages"], where)))
        else:
            raise UserError(f"{where}: should hold {_FIELDS}")
    if not items:
        raise UserError(f"{path}: no texts in it; each line should be {_FIELDS}")
    return items


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (`path:line`, fields) of each line of a .jsonl[.gz] or .csv file of texts.

    Callers keep all lines in memory, so the total size of the lines is bounded. Raises UserError that names the first
    invalid line, or the line that exceeds the bound.
    """
    size = 0
    for where, row in _csv_rows(path) if path.suffix.lower() == ".csv" else read_json_lines(path):
        size += sum(len(str(value)) for value in row.values())
        if size > _MOST_CHARACTERS:
            raise UserError(f"{where}: more than {_MOST_CHARACTERS:,} characters up to here; give the rest by itself")
        yield where, row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (`path:line`, fields) of each row of a .csv file with a column `text`."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    try:
        reader = csv.DictReader(io.StringIO(encodable(text), newline=""), strict=True)
        names = list(reader.fieldnames or ())
        if "text" not in names:
            raise UserError(f"{path}: should have a column text; it has {', '.join(names or ['none'])}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{path}: column {quoted(twice[0])} is there twice")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:  # DictReader puts cells beyond the columns there
                raise UserError(f"{where}: more cells than columns; a text with commas should be in quotation marks")
            yield where, {name: cell for name, cell in row.items() if cell}  # an empty cell is a field that is missing
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV ({error})") from None


class Results:
    """A file of results (.jsonl or .csv) that grows item by item. A later run continues after the last complete item.

    A progress file beside it holds the number of complete items and bytes, and a hash of the input and options. A run
    with another input or other options is refused. Only one process at a time writes the file.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any], columns: Sequence[str] = ()) -> None:
        """Opens the file, new or to be continued, and locks it.

        `columns` are the columns of a .csv file, which has one line per row. Other fields of a row are left out. Raises
        UserError, and leaves the file unchanged, if the file cannot be continued.
        """
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: should be a file; it is a directory, a pipe or a device")
        self._path, self._columns = path, tuple(columns) if path.suffix.lower() == ".csv" else ()
        self._progress_path = path.with_name(f"{path.name}.progress.json")
        self._digest = hashlib.sha256(json.dumps(plain(made_with), sort_keys=True).encode()).hexdigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        hold(path, str(path), "another nlae process is writing it", "start no second command that writes it")
        self._items, self._bytes = self._completed()
        os.truncate(path, self._bytes)
        # Written before anything is added: a file without a progress file is refused as another program's.
        self._write_progress()
        if self._columns and not self._bytes:
            self._append(_csv_lines([self._columns]), 0)

    def _completed(self) -> tuple[int, int]:
        """Returns the numbers of complete items and bytes. Raises UserError where the file cannot be continued."""
        size = self._path.stat().st_size
        if not self._progress_path.exists():
            if size:
                raise UserError(f"{self._path}: exists, and was not begun by this command; {_ANOTHER}")
            return 0, 0
        progress = read_fields(self._progress_path, {"made_with": str, "items": int, "bytes": int})
        if min(progress["items"], progress["bytes"]) < 0:
            raise UserError(f"{self._progress_path}: items and bytes should be 0 or more")
        if progress["made_with"] != self._digest:
            raise UserError(f"{self._path}: begun with another input or other options; {_ANOTHER}")
        if 0 < size < progress["bytes"]:
            raise UserError(f"{self._path}: {size} bytes of the {progress['bytes']} that it had; {_ANOTHER}")
        return (progress["items"], progress["bytes"]) if size else (0, 0)

    @property
    def done(self) -> int:
        """The number of items that are in the file."""
        return self._items

    def add(self, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds one item: a line of JSON (`record`), or a line of CSV for each of `rows`."""
        if self._columns:
            self._append(_csv_lines([[row.get(name) for name in self._columns] for row in rows]), 1)
        else:
            self._append(json_line(record) + "\n", 1)

    def _append(self, text: str, items: int) -> None:
        data = text.encode("utf-8", "backslashreplace")
        with self._path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._items += items
        self._bytes += len(data)
        self._write_progress()

    def _write_progress(self) -> None:
        write_json(self._progress_path, {"made_with": self._digest, "items": self._items, "bytes": self._bytes})


def _csv_lines(rows: Sequence[Sequence[Any]]) -> str:
    """Writes CSV lines that end in a line feed.

    A cell with a carriage return is quoted. Python quotes it only if lines end in one, so lines are written like that
    first.
    """
    lines = []
    for row in rows:
        line = io.StringIO()
        csv.writer(line, lineterminator="\r\n").writerow(["" if cell is None else cell for cell in row])
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)
