"""The stages that train: the warm starts (SFT) of encoder and decoder, then reinforcement learning of both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from nlae_jax.config import SftConfig
from nlae_jax.data.pipeline import Batch, batches, bucket_widths, bucketed_batches
from nlae_jax.evaluate.health import Watch, health
from nlae_jax.lm.tokens import pad, width_within
from nlae_jax.mesh import share
from nlae_jax.roles import direction
from nlae_jax.roles.pair import Pair, Params, Roles
from nlae_jax.roles.protocol import Protocol, blank_tokens, endings, response_ids, whole_prompt_ids
from nlae_jax.roles.roundtrip import read_samples
from nlae_jax.roles.views import marks, reads_marks
from nlae_jax.run.resources import PreparedRun, Purpose, Run, descriptions_of
from nlae_jax.run.workdir import check_record
from nlae_jax.runtime import processes
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath
from nlae_jax.runtime.progress import say
from nlae_jax.train import steps
from nlae_jax.train.checkpoint import is_whole, newest_sealed, restore_part
from nlae_jax.train.loop import Stage, compiled, last_checkpoint, run_stage
from nlae_jax.train.state import (
    RlState,
    RoleState,
    abstract_params,
    init_decoder,
    init_encoder,
    init_role,
    make_optimizer,
    rl_optimizers,
    sft_schedule,
)

# The FVE denominators of the training metrics are computed from this many rows.
_BASELINE_ROWS = 4096


def sft(run: PreparedRun) -> None:
    """Trains the encoder, then the decoder, on descriptions."""
    for role, train in (("encoder", _encoder_sft), ("decoder", _decoder_sft)):
        num_steps = getattr(run.config.sft, f"{role}_steps")
        if num_steps and not is_whole(last_checkpoint(run.workdir, f"{role}_sft", num_steps)):
            train(run)


def _frozen(run: PreparedRun, split: str) -> Params:
    """Returns the arrays that training steps read and never change, see `train.steps`."""
    rows, config = run.store.index.rows_of(split), run.config
    # Rows are ordered by their documents' lengths, so the sample is spread evenly over all of them.
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, _BASELINE_ROWS).astype(int))]
    tables: Params = {"baselines": direction.baselines(jnp.asarray(run.store.vectors(rows)))}
    vocab_size = run.roles.encoder.arch.vocab_size
    if (merged := endings(run.tokenizer, run.protocol, vocab_size)) is not None:
        tables["endings"] = merged
    if reads_marks(config):
        tables["marks"] = marks(run.tokenizer, vocab_size)
    return {**run.weights.bases, **{name: run.on_mesh(table) for name, table in tables.items()}}


def _described_rows(
    run: PreparedRun, split: str, tokenise: Callable[[str], list[int]], frame: int = 0, around: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a split's rows that have a description: row numbers [N], token ids [N, T] and their lengths [N].

    Descriptions that are too long are dropped, and so are those with a token that the role has no embedding for.
    `frame` is the number of tokens that `tokenise` adds around a description, and `around` that of those which the role
    adds. Raises UserError if no row is left.
    """
    limit, descriptions = run.config.sft.max_response_tokens + frame, descriptions_of(run)
    arch = getattr(run.roles, split.removesuffix("_sft")).arch
    rows = [row for row in run.store.index.rows_of(split).tolist() if row in descriptions]
    tokens = [tokenise(descriptions[row]) for row in rows]
    used = [i for i, ids in enumerate(tokens) if len(ids) <= limit and max(ids, default=0) < arch.vocab_size]
    if not rows:
        raise UserError(
            f"describe.provider: no activation of the split {split} got a usable description; change the provider"
        )
    if not used:
        raise UserError(
            f"sft.max_response_tokens: all {len(rows)} descriptions of {split} are longer than {limit}; raise it"
        )
    if len(used) < len(rows):
        say(
            f"{split}: {len(rows) - len(used)} of {len(rows)} descriptions are longer than {limit} tokens, or hold one "
            "that the model does not know: left out"
        )
    longest = max(len(tokens[i]) for i in used)
    width = width_within(-(-longest // 8) * 8, longest, arch.most_tokens, around)
    ids, length = pad([tokens[i] for i in used], width)
    return np.array(rows)[used], ids, length


def _sft_batches(
    config: SftConfig, length_N: np.ndarray, seed: int, load: Callable[[np.ndarray, int | None], Batch], mesh: Mesh
) -> tuple[Any, tuple[Batch, ...]]:
    """Returns the stage's batches, and one example batch of each width where there are several.

    `load` takes row numbers and a width. Every process draws the same row numbers, and loads its share of them.
    """
    widths, load_share = bucket_widths(length_N, config.buckets), lambda i, width: load(share(mesh, i), width)
    if len(widths) == 1:
        return batches(len(length_N), config.batch_size, seed, lambda i: load_share(i, None)), ()
    example_rows = np.arange(config.batch_size) % len(length_N)
    examples = tuple(load_share(example_rows, int(width)) for width in widths)
    return bucketed_batches(length_N, widths, config.batch_size, seed, load_share), examples


def _initial_encoder(run: PreparedRun, optimizer: optax.GradientTransformation) -> RoleState:
    """Returns the encoder's state before SFT."""
    base = {} if run.config.lora.rank else run.weights.start("av")
    trained = init_encoder(run.roles, base, run.key(Purpose.ENCODER_SFT), _adapters(run, "av", run.arch.num_layers))
    return init_role(run.mesh, run.roles.encoder_weights(), trained, optimizer)


def _initial_decoder(run: PreparedRun, optimizer: optax.GradientTransformation) -> RoleState:
    """Returns the decoder's state before SFT."""
    base = {} if run.config.lora.rank else run.weights.start("ar")
    head = run.released["ar"].value_head() if "ar" in run.released else None
    adapters = _adapters(run, "ar", run.config.subject.layer + 1)
    trained = init_decoder(run.roles, base, run.key(Purpose.DECODER_SFT), head, adapters)
    return init_role(run.mesh, run.roles.decoder_weights(), trained, optimizer)


def _adapters(run: PreparedRun, role: str, depth: int) -> Params | None:
    """Reads `depth` blocks of the released adapters that the role "av" or "ar" starts from; None without any."""
    released = run.released.get(role)
    if released is None or released.adapters is None:
        return None
    return released.adapters.read(released.arch.truncated(depth))


_INITIAL = {"encoder": _initial_encoder, "decoder": _initial_decoder}


def _trained_by_sft(run: PreparedRun, role: str) -> Params:
    """Restores the parameters of `encoder` or `decoder` after SFT. Raises UserError where SFT is not finished."""
    if not (num_steps := getattr(run.config.sft, f"{role}_steps")):
        return _INITIAL[role](run, optax.identity()).trained
    abstract = {"trained": abstract_params(run.mesh, getattr(run.roles, f"{role}_weights")())}
    if (state := restore_part(last_checkpoint(run.workdir, f"{role}_sft", num_steps), abstract)) is None:
        raise UserError(f"--workdir {run.workdir}: {role}_sft is not finished; run `nlae train` there first")
    return state["trained"]


def _trained_by_rl(run: PreparedRun, checkpoint: AnyPath) -> tuple[Params, Params]:
    """Restores the parameters of encoder and decoder from a checkpoint of RL. Raises UserError if it is damaged."""
    weights = {"encoder": run.roles.encoder_weights(), "decoder": run.roles.decoder_weights()}
    abstract = {role: {"trained": abstract_params(run.mesh, declared)} for role, declared in weights.items()}
    if (state := restore_part(checkpoint, abstract)) is None:
        raise UserError(f"{checkpoint}: damaged; run `nlae train` there again, which goes back to the one before")
    return state["encoder"]["trained"], state["decoder"]["trained"]


def _encoder_sft(run: PreparedRun) -> None:
    """Trains the encoder to write descriptions."""
    tokenise = partial(response_ids, run.tokenizer, run.protocol)
    described = _described_rows(run, "encoder_sft", tokenise, around=run.roles.encoder.prompt_length)
    _warm_start(run, "encoder", described, run.roles, _frozen(run, "encoder_sft"))


def _decoder_sft(run: PreparedRun) -> None:
    """Trains the decoder to rebuild activations from descriptions."""
    roles, tokenise = run.roles, partial(run.tokenizer.encode, add_special_tokens=False)
    frozen, frame = _frozen(run, "decoder_sft"), 0
    around = len(run.protocol.decoder_prefix) + len(run.protocol.decoder_suffix)
    if run.config.dataset.rl:  # a dataset holds whole decoder prompts
        roles, tokenise = roles.with_whole_prompts(), partial(whole_prompt_ids, run.tokenizer, run.protocol)
        frozen.pop("endings", None)
        frame, around = around, 0
    _warm_start(run, "decoder", _described_rows(run, "decoder_sft", tokenise, frame, around), roles, frozen)


# Role -> the purpose of its random numbers, and the name of the descriptions' token ids in its batches.
_SFT = {
    "encoder": (Purpose.ENCODER_SFT, "response"),
    "decoder": (Purpose.DECODER_SFT, "ids"),
}


def _warm_start(
    run: PreparedRun, role: str, described: tuple[np.ndarray, np.ndarray, np.ndarray], roles: Roles, frozen: Params
) -> None:
    """Trains a role on the rows, token ids and lengths of `_described_rows`. Its step reads `frozen`.

    Raises UserError where the checkpoint to go on from was trained on other descriptions.
    """
    config, (rows, ids, length), (purpose, ids_name) = run.config.sft, described, _SFT[role]
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in described)).hexdigest()
    path = str(run.workdir / "activations/descriptions.parquet")
    check_record(run.record, f"{role} descriptions", digest, path, run.workdir)
    processes.by_first(lambda: _forget_evaluation(run.workdir / "eval.json", f"{role}_sft"))
    num_steps, rate = (getattr(config, f"{role}_{field}") for field in ("steps", "learning_rate"))
    optimizer = make_optimizer(run.config, sft_schedule(rate, num_steps, config.warmup_fraction))
    state = _INITIAL[role](run, optimizer)
    if role == "encoder":
        update = steps.encoder_sft_step(roles, optimizer, config.microbatches)
    else:
        update = steps.decoder_sft_step(roles, optimizer, config.microbatches, run.config.views)
    step = compiled(update, state, run.mesh)

    def load(i: np.ndarray, width: int | None) -> Batch:
        return {"h": run.store.vectors(rows[i]), ids_name: ids[i, :width], "length": length[i]}

    iterator, examples = _sft_batches(config, length, run.seed(purpose), load, run.mesh)
    made_with = {**run.made_with(), f"{role} descriptions": digest}
    stage = Stage(f"{role}_sft", num_steps, step, iterator, examples, made_with=made_with)
    run_stage(stage, state, frozen, run.mesh, run.config, run.workdir)


