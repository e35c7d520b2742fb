"""What people select: positions, phrases, spans, and the tokens of chats."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.explore import passage as passage_module
from nlae_jax.explore.passage import (
    check_messages,
    extended,
    passage_of_ids,
    read_chat,
    read_chat_file,
    read_text,
    token_texts,
)
from nlae_jax.explore.select import match_spans, parse_positions, parse_span, picks_of
from nlae_jax.runtime.errors import UserError

CHAT = [{"role": "user", "content": "the list of"}, {"role": "assistant", "content": "an array"}]


@pytest.fixture
def read(tokenizer, arch):
    return lambda text: read_text(tokenizer, arch.vocab_size, text)


@pytest.fixture
def chat(tokenizer, arch):
    return lambda messages, **options: read_chat(tokenizer, arch.vocab_size, messages, **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-1", [9]),
        ("3,5,-2", [3, 5, 8]),
        ("2:5", [2, 3, 4]),
        (":2,-2:", [0, 1, 8, 9]),
        (" 0 , 0 ", [0, 0]),
        ("8:99", [8, 9]),
    ],
)
def test_positions(text, expected):
    assert parse_positions(text, 10) == expected


@pytest.mark.parametrize("text", ["", "a", "1.5", "10", "-11", "5:5", "1:2:3", "1,", "9" * 30])
def test_positions_that_are_none(text):
    with pytest.raises(UserError, match="--positions"):
        parse_positions(text, 10)


@given(st.integers(1, 40), st.lists(st.integers(-40, 39), min_size=1, max_size=8))
def test_single_positions_are_those_of_a_list(length, positions):
    kept = [position for position in positions if -length <= position < length]
    if kept:
        text = ",".join(map(str, kept))
        assert parse_positions(text, length) == [list(range(length))[position] for position in kept]


def test_a_phrase_is_the_tokens_that_it_touches(read):
    passage = read("the list of the array")
    spans = match_spans(passage, "the")
    assert len(spans) == 2
    assert all("the" in passage.shown(span.start, span.stop) for span in spans)
    with pytest.raises(UserError, match="'cat' does not occur in text"):
        match_spans(passage, "cat")
    assert match_spans(passage, "list  of") == match_spans(passage, "list of")


def test_a_phrase_within_one_character_of_several_tokens(read):
    passage = read("a 中b")
    (span,) = match_spans(passage, "中")
    assert [token.fragment_count for token in passage.tokens[span.start : span.stop]] == [3, 3, 3]
    assert passage.shown(span.start, span.stop) == "中"


@given(st.text(max_size=30).filter(str.strip))
def test_the_tokens_spell_the_text(tokenizer, arch, text):
    passage = read_text(tokenizer, arch.vocab_size, text)
    assert passage.shown() == tokenizer.decode(passage.ids)


def test_pieces_that_are_no_character_stay_by_themselves(tokenizer):
    first = tokenizer.encode("中", add_special_tokens=False)[:1]
    ids = [*first, *tokenizer.encode("the of", add_special_tokens=False)]
    (text, index, count), *rest = token_texts(tokenizer, ids)
    assert (text, index, count) == ("\ufffd", 0, 1)
    assert "".join(text for text, _, _ in rest) == "the of"


def test_picks_add_up(read):
    passage = read("the list of the array")
    length = len(passage.tokens)
    assert [pick.last for pick in picks_of(passage)] == list(range(length))
    picks = picks_of(passage, positions="-1,0", match="list", span="0:3")
    assert [pick.positions for pick in picks if not pick.is_span][:2] == [(length - 1,), (0,)]
    assert picks[-1].positions == (0, 1, 2)
    assert parse_span(passage, "the array").stop == length


def test_a_chat_says_whose_tokens_they_are(chat):
    passage = chat(CHAT, add_generation_prompt=True)
    for index, message in enumerate(CHAT):
        tokens = [token for token in passage.tokens if token.message_index == index]
        content = "".join(token.text for token in tokens if token.section == "content")
        assert content == message["content"]
        assert {token.role for token in tokens} == {message["role"]}
        order = [token.section for token in tokens]
        assert order == sorted(order, key=["header", "content", "footer"].index)
        assert "header" in order and "footer" in order
    prompt = [token for token in passage.tokens if token.message_index is None]
    assert prompt and all((token.role, token.section) == ("assistant", "header") for token in prompt)
    assert passage.text.endswith("<|im_start|>assistant\n")


def test_a_chat_that_goes_on_within_its_last_message(chat):
    passage = chat(CHAT, continue_final_message=True)
    assert passage.text.endswith("an array")
    assert [token.section for token in passage.tokens if token.message_index == 1][-1] == "content"
    with pytest.raises(UserError, match="exclude each other"):
        chat(CHAT, continue_final_message=True, add_generation_prompt=True)


def test_a_channel_is_on_its_message_only(chat):
    passage = chat([CHAT[0], {**CHAT[1], "channel": "final"}])
    assert {token.channel for token in passage.tokens if token.message_index == 1} == {"final"}
    assert {token.channel for token in passage.tokens if token.message_index == 0} == {None}


def test_empty_messages_and_templates_that_refuse_them(chat, tokenizer, monkeypatch):
    passage = chat([{"role": "user", "content": ""}, CHAT[1]])
    assert {token.section for token in passage.tokens if token.message_index == 0} == {"header", "footer"} or {
        token.section for token in passage.tokens if token.message_index == 0
    } == {"header"}
    strict = "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}{% endif %}"
    template = strict + "[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    passage = chat(CHAT)
    assert {token.section for token in passage.tokens} == {"content"}
    assert {token.message_index for token in passage.tokens} == {0, 1}


def test_a_template_that_takes_whole_chats_only(chat, tokenizer, monkeypatch):
    template = "{% if messages|length < 2 %}{{ raise_exception('two') }}{% endif %}"
    template += "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    passage = chat(CHAT)
    assert all(token.section for token in passage.tokens)
    assert passage.tokens[-1].message_index == 1


def test_generated_tokens_are_the_assistants(chat, read, tokenizer):
    new = tokenizer.encode("values of", add_special_tokens=False)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    passage = extended(tokenizer, chat(CHAT[:1], add_generation_prompt=True), [*new, stop], [stop])
    added = passage.tokens[-len(new) - 1 :]
    assert [token.section for token in added] == ["content"] * len(new) + ["footer"]
    assert all(token.role == "assistant" and token.message_index is None and token.generated for token in added)
    assert not any(token.generated for token in passage.tokens[: -len(new) - 1])
    plain = extended(tokenizer, read("the"), new).tokens[-1]
    assert (plain.role, plain.section, plain.generated) == (None, None, True)


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "list of messages"),
        ("hello", "list of messages"),
        ([{"content": "a"}], "message 0: role"),
        ([CHAT[0], "b"], "message 1: should be an object"),
        ([{"role": "user", "content": 3}], "message 0: content should be a text"),
    ],
)
def test_messages_that_are_none(messages, named):
    with pytest.raises(UserError, match=named):
        check_messages(messages, "chat.json")


def test_a_file_with_a_chat(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"messages": CHAT}))
    assert read_chat_file(path) == CHAT
    path.write_text(json.dumps(CHAT), encoding="utf-8-sig")  # as some editors save it
    assert read_chat_file(path) == CHAT
    with pytest.raises(UserError, match="no such file"):
        read_chat_file(tmp_path / "none.json")


def test_what_is_no_text_in_a_message_is_the_sign_for_it(chat):
    """Also where the chat goes on within it."""
    halved = [CHAT[0], {"role": "assistant", "content": "an array \ud83d"}]
    assert check_messages(halved, "chat")[1]["content"] == "an array \ufffd"
    assert chat(halved, continue_final_message=True).text.endswith("an array \ufffd")


def test_nothing_to_read(read, tokenizer):
    with pytest.raises(UserError, match="empty"):
        read("")
    assert passage_of_ids(tokenizer, [], "").tokens == ()


def test_a_chat_of_too_many_messages_is_refused_before_each_beginning_is_rendered(chat, monkeypatch):
    monkeypatch.setattr(passage_module, "_spans", None)
    with pytest.raises(UserError, match=r"2000 messages of [0-9]+ characters are too long"):
        chat([{"role": "user", "content": "words"}] * 2000)


@pytest.mark.parametrize("position", [True, 1.0, "1", None])
def test_a_position_is_a_whole_number(read, position):
    with pytest.raises(UserError, match="positions: "):
        picks_of(read("the list of"), positions=[position])
    assert picks_of(read("the list of"), positions=np.array([1]))[0].positions == (1,)


@pytest.mark.parametrize("text", [None, 5, b"the", ["the"]])
def test_a_text_is_a_text(read, text):
    with pytest.raises(UserError, match="text: should be a text; it is "):
        read(text)
