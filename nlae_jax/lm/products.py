"""Matrix products, and the only place that sets their precision.

Products of float32 operands are computed in float32 on every backend. By default a TPU rounds float32 operands to
bfloat16 (8 bits) and a GPU to TF32 (11 bits), and equalities that hold to 1e-5 on a CPU hold only to 1e-2 there. For
that speed set `subject.dtype = bfloat16`: operands are then bfloat16, and sums are float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def precision_of(*operands: jax.Array) -> jax.lax.Precision | None:
    """Returns full precision for float32 operands, and None for narrower ones, whose default precision is exact."""
    return jax.lax.Precision.HIGHEST if jnp.result_type(*operands) == jnp.float32 else None


def einsum(subscripts: str, a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
    """Computes `jnp.einsum` of two arrays in full precision. The result has `dtype`, or by default the operands'."""
    return jnp.einsum(subscripts, a, b, precision=precision_of(a, b), preferred_element_type=dtype)
