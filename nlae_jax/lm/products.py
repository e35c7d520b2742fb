"""Matrix products, and the one place that says how exactly they are taken.

float32 means float32 on every backend: by default a TPU rounds float32 operands to bfloat16 (8 bits) and a GPU to TF32
(11 bits), and what holds on a CPU to 1e-5 holds there to 1e-2. Who wants that speed says `subject.dtype = bfloat16`:
operands are then bfloat16 themselves, and sums float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def precision_of(*operands: jax.Array) -> jax.lax.Precision | None:
    """Full precision for float32 operands; None, the backend's own way, for narrower ones, which it takes exactly."""
    return jax.lax.Precision.HIGHEST if jnp.result_type(*operands) == jnp.float32 else None


def einsum(subscripts: str, a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
    """`jnp.einsum` of two arrays, in full precision; the result in `dtype`, or in theirs."""
    return jnp.einsum(subscripts, a, b, precision=precision_of(a, b), preferred_element_type=dtype)
