"""A text or chat as the subject reads it: its token ids, and what each token is to a reader.

Everything that explains tokens (command line, notebooks, HTTP) reads text here, so that one text has one tokenisation.
"""

from __future__ import annotations

import codecs
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nlae_jax.lm.chat import render_chats
from nlae_jax.lm.tokens import check_ids, text_ids
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import encodable, parse_json, quoted, read_bytes

HEADER, CONTENT, FOOTER, SCAFFOLD = "header", "content", "footer", "scaffold"

_INCOMPLETE = "\ufffd"  # what a token decodes to that holds a part of a character
_MOST_PIECES = 4  # tokens that one character is made of: UTF-8 has no longer ones

_MESSAGE_FIELDS = ("role", "content", "channel")


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a passage.

    `text` is what it decodes to. Where several tokens make one character, all of them have the character as `text`, and
    `fragment_index` counts them from 0 to `fragment_count` - 1. The last four fields are None outside chats:

    - `role` and `channel` are those of the message that it belongs to;
    - `section` says which part of the message it is: `header` and `footer` are what the template writes around the
      `content`; `scaffold` is what belongs to no message;
    - `message_index` counts messages from 0; it is None in the header of an answer that is still to be written.
    """

    position: int
    token_id: int
    text: str
    fragment_index: int = 0
    fragment_count: int = 1
    role: str | None = None
    section: str | None = None
    channel: str | None = None
    message_index: int | None = None
    generated: bool = False


@dataclasses.dataclass(frozen=True)
class Passage:
    """What the subject reads in one piece. `text` is the input, or the chat as the template wrote it."""

    text: str
    tokens: tuple[Token, ...]
    name: str = "text"

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    def shown(self, start: int = 0, stop: int | None = None) -> str:
        """The tokens from `start` to `stop` (exclusive) as text, each character once."""
        return "".join(token.text for token in self.tokens[start:stop] if token.fragment_index == 0)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, int, int]]:
    """What each token decodes to, its number among the tokens of one character, and their count."""
    found: list[tuple[str, int, int]] = []
    while len(found) < len(ids):
        start = len(found)
        text, count = tokenizer.decode([ids[start]]), 1
        if _INCOMPLETE in text:
            for more in range(2, min(_MOST_PIECES, len(ids) - start) + 1):
                joined = tokenizer.decode(list(ids[start : start + more]))
                if _INCOMPLETE not in joined:
                    text, count = joined, more
                    break
        found += [(text, index, count) for index in range(count)]
    return found


def passage_of_ids(
    tokenizer: Any, ids: Sequence[int], text: str, name: str = "text", spans: Sequence[Mapping[str, Any]] = ()
) -> Passage:
    """Token ids as a passage. `spans` has, per token, the fields of `Token` that chats set; those of a text have none.

    Tokens beyond the last span, if there are spans or not, are generated ones only if their span says so.
    """
    texts = token_texts(tokenizer, ids)
    fields = [*spans, *[{}] * (len(ids) - len(spans))]
    tokens = (
        Token(position, token, *shown, **more)
        for position, (token, shown, more) in enumerate(zip(ids, texts, fields, strict=True))
    )
    return Passage(text, tuple(tokens), name)


def read_text(tokenizer: Any, vocab_size: int, text: str, name: str = "text") -> Passage:
    """A text as the subject reads it: what the tokenizer puts before texts stands there once.

    Raises UserError, naming `name`, where the model has no embedding for one of its tokens, or it has none.
    """
    text = encodable(text)
    ids = text_ids(tokenizer, text)
    if not ids:
        raise UserError(f"{name}: empty; there is nothing to explain")
    check_ids(ids, vocab_size, tokenizer, name)
    return passage_of_ids(tokenizer, ids, text, name)


def check_messages(messages: Any, name: str) -> list[dict[str, str]]:
    """Messages from outside. Raises UserError naming the one that is none.

    Each has a `role`; its `content` is '' if not there; a `channel` is handed to the template where it is a text.
    """
    if isinstance(messages, Mapping):  # {"messages": [...]}, as data sets of chats have it
        messages = messages.get("messages")
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"{name}: should be a list of messages, each with role and content; it is {quoted(messages)}")
    found = []
    for number, message in enumerate(messages):
        where = f"{name}: message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: should be an object with role and content; it is {quoted(message)}")
        fields = {key: message[key] for key in _MESSAGE_FIELDS if message.get(key) is not None}
        if not isinstance(fields.get("role"), str):
            raise UserError(f"{where}: role should be a text, such as user or assistant")
        wrong = next((key for key, value in fields.items() if not isinstance(value, str)), None)
        if wrong:
            raise UserError(f"{where}: {wrong} should be a text; it is {quoted(fields[wrong])}")
        found.append({"content": "", **{key: encodable(value) for key, value in fields.items()}})
    return found


def read_chat_file(path: Path) -> list[dict[str, str]]:
    """A JSON file with a list of messages, or an object whose `messages` is one; perhaps with a byte order mark."""
    try:
        content = read_bytes(path).removeprefix(codecs.BOM_UTF8)
        return check_messages(parse_json(content, path), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it should hold a JSON list of messages with role and content") from None


def read_chat(
    tokenizer: Any,
    vocab_size: int,
    messages: Sequence[Mapping[str, str]],
    name: str = "chat",
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **options: Any,
) -> Passage:
    """A chat in the model's own template, each token with its role, section and message.

    With `add_generation_prompt` it goes on to where an answer begins; with `continue_final_message` it ends within
    the last message. `options` are the template's own, such as `enable_thinking`. Raises UserError where the template
    refuses the messages or both are asked for.
    """
    messages = check_messages(messages, name)
    if add_generation_prompt and continue_final_message:
        raise UserError(f"{name}: add_generation_prompt and continue_final_message exclude each other")
    (text,) = render_chats(tokenizer, [messages], add_generation_prompt, **options)
    if continue_final_message:
        text = _opened(text, messages[-1]["content"], name)
    ids = _encoded(tokenizer, text)
    check_ids(ids, vocab_size, tokenizer, name)
    render = lambda chats: _rendered_or_none(tokenizer, chats, options)  # noqa: E731
    return passage_of_ids(tokenizer, ids, text, name, _spans(ids, messages, render))


def read_passage(
    tokenizer: Any,
    vocab_size: int,
    source: str | Sequence[Mapping[str, str]],
    name: str = "text",
    add_generation_prompt: bool = False,
) -> Passage:
    """A text, or the messages of a chat; `add_generation_prompt` is for chats."""
    if isinstance(source, str):
        return read_text(tokenizer, vocab_size, source, name)
    return read_chat(tokenizer, vocab_size, source, name, add_generation_prompt)


def extended(tokenizer: Any, passage: Passage, ids: Sequence[int], stops: Sequence[int] = ()) -> Passage:
    """The passage with generated tokens after it. In a chat they are the assistant's; `stops` end its turn."""
    chat = passage.tokens[-1].section is not None if passage.tokens else False
    spans = [dataclasses.asdict(token) for token in passage.tokens]
    kept = [{key: span[key] for key in ("role", "section", "channel", "message_index", "generated")} for span in spans]
    new = [
        {"role": "assistant", "section": FOOTER if token in stops else CONTENT, "generated": True}
        if chat
        else {"generated": True}
        for token in ids
    ]
    whole = [*passage.ids, *ids]
    text = passage.text + tokenizer.decode(list(ids))
    return passage_of_ids(tokenizer, whole, text, passage.name, [*kept, *new])


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """The ids of a rendered chat: the template writes the tokens that begin a sequence itself, if not always."""
    return text_ids(tokenizer, encodable(text))


