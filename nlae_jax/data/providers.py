"""Describers that ask a language model: the subject itself, an OpenAI-compatible server, or Anthropic's.

Keys come from the environment; they are sent to the server and go nowhere else: not into logs, files or messages.
"""

from __future__ import annotations

import email.utils
import math
import os
import random
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx

from nlae_jax.config import DescribeConfig
from nlae_jax.data.answers import INSTRUCTION, Answer, AnswerCache, build_prompt, cached_describer
from nlae_jax.errors import UserError

if TYPE_CHECKING:  # describe.py imports this module
    from nlae_jax.data.describe import Describer, DescribeResources, Progress

_SUBJECT_BATCH = 32  # prompts handed to the subject at once
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


# --- the subject


def subject_provider(
    config: DescribeConfig, resources: DescribeResources, progress: Progress | None = None
) -> Describer:
    """The subject describes its own texts. Raises UserError if it cannot be asked."""
    generate = resources.generate
    if generate is None:
        raise UserError("describe.provider subject needs a subject that can generate text; use template instead")

    def ask(texts: Sequence[str]) -> Generator[tuple[int, Answer], None, None]:
        for start in range(0, len(texts), _SUBJECT_BATCH):
            completions = generate([build_prompt(text) for text in texts[start : start + _SUBJECT_BATCH]])
            for i, completion in enumerate(completions):
                yield start + i, Answer(completion)

    identity = (config.provider, config.model, INSTRUCTION, config.max_new_tokens)
    cache = AnswerCache(resources.cache_directory, *identity)
    return cached_describer(config, cache, ask, progress, _SUBJECT_BATCH, by_all=True)


# --- servers


@dataclass(frozen=True)
class Api:
    """How one kind of server is spoken to."""

    key_variable: str
    url: str  # used if describe.base_url is empty
    path: str
    headers: Callable[[str], dict[str, str]]  # from the key, which may be empty
    body: Callable[[DescribeConfig, str], dict[str, Any]]  # from the configuration and the prompt
    text: Callable[[Any], Any]  # from the decoded answer; any lookup error means there is none


def _openai_body(config: DescribeConfig, prompt: str) -> dict[str, Any]:
    # OpenAI's own newer models reject max_tokens; other servers know nothing else.
    limit = "max_tokens" if config.base_url else "max_completion_tokens"
    return {"model": config.model, limit: config.max_new_tokens, "messages": [{"role": "user", "content": prompt}]}


def _anthropic_body(config: DescribeConfig, prompt: str) -> dict[str, Any]:
    return {
        "model": config.model,
        "max_tokens": config.max_new_tokens,
        "messages": [{"role": "user", "content": prompt}],
    }


OPENAI = Api(
    key_variable="OPENAI_API_KEY",
    url="https://api.openai.com/v1",
    path="/chat/completions",
    headers=lambda key: {"authorization": f"Bearer {key}"} if key else {},
    body=_openai_body,
    text=lambda answer: answer["choices"][0]["message"]["content"],
)
ANTHROPIC = Api(
    key_variable="ANTHROPIC_API_KEY",
    url="https://api.anthropic.com",
    path="/v1/messages",
    headers=lambda key: {"anthropic-version": "2023-06-01"} | ({"x-api-key": key} if key else {}),
    body=_anthropic_body,
    text=lambda answer: "".join(block["text"] for block in answer["content"] if block["type"] == "text"),
)

Pause = Callable[[threading.Event, float], object]  # waits up to so many seconds, or until the event is set


def openai_provider(
    config: DescribeConfig,
    resources: DescribeResources,
    progress: Progress | None = None,
    pause: Pause = threading.Event.wait,
) -> Describer:
    """Asks `{base_url}/chat/completions` of any OpenAI-compatible server; key from OPENAI_API_KEY."""
    return _server_provider(OPENAI, config, resources, progress, pause)


def anthropic_provider(
    config: DescribeConfig,
    resources: DescribeResources,
    progress: Progress | None = None,
    pause: Pause = threading.Event.wait,
) -> Describer:
    """Asks `{base_url}/v1/messages` of Anthropic's server or one like it; key from ANTHROPIC_API_KEY."""
    return _server_provider(ANTHROPIC, config, resources, progress, pause)


def _server_provider(
    api: Api, config: DescribeConfig, resources: DescribeResources, progress: Progress | None, pause: Pause
) -> Describer:
    server = Server(api, config, pause)
    # Local servers often call whatever they serve by one name: the address tells them apart.
    identity = (config.provider, config.model, INSTRUCTION, config.max_new_tokens, config.base_url)
    return cached_describer(config, AnswerCache(resources.cache_directory, *identity), server.ask, progress)


