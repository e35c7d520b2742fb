"""The class `Service`, which all endpoints use: it reads texts, streams explanations, and streams completions."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import hashlib
import random
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np
from fastapi import HTTPException

from nlae_jax.explore.explainer import MAX_TOKENS
from nlae_jax.explore.passage import Passage, Token, extended, read_chat, read_text
from nlae_jax.roles.direction import UNUSABLE, unusable_rows
from nlae_jax.runtime.errors import UserError
from nlae_jax.serve.engine import Engine
from nlae_jax.serve.jobs import Completion, State
from nlae_jax.serve.reading import Reader
from nlae_jax.serve.wire import LIMITS, Input, Message, Scored, characters


class DeviceFailed(RuntimeError):
    """Raised where the work on the device ended with an error. The log has the details."""


class Service:
    """Offers the engine as coroutines. All slow work happens in other threads."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._tokenizer, self._lock = None, threading.Lock()

    @property
    def reader(self) -> Reader:
        """The loaded pair. Raises HTTPException 503 until it is loaded."""
        if self.engine.reader is not None:
            return self.engine.reader
        if self.engine.failure is not None:
            raise HTTPException(503, f"NLA client not loaded: {self.engine.failure}")
        raise HTTPException(503, "NLA client not loaded: it is still loading", {"Retry-After": "2"})

    @property
    def limits(self) -> dict[str, int]:
        """`LIMITS`, lowered to what this pair's model allows."""
        return {**LIMITS, "max_new_tokens": min(LIMITS["max_new_tokens"], self.reader.most_new_tokens)}

    @property
    def has_chat_template(self) -> bool:
        """Whether the subject reads chats."""
        return bool(self.reader.tokenizer.chat_template)

    # Texts.

    async def passage(self, request: Input) -> Passage:
        """Reads the text or chat of a request. Raises HTTPException 400 where it cannot be read."""
        reader = self.reader
        if request.messages:
            options = {} if request.enable_thinking is None else {"enable_thinking": request.enable_thinking}
            flags = request.add_generation_prompt, request.continue_final_message
            return await self._read(reader, request.messages, *flags, options)
        if not request.text:
            raise HTTPException(400, "Provide either `text` or `messages`.")
        return await self._read(reader, request.text)

    async def _read(self, reader: Reader, source: str | list[Message], *chat: Any) -> Passage:
        most = LIMITS["max_input_chars"]
        # Checked first, because every prefix of a chat is rendered, which takes memory with the square of its length.
        if not isinstance(source, str) and (length := sum(map(characters, source))) > most:
            raise HTTPException(
                400, f"messages: they have {length} characters; at most {most} are read, roles and channels included"
            )

        def read() -> Passage:
            with self._lock:
                if isinstance(source, str):
                    return read_text(self._own_tokenizer(reader), reader.vocab_size, source)
                prompt, going_on, options = chat
                messages = [message.model_dump(exclude_none=True) for message in source]
                tokenizer = self._own_tokenizer(reader)
                return read_chat(tokenizer, reader.vocab_size, messages, "messages", prompt, going_on, **options)

        try:
            passage = await asyncio.to_thread(read)
        except UserError as error:
            prefix = "" if isinstance(source, str) else "Failed to apply chat template: "
            raise HTTPException(400, f"{prefix}{error}") from None
        if len(passage.text) > most and not isinstance(source, str):
            raise HTTPException(400, f"The rendered chat has {len(passage.text)} characters; at most {most} are read")
        return passage

    def _own_tokenizer(self, reader: Reader) -> Any:
        """Returns this service's copy of the tokenizer, because the device's thread may be using the reader's."""
        if self._tokenizer is None:
            self._tokenizer = copy.deepcopy(reader.tokenizer)
        return self._tokenizer

    def positions(self, passage: Passage, requested: Sequence[int] | None) -> list[int]:
        """Resolves positions, counted from 0; all where none are named. Raises HTTPException 400 for invalid ones."""
        count, most = len(passage.tokens), LIMITS["max_positions_per_request"]
        if not requested:
            if count > most:
                raise HTTPException(400, f"All {count} positions of {count} tokens exceed the limit of {most}")
            return list(range(count))
        for position in requested:
            if not -count <= position < count:
                raise HTTPException(400, f"Position {position} out of range (0..{count - 1})")
        return [position % count for position in requested]

    async def activations(self, passage: Passage) -> np.ndarray:
        """Reads activations [T, d] float32. Raises HTTPException 400 where the text is too long."""
        reader = self.reader
        self.check_length(passage)
        return await self.on_device(lambda: reader.activations(passage.ids))

    def check_length(self, passage: Passage, new_tokens: int = 0) -> None:
        """Raises HTTPException 400 where a text, with `new_tokens` after it, is too long for the subject."""
        count, most = len(passage.tokens), self.reader.subject.arch.most_tokens
        if count > MAX_TOKENS:
            raise HTTPException(400, f"The text has {count} tokens; at most {MAX_TOKENS} are read at once")
        if 0 < most < count + new_tokens:
            more = f" and {new_tokens} are to follow" if new_tokens else ""
            raise HTTPException(400, f"The text has {count} tokens{more}; the model can be run on {most}")

    def check_limit(self, max_new_tokens: int) -> None:
        """Raises HTTPException 400 where the encoder cannot write that many tokens."""
        if max_new_tokens > (most := self.reader.most_new_tokens):
            raise HTTPException(
                400, f"max_new_tokens: {max_new_tokens} is more than the {most} that this pair can write"
            )

    async def on_device(self, function: Callable[[], Any]) -> Any:
        """Runs a function in the device's thread and returns its result."""
        return await asyncio.wrap_future(self.engine.call(function))

    # Vectors.

    def vector(self, values: Sequence[float], name: str, field: str = "Vector") -> np.ndarray:
        """Converts a vector to [d] float32. Raises HTTPException 400 for another width or numbers beyond float32."""
        d_model = self.reader.d_model
        if len(values) != d_model:
            raise HTTPException(400, f"{field} length {len(values)} != d_model {d_model}")
        with np.errstate(over="ignore"):
            vector = np.asarray(values, np.float64).astype(np.float32)
        if unusable_rows(vector[None]).size:
            raise HTTPException(400, f"{name}: {UNUSABLE}")
        return vector

    async def explained(
        self,
        vectors: Sequence[np.ndarray],
        keys: Sequence[bytes | None],
        limit: int,
        temperature: float,
        seed: int | None,
    ) -> AsyncGenerator[tuple[int, State], None]:
        """Yields (number, state) of each vector as words come; the last state of each is final.

        Closing the generator cancels the remaining explanations. Raises DeviceFailed where the device failed.
        """
        states: asyncio.Queue[tuple[int, State]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        first = random.getrandbits(32) if seed is None else seed
        seeds = [(first + number) % 2**32 for number in range(len(vectors))]
        watch = _threadsafe(loop, lambda number, state: states.put_nowait((number, state)))
        cancel = self.engine.explain(vectors, keys, limit, temperature, seeds, watch)
        try:
            left = len(vectors)
            while left:
                number, state = await states.get()
                if state.error:
                    raise DeviceFailed(state.error)
                left -= state.final
                yield number, state
        finally:
            cancel()

    async def all_explained(self, *args: Any) -> list[Scored]:
        """Returns all explanations with their scores, when all have ended. `args` are those of `explained`."""
        results: dict[int, Scored] = {}
        async for number, state in self.explained(*args):
            if state.final:
                results[number] = scored(state)
        return [results[number] for number in sorted(results)]

    async def scores(self, texts: Sequence[str], vectors: np.ndarray) -> list[Scored]:
        """Scores descriptions against activations [N, d]."""
        reader = self.reader
        mse, cos = await self.on_device(lambda: reader.score(texts, vectors))
        return [Scored(*row) for row in zip(texts, mse.tolist(), cos.tolist(), strict=True)]

    # Completions.

    async def completed(
        self, passage: Passage, limit: int, temperature: float, seed: int | None
    ) -> AsyncGenerator[list[Token], None]:
        """Yields the tokens that the subject writes after a passage, as they come. A character's tokens come together.

        Closing the generator cancels the completion. Raises DeviceFailed where the device failed.
        """
        reader = self.reader
        rounds: asyncio.Queue[tuple[list[int], bool, str | None]] = asyncio.Queue()
        watch = _threadsafe(asyncio.get_running_loop(), lambda *state: rounds.put_nowait(state))
        seed = random.getrandbits(32) if seed is None else seed
        completion = Completion(passage.ids, limit, temperature, seed, watch)
        self.engine.complete(completion)
        try:
            sent, done = 0, False
            while not done:
                ids, done, error = await rounds.get()
                if error:
                    raise DeviceFailed(error)
                new = await asyncio.to_thread(self._new_tokens, reader, passage, ids)
                ready = len(new) if done else next(_incomplete(new), len(new))
                if ready > sent:
                    yield new[sent:ready]
                    sent = ready
        finally:
            completion.cancelled = True

    def _new_tokens(self, reader: Reader, passage: Passage, ids: list[int]) -> list[Token]:
        """Makes the tokens that follow a passage."""
        # They depend on the passage's last token only: on whether it is a chat's, and on its position.
        count = len(passage.tokens)
        with self._lock:
            last = Passage("", passage.tokens[-1:])
            tokens = extended(self._own_tokenizer(reader), last, ids, reader.subject.stop_ids).tokens[1:]
        return [dataclasses.replace(token, position=count + number) for number, token in enumerate(tokens)]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Decodes each id by itself. U+FFFD stands for a part of a character."""
        with self._lock:
            tokenizer = self._own_tokenizer(self.reader)
            return [tokenizer.decode([token]) for token in ids]

    async def decoded(self, ids: Sequence[int]) -> str:
        """Decodes ids into one text."""

        def decode() -> str:
            with self._lock:
                return self._own_tokenizer(self.reader).decode(list(ids))

        return await asyncio.to_thread(decode)


def _incomplete(tokens: Sequence[Token]) -> Any:
    """Yields where a character begins that may be incomplete. Only the last four tokens matter: it has four bytes."""
    start = max(0, len(tokens) - 4)
    return (number for number in range(start, len(tokens)) if "\ufffd" in tokens[number].text)


def _threadsafe(loop: asyncio.AbstractEventLoop, function: Callable[..., None]) -> Callable[..., None]:
    """Returns a function that any thread may call to run `function` on the loop. It does nothing on a closed loop."""

    def call(*args: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(function, *args)

    return call


def scored(state: State) -> Scored:
    """Returns the description and scores of a final state."""
    return Scored(state.description or "", state.mse, state.cos)


def prefix_key(ids: Sequence[int], position: int) -> bytes:
    """Returns a hash of the token ids up to a position, which decide its activation."""
    return hashlib.sha256(np.asarray(ids[: position + 1], np.int64).tobytes()).digest()
