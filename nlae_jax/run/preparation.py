"""The stages before training: `extract` turns text into activations, `describe` gives activations descriptions."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from nlae_jax.config import Config
from nlae_jax.data import activations
from nlae_jax.data.answers import thinks_at_end
from nlae_jax.data.corpus import read_documents
from nlae_jax.data.describe import make_describer
from nlae_jax.data.described import Described, described_path, match, read_descriptions
from nlae_jax.data.describer import Context, DescribeResources
from nlae_jax.data.index import Index, make_index, read_index, write_index
from nlae_jax.data.template import document_frequencies
from nlae_jax.interop.datasets import dataset_files, identities, import_index, import_texts, import_vectors
from nlae_jax.lm.chat import chat_ids
from nlae_jax.lm.pretrained import cache_directory, stop_ids
from nlae_jax.mesh import batch_parts, batch_sharding, place, replicated
from nlae_jax.roles.language_model import LanguageModel
from nlae_jax.roles.subject import jitted_reader
from nlae_jax.run.resources import Run, sidecar_of
from nlae_jax.run.workdir import claim
from nlae_jax.runtime import processes, supervision, world
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import read_json, write_json, write_parquet
from nlae_jax.runtime.progress import Progress, progress, say


def extract(run: Run) -> None:
    """Reads the corpus, or a dataset, into activations/."""
    directory, config = run.workdir / "activations", run.config
    if processes.by_first((directory / "meta.json").exists):
        return
    if files := dataset_files(config.dataset):
        return processes.by_first(lambda: _import(run, files))
    processes.by_first(lambda: _make_index(run))
    index = read_index(directory)
    # Only the template describer reads the subject's next tokens. Without them the upper blocks need not run.
    num_next = activations.NUM_NEXT_TOKENS if config.describe.provider == "template" else 0
    read_activations(run, index, reader(run, num_next), num_next)


def _make_index(run: Run) -> None:
    """Writes the index of documents and rows, and claims the workdir, unless the index exists."""
    directory = run.workdir / "activations"
    if (directory / "rows.parquet").exists():
        return
    say("reading the corpus")
    config = config_of_extraction(run)
    documents, described = read_documents(config.corpus), None
    if config.describe.provider == "file":
        path = described_path(config.describe.path)
        described = match(read_descriptions(path), documents, run.tokenizer, config.extract.max_tokens)
        for reason, count in sorted(described.dropped.items()):
            say(f"{path}: {count} descriptions {reason}: left out")
        documents = described.documents
    positions = described.positions if described else {}
    index = make_index(documents, run.tokenizer, config, positions, run.arch.vocab_size)
    _ = run.base  # read now: a model that cannot be read must raise before anything is written
    claim(run.workdir, run.config)
    write_json(directory / "subject.json", run.identity)
    if described is not None:
        write_parquet(directory / "descriptions.parquet", _table(_descriptions_by_row(index, described)))
    write_index(directory, index)


def _descriptions_by_row(index: Index, described: Described) -> dict[int, str]:
    """Returns row -> description, for the rows that the file describes."""
    places = zip(index.document.tolist(), index.position.tolist(), strict=True)
    texts = (described.positions.get(index.doc_ids[document], {}).get(position) for document, position in places)
    return {row: text for row, text in enumerate(texts) if text is not None}


def _table(descriptions: dict[int, str]) -> pa.Table:
    """Makes the table of descriptions.parquet."""
    columns = {"row": pa.array(descriptions, pa.int64()), "description": pa.array(descriptions.values(), pa.string())}
    return pa.table(columns)


def config_of_extraction(run: Run) -> Config:
    """Returns the run's config with an `extract.max_tokens` that the subject can be run on."""
    most = run.arch.within(run.config.extract.max_tokens)
    return dataclasses.replace(run.config, extract=dataclasses.replace(run.config.extract, max_tokens=most))


def reader(run: Run, num_next: int) -> activations.Reader:
    """Returns a function that runs the subject on a batch of documents. It does not wait for the results."""
    read = jitted_reader(run.arch, run.config, run.mesh, num_next)
    split, everywhere = batch_sharding(run.mesh), replicated(run.mesh)
    return lambda *batch: read(run.base, *place(batch, (split, split, everywhere, everywhere)))


def read_activations(run: Run, index: Index, read: activations.Reader, num_next: int) -> None:
    """Reads the activations that the store does not have yet, then writes meta.json."""
    directory, config, parts = run.workdir / "activations", config_of_extraction(run), batch_parts(run.mesh)
    with progress(len(index.position), "extract", unit="activation") as bar:
        advance = _advance_together(bar, run.mesh)
        activations.extract(directory, index, read, config.extract, run.arch.d_model, num_next, advance, parts)
    provenance = {
        "model": config.subject.model,
        "layer": config.subject.layer,
        "dtype": config.subject.dtype,
        "corpus": config.corpus.path or config.corpus.hub or "installed documentation",
    }
    processes.by_first(lambda: activations.write_meta(directory, index, run.arch.d_model, num_next, provenance))