class Server:
    """One model on one server, asked by several threads."""

    def __init__(self, api: Api, config: DescribeConfig, pause: Pause = threading.Event.wait) -> None:
        if not config.model:
            raise UserError(f"describe.model is empty: name the model that describe.provider {config.provider} asks")
        if config.concurrency < 1 or config.timeout_seconds <= 0 or config.max_retries < 0:
            raise UserError("describe: concurrency and timeout_seconds must be above 0, and max_retries 0 or more")
        base = (config.base_url or api.url).rstrip("/")
        host = _checked_host(base, api)
        self._local = host in _LOCAL_HOSTS
        self._api, self._config, self._pause = api, config, pause
        self._url = base + api.path
        self._headers = api.headers(_read_key(api.key_variable, required=not self._local))

    def ask(self, texts: Sequence[str]) -> Generator[tuple[int, Answer], None, None]:
        """Yields answers as they arrive. Raises UserError at once if the server refuses the key, model or address."""
        stop = threading.Event()
        executor = ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="describe")
        # A proxy from the environment cannot reach this machine's own servers.
        with self._client() as client:
            try:
                futures: dict[Future[Answer], int] = {
                    executor.submit(self._ask_one, client, text, stop): i for i, text in enumerate(texts)
                }
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                stop.set()
                executor.shutdown(cancel_futures=True)

    def _client(self) -> httpx.Client:
        try:
            return httpx.Client(headers=self._headers, timeout=self._config.timeout_seconds, trust_env=not self._local)
        except (ImportError, ValueError) as error:  # a proxy that httpx cannot use, or no URL
            raise UserError(f"describe.provider {self._config.provider}: the proxy set here: {error}") from None

    def _ask_one(self, client: httpx.Client, text: str, stop: threading.Event) -> Answer:
        problem, body = "", self._api.body(self._config, build_prompt(text))
        for attempt in range(self._config.max_retries + 1):
            if stop.is_set():
                break
            retry_after = 0.0
            try:
                response = client.post(self._url, json=body)
            except httpx.RequestError as error:
                problem = "timeouts" if isinstance(error, httpx.TimeoutException) else "failed connections"
            else:
                answer = self._interpret(response)
                if answer is not None:
                    return answer
                problem = f"with status {response.status_code}"
                retry_after = _retry_after(response)
            if attempt < self._config.max_retries:
                self._pause(stop, max(retry_after, _backoff(attempt)))
        return Answer(None, problem)

    def _interpret(self, response: httpx.Response) -> Answer | None:
        """The answer in a response; None if asking again may help. Never quotes the server: it may echo the key."""
        status = response.status_code
        if status in (401, 403):
            raise UserError(
                f"describe.provider {self._config.provider}: the server refused the key (status {status}): "
                f"set {self._api.key_variable} to one that may use {self._config.model!r}"
            )
        if status in (408, 409, 425, 429) or status >= 500:
            return None
        if status in (400, 413, 422):  # this prompt may be at fault: too long, or refused
            return Answer(None, f"with status {status}")
        if status != 200:
            raise UserError(
                f"describe.provider {self._config.provider}: {self._url} answered with status {status}: "
                f"check describe.base_url and describe.model {self._config.model!r}"
            )
        try:
            text = self._api.text(response.json())
        except (ValueError, LookupError, TypeError, RecursionError):
            text = None
        return Answer(text) if isinstance(text, str) else Answer(None, "without text")


def _checked_host(base_url: str, api: Api) -> str:
    """The host of a base URL without credentials in it: these would be shown and stored with the configuration."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
        raise UserError(
            f"describe.base_url must look like {api.url!r}, without a user name or query; "
            f"the key belongs in the environment variable {api.key_variable}"
        )
    return url.host


def _read_key(variable: str, required: bool) -> str:
    key = os.environ.get(variable, "").strip()
    if not key and required:
        raise UserError(f"{variable} is not set: put the provider's API key into this environment variable")
    # An exception of the HTTP library about a bad header would quote it.
    if not all("!" <= character <= "~" for character in key):
        raise UserError(f"{variable} holds white space or characters outside ASCII: copy the key again")
    return key


def _backoff(attempt: int) -> float:
    """Seconds before the next attempt: doubling up to a minute, half of it random so that threads spread out."""
    return min(60.0, 2.0**attempt) * random.uniform(0.5, 1.0)


def _retry_after(response: httpx.Response) -> float:
    """Seconds the server asks to wait (a number or a date), at most ten minutes; 0 if it does not say."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), 600.0) if math.isfinite(seconds) else 0.0


# Making one checks the settings and the key and asks nothing yet.
SERVERS: dict[str, Callable[[DescribeConfig], Server]] = {
    "openai": partial(Server, OPENAI),
    "anthropic": partial(Server, ANTHROPIC),
}
