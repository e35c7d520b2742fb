"""HTTP details: streams that end when the client hangs up, bodies of bounded size, errors as valid JSON."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nlae_jax.runtime.errors import one_line
from nlae_jax.runtime.files import json_line
from nlae_jax.runtime.outside import encodable

T = TypeVar("T")

_MOST_ERRORS = 20  # listed in one answer
_LONGEST_INPUT = 200  # characters of the request that an answer quotes

DONE = b"data: [DONE]\n\n"


class Gone(Exception):
    """Raised where the client has hung up."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Returns the result of `work`. If the client hangs up first, cancels it and raises Gone."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_hung_up(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for future in (task, watcher):
            future.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """Sends frames as server-sent events: one line of JSON each, and `data: [DONE]` at the end.

    An error on the way becomes a frame with `error`. When the client hangs up, the frames' generator is closed and
    `held` is closed, which gives back the request's place, whatever the generator waits for.
    """

    def __init__(self, frames: AsyncGenerator[dict[str, Any], None], held: contextlib.ExitStack | None = None) -> None:
        self.status_code, self.background, self._frames = 200, None, frames
        self._held = held or contextlib.ExitStack()
        self.media_type = "text/event-stream"
        # Proxies must not buffer the stream.
        self.init_headers({"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await self._answer(receive, send)

    async def _answer(self, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        pump, watcher = asyncio.ensure_future(self._pump(send)), asyncio.ensure_future(_hung_up(receive))
        try:
            await asyncio.wait({pump, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watcher.cancel()
            pump.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await pump

    async def _pump(self, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._frames) as frames:
                async for frame in frames:
                    await send({"type": "http.response.body", "body": event(frame), "more_body": True})
        except Exception as error:
            frame = {"error": one_line(f"{type(error).__name__}: {error}", _LONGEST_INPUT)}
            await send({"type": "http.response.body", "body": event(frame), "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


def event(frame: dict[str, Any]) -> bytes:
    """Encodes one event compactly. Unicode's line breaks are escaped, because some clients end lines at them."""
    return b"data: " + json_line(frame, (",", ":")).encode() + b"\n\n"


class BoundedBody:
    """Answers 413 to a body of more than `most` bytes, whether its length was announced or not."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._most:
            return await self._refuse(scope, receive, send)
        read, started = 0, False

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, bounded, watched)
        except _TooLarge:
            if not started:
                await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        detail = f"The body is larger than {self._most >> 20} MB"
        await JSONResponse({"detail": detail}, 413, {"connection": "close"})(scope, receive, send)


class _TooLarge(BaseException):
    """Not an Exception, because the framework turns exceptions while it reads a body into status 400."""


async def invalid(_: Request, error: Exception) -> JSONResponse:
    """Answers 422 as FastAPI does, but quotes the input only where it is short and valid Unicode."""
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": [_plain(item) for item in error.errors()[:_MOST_ERRORS]]}, 422)


def invalid_text(error: RequestValidationError) -> str:
    """Returns the first validation error as one line."""
    first = _plain(error.errors()[0])
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return f"{where}: {first['msg']}" if where else first["msg"]


def _plain(error: Any) -> dict[str, Any]:
    """Makes one validation error JSON that can be encoded, with a short quotation of the input."""
    plain: dict[str, Any] = {key: error[key] for key in ("type", "loc", "msg") if key in error}
    plain["loc"] = [part if isinstance(part, int) else encodable(str(part)) for part in error.get("loc", ())]
    plain["msg"] = encodable(str(error.get("msg", "")))
    sent = error.get("input")
    short = sent is None or isinstance(sent, bool) or (isinstance(sent, int) and abs(sent) < 2**53)
    plain["input"] = sent if short else encodable(repr(sent)[:_LONGEST_INPUT])
    if isinstance(sent, str) and len(sent) <= _LONGEST_INPUT:
        plain["input"] = encodable(sent)
    if context := error.get("ctx"):
        plain["ctx"] = {key: encodable(str(value)[:_LONGEST_INPUT]) for key, value in context.items()}
    return plain


class Gate:
    """Admits at most `most` requests at once, and refuses further ones immediately."""

    def __init__(self, most: int, refuse: Callable[[int], Exception]) -> None:
        self.most, self._refuse, self._inside = most, refuse, 0

    def enter(self) -> contextlib.ExitStack:
        """Takes a place, which is given back when the returned stack is closed.

        Raises `refuse(most)` where all places are taken.
        """
        if self._inside >= self.most:
            raise self._refuse(self.most)
        self._inside += 1
        stack = contextlib.ExitStack()
        stack.callback(self._leave)
        return stack

    def _leave(self) -> None:
        self._inside -= 1
