"""Makes data frames for notebooks."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from nlae_jax.runtime.errors import UserError


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Makes a pandas data frame of rows. Raises UserError where pandas, an optional package, is not installed."""
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        raise UserError("to_frame: needs pandas; install it with pip install pandas") from None
    return pandas.DataFrame(list(rows))
