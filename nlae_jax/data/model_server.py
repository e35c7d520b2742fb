"""A language model on a server: which interface the server has, and how many prompts are answered by it.

Keys come from the environment. They are sent to the server only, and never written to logs, files or messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import SplitResult

import httpx

from nlae_jax.config import DescribeConfig
from nlae_jax.data.answers import Answer, Keep, build_prompt
from nlae_jax.data.replies import (
    TryAgain,
    anthropic_content,
    asked_to_wait,
    cause_of,
    certificate_problem,
    decoded,
    find_answer,
    openai_content,
    read_body,
    status_of,
)
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import LOCAL_HOSTS, server_address
from nlae_jax.runtime.progress import say

_TICK_SECONDS = 0.2  # the caller gets control back this often while it waits for an answer
_DRAIN_SECONDS = 5.0  # a stopped run waits so long for answers under way, because they are being paid for
_MAX_PAUSE_SECONDS = 120.0  # the longest pause before the next attempt, whatever a server asks for
_TOLD_PAUSE_SECONDS = 5.0  # pauses of at least this length are reported
_TOLD_EVERY_SECONDS = 30.0  # at most one report in this time, because many requests pause at once


@dataclass(frozen=True)
class Api:
    """The HTTP interface of one kind of server."""

    key_variable: str
    url: str  # used if describe.base_url is empty
    path: str
    headers: Callable[[str], dict[str, str]]  # key, which may be empty -> headers
    limits: tuple[str, ...]  # possible names of the field that limits an answer's length
    content: Callable[[Any], tuple[Any, bool]]  # decoded reply -> (content, was cut off); see `replies.find_answer`


OPENAI = Api(
    key_variable="OPENAI_API_KEY",
    url="https://api.openai.com/v1",
    path="/chat/completions",
    headers=lambda key: {"authorization": f"Bearer {key}"} if key else {},
    limits=("max_completion_tokens", "max_tokens"),
    content=openai_content,
)
ANTHROPIC = Api(
    key_variable="ANTHROPIC_API_KEY",
    url="https://api.anthropic.com",
    path="/v1/messages",
    headers=lambda key: {"anthropic-version": "2023-06-01"} | ({"x-api-key": key} if key else {}),
    limits=("max_tokens",),
    content=anthropic_content,
)

# (event, seconds): waits so long, or until the event is set. A result of None means that there is nothing to wait for.
Pause = Callable[[asyncio.Event, float], Awaitable[object] | None]


async def pause_unless_stopped(stop: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


class Server:
    """One model on one server. It is sent several requests at once."""

    def __init__(self, api: Api, config: DescribeConfig, pause: Pause = pause_unless_stopped) -> None:
        if not config.model:
            raise UserError(f"describe.model is empty: name the model that describe.provider {config.provider} asks")
        if config.concurrency < 1 or config.timeout_seconds <= 0 or config.max_retries < 0:
            raise UserError("describe: concurrency and timeout_seconds must be above 0, and max_retries 0 or more")
        base = _base(api, config.base_url)
        url = _checked_url(base, api)
        self._local = url.hostname in LOCAL_HOSTS
        self._api, self._config, self._pause = api, config, pause
        self._url = base + api.path
        self._headers = api.headers(_read_key(api.key_variable, required=not self._local))
        self._certificates = _certificates() if url.scheme == "https" else True
        # OpenAI's newer models refuse max_tokens; most other servers know only that name.
        self._limits = api.limits if base == api.url else api.limits[::-1]
        self._limit_taken = ""  # the name of the limit that the server has accepted
        self._tell_next = 0.0

    def ask(
        self,
        texts: Sequence[str],
        keep: Keep = lambda index, answer: None,
        make_prompt: Callable[[str], str] = build_prompt,
    ) -> Generator[tuple[int, Answer] | None, None, None]:
        """Yields answers as they arrive and hands them to `keep`; see `answers.Ask`.

        `make_prompt` makes a text's prompt.
        Raises UserError at once if the server refuses the key, model or address. After an error, or when closed, it
        sends no more requests and waits up to `_DRAIN_SECONDS` for those under way. `keep` still gets their answers.
        """
        if not texts:
            return
        results: queue.SimpleQueue[tuple[int, Answer] | Exception] = queue.SimpleQueue()
        loop, stop = asyncio.new_event_loop(), asyncio.Event()

        def converse() -> None:
            try:
                loop.run_until_complete(self._converse(texts, make_prompt, keep, results, stop))
            except Exception as error:
                results.put(error)
            finally:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.close()

        # In another thread: signals may interrupt this one at any point, but must not while an answer is being stored.
        thread = threading.Thread(target=converse, name="describe", daemon=True)
        thread.start()
        try:
            for _ in range(len(texts)):
                while (result := _next(results)) is None:
                    yield None
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(stop.set)
            thread.join(_DRAIN_SECONDS + 5)

    async def _converse(
        self,
        texts: Sequence[str],
        make_prompt: Callable[[str], str],
        keep: Keep,
        results: queue.SimpleQueue[tuple[int, Answer] | Exception],
        stop: asyncio.Event,
    ) -> None:
        """Puts one result for each text into `results`, or an error, until it is stopped."""
        numbered = iter(enumerate(texts))

        async def work(client: httpx.AsyncClient) -> None:
            try:
                for index, text in numbered:
                    while results.qsize() > 4 * self._config.concurrency and not stop.is_set():
                        await asyncio.sleep(_TICK_SECONDS)  # the consumer is slower than the server
                    if stop.is_set():
                        return
                    answer = await self._ask_with_retries(client, make_prompt(text), stop)
                    if answer.text is not None:
                        keep(index, answer.text)
                    results.put((index, answer))
            except Exception as error:
                results.put(error)
                stop.set()

        async with self._client() as client:
            workers = [asyncio.create_task(work(client)) for _ in range(min(self._config.concurrency, len(texts)))]
            bound = asyncio.create_task(_cancel_after_drain(workers, stop))
            await asyncio.wait(workers)
            bound.cancel()
            await asyncio.wait([bound])

    def _client(self) -> httpx.AsyncClient:
        most = self._config.concurrency
        try:
            return httpx.AsyncClient(
                headers={"accept-encoding": "identity"} | self._headers,
                verify=self._certificates,
                timeout=None,  # `_exchange` bounds the time of a whole request
                limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
                trust_env=not self._local,  # a proxy from the environment cannot reach this machine's own servers
            )
        except ImportError as error:
            raise self._error(f"the proxy set here: {error}") from None
        except (ValueError, httpx.InvalidURL):  # their messages quote the address, which may hold a password
            raise self._error(
                "HTTPS_PROXY, HTTP_PROXY, ALL_PROXY or NO_PROXY: holds an address that cannot be used; a proxy should "
                "look like http://HOST:PORT"
            ) from None

    async def _ask_with_retries(self, client: httpx.AsyncClient, prompt: str, stop: asyncio.Event) -> Answer:
        problem = ""
        for attempt in range(self._config.max_retries + 1):
            if stop.is_set():
                break
            try:
                return await self._answer(client, prompt)
            except TryAgain as error:
                problem, seconds_asked_for = error.problem, error.seconds
            if attempt < self._config.max_retries:
                seconds = min(max(seconds_asked_for, _backoff(attempt)), _MAX_PAUSE_SECONDS)
                self._tell(problem, seconds_asked_for, seconds)
                if (waiting := self._pause(stop, seconds)) is not None:
                    await waiting
        return Answer(None, problem)

    async def _answer(self, client: httpx.AsyncClient, prompt: str) -> Answer:
        """Makes one attempt. Raises TryAgain where another may help, UserError where the user must change something."""
        limit = self._limit_taken or self._limits[0]
        status, reply = await self._exchange(client, prompt, limit)
        other_names = [name for name in self._limits if name != limit]
        if status in (400, 422) and other_names and self._limit_taken != limit:
            # The name of the limit may be the reason: the other one is tried until the server has accepted one.
            limit = other_names[0]
            status, reply = await self._exchange(client, prompt, limit)
        if status == 200:
            self._limit_taken = limit
            return find_answer(self._api.content, reply)
        if status in (400, 413, 422):  # this prompt may be the reason: too long, or refused
            return Answer(None, f"with status {status}")
        if status in (401, 403):
            raise self._error(
                f"the server refused the key (status {status}): "
                f"set {self._api.key_variable} to one that may use {self._config.model!r}"
            )
        if status == 402:
            raise self._error("the server wants to be paid first (status 402): there is no credit left for this key")
        raise self._error(
            f"{self._url} answered with status {status}: "
            f"check describe.base_url and describe.model {self._config.model!r}"
        )

    async def _exchange(self, client: httpx.AsyncClient, prompt: str, limit: str) -> tuple[int, Any]:
        """Makes one request of at most `describe.timeout_seconds` and returns (status, decoded reply).

        Raises TryAgain where the connection or the server failed for the moment.
        """
        body = {
            "model": self._config.model,
            limit: self._config.max_new_tokens,
            "messages": [{"role": "user", "content": prompt}],
        }
        reply, status = None, 0
        try:
            async with (
                asyncio.timeout(self._config.timeout_seconds),
                client.stream("POST", self._url, json=body) as response,
            ):
                status = response.status_code
                if status == 200:
                    if (reply := decoded(await read_body(response))) is None:  # empty, cut off, or a gateway's page
                        raise TryAgain("with a reply that is no JSON", asked_to_wait(response.headers))
                    status = status_of(reply)
        except TimeoutError:
            raise TryAgain("timeouts") from None
        except httpx.RequestError as error:
            if reason := certificate_problem(error):
                raise self._error(
                    f"the certificate of {self._url} is not trusted ({reason.rstrip('.')}); "
                    "if it should be, name a file with it in SSL_CERT_FILE"
                ) from None
            raise TryAgain(f"failed connections ({cause_of(error)})") from None
        if status in (408, 409, 425, 429) or status >= 500:
            raise TryAgain(f"with status {status}", asked_to_wait(response.headers))
        return status, reply

    def _tell(self, problem: str, seconds_asked_for: float, seconds: float) -> None:
        """Reports a longer pause and its reason: otherwise a run that only waits would seem to hang."""
        if seconds < _TOLD_PAUSE_SECONDS or time.monotonic() < self._tell_next:
            return
        self._tell_next = time.monotonic() + _TOLD_EVERY_SECONDS
        wish = f"; the server asks to wait {seconds_asked_for:.0f} s" if seconds_asked_for else ""
        say(f"describe: requests end {problem}{wish}; asking again in {seconds:.0f} s")

    def _error(self, message: str) -> UserError:
        return UserError(f"describe.provider {self._config.provider}: {message}")


def _next(results: queue.SimpleQueue[tuple[int, Answer] | Exception]) -> tuple[int, Answer] | Exception | None:
    try:
        return results.get(timeout=_TICK_SECONDS)
    except queue.Empty:
        return None


async def _cancel_after_drain(tasks: Sequence[asyncio.Task[None]], stop: asyncio.Event) -> None:
    await stop.wait()
    _, pending = await asyncio.wait(tasks, timeout=_TICK_SECONDS)
    if pending:
        say(f"describe: waiting {_DRAIN_SECONDS:.0f} s at most for answers under way")
        _, pending = await asyncio.wait(pending, timeout=_DRAIN_SECONDS)
    for task in pending:
        task.cancel()


def _checked_url(base_url: str, api: Api) -> SplitResult:
    """Parses a base URL. Raises UserError if it is invalid or holds credentials.

    Credentials in it would be shown and stored with the configuration.
    """
    url = server_address(base_url)
    try:
        httpx.URL(base_url)  # stricter about host names
    except httpx.InvalidURL:
        url = None
    if url is None:
        raise UserError(
            f"describe.base_url must look like {api.url!r}, without a user name or query; "
            f"the key belongs in the environment variable {api.key_variable}"
        )
    return url


def _certificates() -> ssl.SSLContext:
    """Loads the trusted certificates: those of SSL_CERT_FILE and SSL_CERT_DIR, or httpx's if neither is set.

    Raises UserError where they cannot be read.
    """
    file, directory = (os.environ.get(name) or None for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"))
    if file is None and directory is None:
        return httpx.create_ssl_context(trust_env=False)
    try:
        if directory is not None:
            os.listdir(directory)  # raises; OpenSSL would silently ignore a missing directory
        return ssl.create_default_context(cafile=file, capath=directory)
    except OSError as error:  # also ssl's errors
        named = {"SSL_CERT_FILE": file, "SSL_CERT_DIR": directory}
        where = " or ".join(f"{name} {value}" for name, value in named.items() if value)
        raise UserError(f"{where}: no certificates can be read there ({cause_of(error)})") from None


def _read_key(variable: str, required: bool) -> str:
    key = os.environ.get(variable, "").strip()
    if not key and required:
        raise UserError(f"{variable} is not set: put the provider's API key into this environment variable")
    # Checked here, because the HTTP library's exception about a bad header would quote the key.
    if not all("!" <= character <= "~" for character in key):
        raise UserError(f"{variable} holds white space or characters outside ASCII: copy the key again")
    return key


def _backoff(attempt: int) -> float:
    """Returns the seconds before the next attempt. They double up to a minute; half is random, to spread requests."""
    return min(60.0, 2.0**attempt) * random.uniform(0.5, 1.0)


APIS = {"openai": OPENAI, "anthropic": ANTHROPIC}

# Making a server checks the settings and the key, and sends no request yet.
SERVERS: dict[str, Callable[[DescribeConfig], Server]] = {name: partial(Server, api) for name, api in APIS.items()}


def spellings(api: Api, base_url: str) -> list[str]:
    """Returns the values of `describe.base_url` that mean the same address as `base_url`, the usual one first.

    A slash at the end does not count, and "" means the provider's own address.
    """
    base = _base(api, base_url)
    return list(dict.fromkeys([*([""] if base == api.url else []), base, f"{base}/", base_url]))


def _base(api: Api, base_url: str) -> str:
    return (base_url or api.url).rstrip("/")
