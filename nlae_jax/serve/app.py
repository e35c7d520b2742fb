"""The HTTP server: the endpoints of Neuronpedia's self-hosted NLA server, its public site's, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import jax
import numpy as np
from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from nlae_jax.explore.passage import Passage
from nlae_jax.roles.direction import UNUSABLE, unusable_rows
from nlae_jax.runtime.errors import UserError
from nlae_jax.serve.engine import Engine
from nlae_jax.serve.frames import (
    completed,
    completion_frames,
    describe_frames,
    explain_frames,
    l2_norm,
    tokenized,
)
from nlae_jax.serve.page import add_page, page_response, wants_page
from nlae_jax.serve.public import public_app
from nlae_jax.serve.service import DeviceFailed, Service, prefix_key
from nlae_jax.serve.tables import CAPACITIES
from nlae_jax.serve.transport import BoundedBody, Events, Gate, Gone, invalid, unless_gone
from nlae_jax.serve.wire import (
    LIMITS,
    Compare,
    Complete,
    Describe,
    Explain,
    Input,
    Score,
    explain_result,
)

_BODY_BYTES = 128 << 20  # the bound of a request's body: 512 activations of width 8192 as JSON


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Access and limits of the server.

    `secret` must come with every request, unless it is empty. `hosts` are the only host names that requests may use;
    empty allows all. `explains`, `describes` (with comparisons and the page's directions) and `scores` bound the
    requests of a kind that are worked on at once; further ones are refused with 429. `sources` bounds texts to extract,
    and also completions; further ones wait.
    """

    secret: str = ""
    hosts: tuple[str, ...] = ()
    explains: int = 16
    describes: int = 32
    scores: int = 32
    sources: int = 4


def make_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """Makes the server around an engine, which starts and stops with the server."""
    service = Service(engine)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    secret = _secret_check(settings.secret)
    # Swagger's pages would load scripts from other servers. /openapi.json stays.
    app = FastAPI(title="nlae_jax", docs_url=None, redoc_url=None, lifespan=life, dependencies=[Depends(secret)])
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Gone, _gone)
    app.add_exception_handler(UserError, _refused)
    app.add_exception_handler(DeviceFailed, _broken)
    gates = {
        name: Gate(most, _too_many(name))
        for name, most in (("explain", settings.explains), ("describe", settings.describes), ("score", settings.scores))
    }
    _add_health(app, service, settings)
    extracts, completions = asyncio.Semaphore(settings.sources), asyncio.Semaphore(settings.sources)
    _add_texts(app, service, extracts)
    _add_explain(app, service, gates["explain"])
    _add_vectors(app, service, gates["describe"], gates["score"])
    _add_completion(app, service, completions)
    add_page(app, service, gates["describe"])
    app.mount("/api/nla", public_app(service, gates["explain"], completions, settings.secret))
    if settings.hosts:
        app.add_middleware(_KnownHosts, hosts=settings.hosts)
    app.add_middleware(BoundedBody, most=_BODY_BYTES)
    return app


def _secret_check(secret: str) -> Callable[..., None]:
    """Returns a check that raises HTTPException 401 or 403 unless a request brings the secret, if there is one."""

    def check(request: Request, x_secret_key: Annotated[str | None, Header()] = None) -> None:
        if not secret or wants_page(request):  # the page holds no data; its later requests are checked
            return
        if x_secret_key is None:
            raise HTTPException(401, "X-SECRET-KEY header required")
        if not secrets.compare_digest(x_secret_key.encode(), secret.encode()):
            raise HTTPException(403, "Invalid secret key")

    return check


def _too_many(name: str) -> Callable[[int], HTTPException]:
    return lambda most: HTTPException(429, f"Too many concurrent {name} requests (limit {most})")


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # the client has gone and will not read it


async def _refused(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 400)


async def _broken(_: Request, error: Exception) -> JSONResponse:
    """Answers 500. An exception that is raised further would close the connection under the client's next request."""
    return JSONResponse({"detail": str(error)}, 500)


