"""The stages that train: the encoder's warm start, the decoder's, then both by reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optax
from jax.sharding import Mesh

from nlae_jax.config import SftConfig
from nlae_jax.data.pipeline import Batch, batches, bucket_widths, bucketed_batches
from nlae_jax.evaluate.health import Watch, health
from nlae_jax.lm.tokens import pad
from nlae_jax.mesh import share
from nlae_jax.roles.pair import Pair, Params, Roles
from nlae_jax.roles.protocol import response_ids, whole_prompt_ids
from nlae_jax.roles.roundtrip import read_samples
from nlae_jax.run.preparation import describe
from nlae_jax.run.run import Purpose, Run
from nlae_jax.runtime import processes
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import AnyPath
from nlae_jax.runtime.progress import say
from nlae_jax.train import steps
from nlae_jax.train.checkpoint import is_sealed, newest_sealed, restore_part
from nlae_jax.train.loop import Stage, compiled, last_checkpoint, run_stage
from nlae_jax.train.state import (
    RlState,
    RoleState,
    abstract_params,
    init_decoder,
    init_encoder,
    init_role,
    make_optimizer,
    sft_schedule,
)


def sft(run: Run) -> None:
    """Encoder, then decoder, on descriptions."""
    encoder_sft(run)
    decoder_sft(run)


def _described(
    run: Run, split: str, tokenise: Callable[[str], list[int]], frame: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A split's rows that have a description: row numbers, token ids [N, T], lengths [N].

    Too long ones are dropped, and those with a token that the role has no embedding for. `frame` is how many tokens are
    not the description's.
    """
    limit = run.config.sft.max_response_tokens + frame
    known = getattr(run.roles, split.removesuffix("_sft")).arch.vocab_size
    rows = [row for row in run.store.plan.rows_of(split).tolist() if row in run.descriptions]
    tokens = [tokenise(run.descriptions[row]) for row in rows]
    kept = [i for i, ids in enumerate(tokens) if len(ids) <= limit and max(ids, default=0) < known]
    if not rows:
        raise UserError(f"describe.provider: no activation of the split {split} got a usable description")
    if not kept:
        raise UserError(f"sft.max_response_tokens: all {len(rows)} descriptions of {split} are longer than {limit}")
    if len(kept) < len(rows) and split not in run.announced:
        run.announced.add(split)
        say(
            f"{split}: {len(rows) - len(kept)} of {len(rows)} descriptions are longer than {limit} tokens, or hold one "
            "that the model does not know: left out"
        )
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


def _initial_encoder(run: Run, optimizer: optax.GradientTransformation) -> RoleState:
    base = {} if run.config.lora.rank else run.start("av")
    trained = init_encoder(run.roles, base, run.key(Purpose.ENCODER_SFT), _adapters(run, "av", run.arch.num_layers))
    return init_role(run.mesh, run.roles.encoder_weights(), trained, optimizer)


def _initial_decoder(run: Run, optimizer: optax.GradientTransformation) -> RoleState:
    base = {} if run.config.lora.rank else run.start("ar")
    head = run.released["ar"].value_head() if "ar" in run.released else None
    adapters = _adapters(run, "ar", run.config.subject.layer + 1)
    trained = init_decoder(run.roles, base, run.key(Purpose.DECODER_SFT), head, adapters)
    return init_role(run.mesh, run.roles.decoder_weights(), trained, optimizer)


def _adapters(run: Run, role: str, depth: int) -> Params | None:
    """The released adapters that the role "av" or "ar" goes on from, `depth` blocks of them; None without any."""
    released = run.released.get(role)
    return released and released.adapters and released.adapters.read(released.arch.truncated(depth))


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
    if not processes.by_first(lambda: is_sealed(checkpoint)):  # in a new workdir, roles cannot be made yet
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
    described = _described(run, "encoder_sft", lambda text: response_ids(run.tokenizer, run.protocol, text))
    return _warm_start(run, "encoder", described, run.roles, run.frozen("encoder_sft"))


