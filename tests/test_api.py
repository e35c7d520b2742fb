"""What a notebook does with a finished run: explain, rebuild and score, with the workdir left as it is."""

import fcntl
import hashlib
import shutil

import numpy as np
import pytest

import nlae_jax
from nlae_jax.errors import UserError

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