def _import(run: Run, files: dict[str, Path]) -> None:
    """Imports parquet files, with their descriptions, into activations/."""
    directory, d_model = run.workdir / "activations", run.arch.d_model
    if (directory / "rows.parquet").exists():
        index = read_index(directory)
        if read_json(directory / "dataset.json") != identities(files):
            raise UserError(
                f"config.dataset: the files are not those that {directory} was begun with; restore the former ones"
            )
    else:
        say("reading the dataset")
        index, sidecar = import_index(files, run.config), sidecar_of(run)
        assert sidecar is not None  # a dataset always has a sidecar
        descriptions, contexts, dropped = import_texts(files, index, sidecar)
        if dropped:
            say(f"av_sft: {dropped} responses without explanation tags: left out")
        claim(run.workdir, run.config)
        write_json(directory / "subject.json", run.identity)
        write_parquet(directory / "descriptions.parquet", descriptions)
        write_parquet(directory / "contexts.parquet", contexts)
        write_json(directory / "dataset.json", identities(files))
        write_index(directory, index)
    with progress(len(index.position), "import", unit="activation") as bar:
        import_vectors(directory, files, len(index.position), d_model, partial(_advance_alone, bar))
    provenance = {"model": run.config.subject.model, "layer": run.config.subject.layer, "corpus": str(files["rl"])}
    activations.write_meta(directory, index, d_model, 0, provenance)


def _advance_together(bar: Progress, mesh: Mesh) -> Callable[[int], None]:
    """Returns a function that advances the bar, and stops all processes together once one is asked to stop.

    All processes must call it equally often.
    """
    stop = processes.Agreement(mesh)

    def advance(rows: int) -> None:
        bar.advance(rows)
        if stop():
            raise supervision.Preempted

    return advance


def _advance_alone(bar: Progress, rows: int) -> None:
    """Advances the bar in a process that works alone, and stops it if it is asked to stop."""
    if rows:
        bar.advance(rows)
    supervision.stop_if_asked()


def describe(run: Run) -> None:
    """Describes the contexts of the SFT splits and of the rows evaluated, in activations/descriptions.parquet.

    Does nothing in a run without SFT.
    """
    path = run.workdir / "activations/descriptions.parquet"
    if not run.config.sft.learns or processes.by_first(path.exists):
        return
    if run.config.dataset.rl:
        raise UserError(f"{path}: missing; restore it, or {activations.IMPORT_ANEW}")
    if run.config.describe.provider == "subject":  # all processes compute it together
        stops = stop_ids(run.directory, run.tokenizer)
        _describe(run, path, LanguageModel(run.arch, run.base, run.tokenizer, run.mesh, stops))
        processes.barrier()
    else:
        processes.by_first(lambda: _describe(run, path))


def _describe(run: Run, path: Path, model: LanguageModel | None = None) -> None:
    """Asks the provider, or `model` if it is given, and writes the table of descriptions."""
    index, config = run.store.index, run.config.describe
    rows = np.concatenate([index.rows_of("encoder_sft"), index.rows_of("decoder_sft"), run.held_out_rows()])
    expected = run.store.next_tokens(rows)
    decode = partial(run.tokenizer.decode, skip_special_tokens=True)
    contexts = [
        Context(
            doc_id=index.doc_ids[index.document[row]],
            text=decode(run.store.context_ids(row)),
            next_tokens=tuple(decode([token]) for token in tokens),
        )
        for row, tokens in zip(rows.tolist(), expected.tolist(), strict=True)
    ]
    resources = DescribeResources(
        # Only the template provider reads the counts, and counting the whole corpus takes time.
        document_frequency=document_frequencies(map(decode, index.ids)) if config.provider == "template" else {},
        num_documents=len(index.ids),
        generate=None if model is None else partial(_chat, run, model),
        cache_directory=run.workdir / "activations/answers",
        shared_directory=cache_directory() / "answers",
    )
    with progress(len(rows), "describe", unit="activation") as bar:
        advance = _advance_together(bar, run.mesh) if model else partial(_advance_alone, bar)
        described = make_describer(config, resources, advance)(contexts)
    by_row = {row: text for row, text in zip(rows.tolist(), described, strict=True) if text}
    if len(by_row) < len(rows):
        say(f"describe: {len(rows) - len(by_row)} of {len(rows)} activations got no usable description")
    if world.is_first():
        write_parquet(path, _table(by_row))


def _chat(run: Run, model: LanguageModel, prompts: list[str]) -> list[str]:
    """Returns the subject's replies. The random seed of a group of prompts depends on its first prompt only.

    Where the chat template opens the model's thinking, a reply begins inside of it: each reply gets the opening tag.
    """
    seed = run.seed(zlib.crc32(prompts[0].encode()))
    replies = model.chat(prompts, run.config.describe.max_new_tokens, seed=seed)
    template = run.tokenizer.decode(chat_ids(run.tokenizer, "", enable_thinking=False))
    return [f"<think>{reply}" for reply in replies] if thinks_at_end(template) else replies
