"""Natural Language Autoencoders in JAX: `LanguageModel` and `NLA` for notebooks, `nlae` for the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nlae_jax.api import NLA
    from nlae_jax.roles.language_model import LanguageModel

__all__ = ["NLA", "LanguageModel"]


def __getattr__(name: str) -> Any:
    """Imports a name at its first use, because the command line must set JAX up before anything imports it."""
    if name == "NLA":
        from nlae_jax.api import NLA

        return NLA
    if name == "LanguageModel":
        from nlae_jax.roles.language_model import LanguageModel

        return LanguageModel
    raise AttributeError(f"module 'nlae_jax' has no attribute {name!r}")
