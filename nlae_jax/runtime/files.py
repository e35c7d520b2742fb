"""Reads and writes small files, in a local directory or in a bucket (`gs://`). They are written whole or not at all."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import itertools
import json
import logging
import math
import os
import pathlib
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, BinaryIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import quoted

# The path of a workdir's file, local or in a bucket. Both types have the methods that this project uses.
AnyPath: TypeAlias = "pathlib.Path | epath.Path"

_GS = "gs://"
# How addresses in buckets begin, also after a library's paths have dropped one of the two slashes.
_BUCKETS = ("gs:/", "s3:/")

# JSON does not escape these characters, but many readers end lines at them. In JSON they occur within strings only.
_LINE_BREAKS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}

_TEMPORARY = ".tmp"  # the ending of the names of files that are being written

_MOST_BYTES = 1 << 30  # the bound of a small file: this project writes none that is larger


def local_path(name: str | os.PathLike[str], field: str) -> pathlib.Path:
    """Returns the local path that a user has written; `~` is the user's home. `field` names it in errors.

    Raises UserError where the name is empty, cannot be a path, or is in a bucket: only a workdir may be there.
    """
    text = os.fsdecode(name)
    if not text.strip():
        raise UserError(f"{field}: empty; should be a path")
    if text.startswith(_BUCKETS):
        raise UserError(f"{field} {text}: in a bucket; should be a path here (only a workdir may be gs://BUCKET/NAME)")
    try:
        path = pathlib.Path(text).expanduser()
    except RuntimeError:  # pathlib's, without an entry for this user and without HOME
        raise UserError(f"{field} {text}: the home directory of ~ cannot be found; write the path in full") from None
    if "\0" in text:
        raise UserError(f"{field} {text!r}: a path cannot hold a null character")
    return path


def workdir_path(name: str | os.PathLike[str]) -> AnyPath:
    """Returns the path of a workdir: a local directory, or the objects below `gs://BUCKET/NAME`.

    Raises UserError where the name is neither, the client for buckets is not installed, or the bucket cannot be read.
    """
    text = os.fsdecode(name)
    if not text.startswith(_GS):
        if "://" in text:
            raise UserError(f"--workdir {text}: should be a directory or gs://BUCKET/NAME")
        try:
            text.encode()
        except UnicodeEncodeError:  # a path may be any bytes, but not to tensorstore
            raise UserError(f"--workdir {text!r}: should be valid UTF-8") from None
        return local_path(text, "--workdir")
    bucket, _, prefix = text.removeprefix(_GS).partition("/")
    if not bucket or not prefix.strip("/"):
        raise UserError(f"--workdir {text}: should be gs://BUCKET/NAME, a name within the bucket")
    _use_gcs(text)
    try:
        problem = "" if epath.Path(_GS + bucket).exists() else "there is no such bucket"
    except Exception as error:  # three libraries raise: no network, no credentials, no permission
        problem = " ".join(str(error).split()) or type(error).__name__
    if problem:
        raise UserError(f"--workdir {text}: bucket {bucket} cannot be read ({problem})")
    return epath.Path(text)


def _use_gcs(name: str) -> None:
    """Sets up one client for all paths in buckets, without a cache. It must run before the first such path is used.

    Raises UserError where the client's packages are not installed.
    """
    import fsspec

    # Only the tested client may be used: where tensorflow is installed, epath would use that one's, and gcsfs has a
    # second one for zonal buckets.
    os.environ.setdefault("EPATH_USE_TF", "false")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # tensorstore and orbax write to the same bucket, so a cached listing would be out of date.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs, with a traceback, the errors that it raises
    try:
        import gcsfs  # noqa: F401
        import google.cloud.storage  # noqa: F401
    except ImportError as error:
        raise UserError(f"--workdir {name}: buckets need pip install '.[gcs]' ({error})") from None


def is_remote(path: AnyPath) -> bool:
    """Returns whether the path is in a bucket, where objects are written whole and cannot be appended to."""
    return os.fspath(path).startswith(_GS)


def absolute(path: AnyPath) -> AnyPath:
    """Returns the absolute path."""
    return path if is_remote(path) else path.absolute()


def children(directory: AnyPath) -> Iterator[AnyPath]:
    """Returns the paths directly below a directory; none where it does not exist."""
    return directory.iterdir() if directory.exists() else iter(())


def move(source: AnyPath, target: AnyPath) -> None:
    """Renames a directory. In a bucket the store copies every object, then the old ones are deleted."""
    if not is_remote(source):
        source.rename(target)
        return
    from google.api_core.exceptions import GoogleAPICallError
    from google.cloud import storage

    name, _, prefix = os.fspath(source).removeprefix(_GS).partition("/")
    new_prefix = os.fspath(target).removeprefix(f"{_GS}{name}/")
    bucket = storage.Client().bucket(name)
    blobs = list(bucket.list_blobs(prefix=f"{prefix}/"))

    def copy(blob: Any) -> None:
        new = bucket.blob(new_prefix + blob.name.removeprefix(prefix))
        try:
            token = new.rewrite(blob)[0]
            while token is not None:  # large objects are copied in parts
                token = new.rewrite(blob, token=token)[0]
        except GoogleAPICallError:  # a store that cannot copy
            new.upload_from_string(blob.download_as_bytes())

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(copy, blobs))
    for blob in blobs:
        blob.delete()


def remove(directory: AnyPath) -> None:
    """Deletes a directory and everything below it."""
    epath.Path(directory).rmtree() if is_remote(directory) else shutil.rmtree(directory)


def kvstore(path: AnyPath) -> dict[str, str]:
    """Returns tensorstore's name of a path."""
    if not is_remote(path):
        return {"driver": "file", "path": os.path.abspath(path)}  # it takes no ".." in a path
    bucket, _, prefix = str(path).removeprefix(_GS).partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": prefix}


