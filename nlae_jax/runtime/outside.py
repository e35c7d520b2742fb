"""Reads small files that others wrote (JSON, YAML). Every problem with a file raises a UserError that names it.

Sizes, depths and numbers are bounded, and strings can be encoded as UTF-8 afterwards.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import re
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import yaml

from nlae_jax.runtime.errors import UserError, one_line

_LONGEST_FILE = 64 << 20  # bytes: the tensor index of a large model has a few MB
_LONGEST_YAML = 256 << 10  # PyYAML takes seconds for more
_YAML_NODES = 100_000  # of a document with every alias expanded
_DIGITS = 300  # of a whole number, so that every one fits a float64
_LEAST_FLOAT32, _MOST_FLOAT32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127
# Hosts whose servers run on this machine, and may need no key.
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_SURROGATES = re.compile("[\ud800-\udfff]")
_QUOTED = 120  # characters of a value that a message quotes
_KINDS: dict[type, str] = {dict: "an object", list: "a list"}


def quoted(value: object) -> str:
    """Quotes a value from outside for a message. The result is short, whatever the value is."""
    try:
        return one_line(repr(value), _QUOTED)
    except (ValueError, RecursionError, MemoryError):  # a number of 5,000 digits, a list 100,000 deep
        return f"a {type(value).__name__} too large to show"


def read_bytes(path: Path, longest: int = _LONGEST_FILE) -> bytes:
    """Reads a file of at most `longest` bytes.

    Raises FileNotFoundError where it does not exist, and UserError where it is larger or cannot be read. A pipe or a
    device, which might never end, is refused.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: should be a file")
        with path.open("rb") as file:
            content = file.read(longest + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > longest:
        raise UserError(f"{path}: larger than {longest >> 10} kB, the most that is read of such a file")
    return content


def read_json(path: Path, kind: type = dict) -> Any:
    """Reads a JSON file whose value is a `kind`: dict, list, or object for any value.

    Raises as `read_bytes` and `parse_json` do.
    """
    return parse_json(read_bytes(path), path, kind)


def parse_json(content: bytes | str, name: object, kind: type = object, finite: bool = True) -> Any:
    """Parses JSON whose outermost value is a `kind`. Raises UserError that names `name` for any other content.

    With `finite`, NaN, infinities and numbers beyond float64 are refused: they are not JSON, although Python's parser
    accepts them. Unpaired surrogates, such as the escape "\\ud83d", become U+FFFD.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        hooks: dict[str, Any] = {"parse_float": _finite_float, "parse_constant": _finite_float} if finite else {}
        value = json.loads(text, parse_int=_bounded_int, **hooks)
        # Only an escape can give a surrogate, or a str that already contains one; decoded bytes contain none.
        if "\\ud" in text or "\\uD" in text or (isinstance(content, str) and _SURROGATES.search(text)):
            value = _encodable(value)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: not valid JSON ({error.msg.removesuffix(' at')} at line {error.lineno})") from None
    except RecursionError:
        raise UserError(f"{name}: not valid JSON (nested too deeply)") from None
    except MemoryError:
        raise UserError(f"{name}: too large for this machine's memory") from None
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON ({error})") from None
    if not isinstance(value, kind):
        raise UserError(f"{name}: should hold {_KINDS.get(kind, kind.__name__)}; it holds {quoted(value)}")
    return value


def read_yaml(path: Path) -> dict[Any, Any]:
    """Reads a YAML file that holds a mapping. Raises as `read_bytes` does, and UserError for invalid content.

    Tags that make Python objects are refused. Aliases are allowed as long as the expanded document stays small. Numbers
    are finite and have at most 64 bits.
    """
    content = read_bytes(path, _LONGEST_YAML)
    try:
        loader = yaml.SafeLoader(content.decode("utf-8"))
        if (node := loader.get_single_node()) is not None:
            _expanded_size(node, {})
        value = None if node is None else _bounded(loader.construct_document(node))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:  # its own text would quote the file
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}: not valid YAML ({error.problem or error.context}{where})") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML (nested too deeply)") from None
    except MemoryError:
        raise UserError(f"{path}: too large for this machine's memory") from None
    except (yaml.YAMLError, ValueError) as error:  # an invalid date, a number of 5,000 digits, a control character
        problem = "a number of too many digits" if "digits" in str(error) else one_line(error, _QUOTED)
        raise UserError(f"{path}: not valid YAML ({problem})") from None
    except (TypeError, ArithmeticError, LookupError, AttributeError):  # PyYAML does not check that a value fits its tag
        raise UserError(f"{path}: not valid YAML (a value that does not fit its tag)") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold fields with values; it holds {quoted(value)}")
    return value


def encodable(text: str) -> str:
    """Replaces unpaired surrogates, which no tokenizer and no file accepts, by U+FFFD."""
    return _SURROGATES.sub("\ufffd", text)


def fits_float32(value: float) -> bool:
    """Returns whether a number is 0, or one that float32 holds as a normal number. NaN and infinity are not."""
    return value == 0 or _LEAST_FLOAT32 <= abs(value) <= _MOST_FLOAT32


def server_address(text: str) -> SplitResult | None:
    """Parses the address of an HTTP server. None if it is invalid, or has a user name, password, query or fragment."""
    try:
        url = urlsplit(text)
        valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # half an IPv6 address, or a port beyond 65535
        return None
    return url if valid and not (url.username or url.password or url.query or url.fragment) else None


def check_count(name: str, value: int, least: int, most: int = 2**31 - 1) -> None:
    """Raises UserError where an argument is no whole number from `least` to `most`."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or not least <= value <= most:
        kind = "" if is_whole else "a whole number "
        raise UserError(f"{name}: {quoted(value)} should be {kind}from {least} to {most}")


def clean_log(name: str) -> None:
    """Makes the messages of a library's logger safe to print: they quote file names and tokens of models."""
    logger = logging.getLogger(name)
    for filters in (logger, *logger.handlers):
        if _clean_record not in filters.filters:
            filters.addFilter(_clean_record)


def _clean_record(record: logging.LogRecord) -> bool:
    """Makes a record's message safe to print. As a filter it lets every record pass."""
    record.msg, record.args = one_line(record.getMessage()), ()
    return True


def _finite_float(text: str) -> float:
    """Parses a number. Raises ValueError where it is not finite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _bounded_int(text: str) -> int:
    """Parses a whole number. Raises ValueError where it has too many digits."""
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _encodable(value: Any) -> Any:
    """Makes every string in a JSON value `encodable`, field names too."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return value


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Counts the nodes of a document with its aliases expanded. Raises ValueError where they are too many or endless.

    `sizes` holds the sizes of the nodes visited, and 0 for a node whose parts are still being counted.
    """
    if (counted := sizes.get(id(node))) is not None:
        if counted == 0:
            raise ValueError("an alias that contains itself")
        return counted
    sizes[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    else:
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
    size = 1
    for part in parts:
        size += _expanded_size(part, sizes)
        if size > _YAML_NODES:
            raise ValueError(f"its aliases expand to more than {_YAML_NODES} values")
    sizes[id(node)] = size
    return size


def _bounded(value: Any) -> Any:
    """Makes every string of a YAML value `encodable`. Raises ValueError for NaN, infinity and too large numbers."""
    if isinstance(value, bool):
        return value
    if (isinstance(value, int) and abs(value) >= 2**63) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("a number that is not finite or takes more than 64 bits")
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list):
        return [_bounded(item) for item in value]
    if isinstance(value, dict):
        return {_bounded(key): _bounded(item) for key, item in value.items()}
    return value
