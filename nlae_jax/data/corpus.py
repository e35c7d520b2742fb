"""Reads documents from the user's files, from a hub dataset, or from the installed documentation.

The path "warmstart" names the corpus that the package carries. Documents of every source are de-duplicated and ordered
by the sha256 of their text. So the first n are a fair sample of all, and a text has the same place and the same
`doc_id` on every machine.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from nlae_jax.assets import WARMSTART, WARMSTART_NOTES
from nlae_jax.config import CorpusConfig
from nlae_jax.data.documentation import documentation_texts
from nlae_jax.data.kinds import kinds_of_files
from nlae_jax.runtime.errors import UserError, one_line
from nlae_jax.runtime.files import is_text, local_path, open_regular, read_bytes
from nlae_jax.runtime.globs import matching_paths
from nlae_jax.runtime.outside import parse_json

logger = logging.getLogger(__name__)

_HUB_SHUFFLE_BUFFER = 10_000  # rows; makes a fair sample of a dataset that is too large to read
_ROWS_PER_BATCH = 1_024
DOMAIN = "domain"  # the field or column that holds a document's kind of text, where there is one
_LONGEST_DOMAIN = 60  # characters of it
_MOST_BYTES = 64 << 20  # of a line or .txt file: without a bound, a line that never ends would fill the memory


@dataclass(frozen=True)
class Text:
    """A text from a source, with the source's data about it.

    `name` is its `id` in the source. Texts of one `passage` are never in two splits. A text `at_end` is read at its
    last token, not at positions drawn at random, and may be short. `domain` is its kind of text: the source's `domain`,
    else the name of its file, or of the folder of a file with a single document; "" where nothing says it.
    """

    text: str
    name: str = ""
    passage: str = ""
    at_end: bool = False
    domain: str = ""
    lead: str = ""  # the white space that stood before `text` in the source


@dataclass(frozen=True)
class Document:
    """One document of the corpus. `doc_id` is the first 16 hexadecimal digits of its normalised text's sha256.

    The other fields are those of `Text`.
    """

    doc_id: str
    text: str
    name: str = field(default="", compare=False)
    passage: str = ""
    at_end: bool = False
    domain: str = field(default="", compare=False)
    lead: str = field(default="", compare=False)

    @property
    def group(self) -> str:
        """The name of the document's group. All documents of a group are in one split."""
        return self.passage or self.doc_id


def document_of(text: str, passage: str = "", at_end: bool = False) -> Document:
    """Makes the document of a text that does not come from a corpus."""
    lead, clean = _parted(text)
    return Document(_digest(clean).hex()[:16], clean, passage=passage, at_end=at_end, lead=lead)


