"""Other activations in the model's place: the true one changes nothing, and both ways of splicing agree."""

import jax
import numpy as np
import pytest

from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.runtime.errors import UserError
from tests.conftest import slow_but

LAYER, WIDTH = 0, 32


@pytest.fixture(scope="module")
def batch(arch):
    """Ids and mask [3, 32], padded on the right, and a position in each row."""
    rng = np.random.default_rng(0)
    lengths = np.array([32, 20, 9])
    mask = np.arange(WIDTH) < lengths[:, None]
    return np.where(mask, rng.integers(3, arch.vocab_size, mask.shape), 0), mask, np.array([20, 12, 4])


@pytest.fixture(scope="module")
def true(tiny_lm, batch):
    ids, mask, position = batch
    return np.asarray(tiny_lm.residual(ids, LAYER, mask))[np.arange(3), position]


def test_the_true_activation_changes_nothing(tiny_lm, batch, true):
    ids, mask, position = batch
    spliced = np.asarray(tiny_lm.run_with(ids, true, position, LAYER, mask))
    np.testing.assert_array_equal(spliced[mask], np.asarray(tiny_lm.logits(ids, mask))[mask])


def test_another_activation_changes_its_own_position_and_what_follows(tiny_lm, batch, true):
    ids, mask, position = batch
    plain, spliced = (
        np.asarray(x) for x in (tiny_lm.logits(ids, mask), tiny_lm.run_with(ids, -true, position, 0, mask))
    )
    changed = np.abs(plain - spliced).max(-1)
    before, after = (np.arange(WIDTH) < position[:, None]), (np.arange(WIDTH) >= position[:, None]) & mask
    assert changed[before].max() == 0
    assert changed[np.arange(3), position].min() > 0.1
    assert (changed[after] > 1e-4).mean() > 0.9


def test_positions_count_real_tokens_whatever_the_padding(tiny_lm, batch, true):
    ids, mask, position = batch
    right = np.asarray(tiny_lm.run_with(ids, -true, position, LAYER, mask))[mask]
    flip = lambda of: np.stack([np.roll(row, WIDTH - real.sum()) for row, real in zip(of, mask, strict=True)])  # noqa: E731
    left = np.asarray(tiny_lm.run_with(flip(ids), -true, position, LAYER, flip(mask)))[flip(mask)]
    np.testing.assert_allclose(left, right, atol=2e-5)
    one = tiny_lm.run_with(ids[:1], true[:1], 3, LAYER)
    np.testing.assert_allclose(one, tiny_lm.run_with(ids[:1], true[:1], [3], LAYER))


def cut(batch, following=6):
    """The batch as `splice` takes it: tokens before the position, and the position's with those that follow."""
    ids, mask, position = batch
    width = int(position.max())
    context_mask = np.arange(width) < position[:, None]
    columns = position[:, None] + np.arange(following + 1)
    read_mask = columns < mask.sum(-1)[:, None]
    read = np.take_along_axis(ids, np.minimum(columns, WIDTH - 1), axis=1)
    return ids[:, :width], context_mask, np.where(read_mask, read, 0), read_mask


def test_many_vectors_at_once_are_what_each_does_alone(tiny_lm, batch, true):
    ids, mask, position = batch
    context, context_mask, read, read_mask = cut(batch)
    given = np.stack([true, -true, np.roll(true, 1, axis=-1)], axis=1)
    h, kl, log_p = (np.asarray(x) for x in tiny_lm.splice(context, context_mask, read, read_mask, given, LAYER))
    np.testing.assert_allclose(h, true, atol=1e-5)
    softmax = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))  # noqa: E731
    plain = softmax(np.asarray(tiny_lm.logits(ids, mask), np.float64))
    for way in range(3):
        alone = softmax(np.asarray(tiny_lm.run_with(ids, given[:, way], position, LAYER, mask), np.float64))
        expected = (np.exp(plain) * (plain - alone)).sum(-1)
        for row in range(3):
            count = read_mask[row].sum()
            here = slice(position[row], position[row] + count)
            np.testing.assert_allclose(kl[row, way, :count], expected[row, here], atol=1e-4)
            rows = np.arange(position[row], position[row] + count - 1)
            np.testing.assert_allclose(
                log_p[row, 1 + way, : count - 1], alone[row, rows, ids[row, rows + 1]], atol=1e-4
            )
            np.testing.assert_allclose(log_p[row, 0, : count - 1], plain[row, rows, ids[row, rows + 1]], atol=1e-4)


