"""Describers that ask a language model: the subject itself, an OpenAI-compatible server, or Anthropic's."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path

from nlae_jax.config import DescribeConfig
from nlae_jax.data.answers import INSTRUCTION, Answer, AnswerCache, Keep, build_prompt, cached_describer
from nlae_jax.data.describer import Context, Describer, DescribeResources, Instruct, Progress
from nlae_jax.data.model_server import (
    ANTHROPIC,
    APIS,
    OPENAI,
    SERVERS,
    Api,
    Pause,
    Server,
    pause_unless_stopped,
    spellings,
)
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath

_SUBJECT_BATCH = 32  # prompts handed to the subject at once


def subject_provider(
    config: DescribeConfig, resources: DescribeResources, progress: Progress | None = None
) -> Describer:
    """Makes a describer that asks the subject itself. Raises UserError if it cannot generate text."""
    generate = resources.generate
    if generate is None:
        raise UserError("describe.provider subject needs a subject that can generate text; use template instead")

    def ask(texts: Sequence[str], keep: Keep) -> Generator[tuple[int, Answer], None, None]:
        for start in range(0, len(texts), _SUBJECT_BATCH):
            completions = generate([build_prompt(text) for text in texts[start : start + _SUBJECT_BATCH]])
            answers = [(start + i, Answer(completion)) for i, completion in enumerate(completions)]
            for index, answer in answers:
                keep(index, answer.text or "")
            yield from answers

    identity = (config.provider, config.model, INSTRUCTION, config.max_new_tokens)
    # Not shared with other workdirs, because no name identifies the subject's weights.
    cache = AnswerCache(resources.cache_directory, *identity)
    return cached_describer(config, cache, ask, progress, _SUBJECT_BATCH, by_all=True)


def openai_provider(
    config: DescribeConfig,
    resources: DescribeResources,
    progress: Progress | None = None,
    pause: Pause = pause_unless_stopped,
) -> Describer:
    """Makes a describer that asks `{base_url}/chat/completions` of an OpenAI-compatible server.

    The key comes from OPENAI_API_KEY. Raises UserError where the settings or the key are missing or invalid.
    """
    return _server_provider(OPENAI, config, resources, progress, pause)


def anthropic_provider(
    config: DescribeConfig,
    resources: DescribeResources,
    progress: Progress | None = None,
    pause: Pause = pause_unless_stopped,
) -> Describer:
    """Makes a describer that asks `{base_url}/v1/messages` of Anthropic's server or a compatible one.

    The key comes from ANTHROPIC_API_KEY. Raises UserError where the settings or the key are missing or invalid.
    """
    return _server_provider(ANTHROPIC, config, resources, progress, pause)


def _server_provider(
    api: Api, config: DescribeConfig, resources: DescribeResources, progress: Progress | None, pause: Pause
) -> Describer:
    server = Server(api, config, pause)
    cache = _answers(api, config, INSTRUCTION, resources.cache_directory, resources.shared_directory)
    return cached_describer(config, cache, server.ask, progress)


def _answers(
    api: Api, config: DescribeConfig, instruction: str, directory: AnyPath, shared: Path | None = None
) -> AnswerCache:
    """Opens the answers of a server to an instruction.

    The address is part of what identifies them, because local servers often give all models the same name. Answers
    under another spelling of the same address count too: it is one server, and was paid for them.
    """
    settings = config.provider, config.model, instruction, config.max_new_tokens
    usual, *others = [(*settings, address) for address in spellings(api, config.base_url)]
    return AnswerCache(directory, *usual, shared=shared, others=others)


def rewriter(config: DescribeConfig, directory: AnyPath) -> Instruct:
    """Returns a function (instruction, texts) -> what the configured server answers to the instruction, of each text.

    A prompt is the instruction, an empty line and the text. A text without an answer gives None. Answers are stored in
    `directory`. Raises UserError at once where `describe.provider` is not a server, or where its settings or key are
    missing or invalid.
    """
    if config.provider not in SERVERS:
        raise UserError(f"describe.provider: {config.provider!r} is no server to ask: should be {' or '.join(SERVERS)}")
    server = SERVERS[config.provider](config)

    def rewrite(instruction: str, texts: Sequence[str]) -> list[str | None]:
        ask = partial(server.ask, make_prompt=lambda text: f"{instruction}\n\n{text}")
        cache = _answers(APIS[config.provider], config, instruction, directory)
        return cached_describer(config, cache, ask, None)([Context("", text, ()) for text in texts])

    return rewrite
