"""The describer: what it reads, its loss beside the plain forward pass, and that texts get their own notes."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nlae_jax.assets import describer_directory, pair_directory, pair_names
from nlae_jax.config import DescribeConfig, MeshConfig
from nlae_jax.data import trained_describer as provider
from nlae_jax.data.describe import make_describer
from nlae_jax.data.describer import Context, DescribeResources
from nlae_jax.data.trained_describer import TextDescriber
from nlae_jax.lm.adapters import write_adapters
from nlae_jax.lm.arch import Arch
from nlae_jax.lm.lora import adapter_weights, init_adapters
from nlae_jax.mesh import make_mesh
from nlae_jax.roles.describer import Describer, note_ids, prompt_ids
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.runtime.errors import UserError
from nlae_jax.train.state import init_role
from nlae_jax.train.steps import describer_sft_step
from tests.conftest import perturbed

TEXTS = ["the land of the river", "of", "it is in the land that the river is to be, and it is for the people"]


def test_it_reads_the_end_of_a_text_from_a_word_on(tokenizer: Any) -> None:
    text = " ".join(f"word{number}" for number in range(500))
    read = tokenizer.decode(prompt_ids(tokenizer, text))
    assert read.startswith("Text:\nword") and "word499\n\nNotes on" in read and "word0 " not in read
    assert TEXTS[0] in tokenizer.decode(prompt_ids(tokenizer, TEXTS[0]))
    assert note_ids(tokenizer, " a note\n")[-1] == tokenizer.eos_token_id


def test_the_loss_is_that_of_the_plain_forward_pass(arch: Arch, params: Any, tokenizer: Any, tiny_lm: Any) -> None:
    prompts, notes = [[5, 6, 7, 8], [9, 10]], [[11, 12, 13], [14, 15, 16]]
    prompt, mask = np.zeros((2, 6), np.int32), np.zeros((2, 6), bool)
    for row, ids in enumerate(prompts):
        prompt[row, 6 - len(ids) :], mask[row, 6 - len(ids) :] = ids, True
    adapters = perturbed(init_adapters(jax.random.PRNGKey(1), arch, 2), 3)
    variables = {"params": {"lm": params}, "lora": {"lm": {"blocks": adapters}}}
    _, log_probs = Describer(arch).apply(
        variables, prompt, mask, jnp.asarray(notes), lambda lp, m: -lp.sum(), jnp.ones((2, 3)), method="loss"
    )
    merged = LanguageModel(arch, provider._merged(params, _File(2, 2.0), adapters), tokenizer)
    for row in range(2):
        whole = jnp.asarray([[*prompts[row], *notes[row]]])
        expected = jax.nn.log_softmax(merged.logits(whole)[0], -1)
        start = len(prompts[row]) - 1
        found = [expected[start + i, token] for i, token in enumerate(notes[row])]
        np.testing.assert_allclose(log_probs[row], found, atol=1e-4)


class _File:
    def __init__(self, rank: int, alpha: float) -> None:
        self.rank, self.alpha = rank, alpha


def test_it_learns_a_note(arch: Arch, params: Any) -> None:
    mesh, optimizer = make_mesh(MeshConfig()), optax.adam(3e-2)
    trained = {"adapters": init_adapters(jax.random.PRNGKey(0), arch, 4)}
    state = init_role(mesh, {"adapters": adapter_weights(arch, 4)}, trained, optimizer)
    step = jax.jit(describer_sft_step(Describer(arch), optimizer))
    prompt = np.arange(5, 29, dtype=np.int32).reshape(4, 6)
    batch = {"prompt": prompt, "mask": prompt > 0, "note": prompt[:, :3] + 1, "length": np.array([3, 2, 3, 3])}
    losses = []
    for _ in range(25):
        state, metrics = step(state, {"base": params}, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


@pytest.fixture
def directory(arch: Arch, tmp_path: Path) -> Path:
    adapters = perturbed(init_adapters(jax.random.PRNGKey(1), arch, 2), 3)
    write_adapters(tmp_path, arch, adapters, 2.0, "random:tiny", "float32")
    return tmp_path


def test_every_text_gets_its_own_note_whatever_the_order(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "_BATCH", 2)
    monkeypatch.setattr(provider, "_TEMPERATURE", 0.0)
    monkeypatch.setattr(provider, "_MAX_NEW_TOKENS", 400)
    describer = TextDescriber.from_directory(directory)
    notes = describer.describe(TEXTS)
    assert dict(islice(describer.written(TEXTS), 2)).items() <= dict(enumerate(notes)).items()  # one batch of them
    assert describer.describe(TEXTS[::-1]) == notes[::-1]
    assert all(note is None or ("<" not in note and "\n" not in note) for note in notes)


def test_what_the_package_carries_is_small() -> None:
    """A describer for one model, and pairs: at most 30 MB of adapters together."""
    directories = [describer_directory(), *(pair_directory(name) for name in pair_names())]
    sizes = [path.stat().st_size for directory in directories for path in directory.rglob("*.safetensors")]
    assert len(sizes) > len(directories)
    assert sum(sizes) < 30e6


def test_the_provider_is_refused_where_no_describer_is_carried(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(provider, "describer_directory", lambda: tmp_path / "none")
    resources = DescribeResources({}, 0, None, tmp_path)
    with pytest.raises(UserError, match="carries no describer"):
        make_describer(DescribeConfig(provider="describer"), resources)


def test_notes_are_written_once(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is continued takes the notes that are there; the model is asked for the others alone."""
    asked: list[str] = []

    def written(self: TextDescriber, texts: list[str]) -> Iterator[tuple[int, str]]:
        asked.extend(texts)
        notes = [f"a note on the text: {len(text)} characters" for text in texts]
        return iter(list(enumerate(notes))[::-1])  # in the order of their lengths

    monkeypatch.setattr(provider, "describer_directory", lambda: directory)
    monkeypatch.setattr(provider, "_TOGETHER", 2)
    monkeypatch.setattr(TextDescriber, "written", written)
    resources = DescribeResources({}, 0, None, tmp_path / "answers")
    contexts = [Context("d", text, ()) for text in TEXTS]
    first = make_describer(DescribeConfig(provider="describer"), resources)(contexts[:2])
    again = make_describer(DescribeConfig(provider="describer"), resources)(contexts)
    assert again[:2] == first == [f"a note on the text: {len(text)} characters" for text in TEXTS[:2]]
    assert asked == TEXTS
