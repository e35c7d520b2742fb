"""The real steps of a config with abstract arguments (shapes), to compile them without weights and devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from nlae_jax.bench.flops import Shapes, shapes_of
from nlae_jax.config import Config
from nlae_jax.data.activations import NUM_NEXT_TOKENS
from nlae_jax.lm.arch import Arch, model_weights
from nlae_jax.lm.families import read_arch
from nlae_jax.lm.pretrained import has_tokenizer, load_tokenizer, resolve_model
from nlae_jax.mesh import batch_parts, batch_sharding, check_batches, make_mesh, replicated
from nlae_jax.roles import direction
from nlae_jax.roles.pair import Params, Roles, make_roles
from nlae_jax.roles.protocol import ASSUMED, Endings, Protocol, assumed_protocol, endings, make_protocol
from nlae_jax.roles.subject import jitted_reader
from nlae_jax.roles.views import no_marks, reads_marks
from nlae_jax.train import steps
from nlae_jax.train.loop import compiled
from nlae_jax.train.state import RlState, abstract_params, abstract_role, rl_optimizers


@dataclasses.dataclass(frozen=True)
class Planned:
    """The parts that all steps share. `assumed` says what was assumed where the model's files are missing."""

    config: Config
    mesh: Mesh
    arch: Arch
    roles: Roles
    endings: Endings | None
    shapes: Shapes
    assumed: str


class Program(NamedTuple):
    """A jitted function, its abstract arguments, and the other arrays on the devices while it runs (`kept`)."""

    name: str
    function: Any
    arguments: tuple[Any, ...]
    kept: Any


def make_planned(config: Config, devices: list[Any]) -> Planned:
    """Reads the model's config.json and, if there is one, its tokenizer, but no weights.

    Raises UserError where a run would, for an invalid mesh, batch or model.
    """
    mesh = make_mesh(config.mesh, devices)
    check_batches(config, mesh)
    directory = resolve_model(config.subject.model, weights=False)
    arch = read_arch(directory)
    protocol, endings_table, assumed = _protocol(config, arch, directory)
    return Planned(
        config, mesh, arch, make_roles(config, arch, protocol), endings_table, shapes_of(config, protocol), assumed
    )


def _protocol(config: Config, arch: Arch, directory: Path) -> tuple[Protocol, Endings | None, str]:
    """Returns the protocol, the decoder's endings, and a text that says what was assumed of them."""
    if has_tokenizer(directory):
        tokenizer = load_tokenizer(directory)
        protocol = make_protocol(tokenizer, config.protocol, config.protocol.injection_scale or 1.0)
        return protocol, endings(tokenizer, protocol, arch.vocab_size), ""
    protocol, endings_table = assumed_protocol(config.protocol), None
    if protocol.decoder_suffix:  # most tokenizers merge across the explanation's end
        width = len(protocol.decoder_suffix) + 1
        endings_table = Endings(np.zeros((arch.vocab_size, width), np.int32), np.zeros(arch.vocab_size, np.int32))
    assumed = (
        f"no tokenizer in {config.subject.model}: the encoder's prompt is taken to have {ASSUMED.prompt} tokens with "
        f"the slot at {ASSUMED.slot}, tags {ASSUMED.opening} and {ASSUMED.closing}, the decoder's frame {ASSUMED.frame}"
    )
    return protocol, endings_table, assumed


def programs(planned: Planned, step: str) -> list[Program]:
    """Returns the programs that a step of `STEPS` runs one after another: one, or the three of the split RL step."""
    return _PROGRAMS[step](planned)


def _like(tree: Any, sharding: NamedSharding) -> Any:
    """Returns the shapes and dtypes of a tree's arrays, with one sharding for all."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _frozen_weights(planned: Planned, weights: Params) -> Params:
    """Returns abstract weights in the dtype that models compute in."""

    def in_compute_dtype(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, planned.config.subject.dtype, sharding=x.sharding)

    return jax.tree.map(in_compute_dtype, abstract_params(planned.mesh, weights))


def _base(planned: Planned) -> Params:
    """Returns the subject's abstract weights."""
    return _frozen_weights(planned, model_weights(planned.arch))


def _frozen(planned: Planned) -> Params:
    """Returns the abstract arrays that no step changes. It must agree with `run.training._frozen`."""
    config, base = planned.config, _base(planned)
    bases: Params = {"base": base if config.lora.rank else {}}
    if config.lora.rank and (config.init.av or config.init.ar):
        bases["decoder_base"] = base
    everywhere = replicated(planned.mesh)
    baselines = jax.eval_shape(direction.baselines, jax.ShapeDtypeStruct((1, planned.arch.d_model), jnp.float32))
    placed = {} if planned.endings is None else {"endings": _like(planned.endings, everywhere)}
    if reads_marks(config):
        placed["marks"] = _like(no_marks(planned.arch.vocab_size), everywhere)
    return {**bases, **placed, "baselines": _like(baselines, everywhere)}


def _batch(planned: Planned, **arrays: tuple[tuple[int, ...], Any]) -> Params:
    """Returns an abstract batch from names with shapes and dtypes."""
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in arrays.items()}
    return _like(batch, batch_sharding(planned.mesh))


