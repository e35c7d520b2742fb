"""Tables for notebooks."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from nlae_jax.runtime.errors import UserError


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows as a pandas data frame. Raises UserError where pandas, which nothing else here needs, is not installed."""
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        raise UserError("to_frame: needs pandas; install it with pip install pandas") from None
    return pandas.DataFrame(list(rows))
