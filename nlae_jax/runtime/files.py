"""Small files written whole or not at all, in a directory here or below a prefix of a bucket (`gs://`)."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from nlae_jax.runtime.errors import UserError

# Where a workdir's files are. Both kinds share the methods that this project uses on them.
AnyPath: TypeAlias = "pathlib.Path | epath.Path"

_GS = "gs://"

# Characters that JSON leaves as they are, and that many readers of lines do not: they stand within strings only.
_LINE_BREAKS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}

_TEMPORARY = ".tmp"  # how the names of files end that are being written

_MOST_BYTES = 1 << 30  # of a small file: what is larger is none of ours


def local_path(name: str | os.PathLike[str], field: str) -> pathlib.Path:
    """A path on this machine as a person writes it: `~` is their home. `field` names it in errors.

    Raises UserError where the name is empty or cannot be a path.
    """
    text = os.fsdecode(name)
    if not text.strip():
        raise UserError(f"{field}: empty; should be a path")
    try:
        path = pathlib.Path(text).expanduser()
    except RuntimeError:  # pathlib's, without an entry for this user and without HOME
        raise UserError(f"{field} {text}: whose home ~ is cannot be found; write the path in full") from None
    if "\0" in text:
        raise UserError(f"{field} {text!r}: a path cannot hold a null character")
    return path


def workdir_path(name: str | os.PathLike[str]) -> AnyPath:
    """A directory here or, for `gs://BUCKET/NAME`, the objects whose names begin so.

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
    except Exception as error:  # of three libraries: no network, no credentials, no permission
        problem = " ".join(str(error).split()) or type(error).__name__
    if problem:
        raise UserError(f"--workdir {text}: bucket {bucket} cannot be read ({problem})")
    return epath.Path(text)


def _use_gcs(name: str) -> None:
    """Before any path on a bucket is used: one client for all of them, without a memory."""
    import fsspec

    # What is tested is what is used: where tensorflow is installed, epath would take its client instead, and gcsfs has
    # a second one for zonal buckets.
    os.environ.setdefault("EPATH_USE_TF", "false")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # tensorstore and orbax write to the same bucket: a listing that is remembered is one that is out of date.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs, with a traceback, the errors that it raises
    try:
        import gcsfs  # noqa: F401
        import google.cloud.storage  # noqa: F401
    except ImportError as error:
        raise UserError(f"--workdir {name}: buckets need pip install '.[gcs]' ({error})") from None


def is_remote(path: AnyPath) -> bool:
    """Whether the path is an object's: written whole by itself, never added to, and far away."""
    return os.fspath(path).startswith(_GS)


def absolute(path: AnyPath) -> AnyPath:
    return path if is_remote(path) else path.absolute()


def children(directory: AnyPath) -> Iterator[AnyPath]:
    """What is directly below; nothing where there is no such directory."""
    return directory.iterdir() if directory.exists() else iter(())


def move(source: AnyPath, target: AnyPath) -> None:
    """Renames a directory and all below it. In a bucket the store copies every object, then the old ones go."""
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
            while token is not None:  # of large objects a part at a time
                token = new.rewrite(blob, token=token)[0]
        except GoogleAPICallError:  # a store that does not copy by itself
            new.upload_from_string(blob.download_as_bytes())

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(copy, blobs))
    for blob in blobs:
        blob.delete()


def remove(directory: AnyPath) -> None:
    """A directory and all below it."""
    epath.Path(directory).rmtree() if is_remote(directory) else shutil.rmtree(directory)


def kvstore(path: AnyPath) -> dict[str, str]:
    """The same place as tensorstore names it."""
    if not is_remote(path):
        return {"driver": "file", "path": os.path.abspath(path)}  # it takes no ".." in a path
    bucket, _, prefix = str(path).removeprefix(_GS).partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": prefix}


def object_checksums(directory: epath.Path) -> dict[str, str]:
    """Every object below `directory`, by its path from there -> its CRC-32C in base64, as the store has it."""
    import fsspec

    prefix = str(directory).removeprefix(_GS) + "/"
    found = fsspec.filesystem("gcs").find(prefix, detail=True)
    return {name.removeprefix(prefix): info["crc32c"] for name, info in found.items() if not name.endswith("/")}


