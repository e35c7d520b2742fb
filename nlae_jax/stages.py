"""The stages of a run, in order. Each first finishes what it needs, then does what is left of it, once and for all."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pyarrow as pa
from jax.sharding import Mesh

from nlae_jax import hosts
from nlae_jax.config import Config, SftConfig
from nlae_jax.data import activations
from nlae_jax.data.corpus import read_documents
from nlae_jax.data.datasets import dataset_files, identities, import_plan, import_texts, import_vectors
from nlae_jax.data.describe import Context, DescribeResources, document_frequencies, make_describer
from nlae_jax.data.pipeline import Batch, batches, bucket_widths, bucketed_batches, pad
from nlae_jax.errors import UserError
from nlae_jax.evaluate.reconstruction import direction_mse, mismatched, summarise
from nlae_jax.evaluate.roundtrip import Explanations, Pair, RoundTrip
from nlae_jax.files import AnyPath, is_remote, read_json, write_atomically, write_json, write_parquet
from nlae_jax.language_model import LanguageModel
from nlae_jax.lm.arch import Arch
from nlae_jax.lm.pretrained import cache_directory
from nlae_jax.mesh import batch_parts, batch_sharding, place, replicated, share
from nlae_jax.progress import Progress, progress, say
from nlae_jax.roles.protocol import response_ids
from nlae_jax.roles.subject import Subject
from nlae_jax.run import Run
from nlae_jax.train import steps
from nlae_jax.train.checkpoint import is_sealed, newest_sealed, restore_part
from nlae_jax.train.loop import Stage, compiled, last_checkpoint, run_stage
from nlae_jax.train.state import (
    Params,
    RlState,
    RoleState,
    abstract_params,
    init_decoder,
    init_encoder,
    init_role,
    make_optimizer,
    sft_schedule,
)

# What random numbers are drawn for: each purpose has a seed of its own.
_ENCODER_SFT, _DECODER_SFT, _RL, _EVAL = range(2, 6)


def extract(run: Run) -> None:
    """Text -> activations/."""
    directory, config = run.workdir / "activations", run.config
    if hosts.by_first((directory / "meta.json").exists):
        return
    if files := dataset_files(config.dataset):
        return hosts.by_first(lambda: _import(run, files))
    hosts.by_first(lambda: _plan(run))
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
    plan = activations.plan(read_documents(run.config.corpus), run.tokenizer, run.config)
    _ = run.base  # a model that cannot be read is found out before anything is written
    run.claim()
    write_json(directory / "subject.json", run.identity)
    activations.write_plan(directory, plan)


def reader(run: Run, num_next: int) -> activations.Reader:
    """The subject on a batch of documents, each call begun and not waited for."""
    read = jitted_reader(run.arch, run.config, run.mesh, num_next)
    split, whole = batch_sharding(run.mesh), replicated(run.mesh)
    return lambda *batch: read(run.base, *place(batch, (split, split, whole, whole)))


def jitted_reader(arch: Arch, config: Config, mesh: Mesh, num_next: int) -> Any:
    """`(base, ids, mask, rows, columns) -> (activations, likeliest next tokens)`; see `Subject.read`.

    The results' rows are split over the mesh, to be written by the processes that hold them.
    """
    subject, layer = Subject(arch, config.attention), config.subject.layer

    @partial(jax.jit, out_shardings=batch_sharding(mesh))
    def read(base: Params, ids: jax.Array, mask: jax.Array, rows: jax.Array, columns: jax.Array) -> Any:
        return subject.apply({"params": {"lm": base}}, ids, mask, rows, columns, layer, num_next, method="read")

    return read


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
    hosts.by_first(lambda: activations.write_meta(directory, plan, run.arch.d_model, num_next, provenance))


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
        plan = import_plan(files, run.config)
        descriptions, contexts, dropped = import_texts(files, plan, run.sidecar)
        if dropped:
            say(f"av_sft: {dropped} responses without explanation tags: left out")
        run.claim()
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
    stop = hosts.Agreement(mesh)

    def advance(rows: int) -> None:
        bar.advance(rows)
        if stop():
            raise hosts.Preempted

    return advance


def _advance_alone(bar: Progress, rows: int) -> None:
    bar.advance(rows)
    hosts.stop_if_asked()


def describe(run: Run) -> None:
    """Contexts of the SFT splits and of the rows evaluated -> activations/descriptions.parquet, if there is any SFT."""
    path = run.workdir / "activations/descriptions.parquet"
    extract(run)  # a dataset brings descriptions along
    if not run.warm_start or hosts.by_first(path.exists):
        return
    if run.config.dataset.rl:
        raise UserError(f"{path}: missing; restore it, or delete {path.parent} to import again")
    if run.config.describe.provider == "subject":  # it is computed by all
        _describe(run, path, LanguageModel(run.arch, run.base, run.tokenizer, run.mesh))
        hosts.barrier()
    else:
        hosts.by_first(lambda: _describe(run, path))


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
        document_frequency=document_frequencies(decode(ids) for ids in plan.ids),
        num_documents=len(plan.ids),
        generate=model and partial(_chat, run, model),
        cache_directory=_own_answers(run) if model else cache_directory() / "answers",
    )
    with progress(len(rows), "describe", unit="activation") as bar:
        advance = _advance_together(bar, run.mesh) if model else partial(_advance_alone, bar)
        described = make_describer(config, resources, advance)(contexts)
    kept = [(row, text) for row, text in zip(rows.tolist(), described, strict=True) if text]
    if len(kept) < len(rows):
        say(f"describe: {len(rows) - len(kept)} of {len(rows)} activations got no usable description")
    table = pa.table({"row": pa.array([r for r, _ in kept], pa.int64()), "description": [t for _, t in kept]})
    if hosts.is_first():
        write_parquet(path, table)


def _own_answers(run: Run) -> Path:
    """The subject's answers are this run's own, where a server's serve every run.

    One object per answer is no use of a bucket: they stay on this machine, and another one makes the same again.
    """
    if not is_remote(run.workdir):
        return run.workdir / "activations/answers"
    name = zlib.crc32(json.dumps([str(run.workdir), run.identity], sort_keys=True).encode())
    return cache_directory() / f"answers-{name:08x}"


def _chat(run: Run, model: LanguageModel, prompts: list[str]) -> list[str]:
    """The subject's replies; every group of prompts draws random numbers of its own, whichever came before."""
    seed = run.seed(zlib.crc32(prompts[0].encode()))
    return model.chat(prompts, run.config.describe.max_new_tokens, seed=seed)


