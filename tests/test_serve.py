"""The server as its clients meet it: a real socket, a tiny pair, everything that NLA clients and browsers send."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import weakref
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial

import jax
import numpy as np
import pytest

import nlae_jax
from nlae_jax.cli import main
from nlae_jax.config import MeshConfig
from nlae_jax.explore.directions import STEPS, change, cosine, pushed_along, unit
from nlae_jax.explore.neurons import neuron_directions
from nlae_jax.lm.rows import RowTable, advance
from nlae_jax.mesh import make_mesh, place, replicated
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.runtime.errors import UserError
from nlae_jax.serve.app import ServerSettings
from nlae_jax.serve.command import serve
from nlae_jax.serve.jobs import description_of
from nlae_jax.serve.programs import encoder_program
from nlae_jax.serve.reading import Reader, error_rates, public_name
from nlae_jax.serve.tables import CAPACITIES, SIZES, Entry, Table, bucket, room_for
from nlae_jax.serve.transport import BoundedBody
from tests.conftest import of_few_tokens
from tests.serving import Served

pytest_plugins = ["tests.tiny_run"]

TEXT = "the of to in is that it for"
CHAT = [{"role": "user", "content": "the of to"}]
TOKENS = 24
TABLE_PROGRAMS = {f"jit({name})" for name in ("begun", "joined", "advanced", "moved")}
GREEDY = {"temperature": 0, "max_new_tokens": TOKENS}


@pytest.fixture(scope="module")
def nla(tiny_run):
    return nlae_jax.NLA.from_workdir(tiny_run.workdir)


@pytest.fixture(scope="module")
def reader(nla):
    return Reader(nla)


@pytest.fixture(scope="module")
def vectors(reader):
    return reader.activations(reader.tokenizer.encode(TEXT))


@pytest.fixture(scope="module")
def served(reader):
    with Served(lambda: reader, ServerSettings(hosts=("127.0.0.1",), explains=3)) as made:
        yield made.wait_ready()


@pytest.fixture
def http(served):
    return served.client


def ok(http, path, body):
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(http, path, body):
    """The frames of a stream, whose bytes are looked at too."""
    response = http.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.content.split(b"\n\n")
    assert blocks[-2:] == [b"data: [DONE]", b""]
    assert all(block.startswith(b"data: {") and b"\n" not in block for block in blocks[:-2])
    return [json.loads(block[6:]) for block in blocks[:-2]]


# The table


def written(reader, vectors, arrivals, temperature=0.0, longest=CAPACITIES[1]):
    """Row -> its tokens; `arrivals` says in which round a row comes."""
    table, found, turn = Table(reader.encoder, longest), {}, 0
    while turn <= max(arrivals) or len(table):
        new = [row for row, when in enumerate(arrivals) if when == turn]
        if new:
            table.add([Entry(vectors[row], TOKENS, temperature, 7 + row) for row in new], new)
        ended = {row for row, tokens, done in table.advance(3) if not found.update({row: tokens.tolist()}) and done}
        table.remove(lambda row, ended=ended: row in ended)
        turn += 1
    return found


def test_rows_are_what_a_batch_writes_whenever_they_come(nla, reader, vectors):
    some = vectors[1:6]
    alone = nla.explain(some, max_new_tokens=TOKENS)
    for arrivals in ([0] * 5, [4, 0, 2, 0, 9]):
        tokens = written(reader, some, arrivals)
        texts = [description_of("<explanation>\n" + reader.decoded(np.array(tokens[row]))) for row in range(5)]
        assert [text for text, whole in zip(texts, alone, strict=True) if whole] == [text for text in alone if text]


def test_a_drawn_row_depends_on_its_seed_and_not_on_the_others(reader, vectors):
    together = written(reader, vectors[1:6], [0, 1, 0, 3, 2], temperature=1.0)
    alone = written(reader, vectors[1:3], [0, 0], temperature=1.0)
    assert {row: together[row] for row in alone} == alone
    assert len({tuple(tokens) for tokens in together.values()}) > 1


def test_a_table_grows_with_its_rows(monkeypatch, reader, vectors):
    monkeypatch.setattr("nlae_jax.serve.tables.CAPACITIES", (8, 64))
    short = written(reader, vectors[1:3], [0, 1], longest=64)
    monkeypatch.undo()
    assert short == written(reader, vectors[1:3], [0, 1])
    assert max(map(len, short.values())) > 8


def compiled_programs(caplog):
    """The names of functions that were compiled. A cache may have several entries for one program: P() and P(None)."""
    found = [record.getMessage() for record in caplog.records]
    return [message.split()[1] for message in found if message.startswith("Compiling jit(")]


def test_what_is_prepared_when_idle_is_not_compiled_again(nla, monkeypatch, caplog):
    monkeypatch.setattr("nlae_jax.serve.reading._PREPARED", 32)
    reader, alive = Reader(nla), weakref.WeakSet()
    reader.warm()
    table_of = reader.table
    monkeypatch.setattr(reader, "table", lambda limit: (table := table_of(limit), alive.add(table))[0])
    with jax.log_compiles():
        for _ in reader.warm_more():
            programs = [name for name in compiled_programs(caplog) if name in TABLE_PROGRAMS]
            assert len(programs) <= 2  # an addition may make the table larger first
            assert not alive
            caplog.clear()
        assert not compiled_programs(caplog)
        for sizes in ((32, 4), (32, 16, 1), (16, 1)):
            table = table_of(CAPACITIES[1])
            while table.size[0] < sizes[0]:
                rows = range(len(table), len(table) + 16)
                table.add([Entry(reader._example, 200, 5.0, row) for row in rows], list(rows))
            for size in sizes:
                table.remove(lambda row, size=size: row >= size)
                assert table.size[0] == size
                table.advance(3)
                table.advance(3)
        for size in (4, 16):
            table = table_of(CAPACITIES[1])
            table.add([Entry(reader._example, 200, 5.0, row) for row in range(size)], list(range(size)))
            for _ in range(2):
                table.advance(3)
                table.advance(3)
                table.grow(CAPACITIES[1])
            assert table.size == (size, CAPACITIES[1])
        assert [name for name in compiled_programs(caplog) if name in TABLE_PROGRAMS] == []
        table.add([Entry(reader._example, 200, 5.0, 99)], [99])  # larger and longer: it would be seen
        assert "jit(moved)" in compiled_programs(caplog)


def test_tables_of_all_limits_begin_with_the_same_programs(reader, vectors):
    written(reader, vectors[1:2], [0])
    compiled = reader.encoder.begun._cache_size(), reader.encoder.advanced._cache_size()
    for limit in (CAPACITIES[1] + 1, CAPACITIES[-1]):
        written(reader, vectors[1:2], [0], longest=room_for(limit, reader.most_new_tokens))
    assert (reader.encoder.begun._cache_size(), reader.encoder.advanced._cache_size()) == compiled


def test_a_loop_over_layers_writes_the_same(monkeypatch, nla, reader, vectors):
    for module in ("lm.transformer", "serve.tables"):  # as on accelerators
        monkeypatch.setattr(f"nlae_jax.{module}.platform_of", lambda _: "gpu")
    looped = Reader(nla)
    assert looped.encoder.weights is None
    assert written(looped, vectors[1:4], [0, 2, 0]) == written(reader, vectors[1:4], [0, 2, 0])


def test_a_pair_on_several_devices_writes_the_same(nla, reader, vectors, caplog):
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    pair = jax.tree.map(lambda leaf: place(np.asarray(leaf), replicated(mesh)), nla.pair)
    split = Reader(nlae_jax.NLA(nla.roles, pair, nla.tokenizer, lambda: nla.subject, nla.max_new_tokens, mesh))
    assert written(split, vectors[1:6], [0, 0, 2, 0, 1]) == written(reader, vectors[1:6], [0, 0, 2, 0, 1])
    names = ["jit(begun)", "jit(advanced)", "jit(moved)", "jit(advanced)", "jit(joined)"]
    with jax.log_compiles():  # each function once for each size, whatever was done to the table before
        split.encoder = encoder_program(nla.roles, pair).compiled()
        for rounds in (0, 2):
            table = split.table(CAPACITIES[1])
            table.add([Entry(vectors[row], TOKENS, 0.0, row) for row in range(3)], [0, 1, 2])
            for _ in range(rounds):
                table.advance(2)
            table.grow(CAPACITIES[1])
            for _ in range(rounds):
                table.advance(2)
            table.add([Entry(vectors[3], TOKENS, 0.0, 3)], [3])
    assert sorted(name for name in compiled_programs(caplog) if name in TABLE_PROGRAMS) == sorted(names)


def test_a_limit_ends_a_row(reader, vectors):
    table = Table(reader.encoder, CAPACITIES[1])
    table.add([Entry(vectors[1], 2, 0.0, 0), Entry(vectors[1], 5, 0.0, 0)], ["two", "five"])
    found = {holder: (len(tokens), done) for holder, tokens, done in table.advance(5)}
    assert found == {"two": (2, True), "five": (5, True)}
    table.remove(lambda holder: True)
    assert len(table) == 0
    assert table.size == (0, 0)


def test_nobody_is_advanced_where_all_are_done():
    one = np.zeros(1, np.int32)
    rows = RowTable(
        np.zeros((1, 4), np.float32), np.zeros((1, 3), np.int32), one, one, one, one, np.ones(1, bool), (), ()
    )
    decode = lambda *_: pytest.fail("decoded")  # noqa: E731
    with pytest.raises(BaseException, match="decoded"):  # it is traced, so that this would show
        advance(decode, rows, 1, (), ())


@pytest.mark.parametrize(("number", "expected"), [(1, 1), (2, 4), (SIZES[-1] + 1, SIZES[-1])])
def test_buckets_have_room(number, expected):
    assert bucket(number, SIZES) == expected


@pytest.mark.parametrize(
    ("text", "description"),
    [
        ("<explanation>\n a b \n</explanation>", "a b"),
        ("<explanation>\nnever closed", "never closed"),
        ("<explanation>\n", ""),
    ],
)
def test_a_description_is_what_stands_between_the_tags(text, description):
    assert description_of(text) == description


# The interface


def test_explaining_is_tokenising_extracting_describing_and_scoring(http):
    tokens = ok(http, "/tokenize", {"text": TEXT})["tokens"]
    extracted = ok(http, "/extract", {"text": TEXT})["tokens"]
    results = ok(http, "/explain", {"text": TEXT, "positions": [0, -1], **GREEDY})["results"]
    assert [result["position"] for result in results] == [len(tokens) - 1, 0]
    for result in results:
        position = result["position"]
        activation = extracted[position]["activation"]
        described = ok(http, "/describe", {"activations": [activation], **GREEDY})["results"][0]
        score = ok(http, "/score", {"description": result["description"], "activation": activation})
        assert {key: result[key] for key in tokens[position]} == tokens[position]
        assert result["l2_norm"] == extracted[position]["l2_norm"]
        assert result["description"] == described["description"]
        assert result["mse"] == pytest.approx(score["mse"], abs=1e-4)
        assert result["mse"] == pytest.approx(2 * (1 - result["cosine_similarity"]), abs=1e-6)


def test_activations_keep_their_precision(http, reader):
    ids = [token["token_id"] for token in ok(http, "/tokenize", {"text": TEXT})["tokens"]]
    sent = np.array([token["activation"] for token in ok(http, "/extract", {"text": TEXT})["tokens"]], np.float64)
    np.testing.assert_array_equal(sent.astype(np.float32), reader.activations(ids))


def test_streams_tell_all_text_so_far_and_end_with_the_plain_answer(http, reader):
    frames = events(http, "/explain", {"text": TEXT, "positions": [1, 2, 1], **GREEDY})
    length = ok(http, "/tokenize", {"text": TEXT})["prompt_length"]
    assert frames[0] == {"layer_index": reader.layer, "total": 3, "prompt_length": length}
    finals = [frame for frame in frames if "description" in frame]
    assert sorted(frame["position"] for frame in finals) == [1, 1, 2]
    for position in (1, 2):
        texts = [frame["text"] for frame in frames if frame.get("position") == position and "text" in frame]
        assert texts
        assert all(text.startswith("<explanation>") for text in texts)
        final = next(frame for frame in finals if frame["position"] == position)
        assert description_of(texts[-1]) == final["description"]
    plain = ok(http, "/explain", {"text": TEXT, "positions": [1], **GREEDY})["results"]
    assert plain == [next(frame for frame in finals if frame["position"] == 1)]


def test_a_seed_draws_the_same_again(http):
    body = {"text": TEXT, "positions": [2, 2], "temperature": 1.0, "max_new_tokens": TOKENS, "seed": 5}
    first, again = (ok(http, "/explain", body)["results"] for _ in range(2))
    assert first == again
    assert first[0]["description"] != first[1]["description"]


def test_completions_stream_what_they_answer(http):
    body = {"messages": CHAT, "completion_tokens": 5, "temperature": 0}
    plain, frames = ok(http, "/completion", body), events(http, "/completion", body)
    new = [frame["token"] for frame in frames if frame["type"] == "token"]
    assert [frame["type"] for frame in frames] == ["prompt", *["token"] * len(new), "done"]
    assert plain["tokens"] == frames[0]["tokens"] + new
    assert plain["text"] == frames[-1]["text"]
    assert {token["role"] for token in new} == {"assistant"}
    assert [token["position"] for token in new] == [plain["prompt_length"] + n for n in range(len(new))]


REFUSED = [
    ("/explain", {"text": TEXT, "positions": [99]}, 400, "Position 99 out of range"),
    ("/explain", {}, 400, "Provide either"),
    ("/explain", {"text": ""}, 400, "Provide either"),
    ("/explain", {"text": TEXT, "positions": [1.5]}, 422, "positions"),
    ("/explain", {"text": TEXT, "temperature": 5.1}, 422, "temperature"),
    ("/explain", {"text": TEXT, "positions": [0] * 513}, 422, "positions"),
    ("/extract", {"text": "the " * 4000}, 400, "at most 2048"),
    ("/explain", {"text": "the " * 600}, 400, "exceed the limit of 512"),
    ("/tokenize", {"messages": [{"content": "x"}]}, 422, "role"),
    ("/tokenize", {"messages": CHAT, "continue_final_message": True}, 400, "chat template"),
    (
        "/tokenize",
        {"messages": [{"role": "user", "content": "x" * 65_533}]},
        400,
        "have 65537 characters; at most 65536",
    ),
    ("/explain", {"messages": [{**CHAT[0], "channel": "c" * 700}] * 100}, 400, "characters; at most 65536"),
    ("/describe", {"activations": [[0.0]]}, 400, "Vector length 1 != d_model 64"),
    ("/describe", {"activations": []}, 422, "activations"),
    ("/compare", {"activation_a": [0.0], "activation_b": [0.0]}, 400, "activation_a length 1 != d_model 64"),
    ("/score", {"description": "x", "activation": [0.0] * 64}, 400, "all zeros"),
    ("/score", {"description": "x" * 8193, "activation": [1.0] * 64}, 422, "description"),
    ("/completion", {"text": TEXT, "completion_tokens": 0}, 422, "completion_tokens"),
    ("/api/page/score", {"text": TEXT, "position": 99, "description": "x"}, 400, "Position 99"),
    ("/api/page/compare", {"text": TEXT, "position": 99, "other": 1}, 400, "Position 99"),
    ("/api/page/compare", {"text": TEXT, "position": -1, "other": -1}, 400, "no difference"),
]


@pytest.mark.parametrize(("path", "body", "status", "said"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_said_as_json(http, path, body, status, said, stream):
    response = http.post(path, json={**body, "stream": True} if stream else body)
    assert response.status_code == status
    assert said in json.dumps(response.json()["detail"])


@pytest.mark.parametrize("path", ["/tokenize", "/extract", "/explain", "/completion", "/api/nla/completion"])
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x" * 65533}],
        [{"role": "user", "content": "x" * 200}] * 512,
        [{"role": "r" * 40_000, "content": "", "channel": "c" * 40_000}],
    ],
)
def test_a_chat_is_measured_before_it_is_rendered(http, monkeypatch, path, messages):
    monkeypatch.setattr("nlae_jax.serve.service.read_chat", lambda *_, **__: 1 / 0)
    response = http.post(path, json={"messages": messages})
    assert response.status_code == 400
    assert "at most 65536" in next(iter(response.json().values()))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e39", "-1e39"])
def test_numbers_that_are_none_are_refused(http, number):
    body = f'{{"activations": [[{number}, {", ".join(["0.5"] * 63)}]]}}'
    response = http.post("/describe", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.json()["detail"]


@pytest.mark.parametrize(
    "body", [b"{", b"[1]", b"", b'{"text": 1e400}', b'{"text": ["\\ud800"]}', b'{"messages": [{"content": "\\udfff"}]}']
)
def test_broken_bodies_are_answered(http, body):
    response = http.post("/tokenize", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 423
    assert response.json()["detail"]


def test_what_is_no_text_can_be_answered(http):
    body = b'{"messages": [{"role": "\\udfff", "content": "\\ud800", "channel": "\\udbff"}], "text": "\\ud800"}'
    response = http.post("/tokenize", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200
    assert response.json()["tokens"][0]["role"] == "\ufffd"


def test_a_zero_vector_is_described_without_a_cosine(http):
    (one,) = ok(http, "/describe", {"activations": [[0.0] * 64], **GREEDY})["results"]
    assert (one["mse"], one["cosine_similarity"]) == (1.0, None)


def test_equal_vectors_have_nothing_to_compare(http):
    response = http.post("/compare", json={"activation_a": [1.0] * 64, "activation_b": [1.0] * 64})
    assert response.status_code == 400
    assert "equal" in response.json()["detail"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_without_end_is_cut_off(announced):
    async def app(scope, receive, send):
        while (await receive())["more_body"]:
            pass

    async def receive():
        return {"type": "http.request", "body": b"x" * 6, "more_body": True}

    async def send(message):
        answered.append(message)

    answered = []
    scope = {"type": "http", "headers": [(b"content-length", b"20")] if announced else []}
    asyncio.run(BoundedBody(app, 10)(scope, receive, send))
    assert [message.get("status") for message in answered] == [413, None]
    assert b"larger" in answered[1]["body"]


# Many at once


def test_requests_at_once_get_what_each_gets_alone(http):
    texts = [TEXT, "it for the of", "is that to in of"]
    ask = lambda text: ok(http, "/explain", {"text": text, "max_new_tokens": TOKENS + 1, "temperature": 0})  # noqa: E731
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(ask, texts))
    for text, answer in zip(texts, together, strict=True):
        described = [
            ok(
                http,
                "/describe",
                {"activations": [token["activation"]], "max_new_tokens": TOKENS + 1, "temperature": 0},
            )
            for token in ok(http, "/extract", {"text": text})["tokens"]
        ]
        assert [result["description"] for result in answer["results"]] == [
            one["results"][0]["description"] for one in described[::-1]
        ]


def test_clients_that_hang_up_give_their_place_back(served, http):
    for _ in range(4):  # there are three places
        body = {"text": TEXT, "stream": True, "max_new_tokens": 4096, "temperature": 5}
        with http.stream("POST", "/explain", json=body) as response:
            assert next(response.iter_raw())
    codes = set()
    while 200 not in codes:
        codes.add(http.post("/explain", json={"text": TEXT, "positions": [0], **GREEDY}).status_code)
    assert codes <= {200, 429}
    while served.engine._tables:  # their rows are given up, long before their 4096 tokens
        pass


def test_nobody_joins_an_explanation_that_was_given_up(served, http):
    body = {"text": "is that it", "positions": [-1], "temperature": 0, "max_new_tokens": 4000}
    with http.stream("POST", "/explain", json={**body, "stream": True}) as response:
        assert next(response.iter_raw())
    assert ok(http, "/explain", body)["results"][0]["description"] is not None


def test_beyond_its_places_the_server_refuses_at_once(reader):
    with Served(lambda: reader, ServerSettings(explains=1)) as one, ThreadPoolExecutor(2) as pool:
        http, go = one.wait_ready().client, threading.Event()
        one.engine.call(lambda: go.wait(60))  # whoever has the place keeps it meanwhile
        asked = [pool.submit(http.post, "/explain", json={"text": TEXT, **GREEDY}) for _ in range(2)]
        (first,), (other,) = wait(asked, return_when=FIRST_COMPLETED)
        assert first.result().status_code == 429
        assert isinstance(first.result().json()["detail"], str)
        assert http.get("/").status_code == 200
        go.set()
        assert other.result().status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/describe", {"activations": [[1.0] * 64]}),
        ("/compare", {"activation_a": [1.0] * 64, "activation_b": [0.0] * 64}),
        ("/api/page/direction", {"vector": [1.0] * 64}),
        ("/api/page/compare", {"text": TEXT, "position": 0, "other": 1}),
    ],
)
def test_all_that_explains_vectors_shares_its_places(reader, path, body):
    with Served(lambda: reader, ServerSettings(describes=1)) as one, ThreadPoolExecutor(2) as pool:
        http, go = one.wait_ready().client, threading.Event()
        one.engine.call(lambda: go.wait(60))  # whoever has the place keeps it meanwhile
        asked = [pool.submit(http.post, path, json=body) for _ in range(2)]
        (first,), (other,) = wait(asked, return_when=FIRST_COMPLETED)
        assert first.result().status_code == 429
        go.set()
        assert other.result().status_code == 200


def test_while_it_loads_it_says_so(reader):
    go = threading.Event()

    def load():
        go.wait(60)
        return reader

    with Served(load, ServerSettings()) as loading:
        assert loading.client.get("/").status_code == 503
        response = loading.client.post("/explain", json={"text": TEXT})
        assert (response.status_code, "loading" in response.json()["detail"]) == (503, True)
        assert loading.client.get("/viewer").status_code == 200
        go.set()
        loading.wait_ready()


def test_a_device_that_fails_is_an_error_frame_and_no_silence(reader, monkeypatch):
    with Served(lambda: reader, ServerSettings()) as broken:
        http = broken.wait_ready().client
        body = {"text": TEXT, "positions": [3], "temperature": 1, "max_new_tokens": TOKENS}
        with monkeypatch.context() as patch:
            patch.setattr(Table, "advance", lambda *_: 1 / 0)
            frames = events(http, "/explain", body)
            assert "ZeroDivisionError" in frames[-1]["error"]
            for path, field in (("/explain", "detail"), ("/api/nla/explain", "error")):
                response = http.post(path, json=body)
                assert (response.status_code, "ZeroDivisionError" in response.json()[field]) == (500, True)
        assert ok(http, "/explain", body)["results"]


def test_a_table_that_fails_takes_no_other_with_it(reader, monkeypatch):
    whole = Table.advance
    monkeypatch.setattr(Table, "advance", lambda table, n: whole(table, n) if table._longest < 1024 else 1 / 0)
    with Served(lambda: reader, ServerSettings()) as half, ThreadPoolExecutor(2) as pool:
        http, go = half.wait_ready().client, threading.Event()
        half.engine.call(lambda: go.wait(60))
        body = {"text": TEXT, "positions": [3], "temperature": 1}
        short, long = (pool.submit(http.post, "/explain", json={**body, "max_new_tokens": n}) for n in (TOKENS, 1000))
        while len(half.engine._calls) < 2:  # both ask for the activations first
            pass
        go.set()
        assert short.result().status_code == 200
        assert long.result().status_code == 500


def test_a_description_that_cannot_be_scored_fails_alone(reader, monkeypatch):
    score, seen = Reader.score, []

    def picky(reader, texts, vectors):
        seen.append(len(texts))
        return 1 / 0 if np.array_equal(vectors[-1], worst) else score(reader, texts, vectors)

    vectors = np.eye(2, 64, dtype=np.float32)
    worst = vectors[-1]
    with Served(lambda: reader, ServerSettings()) as served:
        http = served.wait_ready().client
        monkeypatch.setattr(Reader, "score", picky)
        frames = events(http, "/describe", {"activations": vectors.tolist(), "temperature": 1, "max_new_tokens": 12})
        assert "ZeroDivisionError" in frames[-1]["error"]
        assert [frame for frame in frames if "description" in frame]
        assert 1 in seen


@pytest.fixture(scope="module")
def short(nla):
    """The same pair, of a model that cannot be run on more than 40 tokens after the encoder's prompt."""
    bounded = partial(of_few_tokens, most=nla.roles.encoder.prompt_length + 40)
    encoder, decoder = (role.clone(arch=bounded(role.arch)) for role in (nla.roles.encoder, nla.roles.decoder))
    roles = dataclasses.replace(nla.roles, encoder=encoder, decoder=decoder)
    subject = LanguageModel(bounded(nla.subject.arch), nla.subject.params, nla.tokenizer)
    return Reader(nlae_jax.NLA(roles, nla.pair, nla.tokenizer, lambda: subject, nla.max_new_tokens))


