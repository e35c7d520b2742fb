"""Calls flax modules with explicit variables."""

from __future__ import annotations

from typing import Any

import flax.linen as nn


def apply(module: nn.Module, variables: Any, *arguments: Any, method: Any = None) -> Any:
    """Calls `method` of the module (default: `__call__`) with these variables and returns its result.

    `module.apply` may also return changed variables, so its type is wider. Here no variables may change.
    """
    return module.apply(variables, *arguments, method=method)
