"""A small web server on this machine for the page of a dataset.

It listens on the loopback alone and only reads. A page of another site that is open in the same browser gets nothing:
requests need this server's own name (`Host`), so that no foreign name can be bound to it, and data is given only to those
with the header `X-Kdata`, which a browser lets no other site send.

A page that is loaded shows the dataset as it is then, while another process may write to it. What the page asks for later is
of the same state, so that numbers of rows mean the same rows until it is loaded again.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kdata.errors import ConfigError, KdataError, MismatchError, MissingError, OutOfRangeError, StorageError
from kdata.pipelines.view.values import View

HOST = "127.0.0.1"
PAGE = {"/": "index.html", "/view.js": "view.js", "/view.css": "view.css"}
KINDS = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'"
)
MOST_OF_A_QUERY = 10_000  # characters
MOST_STATES = 8  # of a dataset that grows: pages that show older ones have to be loaded again


def page_file(name: str) -> bytes:
    """A file of the page."""
    return files("kdata.pipelines.view").joinpath("page", name).read_bytes()


class ViewServer(ThreadingHTTPServer):
    """Serves the page of a view. port 0 takes a free one; `url` says which.

    Attributes:
        view: of the newest state that a page has shown.
    Raises:
        StorageError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, view: View, port: int = 0) -> None:
        self.view = view
        self._states, self._guard = OrderedDict({view.state: view}), threading.Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise StorageError(
                f"port {port} of {HOST} cannot be used ({error.strerror}); take another: --port"
            ) from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is nothing to speak of."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def newest(self) -> View:
        """The view for a page that is loaded now. Raises as `View.newest`."""
        with self._guard:
            self.view = self.view.newest()
            self._states[self.view.state] = self.view
            self._states.move_to_end(self.view.state)
            while len(self._states) > MOST_STATES:
                self._states.popitem(last=False)
            return self.view

    def of_state(self, state: str) -> View:
        """The view of a page that was loaded before. Raises MismatchError where that is too long ago."""
        if not state:
            return self.view
        try:
            return self._states[state]
        except KeyError as error:
            raise MismatchError("the dataset has changed since this page was loaded; load it again") from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds until a connection that says nothing is closed

    def do_HEAD(self) -> None:
        """Answer as `do_GET` does, without the content."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer with a file of the page, or with values."""
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._send(HTTPStatus.FORBIDDEN, b"this server answers to its own name alone", "text/plain")
            return
        parts = urlsplit(self.path)
        if parts.path in PAGE:
            name = PAGE[parts.path]
            self._send(HTTPStatus.OK, page_file(name), KINDS[name.rpartition(".")[2]])
        elif parts.path in ANSWERS and self.headers.get("X-Kdata") == "1":
            self._answer(ANSWERS[parts.path], parts.query)
        else:
            self._send(HTTPStatus.NOT_FOUND, b"there is no such page", "text/plain")

    def _answer(self, answer: Callable[[View, dict[str, str]], Any], query: str) -> None:
        try:
            if len(query) > MOST_OF_A_QUERY:
                raise ConfigError(f"the question has more than {MOST_OF_A_QUERY:,} characters")
            words = {name: values[-1] for name, values in parse_qs(query, errors="strict").items()}
            is_new = urlsplit(self.path).path == "/api/about"
            view = self.server.newest() if is_new else self.server.of_state(words.get("state", ""))
            status, content = HTTPStatus.OK, answer(view, words)
        except KdataError as error:
            status = (
                HTTPStatus.NOT_FOUND if isinstance(error, (MissingError, OutOfRangeError)) else HTTPStatus.BAD_REQUEST
            )
            content = {"error": str(error)}
        except UnicodeDecodeError:
            status, content = HTTPStatus.BAD_REQUEST, {"error": "the question is no UTF-8"}
        self._send(status, json.dumps(content, allow_nan=False).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: the terminal belongs to the person."""


def _whole(words: dict[str, str], name: str, default: int = 0) -> int:
    text = words.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise ConfigError(f"{name} is {text!r}, and must be a number from 0 on")
    return int(text)


def _choice(words: dict[str, str]) -> dict[str, Any]:
    return {
        "where": words.get("where", ""),
        "plan": words.get("plan", ""),
        "outside": words.get("outside") == "1",
    }


ANSWERS: dict[str, Callable[[View, dict[str, str]], Any]] = {
    "/api/about": lambda view, words: view.about(),
    "/api/rows": lambda view, words: view.rows(
        **_choice(words),
        order=words.get("order", ""),
        descending=words.get("descending") == "1",
        offset=_whole(words, "offset"),
        limit=_whole(words, "limit", 50),
    ),
    "/api/histogram": lambda view, words: view.histogram(words.get("column", ""), **_choice(words)),
    "/api/overview": lambda view, words: view.overview(**_choice(words)),
    "/api/row": lambda view, words: view.row(_whole(words, "number"), begin=_whole(words, "begin")),
    "/api/rejects": lambda view, words: view.rejects(),
}