def rl(run: PreparedRun) -> None:
    """Trains the warm-started encoder and decoder by reinforcement learning on the round trip."""
    config = run.config.rl
    if config.num_steps == 0 or rl_is_finished(run):
        return
    processes.by_first(lambda: _forget_evaluation(run.workdir / "eval.json", "rl"))
    encoder, decoder = _trained_by_sft(run, "encoder"), _trained_by_sft(run, "decoder")
    run.weights.forget_base()
    optimizers = rl_optimizers(run.config)
    blank = blank_tokens(run.tokenizer, run.roles.encoder.arch.vocab_size)
    frozen = {**_frozen(run, "rl"), "blank": run.on_mesh(blank)}
    if config.kl_coef:
        # A copy, because the first step takes over the state's buffers (donation).
        frozen["reference"] = run.roles.reference(encoder)
    state = RlState(
        init_role(run.mesh, run.roles.encoder_weights(), encoder, optimizers[0]),
        init_role(run.mesh, run.roles.decoder_weights(), decoder, optimizers[1]),
        run.on_mesh(run.key(Purpose.RL)),
    )
    parts = steps.rl_step(run.roles, run.config, *optimizers)
    if config.fused:
        step = compiled(parts.step, state, run.mesh)
    else:
        decoder = compiled(parts.train_decoder, state.decoder, run.mesh)
        step = steps.SplitStep(parts, decoder, compiled(parts.train_encoder, state.encoder, run.mesh))
    rows = run.store.index.rows_of("rl")
    iterator = batches(
        len(rows),
        config.activations_per_step,
        run.seed(Purpose.RL),
        lambda i: {"h": run.store.vectors(rows[share(run.mesh, i)])},
    )
    watch = Watch("rl")

    def observe(samples: dict[str, np.ndarray]) -> Mapping[str, float]:
        measured = health_of_samples(run.tokenizer, run.protocol, samples, config.samples_per_activation)
        watch.add(measured)
        return {name: value for name, value in measured.items() if name != "extraction_rate"}  # the row has it already

    stage = Stage(
        "rl",
        config.num_steps,
        step,
        iterator,
        observe=observe,
        at_checkpoint=watch.review,
        made_with=run.made_with(),
    )
    run_stage(stage, state, frozen, run.mesh, run.config, run.workdir)


