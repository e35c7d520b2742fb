"""Makes answers from the service's results, whole or as the frames of a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np

from nlae_jax.explore.passage import Passage
from nlae_jax.serve.service import Service, scored
from nlae_jax.serve.wire import explain_result, token_info

Frames = AsyncGenerator[dict[str, Any], None]


def tokenized(passage: Passage) -> dict[str, Any]:
    """Returns the answer of /tokenize."""
    tokens = [token_info(token) for token in passage.tokens]
    return {"tokens": tokens, "prompt_length": len(tokens), "text": passage.text}


def l2_norm(vector_D: np.ndarray) -> float:
    """Returns the L2 norm, computed in float64."""
    return float(np.linalg.norm(vector_D.astype(np.float64)))


async def explain_frames(
    service: Service,
    passage: Passage,
    vectors: np.ndarray,
    positions: list[int],
    keys: list[bytes | None],
    limit: int,
    temperature: float,
    seed: int | None,
) -> Frames:
    """Yields the frames of an /explain stream, without `[DONE]`."""
    yield {"layer_index": service.reader.layer, "total": len(positions), "prompt_length": len(passage.tokens)}
    picked_vectors = [vectors[position] for position in positions]
    sent_text: dict[int, str] = {}
    async with contextlib.aclosing(service.explained(picked_vectors, keys, limit, temperature, seed)) as states:
        async for number, state in states:
            position = positions[number]
            if sent_text.get(number) != state.text:
                sent_text[number] = state.text
                yield {"position": position, "text": state.text, "done": False}
            if state.final:
                yield explain_result(passage.tokens[position], l2_norm(picked_vectors[number]), scored(state))


async def describe_frames(service: Service, *arguments: Any) -> Frames:
    """Yields the frames of a /describe stream, without `[DONE]`. `arguments` are those of `Service.explained`."""
    sent_text: dict[int, str] = {}
    async with contextlib.aclosing(service.explained(*arguments)) as states:
        async for number, state in states:
            if sent_text.get(number) != state.text:
                sent_text[number] = state.text
                yield {"index": number, "text": state.text, "done": False}
            if state.final:
                yield scored(state).fields()


async def completion_frames(
    service: Service, passage: Passage, limit: int, temperature: float, seed: int, places: asyncio.Semaphore
) -> Frames:
    """Yields the frames of a /completion stream, without `[DONE]`."""
    async with places:
        prompt = [token_info(token) for token in passage.tokens]
        yield {"type": "prompt", "prompt_length": len(prompt), "tokens": prompt}
        ids = list(passage.ids)
        async with contextlib.aclosing(service.completed(passage, limit, temperature, seed)) as rounds:
            async for tokens in rounds:
                for token in tokens:
                    ids.append(token.token_id)
                    yield {"type": "token", "token": token_info(token)}
        yield {"type": "done", "text": await service.decoded(ids)}


async def completed(frames: Frames) -> dict[str, Any]:
    """Returns the answer of a /completion that is not streamed, made from its frames."""
    answer: dict[str, Any] = {}
    async with contextlib.aclosing(frames):
        async for frame in frames:
            if frame["type"] == "prompt":
                answer = {"tokens": frame["tokens"], "prompt_length": frame["prompt_length"]}
            elif frame["type"] == "token":
                answer["tokens"].append(frame["token"])
            else:
                answer["text"] = frame["text"]
    return answer
