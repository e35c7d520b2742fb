"""A map between two models' activations: alignment, regression, scores, and a pair that explains another model."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import nlae_jax
from nlae_jax.cli import main
from nlae_jax.data.corpus import document_of
from nlae_jax.interop.adapt import (
    ABOUT,
    MAP,
    MIN_POSITION,
    Adapter,
    adapt,
    fit,
    is_adapter,
    mean_scores,
    read_adapter,
    read_pairs,
    scores,
    shared_ends,
    tokenise,
    write_adapter,
)
from nlae_jax.lm.tiny import tiny_tokenizer, write_tiny_model
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.runtime.errors import UserError
from tests.conftest import of_few_tokens

pytest_plugins = ["tests.tiny_run"]

TEXT = "The array of strings is a list, and it ends with the values that in turn are numbers; the function returns. "


@given(st.lists(st.integers(1, 30)), st.lists(st.integers(1, 30)))
def test_tokens_that_end_together(first, second):
    first, second = sorted(first), sorted(second)
    pairs = shared_ends(first, second)
    assert [first[one] for one, _ in pairs] == [second[other] for _, other in pairs]
    assert sorted({first[one] for one, _ in pairs}) == sorted(set(first) & set(second))
    assert all(first[one + 1 :].count(first[one]) == 0 for one, _ in pairs)
    assert all(second[other + 1 :].count(second[other]) == 0 for _, other in pairs)


def test_both_models_have_read_the_same_text_there(tiny_lm):
    ids, ends = tokenise(tiny_lm, TEXT + "¿é…", "tiny")
    assert tiny_lm.tokenizer.decode(ids) == TEXT + "¿é…"
    for index in (3, 10, 20):
        assert tiny_lm.tokenizer.decode(ids[: index + 1]) == (TEXT + "¿é…")[: ends[index]]


@pytest.mark.parametrize("rows", [60, 9])
def test_ridge_regression_is_its_closed_form(rows):
    """With more rows than columns, and with fewer."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, [1, 5, 0.1, 9, 1, 1, 1, 1, 1, 1, 1, 1], (rows, 12)), rng.normal(2, 1, (rows, 4))
    scaled = (x - x.mean(0)) / x.std(0)
    for penalty in (1e-3, 1.0):
        gram = scaled.T @ scaled + penalty * rows * np.eye(12)
        expected = np.linalg.solve(gram, scaled.T @ (y - y.mean(0))) / x.std(0)[:, None]
        np.testing.assert_allclose(fit(x, y)(penalty), expected, rtol=1e-6, atol=1e-9)


def test_what_is_linear_is_found_and_what_is_not_shared_is_not():
    rng = np.random.default_rng(1)
    shared, own, other = (rng.normal(size=(400, width)) for width in (6, 3, 6))
    h, documents = np.concatenate([shared, own], 1) @ rng.normal(size=(9, 14)) + 5, np.repeat(np.arange(100), 4)
    target = shared @ rng.normal(size=(6, 8))
    _, found = adapt(h.astype(np.float32), target.astype(np.float32), documents)
    assert found["map"]["fve"] > 0.98 and found["map"]["cos"] > 0.99
    assert abs(found["mean"]["fve"]) < 0.2 and found["chance"]["fve"] < 0.1 and found["random_map"]["fve"] < 0.1
    assert (found["fitted_on"], found["held_out"], found["documents"]) == (360, 40, 100)
    _, lost = adapt(h.astype(np.float32), (other @ rng.normal(size=(6, 8))).astype(np.float32), documents)
    assert lost["map"]["fve"] < 0.1, "nothing is shared: an honest score says so"
    with pytest.raises(UserError, match="too few"):
        adapt(h[:8], target[:8], documents[:8])


@pytest.mark.parametrize("counts", [[4] * 20, [*[4] * 18, 9, 3]])
def test_chance_is_never_the_own_documents_prediction(counts):
    """Each document's rows are alike and unlike any other's: of its own, even a rotated prediction would be right."""
    rng = np.random.default_rng(2)
    documents = np.repeat(np.arange(20), counts)
    h = (np.repeat(rng.normal(size=(20, 6)), counts, 0) + 0.01 * rng.normal(size=(len(documents), 6))).astype(
        np.float32
    )
    _, found = adapt(h, h, documents)
    assert found["map"]["fve"] > 0.9 and found["chance"]["fve"] < -1


def test_every_part_takes_two_documents():
    h = np.random.default_rng(0).normal(size=(76, 6)).astype(np.float32)
    with pytest.raises(UserError, match="are 15, 1, 2, too few; each takes two"):
        adapt(h, h, np.repeat(np.r_[:15, 16:19], [4] * 17 + [8]))


