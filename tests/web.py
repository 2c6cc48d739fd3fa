"""A stand-in for a web server with a folder of files, which counts the bytes of every answer."""

from __future__ import annotations

import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Quiet(ThreadingHTTPServer):
    """One thread for each connection; a client that has left is no matter."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a connection that is gone; anything else is a mistake in here."""
        if not isinstance(sys.exception(), OSError | ValueError):
            super().handle_error(request, client_address)


class Files:
    """A stand-in for a web server with a folder of files: GET and HEAD, ranges, no listing.

    `sent` has path, first byte and number of bytes of each answer. All answers together take a second for each
    `bytes_per_sec`, where that is not 0. `cut` says of which paths only a half is sent before the connection ends,
    `faults` what is the answer to paths that match: a status of HTTP, "reset" (the connection breaks), "hang" (none, until
    `close`), or a URL to which the client is sent. `hanging` counts those without an answer.
    `before_sending` is called with the bytes of each answer.
    """

    def __init__(self, root: Path, bytes_per_sec: float = 0.0) -> None:
        self.sent: list[tuple[str, int, int]] = []
        self.bytes_per_sec, self.cut = bytes_per_sec, re.compile("(?!)")
        self.faults: dict[str, int | str] = {}
        self.before_sending: Callable[[int], None] = lambda size: None
        self.hanging = 0
        self._closed = threading.Event()
        line = threading.Lock()
        files = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                """Say nothing."""

            def do_HEAD(self) -> None:
                self._answer(False)

            def do_GET(self) -> None:
                self._answer(True)

            def _answer(self, body: bool) -> None:
                fault = next((fault for part, fault in files.faults.items() if re.search(part, self.path)), None)
                if fault is not None:
                    self._fail(fault)
                    return
                path = root / self.path.lstrip("/")
                content = path.read_bytes() if path.is_file() else None
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                first, last = (int(asked[1]), int(asked[2] or 10**12)) if asked else (0, 10**12)
                part = b"" if content is None else content[first : last + 1]
                self.send_response(404 if content is None else 206 if asked else 200)
                if content is not None:
                    self.send_header("Accept-Ranges", "bytes")
                    self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                if body:
                    files.before_sending(len(part))
                    files.sent.append((self.path.lstrip("/"), first, len(part)))
                    if files.bytes_per_sec:
                        with line:
                            time.sleep(len(part) / files.bytes_per_sec)
                    if files.cut.search(self.path):
                        self.wfile.write(part[: len(part) // 2])
                        self.close_connection = True
                    else:
                        self.wfile.write(part)

            def _fail(self, fault: int | str) -> None:
                if fault == "hang":
                    files.hanging += 1
                    files._closed.wait()
                    self.close_connection = True
                elif fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                else:
                    self.send_response(fault if isinstance(fault, int) else 302)
                    if isinstance(fault, str):
                        self.send_header("Location", fault)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def bytes_sent(self) -> int:
        """Bytes of all answers."""
        return sum(count for _, _, count in self.sent)

    def close(self) -> None:
        """Stop serving."""
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
