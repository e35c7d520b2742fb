"""Warm-start descriptions: from a text up to one position, they say what a model may hold in mind there.

The encoder learns to write them and the decoder to read them before reinforcement learning begins. A provider is a
factory in `PROVIDERS`. `template` needs no model, `file` reads descriptions from a file, and the others ask a model.
"""

from __future__ import annotations

from typing import Any

from nlae_jax.config import DescribeConfig
from nlae_jax.data import providers
from nlae_jax.data.described import described_path, read_descriptions
from nlae_jax.data.describer import Describer, DescribeResources, Progress, Provider
from nlae_jax.data.model_server import SERVERS
from nlae_jax.data.template import template_provider
from nlae_jax.data.trained_describer import carried_describer, describer_provider
from nlae_jax.lm.adapters import open_adapters
from nlae_jax.lm.chat import chat_ids
from nlae_jax.lm.pretrained import resolve_model
from nlae_jax.runtime.errors import UserError


def make_describer(config: DescribeConfig, resources: DescribeResources, progress: Progress | None = None) -> Describer:
    """Makes the describer that `describe.provider` names. Raises UserError if it is unknown or cannot be set up."""
    if config.provider not in PROVIDERS:
        raise UserError(f"describe.provider {config.provider!r} is unknown: use one of {', '.join(PROVIDERS)}")
    return PROVIDERS[config.provider](config, resources, progress)


def check_provider(config: DescribeConfig, tokenizer: Any, is_indexed: bool) -> None:
    """Raises UserError where the provider cannot describe anything, so that nothing is extracted in vain.

    `tokenizer` is the subject's. `is_indexed` says whether the positions to read are fixed already: then a file's
    descriptions should be stored, and they are not.
    """
    match config.provider:
        case "file" if is_indexed:
            raise _file_comes_too_late()
        case "file":
            for _ in read_descriptions(described_path(config.path)):
                pass
        case "subject":
            try:
                chat_ids(tokenizer, "", enable_thinking=False)
            except UserError as error:
                raise UserError(f"describe.provider subject: {error}") from None
        case "describer":
            resolve_model(open_adapters(carried_describer()).base_model)
        case name if name in SERVERS:
            SERVERS[name](config)  # making the server checks its settings and key


def file_provider(config: DescribeConfig, resources: DescribeResources, progress: Progress | None = None) -> Describer:
    """Raises UserError: the file's descriptions are stored at extraction (`data.described`), which has not read it."""
    raise _file_comes_too_late()


def _file_comes_too_late() -> UserError:
    return UserError(
        'describe.provider = "file": activations/ was made without that file; delete all of activations/ but answers/, '
        "which may have been paid for, to extract at the positions that the file describes"
    )


PROVIDERS: dict[str, Provider] = {
    "template": template_provider,
    "file": file_provider,
    "describer": describer_provider,
    "subject": providers.subject_provider,
    "openai": providers.openai_provider,
    "anthropic": providers.anthropic_provider,
}