def object_checksums(directory: epath.Path) -> dict[str, str]:
    """Returns relative path -> CRC-32C in base64, as the store has it, for every object below `directory`."""
    import fsspec

    prefix = str(directory).removeprefix(_GS) + "/"
    objects = fsspec.filesystem("gcs").find(prefix, detail=True)
    return {name.removeprefix(prefix): info["crc32c"] for name, info in objects.items() if not name.endswith("/")}


def upload(path: epath.Path, data: bytes) -> None:
    """Writes an object. Raises UserError where that is not allowed."""
    try:
        path.write_bytes(data)
    except OSError as error:
        if not str(error).startswith("Forbidden"):
            raise
        raise UserError(f"{path}: these credentials may not write it ({' '.join(str(error).split())})") from None


def write_atomically(path: AnyPath, write: Callable[[pathlib.Path], object]) -> None:
    """Lets `write` fill a temporary file, then moves it to `path`, or uploads it if `path` is in a bucket.

    Several processes may write one path at a time: the content of the last one to finish stays.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as directory:
            temporary = pathlib.Path(directory) / path.name
            write(temporary)
            upload(path, temporary.read_bytes())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_sibling(path) as temporary:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def _temporary_sibling(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes a hidden file beside `path`. It is locked while in use, and deleted afterwards unless it was moved."""
    while True:
        # A name has at most 255 bytes, and a character up to four.
        temporary = path.with_name(f".{path.name[:32]}.{secrets.token_hex(6)}{_TEMPORARY}")
        with temporary.open("xb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # `remove_abandoned` was faster
                continue
            except OSError:  # a file system without locks; `remove_abandoned` removes nothing there
                pass
            if not temporary.exists():
                continue
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)
            return


def remove_abandoned(directory: AnyPath, *below: str) -> None:
    """Removes the temporary files that killed processes have left in `directory` and in directories `below` it.

    `below` are glob patterns. Temporary files of `write_atomically` that are in use stay.
    """
    if is_remote(directory):
        return
    for path in itertools.chain(*(directory.glob(f"{name}/.*{_TEMPORARY}") for name in (".", *below))):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its process lives
            path.unlink()


