"""Replies of servers, as they are and as they should not be."""

import asyncio
import gzip
import json
import socket
import ssl
import zlib
from email.utils import formatdate

import httpx
import pytest

from nlae_jax.data.answers import Answer
from nlae_jax.data.replies import (
    BODY_BYTES,
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

LOST = Answer(None, "without text")


def read(body, encoding=""):
    headers = {"content-encoding": encoding} if encoding else {}

    async def pieces():
        for start in range(0, len(body), 50_000):
            yield body[start : start + 50_000]

    return asyncio.run(read_body(httpx.Response(200, headers=headers, content=pieces())))


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [("", bytes), ("identity", bytes), ("gzip", gzip.compress), ("X-Gzip", gzip.compress), ("deflate", zlib.compress)],
)
def test_bodies_are_unpacked(encoding, pack):
    body = json.dumps({"text": "\u00e9" * 100_000}).encode()
    assert read(pack(body), encoding) == body


@pytest.mark.parametrize(
    ("body", "encoding", "problem"),
    [
        (b" " * (BODY_BYTES + 1), "", "too long"),
        (gzip.compress(b" " * 50_000_000), "gzip", "too long"),
        (zlib.compress(b" " * 50_000_000), "deflate", "too long"),
        (gzip.compress(gzip.compress(b" " * 50_000_000)), "gzip, gzip", "not asked for"),
        (b"\x00", "br", "not asked for"),
        (b"no gzip", "gzip", "cannot be unpacked"),
        (b"no zlib", "deflate", "cannot be unpacked"),
    ],
)
def test_bodies_that_are_not_taken(body, encoding, problem):
    with pytest.raises(TryAgain, match=problem):
        read(body, encoding)


def test_an_endless_body_is_left():
    sent = []

    async def blanks():
        while True:
            sent.append(65_536)
            yield b" " * 65_536

    with pytest.raises(TryAgain, match="too long"):
        asyncio.run(read_body(httpx.Response(200, content=blanks())))
    assert sum(sent) < BODY_BYTES + 2 * 65_536


def test_decoding_takes_what_it_can():
    assert decoded(b'\xef\xbb\xbf{"a": "caf\xe9"}') == {"a": "caf\ufffd"}
    for body in (b"", b"<html>", b"[" * 100_000, b"9" * 10_000, b"\xff\xfe", b'data: {"choices": []}\n\n'):
        assert decoded(body) is None


def completion(content, **choice):
    return {"choices": [{"message": {"role": "assistant", "content": content}, **choice}]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("t", "t"),
        (None, ""),
        ("", ""),
        ([], ""),
        ([{"type": "text", "text": "t"}], "t"),
        ({"type": "text", "text": "t"}, "t"),
        (["a", "b"], "ab"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "t"}], "t"),
        ([{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "t"}], "t"),
        ([{"type": "image_url", "image_url": {}}, {"text": "a"}, {"type": "text", "text": "b"}], "ab"),
    ],
)
def test_content_of_every_form(content, text):
    assert find_answer(openai_content, completion(content)) == Answer(text)
    if content is not None:
        assert find_answer(anthropic_content, {"content": content}) == Answer(text)


