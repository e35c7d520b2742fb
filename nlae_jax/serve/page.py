"""The server's page for people, and the endpoints that only the page uses."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request
from pydantic import AfterValidator, BaseModel, Field
from starlette.responses import HTMLResponse, JSONResponse, Response

from nlae_jax.assets import VIEWER
from nlae_jax.explore.directions import cosine
from nlae_jax.explore.explain import agreement, consensus
from nlae_jax.explore.steer import Outcome, SteerSettings, steer
from nlae_jax.serve.frames import l2_norm
from nlae_jax.serve.looking import look_at
from nlae_jax.serve.service import Service
from nlae_jax.serve.transport import Gate, unless_gone
from nlae_jax.serve.wire import LIMITS, Description, Input, Text, Vector

PATH = "/viewer"

_STEERED_TOKENS = 24  # of a continuation: few, because the device does nothing else meanwhile

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)

_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Texts(BaseModel):
    """Several explanations."""

    texts: Annotated[list[Description], Field(max_length=16)]


def _not_zero(alpha: float) -> float:
    if not alpha:
        raise ValueError("should not be 0: nothing would be added")
    return alpha


class Edit(Input):
    """An edit of an explanation to steer by. `alpha` is the length of the push, in units of ‖h‖."""

    positions: Annotated[list[int], Field(min_length=1, max_length=LIMITS["max_positions_per_request"])]
    original: Description
    edited: Description
    alpha: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False), AfterValidator(_not_zero)] = 0.3


class Look(BaseModel):
    """A neuron as `BLOCK:NEURON`, or a vector of the residual stream. With both, the vector counts."""

    neuron: Annotated[Text, Field(max_length=40)] = ""
    side: Literal["write", "gate", "up"] = "write"
    vector: Vector | None = None


class TwoTokens(Input):
    """Two positions of a text, whose activations are compared."""

    position: int
    other: int


class OwnWords(Input):
    """A reader's description of the activation at one position of a text."""

    position: int
    description: Description


def wants_page(request: Request) -> bool:
    """Returns whether a request is a browser's navigation, which accepts HTML; programs do not ask for it."""
    path, accepted = request.url.path, request.headers.get("accept", "")
    return request.method in ("GET", "HEAD") and (path == PATH or (path == "/" and "text/html" in accepted))


@functools.cache
def _page() -> tuple[str, str]:
    """Returns the page and its content security policy, which allows only the page's scripts, never one in a text."""
    page = VIEWER.read_text(encoding="utf-8")
    digests = [hashlib.sha256(script.encode()).digest() for script in _SCRIPT.findall(page)]
    scripts = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return page, (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {scripts}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def page_response() -> Response:
    """Returns the page with its headers."""
    page, policy = _page()
    return HTMLResponse(page, headers={**_HEADERS, "content-security-policy": policy})


def add_page(app: FastAPI, service: Service, describes: Gate) -> None:
    """Adds the page and its endpoints. `describes` bounds directions together with other requests of vectors."""

    @app.get(PATH)
    async def viewer() -> Response:
        return page_response()

    @app.get("/api/page")
    async def info() -> JSONResponse:
        """Returns the page's information about the pair; 503 while it loads."""
        return JSONResponse(await _info(service))

    @app.post("/api/page/agreement")
    async def agree(body: Texts) -> JSONResponse:
        """Returns the agreement of several explanations of one token."""
        return JSONResponse({"agreement": agreement(body.texts), "consensus": consensus(body.texts)})

    @app.post("/api/page/score")
    async def score(body: OwnWords, request: Request) -> JSONResponse:
        """Scores a reader's description against a token's activation."""
        passage = await service.passage(body)
        (position,) = service.positions(passage, [body.position])
        vectors = await unless_gone(request, service.activations(passage))
        (scored,) = await unless_gone(request, service.scores([body.description], vectors[position][None]))
        return JSONResponse(scored.fields())

    @app.post("/api/page/compare")
    async def compare(body: TwoTokens, request: Request) -> JSONResponse:
        """Explains and scores the difference of two tokens' activations, the first minus the other."""
        reader = service.reader
        with describes.enter():
            passage = await service.passage(body)
            position, other = service.positions(passage, [body.position, body.other])
            vectors = await unless_gone(request, service.activations(passage))
            difference = vectors[position] - vectors[other]
            if not difference.any():
                raise HTTPException(400, "position and other: their activations are equal; there is no difference")
            arguments = [difference], [difference.tobytes()], reader.usual_new_tokens, 0.0, 0
            (scored,) = await unless_gone(request, service.all_explained(*arguments))
            alike = float(cosine(vectors[position], vectors[other]))
            return JSONResponse({**scored.fields(), "diff_norm": l2_norm(difference), "cosine": alike})

    @app.post("/api/page/direction")
    async def direction(body: Look, request: Request) -> JSONResponse:
        """Explains pushes along a neuron or direction, beside controls."""
        _ = service.reader
        with describes.enter():
            vector = None if body.vector is None else service.vector(body.vector, "vector")
            if vector is not None and not vector.any():
                raise HTTPException(400, "vector: all zeros; it has no direction")
            return JSONResponse(await unless_gone(request, look_at(service, vector, body.neuron, body.side)))

    one_at_a_time = Gate(1, lambda _: HTTPException(429, "Somebody is steering already; try again in a moment"))

    @app.post("/api/page/steer")
    async def steer_(body: Edit, request: Request) -> JSONResponse:
        """Returns the subject's continuations: unsteered, pushed by the edit, and pushed in random directions.

        The device does nothing else meanwhile.
        """
        passage = await service.passage(body)
        service.check_length(passage, _STEERED_TOKENS)
        positions, reader = service.positions(passage, body.positions), service.reader
        settings = SteerSettings(
            (body.alpha,), 3, samples=1, max_new_tokens=_STEERED_TOKENS, temperature=0.0, generated=True
        )
        with one_at_a_time.enter():
            arguments = reader.explainer, passage, positions, body.edited, body.original, None, settings
            report = await unless_gone(request, service.on_device(lambda: steer(*arguments)))
        outcomes = (report.before, *report.edits, *report.controls)
        return JSONResponse({"outcomes": [_outcome(outcome) for outcome in outcomes]})


def _outcome(outcome: Outcome) -> dict[str, Any]:
    """Returns an outcome as JSON. `nll` is −log p per token of the text under the unsteered subject, in nats."""
    return {
        "kind": outcome.kind,
        "alpha": outcome.alpha,
        "text": outcome.continuations[0],
        "nll": outcome.nll,
    }


async def _info(service: Service) -> dict[str, Any]:
    """Collects the page's information about the pair."""
    reader = service.reader
    statistics = await service.on_device(lambda: reader.statistics)
    return {
        "name": reader.name,
        "subject": reader.subject_name,
        "layer": reader.layer,
        "d_model": reader.d_model,
        "chat": service.has_chat_template,
        "blocks": reader.subject.arch.num_layers,
        "neurons": reader.subject.arch.d_ff,
        "variance": statistics.variance,
        "norm_low": statistics.norm_low,
        "norm_high": statistics.norm_high,
        "statistics": statistics.source,
        "rates": reader.rates,
        "max_new_tokens": reader.usual_new_tokens,
        "steer": True,
        "limits": service.limits,
    }
