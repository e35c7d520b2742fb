"""Reads a text or chat as the subject does: its token ids, and each token's text and place in the chat.

Command line, notebooks and HTTP all read text here, so that a text has the same tokens everywhere.
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

_INCOMPLETE = "\ufffd"  # decoding a token that holds only a part of a character gives this
_MOST_PIECES = 4  # tokens per character, because a character has at most 4 bytes in UTF-8

# The bound of a rendered chat's characters times its messages: each message's tokens are found by rendering the chat up
# to it. It is 512 messages of 65,536 characters together, the server's limits.
_MOST_RENDERED = 1 << 25

_MESSAGE_FIELDS = ("role", "content", "channel")


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a passage.

    `text` is the decoded token. Where several tokens make one character, all of them have the character as `text`, and
    `fragment_index` counts them from 0 to `fragment_count` - 1. `generated` marks tokens that the model wrote. The
    following fields are None outside chats:

    - `role` and `channel` are those of the token's message;
    - `section` is the token's part of the message: the template writes `header` and `footer` around the `content`, and
      `scaffold` belongs to no message;
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
    """A text that the subject reads in one piece. `text` is the input, or the chat as the template wrote it."""

    text: str
    tokens: tuple[Token, ...]
    name: str = "text"

    @property
    def ids(self) -> list[int]:
        """The token ids."""
        return [token.token_id for token in self.tokens]

    def shown(self, start: int = 0, stop: int | None = None) -> str:
        """Returns the tokens from `start` to `stop` (exclusive) as text, each character once."""
        return "".join(token.text for token in self.tokens[start:stop] if token.fragment_index == 0)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, int, int]]:
    """Returns for each token its text, its `fragment_index` and its `fragment_count` (see `Token`)."""
    pieces: list[tuple[str, int, int]] = []
    while len(pieces) < len(ids):
        start = len(pieces)
        text, count = tokenizer.decode([ids[start]]), 1
        if _INCOMPLETE in text:
            for size in range(2, min(_MOST_PIECES, len(ids) - start) + 1):
                joined = tokenizer.decode(list(ids[start : start + size]))
                if _INCOMPLETE not in joined:
                    text, count = joined, size
                    break
        pieces += [(text, index, count) for index in range(count)]
    return pieces


def passage_of_ids(
    tokenizer: Any, ids: Sequence[int], text: str, name: str = "text", spans: Sequence[Mapping[str, Any]] = ()
) -> Passage:
    """Makes a passage of token ids. `spans` holds, for each token, the fields of `Token` that chats set.

    Tokens beyond the last span have none of these fields.
    """
    texts = token_texts(tokenizer, ids)
    fields = [*spans, *[{}] * (len(ids) - len(spans))]
    tokens = (
        Token(position, token, *piece, **span)
        for position, (token, piece, span) in enumerate(zip(ids, texts, fields, strict=True))
    )
    return Passage(text, tuple(tokens), name)


def read_text(tokenizer: Any, vocab_size: int, text: str, name: str = "text") -> Passage:
    """Tokenises a text as the subject reads it. Tokens that the tokenizer puts before a text, such as BOS, appear once.

    Raises UserError that names `name` if `text` is no string, is empty, or has a token without an embedding.
    """
    if not isinstance(text, str):
        raise UserError(f"{name}: should be a text; it is {quoted(text)}")
    text = encodable(text)
    ids = text_ids(tokenizer, text)
    if not ids:
        raise UserError(f"{name}: empty; there is nothing to explain")
    check_ids(ids, vocab_size, tokenizer, name)
    return passage_of_ids(tokenizer, ids, text, name)


def check_messages(messages: Any, name: str) -> list[dict[str, str]]:
    """Cleans the messages of a chat from outside. Raises UserError that names the first invalid message.

    A message has a `role`, a `content` (default '') and optionally a `channel` for the template.
    """
    if isinstance(messages, Mapping):  # {"messages": [...]}, as data sets of chats have it
        messages = messages.get("messages")
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"{name}: should be a list of messages, each with role and content; it is {quoted(messages)}")
    cleaned = []
    for number, message in enumerate(messages):
        where = f"{name}: message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: should be an object with role and content; it is {quoted(message)}")
        fields = {key: message[key] for key in _MESSAGE_FIELDS if message.get(key) is not None}
        if not isinstance(fields.get("role"), str):
            raise UserError(f"{where}: role should be a text, such as user or assistant")
        invalid = next((key for key, value in fields.items() if not isinstance(value, str)), None)
        if invalid:
            raise UserError(f"{where}: {invalid} should be a text; it is {quoted(fields[invalid])}")
        cleaned.append({"content": "", **{key: encodable(value) for key, value in fields.items()}})
    return cleaned


def read_chat_file(path: Path) -> list[dict[str, str]]:
    """Reads a JSON file with a list of messages, or with an object whose `messages` is a list. Drops a byte-order mark.

    Raises UserError that names the file if it is missing or has other content.
    """
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
    """Tokenises a chat with the model's chat template. Each token gets its role, section and message.

    With `add_generation_prompt` the passage ends where an answer begins. With `continue_final_message` it ends inside
    the last message. `options` go to the template, such as `enable_thinking`. Raises UserError if the template refuses
    the messages, if the chat is too long, or if both of these arguments are True.
    """
    messages = check_messages(messages, name)
    if add_generation_prompt and continue_final_message:
        raise UserError(f"{name}: add_generation_prompt and continue_final_message exclude each other")
    (text,) = render_chats(tokenizer, [messages], add_generation_prompt, **options)
    if len(text) * len(messages) > _MOST_RENDERED:
        raise UserError(f"{name}: {len(messages)} messages of {len(text)} characters are too long a chat to read")
    if continue_final_message:
        text = _without_footer(text, messages[-1]["content"], name)
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
    """Reads a text, or the messages of a chat. `add_generation_prompt` applies to chats only."""
    if isinstance(source, str):
        return read_text(tokenizer, vocab_size, source, name)
    return read_chat(tokenizer, vocab_size, source, name, add_generation_prompt)


def extended(tokenizer: Any, passage: Passage, ids: Sequence[int], stops: Sequence[int] = ()) -> Passage:
    """Appends generated tokens to the passage. In a chat they are the assistant's, and `stops` end its turn."""
    is_chat = passage.tokens[-1].section is not None if passage.tokens else False
    spans = [dataclasses.asdict(token) for token in passage.tokens]
    old = [{key: span[key] for key in ("role", "section", "channel", "message_index", "generated")} for span in spans]
    new = [
        {"role": "assistant", "section": FOOTER if token in stops else CONTENT, "generated": True}
        if is_chat
        else {"generated": True}
        for token in ids
    ]
    all_ids = [*passage.ids, *ids]
    text = passage.text + tokenizer.decode(list(ids))
    return passage_of_ids(tokenizer, all_ids, text, passage.name, [*old, *new])


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of a rendered chat. Most templates write the beginning-of-sequence token, but not all do."""
    return text_ids(tokenizer, encodable(text))


def _without_footer(text: str, content: str, name: str) -> str:
    """Cuts a rendered chat at the end of its last message's content. Raises UserError where it is not found."""
    content = content.strip()
    end = text.rfind(content)
    if end < 0:
        raise UserError(f"{name}: the chat template changes the last message, so that it cannot be continued")
    return text[: end + len(content)]