@pytest.mark.parametrize(
    "reply",
    [
        None,
        [],
        "t",
        7,
        {},
        {"choices": None},
        {"choices": {}},
        {"choices": []},
        {"choices": [None]},
        {"choices": [{}]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": "t"}]},
        completion(7),
        completion([7]),
        completion([None]),
        completion([{"type": "text"}]),
        completion([{"type": "text", "text": None}]),
        completion([{"type": "text", "text": {"value": "t"}}]),
        completion({"text": ["t"]}),
    ],
)
def test_anything_else_is_without_text(reply):
    assert find_answer(openai_content, reply) == LOST
    assert find_answer(anthropic_content, reply) == LOST


def test_what_was_thought_in_another_field_is_not_read():
    message = {"reasoning_content": "<explanation>A draft, which is no answer.</explanation>", "content": None}
    assert find_answer(openai_content, {"choices": [{"message": message}]}) == Answer("")
    del message["content"]
    assert find_answer(openai_content, {"choices": [{"message": message}]}) == Answer("")


def test_answers_that_were_cut_off_say_so():
    cut = "cut off by describe.max_new_tokens"
    assert find_answer(openai_content, completion("t", finish_reason="length")) == Answer("t", cut)
    assert find_answer(openai_content, completion("t", finish_reason="stop")) == Answer("t")
    assert find_answer(anthropic_content, {"content": [], "stop_reason": "max_tokens"}) == Answer("", cut)


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (completion("t"), 200),
        ({"error": None, **completion("t")}, 200),
        ({"error": {}, **completion("t")}, 200),
        (None, 200),
        ([], 200),
        ([completion("t")], 200),
        ([{"error": {"code": 429}}], 429),
        ([{"error": {"code": 404, "status": "NOT_FOUND"}}], 404),
        ({"error": {"code": 429}}, 429),
        ({"error": {"code": "429", "message": "m"}}, 429),
        ({"error": {"status": 503}}, 503),
        ({"error": {"code": 503.0}}, 500),
        ({"error": {"code": None, "type": "rate_limit_exceeded"}}, 429),
        ({"error": {"code": 8, "status": "RESOURCE_EXHAUSTED"}}, 429),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "m"}}, 429),
        ({"object": "error", "message": "m", "code": 40303}, 500),
        ({"object": "error", "message": "m", "type": "BadRequestError", "code": 400}, 400),
        ({"error": {"code": 401}}, 401),
        ({"error": {"type": "authentication_error"}}, 401),
        ({"error": {"code": "invalid_api_key", "type": "invalid_request_error"}}, 401),
        ({"error": {"code": "model_not_found", "type": "invalid_request_error"}}, 404),
        ({"error": {"code": "context_length_exceeded"}}, 400),
        ({"error": "Too many requests"}, 429),
        ({"error": "something"}, 500),
        ({"error": True}, 500),
        ({"error": ["x"]}, 500),
        ({"error": {"code": True}}, 500),
        ({"choices": [{"error": {"code": 502}, "message": {"content": ""}}]}, 502),
        ({"choices": {"error": 1}}, 200),
        ({"code": 429, "message": "m"}, 429),
        ({"status": 503, "msg": "m"}, 503),
        ({"message": "m"}, 500),
        ({"detail": "Rate limit reached"}, 429),
        ({"detail": [{"loc": ["body"], "msg": "m"}]}, 500),
        ({"success": False, "errors": [{"code": 429, "message": "m"}]}, 429),
        ({"errors": "unauthorized: bad api key"}, 401),
        ({"message": {"role": "assistant", "content": "t"}, "done": True}, 200),
        ({"id": "x", "status": "completed"}, 200),
        ({**completion("t"), "detail": "", "message": "m", "code": 429}, 200),
        ({"content": [{"type": "text", "text": "t"}], "status": 500}, 200),
    ],
)
def test_errors_sent_with_status_200(reply, status):
    assert status_of(reply) == status


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7.5", 7.5), ("600", 600.0), ("-3", 0.0), ("nan", 0.0), ("inf", 0.0), ("soon", 0.0), ("", 0.0), ("1e999", 0.0)],
)
def test_retry_after(value, seconds):
    assert asked_to_wait({"retry-after": value}) == seconds


def test_retry_after_as_a_date():
    assert asked_to_wait({}) == 0.0
    assert asked_to_wait({"retry-after": formatdate(0, usegmt=True)}) == 0.0
    assert asked_to_wait({"retry-after": formatdate(2**33, usegmt=True)}) > 10**9


def raised(error, cause):
    try:
        raise error from cause
    except type(error) as caught:
        return caught


def test_causes_of_failed_connections_are_named():
    refused = ConnectionRefusedError(111, "Connect call failed ('10.0.0.1', 80)")
    assert cause_of(raised(httpx.ConnectError("x"), refused)) == "connection refused"
    group = ExceptionGroup("several", [OSError("no number"), refused])
    assert cause_of(raised(httpx.ConnectError("x"), raised(OSError("all failed"), group))) == "connection refused"
    unknown = socket.gaierror(-2, "Name or service not known")
    assert cause_of(raised(httpx.ConnectError("x"), unknown)) == "name or service not known"
    assert cause_of(httpx.RemoteProtocolError("Illegal header value b'secret'")) == "RemoteProtocolError"


def test_only_certificates_are_a_problem_of_certificates():
    error = ssl.SSLCertVerificationError(1, "[SSL] x")
    error.verify_message = "certificate has expired"
    assert certificate_problem(raised(httpx.ConnectError("x"), error)) == "certificate has expired"
    other = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")
    other.reason = "WRONG_VERSION_NUMBER"
    assert certificate_problem(raised(httpx.ConnectError("x"), other)) == ""
    assert cause_of(raised(httpx.ConnectError("x"), other)) == "TLS: wrong version number"
