"""The provider `template`: it describes texts without a language model, offline and deterministically."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from nlae_jax.config import DescribeConfig
from nlae_jax.data.activations import NUM_NEXT_TOKENS
from nlae_jax.data.describer import Context, Describer, DescribeResources, Progress
from nlae_jax.data.english import FUNCTION_WORDS


def document_frequencies(texts: Iterable[str]) -> dict[str, int]:
    """Returns word -> number of `texts` that contain it, for `DescribeResources`."""
    frequencies: Counter[str] = Counter()
    for text in texts:
        frequencies.update({word for word in _topic_candidates(text)})
    return dict(frequencies)


_NUM_TOPIC_WORDS = 3
_NUM_LAST_WORDS = 4
_MAX_TOKEN_CHARACTERS = 16
_MAX_ENDING_CHARACTERS = 40
_MAX_ENDING_BYTES = 60  # scripts with many bytes a character also have many tokens a character

_CANDIDATE = re.compile(r"(?<![^\W\d_])[^\W\d_]{3,20}(?![^\W\d_])")  # whole words; longer ones would fill the line
_SPECIAL_TOKEN = re.compile(r"<[|｜][^<>]*[|｜]>|</?s>|<(bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[(BOS|EOS|PAD)\]")
_END_OF_TEXT = re.compile(r"end|eot|eos|^</s>$", re.IGNORECASE)
# Tokens that have no readable quoted form.
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
    """Makes a describer that writes one line of about 40 tokens without a language model."""

    def describe(contexts: Sequence[Context]) -> list[str | None]:
        lines: list[str | None] = [describe_by_template(context, resources) for context in contexts]
        if progress is not None:
            progress(len(lines))
        return lines

    return describe


def describe_by_template(context: Context, resources: DescribeResources) -> str:
    """Writes next tokens, topic and last words as sentences: one line without `<`, `>` or curly quotes, never empty.

    Words are taken from the text, which may be in any script. The last words come last: they matter most for the
    position, and the decoder is read at the end.
    """
    sentences = []
    if tokens := expected(context.next_tokens, context.text):
        sentences.append(f"Next comes {tokens}.")
    topic = topic_words(context.text, resources.document_frequency, resources.num_documents)
    if topic:
        sentences.append(f"The text is about {enumerated(topic, 'and')}.")
    sentences.append(_ending(context.text))
    return " ".join(sentences)


def expected(next_tokens: Iterable[str], text: str) -> str:
    """Lists the likeliest tokens after `text` for a reader: `"a", "b" or a new line`; '' without any."""
    tokens = _unique(_name_token(token, text) for token in next_tokens)[:NUM_NEXT_TOKENS]
    return enumerated(tokens, "or") if tokens else ""


def topic_words(text: str, document_frequency: Mapping[str, int], num_documents: int) -> list[str]:
    """Returns at most three words that distinguish `text` from the corpus, the highest score first.

    The score is the square root of the recency-weighted count, times the inverse document frequency. Later words weigh
    up to twice as much as the first. The score is halved for a word that fewer than three documents of a large corpus
    contain, because a reader of the description has hardly ever met it. Ties go to the word that occurs first.
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
    """Returns `text` without characters that are invisible, invalid or change the direction of the line."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c for c in text if c.isspace() or c in "\u200c\u200d" or unicodedata.category(c) not in _HIDDEN)


_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Cn", "Co"})


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name))


def enumerated(items: Sequence[str], conjunction: str) -> str:
    """Lists items for a reader: `a, b and c`. There should be at least one."""
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} {conjunction} {items[-1]}"


def _name_token(token: str, text: str) -> str:
    """Names a token for a reader: quoted, or in words where it is white space, markup or part of a character."""
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
    """Writes `The text ends: …`, unquoted, so that the description ends on the very token of the activation."""
    visible = text.rstrip()
    words = _printable(visible[-400:]).replace("\ufffd", "").translate(_PLAIN).split()
    shown = " ".join(words[-_NUM_LAST_WORDS:])[-_MAX_ENDING_CHARACTERS:].strip()
    while len(shown.encode("utf-8")) > _MAX_ENDING_BYTES:
        shown = shown[1:].lstrip()
    after = f", {_name_space(text[len(visible) :])} after it" if len(visible) < len(text) else ""
    return f"The text ends{after}: {shown}" if shown else f"The text has not begun{after}"
