"""Warm-start descriptions: from a text up to one position, they say what a model may hold in mind there.

The encoder learns to write them and the decoder to read them before reinforcement learning begins. A provider is a
factory in `PROVIDERS`. `template` needs no model, `file` reads descriptions from a file, and the others ask a model.
"""

from __future__ import annotations

from nlae_jax.config import DescribeConfig
from nlae_jax.data import providers
from nlae_jax.data.describer import Describer, DescribeResources, Progress, Provider
from nlae_jax.data.template import template_provider
from nlae_jax.data.trained_describer import describer_provider
from nlae_jax.runtime.errors import UserError


def make_describer(config: DescribeConfig, resources: DescribeResources, progress: Progress | None = None) -> Describer:
    """Makes the describer that `describe.provider` names. Raises UserError if it is unknown or cannot be set up."""
    if config.provider not in PROVIDERS:
        raise UserError(f"describe.provider {config.provider!r} is unknown: use one of {', '.join(PROVIDERS)}")
    return PROVIDERS[config.provider](config, resources, progress)


def file_provider(config: DescribeConfig, resources: DescribeResources, progress: Progress | None = None) -> Describer:
    """Raises UserError: the file's descriptions are stored at extraction (`data.described`), which has not read it."""
    raise UserError(
        'describe.provider = "file": activations/ was made without that file; delete activations/ to extract at the '
        "positions that it describes"
    )


PROVIDERS: dict[str, Provider] = {
    "template": template_provider,
    "file": file_provider,
    "describer": describer_provider,
    "subject": providers.subject_provider,
    "openai": providers.openai_provider,
    "anthropic": providers.anthropic_provider,
}
