"""What is read from the text: every row once, and a killed extraction continues as if it had not been.

The subject is a stand-in: a row's vector is a function of the document's tokens and the position, so that a row in
the wrong place shows.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from nlae_jax.config import Config, ExtractConfig, SplitConfig
from nlae_jax.data import activations
from nlae_jax.data.activations import SPLITS, ActivationStore, Plan, plan, read_batches, read_plan, write_plan
from nlae_jax.data.corpus import Document
from nlae_jax.errors import UserError
from nlae_jax.files import read_json
from nlae_jax.lm.pretrained import load_tokenizer

WIDTH, NUM_NEXT, SPECIAL = 5, 3, 7


class Letters:
    """A tokenizer: one token a character, and `|` is special."""

    all_special_ids = (SPECIAL,)

    def encode(self, text, add_special_tokens=True):
        return [SPECIAL if character == "|" else ord(character) for character in text]

    def convert_ids_to_tokens(self, token):
        return chr(token)

    def __len__(self):
        return 256


def documents(count, seed=0, longest=90):
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcdefgh|"), rng.integers(1, longest))) for _ in range(count)]
    return [Document(f"{number:016x}", text) for number, text in enumerate(texts)]


def config(seed=0, **extract):
    return dataclasses.replace(
        Config(),
        seed=seed,
        extract=ExtractConfig(**{"positions_per_document": 3, "min_position": 5, "max_tokens": 80, **extract}),
        split=SplitConfig(0.25, 0.25, 0.25, 0.25),
    )


def made(count=40, seed=0, **extract):
    settings = config(seed, **extract)
    return plan(documents(count), Letters(), settings), settings


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


def same(left: Plan, right: Plan):
    assert left.doc_ids == right.doc_ids
    for a, b in zip(left.ids, right.ids, strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("split", "document", "position"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


# --- the plan


def test_plan_depends_on_texts_and_seed_alone():
    first, settings = made()
    same(first, plan(documents(40)[::-1], Letters(), settings))
    other = plan(documents(40), Letters(), config(seed=1))
    assert (other.position != first.position).any()
    assert (other.split != first.split).any()


def test_a_document_keeps_its_positions_when_others_come_or_go():
    few, many = made(20)[0], made(40)[0]
    kept = {doc_id: few.position[few.document == i].tolist() for i, doc_id in enumerate(few.doc_ids)}
    grown = {doc_id: many.position[many.document == i].tolist() for i, doc_id in enumerate(many.doc_ids)}
    assert kept.items() <= grown.items()


@given(st.integers(4, 30), st.integers(0, 5), st.integers(1, 8), st.integers(1, 20))
def test_positions_may_be_read(count, seed, positions, min_position):
    texts = [Document(f"{i}", "|abcd|" * 6 + "abc" * i) for i in range(count)]
    settings = config(seed, positions_per_document=positions, min_position=min_position)
    chosen = plan(texts, Letters(), settings)
    for document, ids in enumerate(chosen.ids):
        read_here = chosen.position[chosen.document == document]
        assert len(ids) <= settings.extract.max_tokens
        assert read_here.min() >= min_position
        assert read_here.max() < len(ids)
        assert (np.diff(read_here) > 0).all()
        assert (ids[read_here] != SPECIAL).all()
        candidates = (ids[min_position:] != SPECIAL).sum()
        assert len(read_here) == min(positions, candidates)


@given(st.integers(4, 200), st.integers(0, 3), st.lists(st.integers(1, 97), min_size=4, max_size=4))
def test_every_document_is_in_one_split_and_none_is_empty(count, seed, weights):
    shares = SplitConfig(*(weight / sum(weights) for weight in weights))
    settings = dataclasses.replace(config(seed), split=shares)
    chosen = plan([Document(f"{i}", "abcdefghij") for i in range(count)], Letters(), settings)
    rows = [set(chosen.rows_of(name).tolist()) for name in SPLITS]
    assert all(rows)
    assert sum(map(len, rows)) == len(set.union(*rows)) == len(chosen.position)
    holders = [set(chosen.document[sorted(of_split)].tolist()) for of_split in rows]
    assert sum(map(len, holders)) == len(set.union(*holders)) == count
    for name, held in zip(SPLITS, holders, strict=True):
        assert abs(len(held) - getattr(shares, name) * count) <= len(SPLITS)


@pytest.mark.parametrize("rule", ["$A", "<|endoftext|> $A", "<|endoftext|> $A <|im_end|>", "$A <|im_end|>"])
@pytest.mark.parametrize("rendered", [False, True])
def test_documents_are_read_with_one_beginning_and_no_end(tiny_dir, rule, rendered):
    """Text that a chat template has made begins already."""
    tokenizer = load_tokenizer(tiny_dir)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|endoftext|>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(rule, special_tokens=special)
    texts = [("<|endoftext|>" if rendered else "") + f"{number} of the text" for number in range(4)]
    chosen = plan([Document(f"{i}", text) for i, text in enumerate(texts)], tokenizer, config(min_position=2))
    (bos, eos), begins = (index for _, index in special), rendered or rule.startswith("<")
    for doc_id, ids in zip(chosen.doc_ids, chosen.ids, strict=True):
        bare = tokenizer.encode(f"{doc_id} of the text", add_special_tokens=False)
        assert ids.tolist() == ([bos] if begins else []) + bare
        assert eos not in ids


def test_a_document_with_a_token_that_the_subject_lacks_is_named():
    texts = documents(40)
    texts[7] = dataclasses.replace(texts[7], text="abcdef" * 5 + "z")
    plan(texts, Letters(), config(), vocab_size=ord("z") + 1)
    with pytest.raises(UserError, match=rf"corpus: document {texts[7].doc_id}: the token 'z' has id {ord('z')}"):
        plan(texts, Letters(), config(), vocab_size=ord("z"))


def test_too_few_documents_are_said():
    with pytest.raises(UserError, match=r"extract\.min_position"):
        plan(documents(40, longest=60), Letters(), config(min_position=58))


def test_plan_is_read_as_written(tmp_path):
    chosen, _ = made()
    write_plan(tmp_path, chosen)
    same(chosen, read_plan(tmp_path))


# --- batches


@given(st.integers(4, 40), st.integers(0, 3), st.sampled_from([1, 64, 100, 400]), st.sampled_from([8, 64, 80]))
def test_batches_hold_every_row_once_and_in_order(count, seed, batch_tokens, max_tokens):
    settings = config(seed, batch_tokens=batch_tokens, max_tokens=max_tokens)
    texts = [Document(str(i), "abcdefgh" * (1 + i % 12)) for i in range(count)]
    chosen = plan(texts, Letters(), settings)
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


@given(st.integers(4, 60), st.sampled_from([64, 200, 1000]), st.sampled_from([64, 200]), st.sampled_from([1, 3, 4]))
def test_batches_are_as_full_as_they_can_be(count, batch_tokens, max_tokens, parts):
    settings = config(batch_tokens=batch_tokens, max_tokens=max_tokens)
    chosen = plan([Document(str(i), "abcdefgh" * (1 + i % 29)) for i in range(count)], Letters(), settings)
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


def extract(directory, chosen, settings, reader=read):
    """Extracts what is left; returns the numbers of rows that were passed."""
    passed = []
    activations.extract(directory, chosen, reader, settings.extract, WIDTH, NUM_NEXT, passed.append)
    return passed


def finish(directory, chosen):
    write_plan(directory, chosen)
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


def test_batch_written_but_not_counted_is_written_again(tmp_path, monkeypatch):
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


def test_next_batch_is_asked_for_before_one_is_fetched(tmp_path):
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


def test_rows_count_when_they_are_on_disk(tmp_path):
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
def test_extraction_killed_while_writing(tmp_path, monkeypatch, killed):
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


def test_rows_that_share_a_chunk_are_written_by_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "_CHUNK_ROWS", 7)
    chosen, settings = made(batch_tokens=256)
    extract(tmp_path, chosen, settings)
    stored = activations.open_vectors(tmp_path, len(chosen.position), WIDTH).read().result()
    np.testing.assert_array_equal(stored, expected_vectors(chosen))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_stop_extraction(tmp_path, value):
    chosen, settings = made()

    def broken(*batch):
        vectors, following = read(*batch)
        vectors[0, 2] = value
        return vectors, following

    with pytest.raises(UserError, match="not finite"):
        extract(tmp_path, chosen, settings, broken)


def test_rows_after_those_that_are_not_finite_do_not_count(tmp_path):
    chosen, settings = made(batch_tokens=256)
    number = iter(range(NUM_BATCHES))

    def broken(*batch):
        vectors, following = read(*batch)
        if next(number) == 2:
            vectors[0, 0] = np.nan
        return vectors, following

    with pytest.raises(UserError, match="not finite"):
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
    write_plan(tmp_path, chosen)
    activations.write_meta(tmp_path, chosen, WIDTH, 0, {})
    assert ActivationStore(tmp_path).next_tokens(np.array([3, 1])).shape == (2, 0)
