"""Vectors and texts that explanations are compared with."""

import numpy as np
import pytest

from nlae_jax.evaluate.controls import isotropic_error, last_words, mean_vector, next_tokens_text, scaled
from nlae_jax.evaluate.reconstruction import direction_mse
from nlae_jax.evaluate.splice import ways
from tests.conftest import vectors


def lengths(v):
    return np.linalg.norm(v, axis=-1)


def test_what_is_spliced_is_as_long_as_the_activation():
    h = vectors(20, 16) * np.linspace(1, 5, 20)[:, None].astype(np.float32)
    rebuilt = vectors(20, 16, seed=1)
    for name, given in ways(h, rebuilt, np.ones(20, bool), np.roll(np.arange(20), 1), None, 0).items():
        np.testing.assert_allclose(lengths(given), 0 if name == "zero" else lengths(h), rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(scaled(h, h), h)


def test_an_isotropic_error_is_as_large_as_the_reconstructions():
    h, rebuilt = vectors(50, 16), vectors(50, 16, seed=1)
    turned = isotropic_error(h, rebuilt, 0)
    np.testing.assert_allclose(direction_mse(turned, h), direction_mse(rebuilt, h), atol=1e-5)
    assert np.abs(turned - isotropic_error(h, rebuilt, 1)).max() > 0.1
    np.testing.assert_allclose(isotropic_error(h, 3 * h, 0), h, atol=1e-3)


def test_what_cannot_be_read_is_the_mean_and_what_is_not_described_is_unknown():
    h, gold = vectors(6, 16), vectors(6, 16, seed=1)
    gold[2] = np.nan
    readable = np.arange(6) != 3
    given = ways(h, vectors(6, 16, seed=2), readable, np.roll(np.arange(6), 1), gold, 0)
    np.testing.assert_allclose(given["reconstruction"][3], mean_vector(h)[3])
    assert np.isnan(given["gold"][2]).all() and np.isfinite(np.delete(given["gold"], 2, 0)).all()


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_last_words_have_no_more_tokens_than_asked_for(tokenizer, count):
    context = "the of to in is that it for the of to in is that it for"
    kept = last_words(tokenizer, context, count)
    assert context.endswith(kept)
    assert len(tokenizer.encode(kept, add_special_tokens=False)) <= count or len(kept.split()) == 1
    longer = context[: -len(kept)].split()
    if longer:
        more = " ".join([longer[-1], kept])
        assert len(tokenizer.encode(more, add_special_tokens=False)) > count


def test_last_words_of_nothing(tokenizer):
    assert last_words(tokenizer, "  ", 5) == ""


def test_next_tokens_are_quoted():
    assert next_tokens_text([" of", "\n", " to", " in"], 3) == '"of", "to"'
