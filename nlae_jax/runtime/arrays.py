"""Takes arrays that callers hand over: of numpy, JAX or PyTorch, of any dtype and on any device."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from nlae_jax.runtime.errors import UserError


def on_host(values: Any) -> np.ndarray:
    """Returns an array of any library, or a list of arrays or numbers, as a numpy array.

    A floating dtype that numpy lacks becomes float32. Raises TypeError, ValueError (rows of different lengths) or
    RuntimeError where that is not possible.
    """
    if isinstance(values, list | tuple) and any(hasattr(row, "detach") for row in values):
        values = [on_host(row) for row in values]
    if hasattr(values, "detach"):  # PyTorch's: maybe on another device, part of a graph, of a dtype numpy lacks
        values = values.detach().cpu().to_dense()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(jax.device_get(values))


def as_float32(values: Any, name: str) -> np.ndarray:
    """Converts what `on_host` takes to float32. Raises UserError for other values; `name` names them in it."""
    try:
        host = on_host(values)
        if host.dtype.kind in "cOSUmMb":  # complex numbers would silently lose a part
            raise TypeError(f"it is {host.dtype}")
        with np.errstate(over="ignore"):
            return host.astype(np.float32, copy=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: should be an array of numbers ({error})") from None


def as_array(values: Any, name: str) -> np.ndarray:
    """Does what `on_host` does. Raises UserError where that is not possible; `name` names the values in it."""
    try:
        return on_host(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: should be an array of numbers ({error})") from None
