"""The state that training carries from step to step, and its first values."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nlae_jax.config import Config
from nlae_jax.lm.arch import first_blocks
from nlae_jax.lm.lora import init_adapters
from nlae_jax.mesh import Weight, place, replicated, tree_shardings
from nlae_jax.roles.pair import Params, Roles


class RoleState(NamedTuple):
    """The state of one trained role: `step` [] int32, the `trained` parameters, the optimiser's state."""

    step: jax.Array
    trained: Params
    opt_state: Any


class RlState(NamedTuple):
    """The states of both roles and the one PRNG key, which is folded with the step and never split."""

    encoder: RoleState
    decoder: RoleState
    key: jax.Array


def _master_copy(weight: jax.Array) -> jax.Array:
    """Copies a weight as float32: an update of 1e-5 would be lost in a bfloat16 weight."""
    return jnp.array(weight, jnp.float32, copy=True)


def init_encoder(roles: Roles, base: Params, key: jax.Array, adapters: Params | None = None) -> Params:
    """Returns trained parameters with which the encoder equals `base`, or `base` with `adapters` if they are given."""
    if roles.rank == 0:
        return {"lm": jax.tree.map(_master_copy, base)}
    return {"adapters": adapters or init_adapters(key, roles.encoder.arch, roles.rank, roles.experts)}


def init_decoder(
    roles: Roles, base: Params, key: jax.Array, head: jax.Array | None = None, adapters: Params | None = None
) -> Params:
    """Returns trained parameters with which the decoder equals the first blocks of `base`, with `adapters` if given.

    Without a `head` [d, d] the value head is the identity.
    """
    arch, depth = roles.decoder.arch, roles.decoder.layer + 1
    head = jnp.eye(arch.d_model, dtype=jnp.float32) if head is None else head
    if roles.rank == 0:
        lm = {name: _master_copy(weight) for name, weight in base.items() if name not in ("blocks", "head")}
        blocks = first_blocks(arch, base["blocks"], depth)
        return {"lm": {**lm, "blocks": jax.tree.map(_master_copy, blocks)}, "value_head": head}
    adapters = adapters or init_adapters(key, arch.truncated(depth), roles.rank, roles.experts)
    return {"adapters": adapters, "value_head": head}


def make_optimizer(config: Config, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Makes AdamW (Loshchilov and Hutter 2019) behind a clip of the gradient's global norm."""
    optimizer = config.optimizer
    adamw = optax.adamw(learning_rate, b1=optimizer.b1, b2=optimizer.b2, weight_decay=optimizer.weight_decay)
    if optimizer.moment_dtype != "float32":
        adamw = kept_in(optimizer.moment_dtype, adamw)
    return optax.chain(optax.clip_by_global_norm(optimizer.max_grad_norm), adamw)


def kept_in(dtype: str, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Makes an optimiser compute in float32 but store its moments in `dtype` from step to step.

    Both of Adam's moments may be bfloat16 as long as they forget quickly. Rounding to its 8 bits loses relative changes
    below 2^-8. With b2 = 0.95 a step changes ν by 0.05 (g²/ν - 1) of itself: ν follows g² to 8 %, so the step size to
    4 %, and always falls when gradients do. With b2 = 0.999 even the fall by 0.001 is lost: after one large gradient
    ν, and with it a small step, would stay for ever. The config therefore bounds b1 and b2. `mu_dtype` of optax is
    not enough: it leaves ν alone, and multiplies a bfloat16 moment by its decay in bfloat16.
    """

    def cast(state: Any, to: str) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(gradients: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        updates, state = optimizer.update(gradients, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(optimizer.init(params), dtype), update)


def sft_schedule(learning_rate: float, steps: int, warmup_fraction: float) -> optax.Schedule:
    """Makes a schedule of linear warm-up, then cosine decay to zero.

    No step has a rate of zero: optax counts updates from 0, and the schedule counts steps from 1.
    """
    warmup = max(1, round(steps * warmup_fraction))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup) + 1)
    return lambda count: schedule(count + 1)


def rl_optimizers(config: Config) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Returns RL's two optimisers, the encoder's and the decoder's."""
    rl = config.rl
    return make_optimizer(config, rl.encoder_learning_rate), make_optimizer(config, rl.decoder_learning_rate)


def init_role(mesh: Mesh, weights: Params, trained: Params, optimizer: optax.GradientTransformation) -> RoleState:
    """Puts a role's trained parameters on the mesh and returns its state at step 0."""
    trained = place(trained, tree_shardings(mesh, weights))
    opt_shardings = shardings_of(abstract_role(mesh, weights, optimizer).opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(trained)
    return RoleState(place(jnp.zeros((), jnp.int32), replicated(mesh)), trained, opt_state)


def abstract_role(mesh: Mesh, weights: Params, optimizer: optax.GradientTransformation) -> RoleState:
    """Returns the shapes and shardings of the state that `init_role` makes."""
    trained, everywhere = abstract_params(mesh, weights), replicated(mesh)

    def placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        placed,
        jax.eval_shape(optimizer.init, trained),
        tree_shardings(mesh, weights),
        transform_non_params=lambda x: placed(x, everywhere),
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return RoleState(step, trained, opt_state)


def abstract_params(mesh: Mesh, weights: Params) -> Params:
    """Returns the shapes and shardings of a role's trained parameters, to restore them with."""
    abstract: Params = jax.tree.map(
        lambda weight, sharding: jax.ShapeDtypeStruct(weight.shape, jnp.float32, sharding=sharding),
        weights,
        tree_shardings(mesh, weights),
        is_leaf=lambda node: isinstance(node, Weight),
    )
    return abstract


def shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
