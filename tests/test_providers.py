"""Describers that ask a language model: the subject, and servers that are slow, wrong, broken or hostile."""

import dataclasses
import gzip
import itertools
import json
import os
import signal
import threading
from collections import Counter

import httpx
import pytest

from nlae_jax.config import DescribeConfig
from nlae_jax.data import answers, model_server, providers
from nlae_jax.data.answer_cache import AnswerCache
from nlae_jax.data.answers import Answer
from nlae_jax.data.describe import make_describer
from nlae_jax.data.describer import Context, DescribeResources
from nlae_jax.data.model_server import ANTHROPIC, APIS, OPENAI, Server
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.supervision import Preempted
from tests.servers import GOOD, chat, self_signed, serving

KEY = "sk-secret-0123456789"
TAGGED = f"<explanation>{GOOD}</explanation>"


@pytest.fixture
def serve(monkeypatch):
    for variable in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with serving() as start:
        yield start


def resources(tmp_path, generate=None):
    return DescribeResources({}, 1, generate, tmp_path / "W/answers", tmp_path / "shared/answers")


def contexts(n):
    return [Context(f"doc{i}", f"Text number {i} about bread", (" the",)) for i in range(n)]


def stored(tmp_path):
    """How many answers are in the workdir."""
    lines = [json.loads(line) for path in (tmp_path / "W").rglob("*.jsonl") for line in path.read_text().splitlines()]
    return sum(answer is not None for answer in {line["key"]: line["answer"] for line in lines}.values())


# --- the subject


def test_subject_is_asked_once_per_text(tmp_path):
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        return [f"<explanation>{GOOD} {len(prompt)}</explanation>" if "9" not in prompt else "?" for prompt in prompts]

    config = DescribeConfig(provider="subject")
    first = make_describer(config, resources(tmp_path, generate))(contexts(40) + contexts(2))
    expected = [answers.parse_answer(generate([answers.build_prompt(c.text)])[0]) for c in contexts(40)]
    del asked[40:]
    assert first == expected + expected[:2] and first.count(None) == 4
    again = make_describer(config, resources(tmp_path, generate))(contexts(40))
    assert again == expected and len(asked) == 40  # dropped answers are kept too
    with pytest.raises(UserError, match="needs a subject"):
        make_describer(config, resources(tmp_path))


def test_a_subjects_batch_is_kept_whole_before_the_run_may_stop(tmp_path):
    """The run is asked to stop as the first answer of a batch is counted."""
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        return [TAGGED] * len(prompts)

    def stop(rows):
        raise Preempted

    config = DescribeConfig(provider="subject")
    with pytest.raises(Preempted):
        make_describer(config, resources(tmp_path, generate), stop)(contexts(40))
    assert len(asked) == 32 and stored(tmp_path) == 32
    assert make_describer(config, resources(tmp_path, generate))(contexts(40)) == [GOOD] * 40
    assert len(asked) == 40 and not (tmp_path / "shared").exists()


def test_a_subject_that_thinks(tmp_path):
    draft = "<explanation>Perhaps it is a poem about the sea, or a list.</explanation>"
    replies = [f"<think>{draft}</think>{TAGGED}", f"{draft}</think>{TAGGED}", f"<think>{draft}", f"{TAGGED}\ud83d\x00"]
    describe = make_describer(DescribeConfig(provider="subject"), resources(tmp_path, lambda prompts: replies))
    assert describe(contexts(4)) == [GOOD, GOOD, None, GOOD]


# --- servers


def openai_config(url, **fields):
    defaults = {"model": "m", "base_url": url + "/v1", "concurrency": 2, "timeout_seconds": 20.0, "max_retries": 2}
    return DescribeConfig(provider="openai", **defaults | fields)


class Pauses(list):
    """Stands in for waiting: records the seconds."""

    def __call__(self, stop, seconds):
        self.append(seconds)


