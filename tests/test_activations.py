"""What is read from the text: every row once, and a killed extraction continues as if it had not been.

The subject is a stand-in: a row's vector is a function of the document's tokens and the position, so that a row in
the wrong place shows.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.data import activations
from nlae_jax.data.activations import ActivationStore, read_batches
from nlae_jax.data.corpus import Document
from nlae_jax.data.index import make_index, read_index, write_index
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import read_json, workdir_path, write_json
from tests.letters import Letters, config, flip, made

pytest_plugins = ["tests.fake_gcs"]

WIDTH, NUM_NEXT = 5, 3


def vector_of(ids, position):
    """[WIDTH] float32, different for every prefix."""
    prefix = np.asarray(ids[: position + 1], np.float64)
    return np.array([np.sin(prefix * (k + 1)).sum() + position for k in range(WIDTH)], np.float32)


def read(ids, mask, rows, columns):
    """A subject without a model: [M, WIDTH] and [M, NUM_NEXT]."""
    assert mask[rows, columns].all()
    vectors = np.stack([vector_of(ids[row], column) for row, column in zip(rows, columns, strict=True)])
    return vectors, np.stack([ids[rows, columns] + k for k in range(NUM_NEXT)], 1).astype(np.int32)


def expected_vectors(chosen):
    pairs = zip(chosen.document, chosen.position, strict=True)
    return np.stack([vector_of(chosen.ids[document], position) for document, position in pairs])


# --- batches


@given(st.integers(4, 40), st.integers(0, 3), st.sampled_from([1, 64, 100, 400]), st.sampled_from([8, 64, 80]))
def test_batches_hold_every_row_once_and_in_order(count, seed, batch_tokens, max_tokens):
    settings = config(seed, batch_tokens=batch_tokens, max_tokens=max_tokens)
    texts = [Document(str(i), "abcdefgh" * (1 + i % 12)) for i in range(count)]
    chosen = make_index(texts, Letters(), settings)
    shapes, covered = {}, 0
    for batch in read_batches(chosen, settings.extract):
        assert batch.start == covered
        for i in range(batch.count):
            row = batch.start + i
            ids = chosen.ids[chosen.document[row]]
            line, column = batch.rows[i], batch.columns[i]
            assert column == chosen.position[row]
            np.testing.assert_array_equal(batch.ids[line, : len(ids)], ids)
            assert batch.mask[line].sum() == len(ids)
        assert batch.mask.any(1).all()  # a row of padding alone would make attention NaN
        assert batch.mask.size <= max(batch_tokens, batch.mask.shape[1])
        shapes.setdefault(batch.ids.shape[1], set()).add((batch.ids.shape, batch.rows.shape))
        covered += batch.count
    assert covered == len(chosen.position)
    assert all(len(of_bucket) == 1 for of_bucket in shapes.values())  # one compilation a bucket


@given(st.integers(4, 40), st.sampled_from([8, 100, 200]))
def test_a_document_that_fills_the_model_is_not_padded(count, max_tokens):
    settings = config(max_tokens=max_tokens)
    chosen = make_index([Document(str(i), "abcdefgh" * (1 + i % 12)) for i in range(count)], Letters(), settings)
    longest = max(map(len, chosen.ids))
    found = list(read_batches(chosen, dataclasses.replace(settings.extract, max_tokens=longest)))
    assert max(batch.ids.shape[1] for batch in found) == longest
    assert sum(batch.count for batch in found) == len(chosen.position)


@given(st.integers(4, 60), st.sampled_from([64, 200, 1000]), st.sampled_from([64, 200]), st.sampled_from([1, 3, 4]))
def test_batches_are_as_full_as_they_can_be(count, batch_tokens, max_tokens, parts):
    settings = config(batch_tokens=batch_tokens, max_tokens=max_tokens)
    chosen = make_index([Document(str(i), "abcdefgh" * (1 + i % 29)) for i in range(count)], Letters(), settings)
    found = list(read_batches(chosen, settings.extract, parts))
    begin = 0
    for batch, following in zip(found, [*found[1:], None], strict=True):
        size, width = batch.ids.shape
        assert size == max(1, batch_tokens // width // parts) * parts
        documents = len(np.unique(batch.rows[: batch.count]))
        longest = len(chosen.ids[begin + documents - 1])
        assert longest <= width <= max(64, 1.25 * longest)
        if following is not None:  # whose first document had no room
            wider = max(width, next(w for w in [*activations._WIDTHS] if w >= len(chosen.ids[begin + documents])))
            assert documents + 1 > max(1, batch_tokens // min(wider, max_tokens) // parts) * parts
        begin += documents
    assert begin == len(chosen.ids)


# --- extraction


class Killed(Exception):
    pass


@pytest.fixture
def written_at_once(monkeypatch):
    """Every batch is written when it is read, as where reading one takes long: all rows here fit in one shard."""
    monkeypatch.setattr(activations, "_UNWRITTEN_SECONDS", 0.0)


def extract(directory, chosen, settings, reader=read):
    """Extracts what is left; returns the numbers of rows that were passed."""
    passed = []
    activations.extract(directory, chosen, reader, settings.extract, WIDTH, NUM_NEXT, passed.append)
    return passed


def finish(directory, chosen):
    write_index(directory, chosen)
    activations.write_meta(directory, chosen, WIDTH, NUM_NEXT, {"model": "none"})
    return ActivationStore(directory)


def killed_at(number):
    """A reader that works `number` times."""
    left = iter(range(number))

    def limited(*batch):
        if next(left, None) is None:
            raise Killed
        return read(*batch)

    return limited


NUM_BATCHES = len(list(read_batches(made(batch_tokens=256)[0], made(batch_tokens=256)[1].extract)))


@pytest.mark.parametrize("number", range(NUM_BATCHES))
def test_extraction_killed_in_any_batch_continues_there(tmp_path, number):
    chosen, settings = made(batch_tokens=256)
    with pytest.raises(Killed):
        extract(tmp_path, chosen, settings, killed_at(number))
    passed = extract(tmp_path, chosen, settings, killed_at(NUM_BATCHES - number))  # no batch is read twice
    assert sum(passed) == len(chosen.position)
    store = finish(tmp_path, chosen)
    np.testing.assert_array_equal(store.vectors(np.arange(len(chosen.position))), expected_vectors(chosen))


def test_rows_whose_next_tokens_could_not_be_fetched_do_not_count(tmp_path):
    chosen, settings = made(batch_tokens=256)

    class Lost:
        def __array__(self, *_, **__):
            raise Killed

    with pytest.raises(Killed):
        extract(tmp_path, chosen, settings, lambda *batch: (read(*batch)[0], Lost()))
    assert sum(extract(tmp_path, chosen, settings)) == len(chosen.position)
    store = finish(tmp_path, chosen)
    assert (store.next_tokens(np.arange(len(chosen.position))) != 0).any(-1).all()


def test_batch_written_but_not_counted_is_written_again(tmp_path, monkeypatch, written_at_once):
    chosen, settings = made(batch_tokens=256)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        counted, write_json = iter([True, True]), activations.write_json

        def count(path, value):
            if next(counted, None) is None:
                raise Killed
            write_json(path, value)

        patch.setattr(activations, "write_json", count)
        extract(tmp_path, chosen, settings)
    extract(tmp_path, chosen, settings, killed_at(NUM_BATCHES - 2))
    store = finish(tmp_path, chosen)
    np.testing.assert_array_equal(store.vectors(np.arange(len(chosen.position))), expected_vectors(chosen))


class Under(tuple):
    """What a device has been asked for: `fetched` is called when somebody wants it."""

    def __new__(cls, arrays, fetched):
        return super().__new__(cls, (Promise(array, fetched) for array in arrays))


class Promise:
    def __init__(self, array, fetched):
        self._array, self._fetched = array, fetched

    def __array__(self, dtype=None, copy=None):
        self._fetched()
        return self._array


def test_next_batch_is_asked_for_before_one_is_fetched(tmp_path, written_at_once):
    chosen, settings = made(batch_tokens=256)
    events = []

    def asked(*batch):
        number = len([kind for kind, _ in events if kind == "ask"])
        events.append(("ask", number))
        return Under(read(*batch), lambda: events.append(("fetch", number)))

    extract(tmp_path, chosen, settings, asked)
    order = list(dict.fromkeys(events))  # vectors and tokens of a batch are fetched one after the other
    expected = [("ask", 0)]
    for number in range(1, NUM_BATCHES):
        expected += [("ask", number), ("fetch", number - 1)]
    assert order == [*expected, ("fetch", NUM_BATCHES - 1)]


def test_rows_count_when_they_are_on_disk(tmp_path, written_at_once):
    """At whatever moment a run is killed: what progress.json counts can be read by another process."""
    chosen, settings = made(batch_tokens=256)
    expected, counted = expected_vectors(chosen), []

    def look():
        if (tmp_path / "progress.json").exists():
            counted.append(read_json(tmp_path / "progress.json")["rows"])
            stored = activations.open_vectors(tmp_path, len(expected), WIDTH)[: counted[-1]].read().result()
            np.testing.assert_array_equal(stored, expected[: counted[-1]])

    def looking(*batch):
        look()
        return Under(read(*batch), look)

    extract(tmp_path, chosen, settings, looking)
    look()
    assert len(set(counted)) >= NUM_BATCHES - 1  # the last but one is counted between two looks
    assert counted[-1] == len(expected)
    assert not [path for path in (tmp_path / "vectors").rglob("*") if "lock" in path.name]


@pytest.mark.parametrize("killed", range(1, NUM_BATCHES))
def test_extraction_killed_while_writing(tmp_path, monkeypatch, killed, written_at_once):
    """Nothing is flushed when a process is killed: what was under way is lost, and read again."""
    chosen, settings = made(batch_tokens=256)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        settle, count = activations._Writer._settle, iter(range(killed))

        def dying(self):
            if next(count, None) is None:
                raise Killed
            settle(self)

        patch.setattr(activations._Writer, "_settle", dying)
        extract(tmp_path, chosen, settings)
    again = iter(range(NUM_BATCHES - killed + 1))  # the first settling has nothing to wait for

    def counted(*batch):
        next(again)
        return read(*batch)

    assert sum(extract(tmp_path, chosen, settings, counted)) == len(chosen.position)
    store = finish(tmp_path, chosen)
    np.testing.assert_array_equal(store.vectors(np.arange(len(chosen.position))), expected_vectors(chosen))


@pytest.mark.parametrize("shard_rows", [1, 8, 64])
@pytest.mark.parametrize("killed", [False, True])
def test_shards_are_filled_by_several_batches_and_written_once(tmp_path, monkeypatch, shard_rows, killed):
    """Whatever was read when a run stopped: only the shard that it left unfinished is written again."""
    monkeypatch.setattr(activations, "SHARD_ROWS", shard_rows)
    chosen, settings = made(batch_tokens=256)
    begin, writes = activations._Writer._begin, []

    def noted(self, stop):
        writes.append((self._stop, stop))
        begin(self, stop)

    monkeypatch.setattr(activations._Writer, "_begin", noted)
    if killed:
        with pytest.raises(Killed):
            extract(tmp_path, chosen, settings, killed_at(NUM_BATCHES // 2))
    extract(tmp_path, chosen, settings)
    expected = expected_vectors(chosen)
    stored = activations.open_vectors(tmp_path, len(expected), WIDTH).read().result()
    np.testing.assert_array_equal(stored, expected)
    spans = [(start, stop) for start, stop in writes if stop > start]
    assert [stop for _, stop in spans[:-1]] == [start for start, _ in spans[1:]]  # no row twice
    unaligned = [stop for _, stop in spans if stop % shard_rows]
    assert len(unaligned) <= (2 if killed else 1)  # where a run ended


def test_a_shard_is_one_write(tmp_path, monkeypatch):
    """Batches that fill it are written together: counted in bytes, once and no more than its checksums beyond."""
    monkeypatch.setattr(activations, "SHARD_ROWS", 64)
    chosen, settings = made(batch_tokens=64)

    def wide(*batch):
        return np.repeat(read(*batch)[0], 200, axis=1), None

    before = _written()
    activations.extract(tmp_path, chosen, wide, settings.extract, WIDTH * 200, 0, lambda _: None)
    assert len(chosen.position) > 100
    assert _written() - before < 1.2 * sum(path.stat().st_size for path in (tmp_path / "vectors").rglob("*/*"))


def _written():
    return ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_written")[0]["values"][0]["value"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_stop_extraction(tmp_path, value):
    chosen, settings = made()

    def broken(*batch):
        vectors, following = read(*batch)
        vectors[0, 2] = value
        return vectors, following

    with pytest.raises(UserError, match="NaN or infinity"):
        extract(tmp_path, chosen, settings, broken)


def test_rows_after_those_that_are_not_finite_do_not_count(tmp_path, written_at_once):
    chosen, settings = made(batch_tokens=256)
    number = iter(range(NUM_BATCHES))

    def broken(*batch):
        vectors, following = read(*batch)
        if next(number) == 2:
            vectors[0, 0] = np.nan
        return vectors, following

    with pytest.raises(UserError, match="NaN or infinity"):
        extract(tmp_path, chosen, settings, broken)
    good = list(read_batches(chosen, settings.extract))[:2]
    assert read_json(tmp_path / "progress.json") == {"rows": sum(batch.count for batch in good)}


# --- the store


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("store")
    chosen, settings = made()
    extract(directory, chosen, settings)
    return chosen, finish(directory, chosen)


@given(data=st.data())
def test_rows_come_in_the_order_asked_for(stored, data):
    chosen, store = stored
    rows = np.array(data.draw(st.lists(st.integers(0, len(chosen.position) - 1), min_size=1, max_size=20)))
    vectors = store.vectors(rows)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, expected_vectors(chosen)[rows])
    last = np.array([store.context_ids(row)[-1] for row in rows])
    np.testing.assert_array_equal(store.next_tokens(rows), last[:, None] + np.arange(NUM_NEXT))


def test_context_ends_at_the_position(stored):
    chosen, store = stored
    for row in (0, len(chosen.position) - 1):
        context = store.context_ids(row)
        assert len(context) == chosen.position[row] + 1
        np.testing.assert_array_equal(context, chosen.ids[chosen.document[row]][: len(context)])


def test_meta_describes_the_vectors(stored):
    chosen, store = stored
    vectors = expected_vectors(chosen).astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1)
    assert store.meta["num_activations"] == len(chosen.position)
    assert store.meta["num_documents"] == len(chosen.doc_ids)
    assert store.meta["d_model"] == WIDTH
    assert store.meta["norm_mean"] == pytest.approx(norms.mean())
    assert store.meta["norm_p75"] == pytest.approx(np.percentile(norms, 75))
    mean_direction = (vectors / norms[:, None]).mean(0)
    assert store.meta["norm_of_mean_direction"] == pytest.approx(np.linalg.norm(mean_direction))


def test_store_without_next_tokens(tmp_path):
    chosen, settings = made()

    def vectors_only(*batch):
        return read(*batch)[0], None

    activations.extract(tmp_path, chosen, vectors_only, settings.extract, WIDTH, 0, lambda _: None)
    write_index(tmp_path, chosen)
    activations.write_meta(tmp_path, chosen, WIDTH, 0, {})
    assert ActivationStore(tmp_path).next_tokens(np.array([3, 1])).shape == (2, 0)


# --- damage


@pytest.fixture
def store_of_shards(tmp_path, monkeypatch):
    """(directory, vectors [N, WIDTH]) of a finished store of several shards."""
    monkeypatch.setattr(activations, "SHARD_ROWS", 16)
    chosen, settings = made()
    extract(tmp_path, chosen, settings)
    finish(tmp_path, chosen)
    return tmp_path, expected_vectors(chosen)


def shards(directory, name="vectors"):
    return sorted(
        (path for path in (directory / name / "c").rglob("*") if path.is_file()), key=lambda p: int(p.parts[-2])
    )


def a_shard_missing(directory):
    shards(directory)[2].unlink()


def all_shards_missing(directory):
    shutil.rmtree(directory / "vectors/c")


def a_shard_empty(directory):
    shards(directory)[2].write_bytes(b"")


def a_shard_cut(directory):
    path = shards(directory)[2]
    path.write_bytes(path.read_bytes()[:-10])


def a_bit_of_a_value(directory):
    flip(shards(directory)[2], 3)


def a_bit_of_an_index(directory):
    flip(shards(directory)[2], -9)


def a_shard_of_zeros(directory):
    path = shards(directory)[2]
    path.write_bytes(bytes(path.stat().st_size))


def another_rows_shard_is_a_directory(directory):
    path = shards(directory)[2]
    path.unlink()
    path.mkdir()


def not_a_number(directory):
    count = json.loads((directory / "meta.json").read_text())["num_activations"]
    array = activations.open_vectors(directory, count, WIDTH)
    array[40].write(np.full(WIDTH, np.nan, np.float32)).result()


DAMAGE = [
    a_shard_missing,
    all_shards_missing,
    a_shard_empty,
    a_shard_cut,
    a_bit_of_a_value,
    a_bit_of_an_index,
    a_shard_of_zeros,
    another_rows_shard_is_a_directory,
    not_a_number,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_vectors_are_an_error(store_of_shards, damage):
    directory, expected = store_of_shards
    damage(directory)
    store = ActivationStore(directory)
    with pytest.raises(UserError) as error:
        for row in range(len(expected)):  # in whatever order rows are read
            np.testing.assert_array_equal(store.vectors(np.array([row]))[0], expected[row])
    message = str(error.value)
    assert message.startswith(f"{directory / 'vectors'}: ") and "restore it, or delete" in message
    assert "\n" not in message
    with pytest.raises(UserError, match="vectors: "):
        activations.write_meta(directory, read_index(directory), WIDTH, NUM_NEXT, {})


@pytest.mark.parametrize("position", [3, -9])
def test_damaged_next_tokens_are_an_error(store_of_shards, position):
    directory, expected = store_of_shards
    flip(shards(directory, "next_tokens")[0], position)
    with pytest.raises(UserError, match="next_tokens: cannot be read"):
        ActivationStore(directory).next_tokens(np.arange(len(expected)))


@pytest.mark.parametrize("name", ["vectors", "next_tokens"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"[" * 100_000])
def test_an_array_without_its_metadata_is_an_error(store_of_shards, name, content):
    directory, _ = store_of_shards
    path = directory / name / "zarr.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: missing or damaged"):
        ActivationStore(directory)


@pytest.mark.parametrize(
    "content", [{}, [], {"rows": -1}, {"rows": 10**9}, {"rows": "many"}, {"rows": None}, {"rows": 1.5}]
)
def test_progress_that_cannot_be(tmp_path, content):
    chosen, settings = made()
    write_json(tmp_path / "progress.json", content)
    with pytest.raises(UserError, match=r"progress\.json: "):
        extract(tmp_path, chosen, settings)


@pytest.mark.parametrize("content", [{}, [], {"d_model": 5}, {"d_model": "5", "num_next_tokens": 3, "norm_p75": 1.0}])
def test_meta_that_cannot_be(store_of_shards, content):
    directory, _ = store_of_shards
    write_json(directory / "meta.json", content)
    with pytest.raises(UserError, match=r"meta\.json: "):
        ActivationStore(directory)


def test_progress_beyond_what_is_there_is_noticed(tmp_path):
    """Say of a workdir that was copied while a run went on."""
    chosen, settings = made(batch_tokens=256)
    with pytest.raises(Killed):
        extract(tmp_path, chosen, settings, killed_at(2))
    write_json(tmp_path / "progress.json", {"rows": len(chosen.position)})
    extract(tmp_path, chosen, settings)
    with pytest.raises(UserError, match=r"vectors: cannot be read .*missing"):
        finish(tmp_path, chosen)


def test_activations_of_zeros_are_kept_and_said(tmp_path, capsys):
    """They are stored as any others, not left out as what a missing chunk would read as."""
    chosen, settings = made()

    def nothing(*batch):
        return tuple(np.zeros_like(part) for part in read(*batch))

    extract(tmp_path, chosen, settings, nothing)
    store = finish(tmp_path, chosen)
    assert not store.vectors(np.arange(len(chosen.position))).any()
    assert not store.next_tokens(np.arange(len(chosen.position))).any()
    assert "every activation is zero" in capsys.readouterr().err


# --- the layout of older runs: plain chunks


def old_layout(directory, rows, width=WIDTH, dtype="float32", name="vectors"):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(directory / name)}}
    layout = ts.ChunkLayout(chunk_shape=[16, width])
    return ts.open(spec, create=True, dtype=dtype, shape=[rows, width], chunk_layout=layout).result()


@pytest.mark.parametrize("done", [0, 1, 30, None])
def test_stores_of_older_runs_are_read_and_finished(tmp_path, done):
    chosen, settings = made(batch_tokens=256)
    expected, rows = expected_vectors(chosen), len(chosen.position)
    done = rows if done is None else done
    vectors, following = old_layout(tmp_path, rows), old_layout(tmp_path, rows, NUM_NEXT, "int32", "next_tokens")
    ends = np.array([chosen.ids[d][p] for d, p in zip(chosen.document, chosen.position, strict=True)])
    if done:
        vectors[:done].write(expected[:done]).result()
        following[:done].write((ends[:, None] + np.arange(NUM_NEXT))[:done].astype(np.int32)).result()
        write_json(tmp_path / "progress.json", {"rows": done})
    extract(tmp_path, chosen, settings)
    store = finish(tmp_path, chosen)
    np.testing.assert_array_equal(store.vectors(np.arange(rows)), expected)
    np.testing.assert_array_equal(store.next_tokens(np.arange(rows)), ends[:, None] + np.arange(NUM_NEXT))
    metadata = read_json(tmp_path / "vectors/zarr.json")
    assert (metadata["codecs"][0]["name"] == "sharding_indexed") == (done == 0)


def test_a_chunk_of_an_older_run_that_is_missing_is_an_error(tmp_path):
    chosen, settings = made()
    old_layout(tmp_path, len(chosen.position)).write(expected_vectors(chosen)).result()
    old_layout(tmp_path, len(chosen.position), NUM_NEXT, "int32", "next_tokens").write(1).result()
    write_json(tmp_path / "progress.json", {"rows": len(chosen.position)})
    extract(tmp_path, chosen, settings)
    store = finish(tmp_path, chosen)
    shards(tmp_path)[1].unlink()
    with pytest.raises(UserError, match=r"vectors: cannot be read .*missing"):
        store.vectors(np.arange(len(chosen.position)))


# --- what reading costs

BROAD, NUM_ROWS = 3584, 4096  # of a model of 7B


@pytest.fixture(scope="module")
def broad(tmp_path_factory):
    directory = tmp_path_factory.mktemp("broad")
    values = np.arange(NUM_ROWS, dtype=np.float32)[:, None] + np.zeros(BROAD, np.float32)
    activations.open_vectors(directory, NUM_ROWS, BROAD, create=True).write(values).result()
    return directory


RANDOM_ROWS = [
    np.random.default_rng(0).permutation(NUM_ROWS)[:64],
    np.random.default_rng(1).permutation(NUM_ROWS)[:64],
    np.arange(8) * 512 + 77,  # each in a shard of its own, so that every row also costs an index
]


def useful(rows):
    return len(rows) * BROAD * 4


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what the kernel says a process has read")
@pytest.mark.parametrize("rows", RANDOM_ROWS)
def test_random_rows_cost_little_more_than_themselves(broad, rows):
    array = activations.open_vectors(broad, NUM_ROWS, BROAD)
    before = _read()
    values = array[rows].read().result()
    assert useful(rows) <= _read() - before <= 2 * useful(rows)
    np.testing.assert_array_equal(values[:, 5], rows)


def _read():
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


@pytest.mark.parametrize("rows", RANDOM_ROWS)
def test_random_rows_of_a_bucket_cost_little_more_than_themselves(broad, gcs, rows):
    for path in (broad / "vectors").rglob("*"):
        if path.is_file():
            gcs.write(f"W/vectors/{path.relative_to(broad / 'vectors')}", path.read_bytes(), {})
    array = activations.open_vectors(workdir_path("gs://bucket/W"), NUM_ROWS, BROAD)
    gcs.served = 0
    values = array[rows].read().result()
    assert useful(rows) <= gcs.served <= 2 * useful(rows)
    np.testing.assert_array_equal(values[:, 5], rows)


@pytest.mark.parametrize("width", [1, 3, 64, 576, 3584, 16384])
def test_layout(tmp_path, width):
    array = activations.open_vectors(tmp_path, 700, width, create=True)
    chunk, shard = array.chunk_layout.read_chunk.shape, array.chunk_layout.write_chunk.shape
    assert shard == (activations.SHARD_ROWS, width) and chunk[1] == width and shard[0] % chunk[0] == 0
    assert chunk[0] == 1 or chunk[0] * width * 4 <= 2048