_Render = Callable[[list[list[dict[str, str]]]], list[list[int] | None]]


def _rendered_or_none(tokenizer: Any, chats: list[list[dict[str, str]]], options: Mapping[str, Any]) -> Any:
    """Returns each chat's ids without the beginning of an answer, or None for a chat that the template refuses."""

    def ids_of(group: list[list[dict[str, str]]]) -> list[list[int] | None]:
        try:
            return [_encoded(tokenizer, text) for text in render_chats(tokenizer, group, False, **options)]
        except UserError:  # raised for one of them: each is rendered by itself
            return [None] if len(group) == 1 else [ids for chat in group for ids in ids_of([chat])]

    return ids_of(chats)


def _spans(ids: Sequence[int], messages: Sequence[Mapping[str, str]], render: _Render) -> list[dict[str, Any]]:
    """Finds the role, section, channel and message of every token.

    The tokens of message k begin where the chat stops to agree with its first k messages rendered alone, and end where
    it stops to agree with its first k + 1. The message is also rendered with empty content: the tokens that its block
    shares with the beginning of that rendering are the header, and those shared with its end are the footer.
    """
    count = len(messages)
    chat = [dict(message) for message in messages]
    closed = render([chat[: k + 1] for k in range(count)])
    emptied = render([[*chat[:k], {**chat[k], "content": ""}] for k in range(count)])
    ends = [0]
    for k in range(count):
        rendered = closed[k]
        ends.append(ends[-1] if rendered is None else max(ends[-1], _common(ids, rendered)))
    if all(rendered is None for rendered in closed):  # the template renders at most the whole chat
        ends[-1] = len(ids)
    spans: list[dict[str, Any]] = []
    for k, (start, end) in enumerate(itertools.pairwise(ends)):
        block = list(ids[start:end])
        empty = emptied[k]
        header, footer = _frame(block, None if empty is None else empty[start:])
        sections = [HEADER] * header + [CONTENT] * (len(block) - header - footer) + [FOOTER] * footer
        message = {"role": chat[k]["role"], "channel": chat[k].get("channel"), "message_index": k}
        spans += [{**message, "section": section} for section in sections]
    answer = {"role": "assistant", "section": HEADER, "channel": None, "message_index": None}
    return [*spans, *[answer] * (len(ids) - len(spans))]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the common beginning of two sequences."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _frame(block: list[int], empty: list[int] | None) -> tuple[int, int]:
    """Counts the tokens of a message's header and footer, from its rendering with empty content."""
    if empty is None:
        return 0, 0
    header = _common(block, empty)
    footer = _common(block[header:][::-1], empty[header:][::-1])
    return header, footer