def test_nobody_asks_for_more_tokens_than_the_model_can_be_run_on(short, http):
    short.warm()
    most, length = short.subject.arch.most_tokens, len(short.tokenizer.encode(TEXT))
    with Served(lambda: short, ServerSettings()) as served:
        bounded = served.wait_ready().client
        assert bounded.get("/").json()["limits"]["max_new_tokens"] == 40
        ones = [1.0] * 64
        for path, body in (
            ("/explain", {"text": TEXT}),
            ("/describe", {"activations": [ones]}),
            ("/compare", {"activation_a": ones, "activation_b": [0.0] * 64}),
        ):
            refused = bounded.post(path, json={**body, "max_new_tokens": 41})
            assert (refused.status_code, "max_new_tokens: 41" in refused.text) == (400, True)
        body = {"text": TEXT, "positions": [-1], "temperature": 0, "max_new_tokens": 40}
        found, expected = (ok(client, "/explain", body)["results"][0] for client in (bounded, http))
        assert found["description"] == expected["description"]
        assert ok(bounded, "/api/nla/explain", {"text": TEXT, "positions": [1]})["results"]
        new = {"text": TEXT, "temperature": 0, "completion_tokens": most - length}
        assert ok(bounded, "/completion", new)["tokens"] == ok(http, "/completion", new)["tokens"]
        for path, body in (
            ("/completion", {**new, "completion_tokens": most - length + 1}),
            ("/extract", {"text": "the " * (most + 1)}),
        ):
            refused = bounded.post(path, json=body)
            assert (refused.status_code, f"can be run on {most}" in refused.text) == (400, True)


