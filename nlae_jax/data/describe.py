"""Warm-start descriptions: what a text up to one position says about what a model holds there.

The encoder learns to write them and the decoder to read them before reinforcement learning begins. A provider
is a factory in `PROVIDERS`; `template` is below and needs nothing, the others ask a language model (providers.py).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nlae_jax.config import DescribeConfig
from nlae_jax.data import providers
from nlae_jax.data.activations import NUM_NEXT_TOKENS
from nlae_jax.data.describer import describer_provider
from nlae_jax.data.documentation import FUNCTION_WORDS
from nlae_jax.errors import UserError
from nlae_jax.files import AnyPath


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


def make_describer(config: DescribeConfig, resources: DescribeResources, progress: Progress | None = None) -> Describer:
    """The describer that `describe.provider` names. Raises UserError if it is unknown or cannot be set up."""
    if config.provider not in PROVIDERS:
        raise UserError(f"describe.provider {config.provider!r} is unknown: use one of {', '.join(PROVIDERS)}")
    return PROVIDERS[config.provider](config, resources, progress)


def document_frequencies(texts: Iterable[str]) -> dict[str, int]:
    """Word -> number of `texts` that hold it; for `DescribeResources`."""
    frequencies: Counter[str] = Counter()
    for text in texts:
        frequencies.update({word for word in _topic_candidates(text)})
    return dict(frequencies)


# --- the template

_NUM_TOPIC_WORDS = 3
_NUM_LAST_WORDS = 4
_MAX_TOKEN_CHARACTERS = 16
_MAX_ENDING_CHARACTERS = 40
_MAX_ENDING_BYTES = 60  # scripts with many bytes a character also have many tokens a character

_CANDIDATE = re.compile(r"(?<![^\W\d_])[^\W\d_]{3,20}(?![^\W\d_])")  # whole words; longer ones would fill the line
_SPECIAL_TOKEN = re.compile(r"<[|｜][^<>]*[|｜]>|</?s>|<(bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[(BOS|EOS|PAD)\]")
_END_OF_TEXT = re.compile(r"end|eot|eos|^</s>$", re.IGNORECASE)
# Tokens that the quoted form would spoil.
_NAMED_TOKENS = {
    "<": "a less-than sign",
    ">": "a greater-than sign",
    "</": "a closing tag",
    "/>": "the end of a tag",
    "->": "an arrow",
    "=>": "a double arrow",
    "<=": "a less-or-equal sign",
    ">=": "a greater-or-equal sign",
    "<<": "a left shift",
    ">>": "a right shift",
    ">>>": "a prompt",
    '"': "a quotation mark",
    '""': "an empty string",
    '"""': "triple quotes",
    "'": "an apostrophe",
}
_PLAIN = str.maketrans({"<": "(", ">": ")", '"': "'"} | dict.fromkeys("“”„«»‘’", "'"))


def template_provider(
    config: DescribeConfig, resources: DescribeResources, progress: Progress | None = None
) -> Describer:
    """Describes without a language model: offline, deterministic, one line of about 40 tokens."""

    def describe(contexts: Sequence[Context]) -> list[str | None]:
        lines: list[str | None] = [describe_by_template(context, resources) for context in contexts]
        if progress is not None:
            progress(len(lines))
        return lines

    return describe


def describe_by_template(context: Context, resources: DescribeResources) -> str:
    """Next tokens, topic and last words as sentences: one line without `<`, `>` or curly quotes, never empty.

    Words are the corpus's own, so the text may be in any script. The last words come last: they matter most for
    the position, and the decoder reads its output at the end.
    """
    sentences = []
    tokens = _unique(_name_token(token, context.text) for token in context.next_tokens)[:NUM_NEXT_TOKENS]
    if tokens:
        sentences.append(f"Next comes {_enumerate(tokens, 'or')}.")
    topic = topic_words(context.text, resources.document_frequency, resources.num_documents)
    if topic:
        sentences.append(f"The text is about {_enumerate(topic, 'and')}.")
    sentences.append(_ending(context.text))
    return " ".join(sentences)


