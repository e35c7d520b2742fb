"""Extraction timed: of real text, and against batches of the same shapes."""

import jax
import numpy as np
import pytest

from nlae_jax.bench.extraction import time_extraction
from nlae_jax.data import activations
from nlae_jax.data.corpus import read_documents
from nlae_jax.data.index import make_index
from nlae_jax.run import preparation
from nlae_jax.run.resources import open_run
from tests.conftest import tiny_config

pytest_plugins = ["tests.tiny_run"]


def settings(tiny_dir, corpus_file, **others):
    extract = {"extract__min_position": 4, "extract__max_tokens": 48, "extract__batch_tokens": 192}
    corpus = {"corpus__path": str(corpus_file), "corpus__min_characters": 20}
    return tiny_config(subject__model=str(tiny_dir), **corpus, **extract, **others)


@pytest.mark.parametrize("num_next", [0, 3])
def test_the_numbers(tiny_dir, corpus_file, num_next):
    config = settings(tiny_dir, corpus_file, describe__provider="openai", describe__model="none")
    result = time_extraction(config, repeats=2, documents=12, num_next=num_next)["extraction"]
    assert result["tokens_per_second"] > 0
    assert result["ratio"] == result["tokens_per_second"] / result["bare_tokens_per_second"]


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_devices_that_split_a_batch_read_the_same(tiny_dir, corpus_file, tmp_path):
    found = {}
    for name, mesh in (("one", {}), ("eight", {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2})):
        sizes = {"sft__batch_size": 8, "rl__activations_per_step": 8}
        run = open_run(settings(tiny_dir, corpus_file, **mesh, **sizes), tmp_path / name)
        preparation.extract(run)
        rows = np.arange(len(run.store.index.position))
        found[name] = run.store.vectors(rows), run.store.next_tokens(rows)
    np.testing.assert_allclose(found["eight"][0], found["one"][0], atol=1e-4)
    np.testing.assert_array_equal(found["eight"][1], found["one"][1])


def test_documents_are_split_over_devices(tiny_dir, corpus_file, tmp_path):
    """Each computes its own share: the compiled program's FLOPs are a device's."""
    flops = []
    for name, data in (("one", 1), ("four", 4)):
        config = settings(tiny_dir, corpus_file, mesh__data=data, sft__batch_size=8, rl__activations_per_step=8)
        run = open_run(config, tmp_path / name)
        index = make_index(read_documents(config.corpus), run.tokenizer, config)
        batch = next(activations.read_batches(index, config.extract, data))
        flops.append(_flops(run, batch))
    assert flops[1] < 0.4 * flops[0]


def _flops(run, batch):
    split, whole = preparation.batch_sharding(run.mesh), preparation.replicated(run.mesh)
    placed = jax.device_put((batch.ids, batch.mask, batch.rows, batch.columns), (split, split, whole, whole))
    program = preparation.jitted_reader(run.arch, run.config, run.mesh, 0).lower(run.base, *placed).compile()
    return program.cost_analysis()["flops"]
