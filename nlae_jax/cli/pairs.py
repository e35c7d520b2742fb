"""The options that name a pair (a workdir's, a shipped one, or two directories), and its loading."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nlae_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from nlae_jax.api import NLA
    from nlae_jax.run.resources import PreparedRun

# Which of --workdir, --model, --av, --ar may be given together.
_PAIRS = ((True, False, False, False), (False, True, False, False), (False, False, True, True))


def add_pair(command: argparse.ArgumentParser) -> None:
    """Adds the options that name a pair."""
    command.add_argument("--workdir", help="the pair of the run in this workdir")
    command.add_argument("--model", help="a shipped pair (smollm2-135m), or a directory with av/ and ar/")
    command.add_argument("--av", help="the encoder of a released pair: a directory or hub id; needs --ar")
    command.add_argument("--ar", help="the decoder of a released pair; needs --av")
    command.add_argument("--subject", default="", help="model that reads the text (default: the pair names it)")
    help_text = "dtype of the weights of pair and subject, not with --workdir (default float32)"
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help=help_text)
    command.add_argument(
        "--max-new-tokens", type=int, help="token limit of an explanation (default: the pair's, or 200)"
    )


def check_pair(options: argparse.Namespace) -> str:
    """Returns one line that says what is wrong with the options of `add_pair`, or ""."""
    present = tuple(map(bool, (options.workdir, options.model, options.av, options.ar)))
    if present not in _PAIRS:
        return f"{options.command} takes --workdir, or --model, or --av and --ar"
    if options.workdir and (options.subject or options.dtype):
        return "--subject and --dtype belong to a released pair; the workdir has its own"
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        return f"--max-new-tokens: {options.max_new_tokens} should be at least 1"
    return ""


def check_workdir(options: argparse.Namespace) -> None:
    """Raises UserError where --workdir is not the workdir of a run. Call it before anything slow is loaded."""
    if options.workdir and not (options.workdir / "config.json").exists():
        raise UserError(f"--workdir {options.workdir}: no config.json there; it should be the workdir of a run")


def load_pair(options: argparse.Namespace, run: PreparedRun | None = None) -> NLA:
    """Loads the pair of `add_pair`'s options. JAX must have been set up. `run` is the workdir's, if it is open."""
    from nlae_jax.api import NLA
    from nlae_jax.config import MeshConfig
    from nlae_jax.mesh import make_mesh

    if run is not None:
        nla = NLA.from_run(run, str(options.workdir))
    elif options.workdir:
        nla = NLA.from_workdir(options.workdir)
    else:
        # All devices share the weights: the larger pairs need more than one.
        mesh = make_mesh(MeshConfig(fsdp=-1))
        av, ar = (options.model, "") if options.model else (options.av, options.ar)
        nla = NLA.from_pretrained(av, ar, options.subject, options.dtype or "float32", mesh)
    nla.max_new_tokens = options.max_new_tokens or nla.max_new_tokens
    return nla