def _opened(text: str, content: str, name: str) -> str:
    """The rendered chat up to the end of the last message's content."""
    content = content.strip()
    end = text.rfind(content)
    if end < 0:
        raise UserError(f"{name}: the chat template changes the last message, so that it cannot be continued")
    return text[: end + len(content)]


_Render = Callable[[list[list[dict[str, str]]]], list[list[int] | None]]


def _rendered_or_none(tokenizer: Any, chats: list[list[dict[str, str]]], options: Mapping[str, Any]) -> Any:
    """Each chat's ids, closed and without an answer's beginning; None for those that the template refuses."""

    def ids_of(some: list[list[dict[str, str]]]) -> list[list[int] | None]:
        try:
            return [_encoded(tokenizer, text) for text in render_chats(tokenizer, some, False, **options)]
        except UserError:  # of one of them: each by itself
            return [None] if len(some) == 1 else [found for chat in some for found in ids_of([chat])]

    return ids_of(chats)


def _spans(ids: Sequence[int], messages: Sequence[Mapping[str, str]], render: _Render) -> list[dict[str, Any]]:
    """Role, section, channel and message of every token.

    Message k owns the tokens between what the chat has in common with the first k messages rendered alone and the same
    for k + 1. Within them, what its rendering with empty content begins with is the header, what that ends with is the
    footer.
    """
    count = len(messages)
    given = [dict(message) for message in messages]
    closed = render([given[: k + 1] for k in range(count)])
    emptied = render([[*given[:k], {**given[k], "content": ""}] for k in range(count)])
    ends = [0]
    for k in range(count):
        rendered = closed[k]
        ends.append(ends[-1] if rendered is None else max(ends[-1], _common(ids, rendered)))
    if all(found is None for found in closed):  # it renders whole chats only, if those
        ends[-1] = len(ids)
    spans: list[dict[str, Any]] = []
    for k, (start, end) in enumerate(itertools.pairwise(ends)):
        block = list(ids[start:end])
        empty = emptied[k]
        header, footer = _frame(block, None if empty is None else empty[start:])
        sections = [HEADER] * header + [CONTENT] * (len(block) - header - footer) + [FOOTER] * footer
        owner = {"role": given[k]["role"], "channel": given[k].get("channel"), "message_index": k}
        spans += [{**owner, "section": section} for section in sections]
    rest = {"role": "assistant", "section": HEADER, "channel": None, "message_index": None}
    return [*spans, *[rest] * (len(ids) - len(spans))]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items both begin with."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _frame(block: list[int], empty: list[int] | None) -> tuple[int, int]:
    """Tokens of the header and of the footer of a message's block, from its rendering with empty content."""
    if empty is None:
        return 0, 0
    header = _common(block, empty)
    footer = _common(block[header:][::-1], empty[header:][::-1])
    return header, footer
