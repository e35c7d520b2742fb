"""What a provider of descriptions is: the contexts it is asked about, and what it may draw on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nlae_jax.config import DescribeConfig
from nlae_jax.runtime.files import AnyPath


@dataclass(frozen=True)
class Context:
    """A position in a document, and what the subject expects there."""

    doc_id: str
    text: str  # up to and including the position
    next_tokens: tuple[str, ...]  # the subject's likeliest next tokens, decoded, likeliest first


@dataclass(frozen=True)
class DescribeResources:
    """What providers may draw on besides the configuration."""

    document_frequency: Mapping[str, int]  # word -> number of the corpus's documents that hold it
    num_documents: int
    generate: Callable[[list[str]], list[str]] | None  # chat prompts -> completions of the subject itself
    cache_directory: AnyPath  # of answers, in the workdir: it belongs to one subject, which has no other name
    shared_directory: Path | None = None  # of this machine, for answers of servers that other workdirs may ask, too


Describer = Callable[[Sequence[Context]], list[str | None]]  # one line per context; None: dropped


# Called with the number of contexts done since the last call; with 0 now and then where a provider waits.
Progress = Callable[[int], None]


class Provider(Protocol):
    def __call__(
        self, config: DescribeConfig, resources: DescribeResources, progress: Progress | None = None
    ) -> Describer: ...
