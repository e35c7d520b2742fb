"""The interface of a provider of descriptions: the contexts that it describes, and the resources that it may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nlae_jax.config import DescribeConfig
from nlae_jax.runtime.files import AnyPath


@dataclass(frozen=True)
class Context:
    """A position in a document, and the subject's likeliest next tokens there."""

    doc_id: str
    text: str  # up to and including the position
    next_tokens: tuple[str, ...]  # the subject's likeliest next tokens, decoded, likeliest first


@dataclass(frozen=True)
class DescribeResources:
    """The resources that providers may use besides the configuration."""

    document_frequency: Mapping[str, int]  # word -> number of the corpus's documents that contain it
    num_documents: int
    generate: Callable[[list[str]], list[str]] | None  # chat prompts -> completions of the subject itself
    cache_directory: AnyPath  # the workdir's answers: all from one subject, whose weights no name identifies
    shared_directory: Path | None = None  # this machine's answers of servers, shared by all workdirs


Describer = Callable[[Sequence[Context]], list[str | None]]  # one description per context, None where there is none

# (instruction, texts) -> a server's answers to the instruction, one per text; None where no answer came.
Instruct = Callable[[str, Sequence[str]], list[str | None]]

# Called with the number of contexts done since the last call, and with 0 now and then while a provider waits.
Progress = Callable[[int], None]


class Provider(Protocol):
    def __call__(
        self, config: DescribeConfig, resources: DescribeResources, progress: Progress | None = None
    ) -> Describer: ...