def plain(value: Any) -> Any:
    """Converts a value for JSON: scalars of array libraries are unwrapped, NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if not isinstance(value, str | int | float | None) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        value = float(value)  # numpy's float64 is a float whose repr is not JSON
        return value if math.isfinite(value) else None
    return value


def write_text(path: AnyPath, text: str) -> None:
    """Writes UTF-8. A lone surrogate, which UTF-8 cannot encode, is written as JSON would: `\\udc80`."""
    data = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: AnyPath, value: Any) -> None:
    """Writes JSON with sorted keys, so that equal values give equal files. NaN and infinity become null."""
    write_text(path, json.dumps(plain(value), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def json_line(value: Any, separators: tuple[str, str] | None = None) -> str:
    """Returns one line of JSON, also for readers that end lines at Unicode's other line breaks. NaN becomes null."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=separators)
    return text.translate(_LINE_BREAKS)


def open_regular(path: pathlib.Path) -> BinaryIO:
    """Opens a file for reading. Raises UserError where it is a pipe or a device, which may never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: should be a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: AnyPath, most: int = _MOST_BYTES) -> bytes:
    """Reads a whole file. Raises UserError where it is not a regular file or is larger than `most` bytes."""
    if is_remote(path):
        return path.read_bytes()
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise UserError(f"{path}: larger than the {most:,} bytes that such a file may have")
        return file.read()


def read_text(path: AnyPath) -> str:
    """Reads UTF-8, whatever the locale: epath does not pass an encoding on."""
    return read_bytes(path).decode("utf-8")


def read_json(path: AnyPath) -> Any:
    """Reads a file of `write_json`. Raises UserError where it is damaged."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError, MemoryError):
        raise UserError(f"{path}: not valid JSON; it should be as the run wrote it") from None


def read_fields(path: AnyPath, kinds: Mapping[str, type]) -> dict[str, Any]:
    """Reads a JSON object that has at least the fields `kinds`, of these types. An integer is accepted for a float.

    Raises UserError for any other file.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object, as the run wrote it")
    for name, kind in kinds.items():
        allowed = (int, float) if kind is float else kind
        item = value.get(name)
        # Also True for NaN, and for a whole number of 400 digits, of which no float can be made.
        is_endless = isinstance(item, int | float) and not abs(item) < 2.0**1000
        if not isinstance(item, allowed) or isinstance(item, bool) or is_endless:
            raise UserError(f"{path}: {name} should be a {kind.__name__}, as the run wrote it; it is {quoted(item)}")
    return value


def write_parquet(path: AnyPath, table: pa.Table) -> None:
    """Writes a table with a checksum of every page, which `read_parquet` verifies."""
    write_atomically(path, lambda temporary: pq.write_table(table, temporary, write_page_checksum=True))


def is_text(kind: pa.DataType) -> bool:
    """Returns whether a column holds strings, in any of arrow's layouts."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)


# The kinds of columns in tables that this project writes.
_COLUMNS: dict[str, Callable[[pa.DataType], bool]] = {
    "whole numbers": pa.types.is_integer,
    "texts": is_text,
    "lists of whole numbers": _is_list,
}


def read_parquet(path: AnyPath, remedy: str, columns: Mapping[str, str] = MappingProxyType({})) -> pa.Table:
    """Reads a table that this project wrote, with at least `columns`: name -> kind, one of `_COLUMNS`.

    Raises UserError with the `remedy` where the file is missing or damaged, or a column has nulls or another type.
    """
    try:
        if not is_remote(path):
            open_regular(path).close()
        source = pa.BufferReader(path.read_bytes()) if is_remote(path) else path
        with pq.ParquetFile(source, page_checksum_verification=True) as file:
            table = file.read()
        table.validate(full=True)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {remedy}") from None
    except (pa.ArrowException, MemoryError, ValueError):
        raise UserError(f"{path}: damaged; {remedy}") from None
    except OSError as error:
        if error.errno is not None:  # an error of the system; a wrong checksum of a page has no errno
            raise
        raise UserError(f"{path}: damaged; {remedy}") from None
    if missing := sorted(set(columns) - set(table.column_names)):
        raise UserError(f"{path}: damaged (no column {missing[0]!r}); {remedy}")
    for name, kind in columns.items():
        if table[name].null_count or not _COLUMNS[kind](table[name].type):
            raise UserError(f"{path}: damaged (the column {name!r} should hold {kind}, without nulls); {remedy}")
    return table