def test_openai_request_and_cache(serve, tmp_path):
    url, script = serve(lambda n, body: chat())
    done = []
    config = openai_config(url)
    described = make_describer(config, resources(tmp_path), done.append)(contexts(5))
    assert described == [GOOD] * 5 and sum(done) == 5
    path, headers, body = script.requests[0]
    assert path == "/v1/chat/completions" and "authorization" not in {name.lower() for name in headers}
    assert body["model"] == "m" and body["max_tokens"] == 160
    assert script.asked == Counter(answers.build_prompt(context.text) for context in contexts(5))
    done.clear()
    assert make_describer(config, resources(tmp_path), done.append)(contexts(5)) == described
    assert len(script.requests) == 5 and done == [5]
    make_describer(openai_config(url, model="other"), resources(tmp_path))(contexts(1))
    assert len(script.requests) == 6


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
@pytest.mark.parametrize(("first", "then"), list(itertools.permutations(["", "{own}", "{own}/", "{own}//"], 2)))
def test_the_same_address_in_another_spelling_is_not_paid_again(tmp_path, monkeypatch, provider, first, then):
    """The provider's own address may be left out, and a slash at the end means nothing."""
    api = APIS[provider]
    monkeypatch.setenv(api.key_variable, KEY)
    asked = []

    def ask(self, texts, keep):
        for index, text in enumerate(texts):
            asked.append(text)
            keep(index, TAGGED)
            yield index, Answer(TAGGED)

    monkeypatch.setattr(Server, "ask", ask)
    for base_url in (first, then):
        config = DescribeConfig(provider=provider, model="m", base_url=base_url.format(own=api.url))
        assert make_describer(config, resources(tmp_path))(contexts(2)) == [GOOD] * 2
    assert len(asked) == 2
    make_describer(DescribeConfig(provider=provider, model="m", base_url="https://b"), resources(tmp_path))(contexts(2))
    assert len(asked) == 4


@pytest.mark.parametrize("where", ["W", "shared"])
@pytest.mark.parametrize("base_url", ["", "https://api.openai.com/v1", "https://api.openai.com/v1/"])
def test_answers_of_earlier_versions_are_found(tmp_path, monkeypatch, where, base_url):
    """They were stored under the address as it was written."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(Server, "ask", lambda *_: (answer for answer in ()))
    config = DescribeConfig(provider="openai", model="m", base_url=base_url)
    identity = ("openai", "m", answers.INSTRUCTION, 160, base_url)
    with AnswerCache(tmp_path / where / "answers", *identity) as cache:
        cache.put(contexts(1)[0].text, TAGGED)
    for spelled in ("", base_url):
        config = dataclasses.replace(config, base_url=spelled)
        assert make_describer(config, resources(tmp_path))(contexts(1)) == [GOOD]


def test_anthropic_request(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY + "\n")
    blocks = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": f"<explanation>{GOOD}</explanation>"}]
    url, script = serve(lambda n, body: (200, {}, {"content": blocks}))
    config = DescribeConfig(provider="anthropic", model="m", base_url=url)
    assert make_describer(config, resources(tmp_path))(contexts(1)) == [GOOD]
    path, headers, body = script.requests[0]
    headers = {name.lower(): value for name, value in headers.items()}
    assert path == "/v1/messages" and headers["x-api-key"] == KEY and headers["anthropic-version"]
    assert body["max_tokens"] == 160 and body["messages"][0]["role"] == "user"
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 2 and all(KEY not in file.read_text() for file in files)


def test_busy_server_is_asked_again_after_the_time_it_names(serve, tmp_path):
    steps = [(429, {"retry-after": "7.5"}, b"slow down"), (503, {}, b""), chat()]
    url, script = serve(lambda n, body: steps[n])
    pauses = Pauses()
    describer = providers.openai_provider(openai_config(url), resources(tmp_path), pause=pauses)
    assert describer(contexts(1)) == [GOOD]
    assert len(script.requests) == 3 and pauses[0] == 7.5 and 1.0 <= pauses[1] <= 2.0


def test_server_errors_without_end_stop_the_run(serve, tmp_path):
    url, script = serve(lambda n, body: (500, {}, b"oops"))
    describer = providers.openai_provider(openai_config(url), resources(tmp_path), pause=Pauses())
    with pytest.raises(UserError, match=r"4 of 4 answers were lost \(4 with status 500\)"):
        describer(contexts(4))
    assert len(script.requests) == 12


def test_hanging_server_times_out(serve, tmp_path):
    url, script = serve(lambda n, body: script.hang if "number 0" in str(body) else chat())
    config = openai_config(url, timeout_seconds=0.2, max_retries=1, concurrency=1)
    describer = providers.openai_provider(config, resources(tmp_path), pause=Pauses())
    with pytest.raises(UserError, match=r"1 of 1 answers were lost \(1 timeouts\)"):
        describer(contexts(1))
    assert len(script.requests) == 2


@pytest.mark.parametrize("payload", [b"", b"<html>busy</html>", b'{"choices": [{"message"', [{"error": {"code": 429}}]])
def test_replies_that_are_no_answer_and_no_refusal_are_asked_again(serve, tmp_path, payload):
    """A gateway's page, or a reply that was cut off: as often as after an error of the server, and no oftener."""
    url, script = serve(lambda n, body: (200, {}, payload) if n == 1 else chat())
    config = openai_config(url, concurrency=1)
    describer = providers.openai_provider(config, resources(tmp_path), pause=Pauses())
    assert describer(contexts(3)) == [GOOD] * 3 and len(script.requests) == 4
    url, script = serve(lambda n, body: (200, {}, payload))
    config = openai_config(url, concurrency=1)
    describer = providers.openai_provider(config, resources(tmp_path), pause=Pauses())
    with pytest.raises(UserError, match=r"1 of 1 answers were lost \(1 with (a reply that is no JSON|status 429)\)"):
        describer(contexts(1))
    assert len(script.requests) == 3


