"""`nlae serve`: binds a socket, runs the server on it, and ends it."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable

import uvicorn

from nlae_jax.runtime.errors import UserError
from nlae_jax.runtime.progress import say
from nlae_jax.serve.app import ServerSettings, make_app
from nlae_jax.serve.engine import Engine
from nlae_jax.serve.page import PATH
from nlae_jax.serve.reading import Reader

SECRET = "SECRET"  # the environment variable that Neuronpedia's server reads, too
_MOST_CONNECTIONS = 1024  # with more, every request is answered 503
_SHUTDOWN_SECONDS = 5  # answers under way have this time when the server is asked to stop


def serve(load: Callable[[], Reader], host: str, port: int, token: str, explains: int) -> None:
    """Serves until it is asked to stop. While `load` runs, the server already answers with 503.

    Raises UserError where the address cannot be bound, or is open to other machines without a token. Errors of `load`
    pass through.
    """
    token = token or os.environ.get(SECRET, "")
    if not _is_loopback(host) and not token:
        raise UserError(
            f"--host {host}: others could use the server; give --token (or the environment variable {SECRET}), or stay "
            "on 127.0.0.1"
        )
    if not (token.isascii() and token.isprintable()) or token != token.strip():
        raise UserError("--token: should be printable ASCII without spaces around it: it travels in a header")
    listener = _bound(host, port)
    port = listener.getsockname()[1]
    hosts = () if token else ("127.0.0.1", "localhost", "::1", host.lower())
    engine = Engine(load)
    app = make_app(engine, ServerSettings(secret=token, hosts=tuple(dict.fromkeys(hosts)), explains=explains))
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    server = uvicorn.Server(config)

    def failed() -> None:
        server.should_exit = True

    shown = f"[{host}]" if ":" in host else host
    engine.on_ready = lambda: say(f"ready: http://{shown}:{port}{PATH}")
    engine.on_failure = failed
    say(f"nlae serve: http://{shown}:{port} answers; the pair is loading")
    server.run(sockets=[listener])
    if engine.failure is not None:
        raise engine.failure


def _is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(host: str, port: int) -> socket.socket:
    """Returns a socket bound to the address. Raises UserError where that is not possible."""
    if not 0 <= port < 65536:
        raise UserError(f"--port: {port} should be from 0 (any that is free) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # a name that no domain can have is a UnicodeError
        problem = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot be served on ({problem})") from None
    return listener
