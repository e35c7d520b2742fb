"""Lists the keys that a config needs from the environment. The launch scripts forward them to other machines.

    python -m nlae_jax.run.keys CONFIG [--workdir=W] [--config.field=value ...]

prints the names of the variables, one a line, and never their values. Where a key is missing it prints one line and
ends with code 2, before anyone pays for a machine that would stop for the same reason. A key may be missing where the
workdir already holds what it is needed for.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from nlae_jax.config import Binds, Config, load_experiment
from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.files import workdir_path
from nlae_jax.runtime.outside import LOCAL_HOSTS

_PROVIDERS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
_LOOK_SECONDS = 10.0  # a workdir that has not answered by then counts as one that cannot be read
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Key(NamedTuple):
    """An environment variable that holds a key, and why a config needs it.

    `least` is the least that the variable must be: it must have a "value", it must be "set" (perhaps to nothing), or
    "nothing" is required. `empty` says when an empty value is enough. `made`, if not "", is the file in the workdir
    that the key helps to make: once it exists, the variable may be missing.
    """

    variable: str
    reason: str
    least: Literal["value", "set", "nothing"]
    empty: str = "that is public"
    made: str = ""


def keys_of(config: Config) -> Iterator[Key]:
    """Yields every key that a run of this config may read on another machine."""
    describe = config.describe
    if describe.provider in _PROVIDERS and config.sft.learns and not config.dataset.rl:
        local = urlsplit(describe.base_url).hostname in LOCAL_HOSTS  # a server on this machine may need no key
        reason = f"describe.provider is {describe.provider}"
        yield Key(_PROVIDERS[describe.provider], reason, "nothing" if local else "value", made=Binds.DESCRIPTIONS.value)
    models = {"subject.model": config.subject.model, **{f"init.{key}": name for key, name in vars(config.init).items()}}
    hub = [f"{field} is {name}" for field, name in models.items() if _on_hub(name)]
    if hub:  # a name does not tell whether the model is public
        yield Key("HF_TOKEN", hub[0], "set")
    elif config.corpus.hub and not config.dataset.rl:
        yield Key("HF_TOKEN", f"corpus.hub is {config.corpus.hub}", "set", made="activations/rows.parquet")
    if config.track == "wandb":
        yield Key("WANDB_API_KEY", "track is wandb", "set", "W&B is logged in or offline there")


def _on_hub(name: str) -> bool:
    """Returns whether a model's name can only be a hub id, because no file or directory here has that name."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(".gguf") and not Path(name).exists()


def variables(
    keys: Iterable[Key], environment: Mapping[str, str], is_made: Callable[[str], bool] = lambda name: False
) -> list[str]:
    """Returns the names of the variables that have a value. White space around a value does not count.

    `is_made(name)` says whether the workdir has a file. It is asked only where a variable is missing. Raises UserError
    where a required variable is missing, or its value cannot be a key.
    """
    names = []
    for key in keys:
        given = environment.get(key.variable)
        value = (given or "").strip()
        is_missing = (key.least == "value" and not value) or (key.least == "set" and given is None)
        if is_missing and not (key.made and is_made(key.made)):
            public = f", or {key.variable}= if {key.empty}" if key.least == "set" else ""
            raise UserError(f"{key.variable} is not set, and {key.reason}: export {key.variable}=...{public}")
        if value and not all("!" <= character <= "~" for character in value):
            raise UserError(f"{key.variable} holds white space or characters outside ASCII: copy the key again")
        if value:
            names.append(key.variable)
    return names


def is_in(workdir: str, name: str) -> bool:
    """Returns whether a workdir has a file. A workdir that cannot be read from here has none, nor has "".

    It asks in a thread of its own, because the clients of buckets try again for minutes where there is no network.
    """
    found = []

    def look() -> None:
        try:
            found.append((workdir_path(workdir) / name).exists())
        except Exception:  # three libraries raise: no network, no credentials, no permission
            found.append(False)

    if not workdir:
        return False
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(_LOOK_SECONDS)
    return bool(found and found[0])


def main(arguments: Sequence[str]) -> int:
    """Prints the names of the variables that the config needs. Returns the exit code."""
    try:
        if not arguments:
            raise UserError("usage: python -m nlae_jax.run.keys CONFIG [--workdir=W] [--config.field=value ...]")
        config, *rest = arguments
        workdir = next((text.removeprefix("--workdir=") for text in rest if text.startswith("--workdir=")), "")
        overrides = [argument.removeprefix("--config.") for argument in rest if argument.startswith("--config.")]
        keys = keys_of(load_experiment(config, overrides))
        for name in variables(keys, os.environ, partial(is_in, workdir)):
            print(name)
    except UserError as error:
        print(f"nlae: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