@pytest.mark.parametrize("payload", [{"choices": []}, [], {}, {"choices": [{"message": {"content": None}}]}])
def test_garbage_is_lost_not_fatal_for_a_few(serve, tmp_path, payload):
    url, script = serve(lambda n, body: (200, {}, payload) if "number 3" in str(body) else chat())
    describer = make_describer(openai_config(url), resources(tmp_path))
    assert describer(contexts(5)) == [GOOD, GOOD, GOOD, None, GOOD]
    assert len(script.requests) == 5


def test_untagged_answers_stop_the_run_and_are_not_kept(serve, tmp_path):
    url, script = serve(lambda n, body: chat("I cannot help with that."))
    describer = make_describer(openai_config(url, concurrency=1), resources(tmp_path))
    with pytest.raises(UserError, match=r"16 of 16 answers were lost \(16 no usable <explanation>\)"):
        describer(contexts(100))
    assert len(script.requests) < 30 and stored(tmp_path) == 0


def test_what_was_answered_before_a_failure_is_kept(serve, tmp_path):
    broken = threading.Event()
    url, script = serve(lambda n, body: (500, {}, b"") if broken.is_set() and n >= 20 else chat())
    broken.set()
    config = openai_config(url, concurrency=1, max_retries=0)
    with pytest.raises(UserError, match="answers were lost"):
        make_describer(config, resources(tmp_path))(contexts(60))
    broken.clear()
    before = len(script.requests)
    assert make_describer(config, resources(tmp_path))(contexts(60)) == [GOOD] * 60
    assert len(script.requests) - before == 40


def test_few_lost_answers_at_the_end_of_a_good_run_are_no_error(serve, tmp_path):
    url, _ = serve(lambda n, body: chat() if n < 20 else (400, {}, b"too long"))
    describer = make_describer(openai_config(url), resources(tmp_path))
    assert describer(contexts(20)) == [GOOD] * 20
    assert describer(contexts(22)) == [GOOD] * 20 + [None, None]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_stops_at_once_and_is_not_shown(serve, tmp_path, monkeypatch, caplog, status):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    url, script = serve(lambda n, body: (status, {}, f"bad key {KEY}".encode()))
    with caplog.at_level("DEBUG"), pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        make_describer(openai_config(url, concurrency=1), resources(tmp_path))(contexts(50))
    assert KEY not in str(caught.value) and KEY not in caplog.text
    assert 1 <= len(script.requests) < 10


