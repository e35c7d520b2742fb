"""Activations as directions: the distance of two, and the fraction of variance explained. All float32, all pure."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Real = jax.Array | np.ndarray


def unit_direction(v: Real) -> jax.Array:
    """Scaled to L2 norm sqrt(d), that is mean square 1: [..., d] -> [..., d] float32, with a finite gradient at 0."""
    v = jnp.asarray(v, jnp.float32)
    return v * jax.lax.rsqrt(jnp.mean(jnp.square(v), -1, keepdims=True) + 1e-12)


def direction_mse(reconstruction: Real, target: Real) -> jax.Array:
    """Mean squared error per element between directions, [..., d] x [..., d] -> [...]; equals 2 (1 - cos)."""
    return jnp.mean(jnp.square(unit_direction(reconstruction) - unit_direction(target)), -1)


class Baselines(NamedTuple):
    """What predicting the mean direction of the data costs: denominators of the two FVE definitions."""

    variance: jax.Array  # mean ‖ĥ - mean(ĥ)‖² / d, the mean not renormalised
    mean_norm: jax.Array  # mse against the renormalised mean


def baselines(h_NxD: Real) -> Baselines:
    """Both denominators, from the activations themselves."""
    directions = unit_direction(h_NxD)
    mean = directions.mean(0)
    return Baselines(jnp.mean(jnp.square(directions - mean)), direction_mse(mean, directions).mean())


def fve(mse: jax.Array, baseline: jax.Array) -> jax.Array:
    """Fraction of variance explained: 1 - mean(mse) / baseline."""
    return 1.0 - jnp.mean(mse) / baseline
