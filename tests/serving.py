"""A server on a port of its own, for the tests that ask it something."""

from __future__ import annotations

import threading
from collections.abc import Callable

import httpx
import uvicorn

from nlae_jax.serve.app import ServerSettings, make_app
from nlae_jax.serve.engine import Engine
from nlae_jax.serve.reading import Reader


class Served:
    """A server in a thread, on a port of its own."""

    def __init__(self, load: Callable[[], Reader], settings: ServerSettings) -> None:
        self.engine = Engine(load, warm=False)
        self.server = uvicorn.Server(
            uvicorn.Config(make_app(self.engine, settings), port=0, log_level="warning", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> Served:
        self._thread.start()
        while not self.server.started:
            assert self._thread.is_alive()
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.should_exit = True
        self._thread.join(30)

    def wait_ready(self) -> Served:
        while self.client.get("/").status_code == 503:
            assert self.engine.failure is None
        return self