def sft_width(config: Config) -> int:
    """Returns the columns of the longest warm-start batch (`run.training`)."""
    return -(-config.sft.max_response_tokens // 8) * 8


def read_shape(config: Config, parts: int) -> tuple[int, int]:
    """Returns the documents and tokens of extraction's longest batch (`activations.read_batches`)."""
    width = config.extract.max_tokens
    return max(1, config.extract.batch_tokens // width // parts) * parts, width


def _reader(planned: Planned) -> list[Program]:
    config, mesh = planned.config, planned.mesh
    size, width = read_shape(config, batch_parts(mesh))
    num_next = NUM_NEXT_TOKENS if config.describe.provider == "template" else 0
    documents = _like(
        [jax.ShapeDtypeStruct((size, width), dtype) for dtype in (jnp.int32, jnp.bool_)], batch_sharding(mesh)
    )
    places = [jax.ShapeDtypeStruct((size * config.extract.positions_per_document,), jnp.int32)] * 2
    arguments = _base(planned), *documents, *_like(places, replicated(mesh))
    return [Program("read", jitted_reader(planned.arch, config, mesh, num_next), arguments, ())]


def _subject_weights(planned: Planned) -> Params:
    """Returns the arrays that stay on the devices while a role is warm-started: the subject's weights without LoRA."""
    return {} if planned.config.lora.rank else _base(planned)


def _sft(planned: Planned, make_step: Any, weights: Params, optimizer: Any, tokens: str) -> list[Program]:
    """Returns the program of a role's warm start. `tokens` is the name of the descriptions' ids in its batches."""
    config, size = planned.config.sft, planned.config.sft.batch_size
    state = abstract_role(planned.mesh, weights, optimizer)
    step = compiled(make_step(planned.roles, optimizer, config.microbatches), state, planned.mesh)
    ids, h = (size, sft_width(planned.config)), (size, planned.arch.d_model)
    arrays = {"h": (h, jnp.float32), tokens: (ids, jnp.int32), "length": ((size,), jnp.int32)}
    return [Program("step", step, (state, _frozen(planned), _batch(planned, **arrays)), _subject_weights(planned))]


def _encoder_sft(planned: Planned) -> list[Program]:
    optimizer, _ = rl_optimizers(planned.config)
    return _sft(planned, steps.encoder_sft_step, planned.roles.encoder_weights(), optimizer, "response")


def _decoder_sft(planned: Planned) -> list[Program]:
    _, optimizer = rl_optimizers(planned.config)
    make_step = partial(steps.decoder_sft_step, views=planned.config.views)
    return _sft(planned, make_step, planned.roles.decoder_weights(), optimizer, "ids")


def _rl(planned: Planned) -> list[Program]:
    config, mesh, roles = planned.config, planned.mesh, planned.roles
    optimizers = rl_optimizers(config)
    state = RlState(
        abstract_role(mesh, roles.encoder_weights(), optimizers[0]),
        abstract_role(mesh, roles.decoder_weights(), optimizers[1]),
        _like(jax.eval_shape(lambda: jax.random.PRNGKey(0)), replicated(mesh)),
    )
    frozen = {**_frozen(planned), "blank": _like(np.zeros(roles.encoder.arch.vocab_size, bool), replicated(mesh))}
    if config.rl.kl_coef:
        whole_copy = not config.lora.rank
        frozen["reference"] = _frozen_weights(planned, roles.encoder_weights()) if whole_copy else state.encoder.trained
    batch = _batch(planned, h=((config.rl.activations_per_step, planned.arch.d_model), jnp.float32))
    parts = steps.rl_step(roles, config, *optimizers)
    if config.rl.fused:
        return [Program("step", compiled(parts.step, state, mesh), (state, frozen, batch), ())]
    rows, everywhere = batch_sharding(mesh), replicated(mesh)
    samples = _like(jax.eval_shape(parts.rollout, state, frozen, batch), rows)
    scores, metrics = jax.eval_shape(parts.train_decoder, state.decoder, frozen, batch, samples)[1]
    abstract_scores = _like(scores, rows), _like(metrics, everywhere)
    decoder = compiled(parts.train_decoder, state.decoder, mesh)
    encoder = compiled(parts.train_encoder, state.encoder, mesh)
    return [
        Program("rollout", jax.jit(parts.rollout), (state, frozen, batch), ()),
        Program("train_decoder", decoder, (state.decoder, frozen, batch, samples), state.encoder),
        Program("train_encoder", encoder, (state.encoder, frozen, batch, samples, *abstract_scores), state.decoder),
    ]


_PROGRAMS: dict[str, Callable[[Planned], list[Program]]] = {
    "extract": _reader,
    "encoder_sft": _encoder_sft,
    "decoder_sft": _decoder_sft,
    "rl": _rl,
}
STEPS = tuple(_PROGRAMS)


def resident_bytes(tree: Any) -> int:
    """Returns the bytes of one device's shards of abstract arrays."""
    sizes = (np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return int(sum(sizes))
