"""HTTP itself: streams that end when their reader goes, bodies of bounded size, errors as JSON that can be written."""

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

_MOST_ERRORS = 20  # that one answer lists
_LONGEST_INPUT = 200  # characters of what was sent that an answer quotes

DONE = b"data: [DONE]\n\n"


class Gone(Exception):
    """The client is not there any more."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled, and Gone raised, when the client hangs up first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_hung_up(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for one in (task, watcher):
            one.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """Frames as server-sent events: one line of JSON each, `data: [DONE]` at the end.

    What goes wrong on the way is a frame with `error`, not silence. The frames' generator is closed, and what is `held`
    given back, when the client hangs up, whatever it waits for.
    """

    def __init__(self, frames: AsyncGenerator[dict[str, Any], None], held: contextlib.ExitStack | None = None) -> None:
        self.status_code, self.background, self._frames = 200, None, frames
        self._held = held or contextlib.ExitStack()
        self.media_type = "text/event-stream"
        # No proxy may keep words back.
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
    """One event, compact. Some clients end a line at whatever Unicode calls a line break."""
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
    """No Exception: a framework that reads bodies would make a 400 of it."""


async def invalid(_: Request, error: Exception) -> JSONResponse:
    """422 as FastAPI has it, with what was sent quoted only where it is short and can be written."""
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": [_plain(one) for one in error.errors()[:_MOST_ERRORS]]}, 422)


def invalid_text(error: RequestValidationError) -> str:
    """The same as one line."""
    first = _plain(error.errors()[0])
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return f"{where}: {first['msg']}" if where else first["msg"]


def _plain(error: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {key: error[key] for key in ("type", "loc", "msg") if key in error}
    plain["loc"] = [part if isinstance(part, int) else encodable(str(part)) for part in error.get("loc", ())]
    plain["msg"] = encodable(str(error.get("msg", "")))
    given = error.get("input")
    short = given is None or isinstance(given, bool) or (isinstance(given, int) and abs(given) < 2**53)
    plain["input"] = given if short else encodable(repr(given)[:_LONGEST_INPUT])
    if isinstance(given, str) and len(given) <= _LONGEST_INPUT:
        plain["input"] = encodable(given)
    if context := error.get("ctx"):
        plain["ctx"] = {key: encodable(str(value)[:_LONGEST_INPUT]) for key, value in context.items()}
    return plain


class Gate:
    """So many at once; the next is refused at once."""

    def __init__(self, most: int, refuse: Callable[[int], Exception]) -> None:
        self.most, self._refuse, self._inside = most, refuse, 0

    def enter(self) -> contextlib.ExitStack:
        """Raises what `refuse` gives where all places are taken. The place is given back when the stack is closed."""
        if self._inside >= self.most:
            raise self._refuse(self.most)
        self._inside += 1
        stack = contextlib.ExitStack()
        stack.callback(self._leave)
        return stack

    def _leave(self) -> None:
        self._inside -= 1
