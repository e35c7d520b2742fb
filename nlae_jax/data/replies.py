"""Interprets the replies of language model servers: their text, their errors, and the time that they ask to wait.

No message here quotes a reply, because a server may echo the key.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import re
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import httpx

from nlae_jax.data.answers import Answer

BODY_BYTES = 4_000_000  # the bound of a reply, packed and unpacked: a hundred times the longest answer
_CUT = "cut off by describe.max_new_tokens"


class TryAgain(Exception):
    """Raised where no answer came and asking again may help. `seconds` is the time that the server asks to wait."""

    def __init__(self, problem: str, seconds: float = 0.0) -> None:
        super().__init__(problem)
        self.problem, self.seconds = problem, seconds


# --- the body


async def read_body(response: httpx.Response) -> bytes:
    """Reads and unpacks the body of a reply. Raises TryAgain if it exceeds `BODY_BYTES` or cannot be unpacked.

    It does not use httpx's unpacking, which has no bound on the size of an unpacked piece.
    """
    raw = bytearray()
    async for piece in cast(httpx.AsyncByteStream, response.stream):
        raw += piece
        if len(raw) > BODY_BYTES:
            raise TryAgain("with too long a reply")
    match response.headers.get("content-encoding", "").strip().lower():
        case "" | "identity":
            return bytes(raw)
        case "gzip" | "x-gzip" | "deflate":  # not asked for, but some proxies pack every reply
            return _unpacked(bytes(raw))
    raise TryAgain("with a reply in an encoding that was not asked for")


def _unpacked(raw: bytes) -> bytes:
    either = 32 + zlib.MAX_WBITS  # gzip's header or zlib's
    try:
        data = zlib.decompressobj(either).decompress(raw, BODY_BYTES + 1)
    except zlib.error:
        raise TryAgain("with a reply that cannot be unpacked") from None
    if len(data) > BODY_BYTES:
        raise TryAgain("with too long a reply")
    return data


def decoded(body: bytes) -> Any:
    """Returns the JSON value in a body, or None. An invalid UTF-8 byte spoils one character, not the whole answer."""
    try:
        return json.loads(body.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        return None


# --- the text


def find_answer(find: Callable[[Any], tuple[Any, bool]], reply: Any) -> Answer:
    """Returns the answer that `find` finds in a decoded reply, or one without text for a reply of another form."""
    try:
        content, cut = find(reply)
        text = _joined(content)
    except (LookupError, TypeError, AttributeError):
        return Answer(None, "without text")
    return Answer(text, _CUT if cut else "")


def openai_content(reply: Any) -> tuple[Any, bool]:
    """Returns (content, whether it was cut off) of a chat completion. Thinking is in other fields and left out."""
    choice = reply["choices"][0]
    return choice["message"].get("content"), choice.get("finish_reason") == "length"


def anthropic_content(reply: Any) -> tuple[Any, bool]:
    """Returns (content, whether it was cut off) of a reply of Anthropic's messages API."""
    return reply["content"], reply.get("stop_reason") == "max_tokens"


def _joined(content: Any) -> str:
    """Returns content as one text. Content is a string, a part, a list of parts, or None, which gives ''.

    Only parts of text count. Raises TypeError, LookupError or AttributeError for any other content.
    """
    if content is None or isinstance(content, str):
        return content or ""
    parts = [content] if isinstance(content, Mapping) else content
    return "".join(_part_text(part) for part in parts)


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    return part["text"] if part.get("type", "text") in ("text", "output_text") else ""


# --- errors


def status_of(reply: Any) -> int:
    """Returns 200 for a decoded reply without an error, else the HTTP status that fits the error in it."""
    error = _error_in(reply)
    if not error:
        return 200
    named = [error.get(name) for name in ("code", "status", "status_code", "type")] if isinstance(error, dict) else []
    for value in named:
        if (
            isinstance(value, int | str)
            and not isinstance(value, bool)
            and re.fullmatch(r"[45]\d\d", str(value).strip())
        ):
            return int(value)
    words = " ".join(value for value in (*named, error) if isinstance(value, str)).lower()
    return next((status for pattern, status in _WORDS if re.search(pattern, words)), 500)


def _error_in(reply: Any) -> Any:
    """Returns the error in a reply, of any type; None or an empty value where there is none.

    Some gateways write it as the only element of a list.
    """
    if isinstance(reply, list) and len(reply) == 1:
        (reply,) = reply
    if not isinstance(reply, dict):
        return None
    if "error" in (reply.get("object"), reply.get("type")):
        return reply.get("error") or reply
    choices = reply.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    error = reply.get("error") or first.get("error")
    return error if error or "choices" in reply or "content" in reply else _bare_error(reply)


def _bare_error(reply: dict[str, Any]) -> Any:
    """Returns the error in a reply without an answer, as gateways and web frameworks write it; None for others."""
    if errors := reply.get("errors"):
        return errors[0] if isinstance(errors, list) else errors
    if detail := reply.get("detail"):
        return detail
    message, code = reply.get("message") or reply.get("msg"), reply.get("code") or reply.get("status")
    return reply if isinstance(message, str) or isinstance(code, int) else None


# Words of errors that have no number -> the HTTP status that fits.
_WORDS = (
    (r"rate.?limit|quota|exhausted|too.many|overload|capacity", 429),
    (r"auth|permission|api.key|forbidden|denied", 401),
    (r"not.found|no.such|does.not.exist", 404),
    (r"invalid|context|too.long|filter|bad.request|unprocess", 400),
)


def asked_to_wait(headers: Mapping[str, str]) -> float:
    """Returns the seconds that `Retry-After` (a number or a date) asks for; 0 without it."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


# --- connections that failed


def certificate_problem(error: BaseException) -> str:
    """Returns why the server's certificate is not trusted, or '' where a connection failed for another reason."""
    problems = (link for link in _links(error) if isinstance(link, ssl.SSLCertVerificationError))
    return next((link.verify_message or "it cannot be verified" for link in problems), "")


def cause_of(error: BaseException) -> str:
    """Says why a connection failed, in a few words that contain nothing of the request."""
    for link in _links(error):
        if isinstance(link, ssl.SSLError) and link.reason:
            return f"TLS: {link.reason.lower().replace('_', ' ')}"
        if isinstance(link, OSError) and link.errno and link.strerror:
            # A gaierror has its own numbers; into the text of other errors asyncio puts the address.
            is_lookup = isinstance(link, socket.gaierror)
            return (link.strerror if is_lookup else os.strerror(link.errno)).lower()
    return type(error).__name__


def _links(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, the errors that it was raised from, and the members of exception groups."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for member in error.exceptions:
                yield from _links(member)
        error = error.__cause__ or error.__context__
