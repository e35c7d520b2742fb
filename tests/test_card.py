"""The scripts that describe and measure the carried pair, on a tiny pair."""

import importlib.util
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import nlae_jax

pytest_plugins = ["tests.tiny_run"]

SCRIPTS = Path(__file__).parent.parent / "experiments/smollm2"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


card, descriptions = loaded("card"), loaded("descriptions")


@pytest.fixture(scope="module")
def nla(tiny_run):
    return nlae_jax.NLA.from_workdir(tiny_run.workdir)


def test_the_card_of_a_pair(nla):
    contexts = ["the of to in is that it for", "on with as was at by", "from this be are"]
    passages = [card.passage_of_ids(nla.tokenizer, nla.tokenizer.encode(text), text) for text in contexts]
    places = [card.Place(passage, f"document {number}", "a note") for number, passage in enumerate(passages)]
    h_NxD, expected = card.read(nla, places)
    assert h_NxD.shape == (3, nla.d_model)
    for passage, row, token in zip(passages, h_NxD, expected, strict=True):
        np.testing.assert_allclose(nla.read([passage])[0][-1], row, atol=1e-5)
        logits = nla.subject.logits(np.array([passage.ids]))[0, -1]
        assert token == nla.tokenizer.decode([int(np.argmax(logits))])
    figures = card.measured(nla, nla, places, 2, 1.0)
    assert figures["num_activations"] == 3 and figures["fve_gain"] == 0
    lines = card.table({"passages": figures})
    assert len(lines) == 3 + len(card.FIGURES) + 1
    assert len(card.examples({"passages": figures})) == 2 + 3


def test_recent_words_are_rare_near_and_not_the_last():
    frequency = Counter({"keeper": 1, "light": 40, "night": 1, "cold": 1})
    words = lambda text: descriptions.recent_words(text, frequency, 100)  # noqa: E731
    assert words("the keeper of the light") == ["keeper"]
    assert words("the keeper of the light on a cold night and") == ["night", "cold", "keeper"]
    assert words(f"keeper {'light ' * 40} night and")[:2] == ["light", "night"]  # common, but all around
    assert words("the") == words("") == []


@pytest.mark.parametrize(
    ("words", "topic"),
    [([], ""), (["cat"], "cat"), (["cat", "dog"], "cat and dog"), (["cat", "dog", "owl"], "cat, dog and owl")],
)
def test_a_draft_mentions_other_words(words, topic):
    draft = '"a" or "b". Technical manual; it mentions x, y and z. It stops at "end.".'
    changed = descriptions.mentioning(draft, words, random.Random(0))
    before, kind, after = '"a" or "b". ', "Technical manual", '. It stops at "end.".'
    expected = {before + kind + (link.format(topic) if words else "") + after for link in descriptions.LINKS}
    assert changed in expected
