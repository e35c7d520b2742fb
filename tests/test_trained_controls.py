"""Decoders trained alike on explanations, last words and next tokens, for adapters and for whole models."""

import copy

import numpy as np
import pytest

from nlae_jax.evaluate.figures import SECTIONS
from nlae_jax.evaluate.rows import without_following
from nlae_jax.evaluate.trained_controls import STEPS, _padded, _Trainer, default_steps, trained_controls
from nlae_jax.evaluate.work import Work
from nlae_jax.roles.pair import Pair
from tests.planted_pairs import SIZES, planted, planted_rows


@pytest.fixture(scope="module")
def rows(tiny_lm):
    return planted_rows(tiny_lm, 32)


@pytest.fixture
def work(tiny_lm, rows, tmp_path):
    said = lambda row, number: " ".join(rows.contexts[row].split()[-4:])  # noqa: E731
    pair = planted(tiny_lm, rows, said, lambda text: rows.h[len(text) % len(rows.h)], "words")
    return Work(pair, rows, tmp_path, 0, 50, SIZES)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_decoder_is_trained_for_each_kind_of_words(work, rows, params, make_tiny_roles, rank):
    roles = make_tiny_roles(lora__rank=rank)
    before = np.asarray(params["final_norm"]).copy()
    trained_controls(work, roles, Pair(params if rank else {}, {}, {}), 3)
    parts = work.ledger.sections["text"]["trained_decoder"]["parts"]
    assert set(parts) == {"explanations", "last_words", "next_tokens"}
    held_out = sum(int(document) in np.unique(rows.document)[::4] for document in rows.document)
    assert {part["n"] for part in parts.values()} == {held_out}
    assert all(np.isfinite(part["value"]) for part in parts.values())
    assert len({part["value"] for part in parts.values()}) > 1
    beyond = {name: work.ledger.sections["text"][f"beyond_{name}"] for name in ("last_words", "next_tokens")}
    for name, figure in beyond.items():
        # On the same rows, so that the difference of the figures is the figure of the differences.
        assert figure["value"] == pytest.approx(parts["explanations"]["value"] - parts[name]["value"])
        assert figure["n"] == held_out and figure["ci95"][0] <= figure["value"] <= figure["ci95"][1]
    # These explanations are the last four words.
    assert abs(beyond["last_words"]["value"]) < abs(beyond["next_tokens"]["value"])
    np.testing.assert_array_equal(params["final_norm"], before)  # the subject's own weights are not given away


def test_words_that_spell_a_token_without_an_embedding_are_read_without_it(work, params, make_tiny_roles, monkeypatch):
    """JAX would take the table's last row for it."""
    roles, extra = make_tiny_roles(lora__rank=4), "<extra39>"
    tokenizer = copy.deepcopy(work.pair.tokenizer)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(40)])
    assert max(tokenizer.encode(extra)) >= roles.decoder.arch.vocab_size
    monkeypatch.setattr(work, "pair", work.pair._replace(tokenizer=tokenizer))
    test, trainer = np.arange(len(work.rows.h)) < 3, _Trainer(work, roles, Pair(params, {}, {}), 1)
    texts = ([said] * len(test) for said in ("the moon", f"the moon{extra}"))
    np.testing.assert_array_equal(*(trainer.rebuilt("words", said, test) for said in texts))


def test_decoders_of_the_same_texts_are_the_same_whatever_is_beside_them(work, params, make_tiny_roles):
    """Texts of held-out documents change nothing in training, and each row gets the reconstruction of its own text."""
    trainer = _Trainer(work, make_tiny_roles(lora__rank=4), Pair(params, {}, {}), 2)
    test = np.arange(len(work.rows.h)) % 4 == 1
    texts = [f"{'moon ' * (row % 7)}{row}" for row in range(len(test))]
    found = trainer.rebuilt("words", texts, test)
    assert found.shape == (test.sum(), work.rows.h.shape[1]) and len(np.unique(found, axis=0)) == len(found)
    alike = [texts[5] if held_out else text for text, held_out in zip(texts, test, strict=True)]
    np.testing.assert_allclose(trainer.rebuilt("words", alike, test), np.repeat(found[1:2], test.sum(), 0), atol=1e-4)
    assert trainer._step._cache_size() == 1  # every batch is padded to the same length


def test_batches_have_few_lengths():
    lengths = range(1, 300)
    ids, found = zip(*(_padded([[5], [7] * length], 0) for length in lengths), strict=True)
    assert {array.shape[1] for array in ids} == {32, 64, 128, 256, 512}
    assert [length.tolist() for length in found] == [[1, length] for length in lengths]
    assert all(array.shape[1] < 2 * max(length, 32) for array, length in zip(ids, lengths, strict=True))


def test_a_prompt_that_fills_the_decoder_is_not_padded():
    assert [_padded([[7] * length], 100)[0].shape[1] for length in (20, 60, 65, 100)] == [32, 64, 100, 100]


def rows_like(count, documents, without_text=0):
    ids = [[1, 2]] * (count - without_text) + [[]] * without_text
    texts = [str(len(context)) for context in ids]
    return without_following(np.zeros((count, 2)), np.arange(count) % documents, ids, texts, ["text"] * count)


@pytest.mark.parametrize(
    ("sections", "rows", "expected"),
    [
        (SECTIONS, rows_like(512, 40), STEPS),
        (("text",), rows_like(128, 4), STEPS),
        (("truth", "meaning"), rows_like(512, 40), 0),
        (SECTIONS, rows_like(127, 40), 0),
        (SECTIONS, rows_like(512, 3), 0),  # none could be held out
        (SECTIONS, rows_like(512, 40, without_text=512), 0),
        (SECTIONS, rows_like(512, 40, without_text=1), 0),
    ],
)
def test_decoders_are_trained_by_default_where_there_is_enough_to_train_on(sections, rows, expected):
    assert default_steps(sections, rows) == expected


def test_without_steps_or_texts_nothing_is_trained(work, rows, tiny_lm, make_tiny_roles, tmp_path, capsys):
    roles = make_tiny_roles(lora__rank=4)
    trained_controls(work, roles, Pair({}, {}, {}), 0)
    bare = Work(work.pair, rows._replace(context_ids=[[]] * 32), tmp_path, 0, 50, SIZES)
    trained_controls(bare, roles, Pair({}, {}, {}), 3)
    assert not work.ledger.sections and not bare.ledger.sections
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: --control-steps: no decoder is trained")
