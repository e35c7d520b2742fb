"""The decode loop, with scripted logits and with the tiny encoder, and explanations cut out of what it gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlae_jax.lm.sampling import Samples, categorical, explanation_tokens, sample, truncated
from nlae_jax.roles.rollout import rollout
from nlae_jax.train.state import init_encoder
from tests.conftest import perturbed, vectors

VOCABULARY, EOS, CLOSING = 12, 1, (5, 6)


def scripted(rows, *, closing=CLOSING, temperature=0.0, calls=None, eos_id=EOS):
    """Samples from logits that make each row likeliest to write its script; `calls` collects the steps decoded."""
    script = jnp.asarray(rows, jnp.int32)

    def logits(step):
        return 4.0 * jax.nn.one_hot(script[:, jnp.minimum(step, script.shape[1] - 1)], VOCABULARY)

    def decode(token, step, caches):
        if calls is not None:
            jax.debug.callback(lambda step: calls.append(int(step)), step)
        return logits(step + 1), caches

    samples = sample(
        decode,
        logits(0),
        (),
        jax.random.PRNGKey(0),
        max_new_tokens=script.shape[1],
        closing=closing,
        eos_id=eos_id,
        temperature=temperature,
    )
    jax.effects_barrier()
    return jax.tree.map(np.asarray, samples)


@pytest.mark.parametrize(
    ("stops", "lengths"), [((1, 7), [2, 3, 1]), ((7,), [6, 3, 1]), ((9, 9, 1), [2, 6, 6]), ((), [6, 6, 6])]
)
def test_a_row_stops_at_each_of_several_ends(stops, lengths):
    samples = scripted([[3, 1, 4, 4, 4, 4], [3, 4, 7, 4, 4, 4], [7, 3, 3, 3, 3, 3]], closing=(), eos_id=stops)
    np.testing.assert_array_equal(samples.lengths, lengths)


def test_a_row_stops_at_the_closing_tag_or_at_the_end_of_sequence():
    samples = scripted(
        [
            [3, 4, 5, 6, 7, 8],  # closed
            [3, 1, 5, 6, 7, 8],  # end of sequence
            [3, 4, 7, 8, 9, 4],  # the cap
            [5, 6, 7, 8, 9, 4],  # closed at once
            [5, 5, 6, 6, 5, 6],  # a beginning of the tag before the tag
            [6, 5, 4, 6, 5, 6],  # the tag at the cap
        ]
    )
    np.testing.assert_array_equal(samples.lengths, [4, 2, 6, 2, 3, 6])
    np.testing.assert_array_equal(samples.closed, [True, False, False, True, True, True])
    np.testing.assert_array_equal(
        samples.tokens,
        [
            [3, 4, 5, 6, 0, 0],
            [3, 1, 0, 0, 0, 0],
            [3, 4, 7, 8, 9, 4],
            [5, 6, 0, 0, 0, 0],
            [5, 5, 6, 0, 0, 0],
            [6, 5, 4, 6, 5, 6],
        ],
    )
    after_the_end = np.arange(6) >= samples.lengths[:, None]
    assert (samples.log_probs[after_the_end] == 0).all()
    assert (samples.log_probs[~after_the_end] < 0).all()


def test_without_a_closing_tag_only_the_end_of_sequence_stops_a_row():
    samples = scripted([[3, 5, 6, 1, 7], [3, 5, 6, 7, 8]], closing=())
    np.testing.assert_array_equal(samples.lengths, [4, 5])
    assert not samples.closed.any()


def test_a_tag_is_not_found_in_room_that_is_not_written_yet():
    # That room is zero, and the first token's window reaches into it.
    samples = scripted([[6, 3, 4, 7]], closing=(6, 0))
    np.testing.assert_array_equal(samples.lengths, [4])


def test_the_loop_ends_when_every_row_has():
    calls = []
    samples = scripted([[3, 5, 6] + [4] * 20, [1, 5, 6] + [4] * 20], calls=calls)
    np.testing.assert_array_equal(samples.lengths, [3, 1])
    assert len(calls) <= 3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_distribution_whose_log_probs_are_given(temperature):
    logits = np.random.default_rng(0).standard_normal(VOCABULARY).astype(np.float32)
    rows = 4000
    samples = sample(
        lambda token, step, caches: (jnp.tile(logits, (rows, 1)), caches),
        jnp.tile(logits, (rows, 1)),
        (),
        jax.random.PRNGKey(1),
        max_new_tokens=2,
        closing=(),
        eos_id=-1,
        temperature=temperature,
    )
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    np.testing.assert_allclose(samples.log_probs, np.log(expected)[samples.tokens], rtol=1e-5)
    for step in range(2):
        frequency = np.bincount(samples.tokens[:, step], minlength=VOCABULARY) / rows
        assert np.abs(frequency - expected).max() < 5 * (0.25 / rows) ** 0.5
    # Each step draws anew.
    assert (np.asarray(samples.tokens)[:, 0] != np.asarray(samples.tokens)[:, 1]).mean() > 0.5


def test_temperature_zero_takes_the_likeliest():
    assert scripted([[3, 4, 7, 8]]).tokens.tolist() == [[3, 4, 7, 8]]


@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-37, 1e-30, 1e-3])
def test_a_temperature_near_zero_takes_the_likeliest_too(temperature):
    """Its quotients overflow."""
    samples = scripted([[3, 4, 7, 8]], temperature=temperature)
    assert samples.tokens.tolist() == [[3, 4, 7, 8]]
    assert np.isfinite(samples.log_probs).all()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_token_that_is_ruled_out_is_never_drawn(temperature):
    logits = np.where(np.isin(np.arange(VOCABULARY), [2, 9]), 0.5, -np.inf).astype(np.float32)
    given = jnp.tile(logits, (64, 1))
    samples = sample(
        lambda token, step, caches: (given, caches),
        given,
        (),
        jax.random.PRNGKey(2),
        max_new_tokens=4,
        closing=(),
        eos_id=-1,
        temperature=temperature,
    )
    assert set(np.asarray(samples.tokens).ravel().tolist()) == ({2} if temperature == 0 else {2, 9})
    np.testing.assert_allclose(samples.log_probs, np.log(0.5), rtol=1e-6)


@pytest.mark.parametrize("size", [5, 256, 300])
def test_where_nothing_can_be_drawn_the_token_exists(size):
    uniform = jnp.array([0.0, 0.4, 0.99])
    for nothing in (jnp.nan, -jnp.inf):
        assert (np.asarray(categorical(uniform, jnp.full((3, size), nothing))) < size).all()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_cached_decoding_gives_the_teacher_forced_log_probs(kind, request, params, protocol):
    roles = request.getfixturevalue(f"{kind}_roles")
    base = params if kind == "lora" else {}
    trained = perturbed(init_encoder(roles, params, jax.random.PRNGKey(0)), 0)
    h = vectors(3, roles.encoder.arch.d_model)
    draw = jax.jit(
        lambda trained: rollout(
            roles, trained, {"base": base}, h, jax.random.PRNGKey(1), samples_per_activation=2, max_new_tokens=24
        )
    )
    samples = draw(trained)
    force = jax.jit(
        lambda trained, tokens: roles.encoder.apply(
            roles.encoder_variables(base, trained), h, tokens, method="log_probs"
        )
    )
    log_probs, entropy = force(trained, samples.tokens)
    real = np.arange(24) < np.asarray(samples.lengths)[..., None]
    assert real.sum() > 60
    assert len(set(np.asarray(samples.tokens)[real].tolist())) > 20
    np.testing.assert_allclose(np.asarray(log_probs)[real], np.asarray(samples.log_probs)[real], atol=1e-5)
    assert (np.asarray(entropy)[real] > 0).all()


WIDTH = 8
BLANK = np.zeros(VOCABULARY, bool)
BLANK[[2, 3]] = True
cut = jax.jit(lambda samples: explanation_tokens(samples, CLOSING, jnp.asarray(BLANK)))


def plain_cut(tokens, length, closed):
    """One row of `explanation_tokens` in plain Python."""
    ids = tokens[: length - len(CLOSING)] if closed else []
    while ids and BLANK[ids[0]]:
        ids = ids[1:]
    while ids and BLANK[ids[-1]]:
        ids = ids[:-1]
    return ids


@st.composite
def responses(draw):
    """Four rows (tokens, length, closed), as the sampler leaves them."""
    rows = []
    for _ in range(4):
        closed = draw(st.booleans())
        body = draw(st.lists(st.sampled_from([0, 2, 3, 4, 7]), max_size=WIDTH - len(CLOSING) if closed else WIDTH))
        tokens = [*body, *CLOSING] if closed else body
        rows.append((tokens + [0] * (WIDTH - len(tokens)), len(tokens), closed))
    return rows


@given(responses())
def test_explanations_are_cut_out_and_stripped(rows):
    tokens, lengths, closed = (np.array(column) for column in zip(*rows, strict=True))
    samples = Samples(tokens.astype(np.int32), np.zeros(tokens.shape, np.float32), lengths, closed)
    ids, length = jax.tree.map(np.asarray, cut(samples))
    assert ids.shape == (4, WIDTH - len(CLOSING))
    for row, (row_tokens, row_length, row_closed) in enumerate(rows):
        expected = plain_cut(row_tokens, row_length, row_closed)
        assert length[row] == len(expected)
        assert ids[row, : length[row]].tolist() == expected
        assert not ids[row, length[row] :].any()


def test_explanations_keep_the_batch_axes():
    tokens = np.array([[[4, 5, 6, 0], [5, 6, 0, 0]], [[2, 4, 5, 6], [7, 7, 7, 7]]], np.int32)
    lengths = np.array([[3, 2], [4, 4]])
    closed = np.array([[True, True], [True, False]])
    ids, length = cut(Samples(tokens, np.zeros(tokens.shape, np.float32), lengths, closed))
    np.testing.assert_array_equal(length, [[1, 0], [1, 0]])
    np.testing.assert_array_equal(ids, [[[4, 0], [0, 0]], [[4, 0], [0, 0]]])


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=700), st.floats(0, 1, exclude_max=True, width=32))
def test_a_draw_inverts_the_distribution_function(logits, uniform):
    logits = np.array(logits, np.float32)
    token = int(categorical(jnp.float32(uniform), jnp.asarray(logits)))
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    ends = np.cumsum(probabilities / probabilities.sum())
    assert probabilities[token] > 0
    assert (ends[token - 1] if token else 0.0) - 1e-5 <= uniform <= ends[token] + 1e-5


def test_draws_come_as_often_as_they_are_likely():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, 600), jnp.float32)
    draws = categorical(jax.random.uniform(jax.random.PRNGKey(0), (20000,)), jnp.broadcast_to(logits, (20000, 600)))
    found = np.bincount(np.asarray(draws), minlength=600) / 20000
    expected = np.asarray(jax.nn.softmax(logits))
    assert np.abs(found - expected).max() < 4 * np.sqrt(expected.max() / 20000)
    # A token without a chance is never drawn, not even at the end of a range.
    masked = jnp.where(jnp.arange(600) % 2 == 0, logits, -jnp.inf)
    assert (np.asarray(categorical(jnp.linspace(0, 1, 999, endpoint=False), jnp.tile(masked, (999, 1)))) % 2 == 0).all()


def test_targets_at_the_ends_of_ranges_take_tokens_with_a_chance():
    rng = np.random.default_rng(1)
    logits = np.where(rng.random((64, 1000)) < 0.02, rng.normal(0, 4, (64, 1000)), -np.inf).astype(np.float32)
    logits[:, 700:] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    ends = np.cumsum(weights, -1) / weights.sum(-1, keepdims=True)
    for column in range(0, 1000, 100):
        tokens = np.asarray(categorical(jnp.asarray(np.minimum(ends[:, column], 1 - 2**-24)), jnp.asarray(logits)))
        assert (np.take_along_axis(weights, tokens[:, None], -1) > 0).all()


def test_what_the_limit_cut_has_neither_closing_tag_nor_end():
    """Closed at the limit, ended at the limit, ended before it, closed before it, and cut."""
    rows = [[2, 3, 5, 6], [2, 3, 4, EOS], [2, EOS, 3, 4], [5, 6, 2, 2], [2, 3, 4, 5]]
    assert truncated(scripted(rows), EOS).tolist() == [False, False, False, False, True]
