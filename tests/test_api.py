"""What a notebook does with a finished run: explain, rebuild and score, with the workdir left as it is."""

import fcntl
import hashlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import processors

import nlae_jax
from nlae_jax.config import MeshConfig, resolve
from nlae_jax.data.corpus import Document
from nlae_jax.data.index import make_index
from nlae_jax.explore import explainer
from nlae_jax.lm.pretrained import load_tokenizer
from nlae_jax.mesh import make_mesh, place, replicated
from nlae_jax.roles.roundtrip import RoundTrip
from nlae_jax.runtime.errors import UserError

pytest_plugins = ["tests.tiny_run"]


def contents(workdir):
    return {
        str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in workdir.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def nla(tiny_run):
    return nlae_jax.NLA.from_workdir(tiny_run.workdir)


@pytest.fixture(scope="module")
def vectors(nla):
    ids = nla.subject.tokenizer.encode("the of to in is that it for", return_tensors="np")
    return nla.subject.residual(ids, layer=nla.layer)[0]


@pytest.fixture
def copied(tiny_run, tmp_path):
    return shutil.copytree(tiny_run.workdir, tmp_path / "W")


def damage(checkpoint):
    file = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


def test_explaining_needs_no_activations(nla, copied):
    """They may be gone: a pair and its prompts are all that is read."""
    shutil.rmtree(copied / "activations")
    vectors = np.eye(2, nla.subject.arch.d_model, dtype=np.float32)
    bare = nlae_jax.NLA.from_workdir(copied)
    assert bare.explain(vectors) == nla.explain(vectors)
    assert bare.run_texts(4) == () and len(nla.run_texts(4)) == 4
    assert "come with the package" in bare.description()["statistics_of"]


def test_explanations_are_scored_by_what_they_rebuild(nla, vectors):
    texts = nla.explain(vectors, max_new_tokens=48)
    assert len(texts) == len(vectors)
    assert any(texts)
    mse, cos = nla.score(texts, vectors)
    np.testing.assert_allclose(mse, 2 * (1 - cos), atol=1e-6)
    rebuilt, h = nla.reconstruct(texts), np.asarray(vectors)
    assert rebuilt.shape == h.shape
    expected = (rebuilt * h).sum(-1) / np.linalg.norm(rebuilt, axis=-1) / np.linalg.norm(h, axis=-1)
    readable = np.array([bool(text) for text in texts])
    np.testing.assert_allclose(cos[readable], expected[readable], atol=1e-5)
    np.testing.assert_array_equal(mse[~readable], 2.0)


def test_sampling_follows_the_seed(nla, vectors):
    one, two, again = (nla.explain(vectors, temperature=1.0, max_new_tokens=48, seed=seed) for seed in (1, 2, 1))
    assert one == again
    assert one != two


@pytest.mark.parametrize("shape", [(3,), (2, 5), (0, 64), (1, 2, 64)])
def test_vectors_of_a_wrong_shape(nla, shape):
    with pytest.raises(UserError, match="vectors"):
        nla.explain(np.zeros(shape, np.float32))


def test_vectors_of_any_library_and_dtype(nla, vectors):
    torch = pytest.importorskip("torch")
    few = np.asarray(vectors)[:2]
    tensor = torch.tensor(few)
    expected = nla.explain(few.astype(jnp.bfloat16), max_new_tokens=8)
    rows = list(tensor.to(torch.bfloat16))
    for given in (
        tensor.to(torch.bfloat16),
        tensor.to(torch.bfloat16).requires_grad_(),
        rows,
        tuple(rows),
        jnp.asarray(few, jnp.bfloat16),
        few.astype(jnp.bfloat16).astype(np.float64).tolist(),
        [jnp.asarray(row, jnp.bfloat16) for row in few],
        tensor.to(torch.bfloat16).to_sparse(),
    ):
        assert nla.explain(given, max_new_tokens=8) == expected
    mse, _ = nla.score(["the", "of"], tensor.to(torch.float16))
    np.testing.assert_allclose(mse, nla.score(["the", "of"], few)[0], atol=1e-2)
    for kind in (torch.float8_e4m3fn, torch.int8, torch.float64):
        nla.explain(tensor.to(kind), max_new_tokens=8)


@pytest.mark.parametrize(
    "wrong",
    [
        "text",
        None,
        [["a"] * 64],
        [[1.0] * 64, [1.0] * 63],
        np.zeros((1, 64), np.complex64),
        np.zeros((1, 64), bool),
        np.full((1, 64), 1e300),
        np.full((1, 64), np.nan),
        np.array([[None] * 64]),
    ],
)
def test_vectors_that_are_no_numbers(nla, wrong):
    with pytest.raises(UserError, match="vectors: ") as caught:
        nla.explain(wrong)
    assert len(str(caught.value)) < 300


def test_tensors_that_are_no_numbers(nla):
    torch = pytest.importorskip("torch")
    for wrong in (torch.zeros(1, 64, dtype=torch.complex64), torch.zeros(1, 64, device="meta")):
        with pytest.raises(UserError, match="vectors: should be an array of numbers"):
            nla.explain(wrong)


def test_everything_is_compiled_for_one_round_trip(nla, vectors, monkeypatch):
    """It tokenises the vocabulary; and a second explanation of another length is none."""
    made = []
    monkeypatch.setattr(explainer, "RoundTrip", lambda *given: made.append(given) or RoundTrip(*given))
    fresh = nlae_jax.NLA(nla._roles, nla._pair, nla.tokenizer, lambda: nla.subject, nla.max_new_tokens, nla._mesh)
    fresh.explain_text("the of")
    fresh.reconstruct(["the"])
    short, long = (fresh.explain(np.asarray(vectors)[:2], max_new_tokens=limit) for limit in (8, 48))
    assert len(made) == 1
    assert short == ["", ""] and long == nla.explain(np.asarray(vectors)[:2], max_new_tokens=48)


def test_the_mesh_is_used(tiny_run, nla, vectors):
    """The pair's parameters and its batches lie on it, and results are the same."""
    assert nla._trip._mesh is nla._mesh is not None
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    pair = jax.tree.map(lambda leaf: place(np.asarray(leaf), replicated(mesh)), nla._pair)
    split = nlae_jax.NLA(nla._roles, pair, nla.tokenizer, lambda: nla.subject, nla.max_new_tokens, mesh)
    few = np.asarray(vectors)[:3]
    assert split.explain(few, max_new_tokens=48) == nla.explain(few, max_new_tokens=48)
    np.testing.assert_allclose(split.reconstruct(["the of"]), nla.reconstruct(["the of"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["$A", "<|endoftext|> $A", "<|endoftext|> $A <|im_end|>"])
def test_a_text_is_explained_as_extraction_reads_it(nla, tiny_dir, rule):
    """One beginning, whether the tokenizer adds it or a chat template wrote it, and no end."""
    tokenizer = load_tokenizer(tiny_dir)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|endoftext|>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(rule, special_tokens=special)
    reading = nlae_jax.NLA(nla._roles, nla._pair, tokenizer, lambda: nla.subject, nla.max_new_tokens, nla._mesh)
    for text in ("of the list", "<|endoftext|>of the list"):
        documents = [Document(f"{n}", text) for n in range(4)]
        (ids, *_) = make_index(documents, tokenizer, resolve({"extract.min_position": 1})).ids
        tokens = [token["token"] for token in reading.explain_text(text)]
        assert tokens == [tokenizer.decode([index]) for index in ids]
        assert tokens.count("<|endoftext|>") == (rule != "$A" or text.startswith("<"))
        assert "<|im_end|>" not in tokens


def test_tokens_that_the_model_lacks_are_named(nla, tiny_dir):
    tokenizer = load_tokenizer(tiny_dir)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(20)])
    more = nlae_jax.NLA(nla._roles, nla._pair, tokenizer, lambda: nla.subject, nla.max_new_tokens, nla._mesh)
    with pytest.raises(UserError, match="text: the token '<extra19>' has id"):
        more.explain_text("of <extra19>")
    with pytest.raises(UserError, match="text 1: the token '<extra19>' has id"):
        more.reconstruct(["of", "of <extra19>"])
    # What was sampled is not refused: a run would end with all its work done.
    cut = more._trip.reconstruct_texts(more._pair, ["of<extra19>"])
    np.testing.assert_allclose(cut, nla.reconstruct(["of"]), rtol=1e-4, atol=1e-4)


def test_half_a_surrogate_pair_is_read_as_the_sign_for_it(nla):
    np.testing.assert_array_equal(nla.reconstruct(["a \ud83d"]), nla.reconstruct(["a \ufffd"]))
    assert nla.explain_text("\ud83d") == nla.explain_text("\ufffd")


def test_one_text_is_no_list_of_texts(nla):
    with pytest.raises(UserError, match="texts: should be a list"):
        nla.reconstruct("the of")


def test_texts_and_vectors_of_different_numbers(nla, vectors):
    with pytest.raises(UserError, match="one each"):
        nla.score(["a"], vectors)


def test_nothing_to_rebuild(nla, vectors):
    assert nla.reconstruct([]).shape == (0, vectors.shape[1])


def test_a_limit_that_no_explanation_fits(nla, vectors):
    with pytest.raises(UserError, match="max_new_tokens: 2 should be more than"):
        nla.explain(vectors, max_new_tokens=2)


def test_a_text_that_is_too_long(nla):
    with pytest.raises(UserError, match="at most 2048"):
        nla.explain_text("the of " * 2000)


def test_nothing_in_the_workdir_changes(copied, vectors):
    before = contents(copied)
    nlae_jax.NLA.from_workdir(copied).explain(vectors, max_new_tokens=48)
    assert contents(copied) == before


def test_a_run_may_go_on_meanwhile(copied):
    with (copied / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the process that trains holds it
        nlae_jax.NLA.from_workdir(copied)


def test_the_pair_before_rl_is_used_until_rl_has_finished(copied, nla, vectors):
    shutil.rmtree(copied / "checkpoints/rl")
    warm = nlae_jax.NLA.from_workdir(copied)
    assert not np.array_equal(warm.reconstruct(["the of"]), nla.reconstruct(["the of"]))


@pytest.mark.parametrize("stage", ["rl", "encoder_sft"])
def test_damaged_last_checkpoints_are_named_and_left_alone(copied, stage):
    if stage != "rl":
        shutil.rmtree(copied / "checkpoints/rl")
    last = max((copied / "checkpoints" / stage).iterdir(), key=lambda path: int(path.name))
    damage(last)
    before = contents(copied)
    with pytest.raises(UserError, match=stage):
        nlae_jax.NLA.from_workdir(copied)
    assert contents(copied) == before


def test_a_workdir_without_a_pair_yet_is_left_alone_too(copied):
    shutil.rmtree(copied / "checkpoints")
    (copied / "protocol.json").unlink()
    before = contents(copied)
    with pytest.raises(UserError, match="encoder_sft is not finished"):
        nlae_jax.NLA.from_workdir(copied)
    assert contents(copied) == before


def test_a_damaged_protocol_is_named(copied):
    (copied / "protocol.json").write_text('{"marker": "x"}')
    with pytest.raises(UserError, match=r"protocol\.json: damaged"):
        nlae_jax.NLA.from_workdir(copied)
