"""Warm-start descriptions: the template on any text, and the providers against a real local server."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlae_jax.config import DescribeConfig
from nlae_jax.data import answers, describe, providers
from nlae_jax.data.describe import Context, DescribeResources, describe_by_template, make_describer
from nlae_jax.errors import UserError

KEY = "sk-secret-0123456789"
GOOD = "A tutorial on baking bread, whose present sentence still needs a verb after the word flour."


def resources(tmp_path, generate=None):
    frequency = {"the": 90, "bread": 4, "oven": 5, "value": 60, "hot": 20, "cold": 20, "lost": 20, "needs": 40}
    return DescribeResources(frequency, 100, generate, tmp_path / "cache")


def contexts(n):
    return [Context(f"doc{i}", f"Text number {i} about bread", (" the",)) for i in range(n)]


# --- the template

BREAD = "The bread needs a hot oven. Any value of the bread is lost when the oven is cold"


def test_template_wording(tmp_path):
    context = Context("a", BREAD, (" and", "\n", "er", " so"))
    assert describe_by_template(context, resources(tmp_path)) == (
        'Next comes "and", a new line or "-er". The text is about oven, bread and cold. The text ends: the oven is cold'
    )


@pytest.mark.parametrize(
    ("token", "name"),
    [
        ("\n", "a new line"),
        ("\n\n", "a blank line"),
        ("   ", "a space"),
        ("\t", "a tab"),
        ("<|im_end|>", "the end of the text"),
        ("</s>", "the end of the text"),
        ("<|im_start|>", "a special token"),
        ("<", "a less-than sign"),
        (' "', "a quotation mark"),
        ("\ufffd", "a rare character"),
        ("\x00", "a rare character"),
        ("List<int>", '"-List(int)"'),
        (" caf\u00e9", '"caf\u00e9"'),
        ("x" * 50, '"-' + "x" * 16 + '"'),
    ],
)
def test_odd_tokens_are_named(tmp_path, token, name):
    line = describe_by_template(Context("a", "bread", (token,)), resources(tmp_path))
    assert line.startswith(f"Next comes {name}. ")


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("", "The text has not begun"),
        ("  \n", "The text has not begun, a new line after it"),
        ("one two\n\n  ", "The text ends, a blank line after it: one two"),
        ("a b c d e f", "The text ends: c d e f"),
        ('say “hi” to "me"', "The text ends: say 'hi' to 'me'"),
        ("for x in range(10):\n    total += x<y", "The text ends: range(10): total += x(y"),
        ("a" * 100, "The text ends: " + "a" * 40),
    ],
)
def test_endings(tmp_path, text, ending):
    line = describe_by_template(Context("a", text, ()), resources(tmp_path))
    assert line.endswith(ending)


def test_topic_words_weigh_rarity_count_and_recency():
    frequency = {"common": 99, "first": 10, "second": 10, "twice": 10}
    text = "common common twice first twice second common"
    assert describe.topic_words(text, frequency, 100) == ["twice", "second", "first"]
    assert describe.topic_words("the of and", {}, 0) == []


def test_document_frequencies_count_documents():
    assert describe.document_frequencies(["Bread bread oven", "the bread"]) == {"bread": 2, "oven": 1}


ANY_TEXT = st.text(st.characters(), max_size=80) | st.text("<>\"'/explanation \n\t“”\x85\u2028\ud800", max_size=80)


@settings(deadline=None, max_examples=200)
@given(text=ANY_TEXT, tokens=st.lists(ANY_TEXT, max_size=5))
def test_template_is_one_plain_line_for_any_text(text, tokens):
    context = Context("a", text, tuple(tokens))
    held = DescribeResources({"explanation": 3}, 5, None, None)
    line = describe_by_template(context, held)
    assert line == describe_by_template(context, held)
    assert line.strip() and len(line.splitlines()) == 1 and min(line) >= " "
    assert not set(line) & set("<>\n\r“”")
    line.encode("utf-8")
    assert len(line) < 260


def test_template_reports_progress(tmp_path):
    done = []
    described = make_describer(DescribeConfig(), resources(tmp_path), done.append)(contexts(3))
    assert done == [3] and len(described) == 3 and all(described)


# --- answers


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (f"<explanation>{GOOD}</explanation>", GOOD),
        (f"Sure!\n<Explanation>\n- **{GOOD}**\n\n2. More.\n</Explanation> Bye", GOOD + " More."),
        (f"in <explanation> tags: <explanation>{GOOD}</explanation>", GOOD),
        (GOOD, None),
        (f"<explanation>{GOOD}", None),
        ("<explanation></explanation>", None),
        ("<explanation>short</explanation>", None),
        ("<explanation>" + "long " * 1_000 + "</explanation>", None),
        ("<explanation>" + "x" * 100 + "</explanation>", None),
        ("", None),
    ],
)
def test_parse_answer(answer, line):
    assert answers.parse_answer(answer) == line


def test_cache_survives_damage_and_keeps_identities_apart(tmp_path):
    cache = answers.AnswerCache(tmp_path, "openai", "m")
    cache.put("text", "answer \u00e9")
    assert cache.get("text") == "answer \u00e9" and cache.get("other") is None
    assert answers.AnswerCache(tmp_path, "openai", "m").get("text") == "answer \u00e9"
    assert answers.AnswerCache(tmp_path, "openai", "n").get("text") is None
    (file,) = tmp_path.rglob("*.json")
    file.write_text(file.read_text()[:-4])
    assert cache.get("text") is None
    cache.put("text", "again")
    assert cache.get("text") == "again" and not list(tmp_path.rglob("*.tmp"))


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


# --- servers


class Script:
    """What the local server does: `steps(n, body)` -> (status, headers, payload) for the n-th request, from 0."""

    def __init__(self, steps):
        self.steps, self.requests, self.lock, self.release = steps, [], threading.Lock(), threading.Event()

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            n = len(self.requests)
            self.requests.append((handler.path, dict(handler.headers), body))
        status, headers, payload = self.steps(n, body)
        if status is None:  # hang until the test is over
            self.release.wait(30)
            return
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        handler.send_response(status)
        for name, value in {**headers, "content-length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


@pytest.fixture
def serve(monkeypatch):
    """Starts a server on this machine that follows `steps`; returns (its address, its Script)."""
    for variable in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    started = []

    def start(steps):
        script = Script(steps)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                script.handle(self)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started.append((server, script))
        return f"http://127.0.0.1:{server.server_port}", script

    yield start
    for server, script in started:
        script.release.set()
        server.shutdown()
        server.server_close()


def chat(text=f"<explanation>{GOOD}</explanation>"):
    return 200, {}, {"choices": [{"message": {"content": text}}]}


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
    sent = Counter(body["messages"][0]["content"] for _, _, body in script.requests)
    assert sent == Counter(answers.build_prompt(context.text) for context in contexts(5))
    done.clear()
    assert make_describer(config, resources(tmp_path), done.append)(contexts(5)) == described
    assert len(script.requests) == 5 and done == [5]
    make_describer(openai_config(url, model="other"), resources(tmp_path))(contexts(1))
    assert len(script.requests) == 6


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
    assert all(KEY not in file.read_text() for file in (tmp_path / "cache").rglob("*.json"))


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
    url, script = serve(lambda n, body: (None, {}, b"") if "number 0" in str(body) else chat())
    config = openai_config(url, timeout_seconds=0.2, max_retries=1, concurrency=1)
    describer = providers.openai_provider(config, resources(tmp_path), pause=Pauses())
    with pytest.raises(UserError, match=r"1 of 1 answers were lost \(1 timeouts\)"):
        describer(contexts(1))
    assert len(script.requests) == 2


@pytest.mark.parametrize("payload", [b"not json", {"choices": []}, [], {"choices": [{"message": {"content": None}}]}])
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
    assert len(script.requests) < 30 and not list((tmp_path / "cache").rglob("*.json"))


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
    with pytest.raises(UserError, match="2 failed connections"):
        describer(contexts(2))


@pytest.mark.parametrize(
    ("fields", "key", "expected"),
    [
        ({"provider": "magic"}, None, "'magic' is unknown: use one of template, subject, openai, anthropic"),
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
