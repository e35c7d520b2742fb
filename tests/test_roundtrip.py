"""Activations to text and back: batches make no difference, and token ids and texts are the same explanation."""

import dataclasses

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

from nlae_jax.config import MeshConfig, load_config
from nlae_jax.mesh import make_mesh, place, replicated
from nlae_jax.roles.protocol import decoder_ids, extract_explanation
from nlae_jax.roles.rollout import rollout
from nlae_jax.roles.roundtrip import RoundTrip, like_lengths, read_samples
from nlae_jax.roles.turns import Turns, smaller_batch
from nlae_jax.run.resources import open_run, prepare
from nlae_jax.run.training import trained_pair
from nlae_jax.runtime.errors import UserError
from tests.conftest import of_few_tokens

pytest_plugins = ["tests.tiny_run"]

BATCH, LIMIT = 4, 48


@pytest.fixture(scope="module")
def run(tiny_run):
    return prepare(open_run(load_config(tiny_run.workdir / "config.json"), tiny_run.workdir))


@pytest.fixture(scope="module")
def pair(run):
    return trained_pair(run)


@pytest.fixture(scope="module")
def trip(run):
    return RoundTrip(run.roles, run.tokenizer, BATCH, LIMIT)


@pytest.fixture(scope="module")
def h(run):
    return run.store.vectors(run.held_out_rows()[:10])


@pytest.fixture(scope="module")
def written(trip, pair, h):
    """Sampled, so that some are closed and none is like another."""
    return trip.explain(pair, h, seed=3, temperature=1.0)


def same(left, right):
    assert left.texts == right.texts
    assert left.responses == right.responses
    np.testing.assert_array_equal(left.ids, right.ids)
    np.testing.assert_array_equal(left.length, right.length)
    np.testing.assert_array_equal(left.truncated, right.truncated)


def test_explanations_do_not_depend_on_the_batch(trip, pair, h):
    together = trip.explain(pair, h)
    for row in (0, BATCH - 1, BATCH, len(h) - 1):
        alone = trip.explain(pair, h[row : row + 1])
        assert alone.texts == [together.texts[row]]
        np.testing.assert_array_equal(alone.ids[0], together.ids[row])


def test_what_the_limit_cut_is_closed_with_more_tokens(trip, pair, h, written):
    """Nothing that is closed is cut; and a lower limit cuts what went on beyond it."""
    assert not written.truncated[written.length > 0].any()
    longest = int(written.length.max())
    assert longest > 8
    short = trip.explain(pair, h, seed=3, temperature=1.0, max_new_tokens=8)
    assert short.truncated[written.length > 8].all() and not short.truncated[short.length > 0].any()