# Who may ask


def test_a_secret_is_asked_for(reader):
    with Served(lambda: reader, ServerSettings(secret="sesame")) as closed:
        http, key = closed.client, {"X-SECRET-KEY": "sesame"}
        while http.get("/", headers=key).status_code == 503:
            pass
        for path in ("/", "/api/page", "/api/nla/sources"):
            assert http.get(path).status_code == 401
            assert http.get(path, headers={"X-SECRET-KEY": "open"}).status_code == 403
            assert http.get(path, headers={"X-SECRET-KEY": "sésame".encode()}).status_code == 403
            assert http.get(path, headers=key).status_code == 200
        assert http.post("/tokenize", json={}).status_code == 401
        assert http.get("/nowhere").status_code == 404
        assert http.get("/viewer").status_code == 200  # it holds nothing


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "", "127.0.0.1@evil.example"])
def test_other_names_are_refused_where_there_is_no_secret(http, host):
    assert http.get("/", headers={"Host": host}).status_code == 403


def test_pages_of_other_origins_may_not_ask(http):
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for path in ("/explain", "/api/nla/explain"):
        assert http.options(path, headers=preflight).status_code == 405
    simple = http.post("/explain", content=json.dumps({"text": TEXT}), headers={"Content-Type": "text/plain"})
    assert simple.status_code == 422


