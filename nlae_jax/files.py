"""Small files written whole or not at all, in a directory here or below a prefix of a bucket (`gs://`)."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from nlae_jax.errors import UserError
from nlae_jax.outside import parse_json

# Where a workdir's files are. Both kinds share the methods that this project uses on them.
AnyPath = pathlib.Path | epath.Path

_GS = "gs://"


def workdir_path(name: str | os.PathLike[str]) -> AnyPath:
    """A directory here or, for `gs://BUCKET/NAME`, the objects whose names begin so.

    Raises UserError where the name is neither, the client for buckets is not installed, or the bucket cannot be read.
    """
    text = os.fspath(name)
    if not text.startswith(_GS):
        if "://" in text:
            raise UserError(f"--workdir {text}: should be a directory or gs://BUCKET/NAME")
        return pathlib.Path(text)
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


def kvstore(path: AnyPath) -> dict[str, str]:
    """The same place as tensorstore names it."""
    if not is_remote(path):
        return {"driver": "file", "path": str(path)}
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


def write_atomically(path: AnyPath, write: Callable[[pathlib.Path], None]) -> None:
    """`write` fills a temporary sibling, which then takes the place of `path`; an object is uploaded from one here."""
    if is_remote(path):
        with tempfile.TemporaryDirectory() as directory:
            temporary = pathlib.Path(directory) / path.name
            write(temporary)
            upload(path, temporary.read_bytes())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: AnyPath, value: Any) -> None:
    """JSON with sorted keys, so that equal values are equal files."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_text(path: AnyPath) -> str:
    """UTF-8, whatever the locale: epath does not hand an encoding on."""
    return path.read_bytes().decode("utf-8")


def read_json(path: AnyPath) -> Any:
    """What `write_json` wrote. Raises UserError where the file is damaged."""
    try:
        return parse_json(path.read_bytes(), path, finite=False)
    except UserError:
        raise UserError(f"{path}: not valid JSON; it should be as the run wrote it") from None


def write_parquet(path: AnyPath, table: pa.Table) -> None:
    write_atomically(path, lambda temporary: pq.write_table(table, temporary))


def read_parquet(path: AnyPath, remedy: str) -> pa.Table:
    """A table that this project wrote. Raises UserError with the `remedy` where the file is damaged."""
    try:
        return pq.read_table(pa.BufferReader(path.read_bytes()) if is_remote(path) else path)
    except pa.ArrowException:
        raise UserError(f"{path}: damaged; {remedy}") from None