def decoder_sft(run: Run) -> Params:
    """The decoder learns to read descriptions. Returns its trained parameters."""
    describe(run)
    if (trained := _trained_by_sft(run, "decoder")) is not None:
        return trained
    roles, tokenise = run.roles, partial(run.tokenizer.encode, add_special_tokens=False)
    frozen, frame = run.frozen("decoder_sft"), 0
    if run.config.dataset.rl:  # its prompts are whole, and read as they are
        roles, tokenise = roles.with_whole_prompts(), partial(whole_prompt_ids, run.tokenizer, run.protocol)
        frozen.pop("tails", None)
        frame = len(run.protocol.decoder_prefix) + len(run.protocol.decoder_suffix)
    return _warm_start(run, "decoder", _described(run, "decoder_sft", tokenise, frame), roles, frozen)


# By role: what random numbers are drawn for, the step, what its batches call the ids of descriptions.
_SFT = {
    "encoder": (Purpose.ENCODER_SFT, steps.encoder_sft_step, "response"),
    "decoder": (Purpose.DECODER_SFT, steps.decoder_sft_step, "ids"),
}


def _warm_start(
    run: Run, role: str, described: tuple[np.ndarray, np.ndarray, np.ndarray], roles: Roles, frozen: Params
) -> Params:
    """Trains a role on what `_described` gave; `frozen` is what its step reads. Returns its trained parameters."""
    config, (rows, ids, length), (purpose, make_step, ids_name) = run.config.sft, described, _SFT[role]
    num_steps, rate = (getattr(config, f"{role}_{field}") for field in ("steps", "learning_rate"))
    optimizer = make_optimizer(run.config, sft_schedule(rate, num_steps, config.warmup_fraction))
    state = _INITIAL[role](run, optimizer)
    if role == "decoder":
        make_step = partial(make_step, views=run.config.views)
    step = compiled(make_step(roles, optimizer, config.microbatches), state, run.mesh)

    def load(i: np.ndarray, width: int | None) -> Batch:
        return {"h": run.store.vectors(rows[i]), ids_name: ids[i, :width], "length": length[i]}

    iterator, examples = _sft_batches(config, length, run.seed(purpose), load, run.mesh)
    stage = Stage(f"{role}_sft", num_steps, step, iterator, examples, made_with=run.made_with())
    return run_stage(stage, state, frozen, run.mesh, run.config, run.workdir).trained


def rl(run: Run) -> tuple[Params, Params]:
    """Encoder and decoder learn from how well the round trip works. Returns both roles' trained parameters."""
    if (trained := _trained_by_rl(run, last_checkpoint(run.workdir, "rl", run.config.rl.num_steps))) is not None:
        return trained
    processes.by_first(lambda: _forget_evaluation(run.workdir / "eval.json"))
    encoder, decoder = encoder_sft(run), decoder_sft(run)
    run.forget_base()
    config = run.config.rl
    if config.num_steps == 0:
        return encoder, decoder
    optimizers = [
        make_optimizer(run.config, rate) for rate in (config.encoder_learning_rate, config.decoder_learning_rate)
    ]
    frozen = {**run.frozen("rl"), "blank": run.on_mesh(run.blank)}
    if config.kl_coef:
        # A copy: the state's own buffers are given away to the first step.
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
    rows = run.store.plan.rows_of("rl")
    iterator = batches(
        len(rows),
        config.activations_per_step,
        run.seed(Purpose.RL),
        lambda i: {"h": run.store.vectors(rows[share(run.mesh, i)])},
    )
    watch = Watch("rl")

    def observe(samples: dict[str, np.ndarray]) -> Mapping[str, float]:
        tokens, lengths = samples["tokens"], samples["lengths"].reshape(-1)
        _, texts = read_samples(run.tokenizer, run.protocol, tokens.reshape(len(lengths), -1), lengths)
        return watch.add(health(texts, run.protocol.marker, config.samples_per_activation))

    stage = Stage(
        "rl",
        config.num_steps,
        step,
        iterator,
        observe=observe,
        at_checkpoint=watch.review,
        made_with=run.made_with(),
    )
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
    return pair_of(run, *trained)


def pair_of(run: Run, encoder: Params, decoder: Params) -> Pair:
    return Pair(encoder=encoder, decoder=decoder, **run.bases)