def test_the_mean_of_directions_explains_nothing():
    target = np.random.default_rng(0).normal(1, 1, (50, 8)).astype(np.float32)
    assert scores(target, target) == pytest.approx({"fve": 1.0, "cos": 1.0}, abs=1e-6)
    unit = target / np.linalg.norm(target, axis=1, keepdims=True)
    mean = unit.mean(0) / np.linalg.norm(unit.mean(0))
    assert mean_scores(target, target) == pytest.approx({"fve": 0.0, "cos": float((unit @ mean).mean())}, abs=1e-6)


def test_a_map_is_read_back_equal(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((5, 3), (5,), (3,))]
    made = Adapter("some/model", 4, "smollm2-135m", *arrays)
    write_adapter(tmp_path / "A", made, {"map": {"fve": 0.5}})
    back = read_adapter(tmp_path / "A")
    assert is_adapter(tmp_path / "A") and (back.model, back.layer, back.to) == ("some/model", 4, "smollm2-135m")
    h = rng.normal(size=(2, 5)).astype(np.float32)
    np.testing.assert_array_equal(made(h), back(h))
    about = json.loads((tmp_path / "A" / ABOUT).read_text())
    (tmp_path / "A" / ABOUT).write_text(json.dumps(about | {"width": 6}))
    with pytest.raises(UserError, match="matrix"):
        read_adapter(tmp_path / "A")
    (tmp_path / "A" / ABOUT).write_text(json.dumps(about | {"layer": "4"}))
    with pytest.raises(UserError, match="layer should be a int"):
        read_adapter(tmp_path / "A")


def test_a_map_whose_files_do_not_belong_together_is_refused(tmp_path):
    """A flipped bit, the file of another map, or none at all."""
    arrays = [np.ones(shape, np.float32) for shape in ((5, 3), (5,), (3,))]
    for name, layer in (("A", 4), ("B", 5)):
        write_adapter(tmp_path / name, Adapter("some/model", layer, "smollm2-135m", *arrays), {})
        arrays[0] = arrays[0] * 2
    path = tmp_path / "A" / MAP
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    for content in (bytes(data), (tmp_path / "B" / MAP).read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"A/map\.safetensors: not as adapt\.json says"):
            read_adapter(tmp_path / "A")
    path.unlink()
    with pytest.raises(UserError, match=r"map\.safetensors: missing"):
        read_adapter(tmp_path / "A")


@pytest.mark.parametrize("name", ["A", "B"])
def test_a_map_to_a_map_has_no_end(tmp_path, name):
    arrays = [np.ones(shape, np.float32) for shape in ((3, 3), (3,), (3,))]
    write_adapter(tmp_path / "B", Adapter("some/model", 1, "smollm2-135m", *arrays), {})
    write_adapter(tmp_path / "A", Adapter("some/model", 1, str(tmp_path / name), *arrays), {})
    with pytest.raises(UserError, match=r"A/adapt\.json: to: .* is a map too"):
        nlae_jax.NLA.from_pretrained(tmp_path / "A")


