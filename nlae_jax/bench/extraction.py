"""Measures how fast real text becomes stored activations, compared with the bare forward pass. Part of `nlae bench`."""

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
from nlae_jax.data.index import Index, make_index
from nlae_jax.mesh import batch_parts, batch_sharding, replicated
from nlae_jax.run.preparation import config_of_extraction, read_activations, reader
from nlae_jax.run.resources import Run, open_run

Batch = tuple[jax.Array, ...]


def time_extraction(
    config: Config, repeats: int, documents: int = 200, num_next: int = 0
) -> dict[str, dict[str, float]]:
    """Returns `{"extraction": {"tokens_per_second", "bare_tokens_per_second", "ratio"}}`, medians of `repeats`.

    `tokens_per_second` counts the documents' tokens, without padding, and the time of the stage from the first batch to
    meta.json, after planning and compiling. `bare_tokens_per_second` is the devices' limit: the same jitted blocks run
    on batches of the same shapes that are already on the devices and have no padding, and only one row is fetched at
    the end. Documents are the config's files, or the installed documentation. With `num_next` the upper blocks and the
    head run in both measurements, as they do for the template describer.
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
        config = config_of_extraction(run)
        index, read = make_index(read_documents(config.corpus), run.tokenizer, config), reader(run, num_next)
        split, everywhere = batch_sharding(run.mesh), replicated(run.mesh)
        unpadded = [
            jax.device_put(
                (batch.ids, np.ones_like(batch.mask), batch.rows, batch.columns), (split, split, everywhere, everywhere)
            )
            for batch in activations.read_batches(index, config.extract, batch_parts(run.mesh))
        ]
        for batch in {batch[0].shape: batch for batch in unpadded}.values():
            jax.block_until_ready(read(*batch))  # compiles
        seconds = [(_extraction(run, index, read, num_next), _bare(unpadded, read)) for _ in range(repeats)]
    stage, bare = (statistics.median(column) for column in zip(*seconds, strict=True))
    tokens, padded = sum(map(len, index.ids)) / stage, sum(batch[0].size for batch in unpadded) / bare
    return {"extraction": {"tokens_per_second": tokens, "bare_tokens_per_second": padded, "ratio": tokens / padded}}


def _extraction(run: Run, index: Index, read: Reader, num_next: int) -> float:
    """Returns the seconds to read and write all activations anew."""
    shutil.rmtree(run.workdir / "activations", ignore_errors=True)
    (run.workdir / "activations").mkdir()
    begin = time.perf_counter()
    read_activations(run, index, read, num_next)
    return time.perf_counter() - begin


def _bare(batches: Sequence[Batch], read: Reader) -> float:
    """Returns the seconds to compute all batches. Two are under way at a time, as in extraction."""
    begin = time.perf_counter()
    previous = last = read(*batches[0])[0]
    for batch in batches[1:]:
        previous, last = last, read(*batch)[0]
        previous.block_until_ready()
    np.asarray(last[0])
    return time.perf_counter() - begin
