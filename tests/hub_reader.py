"""A stand-in for the Hub that can be read: what the real client asks for a dataset repository, on the loopback.

Repository, revision, tree and file paths as JSON, and files with ranges. Nothing can be written. A client has to be another
process that starts with HF_ENDPOINT (`environment`), because huggingface_hub takes its address from there at import.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ERRORS = {"RevisionNotFound": 404, "EntryNotFound": 404, "RepoNotFound": 404, "GatedRepo": 403}


class HubReader:
    """One server. commits: folder of each commit, by its 40 digits. refs: commit of each branch and tag of me/logits.

    `sent` has path, first byte and number of bytes of each answer with content of a file; of paths that match `cut` only a
    half is sent. me/gated refuses everybody.
    """

    def __init__(self) -> None:
        self.commits: dict[str, Path] = {}
        self.refs: dict[str, str] = {}
        self.sent: list[tuple[str, int, int]] = []
        self.cut = re.compile("(?!)")
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                """Say nothing."""

            def do_HEAD(self) -> None:
                hub._answer(self, {})

            def do_GET(self) -> None:
                hub._answer(self, {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
                hub._answer(self, json.loads(body) if body.startswith("{") else parse_qs(body))

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """For a process that reads it, with an own cache."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache / "hf"), "KDATA_CACHE": str(cache / "kdata")}
        return {**os.environ, **own, "COLUMNS": "300", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}

    def push(self, folder: Path, commit: str, *names: str) -> None:
        """Make a folder the content of a commit, which branches and tags then stand for."""
        self.commits[commit] = folder
        self.refs |= dict.fromkeys(names, commit)

    def _answer(self, request: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        path = unquote(urlsplit(request.path).path)
        parts = re.fullmatch(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+)(?:/(.*))?)?", path)
        if parts is None or parts[1] != "me/logits":
            self._json(request, "GatedRepo" if parts and parts[1] == "me/gated" else "RepoNotFound")
            return
        what, revision, rest = parts[2] or "revision", parts[3] or "main", parts[4] or ""
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            self._json(request, "RevisionNotFound")
            return
        root = self.commits[commit]
        place = root / rest
        if what == "revision":
            self._json(request, {"id": "me/logits", "sha": commit, "private": False, "siblings": [], "tags": []})
        elif what == "paths-info":
            self._json(request, [_entry(root, root / name) for name in body["paths"] if (root / name).exists()])
        elif what == "tree" and place.is_dir():
            self._json(request, [_entry(root, path) for path in sorted(place.iterdir())])
        elif what == "resolve" and place.is_file():
            self._file(request, rest, place.read_bytes(), commit)
        else:
            self._json(request, "EntryNotFound")

    def _json(self, request: BaseHTTPRequestHandler, content: Any) -> None:
        """Content, or the name of an error."""
        failed = isinstance(content, str)
        text = json.dumps({"error": content} if failed else content).encode()
        request.send_response(ERRORS[content] if failed else 200)
        if failed:
            request.send_header("X-Error-Code", content)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(text)

    def _file(self, request: BaseHTTPRequestHandler, name: str, content: bytes, commit: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        first, last = (int(asked[1]), int(asked[2] or 10**12)) if asked else (0, 10**12)
        part = content[first : last + 1]
        request.send_response(206 if asked else 200)
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("X-Repo-Commit", commit)
        if asked:
            request.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        if request.command == "GET":
            self.sent.append((name, first, len(part)))
            is_cut = self.cut.search(name) is not None
            request.wfile.write(part[: len(part) // 2] if is_cut else part)
            request.close_connection = is_cut


def _entry(root: Path, path: Path) -> dict[str, Any]:
    kind, size = ("directory", 0) if path.is_dir() else ("file", path.stat().st_size)
    return {"type": kind, "path": path.relative_to(root).as_posix(), "oid": "0" * 40, "size": size}
