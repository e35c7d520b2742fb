"""What every endpoint asks for: texts read, vectors explained as words come, texts gone on with."""

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
from nlae_jax.runtime.errors import UserError
from nlae_jax.serve.engine import Completion, Engine, Explained
from nlae_jax.serve.reading import Reader
from nlae_jax.serve.wire import LIMITS, Input, Message, Scored, characters


class DeviceFailed(RuntimeError):
    """Why there is no answer: the work on the device ended with an error, which is in the log."""


class Service:
    """The engine as coroutines. Everything that takes more than a moment happens in another thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._tokenizer, self._lock = None, threading.Lock()

    @property
    def reader(self) -> Reader:
        """Raises HTTPException 503 until the pair is loaded."""
        if self.engine.reader is not None:
            return self.engine.reader
        if self.engine.failure is not None:
            raise HTTPException(503, f"NLA client not loaded: {self.engine.failure}")
        raise HTTPException(503, "NLA client not loaded: it is still loading", {"Retry-After": "2"})

    @property
    def limits(self) -> dict[str, int]:
        """`LIMITS`, as far as this pair's model goes along."""
        return {**LIMITS, "max_new_tokens": min(LIMITS["max_new_tokens"], self.reader.most_new_tokens)}

    @property
    def has_chat_template(self) -> bool:
        return bool(self.reader.tokenizer.chat_template)

    # Texts.

    async def passage(self, given: Input) -> Passage:
        """The text or chat of a request. Raises HTTPException 400."""
        reader = self.reader
        if given.messages:
            options = {} if given.enable_thinking is None else {"enable_thinking": given.enable_thinking}
            flags = given.add_generation_prompt, given.continue_final_message
            return await self._read(reader, given.messages, *flags, options)
        if not given.text:
            raise HTTPException(400, "Provide either `text` or `messages`.")
        return await self._read(reader, given.text)

    async def _read(self, reader: Reader, given: str | list[Message], *chat: Any) -> Passage:
        most = LIMITS["max_input_chars"]
        # Every prefix of a chat is rendered, which takes memory with the square of its length: so it is measured first.
        if not isinstance(given, str) and (length := sum(map(characters, given))) > most:
            raise HTTPException(
                400, f"messages: they have {length} characters; at most {most} are read, roles and channels included"
            )

        def read() -> Passage:
            with self._lock:
                if isinstance(given, str):
                    return read_text(self._own_tokenizer(reader), reader.vocab_size, given)
                prompt, going_on, options = chat
                messages = [message.model_dump(exclude_none=True) for message in given]
                tokenizer = self._own_tokenizer(reader)
                return read_chat(tokenizer, reader.vocab_size, messages, "messages", prompt, going_on, **options)

        try:
            passage = await asyncio.to_thread(read)
        except UserError as error:
            what = "" if isinstance(given, str) else "Failed to apply chat template: "
            raise HTTPException(400, f"{what}{error}") from None
        if len(passage.text) > most and not isinstance(given, str):
            raise HTTPException(400, f"The rendered chat has {len(passage.text)} characters; at most {most} are read")
        return passage

    def _own_tokenizer(self, reader: Reader) -> Any:
        """Tokenizers are not for several threads: the device's has its own."""
        if self._tokenizer is None:
            self._tokenizer = copy.deepcopy(reader.tokenizer)
        return self._tokenizer

    def positions(self, passage: Passage, wanted: Sequence[int] | None) -> list[int]:
        """Positions from 0, all of them where none are named. Raises HTTPException 400."""
        count, most = len(passage.tokens), LIMITS["max_positions_per_request"]
        if not wanted:
            if count > most:
                raise HTTPException(400, f"All {count} positions of {count} tokens exceed the limit of {most}")
            return list(range(count))
        for position in wanted:
            if not -count <= position < count:
                raise HTTPException(400, f"Position {position} out of range (0..{count - 1})")
        return [position % count for position in wanted]

    async def activations(self, passage: Passage) -> np.ndarray:
        """[T, d] float32. Raises HTTPException 400 where the text is too long."""
        reader = self.reader
        self.check_length(passage)
        return await self.on_device(lambda: reader.activations(passage.ids))

    def check_length(self, passage: Passage, new_tokens: int = 0) -> None:
        """Raises HTTPException 400 where the subject would not read it and write `new_tokens` more."""
        count, most = len(passage.tokens), self.reader.subject.arch.most_tokens
        if count > MAX_TOKENS:
            raise HTTPException(400, f"The text has {count} tokens; at most {MAX_TOKENS} are read at once")
        if 0 < most < count + new_tokens:
            more = f" and {new_tokens} are to follow" if new_tokens else ""
            raise HTTPException(400, f"The text has {count} tokens{more}; the model can be run on {most}")

    def check_limit(self, max_new_tokens: int) -> None:
        """Raises HTTPException 400 where the encoder cannot write so many."""
        if max_new_tokens > (most := self.reader.most_new_tokens):
            raise HTTPException(
                400, f"max_new_tokens: {max_new_tokens} is more than the {most} that this pair can write"
            )

    async def on_device(self, function: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self.engine.call(function))

    # Vectors.

    def vector(self, values: Sequence[float], name: str, field: str = "Vector") -> np.ndarray:
        """[d] float32. Raises HTTPException 400 where it is none of this pair's."""
        d_model = self.reader.d_model
        if len(values) != d_model:
            raise HTTPException(400, f"{field} length {len(values)} != d_model {d_model}")
        with np.errstate(over="ignore"):
            vector = np.asarray(values, np.float64).astype(np.float32)
        if not np.isfinite(vector).all():
            raise HTTPException(400, f"{name}: a number is beyond float32")
        return vector

    async def explained(
        self,
        vectors: Sequence[np.ndarray],
        keys: Sequence[bytes | None],
        limit: int,
        temperature: float,
        seed: int | None,
    ) -> AsyncGenerator[tuple[int, Explained], None]:
        """(number, what is written so far), the last of each final. What is not waited for any more is given up.

        Raises DeviceFailed where the device failed.
        """
        states: asyncio.Queue[tuple[int, Explained]] = asyncio.Queue()
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
        """The same when everything is there."""
        found: dict[int, Scored] = {}
        async for number, state in self.explained(*args):
            if state.final:
                found[number] = scored(state)
        return [found[number] for number in sorted(found)]

    async def scores(self, texts: Sequence[str], vectors: np.ndarray) -> list[Scored]:
        reader = self.reader
        mse, cos = await self.on_device(lambda: reader.score(texts, vectors))
        return [Scored(*row) for row in zip(texts, mse.tolist(), cos.tolist(), strict=True)]

    # Completions.

    async def completed(
        self, passage: Passage, limit: int, temperature: float, seed: int | None
    ) -> AsyncGenerator[list[Token], None]:
        """The tokens that the subject writes after a passage, as they come, whole characters together."""
        reader = self.reader
        rounds: asyncio.Queue[tuple[list[int], bool, str | None]] = asyncio.Queue()
        watch = _threadsafe(asyncio.get_running_loop(), lambda *state: rounds.put_nowait(state))
        seed = random.getrandbits(32) if seed is None else seed
        completion = Completion(passage.ids, limit, temperature, seed, watch)
        self.engine.complete(completion)
        try:
            given, done = 0, False
            while not done:
                ids, done, error = await rounds.get()
                if error:
                    raise DeviceFailed(error)
                new = await asyncio.to_thread(self._new_tokens, reader, passage, ids)
                ready = len(new) if done else next(_incomplete(new), len(new))
                if ready > given:
                    yield new[given:ready]
                    given = ready
        finally:
            completion.cancelled = True

    def _new_tokens(self, reader: Reader, passage: Passage, ids: list[int]) -> list[Token]:
        # What is new depends on the last token alone: whether it is a chat's, and where it is.
        count = len(passage.tokens)
        with self._lock:
            last = Passage("", passage.tokens[-1:])
            tokens = extended(self._own_tokenizer(reader), last, ids, reader.subject.stop_ids).tokens[1:]
        return [dataclasses.replace(token, position=count + number) for number, token in enumerate(tokens)]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each id is by itself, with U+FFFD where it is a part of a character."""
        with self._lock:
            tokenizer = self._own_tokenizer(self.reader)
            return [tokenizer.decode([token]) for token in ids]

    async def decoded(self, ids: Sequence[int]) -> str:
        def decode() -> str:
            with self._lock:
                return self._own_tokenizer(self.reader).decode(list(ids))

        return await asyncio.to_thread(decode)


def _incomplete(tokens: Sequence[Token]) -> Any:
    """Where a character begins that may not be whole yet: the last tokens' only, since it has four bytes at most."""
    start = max(0, len(tokens) - 4)
    return (number for number in range(start, len(tokens)) if "\ufffd" in tokens[number].text)


def _threadsafe(loop: asyncio.AbstractEventLoop, function: Callable[..., None]) -> Callable[..., None]:
    """`function` called on the loop, from any thread; nothing once the loop is closed."""

    def call(*args: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(function, *args)

    return call


def scored(state: Explained) -> Scored:
    return Scored(state.description or "", state.mse, state.cos)


def prefix_key(ids: Sequence[int], position: int) -> bytes:
    """What decides an activation: the text up to it."""
    return hashlib.sha256(np.asarray(ids[: position + 1], np.int64).tobytes()).digest()
