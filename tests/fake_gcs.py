"""Google Cloud Storage in memory, on localhost: as much of its JSON API as gcsfs, tensorstore and orbax use.

Strict where the real one is: preconditions on generations, 404 for what is not there, byte ranges, pages of listings,
names that are escaped. A request that it does not know is answered 501, so that nothing is taken for done.

A plugin: a test module says `pytest_plugins = ["tests.fake_gcs"]` and asks for the fixture `gcs`, an empty bucket.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import google_crc32c
import pytest

BUCKET = "bucket"
PAGE = 50  # of a listing: small, so that clients have to ask for the next one
REWRITTEN = 4096  # bytes that are copied in one request: few, for the same reason

# What the real one takes, of the parameters that say which object or which part of it.
_KNOWN = {"alt", "delimiter", "endOffset", "fields", "generation", "ifGenerationMatch", "ifGenerationNotMatch"}
_KNOWN |= {"maxResults", "name", "pageToken", "prefix", "prettyPrint", "projection", "startOffset", "tensorstore"}
_KNOWN |= {"rewriteToken", "sourceGeneration", "uploadType", "upload_id", "versions"}


@dataclass(frozen=True)
class StoredObject:
    data: bytes
    generation: int

    @property
    def crc32c(self) -> str:
        return base64.b64encode(google_crc32c.Checksum(self.data).digest()).decode()


def _never(*_: str) -> int:
    return 0


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class FakeGcs:
    """One bucket. `uploads` are the names and sizes of all that was written, in order; `served` the bytes of answers.

    `refuse` sees method and path of every request, `refuse_upload` the name of what is about to be written: what they
    return other than 0 is the status of the answer, and nothing is done. They may kill the client, too.
    """

    port: int = 0
    objects: dict[str, StoredObject] = field(default_factory=dict)
    uploads: list[tuple[str, int]] = field(default_factory=list)
    served: int = 0
    refuse: Callable[[str, str], int] = _never
    refuse_upload: Callable[[str], int] = _never
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _begun: dict[str, bytearray] = field(default_factory=dict)
    _generation: int = 1000

    @property
    def environment(self) -> dict[str, str]:
        """What makes the clients of this process and its children come here, and with no credentials."""
        url = f"http://127.0.0.1:{self.port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GOOGLE_CLOUD_PROJECT": "none",
        }

    def clear(self) -> None:
        """An empty bucket that does nothing unasked."""
        with self._lock:
            self.objects.clear()
            self.uploads.clear()
            self.refuse = self.refuse_upload = _never

    def read(self, name: str) -> bytes:
        return self.objects[name].data

    def names(self, prefix: str = "") -> list[str]:
        with self._lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    # --- what requests do

    def metadata(self, name: str) -> dict[str, Any]:
        stored = self.objects[name]
        time = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": BUCKET,
            "id": f"{BUCKET}/{name}/{stored.generation}",
            "generation": str(stored.generation),
            "metageneration": "1",
            "size": str(len(stored.data)),
            "crc32c": stored.crc32c,
            "contentType": "application/octet-stream",
            "timeCreated": time,
            "updated": time,
        }

    def check(self, name: str, query: dict[str, str]) -> None:
        """Raises Refused where a precondition does not hold. Generation 0 is that of what is not there."""
        current = self.objects[name].generation if name in self.objects else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != current:
            raise Refused(412, "conditionNotMet")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == current:
            raise Refused(304 if current else 412, "notModified")

    def found(self, name: str, query: dict[str, str]) -> StoredObject:
        stored = self.objects.get(name)
        if stored is None or int(query.get("generation", stored.generation)) != stored.generation:
            raise Refused(404, f"No such object: {BUCKET}/{name}")
        return stored

    def write(self, name: str, data: bytes, query: dict[str, str]) -> dict[str, Any]:
        if not name or "\n" in name or "\r" in name or len(name.encode()) > 1024:
            raise Refused(400, f"invalid name {name!r}")
        if status := self.refuse_upload(name):
            raise Refused(status, "refused by the test")
        with self._lock:
            self.check(name, query)
            self._generation += 1
            self.objects[name] = StoredObject(bytes(data), self._generation)
            self.uploads.append((name, len(data)))
            return self.metadata(name)

    def rewrite(self, source: str, target: str, query: dict[str, str]) -> dict[str, Any]:
        """Copies an object; a large one takes two requests, the second with the token of the first."""
        data = self.found(source, {}).data
        answer = {"kind": "storage#rewriteResponse", "objectSize": str(len(data))}
        if len(data) > REWRITTEN and "rewriteToken" not in query:
            return answer | {"done": False, "totalBytesRewritten": str(REWRITTEN), "rewriteToken": "half"}
        return answer | {"done": True, "totalBytesRewritten": str(len(data)), "resource": self.write(target, data, {})}

    def delete(self, name: str, query: dict[str, str]) -> None:
        with self._lock:
            self.found(name, query)
            self.check(name, query)
            del self.objects[name]

    def listing(self, query: dict[str, str]) -> dict[str, Any]:
        """A page of names and, with a delimiter, of what they have in common up to it."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        most, after = min(int(query.get("maxResults", PAGE)), PAGE), query.get("pageToken", "")
        items: list[dict[str, Any]] = []
        prefixes: list[str] = []
        with self._lock:
            for name in self.names(prefix):
                if name < start or (end is not None and name >= end):
                    continue
                cut = name.find(delimiter, len(prefix)) if delimiter else -1
                entry = name if cut < 0 else name[: cut + len(delimiter)]
                if (after and entry <= after) or entry in prefixes[-1:]:
                    continue
                if len(items) + len(prefixes) == most:
                    last = max([item["name"] for item in items] + prefixes)
                    return {
                        "kind": "storage#objects",
                        "items": items,
                        "prefixes": prefixes,
                        "nextPageToken": base64.urlsafe_b64encode(last.encode()).decode(),
                    }
                if cut < 0:
                    items.append(self.metadata(name))
                else:
                    prefixes.append(entry)
        return {"kind": "storage#objects", "items": items, "prefixes": prefixes}

    def upload(self, query: dict[str, str], headers: Any, body: bytes, url: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of one upload request, of any of the three kinds."""
        kind = query.get("uploadType")
        if kind == "media":
            return 200, {}, self.write(query["name"], body, query)
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)"?', headers["Content-Type"])[1].encode()
            _, first, rest = body.split(b"--" + boundary, 2)
            name = json.loads(re.split(rb"\r?\n\r?\n", first, maxsplit=1)[1])["name"]
            data = re.split(rb"\r?\n\r?\n", rest, maxsplit=1)[1].rsplit(b"\n--" + boundary + b"--", 1)[0]
            return 200, {}, self.write(name, data.removesuffix(b"\r"), query)
        if kind != "resumable":
            raise Refused(400, f"uploadType {kind}")
        if "upload_id" not in query:
            upload_id = str(len(self._begun))
            self._begun[upload_id] = bytearray()
            return 200, {"Location": f"{url}&upload_id={upload_id}"}, {}
        begun = self._begun[query["upload_id"]]
        first, total = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers["Content-Range"]).groups()
        if body:
            assert int(first) == len(begun), "a part of an upload is missing"
            begun += body
        if total != "*" and len(begun) == int(total):
            return 200, {}, self.write(query["name"], begun, query)
        return 308, {"Range": f"bytes=0-{len(begun) - 1}"}, {}


class _Handler(BaseHTTPRequestHandler):
    """One request: says what it is, and writes the answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go out one by one, and clients would wait for the second
    gcs: FakeGcs

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        with self.gcs._lock:
            self.gcs.served += len(body)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # of a client that was killed
            super().handle()

    def _handle(self) -> None:
        body = self._body()
        try:
            if status := self.gcs.refuse(self.command, self.path):
                raise Refused(status, "refused by the test")
            status, headers, answer = self._do(body)
        except Refused as error:
            status, headers = error.status, {}
            answer = {"error": {"code": error.status, "message": str(error)}}
        if status in (204, 304):
            answer = b""
        self._answer(status, headers, answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = bytearray()
        while size := int(self.rfile.readline(), 16):
            parts += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(parts)

    def _do(self, body: bytes) -> tuple[int, dict[str, str], Any]:
        split = urlsplit(self.path)
        query = dict(parse_qsl(split.query, keep_blank_values=True))
        if unknown := query.keys() - _KNOWN:
            raise Refused(501, f"parameters {sorted(unknown)}")
        if copied := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)", split.path):
            source, target = unquote(copied[2]), unquote(copied[4])
            return 200, {}, self.gcs.rewrite(source, target, query) if copied[1] == copied[3] == BUCKET else {}
        where = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?", split.path)
        if where is None:
            raise Refused(501, f"{self.command} {split.path}")
        area, bucket, name = where[1], where[2], None if where[3] is None else unquote(where[3])
        if bucket != BUCKET:
            raise Refused(404, f"The specified bucket does not exist: {bucket}")
        match self.command, area, name:
            case "POST" | "PUT", "/upload", None:
                return self.gcs.upload(query, self.headers, body, f"http://{self.headers['Host']}{self.path}")
            case "GET", None, None if split.path.endswith("/o"):
                if "pageToken" in query:
                    query["pageToken"] = base64.urlsafe_b64decode(query["pageToken"]).decode()
                return 200, {}, self.gcs.listing(query)
            case "GET", None, None:
                return 200, {}, {"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "US"}
            case "GET", _, str():
                return self._get(name, query, media=query.get("alt") == "media")
            case "DELETE", None, str():
                self.gcs.delete(name, query)
                return 204, {}, b""
        raise Refused(501, f"{self.command} {split.path}")

    def _get(self, name: str, query: dict[str, str], media: bool) -> tuple[int, dict[str, str], Any]:
        with self.gcs._lock:
            self.gcs.check(name, query)
            stored = self.gcs.found(name, query)
            if not media:
                return 200, {}, self.gcs.metadata(name)
        headers = {
            "Content-Type": "application/octet-stream",
            "x-goog-generation": str(stored.generation),
            "x-goog-metageneration": "1",
            "x-goog-hash": f"crc32c={stored.crc32c}",
        }
        if (asked := self.headers.get("Range")) is None:
            return 200, headers, stored.data
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", asked).groups()
        size = len(stored.data)
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1 if first and last else size)
        if start >= size:
            raise Refused(416, "The requested range cannot be satisfied: not satisfiable")
        return 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}, stored.data[start:stop]


@contextlib.contextmanager
def serving() -> Iterator[FakeGcs]:
    """A bucket while the context lasts."""
    gcs = FakeGcs()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"gcs": gcs}))
    server.daemon_threads = True
    gcs.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield gcs
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[FakeGcs]:
    """One for the session: tensorstore reads where the server is only once."""
    with serving() as gcs, pytest.MonkeyPatch.context() as patch:
        for name, value in gcs.environment.items():
            patch.setenv(name, value)
        yield gcs


@pytest.fixture
def gcs(gcs_server: FakeGcs) -> Iterator[FakeGcs]:
    yield gcs_server
    gcs_server.clear()