def topic_words(text: str, document_frequency: Mapping[str, int], num_documents: int) -> list[str]:
    """At most three words that set `text` apart from the corpus, the most telling first.

    Score: sqrt of the recency-weighted count, times the inverse document frequency. Later words weigh up to twice
    as much as the first. A word that fewer than three documents of a large corpus hold is halved: nobody
    who reads the description has met it. Ties go to the word that occurs first.
    """
    words = _topic_candidates(text)
    weights: dict[str, float] = {}
    for i, word in enumerate(words):
        weights[word] = weights.get(word, 0.0) + 1.0 + i / len(words)

    def score(word: str) -> float:
        documents = document_frequency.get(word, 0)
        rare = 0.5 if documents < 3 and num_documents > 100 else 1.0
        return rare * math.sqrt(weights[word]) * math.log((num_documents + 2) / (documents + 1))

    return sorted(weights, key=score, reverse=True)[:_NUM_TOPIC_WORDS]


def _topic_candidates(text: str) -> list[str]:
    words = (word.lower().translate(_PLAIN) for word in _CANDIDATE.findall(_printable(text)))
    return [word for word in words if word not in FUNCTION_WORDS]


def _printable(text: str) -> str:
    """`text` without characters that are invisible, invalid or would turn the line around."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c for c in text if c.isspace() or c in "\u200c\u200d" or unicodedata.category(c) not in _HIDDEN)


_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Cn", "Co"})


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name))


def _enumerate(items: list[str], conjunction: str) -> str:
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} {conjunction} {items[-1]}"


def _name_token(token: str, text: str) -> str:
    """A token as a reader sees it: quoted, or in words where it is white space, markup or half a character."""
    core = token.strip()
    if not token:
        return ""
    if not core:
        return _name_space(token)
    if _SPECIAL_TOKEN.fullmatch(core):
        return "the end of the text" if _END_OF_TEXT.search(core) else "a special token"
    if core in _NAMED_TOKENS:
        return _NAMED_TOKENS[core]
    shown = " ".join(_printable(core.replace("\ufffd", "")).translate(_PLAIN).split())[:_MAX_TOKEN_CHARACTERS]
    if not shown:
        return "a rare character"
    continues = token[0].isalnum() and text[-1:].isalnum()
    return f'"-{shown}"' if continues else f'"{shown}"'


def _name_space(space: str) -> str:
    breaks = space.count("\n") or space.count("\r")
    if breaks:
        return "a new line" if breaks == 1 else "a blank line"
    return "a tab" if "\t" in space else "a space"


def _ending(text: str) -> str:
    """`The text ends: …`, unquoted: then the decoder's prompt ends on the very token that the activation is of."""
    visible = text.rstrip()
    words = _printable(visible[-400:]).replace("\ufffd", "").translate(_PLAIN).split()
    shown = " ".join(words[-_NUM_LAST_WORDS:])[-_MAX_ENDING_CHARACTERS:].strip()
    while len(shown.encode("utf-8")) > _MAX_ENDING_BYTES:
        shown = shown[1:].lstrip()
    after = f", {_name_space(text[len(visible) :])} after it" if len(visible) < len(text) else ""
    return f"The text ends{after}: {shown}" if shown else f"The text has not begun{after}"


def file_provider(config: DescribeConfig, resources: DescribeResources, progress: Progress | None = None) -> Describer:
    """The file says which positions are read, so its descriptions come with them (`data.described`): never asked."""
    raise UserError(
        'describe.provider = "file": activations/ was made without that file; delete activations/ to extract at the '
        "positions that it describes"
    )


PROVIDERS: dict[str, Provider] = {
    "template": template_provider,
    "file": file_provider,
    "describer": describer_provider,
    "subject": providers.subject_provider,
    "openai": providers.openai_provider,
    "anthropic": providers.anthropic_provider,
}