def upload(path: epath.Path, data: bytes) -> None:
    """Writes an object. Raises UserError where that is not allowed."""
    try:
        path.write_bytes(data)
    except OSError as error:
        if not str(error).startswith("Forbidden"):
            raise
        raise UserError(f"{path}: these credentials may not write it ({' '.join(str(error).split())})") from None


def write_atomically(path: AnyPath, write: Callable[[pathlib.Path], object]) -> None:
    """`write` fills a temporary sibling, which then takes the place of `path`; an object is uploaded from one here.

    Several processes may write one path at a time: the last one to finish has its content there.
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
    """A new hidden file beside `path`, locked as long as it is in use; gone afterwards unless it was moved."""
    while True:
        temporary = path.with_name(f".{path.name[:128]}.{secrets.token_hex(6)}{_TEMPORARY}")
        with temporary.open("xb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # `remove_abandoned` was faster
                continue
            except OSError:  # a file system without locks, where nothing is taken for abandoned either
                pass
            if not temporary.exists():
                continue
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)
            return


def remove_abandoned(directory: AnyPath, *below: str) -> None:
    """Removes what killed processes have left of `write_atomically` in `directory` and in the directories `below` it.

    `below` are patterns. Temporary files that are in use stay.
    """
    if is_remote(directory):
        return
    for path in itertools.chain(*(directory.glob(f"{name}/.*{_TEMPORARY}") for name in (".", *below))):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its process lives
            path.unlink()


def plain(value: Any) -> Any:
    """The value as JSON has it: scalars of array libraries unwrapped, numbers that JSON lacks as None."""
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
    """UTF-8. A lone surrogate, which UTF-8 cannot say, is written as JSON would: `\\udc80`."""
    data = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: AnyPath, value: Any) -> None:
    """JSON with sorted keys, so that equal values are equal files. NaN and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(plain(value), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def json_line(value: Any, separators: tuple[str, str] | None = None) -> str:
    """One line of JSON, also to readers that end lines at whatever Unicode calls a line break. NaN becomes null."""
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
    """A whole file. Raises UserError where it is no regular file or larger than `most` bytes."""
    if is_remote(path):
        return path.read_bytes()
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise UserError(f"{path}: larger than the {most:,} bytes that such a file may have")
        return file.read()


def read_text(path: AnyPath) -> str:
    """UTF-8, whatever the locale: epath does not hand an encoding on."""
    return read_bytes(path).decode("utf-8")


def read_json(path: AnyPath) -> Any:
    """What `write_json` wrote. Raises UserError where the file is damaged."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError, MemoryError):
        raise UserError(f"{path}: not valid JSON; it should be as the run wrote it") from None


def read_fields(path: AnyPath, kinds: Mapping[str, type]) -> dict[str, Any]:
    """A JSON object that has at least these fields, of these types (an integer will do for a float).

    Raises UserError where it has not.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object, as the run wrote it")
    for name, kind in kinds.items():
        allowed = (int, float) if kind is float else kind
        if not isinstance(value.get(name), allowed) or isinstance(value[name], bool):
            raise UserError(
                f"{path}: {name} should be a {kind.__name__}, as the run wrote it; it is {value.get(name)!r}"
            )
    return value


def write_parquet(path: AnyPath, table: pa.Table) -> None:
    """With a checksum of every page, which `read_parquet` looks at."""
    write_atomically(path, lambda temporary: pq.write_table(table, temporary, write_page_checksum=True))


def read_parquet(path: AnyPath, remedy: str, columns: Sequence[str] = ()) -> pa.Table:
    """A table that this project wrote, with at least `columns`.

    Raises UserError with the `remedy` where the file is missing or damaged.
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
        if error.errno is not None:  # the system's, not one of a page whose checksum differs
            raise
        raise UserError(f"{path}: damaged; {remedy}") from None
    if missing := sorted(set(columns) - set(table.column_names)):
        raise UserError(f"{path}: damaged (no column {missing[0]!r}); {remedy}")
    return table
