"""How fast real text becomes stored activations, beside the bare forward pass: a part of `nlae bench`."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from nlae_jax.config import Config, CorpusConfig, DatasetConfig, DescribeConfig, InitConfig
from nlae_jax.data import activations
from nlae_jax.data.activations import Reader
from nlae_jax.data.corpus import read_documents
from nlae_jax.mesh import batch_parts, batch_sharding, replicated
from nlae_jax.run.preparation import read_activations, reader
from nlae_jax.run.resources import Run, open_run

Batch = tuple[jax.Array, ...]


def time_extraction(
    config: Config, repeats: int, documents: int = 200, num_next: int = 0
) -> dict[str, dict[str, float]]:
    """`{"extraction": {"tokens_per_second", "bare_tokens_per_second", "ratio"}}`, medians of `repeats`.

    The first counts the documents' own tokens per second of the stage from the first batch to meta.json, after planning
    and compiling. The second is what the devices could do at most: the same jitted blocks on batches of the same shapes
    that are on the devices already and have no padding, one under way while the next is sent, one row fetched at the
    end. Documents are the config's files, else the installed documentation. With `num_next` the upper blocks and the
    head run in both, as they do for the template describer.
    """
    config = dataclasses.replace(
        config,
        corpus=CorpusConfig(
            path=config.corpus.path,
            text_field=config.corpus.text_field,
            max_documents=documents,
            min_characters=config.corpus.min_characters,
        ),
        dataset=DatasetConfig(),
        init=InitConfig(),
        describe=DescribeConfig(),
    )
    with tempfile.TemporaryDirectory() as directory:
        run = open_run(config, Path(directory))
        plan, read = activations.plan(read_documents(config.corpus), run.tokenizer, config), reader(run, num_next)
        split, whole = batch_sharding(run.mesh), replicated(run.mesh)
        full = [
            jax.device_put(
                (batch.ids, np.ones_like(batch.mask), batch.rows, batch.columns), (split, split, whole, whole)
            )
            for batch in activations.read_batches(plan, config.extract, batch_parts(run.mesh))
        ]
        for batch in {batch[0].shape: batch for batch in full}.values():
            jax.block_until_ready(read(*batch))  # compiles
        seconds = [(_extraction(run, plan, read, num_next), _bare(full, read)) for _ in range(repeats)]
    stage, bare = (statistics.median(column) for column in zip(*seconds, strict=True))
    tokens, padded = sum(map(len, plan.ids)) / stage, sum(batch[0].size for batch in full) / bare
    return {"extraction": {"tokens_per_second": tokens, "bare_tokens_per_second": padded, "ratio": tokens / padded}}


def _extraction(run: Run, plan: activations.Plan, read: Reader, num_next: int) -> float:
    """Seconds to read and write everything anew."""
    shutil.rmtree(run.workdir / "activations", ignore_errors=True)
    (run.workdir / "activations").mkdir()
    begin = time.perf_counter()
    read_activations(run, plan, read, num_next)
    return time.perf_counter() - begin


def _bare(batches: Sequence[Batch], read: Reader) -> float:
    """Seconds to compute on all batches."""
    begin = time.perf_counter()
    before = last = read(*batches[0])[0]
    for batch in batches[1:]:
        before, last = last, read(*batch)[0]
        before.block_until_ready()
    np.asarray(last[0])
    return time.perf_counter() - begin