def test_a_wrong_address_is_named(serve, tmp_path):
    url, script = serve(lambda n, body: (404, {}, b""))
    with pytest.raises(UserError, match=r"status 404: check describe.base_url and describe.model 'm'"):
        make_describer(openai_config(url, concurrency=1), resources(tmp_path))(contexts(1))
    assert len(script.requests) == 1


def test_nobody_listens(serve, tmp_path):
    config = openai_config("http://127.0.0.1:9", max_retries=1)
    describer = providers.openai_provider(config, resources(tmp_path), pause=Pauses())
    with pytest.raises(UserError, match=r"2 failed connections \(connection refused\)"):
        describer(contexts(2))


@pytest.mark.parametrize(
    ("fields", "key", "expected"),
    [
        ({"provider": "openai"}, KEY, "describe.model is empty"),
        ({"provider": "openai", "model": "m"}, None, "OPENAI_API_KEY is not set"),
        ({"provider": "openai", "model": "m", "base_url": "http://example.org/v1"}, None, "OPENAI_API_KEY is not set"),
        ({"provider": "openai", "model": "m", "base_url": "localhost:8000"}, KEY, "describe.base_url must look like"),
        ({"provider": "openai", "model": "m", "base_url": "http://a:pw1@h/v1"}, KEY, "describe.base_url must look"),
        ({"provider": "openai", "model": "m"}, "sk-1 secret", "OPENAI_API_KEY holds white space"),
        ({"provider": "openai", "model": "m", "concurrency": 0}, KEY, "concurrency"),
        ({"provider": "anthropic", "model": "m"}, None, "ANTHROPIC_API_KEY is not set"),
    ],
)
def test_wrong_configuration_is_reported_before_any_request(tmp_path, monkeypatch, fields, key, expected):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError) as caught:
        make_describer(DescribeConfig(**fields), resources(tmp_path))
    message = str(caught.value)
    assert expected in message and "\n" not in message and "secret" not in message and "pw1" not in message


# --- what servers want, and how they answer


def said(*replies, api=OPENAI, texts=("x",), **fields):
    """What a server's `replies` (status, body), in order, are understood as, and the bodies that it got."""
    fields = {"provider": "openai", "model": "m", "base_url": "https://localhost:1/v1", "concurrency": 1, **fields}
    left, bodies = list(replies), []

    def reply(request):
        bodies.append(json.loads(request.content))
        status, body = left.pop(0)
        return httpx.Response(status, json=body)

    server = Server(api, DescribeConfig(**fields), lambda *_: None)
    server._client = lambda: httpx.AsyncClient(transport=httpx.MockTransport(reply))
    return [answer for _, answer in server.ask(list(texts))], bodies


