"""The distance of two activations as directions, and the fraction of variance explained (FVE).

All functions are pure and compute in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Real = jax.Array | np.ndarray


def unit_direction(v: Real) -> jax.Array:
    """Scales vectors to L2 norm sqrt(d), that is to mean square 1: [..., d] -> [..., d] float32.

    The gradient is finite at the zero vector.
    """
    v = jnp.asarray(v, jnp.float32)
    return v * jax.lax.rsqrt(jnp.mean(jnp.square(v), -1, keepdims=True) + 1e-12)


def direction_mse(reconstruction: Real, target: Real) -> jax.Array:
    """Returns the mean squared error per element between two directions: [..., d] x [..., d] -> [...] float32.

    It equals 2 (1 - cos): 0 for equal directions, 2 for orthogonal ones, 4 for opposite ones.
    """
    return jnp.mean(jnp.square(unit_direction(reconstruction) - unit_direction(target)), -1)


# Squares are summed in float32. A smaller sum would lose digits, or be 0 although the vector is not.
_LEAST_SQUARES = 1e-30

# What `unusable_rows` finds, for messages.
UNUSABLE = "NaN or infinity, or numbers whose squares float32 cannot hold"


def unusable_rows(h_NxD: np.ndarray) -> np.ndarray:
    """Returns the indices of rows whose length float32 cannot compute (see `UNUSABLE`). Rows of zeros are usable."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        square_N = np.square(h_NxD, dtype=np.float32).sum(-1)
    usable = np.isfinite(square_N) & ((square_N >= _LEAST_SQUARES) | ~np.any(h_NxD, axis=-1))
    return np.flatnonzero(~usable)


class Baselines(NamedTuple):
    """The errors of predicting the data's mean direction: the denominators of the two FVE definitions, float32 [].

    `variance` belongs to `fve`, `mean_norm` to `fve_meannorm`. `mean_norm` is the larger one.
    """

    variance: jax.Array  # mean ‖ĥ - mean(ĥ)‖² / d, the mean not renormalised
    mean_norm: jax.Array  # mse against the renormalised mean


def baselines(h_NxD: Real) -> Baselines:
    """Computes both denominators from activations [N, d]."""
    directions = unit_direction(h_NxD)
    mean = directions.mean(0)
    return Baselines(jnp.mean(jnp.square(directions - mean)), direction_mse(mean, directions).mean())


def fve(mse: jax.Array, baseline: jax.Array) -> jax.Array:
    """Returns the fraction of variance explained, 1 - mean(mse) / baseline, for errors of any shape: float32 []."""
    return 1.0 - jnp.mean(mse) / baseline