def test_beyond_this_machine_a_token_is_a_must(tiny_run, capsys):
    assert main(["serve", "--workdir", str(tiny_run.workdir), "--host", "0.0.0.0"]) == 2
    assert "--token" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["a..b", ".", "x" * 64 + ".example", "é" * 64])
def test_a_host_that_is_no_name_is_one_line(tiny_run, capsys, host):
    arguments = ["serve", "--workdir", str(tiny_run.workdir), "--port", "0", "--token", "sesame", "--host", host]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"nlae: --host {host} --port 0: cannot be served on (")


def test_a_port_in_use_is_one_line(tiny_run, served, capsys):
    port = served.client.base_url.port
    assert main(["serve", "--workdir", str(tiny_run.workdir), "--port", str(port)]) == 2
    assert f"--port {port}" in capsys.readouterr().err


def test_without_the_extra_one_line_says_which(tiny_run):
    program = "import sys; sys.modules['uvicorn'] = None; from nlae_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "serve", "--workdir", str(tiny_run.workdir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "nlae: nlae serve: uvicorn is not installed; pip install 'nlae_jax[serve]'"
    )


def test_a_pair_that_does_not_load_ends_the_server_in_one_line(tiny_run, tmp_path, capsys):
    shutil.copy(tiny_run.workdir / "config.json", tmp_path)
    assert main(["serve", "--workdir", str(tmp_path), "--port", "0"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("nlae: ")
    assert not any("Traceback" in line for line in said)


# The public site's interface


def test_the_public_interface_lists_and_explains(http, reader):
    sources = http.get("/api/nla/sources")
    assert sources.headers["access-control-allow-origin"] == "*"
    (source,) = sources.json()["sources"]
    assert source["norm"] == pytest.approx(reader.statistics.variance)
    who = {"modelId": source["modelId"], "nlaSourceId": source["id"], "temperature": 0.7}
    first, again = (ok(http, "/api/nla/explain", {**who, "text": TEXT, "positions": [2, 0, 2]}) for _ in range(2))
    assert [result["position"] for result in first["results"]] == [0, 2]
    assert first == again  # whatever the temperature
    frames = events(http, "/api/nla/explain", {**who, "text": TEXT, "positions": [2]})
    assert frames[-1] == first["results"][1]
    only = ok(http, "/api/nla/completion", {**who, "messages": CHAT})
    assert len(only["tokens"]) == only["prompt_length"]


@pytest.mark.parametrize(
    "body",
    [{"text": TEXT}, {"text": TEXT, "positions": [-1]}, {"positions": [0]}, {"text": "x" * 16385, "positions": [0]}],
)
def test_its_errors_are_its_own(http, body):
    response = http.post("/api/nla/explain", json=body)
    assert response.status_code == 400
    assert isinstance(response.json()["error"], str)


def test_what_the_pair_cannot_do_is_an_error_there_too(served, http, monkeypatch):
    def refuse(*_):
        raise UserError("vectors: of another model")

    monkeypatch.setattr(type(served.engine.reader), "activations", refuse)
    response = http.post("/api/nla/explain", json={"text": TEXT, "positions": [0]})
    assert (response.status_code, response.json()) == (400, {"error": "vectors: of another model"})
    assert response.headers["access-control-allow-origin"] == "*"


# The page


def test_browsers_get_the_page_and_programs_the_health(http):
    assert http.get("/").json()["status"] == "ok"
    page = http.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html")
    assert page.text == http.get("/viewer").text


def test_the_page_runs_its_own_script_and_loads_nothing(http):
    page = http.get("/viewer")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy.split("script-src")[1].split(";")[0]
    assert page.text.count("<script>") == 1
    for word in ("src=", "http://", "https://", "@import", "innerHTML"):
        assert word not in page.text


def test_the_page_asks_what_it_shows(http):
    info = http.get("/api/page").json()
    assert info["variance"] > 0
    assert info["chat"] is True
    assert "FVE" in " ".join(info["rates"])
    scored = ok(http, "/api/page/score", {"text": TEXT, "position": -1, "description": "the end"})
    assert scored["mse"] == pytest.approx(2 * (1 - scored["cosine_similarity"]))
    agreed = ok(http, "/api/page/agreement", {"texts": ["a red house", "the red houses"]})
    assert 0 <= agreed["agreement"] <= 1


def test_two_tokens_are_compared_by_their_difference(http):
    found = ok(http, "/api/page/compare", {"text": TEXT, "position": -1, "other": 1})
    tokens = ok(http, "/extract", {"text": TEXT})["tokens"]
    a, b = np.array(tokens[-1]["activation"]), np.array(tokens[1]["activation"])
    assert found["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    limit = http.get("/api/page").json()["max_new_tokens"]
    body = {"activation_a": a.tolist(), "activation_b": b.tolist(), "temperature": 0, "max_new_tokens": limit}
    compared = ok(http, "/compare", body)
    assert {name: found[name] for name in compared} == compared


def test_nothing_is_known_of_a_pair_without_an_evaluation(tmp_path):
    assert error_rates(str(tmp_path)) == {}
    (tmp_path / "eval.json").write_text("[]")
    assert error_rates(str(tmp_path)) == {}


def test_a_pair_in_the_home_directory_is_found_and_named_by_its_last_part(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pair").mkdir()
    (tmp_path / "pair/eval.json").write_text('{"fve": 0.5}')
    assert error_rates("~/pair") == error_rates(str(tmp_path / "pair")) != {}
    assert public_name("~/pair") == public_name(str(tmp_path / "pair")) == "pair"
    for name in ("owner/pair", "~/none", "gs://bucket/pair"):
        assert public_name(name) == name and error_rates(name) == {}


@pytest.mark.parametrize("value", [None, "0.5", [0.1], True, {}, 1e301])
def test_rates_that_are_no_numbers_are_left_out(tmp_path, value):
    found = dict.fromkeys(("fve", "fve_shuffled", "repeated_rate"), 0.5)
    for name in found:
        (tmp_path / "eval.json").write_text(json.dumps({**found, name: value}))
        assert len(error_rates(str(tmp_path))) == 2
    intervals = [value, [value, 1], [0.1, 0.2, 0.3], 0.5]
    for interval in intervals:
        (tmp_path / "eval.json").write_text(json.dumps({**found, "fve_ci95": interval}))
        assert next(iter(error_rates(str(tmp_path)).values())) == "0.50"
    (tmp_path / "eval.json").write_text(json.dumps({**found, "fve_ci95": [0.4, 0.6]}))
    assert [*error_rates(str(tmp_path)).values()] == ["0.50 [0.40, 0.60]", "0.50", "50 %"]


def test_an_edit_is_held_against_random_directions(http):
    body = {"text": TEXT, "positions": [-1, -2], "original": "the of to", "edited": "it for that is"}
    kinds = [one["kind"] for one in ok(http, "/api/page/steer", body)["outcomes"]]
    assert kinds == ["none", "edit", "random", "random", "random"]
    same = http.post("/api/page/steer", json={**body, "edited": body["original"]})
    assert same.status_code == 400
    assert "same" in same.json()["detail"]
    (refused,) = http.post("/api/page/steer", json={**body, "alpha": 0}).json()["detail"]
    assert refused["loc"] == ["body", "alpha"]


def test_a_neuron_is_held_against_controls(http, nla):
    found = ok(http, "/api/page/direction", {"neuron": "0:3"})
    assert [sweep["kind"] for sweep in found["sweeps"]] == ["direction", "random", "shuffled"]
    assert all(-1 <= point["heard"] <= 1 for sweep in found["sweeps"] for point in sweep["points"])
    u = neuron_directions(nla, 0, 3)["write"]
    vectors = pushed_along(nla, [unit(u)], STEPS)
    points = found["sweeps"][0]["points"]
    rebuilt = nla.rebuild([found["mean"], *(point["explanation"] for point in points)])
    expected = cosine(change(rebuilt[1:], rebuilt[0]), change(vectors[1:], vectors[0]))
    np.testing.assert_allclose([point["heard"] for point in points], expected, atol=1e-3)
    assert len(found["promoted"]) == len(found["suppressed"]) > 0
    refused = http.post("/api/page/direction", json={"neuron": "99:3"})
    assert (refused.status_code, "block 99" in refused.json()["detail"]) == (400, True)
    assert http.post("/api/page/direction", json={"vector": [0.0] * 64}).status_code == 400
    assert http.post("/api/page/direction", json={"vector": [1.0] * 64}).status_code == 200


@pytest.mark.parametrize("token", ["a\nb", "a\x7f", "é", " a"])
def test_a_token_that_no_header_can_bring_is_refused(token):
    """Nobody could use the server."""
    with pytest.raises(UserError, match="--token: should be printable ASCII"):
        serve(lambda: None, "127.0.0.1", 0, token, 1)