def completion(content="t"):
    return {"choices": [{"message": {"content": content}}]}


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("base_url", ["https://localhost:1/v1", ""])
def test_a_server_that_wants_the_other_name_of_the_limit(status, base_url, monkeypatch):
    """It is found out once, with the first answer."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    names = ["max_tokens", "max_completion_tokens"] if base_url else ["max_completion_tokens", "max_tokens"]
    replies = [(status, {}), (200, completion()), (200, completion("u")), (status, {})]
    got, bodies = said(*replies, texts="xyz", base_url=base_url)
    assert got == [Answer("t"), Answer("u"), Answer(None, f"with status {status}")]
    assert [[name for name in names if name in body] for body in bodies] == [names[:1], names[1:], names[1:], names[1:]]
    assert all(body[name] == 160 for body in bodies for name in names if name in body)


def test_the_other_name_of_the_limit_is_not_tried_where_one_was_taken():
    got, bodies = said((200, completion()), (400, {}), (200, completion()), texts="xyz")
    assert got == [Answer("t"), Answer(None, "with status 400"), Answer("t")]
    assert all("max_tokens" in body for body in bodies)


def test_a_prompt_that_is_refused_under_both_names_is_lost():
    got, bodies = said((400, {}), (400, {}), (400, {}), (200, completion()), texts="xy")
    assert got == [Answer(None, "with status 400"), Answer("t")] and len(bodies) == 4
    assert said((400, {}), api=ANTHROPIC, provider="anthropic")[0] == [Answer(None, "with status 400")]


def test_a_name_of_the_limit_refused_in_an_error_with_status_200():
    got, bodies = said((200, {"error": {"code": 400}}), (200, completion()))
    assert got == [Answer("t")] and len(bodies) == 2


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"code": 429}},
        {"error": {"code": "503"}},
        {"error": {"type": "rate_limit_error"}},
        {"error": "busy"},
        {"choices": [{"error": {"code": 502}}]},
    ],
)
def test_errors_with_status_200_that_pass_are_asked_again(error):
    assert said((200, error), (200, completion()))[0] == [Answer("t")]
    assert said((200, error), (200, error), max_retries=1)[0][0].problem.startswith("with status ")


def test_errors_with_status_200_that_do_not_pass():
    with pytest.raises(UserError, match=r"refused the key \(status 401\): set OPENAI_API_KEY"):
        said((200, {"error": {"code": 401}}))
    with pytest.raises(UserError, match=r"answered with status 404: check describe\.base_url and describe.model 'm'"):
        said((200, {"error": {"type": "not_found_error"}}))


def test_no_credit_is_no_wrong_address():
    with pytest.raises(UserError, match=r"paid first \(status 402\): there is no credit left"):
        said((402, {}))


def test_what_a_server_is_told_of_bodies(serve):
    url, script = serve(lambda n, body: chat())
    list(Server(OPENAI, openai_config(url)).ask(["x"]))
    headers = {name.lower(): value for name, value in script.requests[0][1].items()}
    assert headers["accept-encoding"] == "identity"


# --- servers that are slow or send too much


def headers_that_do_not_end():
    yield b"HTTP/1.1 200 OK\r\n"
    while True:
        yield b"x-more: x\r\n"


def body_that_does_not_end():
    yield b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"
    while True:
        yield b" "


def chunks_that_do_not_end():
    yield b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    while True:
        yield b"1\r\n \r\n"


def status_that_does_not_end():
    yield b"HTTP/1.1 200 "
    while True:
        yield b"O"


SLOW = [headers_that_do_not_end, body_that_does_not_end, chunks_that_do_not_end, status_that_does_not_end]


@pytest.mark.parametrize("pieces", SLOW)
def test_a_request_has_an_end_however_slowly_its_answer_comes(serve, tmp_path, pieces):
    url, script = serve(lambda n, body: script.drip(pieces))
    config = openai_config(url, timeout_seconds=0.3, max_retries=1)
    describer = providers.openai_provider(config, resources(tmp_path), pause=Pauses())
    with pytest.raises(UserError, match=r"1 of 1 answers were lost \(1 timeouts\)"):
        describer(contexts(1))
    assert len(script.requests) == 2


@pytest.mark.parametrize("pieces", SLOW)
def test_interrupted_while_an_answer_comes_slowly(serve, tmp_path, monkeypatch, pieces):
    """No request is waited for to its end, which is an hour away here."""
    monkeypatch.setattr(model_server, "_DRAIN_SECONDS", 0.2)
    url, script = serve(lambda n, body: script.drip(pieces))

    def interrupt(rows):
        raise KeyboardInterrupt

    config = openai_config(url, timeout_seconds=3600.0, concurrency=8)
    with pytest.raises(KeyboardInterrupt):
        make_describer(config, resources(tmp_path), interrupt)(contexts(20))
    assert len(script.requests) <= 8
    assert not [thread for thread in threading.enumerate() if thread.name == "describe"]


def test_interrupted_in_a_long_pause(serve, tmp_path):
    def interrupt(rows):
        if script.requests:
            raise KeyboardInterrupt

    url, script = serve(lambda n, body: (429, {"retry-after": "100"}, b""))
    with pytest.raises(KeyboardInterrupt):
        make_describer(openai_config(url), resources(tmp_path), interrupt)(contexts(20))
    assert len(script.requests) == 2
    assert not [thread for thread in threading.enumerate() if thread.name == "describe"]


def test_bodies_without_bound_are_left(serve, tmp_path):
    blanks = gzip.compress(b" " * 100_000_000)
    packed = (200, {"content-encoding": "gzip"}, blanks)
    url, script = serve(lambda n, body: packed if "number 0" in str(body) else chat())
    describer = providers.openai_provider(openai_config(url), resources(tmp_path), pause=Pauses())
    with pytest.raises(UserError, match=r"1 of 1 answers were lost \(1 with too long a reply\)"):
        describer(contexts(1))
    assert len(script.requests) == 3


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"\x00\xff",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x" * 200_000,
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000,
    ],
)
def test_what_is_no_http_is_a_failed_connection(serve, tmp_path, reply):
    url, script = serve(lambda n, body: lambda handler: handler.wfile.write(reply))
    describer = providers.openai_provider(openai_config(url), resources(tmp_path), pause=Pauses())
    with pytest.raises(UserError, match=r"1 of 1 answers were lost \(1 failed connections \(.+\)\); check"):
        describer(contexts(1))
    assert len(script.requests) == 3


def test_long_waits_are_told_of_and_bounded(serve, tmp_path, capsys):
    url, _ = serve(lambda n, body: chat() if n else (429, {"retry-after": "600"}, b""))
    pauses = Pauses()
    describer = providers.openai_provider(openai_config(url), resources(tmp_path), pause=pauses)
    assert describer(contexts(1)) == [GOOD] and pauses == [120.0]
    expected = "describe: requests end with status 429; the server asks to wait 600 s; asking again in 120 s\n"
    assert capsys.readouterr().err == expected


def test_long_waits_without_a_wish_are_told_of_once_for_all(serve, tmp_path, capsys):
    url, script = serve(lambda n, body: (503, {}, b""))
    pauses = Pauses()
    describer = providers.openai_provider(
        openai_config(url, max_retries=9, concurrency=8), resources(tmp_path), pause=pauses
    )
    with pytest.raises(UserError, match="8 with status 503"):
        describer(contexts(8))
    assert len(script.requests) == 80 and max(pauses) <= 60
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("describe: requests end with status 503; asking again in ")


# --- certificates


def secure(url, **fields):
    return Server(OPENAI, openai_config(url, max_retries=0, **fields))


def test_a_server_with_its_own_certificate(serve, tmp_path, monkeypatch):
    """On this machine, where proxies are not heeded."""
    certificate = self_signed(tmp_path / "own.pem")
    url, _ = serve(lambda n, body: chat("t"), certificate)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    message = r"the certificate of https://127.0.0.1:\d+/v1/chat/completions is not trusted \(self.signed certificate\)"
    with pytest.raises(UserError, match=message + "; if it should be, name a file with it in SSL_CERT_FILE"):
        list(secure(url).ask(["x"]))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert list(secure(url).ask(["x"])) == [(0, Answer("t"))]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"address": "10.1.2.3"}, "IP address mismatch"), ({"expired": True}, "certificate has expired")],
)
def test_a_certificate_that_does_not_fit(serve, tmp_path, monkeypatch, options, reason):
    certificate = self_signed(tmp_path / "own.pem", **options)
    url, _ = serve(lambda n, body: chat(), certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(UserError, match=rf"is not trusted \({reason}[^\n]*\); if"):
        list(secure(url).ask(["x"]))


def test_no_tls_behind_https(serve):
    url, _ = serve(lambda n, body: chat())
    (answer,) = [answer for _, answer in secure(url.replace("http:", "https:")).ask(["x"])]
    assert answer.text is None and answer.problem.startswith("failed connections (TLS: ")


@pytest.mark.parametrize(
    ("variable", "content", "reason"),
    [
        ("SSL_CERT_FILE", None, "no such file"),
        ("SSL_CERT_FILE", b"garbage", "TLS: "),
        ("SSL_CERT_FILE", b"", "TLS: "),
        ("SSL_CERT_DIR", None, "no such file"),
        ("SSL_CERT_DIR", b"a file", "not a directory"),
    ],
)
def test_certificates_that_cannot_be_read(tmp_path, monkeypatch, variable, content, reason):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    path = tmp_path / "own.pem"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv(variable, str(path))
    with pytest.raises(UserError, match=rf"{variable} {path}: no certificates can be read there \({reason}"):
        secure("https://127.0.0.1:1")


# --- what was answered is not asked again


@pytest.mark.parametrize("end", ["401", "404", "stop", "interrupt", "signal"])
def test_answers_under_way_at_the_end_are_kept(serve, tmp_path, monkeypatch, end):
    """Eight are under way as the run ends; they come after it has been told to, and none of them is asked again."""
    ending, drain = threading.Event(), model_server._cancel_after_drain

    async def draining(tasks, stop):
        await stop.wait()
        ending.set()
        await drain(tasks, stop)

    def steps(n, body):
        if n < 24 or n >= 32:
            return chat()
        if n == 31 and end.isdigit():
            return int(end), {}, b""
        if n == 31 and end == "signal":
            os.kill(os.getpid(), signal.SIGINT)
        ending.wait(20)
        return chat()

    def progress(rows):
        if len(script.requests) == 32 and end in ("stop", "interrupt"):
            raise {"stop": Preempted, "interrupt": KeyboardInterrupt}[end]

    monkeypatch.setattr(model_server, "_DRAIN_SECONDS", 60.0)  # however slow this machine is
    monkeypatch.setattr(model_server, "_cancel_after_drain", draining)
    url, script = serve(steps)
    config = openai_config(url, concurrency=8, max_retries=0)
    with pytest.raises(UserError if end.isdigit() else Preempted if end == "stop" else KeyboardInterrupt):
        make_describer(config, resources(tmp_path), progress)(contexts(100))
    assert stored(tmp_path) == 32 - end.isdigit()
    assert make_describer(config, resources(tmp_path))(contexts(100)) == [GOOD] * 100
    refused = [body["messages"][0]["content"] for _, _, body in script.requests[31:32]] if end.isdigit() else []
    assert script.asked == Counter([answers.build_prompt(context.text) for context in contexts(100)] + refused)


class Counted(list):
    """Counts what is taken of it."""

    taken = 0

    def __iter__(self):
        for item in super().__iter__():
            self.taken += 1
            yield item


def test_texts_are_taken_up_as_answers_are_taken(serve):
    """However many there are: no more is held than what is under way and a few answers that wait."""
    url, script = serve(lambda n, body: chat())
    texts = Counted(str(i) for i in range(5_000))
    results = Server(OPENAI, openai_config(url, concurrency=4)).ask(texts)
    for done in range(1, 101):
        next(results)
        assert texts.taken <= done + 4 * 4 + 2 * 4 + 1
    results.close()
    assert len(script.requests) < 200


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("HTTPS_PROXY", "http://me:pa#ssword@proxy:80"),
        ("HTTPS_PROXY", "http://me:password@[::1"),
        ("HTTPS_PROXY", "socks9://me:password@h"),
        ("NO_PROXY", "[::1"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_and_not_quoted(monkeypatch, name, address):
    """Its address may hold a password."""
    monkeypatch.setenv(name, address)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    config = DescribeConfig(provider="openai", model="m", base_url="https://example.invalid/v1", max_retries=0)
    with pytest.raises(UserError, match=r"HTTPS_PROXY, HTTP_PROXY, ALL_PROXY or NO_PROXY: [\w ;]+ http://HOST:PORT$"):
        list(Server(OPENAI, config).ask(["x"]))


@pytest.mark.parametrize("port", [0, 65536, 99999])
def test_a_port_that_is_none(monkeypatch, port):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match=r"describe\.base_url must look like"):
        Server(OPENAI, DescribeConfig(provider="openai", model="m", base_url=f"http://127.0.0.2:{port}/v1"))