def test_a_text_that_begins_as_sequences_do_has_one_beginning(tiny_lm):
    """As chat templates write it. Places end where they did."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), bos_token="<|endoftext|>")
    begin = ("<|endoftext|>", 0)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[begin]
    )
    model = LanguageModel(tiny_lm.arch, tiny_lm.params, tokenizer)
    ids, ends = tokenise(model, TEXT, "--model")
    again, shifted = tokenise(model, begin[0] + TEXT, "--model")
    assert ids == again and ids[0] == 0 and ids[1] != 0
    assert [end - len(begin[0]) for end in shifted[1:]] == ends[1:]


def test_where_a_map_goes_is_looked_at_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = ["adapt", "--model", "random:tiny", "--layer", "0", "--to", "/no/such/pair"]
    for out in ("file", "file/below"):
        assert main([*command, "--out", str(tmp_path / out)]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("nlae: --out ")


def test_activations_of_a_model_and_itself_are_equal(tiny_lm):
    documents = [document_of(TEXT * count) for count in (1, 2, 3)]
    h, target, number = read_pairs(tiny_lm, 1, tiny_lm, 1, documents, positions=5)
    np.testing.assert_array_equal(h, target)
    assert number.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    with pytest.raises(UserError, match="no text in which tokens of both models end together"):
        read_pairs(tiny_lm, 1, tiny_lm, 1, [document_of(TEXT[:MIN_POSITION])], positions=5)


def test_a_model_of_few_tokens_reads_the_beginning(tiny_lm):
    """A text is cut to what each model can be run on, and padded no further."""
    short = LanguageModel(of_few_tokens(tiny_lm.arch, 100), tiny_lm.params, tiny_lm.tokenizer)
    documents = [document_of(TEXT * count) for count in (2, 9)]
    ids, ends = tokenise(short, documents[1].text, "short")
    assert len(ids) == len(ends) == 100 and ids == tokenise(tiny_lm, documents[1].text, "long")[0][:100]
    h, target, number = read_pairs(short, 1, tiny_lm, 1, documents, positions=200)
    np.testing.assert_allclose(h, target, rtol=1e-4, atol=1e-5)
    assert (number == 1).sum() == 100 - MIN_POSITION


def test_a_pair_explains_another_model(tiny_run, tmp_path, capsys):
    """`adapt`, then `explain --model` as of any pair: the tokens are the other model's."""
    pair, other, texts = tmp_path / "pair", tmp_path / "other", tmp_path / "texts"
    assert main(["export", "--workdir", str(tiny_run.workdir), "--out", str(pair), "--dtype", "float32"]) == 0
    write_tiny_model(other, seed=7)
    texts.mkdir()
    for number in range(40):
        words = np.random.default_rng(number).permutation(TEXT.split())
        (texts / f"{number}.txt").write_text(" ".join(words) * 4)
    out = tmp_path / "map"
    command = ["adapt", "--model", str(other), "--layer", "1", "--to", str(pair), "--out", str(out), "--json"]
    capsys.readouterr()
    assert main([*command, "--texts", f"{texts}/*.txt", "--places", "4"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["documents"] == 40 and {"map", "mean", "chance", "random_map"} < result.keys()
    assert result["map"]["fve"] > result["chance"]["fve"]
    assert main(["explain", "--model", str(out), "--text", "the list of values", "--json"]) == 0
    shown = capsys.readouterr()
    tokens = json.loads(shown.out)["tokens"]
    assert "".join(token["token"] for token in tokens) == "the list of values"
    assert "reads what the two models share" in shown.err

    nla, model = nlae_jax.NLA.from_pretrained(out), LanguageModel.from_pretrained(str(other))
    ids = [model.tokenizer.encode("the list of values")]
    vectors = nla.adapter(np.asarray(model.residual(ids, 1))[0])
    _, cos = nla.score([token["explanation"] for token in tokens], vectors)
    np.testing.assert_allclose(cos, [token["cos"] for token in tokens], atol=1e-5)
    with pytest.raises(UserError, match="a map to another model's pair"):
        nla.check_own_subject("steer")
    assert main([*command[:4], "9", *command[5:], "--texts", f"{texts}/*.txt"]) == 2
    assert "--layer: 9 should be from 0 to 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def mapped(tiny_run, tmp_path_factory):
    """The run's pair behind a map from its own subject's block 1."""
    root = tmp_path_factory.mktemp("mapped")
    assert main(["export", "--workdir", str(tiny_run.workdir), "--out", str(root / "pair"), "--dtype", "float32"]) == 0
    write_tiny_model(root / "other", seed=7)
    width = nlae_jax.NLA.from_pretrained(root / "pair").d_model
    zeros = np.zeros(width, np.float32)
    adapter = Adapter(str(root / "other"), 1, str(root / "pair"), np.eye(width, dtype=np.float32), zeros, zeros)
    write_adapter(root / "map", adapter, {})
    return root / "map", adapter


def test_a_map_is_not_evaluated_as_a_pair_of_its_own(mapped, tmp_path):
    nla = nlae_jax.NLA.from_pretrained(mapped[0])
    with pytest.raises(UserError, match=r"^eval: .* is a map to another model's pair"):
        nla.evaluate(tmp_path / "E", texts=[TEXT])
    assert not (tmp_path / "E").exists()


def test_a_map_reads_the_model_that_it_was_fitted_on(mapped, tmp_path):
    directory, adapter = mapped
    nla, pair = nlae_jax.NLA.from_pretrained(directory), nlae_jax.NLA.from_pretrained(adapter.to)
    vectors = np.random.default_rng(0).normal(size=(2, nla.width_read)).astype(np.float32)
    np.testing.assert_array_equal(nla.mapped(vectors), adapter(vectors))
    np.testing.assert_array_equal(pair.mapped(vectors), vectors)
    assert nla.rebuilds == pair.rebuilds and nla.subject_name == adapter.model
    with pytest.raises(UserError, match=r"^subject: .* takes no other subject"):
        nlae_jax.NLA.from_pretrained(directory, subject=adapter.model)
    width = len(adapter.mean)
    wide = np.zeros((width + 1, width), np.float32)
    for wrong, block in (
        (dataclasses.replace(adapter, layer=9), "block 9"),
        (dataclasses.replace(adapter, matrix=wide, mean=np.zeros(width + 1, np.float32)), f"of width {width + 1}"),
    ):
        write_adapter(tmp_path / block, wrong, {})
        with pytest.raises(UserError, match=f"the map reads .*{block}"):
            nlae_jax.NLA.from_pretrained(tmp_path / block).explain_text("the list")
