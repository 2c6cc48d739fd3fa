"""An S3 store for tests: a real client (s3fs) against moto's server in this process, with a proxy before it that misbehaves.

The proxy answers 500 and 503, waits, cuts connections in the middle of a body, cuts what it hands on, and hides new keys from
listings for a while, as asked. moto is a stand-in for the store itself: it speaks S3's protocol, and keeps objects in memory.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

HOP = {"connection", "transfer-encoding", "keep-alive", "content-length", "date", "server"}


@dataclass
class Request:
    """What the client asks for: GET, PUT, HEAD, POST or DELETE; the path is /BUCKET/KEY; and its number, from 1."""

    method: str
    path: str
    query: dict[str, list[str]]
    number: int

    @property
    def is_listing(self) -> bool:
        """Whether it lists keys."""
        return self.method == "GET" and "list-type" in self.query


@dataclass
class Faults:
    """What the proxy does wrong. `decide` gets each request and names a fault, or None.

    error: answers 500. slow down: 503. hang: no answer for `hang_sec`. cut answer: half of the body, then the end. cut
    request: closes before the store gets anything. lost answer: the store does it, and the client never hears of it.
    """

    decide: Callable[[Request], str | None] = lambda request: None
    hang_sec: float = 3.0
    stale_sec: float = 0.0  # how long a listing does not show a key that is new
    count: int = 0
    by_fault: dict[str, int] = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults
    behind: tuple[str, int]

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def _handle(self) -> None:
        faults, parts = self.faults, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with faults.lock:
            faults.count += 1
            request = Request(
                self.command, unquote(parts.path), parse_qs(parts.query, keep_blank_values=True), faults.count
            )
            fault = faults.decide(request)
            if fault is not None:
                faults.by_fault[fault] = faults.by_fault.get(fault, 0) + 1
        if fault == "hang":
            time.sleep(faults.hang_sec)
        if fault in ("hang", "cut request"):
            self._end()
            return
        if fault in ("error", "slow down"):
            code = "InternalError" if fault == "error" else "SlowDown"
            text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>the proxy</Message></Error>'.encode()
            self._answer(500 if fault == "error" else 503, {"Content-Type": "application/xml"}, text)
            return
        connection = http.client.HTTPConnection(*self.behind, timeout=30)
        connection.request(
            self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() not in HOP}
        )
        response = connection.getresponse()
        content = response.read()
        connection.close()
        if request.method in ("PUT", "POST") and response.status < 300:
            faults.written.setdefault(request.path, time.monotonic())
        if request.is_listing and faults.stale_sec:
            content = self._without_new(content, request)
        if fault == "lost answer":
            self._end()
            return
        headers = {k: v for k, v in response.getheaders() if k.lower() not in HOP}
        length = int(response.getheader("Content-Length") or 0) if self.command == "HEAD" else len(content)
        self._answer(
            response.status, headers, content[: len(content) // 2] if fault == "cut answer" else content, length
        )
        if fault == "cut answer":
            self._end()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle

    def _answer(self, status: int, headers: dict[str, str], content: bytes, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _end(self) -> None:
        self.close_connection = True

    def _without_new(self, content: bytes, request: Request) -> bytes:
        """A listing without keys that were written a moment ago."""
        import re

        bucket = request.path.strip("/").split("/")[0]
        new = {
            path.removeprefix(f"/{bucket}/")
            for path, at in self.faults.written.items()
            if time.monotonic() - at < self.faults.stale_sec
        }

        def keep(match: re.Match[bytes]) -> bytes:
            key = re.search(rb"<Key>(.*?)</Key>", match[0], re.DOTALL)
            return b"" if key and unquote(key[1].decode()) in new else match[0]

        return re.sub(rb"<Contents>.*?</Contents>", keep, content, flags=re.DOTALL)


@dataclass(frozen=True)
class S3:
    """A running store.

    Attributes:
        options: of `s3fs`, for `fsspec.config.conf`.
        faults: of the proxy; change them at any time.
    """

    options: dict[str, object]
    faults: Faults
    direct: str

    def waiting(self, seconds: float) -> dict[str, object]:
        """Options that wait so long for an answer."""
        config = {"read_timeout": seconds, "connect_timeout": seconds, "retries": {"max_attempts": 1}}
        return {**self.options, "config_kwargs": config}

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Content of all objects below BUCKET/FOLDER, by relative name, past the proxy."""
        from s3fs import S3FileSystem

        fs = S3FileSystem(**{**self.options, "endpoint_url": self.direct, "skip_instance_cache": True})
        paths = fs.find(prefix)
        return {path.removeprefix(f"{prefix}/"): fs.cat_file(path) for path in paths}


@contextmanager
def s3_store(bucket: str = "bucket") -> Iterator[S3]:
    """Start moto and the proxy; the bucket exists. The options wait a minute for an answer, and try twice."""
    import logging

    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    faults = Faults()
    handler = type("Handler", (_Handler,), {"faults": faults, "behind": (host, port)})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    proxy.daemon_threads = True
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    options: dict[str, object] = {
        "key": "key", "secret": "secret", "endpoint_url": f"http://127.0.0.1:{proxy.server_address[1]}",
        "client_kwargs": {"region_name": "eu-central-1"},
        "config_kwargs": {"read_timeout": 60, "connect_timeout": 60, "retries": {"max_attempts": 2, "mode": "standard"}},
    }  # fmt: skip
    direct = f"http://{host}:{port}"
    try:
        S3FileSystem(**{**options, "endpoint_url": direct, "skip_instance_cache": True}).mkdir(bucket)
        yield S3(options, faults, direct)
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()
