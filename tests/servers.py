"""Language model servers on this machine that behave as a test says."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

GOOD = "A tutorial on baking bread, whose present sentence still needs a verb after the word flour."

# (status, headers, payload), or a function that writes the reply itself.
Reply = tuple[int, dict[str, str], Any] | Callable[[BaseHTTPRequestHandler], None]


def chat(text: Any = f"<explanation>{GOOD}</explanation>") -> Reply:
    """A chat completion with that content."""
    return 200, {}, {"choices": [{"message": {"content": text}}]}


class Script:
    """What a server does: `steps(n, body)` is its reply to the n-th request, from 0. `url` is where it is.

    `release` is set when the test is over: whatever hangs waits for it.
    """

    def __init__(self, steps: Callable[[int, dict[str, Any]], Reply]) -> None:
        self.steps, self.url = steps, ""
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.lock, self.release = threading.Lock(), threading.Event()

    @property
    def asked(self) -> Counter[str]:
        """How often each prompt came."""
        with self.lock:
            return Counter(body["messages"][0]["content"] for _, _, body in self.requests)

    def hang(self, handler: BaseHTTPRequestHandler) -> None:
        """A reply that never comes."""
        self.release.wait(60)

    def drip(self, pieces: Callable[[], Iterator[bytes]]) -> Callable[[BaseHTTPRequestHandler], None]:
        """A reply of `pieces`, one every 20 ms."""

        def reply(handler: BaseHTTPRequestHandler) -> None:
            for piece in pieces():
                handler.wfile.write(piece)
                handler.wfile.flush()
                if self.release.wait(0.02):
                    return

        return reply

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self.lock:
            n = len(self.requests)
            self.requests.append((handler.path, dict(handler.headers), body))
        reply = self.steps(n, body)
        handler.close_connection = callable(reply)
        with contextlib.suppress(OSError):  # the client has given up
            if callable(reply):
                reply(handler)
                return
            status, headers, payload = reply
            data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            handler.send_response(status)
            for name, value in {**headers, "content-length": str(len(data))}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Clients that give up are what many tests are about."""


@contextlib.contextmanager
def serving() -> Iterator[Callable[..., tuple[str, Script]]]:
    """`start(steps)` starts a server and returns (its address, its Script); `certificate`: a file for https."""
    started: list[tuple[_Server, Script]] = []

    def start(steps: Callable[[int, dict[str, Any]], Reply], certificate: Path | None = None) -> tuple[str, Script]:
        script = Script(steps)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                script.handle(self)

            def log_message(self, *_: Any) -> None:
                pass

        server = _Server(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started.append((server, script))
        script.url = f"http{'' if certificate is None else 's'}://127.0.0.1:{server.server_port}"
        return script.url, script

    try:
        yield start
    finally:
        for server, script in started:
            script.release.set()
            server.shutdown()
            server.server_close()


def self_signed(path: Path, address: str = "127.0.0.1", expired: bool = False) -> Path:
    """A file with a new key and its certificate for `address`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 2 * day)
        .not_valid_after(now - day if expired else now + day)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, *form) + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path