def test_devices_that_do_not_divide_the_batch_change_nothing(run, trip, pair, h, written):
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    split = RoundTrip(run.roles, run.tokenizer, BATCH, LIMIT, mesh)
    (rows,), *_ = split._batches(h)
    assert {part.data.shape[0] for part in rows.addressable_shards} == {1}
    there = place(pair, replicated(mesh))
    same(split.explain(there, h, seed=3, temperature=1.0), written)
    ours, theirs = (t.reconstruct_ids(p, written.ids, written.length) for t, p in ((split, there), (trip, pair)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_some_explanations_are_closed(written):
    assert sum(bool(text) for text in written.texts) > 0


def test_texts_are_what_the_ids_say(run, written):
    rows = zip(written.texts, written.responses, written.ids, written.length, strict=True)
    for text, response, ids, length in rows:
        assert text == (extract_explanation(response) or "")
        assert bool(text) == (length > 0)
        assert run.tokenizer.decode(ids[:length]).strip() == text
        assert response.startswith("<explanation>\n")


def test_samples_are_read_up_to_their_length(run):
    """What stands after a response's end is not a part of it; without a closing tag there is no explanation."""
    encode = lambda text: run.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    closed, opened = [*encode(" the of "), *run.protocol.closing, run.protocol.eos_id], encode("the of")
    tokens = np.zeros((3, len(closed) + 2), np.int32)
    tokens[0, : len(closed)], tokens[1, : len(opened)], tokens[2] = closed, opened, tokens[2]
    responses, texts = read_samples(run.tokenizer, run.protocol, tokens, np.array([len(closed), len(opened), 0]))
    assert texts == ["the of", "", ""]
    assert responses == ["<explanation>\n the of </explanation>", "<explanation>\nthe of", "<explanation>\n"]


def test_draws_depend_on_the_seed_alone(trip, pair, h, written):
    same(trip.explain(pair, h, seed=3, temperature=1.0), written)
    assert trip.explain(pair, h, seed=4, temperature=1.0).responses != written.responses
    same(trip.explain(pair, h, seed=3), trip.explain(pair, h, seed=4))  # greedy: nothing is drawn


def test_a_vectors_length_says_nothing(trip, pair, h):
    assert trip.explain(pair, 7 * h).texts == trip.explain(pair, h).texts


def test_ids_and_texts_are_rebuilt_alike(trip, run, pair, written):
    """Where tokenising the text gives the tokens that were sampled; elsewhere they may differ, and are reported."""
    protocol = run.protocol
    canonical = [
        length > 0
        and decoder_ids(run.tokenizer, protocol, text)
        == [*protocol.decoder_prefix, *ids[:length].tolist(), *protocol.decoder_suffix]
        for text, ids, length in zip(written.texts, written.ids, written.length, strict=True)
    ]
    assert any(canonical)
    from_ids = trip.reconstruct_ids(pair, written.ids, written.length)
    from_texts = trip.reconstruct_texts(pair, written.texts)
    assert from_ids.shape == from_texts.shape == (len(canonical), run.arch.d_model)
    np.testing.assert_allclose(from_ids[canonical], from_texts[canonical], rtol=1e-4, atol=1e-4)


def test_reconstructions_do_not_depend_on_the_batch(trip, pair, written):
    together = trip.reconstruct_ids(pair, written.ids, written.length)
    for row in (0, BATCH, len(together) - 1):
        alone = trip.reconstruct_ids(pair, written.ids[row : row + 1], written.length[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-5, atol=1e-5)


def test_texts_are_read_without_tokenising_the_vocabulary(run, pair, monkeypatch):
    """Only reading token ids needs the endings; with 49,152 tokens they take a second or two."""
    monkeypatch.setattr("nlae_jax.roles.protocol.endings", lambda *_: pytest.fail("endings"))
    assert RoundTrip(run.roles, run.tokenizer, BATCH, LIMIT).reconstruct_texts(pair, ["the land"]).shape[0] == 1


def test_texts_of_other_lengths_change_nothing(run, pair, caplog):
    """A long text among short ones is computed by itself, and the results are in the order of the texts."""
    words = ["the of", "to in is", "that it for the", "of", "in is that it"]
    texts = [words[0], " ".join([words[1]] * 150), *words[1:], " ".join([words[2]] * 60)]
    with jax.log_compiles():
        together = RoundTrip(run.roles, run.tokenizer, 8, LIMIT, smallest_batch=4).reconstruct_texts(pair, texts)
    assert 1 < sum("Compiling jit(reconstruct_prompts)" in message for message in caplog.messages) < 4
    single = RoundTrip(run.roles, run.tokenizer, 1, LIMIT)
    alone = np.concatenate([single.reconstruct_texts(pair, [text]) for text in texts])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
    assert np.abs(together[:, None] - together[None]).max(-1)[~np.eye(len(texts), dtype=bool)].min() > 1e-3


def test_a_text_that_fills_the_decoder_is_read(run, pair):
    """Its prompt is not padded beyond what the model can be run on; a longer one is one line."""
    texts = ["the of to in is that it for " * 9, "the of"]
    lengths = [len(decoder_ids(run.tokenizer, run.protocol, text)) for text in texts]
    assert lengths[0] % 32

    def rebuilt(most):
        decoder = run.roles.decoder.clone(arch=of_few_tokens(run.roles.decoder.arch, most))
        roles = dataclasses.replace(run.roles, decoder=decoder)
        return RoundTrip(roles, run.tokenizer, BATCH, LIMIT).reconstruct_texts(pair, texts)

    np.testing.assert_allclose(rebuilt(lengths[0]), rebuilt(1000), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=f"a sequence of {lengths[0]} tokens is too long"):
        rebuilt(lengths[0] - 1)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=80), st.integers(1, 40), st.integers(1, 8), st.integers(1, 3))
def test_groups_of_like_length_hold_every_text_once(lengths, size, smallest, most):
    groups = like_lengths(lengths, size, smallest, most)
    assert 1 <= len(groups) <= most
    assert sorted(np.concatenate([rows for rows, _ in groups]).tolist()) == list(range(len(lengths)))
    for rows, width in groups:
        assert len(rows) and max(lengths[row] for row in rows) <= width and width % 32 == 0
    assert groups[-1][1] < max(lengths) + 32
    ((_, widest),) = like_lengths(lengths, size, smallest, 1)
    assert sum(len(rows) * width for rows, width in groups) <= len(lengths) * widest


def test_a_long_text_is_a_group_of_its_own():
    lengths = [*[50] * 20, 220, *[60] * 15]
    (short, width), (long, wide) = like_lengths(lengths, 64, 8, 3)
    assert long.tolist() == [20] and len(short) == 35 and (width, wide) == (64, 224)
    assert len(like_lengths([50, 60, 70], 64, 8, 3)) == 1  # a group of its own would cost more than padding


def test_reconstruction_is_of_the_words(trip, pair):
    rebuilt = trip.reconstruct_texts(pair, ["the of to in", "the of to in", "is that it for"])
    np.testing.assert_array_equal(rebuilt[0], rebuilt[1])
    assert np.abs(rebuilt[0] - rebuilt[2]).max() > 1e-3


def test_nothing_readable_is_still_a_number(trip, pair):
    ids, length = np.zeros((2, LIMIT), np.int32), np.zeros(2, np.int32)
    assert np.isfinite(trip.reconstruct_ids(pair, ids, length)).all()
    assert np.isfinite(trip.reconstruct_texts(pair, ["", " \n "])).all()


def test_one_compilation_each(run, pair, h, caplog):
    trip = RoundTrip(run.roles, run.tokenizer, BATCH, LIMIT)
    with jax.log_compiles():
        for count in (1, BATCH, BATCH + 1):
            written = trip.explain(pair, h[:count], seed=count)
            trip.reconstruct_ids(pair, written.ids, written.length)
    for name in ("begin", "advance", "read", "reconstruct"):
        assert sum(f"Compiling jit({name})" in message for message in caplog.messages) == 1, name


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_rows_that_leave_the_batch_change_nothing(run, pair, h, temperature, caplog, monkeypatch):
    """In turns, the same tokens are drawn as in one program without turns, at any temperature."""
    rows, limit, key = np.concatenate([h, 2 - h])[:16], 96, jax.random.PRNGKey(5)
    whole = rollout(
        run.roles,
        pair.encoder,
        {"base": pair.base},
        rows,
        key,
        samples_per_activation=1,
        max_new_tokens=limit,
        temperature=temperature,
    )
    monkeypatch.setattr("nlae_jax.roles.turns._TURN", 4)
    turns = Turns(run.roles, 16, 1)
    with jax.log_compiles():
        samples = turns.sample(turns.ready(pair), rows, len(rows), key, temperature, limit)
    for name, found in samples._asdict().items():
        np.testing.assert_allclose(found, getattr(whole, name)[:, 0], rtol=1e-4, atol=1e-4, err_msg=name)
    compiled = sum("Compiling jit(advance)" in message for message in caplog.messages)
    assert compiled > 1 or not temperature  # some ended early, and the others went on in smaller batches


def test_a_batch_that_is_not_full_samples_its_own_rows_only(run, pair, h):
    turns, key = Turns(run.roles, 8, 8), jax.random.PRNGKey(5)
    ready = turns.ready(pair)
    full, part = (turns.sample(ready, h[:8], count, key, 1.0, LIMIT) for count in (8, 3))
    np.testing.assert_array_equal(part.tokens[:3], full.tokens[:3])
    assert not part.lengths[3:].any() and not part.tokens[3:].any()


def test_few_batch_sizes_are_compiled():
    """A batch becomes at most half as large, and is one of few sizes."""
    assert [smaller_batch(count, 64, 8) for count in (1, 8, 9, 32, 33, 64)] == [8, 8, 32, 32, 64, 64]
    assert [smaller_batch(count, 40, 8) for count in (8, 9, 32, 40)] == [8, 40, 40, 40]
    assert [smaller_batch(1, size, 8) for size in (8, 15, 16)] == [8, 15, 8]


def test_a_blocks_weights_are_not_copied(run, pair):
    ready = Turns(run.roles, 8, 8).ready(pair)
    name = "up" if "up" in ready.weights[0][0] else next(iter(ready.weights[0][0]))
    stacked = ready.variables["params"]["lm"]["blocks"][name]
    begin = stacked.unsafe_buffer_pointer()
    assert all(begin <= block[name].unsafe_buffer_pointer() < begin + stacked.nbytes for block, _ in ready.weights)
