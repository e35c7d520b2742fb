"""Gradients of a batch in parts, and the optimiser's step with them. Every training step ends in these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nlae_jax.roles.pair import Params
from nlae_jax.train.state import RoleState


def apply_update(
    state: RoleState, gradients: Params, optimizer: optax.GradientTransformation
) -> tuple[RoleState, jax.Array, jax.Array]:
    """Makes one optimiser step, or skips it where the gradient's norm is not finite.

    Returns the new state, the gradient's norm float32 [], and 1.0 if the step was skipped, else 0.0.
    """
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    stepped = RoleState(
        state.step + 1,
        jax.tree.map(keep, trained, state.trained),
        jax.tree.map(keep, opt_state, state.opt_state),
    )
    return stepped, norm, 1.0 - finite.astype(jnp.float32)


# (trained parameters, part of a batch) -> (the part's share of the loss, arrays [rows, ...] with one entry per row)
Loss = Callable[[Params, Any], tuple[jax.Array, Any]]


def in_microbatches(loss_fn: Loss, trained: Params, batch: Any, count: int) -> tuple[tuple[jax.Array, Any], Params]:
    """Computes `jax.value_and_grad(loss_fn, has_aux=True)(trained, batch)` in `count` parts, one after another.

    Each part's loss must be divided by the whole batch's count, so that the parts' losses and gradients add up to those
    of the batch. The sums are float32. The arrays per row come back in the batch's order.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if count == 1:
        return value_and_grad(trained, batch)

    def split(x: jax.Array) -> jax.Array:
        """Splits [B, ...] into [count, B / count, ...].

        A part takes every count-th row, so that each device keeps the rows that it holds.
        """
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    def joined(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def add(sums: Any, part: Any) -> tuple[Any, Any]:
        (loss, rows), gradients = value_and_grad(trained, part)
        return jax.tree.map(jnp.add, sums, (loss, gradients)), rows

    zeros = jnp.zeros(()), optax.tree.zeros_like(trained, dtype=jnp.float32)
    (loss, gradients), rows = jax.lax.scan(add, zeros, jax.tree.map(split, batch))
    return (loss, jax.tree.map(joined, rows)), gradients
