"""Lists the keys that a config needs from the environment. The launch scripts forward them to other machines.

    python -m nlae_jax.run.keys CONFIG [--config.field=value ...]

prints the names of the variables, one a line, and never their values. Where a key is missing it prints one line and
ends with code 2, before anyone pays for a machine that would stop for the same reason.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from nlae_jax.config import Config, load_experiment
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.outside import LOCAL_HOSTS

_PROVIDERS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Key(NamedTuple):
    """An environment variable that holds a key, and why a config needs it.

    `least` is the least that the variable must be: it must have a "value", it must be "set" (perhaps to nothing), or
    "nothing" is required. `empty` says when an empty value is enough.
    """

    variable: str
    reason: str
    least: Literal["value", "set", "nothing"]
    empty: str = "that is public"


def keys_of(config: Config) -> Iterator[Key]:
    """Yields every key that a run of this config may read on another machine."""
    describe = config.describe
    if describe.provider in _PROVIDERS and config.sft.learns and not config.dataset.rl:
        local = urlsplit(describe.base_url).hostname in LOCAL_HOSTS  # a server on this machine may need no key
        reason = f"describe.provider is {describe.provider}"
        yield Key(_PROVIDERS[describe.provider], reason, "nothing" if local else "value")
    models = {"subject.model": config.subject.model, **{f"init.{key}": name for key, name in vars(config.init).items()}}
    hub = [f"{field} is {name}" for field, name in models.items() if _on_hub(name)]
    if config.corpus.hub and not config.dataset.rl:
        hub.append(f"corpus.hub is {config.corpus.hub}")
    if hub:  # a name does not tell whether the model is public
        yield Key("HF_TOKEN", hub[0], "set")
    if config.track == "wandb":
        yield Key("WANDB_API_KEY", "track is wandb", "set", "W&B is logged in or offline there")


def _on_hub(name: str) -> bool:
    """Returns whether a model's name can only be a hub id, because no file or directory here has that name."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(".gguf") and not Path(name).exists()


def variables(keys: Iterable[Key], environment: Mapping[str, str]) -> list[str]:
    """Returns the names of the variables that have a value.

    Raises UserError where a required variable is missing, or its value cannot be a key.
    """
    names = []
    for key in keys:
        value = environment.get(key.variable)
        if (key.least == "value" and not value) or (key.least == "set" and value is None):
            public = f", or {key.variable}= if {key.empty}" if key.least == "set" else ""
            raise UserError(f"{key.variable} is not set, and {key.reason}: export {key.variable}=...{public}")
        if value and not all("!" <= character <= "~" for character in value):
            raise UserError(f"{key.variable} holds white space or characters outside ASCII: copy the key again")
        if value:
            names.append(key.variable)
    return names


def main(arguments: Sequence[str]) -> int:
    """Prints the names of the variables that the config needs. Returns the exit code."""
    try:
        if not arguments:
            raise UserError("usage: python -m nlae_jax.run.keys CONFIG [--config.field=value ...]")
        config, *rest = arguments
        overrides = [argument.removeprefix("--config.") for argument in rest if argument.startswith("--config.")]
        for name in variables(keys_of(load_experiment(config, overrides)), os.environ):
            print(name)
    except UserError as error:
        print(f"nlae: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
