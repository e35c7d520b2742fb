"""The stages before training: text to activations, activations to descriptions."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from nlae_jax.data import activations
from nlae_jax.data.answers import thinks_at_end
from nlae_jax.data.corpus import read_documents
from nlae_jax.data.describe import make_describer
from nlae_jax.data.described import Described, described_path, match, read_descriptions
from nlae_jax.data.describer import Context, DescribeResources
from nlae_jax.data.template import document_frequencies
from nlae_jax.interop.datasets import dataset_files, identities, import_plan, import_texts, import_vectors
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
    """Text -> activations/."""
    directory, config = run.workdir / "activations", run.config
    if processes.by_first((directory / "meta.json").exists):
        return
    if files := dataset_files(config.dataset):
        return processes.by_first(lambda: _import(run, files))
    processes.by_first(lambda: _plan(run))
    plan = activations.read_plan(directory)
    # Only the template describer reads the subject's expectations; without them the upper blocks are not run.
    num_next = activations.NUM_NEXT_TOKENS if config.describe.provider == "template" else 0
    read_activations(run, plan, reader(run, num_next), num_next)


def _plan(run: Run) -> None:
    """Documents and rows, if they are not there."""
    directory = run.workdir / "activations"
    if (directory / "rows.parquet").exists():
        return
    say("reading the corpus")
    config = run.config
    documents, described = read_documents(config.corpus), None
    if config.describe.provider == "file":
        path = described_path(config.describe.path)
        described = match(read_descriptions(path), documents, run.tokenizer, config.extract.max_tokens)
        for reason, count in sorted(described.dropped.items()):
            say(f"{path}: {count} descriptions {reason}: left out")
        documents = described.documents
    positions = described.positions if described else {}
    plan = activations.plan(documents, run.tokenizer, config, positions, run.arch.vocab_size)
    _ = run.base  # a model that cannot be read is found out before anything is written
    claim(run.workdir, run.config)
    write_json(directory / "subject.json", run.identity)
    if described is not None:
        write_parquet(directory / "descriptions.parquet", _table(_given(plan, described)))
    activations.write_plan(directory, plan)


def _given(plan: activations.Plan, described: Described) -> dict[int, str]:
    """Row -> description, of the rows that the file describes."""
    places = zip(plan.document.tolist(), plan.position.tolist(), strict=True)
    texts = (described.positions.get(plan.doc_ids[document], {}).get(position) for document, position in places)
    return {row: text for row, text in enumerate(texts) if text is not None}


def _table(descriptions: dict[int, str]) -> pa.Table:
    columns = {"row": pa.array(descriptions, pa.int64()), "description": pa.array(descriptions.values(), pa.string())}
    return pa.table(columns)


def reader(run: Run, num_next: int) -> activations.Reader:
    """The subject on a batch of documents, each call begun and not waited for."""
    read = jitted_reader(run.arch, run.config, run.mesh, num_next)
    split, whole = batch_sharding(run.mesh), replicated(run.mesh)
    return lambda *batch: read(run.base, *place(batch, (split, split, whole, whole)))


def read_activations(run: Run, plan: activations.Plan, read: activations.Reader, num_next: int) -> None:
    """The vectors as far as they are missing, then meta.json."""
    directory, config, parts = run.workdir / "activations", run.config, batch_parts(run.mesh)
    with progress(len(plan.position), "extract", unit="activation") as bar:
        advance = _advance_together(bar, run.mesh)
        activations.extract(directory, plan, read, config.extract, run.arch.d_model, num_next, advance, parts)
    provenance = {
        "model": config.subject.model,
        "layer": config.subject.layer,
        "dtype": config.subject.dtype,
        "corpus": config.corpus.path or config.corpus.hub or "installed documentation",
    }
    processes.by_first(lambda: activations.write_meta(directory, plan, run.arch.d_model, num_next, provenance))


def _import(run: Run, files: dict[str, Path]) -> None:
    """Parquet files -> activations/, descriptions included."""
    directory, d_model = run.workdir / "activations", run.arch.d_model
    if (directory / "rows.parquet").exists():
        plan = activations.read_plan(directory)
        if read_json(directory / "dataset.json") != identities(files):
            raise UserError(
                f"config.dataset: the files are not those that {directory} was begun with; bring those back"
            )
    else:
        say("reading the dataset")
        plan, sidecar = import_plan(files, run.config), sidecar_of(run)
        assert sidecar is not None  # a dataset has one
        descriptions, contexts, dropped = import_texts(files, plan, sidecar)
        if dropped:
            say(f"av_sft: {dropped} responses without explanation tags: left out")
        claim(run.workdir, run.config)
        write_json(directory / "subject.json", run.identity)
        write_parquet(directory / "descriptions.parquet", descriptions)
        write_parquet(directory / "contexts.parquet", contexts)
        write_json(directory / "dataset.json", identities(files))
        activations.write_plan(directory, plan)
    with progress(len(plan.position), "import", unit="activation") as bar:
        import_vectors(directory, files, len(plan.position), d_model, partial(_advance_alone, bar))
    provenance = {"model": run.config.subject.model, "layer": run.config.subject.layer, "corpus": str(files["rl"])}
    activations.write_meta(directory, plan, d_model, 0, provenance)


def _advance_together(bar: Progress, mesh: Mesh) -> Callable[[int], None]:
    """Counts rows that all processes pass alike, and stops all of them where one is asked to."""
    stop = processes.Agreement(mesh)

    def advance(rows: int) -> None:
        bar.advance(rows)
        if stop():
            raise supervision.Preempted

    return advance


def _advance_alone(bar: Progress, rows: int) -> None:
    if rows:
        bar.advance(rows)
    supervision.stop_if_asked()


def describe(run: Run) -> None:
    """Contexts of the SFT splits and of the rows evaluated -> activations/descriptions.parquet, if there is any SFT."""
    path = run.workdir / "activations/descriptions.parquet"
    if not run.config.sft.learns or processes.by_first(path.exists):
        return
    if run.config.dataset.rl:
        raise UserError(f"{path}: missing; restore it, or delete {path.parent} to import again")
    if run.config.describe.provider == "subject":  # it is computed by all
        stops = stop_ids(run.directory, run.tokenizer)
        _describe(run, path, LanguageModel(run.arch, run.base, run.tokenizer, run.mesh, stops))
        processes.barrier()
    else:
        processes.by_first(lambda: _describe(run, path))


def _describe(run: Run, path: Path, model: LanguageModel | None = None) -> None:
    """Asks the provider, or the `model`, and writes the table."""
    plan, config = run.store.plan, run.config.describe
    rows = np.concatenate([plan.rows_of("encoder_sft"), plan.rows_of("decoder_sft"), run.held_out_rows()])
    expected = run.store.next_tokens(rows)
    decode = partial(run.tokenizer.decode, skip_special_tokens=True)
    contexts = [
        Context(
            doc_id=plan.doc_ids[plan.document[row]],
            text=decode(run.store.context_ids(row)),
            next_tokens=tuple(decode([token]) for token in tokens),
        )
        for row, tokens in zip(rows.tolist(), expected.tolist(), strict=True)
    ]
    resources = DescribeResources(
        # Counted over the whole corpus, for the template alone: no other provider reads it.
        document_frequency=document_frequencies(map(decode, plan.ids)) if config.provider == "template" else {},
        num_documents=len(plan.ids),
        generate=None if model is None else partial(_chat, run, model),
        cache_directory=run.workdir / "activations/answers",
        shared_directory=cache_directory() / "answers",
    )
    with progress(len(rows), "describe", unit="activation") as bar:
        advance = _advance_together(bar, run.mesh) if model else partial(_advance_alone, bar)
        described = make_describer(config, resources, advance)(contexts)
    kept = {row: text for row, text in zip(rows.tolist(), described, strict=True) if text}
    if len(kept) < len(rows):
        say(f"describe: {len(rows) - len(kept)} of {len(rows)} activations got no usable description")
    if world.is_first():
        write_parquet(path, _table(kept))


def _chat(run: Run, model: LanguageModel, prompts: list[str]) -> list[str]:
    """The subject's replies; every group of prompts draws random numbers of its own, whichever came before.

    Where the chat template opens the model's thinking, each reply is given the tag: it begins inside of it.
    """
    seed = run.seed(zlib.crc32(prompts[0].encode()))
    replies = model.chat(prompts, run.config.describe.max_new_tokens, seed=seed)
    template = run.tokenizer.decode(chat_ids(run.tokenizer, "", enable_thinking=False))
    return [f"<think>{reply}" for reply in replies] if thinks_at_end(template) else replies
