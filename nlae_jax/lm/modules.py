"""Calling flax modules."""

from __future__ import annotations

from typing import Any

import flax.linen as nn


def apply(module: nn.Module, variables: Any, *arguments: Any, method: Any = None) -> Any:
    """What `method` of the module (its `__call__` if none is named) makes of the arguments with these variables.

    As `module.apply`, whose type allows for changed variables beside the result; here nothing may be changed.
    """
    return module.apply(variables, *arguments, method=method)