class _KnownHosts:
    """Refuses requests to other host names, against DNS rebinding: a web page whose name is made to resolve to here."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if name.strip("[]").lower() not in self._hosts:
                detail = f"This server is {', '.join(self._hosts)}; with a token it answers to every name"
                return await JSONResponse({"detail": detail}, 403)(scope, receive, send)
        await self._app(scope, receive, send)


def _add_health(app: FastAPI, service: Service, settings: ServerSettings) -> None:
    @app.get("/")
    async def health(request: Request) -> Response:
        if wants_page(request):
            return page_response()
        reader = service.reader
        device = jax.devices()[0].platform
        cuda = jax.local_device_count() if device == "gpu" else 0
        return JSONResponse(
            {
                "status": "ok",
                "d_model": reader.d_model,
                "verbalizer_model": reader.name,
                "verbalizer_quantization": None,
                "verbalizer_kv_cache_dtype": None,
                "verbalizer_cuda_graph_max_bs": None,
                "verbalizer_torch_compile": None,
                "verbalizer_device": device,
                "reconstructor_available": True,
                "reconstructor_fp8": None,
                "reconstructor_int4": None,
                "reconstructor_device": device,
                "source_model": reader.subject_name,
                "extraction_layer": reader.layer,
                "source_truncated": False,
                "source_fp8": None,
                "source_device": device,
                "completion_available": True,
                "num_cuda_devices": cuda,
                "max_concurrent": reader.encoder.most_rows(CAPACITIES[1]),
                "max_concurrent_explains": settings.explains,
                "source_max_concurrent": settings.sources,
                "reconstructor_max_concurrent": settings.scores,
                "max_describe_requests": settings.describes,
                "limits": service.limits,
            }
        )


def _add_texts(app: FastAPI, service: Service, places: asyncio.Semaphore) -> None:
    @app.post("/tokenize")
    async def tokenize(body: Input) -> JSONResponse:
        return JSONResponse(tokenized(await service.passage(body)))

    @app.post("/extract")
    async def extract(body: Input, request: Request) -> Response:
        async with places:
            passage = await service.passage(body)
            vectors = await unless_gone(request, service.activations(passage))
            return await asyncio.to_thread(_extracted, service, passage, vectors)


def _extracted(service: Service, passage: Passage, h_TxD: np.ndarray) -> JSONResponse:
    """Makes the answer of /extract."""
    pieces = service.pieces(passage.ids)
    tokens = [
        {
            "token": piece,
            "token_id": token.token_id,
            "position": token.position,
            "activation": vector.tolist(),
            "l2_norm": l2_norm(vector),
        }
        for token, piece, vector in zip(passage.tokens, pieces, h_TxD, strict=True)
    ]
    return JSONResponse({"layer_index": service.reader.layer, "tokens": tokens})


def _add_explain(app: FastAPI, service: Service, gate: Gate) -> None:
    @app.post("/explain")
    async def explain(body: Explain, request: Request) -> Response:
        reader = service.reader
        with contextlib.ExitStack() as place:
            place.enter_context(gate.enter())
            service.check_limit(body.max_new_tokens)
            passage = await service.passage(body)
            positions = service.positions(passage, body.positions)
            if body.reverse:
                positions.reverse()
            # Explanations at temperature 0 depend on the activation only, so all requests share them.
            keys = [None if body.temperature else prefix_key(passage.ids, position) for position in positions]
            if body.stream:
                vectors = await unless_gone(request, service.activations(passage))
                frames = explain_frames(
                    service, passage, vectors, positions, keys, body.max_new_tokens, body.temperature, body.seed
                )
                return Events(frames, place.pop_all())

            async def results() -> list[dict[str, Any]]:
                vectors = await service.activations(passage)
                picked_vectors = [vectors[position] for position in positions]
                scored = await service.all_explained(
                    picked_vectors, keys, body.max_new_tokens, body.temperature, body.seed
                )
                return [
                    explain_result(passage.tokens[position], l2_norm(vector), explanation)
                    for position, vector, explanation in zip(positions, picked_vectors, scored, strict=True)
                ]

            return JSONResponse({"layer_index": reader.layer, "results": await unless_gone(request, results())})


def _add_vectors(app: FastAPI, service: Service, describes: Gate, scores: Gate) -> None:
    @app.post("/describe")
    async def describe(body: Describe, request: Request) -> Response:
        _ = service.reader
        with contextlib.ExitStack() as place:
            place.enter_context(describes.enter())
            service.check_limit(body.max_new_tokens)
            vectors = [service.vector(values, "activations") for values in body.activations]
            keys = [None if body.temperature else vector.tobytes() for vector in vectors]
            arguments = vectors, keys, body.max_new_tokens, body.temperature, body.seed
            if body.stream:
                return Events(describe_frames(service, *arguments), place.pop_all())
            scored = await unless_gone(request, service.all_explained(*arguments))
            return JSONResponse({"results": [explanation.fields() for explanation in scored]})

    @app.post("/score")
    async def score(body: Score, request: Request) -> JSONResponse:
        _ = service.reader
        with scores.enter():
            vector = service.vector(body.activation, "activation")
            if not vector.any():
                raise HTTPException(400, "activation: all zeros; there is no direction to compare with")
            (scored,) = await unless_gone(request, service.scores([body.description], vector[None]))
            fields = scored.fields()
            return JSONResponse({key: fields[key] for key in ("mse", "cosine_similarity")})

    @app.post("/compare")
    async def compare(body: Compare, request: Request) -> JSONResponse:
        _ = service.reader
        with describes.enter():
            service.check_limit(body.max_new_tokens)
            a, b = (service.vector(getattr(body, name), name, f"{name}") for name in ("activation_a", "activation_b"))
            difference = a - b
            if not difference.any():
                raise HTTPException(400, "activation_a and activation_b are equal: there is no difference to describe")
            if unusable_rows(difference[None]).size:
                raise HTTPException(400, f"activation_a - activation_b: {UNUSABLE}")
            keys = [None if body.temperature else difference.tobytes()]
            arguments = [difference], keys, body.max_new_tokens, body.temperature, body.seed
            (scored,) = await unless_gone(request, service.all_explained(*arguments))
            fields = scored.fields()
            return JSONResponse({"description": fields.pop("description"), "diff_norm": l2_norm(difference), **fields})


def _add_completion(app: FastAPI, service: Service, places: asyncio.Semaphore) -> None:
    @app.post("/completion")
    async def completion(body: Complete, request: Request) -> Response:
        passage = await service.passage(body)
        limit = min(body.completion_tokens, LIMITS["max_completion_tokens"])
        service.check_length(passage, limit)
        seed = random.getrandbits(32) if body.seed is None else body.seed
        frames = completion_frames(service, passage, limit, body.temperature, seed, places)
        if body.stream:
            return Events(frames)
        return JSONResponse(await unless_gone(request, completed(frames)))