def read_documents(config: CorpusConfig) -> list[Document]:
    """Reads the corpus: distinct texts of at least `min_characters`, by sha256, at most `max_documents` (None: all).

    With `corpus.hub` and `max_documents`, reading stops as soon as there are enough documents; a buffered shuffle with
    a fixed seed then makes the sample fair. Raises UserError if a source cannot be read or nothing is left.
    """
    if config.path and config.hub:
        raise UserError("corpus.path and corpus.hub are both set: name one source")
    if (config.max_documents or 0) < 0 or config.min_characters < 0:
        raise UserError("corpus.max_documents and corpus.min_characters must be 0 or more")
    dropped: Counter[str] = Counter()
    documents = _select(_texts(config), config, dropped)
    source, total = _source_name(config), len(documents) + sum(dropped.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none"
    if not documents:
        raise UserError(
            f"{source}: no document is left of {total} read; dropped: {reasons} "
            f"(corpus.min_characters is {config.min_characters})"
        )
    logger.info("corpus: %d documents kept of %d read from %s; dropped: %s", len(documents), total, source, reasons)
    return documents


def read_named_documents(config: CorpusConfig, option: str) -> list[Document]:
    """Runs `read_documents` on the path of a command's `option`. Error messages name that option."""
    try:
        return read_documents(config)
    except UserError as error:
        raise UserError(str(error).replace("corpus.path", option, 1)) from None


def normalise(text: str) -> str:
    """Normalises Unicode form, case and white space. Two texts with one normal form count as duplicates."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _digest(text: str) -> bytes:
    """Hashes the normalised text with the white space at its end, because a text `at_end` is read there."""
    return hashlib.sha256((normalise(text) + text[len(text.rstrip()) :]).encode()).digest()


def _source_name(config: CorpusConfig) -> str:
    if config.path:
        return f"corpus.path {config.path!r}"
    return f"corpus.hub {config.hub!r}" if config.hub else "the installed documentation"


def _texts(config: CorpusConfig) -> Iterable[Text]:
    if config.path == WARMSTART and not Path(config.path).exists():
        return _warm_start_texts()
    if config.path:
        return _file_texts(config)
    return _hub_texts(config) if config.hub else map(Text, documentation_texts())


def _warm_start_texts() -> Iterator[Text]:
    """Yields the texts of the notes that the package carries. Each is read at its end."""
    for where, row in read_json_lines(WARMSTART_NOTES):
        kind = row["kind"].partition(":")[0]  # of "encyclopaedia: river delta", say
        yield Text(_text_of(row, where, "text"), row["id"], row["passage"], at_end=True, domain=kind)


def _select(texts: Iterable[Text], config: CorpusConfig, dropped: Counter[str]) -> list[Document]:
    """Filters, de-duplicates and orders `texts`. Counts the texts left out in `dropped`, by reason."""
    limit = config.max_documents
    digests: set[bytes] = set()
    selected: list[tuple[bytes, Text]] = []
    for source_text in texts:
        lead, text = _parted(source_text.text)
        text = text if source_text.at_end else text.rstrip()
        if not text.strip() or (len(text) < config.min_characters and not source_text.at_end):
            dropped["too short"] += 1
            continue
        digest = _digest(text)
        if digest in digests:
            dropped["duplicates"] += 1
            continue
        digests.add(digest)
        selected.append((digest, replace(source_text, text=text, lead=lead)))
        if limit and config.hub and len(selected) == limit:
            break
        if limit and len(selected) >= 2 * limit + 1_000:  # bounded memory however large the corpus is
            selected = _first(selected, limit, dropped)
    return [Document(digest.hex()[:16], **vars(text)) for digest, text in _first(selected, limit, dropped)]


def _first(selected: list[tuple[bytes, Text]], limit: int | None, dropped: Counter[str]) -> list[tuple[bytes, Text]]:
    ordered = sorted(selected, key=lambda item: item[0])
    if limit and len(ordered) > limit:
        dropped["beyond corpus.max_documents"] += len(ordered) - limit
        return ordered[:limit]
    return ordered


def _parted(text: str) -> tuple[str, str]:
    """Returns the white space at the beginning of a text, and the rest. Both are clean."""
    whole = _clean(text)
    rest = whole.lstrip()
    return whole[: len(whole) - len(rest)], rest


def _clean(text: str) -> str:
    r"""Makes `text` valid Unicode: a lone surrogate (`"\ud800"` in JSON) becomes U+FFFD. Drops a byte-order mark."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text.removeprefix("\ufeff"))


# --- files


def _file_texts(config: CorpusConfig) -> Iterator[Text]:
    paths = _matching_files(config.path)
    single = [path for path in paths if _is_single(path, config.text_field)]
    kinds = kinds_of_files([path for path in paths if path not in set(single)], single)
    for path in paths:
        kind = domain_of(kinds[path])
        for text in _reader(path)(path, config.text_field):
            yield replace(text, domain=text.domain or kind)


def _is_single(path: Path, text_field: str) -> bool:
    """Returns whether the file has exactly one document. Reads only the beginning of the file."""
    reader = _reader(path)
    return reader is _read_txt or len(list(islice(reader(path, text_field), 2))) < 2


def domain_of(value: Any) -> str:
    """Cleans and shortens a source's name for a kind of text. Returns "" for a value that is not a text."""
    return one_line(_clean(value), _LONGEST_DOMAIN).strip() if isinstance(value, str) else ""


def _row_text(row: Mapping[str, Any], where: str, text_field: str) -> Text:
    """Makes the text of a source's row, with its `id`, `passage` and `domain`, which are "" where a row has none."""
    domain = "" if text_field == DOMAIN else domain_of(row.get(DOMAIN))
    return Text(_text_of(row, where, text_field), name_of(row.get("id")), name_of(row.get("passage")), domain=domain)


def name_of(value: Any) -> str:
    """Returns a name from outside as text. Whole numbers are names too; any other value gives ""."""
    is_name = isinstance(value, str | int) and not isinstance(value, bool)
    return _clean(str(value)) if is_name else ""


def _matching_files(pattern: str) -> list[Path]:
    expanded = local_path(pattern, "corpus.path")
    if expanded.is_dir():
        raise UserError(f"corpus.path {pattern!r} is a directory: write a glob such as {str(expanded / '*.jsonl')!r}")
    if expanded.is_file():  # also a name that holds the glob's own characters
        return [expanded]
    paths = sorted({path for path in map(Path, matching_paths(str(expanded))) if not path.is_dir()})
    if not paths:
        raise UserError(f"corpus.path {pattern!r} matches no file")
    for path in paths:
        _reader(path)  # an unknown ending is reported before anything is read
    return paths


def _reader(path: Path) -> Callable[[Path, str], Iterator[Text]]:
    for ending, reader in _READERS.items():
        if path.name.lower().endswith(ending):
            return reader
    raise UserError(f"{path}: corpus.path reads files that end in {', '.join(_READERS)}")


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return UserError(f"{path}: cannot be read: {' '.join(reason.split())}")


def _decode(data: bytes, path: Path, start: int) -> str:
    """Decodes UTF-8 `data` that begins `start` bytes into the file. Drops a byte-order mark."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {start + error.start} is not valid UTF-8; corpus files must be UTF-8") from None
    return text.removeprefix("\ufeff") if start == 0 else text


def _read_txt(path: Path, text_field: str) -> Iterator[Text]:
    try:
        data = read_bytes(path, _MOST_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from None
    text = _decode(data, path, 0)
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    yield Text(text, name=path.name)


def _read_jsonl(path: Path, text_field: str) -> Iterator[Text]:
    for where, row in read_json_lines(path):
        yield _row_text(row, where, text_field)


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (`path:line`, object) of each line of a .jsonl or .jsonl.gz file.

    Raises UserError that names path and line where a line is not a JSON object. Only a line feed ends a line; Unicode's
    other line separators are ordinary characters.
    """
    empty, offset, number = True, 0, 0
    try:
        with open_regular(path) as stored, _unpacked(path, stored) as file:
            while raw := file.readline(_MOST_BYTES + 1):
                number += 1
                if len(raw) > _MOST_BYTES:
                    raise UserError(
                        f"{path}:{number}: a line of more than {_MOST_BYTES:,} bytes, the most that is read"
                    )
                line = _decode(raw, path, offset)
                offset += len(raw)
                if line.strip():
                    empty = False
                    yield f"{path}:{number}", _json_object(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None
    if empty:
        raise UserError(f"{path}: the file is empty")


def _unpacked(path: Path, stored: BinaryIO) -> BinaryIO | gzip.GzipFile:
    return gzip.open(stored) if path.name.lower().endswith(".gz") else stored


def _json_object(line: str, where: str) -> dict[str, Any]:
    # A corpus has many fields beside its texts: a score of NaN in one of them does no harm here.
    row = parse_json(line, where, finite=False)
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, but every line must be an object")
    return row


def _text_of(row: Mapping[str, Any], where: str, text_field: str) -> str:
    if text_field not in row:
        present = ", ".join(map(repr, list(row)[:10])) or "none"
        raise UserError(f"{where}: no field {text_field!r}; corpus.text_field must be one of: {present}")
    text = row[text_field]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise UserError(f"{where}: the field {text_field!r} is {kind}, but it must be a string")
    if len(text) > _MOST_BYTES:
        raise UserError(
            f"{where}: the field {text_field!r} has {len(text):,} characters; at most {_MOST_BYTES:,} are read"
        )
    return text


def _read_parquet(path: Path, text_field: str) -> Iterator[Text]:
    # Here because most runs read no parquet.
    import pyarrow as pa

    from nlae_jax.data.parquet import check_batch, opened

    with opened(path) as file:
        names = file.schema_arrow.names
        if text_field not in names:
            present = ", ".join(map(repr, names[:10]))
            raise UserError(f"{path}: no column {text_field!r}; corpus.text_field must be one of: {present}")
        kind = file.schema_arrow.field(text_field).type
        if file.metadata.num_rows and not is_text(kind):
            raise UserError(f"{path}: row 0: the field {text_field!r} is {kind}, but it must be a string")
        if file.metadata.num_rows == 0:
            raise UserError(f"{path}: the file is empty")
        start = 0
        others = {DOMAIN, "id", "passage"} - {text_field}
        kinds = {name: file.schema_arrow.field(name).type for name in names if name in others}
        used = [name for name, kind in kinds.items() if is_text(kind) or pa.types.is_integer(kind)]
        for batch in file.iter_batches(batch_size=_rows_at_once(file.metadata), columns=[text_field, *used]):
            check_batch(path, start, batch)
            for number, row in enumerate(batch.to_pylist(), start):
                yield _row_text(row, f"{path}: row {number}", text_field)
            start += len(batch)


def _rows_at_once(metadata: Any) -> int:
    """Returns how many rows of a parquet file are read at once: few where rows are long on average."""
    size = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    return max(1, min(_ROWS_PER_BATCH, _MOST_BYTES * metadata.num_rows // max(size, 1)))


_READERS: dict[str, Callable[[Path, str], Iterator[Text]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}


# --- the hub


def _hub_texts(config: CorpusConfig) -> Iterator[Text]:
    """Streams the texts of the dataset `owner/name` or `owner/name:configuration`."""
    try:
        import datasets
    except ImportError:
        raise UserError('corpus.hub needs the package datasets: pip install "nlae_jax[hub]"') from None
    name, _, configuration = config.hub.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=config.hub_split, streaming=True)
        if config.max_documents:
            rows = rows.shuffle(seed=0, buffer_size=_HUB_SHUFFLE_BUFFER)
        for number, row in enumerate(rows):
            yield _row_text(row, f"corpus.hub {config.hub!r}: row {number}", config.text_field)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds: not found, no access, no network, bad data
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"corpus.hub {config.hub!r} (split {config.hub_split!r}) cannot be read: {reason}") from None
