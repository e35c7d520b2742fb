"""The page that the server shows to people, and what only the page asks for."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, Field
from starlette.responses import HTMLResponse, JSONResponse, Response

from nlae_jax.assets import VIEWER
from nlae_jax.explore.explain import agreement, consensus
from nlae_jax.explore.steer import Outcome, Settings, steer
from nlae_jax.serve.looking import look_at
from nlae_jax.serve.service import Service
from nlae_jax.serve.transport import Gate, unless_gone
from nlae_jax.serve.wire import LIMITS, Description, Input, Text, Vector

PATH = "/viewer"

_STEERED_TOKENS = 24  # of a continuation: the device does nothing else meanwhile

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)

_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Texts(BaseModel):
    texts: Annotated[list[Description], Field(max_length=16)]


class Edit(Input):
    """An edit of an explanation, for the subject to go on with; `alpha`: how far it is pushed, in units of ‖h‖."""

    positions: Annotated[list[int], Field(min_length=1, max_length=LIMITS["max_positions_per_request"])]
    original: Description
    edited: Description
    alpha: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = 1.0


class Look(BaseModel):
    """A neuron as `BLOCK:NEURON`, or a vector of the residual stream, which wins."""

    neuron: Annotated[Text, Field(max_length=40)] = ""
    side: Literal["write", "gate", "up"] = "write"
    vector: Vector | None = None


class OwnWords(Input):
    position: int
    description: Description


def wants_page(request: Request) -> bool:
    """A browser's navigation: it asks for HTML, which programs do not."""
    path, accepted = request.url.path, request.headers.get("accept", "")
    return request.method in ("GET", "HEAD") and (path == PATH or (path == "/" and "text/html" in accepted))


@functools.cache
def _page() -> tuple[str, str]:
    """The page, and the policy that lets it run its own script, whatever a text or an explanation holds."""
    page = VIEWER.read_text(encoding="utf-8")
    digests = [hashlib.sha256(script.encode()).digest() for script in _SCRIPT.findall(page)]
    scripts = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return page, (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {scripts}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def page_response() -> Response:
    page, policy = _page()
    return HTMLResponse(page, headers={**_HEADERS, "content-security-policy": policy})


def add_page(app: FastAPI, service: Service, describes: Gate) -> None:
    """`describes`: how many directions may be looked at at once, together with what else explains vectors."""

    @app.get(PATH)
    async def viewer() -> Response:
        return page_response()

    @app.get("/api/page")
    async def info() -> JSONResponse:
        """What the page says of the pair. 503 while it loads."""
        return JSONResponse(await _info(service))

    @app.post("/api/page/agreement")
    async def agree(body: Texts) -> JSONResponse:
        """How much several explanations of one token have in common."""
        return JSONResponse({"agreement": agreement(body.texts), "consensus": consensus(body.texts)})

    @app.post("/api/page/score")
    async def score(body: OwnWords, request: Request) -> JSONResponse:
        """A reader's own words scored against a token's activation."""
        passage = await service.passage(body)
        (position,) = service.positions(passage, [body.position])
        vectors = await unless_gone(request, service.activations(passage))
        (one,) = await unless_gone(request, service.scores([body.description], vectors[position][None]))
        return JSONResponse(one.fields())

    @app.post("/api/page/direction")
    async def direction(body: Look, request: Request) -> JSONResponse:
        """What the pair says along a neuron or direction, beside controls."""
        _ = service.reader
        with describes.enter():
            vector = None if body.vector is None else service.vector(body.vector, "vector")
            if vector is not None and not vector.any():
                raise HTTPException(400, "vector: all zeros; it has no direction")
            return JSONResponse(await unless_gone(request, look_at(service, vector, body.neuron, body.side)))

    one_at_a_time = Gate(1, lambda _: HTTPException(429, "Somebody is steering already; try again in a moment"))

    @app.post("/api/page/steer")
    async def steer_(body: Edit, request: Request) -> JSONResponse:
        """What the subject writes next: as it is, pushed by the edit, and pushed as far in random directions.

        The device does nothing else meanwhile.
        """
        passage = await service.passage(body)
        service.check_length(passage, _STEERED_TOKENS)
        positions, reader = service.positions(passage, body.positions), service.reader
        settings = Settings((body.alpha,), controls=3, samples=1, max_new_tokens=_STEERED_TOKENS, temperature=0.0)
        with one_at_a_time.enter():
            asked = reader.explainer, passage, positions, body.edited, body.original, None, settings
            found = await unless_gone(request, service.on_device(lambda: steer(*asked)))
        outcomes = (found.before, *found.edits, *found.controls)
        return JSONResponse({"outcomes": [_outcome(one) for one in outcomes]})


def _outcome(one: Outcome) -> dict[str, Any]:
    """`nll`: how strange the subject as it is finds what it wrote, in nats a token."""
    return {"kind": one.kind, "alpha": one.alpha, "text": one.continuations[0], "nll": one.nll}


async def _info(service: Service) -> dict[str, Any]:
    reader = service.reader
    known = await service.on_device(lambda: reader.statistics)
    return {
        "name": reader.name,
        "subject": reader.subject_name,
        "layer": reader.layer,
        "d_model": reader.d_model,
        "chat": service.has_chat_template,
        "blocks": reader.subject.arch.num_layers,
        "neurons": reader.subject.arch.d_ff,
        "variance": known.variance,
        "norm_low": known.norm_low,
        "norm_high": known.norm_high,
        "statistics": known.source,
        "rates": reader.rates,
        "max_new_tokens": min(reader.explainer.max_new_tokens, reader.most_new_tokens),
        "steer": True,
        "limits": service.limits,
    }