def sft(run: Run) -> None:
    """Encoder, then decoder, on descriptions."""
    encoder_sft(run)
    decoder_sft(run)


def _described(
    run: Run, split: str, tokenise: Callable[[str], list[int]], frame: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A split's rows that have a description: row numbers, token ids [N, T], lengths [N]. Too long ones are dropped.

    `frame` is how many tokens are not the description's.
    """
    limit = run.config.sft.max_response_tokens + frame
    rows = [row for row in run.store.plan.rows_of(split).tolist() if row in run.descriptions]
    tokens = [tokenise(run.descriptions[row]) for row in rows]
    kept = [i for i, ids in enumerate(tokens) if len(ids) <= limit]
    if not rows:
        raise UserError(f"describe.provider: no activation of the split {split} got a usable description")
    if not kept:
        raise UserError(f"sft.max_response_tokens: all {len(rows)} descriptions of {split} are longer than {limit}")
    if len(kept) < len(rows) and split not in run.announced:
        run.announced.add(split)
        say(f"{split}: {len(rows) - len(kept)} of {len(rows)} descriptions are longer than {limit} tokens: left out")
    width = -(-max(len(tokens[i]) for i in kept) // 8) * 8
    ids, length = pad([tokens[i] for i in kept], width)
    return np.array(rows)[kept], ids, length


def _sft_batches(
    config: SftConfig, length: np.ndarray, seed: int, load: Callable[[np.ndarray, int | None], Batch], mesh: Mesh
) -> tuple[Any, tuple[Batch, ...]]:
    """The stage's batches, and one of each width where there are several; `load` takes row numbers and a width.

    Every process draws the same row numbers, and loads its share of them.
    """
    widths, load_share = bucket_widths(length, config.buckets), lambda i, width: load(share(mesh, i), width)
    if len(widths) == 1:
        return batches(len(length), config.batch_size, seed, lambda i: load_share(i, None)), ()
    some = np.arange(config.batch_size) % len(length)
    examples = tuple(load_share(some, int(width)) for width in widths)
    return bucketed_batches(length, widths, config.batch_size, seed, load_share), examples


def _sft_optimizer(run: Run, learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    return make_optimizer(run.config, sft_schedule(learning_rate, num_steps, run.config.sft.warmup_fraction))


def _initial_encoder(run: Run, optimizer: optax.GradientTransformation) -> RoleState:
    base = {} if run.config.lora.rank else run.start("av")
    trained = init_encoder(run.roles, base, run.key(_ENCODER_SFT))
    return init_role(run.mesh, run.roles.encoder_weights(), trained, optimizer)


def _initial_decoder(run: Run, optimizer: optax.GradientTransformation) -> RoleState:
    base = {} if run.config.lora.rank else run.start("ar")
    head = run.released["ar"].value_head() if "ar" in run.released else None
    trained = init_decoder(run.roles, base, run.key(_DECODER_SFT), head)
    return init_role(run.mesh, run.roles.decoder_weights(), trained, optimizer)


_INITIAL = {"encoder": _initial_encoder, "decoder": _initial_decoder}


def _trained_by_sft(run: Run, role: str) -> Params | None:
    """What SFT made of the role `encoder` or `decoder`, without its optimiser; None until it is finished."""
    if not (num_steps := getattr(run.config.sft, f"{role}_steps")):
        return _INITIAL[role](run, optax.identity()).trained
    abstract = {"trained": abstract_params(run.mesh, getattr(run.roles, f"{role}_weights")())}
    state = restore_part(last_checkpoint(run.workdir, f"{role}_sft", num_steps), abstract)
    return state and state["trained"]


def _trained_by_rl(run: Run, checkpoint: AnyPath) -> tuple[Params, Params] | None:
    """What RL made of encoder and decoder up to a checkpoint, without their optimisers; None without it."""
    if not hosts.by_first(lambda: is_sealed(checkpoint)):  # in a new workdir, roles cannot be made yet
        return None
    weights = {"encoder": run.roles.encoder_weights(), "decoder": run.roles.decoder_weights()}
    abstract = {role: {"trained": abstract_params(run.mesh, declared)} for role, declared in weights.items()}
    state = restore_part(checkpoint, abstract)
    return state and (state["encoder"]["trained"], state["decoder"]["trained"])


def encoder_sft(run: Run) -> Params:
    """The encoder learns to write descriptions. Returns its trained parameters."""
    describe(run)
    if (trained := _trained_by_sft(run, "encoder")) is not None:
        return trained
    config = run.config.sft
    rows, ids, length = _described(run, "encoder_sft", lambda text: response_ids(run.tokenizer, run.protocol, text))
    optimizer = _sft_optimizer(run, config.encoder_learning_rate, config.encoder_steps)
    state = _initial_encoder(run, optimizer)
    step = compiled(steps.encoder_sft_step(run.roles, optimizer, config.microbatches), state, run.mesh)
    iterator, examples = _sft_batches(
        run.config.sft,
        length,
        run.seed(_ENCODER_SFT),
        lambda i, width: {"h": run.store.vectors(rows[i]), "response": ids[i, :width], "length": length[i]},
        run.mesh,
    )
    stage = Stage("encoder_sft", config.encoder_steps, step, iterator, examples)
    return run_stage(stage, state, run.frozen("encoder_sft"), run.mesh, run.config, run.workdir).trained


def decoder_sft(run: Run) -> Params:
    """The decoder learns to read descriptions. Returns its trained parameters."""
    describe(run)
    if (trained := _trained_by_sft(run, "decoder")) is not None:
        return trained
    config, roles, tokenise = run.config.sft, run.roles, partial(run.tokenizer.encode, add_special_tokens=False)
    frozen, frame = run.frozen("decoder_sft"), 0
    if run.config.dataset.rl:  # its prompts are whole, and read as they are
        roles, tokenise = roles.with_whole_prompts(), run.tokenizer.encode
        frozen.pop("tails", None)
        frame = len(run.protocol.decoder_prefix) + len(run.protocol.decoder_suffix)
    rows, ids, length = _described(run, "decoder_sft", tokenise, frame)
    optimizer = _sft_optimizer(run, config.decoder_learning_rate, config.decoder_steps)
    state = _initial_decoder(run, optimizer)
    step = compiled(steps.decoder_sft_step(roles, optimizer, config.microbatches), state, run.mesh)
    iterator, examples = _sft_batches(
        run.config.sft,
        length,
        run.seed(_DECODER_SFT),
        lambda i, width: {"h": run.store.vectors(rows[i]), "ids": ids[i, :width], "length": length[i]},
        run.mesh,
    )
    stage = Stage("decoder_sft", config.decoder_steps, step, iterator, examples)
    return run_stage(stage, state, frozen, run.mesh, run.config, run.workdir).trained


def rl(run: Run) -> tuple[Params, Params]:
    """Encoder and decoder learn from how well the round trip works. Returns both roles' trained parameters."""
    if (trained := _trained_by_rl(run, last_checkpoint(run.workdir, "rl", run.config.rl.num_steps))) is not None:
        return trained
    hosts.by_first(lambda: _forget_evaluation(run.workdir / "eval.json"))
    encoder, decoder = encoder_sft(run), decoder_sft(run)
    run.forget_base()
    config = run.config.rl
    if config.num_steps == 0:
        return encoder, decoder
    optimizers = [
        make_optimizer(run.config, rate) for rate in (config.encoder_learning_rate, config.decoder_learning_rate)
    ]
    frozen = {
        **run.frozen("rl"),
        # A copy: the state's own buffers are given away to the first step.
        "reference": run.roles.reference(encoder),
        "blank": run.on_mesh(run.blank),
    }
    state = RlState(
        init_role(run.mesh, run.roles.encoder_weights(), encoder, optimizers[0]),
        init_role(run.mesh, run.roles.decoder_weights(), decoder, optimizers[1]),
        run.on_mesh(run.key(_RL)),
    )
    parts = steps.rl_step(run.roles, run.config, *optimizers)
    if config.fused:
        step = compiled(parts.step, state, run.mesh)
    else:
        decoder = compiled(parts.train_decoder, state.decoder, run.mesh)
        step = steps.SplitStep(parts, decoder, compiled(parts.train_encoder, state.encoder, run.mesh))
    rows = run.store.plan.rows_of("rl")
    iterator = batches(
        len(rows),
        config.activations_per_step,
        run.seed(_RL),
        lambda i: {"h": run.store.vectors(rows[share(run.mesh, i)])},
    )
    stage = Stage("rl", config.num_steps, step, iterator)
    state = run_stage(stage, state, frozen, run.mesh, run.config, run.workdir)
    return state.encoder.trained, state.decoder.trained


def _forget_evaluation(path: Path) -> None:
    if path.exists():
        say("rl goes on: the evaluation will be made again")
        path.unlink()


def trained_pair(run: Run) -> Pair:
    """The pair as trained so far: by RL up to its newest checkpoint, else by the warm start. Only reads."""
    if (checkpoint := newest_sealed(run.workdir / "checkpoints/rl")) is not None:
        if (trained := _trained_by_rl(run, checkpoint)) is None:
            raise UserError(f"{checkpoint}: damaged; run `nlae train` there again, which goes back to the one before")
    else:
        trained = tuple(_trained_by_sft(run, role) for role in _INITIAL)
        for role, params in zip(_INITIAL, trained, strict=True):
            if params is None:
                raise UserError(f"--workdir {run.workdir}: {role}_sft is not finished; run `nlae train` there first")
    return _pair(run, *trained)


def _pair(run: Run, encoder: Params, decoder: Params) -> Pair:
    return Pair(encoder=encoder, decoder=decoder, **run.bases)


def evaluate(run: Run) -> None:
    """Held-out activations through the pair before and after RL -> eval.json and samples/held_out.jsonl."""
    if hosts.by_first((run.workdir / "eval.json").exists):
        return
    after = _pair(run, *rl(run))
    before = _pair(run, encoder_sft(run), decoder_sft(run))
    config, rows = run.config.eval, run.held_out_rows()
    h = run.store.vectors(rows)
    documents = run.store.plan.document[rows]
    trip = RoundTrip(run.roles, run.tokenizer, config.batch_size, run.config.rl.max_new_tokens, run.mesh)
    seed = run.seed(_EVAL)
    with progress(4, "eval", unit="pass") as bar:
        mse_before, _, _ = _round_trip(trip, before, h, seed, config.temperature)
        bar.advance()
        mse_after, written, rebuilt = _round_trip(trip, after, h, seed, config.temperature)
        bar.advance()
        readable = np.array([bool(text) for text in written.texts])
        from_text = trip.reconstruct_texts(after, written.texts)
        bar.advance()
        described = run.descriptions if run.warm_start else {}
        gold = np.array([described.get(row, "") for row in rows.tolist()])
        from_gold = trip.reconstruct_texts(after, gold.tolist())
        bar.advance()
    other = mismatched(documents, seed)
    mse = {
        "before": mse_before,
        "after": mse_after,
        "text": direction_mse(from_text, h, readable),
        "shuffled": direction_mse(rebuilt[other], h, (written.length > 0)[other]),
        "gold": np.where(gold != "", direction_mse(from_gold, h), np.nan),
    }

    def write() -> None:
        summary = summarise(h, documents, mse, config.bootstrap_samples, seed)
        summary["extraction_rate"] = float((written.length > 0).mean())
        summary["temperature"] = config.temperature
        _write_samples(run, rows, written, mse_after, gold)
        write_json(run.workdir / "eval.json", summary)

    hosts.by_first(write)


def _round_trip(
    trip: RoundTrip, pair: Pair, h: np.ndarray, seed: int, temperature: float
) -> tuple[np.ndarray, Explanations, np.ndarray]:
    """Per activation its mse (2 where nothing was readable), its explanation and its reconstruction [N, d]."""
    written = trip.explain(pair, h, seed, temperature)
    rebuilt = trip.reconstruct_ids(pair, written.ids, written.length)
    return direction_mse(rebuilt, h, written.length > 0), written, rebuilt


def _write_samples(run: Run, rows: np.ndarray, written: Explanations, mse: np.ndarray, gold: np.ndarray) -> None:
    plan = run.store.plan
    lines = []
    for i, row in enumerate(rows.tolist()):
        context, token = _context(run, row)
        sample = {
            "doc_id": plan.doc_ids[plan.document[row]],
            "position": int(plan.position[row]),
            "context": context,
            "token": token,
            "explanation": written.texts[i],
            "gold": str(gold[i]),
            "cos": float(1 - mse[i] / 2),
            "mse": float(mse[i]),
            "closed": bool(written.length[i] > 0),
        }
        lines.append(json.dumps(sample, ensure_ascii=False))
    text = "\n".join(lines) + "\n"
    write_atomically(
        run.workdir / "samples/held_out.jsonl", lambda temporary: temporary.write_text(text, encoding="utf-8")
    )


def _context(run: Run, row: int) -> tuple[str, str]:
    """The text up to the row's position and its last token; '' where a dataset does not say."""
    if run.config.dataset.rl:
        text = run.store.contexts.get(row, "")
        return text, run.tokenizer.decode(run.tokenizer.encode(text, add_special_tokens=False)[-1:])
    ids = run.store.context_ids(row)
    return run.tokenizer.decode(ids, skip_special_tokens=True), run.tokenizer.decode(ids[-1:])


STAGES: dict[str, Callable[[Run], Any]] = {
    "extract": extract,
    "describe": describe,
    "sft": sft,
    "rl": rl,
    "eval": evaluate,
}