def health_of_samples(
    tokenizer: Any, protocol: Protocol, samples: Mapping[str, np.ndarray], group: int
) -> dict[str, float]:
    """Returns the measures of `health`, and `extraction_rate`, of the samples of one RL step.

    `samples` has `tokens` [..., T] and `lengths` [...]; the length of a sample that cannot be read is 0. `group` is the
    number of samples of each activation.
    """
    lengths_N = samples["lengths"].reshape(-1)
    _, texts = read_samples(tokenizer, protocol, samples["tokens"].reshape(len(lengths_N), -1), lengths_N)
    return {**health(texts, protocol.marker, group), "extraction_rate": float((lengths_N > 0).mean())}


def rl_is_finished(run: Run) -> bool:
    """Returns whether RL has made all its steps."""
    return is_whole(last_checkpoint(run.workdir, "rl", run.config.rl.num_steps))


def _forget_evaluation(path: AnyPath, stage: str) -> None:
    """Deletes an evaluation that was made before the stage went on."""
    if path.exists():
        say(f"{stage} goes on: the evaluation will be made again")
        path.unlink()


def trained_pair(run: PreparedRun) -> Pair:
    """Restores the pair as trained so far: RL's newest checkpoint, or the warm start without one. Writes nothing."""
    if (checkpoint := newest_sealed(run.workdir / "checkpoints/rl")) is None:
        return warm_started_pair(run)
    return _pair(run, *_trained_by_rl(run, checkpoint))


def warm_started_pair(run: PreparedRun) -> Pair:
    """Restores the pair before RL. Writes nothing."""
    return _pair(run, _trained_by_sft(run, "encoder"), _trained_by_sft(run, "decoder"))


def _pair(run: PreparedRun, encoder: Params, decoder: Params) -> Pair:
    return Pair(encoder=encoder, decoder=decoder, **run.weights.bases)
