"""`/api/nla/*`: the interface of Neuronpedia's public site for programs. The served pair is its only source."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import random
import secrets
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nlae_jax.explore.passage import Passage
from nlae_jax.runtime.errors import UserError
from nlae_jax.serve.frames import completed, completion_frames, explain_frames, l2_norm, tokenized
from nlae_jax.serve.service import DeviceFailed, Service, prefix_key
from nlae_jax.serve.transport import Events, Gate, Gone, invalid_text, unless_gone
from nlae_jax.serve.wire import LIMITS, Input, PublicComplete, PublicExplain, PublicInput, explain_result

_TEXT_CHARACTERS = 16384
_NEW_TOKENS = 256
_HEADERS = {
    "access-control-allow-origin": "*",
    "access-control-allow-methods": "GET, POST",
    "access-control-allow-headers": "Content-Type",
    "x-limit-remaining": "1000000",  # nothing is counted here
}


def public_app(service: Service, gate: Gate, places: asyncio.Semaphore, secret: str) -> ASGIApp:
    """Makes a separate application, whose errors are `{"error": …}` and whose answers other origins may read.

    Web pages of other origins cannot send it JSON, because no endpoint answers their preflight.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(_key_check(secret))])
    app.add_exception_handler(StarletteHTTPException, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(UserError, _refused)
    app.add_exception_handler(DeviceFailed, _broken)
    app.add_exception_handler(Gone, lambda *_: Response(status_code=499))

    @app.get("/sources")
    async def sources() -> JSONResponse:
        return JSONResponse({"sources": [await source(service)]})

    @app.post("/explain")
    async def explain(body: PublicExplain, request: Request) -> Response:
        parsed = _input(body)
        with contextlib.ExitStack() as place:
            place.enter_context(gate.enter())
            passage = await service.passage(parsed)
            positions = _positions(passage, body.positions)
            # As on the public site, a repeated request gets the same answer, whatever the temperature.
            keys: list[bytes | None] = [prefix_key(passage.ids, position) for position in positions]
            vectors = await unless_gone(request, service.activations(passage))
            arguments = keys, min(_NEW_TOKENS, service.reader.most_new_tokens), body.temperature, None
            if body.stream:
                frames = explain_frames(service, passage, vectors, positions, *arguments)
                return Events(frames, place.pop_all())
            picked_vectors = [vectors[position] for position in positions]
            scored = await unless_gone(request, service.all_explained(picked_vectors, *arguments))
            results = [
                explain_result(passage.tokens[position], l2_norm(vector), explanation)
                for position, vector, explanation in zip(positions, picked_vectors, scored, strict=True)
            ]
            shape = {"layer_index": service.reader.layer, "prompt_length": len(passage.tokens)}
            return JSONResponse({"results": results, **shape})

    @app.post("/completion")
    async def completion(body: PublicComplete, request: Request) -> Response:
        passage = await service.passage(_input(body, enable_thinking=False))
        if not body.completion_tokens:
            return JSONResponse(tokenized(passage))
        limit = min(body.completion_tokens, LIMITS["max_completion_tokens"])
        service.check_length(passage, limit)
        seed = random.getrandbits(32)
        frames = completion_frames(service, passage, limit, body.temperature, seed, places)
        return Events(frames) if body.stream else JSONResponse(await unless_gone(request, completed(frames)))

    return _WithHeaders(app)


async def source(service: Service) -> dict[str, Any]:
    """Describes the pair as the site lists a source. `norm`, which mse is divided by, is the variance of the data."""
    reader = service.reader
    norm = await service.on_device(lambda: reader.statistics.variance)
    model = {"id": reader.subject_name, "displayName": reader.subject_name, "openRouterAvailable": False}
    return {
        "modelId": reader.subject_name,
        "id": f"{reader.layer}-nla",
        "displayName": reader.name,
        "description": f"Explanations of block {reader.layer} of {reader.subject_name}, by {reader.name}",
        "url": "",
        "author": "",
        "av": reader.name,
        "ar": reader.name,
        "layerNum": reader.layer,
        "norm": norm,
        "createdAt": datetime.datetime.fromtimestamp(reader.loaded_at, datetime.UTC).isoformat(),
        "model": model,
    }


def _key_check(secret: str) -> Callable[..., None]:
    """Returns a check that raises HTTPException 401 or 403 unless a header has the secret, if there is one."""

    def check(
        x_secret_key: Annotated[str | None, Header()] = None, x_api_key: Annotated[str | None, Header()] = None
    ) -> None:
        key = x_secret_key or x_api_key
        if not secret:
            return
        if key is None:
            raise HTTPException(401, "X-SECRET-KEY or x-api-key header required")
        if not secrets.compare_digest(key.encode(), secret.encode()):
            raise HTTPException(403, "Invalid secret key")

    return check


def _input(body: PublicInput, enable_thinking: bool | None = None) -> Input:
    """Turns a request into the server's `Input`. Here a text counts before messages. Raises HTTPException 400."""
    if body.text and len(body.text) > _TEXT_CHARACTERS:
        raise HTTPException(400, f"text: {len(body.text)} characters; at most {_TEXT_CHARACTERS} are read")
    if body.text:
        return Input(text=body.text)
    if not body.messages:
        raise HTTPException(400, "Either text or messages is required")
    prompt = body.messages[-1].role != "assistant" if body.add_generation_prompt is None else body.add_generation_prompt
    return Input(messages=body.messages, add_generation_prompt=prompt, enable_thinking=enable_thinking)


def _positions(passage: Passage, requested: list[int] | None) -> list[int]:
    """Returns the positions, sorted and without repeats. Raises HTTPException 400 for one that does not exist."""
    if not requested:
        raise HTTPException(400, "positions is required: a list of token positions, counted from 0")
    for position in requested:
        if not 0 <= position < len(passage.tokens):
            raise HTTPException(400, f"Position {position} out of range (0..{len(passage.tokens) - 1})")
    return sorted(set(requested))


async def _failed(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 400)


async def _broken(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 500)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"error": invalid_text(error)}, 400)


class _WithHeaders:
    """Adds the same headers to every answer, also to errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, with_headers)