def test_kl_of_the_true_activation_is_exactly_zero(tiny_lm, batch, true):
    context, context_mask, read, read_mask = cut(batch)
    other = np.stack([-true, true], axis=1)
    h, *_ = tiny_lm.splice(context, context_mask, read, read_mask, other, LAYER)
    _, kl, _ = tiny_lm.splice(context, context_mask, read, read_mask, np.stack([h, -true], axis=1), LAYER)
    assert (np.asarray(kl)[:, 0][read_mask] == 0).all()
    assert (np.asarray(kl)[:, 1, 0] > 0.01).all()


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-3), ("bfloat16", 2e-2), ("float16", 2e-3)])
def test_what_is_within_rounding_is_the_true_activation_in_every_dtype(tiny_lm, batch, dtype, rounding):
    lm = LanguageModel(tiny_lm.arch, jax.tree.map(lambda x: x.astype(dtype), tiny_lm.params), tiny_lm.tokenizer)
    context, context_mask, read, read_mask = cut(batch)
    read_with = lambda h: lm.splice(context, context_mask, read, read_mask, h, LAYER)  # noqa: E731
    h = np.asarray(read_with(np.ones((3, 1, tiny_lm.arch.d_model), np.float32)).h)
    away = np.random.default_rng(0).standard_normal(h.shape)
    away *= np.linalg.norm(h, axis=-1, keepdims=True) / np.linalg.norm(away, axis=-1, keepdims=True)
    kl = np.asarray(read_with(np.stack([h + 0.8 * rounding * away, h + 20 * rounding * away], axis=1)).kl)
    assert (kl[:, 0][read_mask] == 0).all() and (kl[:, 1, 0] > 0).all()


def test_continuations_are_scored_as_the_model_scores_them(tiny_lm, arch):
    rng = np.random.default_rng(1)
    notes, notes_mask = rng.integers(3, arch.vocab_size, (2, 8)), np.arange(8) < np.array([[8], [5]])
    after, lengths = rng.integers(3, arch.vocab_size, (2, 3, 4)), np.array([[4, 4, 2], [4, 1, 3]])
    after_mask = np.arange(4) < lengths[..., None]
    scores = np.asarray(
        tiny_lm.continuations(np.where(notes_mask, notes, 0), notes_mask, after * after_mask, after_mask)
    )
    for row in range(2):
        for way in range(3):
            prompt = [*notes[row, : notes_mask[row].sum()], *after[row, way, : lengths[row, way]]]
            logits = np.asarray(tiny_lm.logits([prompt]), np.float64)[0]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            start = notes_mask[row].sum()
            expected = sum(log_p[start + i - 1, prompt[start + i]] for i in range(lengths[row, way]))
            assert scores[row, way] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 9}, "layer: 9 should be from 0 to 1"),
        ({"position": 32}, "position: 32 of row 0 should be from 0 to 31"),
        ({"position": -1}, "position: -1 of row 0"),
        ({"position": 1.5}, "position: should be a whole number"),
        ({"position": [1, 2]}, "position: should be a whole number, or one for each row"),
        ({"h": np.zeros((1, 4))}, "h: shape"),
    ],
)
def test_what_cannot_be_spliced_is_refused(tiny_lm, batch, true, change, message):
    given = {"h": true[:1], "position": 3, "layer": LAYER, **change}
    with pytest.raises(UserError, match=message):
        tiny_lm.run_with(batch[0][:1], **given)


FAMILIES = [
    "llama-biases-llama3",
    "mistral-window",
    "qwen2-window",
    "qwen3",
    "gemma2",
    "gemma3-ropes",
    "smollm3",
    "olmo2",
    "gpt2",
    "qwen3_moe",
    "gpt_oss",
    "qwen3_5_text",
]


@pytest.mark.parametrize("case", slow_but(["gemma3-ropes", "gpt2", "qwen3_5_text"], FAMILIES))
def test_every_family_splices(tmp_path, tokenizer, case):
    """The true activation changes nothing, and sharing the context's keys changes nothing either."""
    pytest.importorskip("torch")
    from tests.test_families import batch_of, loaded

    arch, params = loaded(tmp_path, case)
    lm = LanguageModel(arch, params, tokenizer)
    (ids, _), layer, position = batch_of(), 1, np.array([9, 7])
    ids = ids[:2]
    true = np.asarray(lm.residual(ids, layer))[np.arange(2), position]
    plain = np.asarray(lm.logits(ids), np.float64)
    spliced = np.asarray(lm.run_with(ids, true, position, layer), np.float64)
    np.testing.assert_allclose(spliced, plain, atol=1e-5 * np.abs(plain).max())
    other = np.roll(true, 1, axis=-1)
    changed = np.asarray(lm.run_with(ids, other, position, layer), np.float64)
    assert np.abs(changed - plain).max() > 1e-2 * np.abs(plain).max()
    columns = position[:, None] + np.arange(6)
    context_mask = np.arange(9) < position[:, None]
    read = np.take_along_axis(ids, columns, axis=1)
    *_, log_p = lm.splice(
        ids[:, :9] * context_mask, context_mask, read, np.ones(read.shape, bool), other[:, None], layer
    )
    for row in range(2):
        at = position[row] + np.arange(5)
        for way, logits in enumerate((plain, changed)):
            expected = logits[row, at] - np.log(np.exp(logits[row, at]).sum(-1, keepdims=True))
            np.testing.assert_allclose(log_p[row, way, :5], expected[np.arange(5), ids[row, at + 1]], atol=1e-3)
