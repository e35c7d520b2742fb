"""`nlae serve`: serves a pair over HTTP, with a page."""

from __future__ import annotations

import argparse

from nlae_jax.cli.command import Command, start_jax
from nlae_jax.cli.pairs import add_pair, check_pair, check_workdir, load_pair
from nlae_jax.runtime.errors import UserError

_EXTRA = ("fastapi", "starlette", "pydantic", "uvicorn")  # packages of the extra `serve`


def _add_arguments(command: argparse.ArgumentParser) -> None:
    add_pair(command)
    command.add_argument(
        "--host", default="127.0.0.1", help="address to serve on (default 127.0.0.1: this machine only)"
    )
    command.add_argument(
        "--port", type=int, default=5009, help="port to serve on; 0 chooses a free port (default 5009)"
    )
    help_text = "token that requests must send as X-SECRET-KEY (default: the environment variable SECRET)"
    command.add_argument("--token", default="", help=help_text)
    help_text = "number of simultaneous explain requests; further requests get status 429 (default 16)"
    command.add_argument("--max-concurrent", type=int, default=16, help=help_text)


def _run(options: argparse.Namespace, _: list[str]) -> int:
    check_workdir(options)
    if options.max_concurrent < 1:
        raise UserError(f"--max-concurrent: {options.max_concurrent} should be at least 1")
    start_jax()
    try:
        from nlae_jax.serve.command import serve
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise UserError(f"nlae serve: {error.name} is not installed; pip install 'nlae_jax[serve]'") from None
    from nlae_jax.serve.reading import Reader

    serve(lambda: Reader(load_pair(options)), options.host, options.port, options.token, options.max_concurrent)
    return 0


COMMANDS = (
    Command(
        "serve",
        "serve a pair over HTTP like Neuronpedia's NLA server, with a page to look at explanations",
        _add_arguments,
        _run,
        check=check_pair,
    ),
)
