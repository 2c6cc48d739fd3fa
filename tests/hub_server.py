"""A stand-in for the Hub: what the real client asks for about a dataset repository, on the loopback.

Read: repository, revision, tree and file paths as JSON, and files with ranges. Written: new repository, which files go as LFS
objects, upload of these, commits (small files in them, and deletions), and tags. Each commit is a folder of its own, so old
ones stay. It does not speak xet: a client has to run with HF_HUB_DISABLE_XET=1. The client takes the server's address from
HF_ENDPOINT at import, so it is another process (`environment`), or one whose constants are set (`in_process`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

ERRORS = {
    "RevisionNotFound": 404, "EntryNotFound": 404, "RepoNotFound": 404, "GatedRepo": 403, "Forbidden": 403,
    "NoToken": 401, "Exists": 409, "Stale": 412, "Bad": 400, "Failed": 500,
}  # fmt: skip
LFS_BYTES = 1000  # files from this size on are LFS objects


class HubServer:
    """One server. commits: folder of each commit, by its 40 digits. refs: commit of each branch and tag of me/logits.

    `sent` has path, first byte and number of bytes of each answer with content of a file; of paths that match `cut` only a
    half is sent. me/gated refuses everybody.

    `received` has path or digest, and number of bytes, of each file that came; `breaks_after`: the connection breaks at the
    upload after so many. `token`: the only one with which something may be written, in me/. `refuses`: part of a path, and
    the name of the error that is the answer there. `is_full`: no large file is taken.
    """

    def __init__(self) -> None:
        self.commits: dict[str, Path] = {}
        self.refs: dict[str, str] = {}
        self.sent: list[tuple[str, int, int]] = []
        self.cut = re.compile("(?!)")
        self.received: list[tuple[str, int]] = []
        self.breaks_after: int | None = None
        self.refuses: dict[str, str] = {}
        self.is_full = False
        self.token = "hf_" + "w" * 34
        self.meanwhile = lambda: None  # called before each commit, as what somebody else does then
        self._objects: dict[str, bytes] = {}
        self._root = Path(tempfile.mkdtemp(prefix="hub"))
        self._guard = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                """Say nothing."""

            def do_HEAD(self) -> None:
                hub._answer(self, b"")

            def do_GET(self) -> None:
                hub._answer(self, b"")

            def do_POST(self) -> None:
                hub._answer(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            def do_PUT(self) -> None:
                hub._upload(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        shutil.rmtree(self._root)

    def in_process(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        """Let the client of this process ask this server, with its token."""
        import huggingface_hub.constants

        patch.setattr(huggingface_hub.constants, "ENDPOINT", self.url)
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", self.token)
        patch.setenv("KDATA_CACHE", str(cache / "kdata"))

    def environment(self, cache: Path) -> dict[str, str]:
        """For a process that reads it, with an own cache."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache / "hf"), "KDATA_CACHE": str(cache / "kdata")}
        return {
            **os.environ,
            **own,
            "COLUMNS": "300",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

    def push(self, folder: Path, commit: str, *names: str) -> None:
        """Make a folder the content of a commit, which branches and tags then stand for."""
        self.commits[commit] = folder
        self.refs |= dict.fromkeys(names, commit)

    def _answer(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        path = unquote(urlsplit(request.path).path)
        with self._guard:
            if request.command == "POST" and "/paths-info/" not in path:
                self._json(request, self._written(request, path, body))
                return
        parts = re.fullmatch(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?", path)
        if parts is None or parts[1] != "me/logits" or not self.commits:
            self._json(request, "GatedRepo" if parts and parts[1] == "me/gated" else "RepoNotFound")
            return
        what, revision, rest = parts[2] or "revision", parts[3] or "main", parts[4] or ""
        commit = self.refs.get(revision, revision)
        if what == "refs":
            self._json(request, self._refs())
            return
        if commit not in self.commits:
            self._json(request, "RevisionNotFound")
            return
        root = self.commits[commit]
        place = root / rest
        if what == "revision":
            self._json(request, {"id": "me/logits", "sha": commit, "private": False, "siblings": [], "tags": []})
        elif what == "paths-info":
            asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            self._json(request, [_entry(root, root / name) for name in asked["paths"] if (root / name).exists()])
        elif what == "tree" and place.is_dir():
            is_deep = parse_qs(urlsplit(request.path).query).get("recursive", ["false"])[0].lower() == "true"
            self._json(
                request, [_entry(root, path) for path in sorted(place.rglob("*") if is_deep else place.iterdir())]
            )
        elif what == "resolve" and place.is_file():
            self._file(request, rest, place.read_bytes(), commit)
        else:
            self._json(request, "EntryNotFound")

    def _refs(self) -> dict[str, Any]:
        known = [{"name": name, "targetCommit": commit} for name, commit in self.refs.items()]
        return {
            "branches": [{**one, "ref": "refs/heads/main"} for one in known if one["name"] == "main"],
            "tags": [{**one, "ref": f"refs/tags/{one['name']}"} for one in known if one["name"] != "main"],
            "converts": [],
        }

    def _written(self, request: BaseHTTPRequestHandler, path: str, body: bytes) -> Any:
        """The answer to what changes something, or the name of an error."""
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return "NoToken"
        if refused := [error for part, error in self.refuses.items() if part in path]:
            return refused[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            if (asked.get("organization"), asked["name"]) != ("me", "logits"):
                return "Forbidden"
            if self.commits:
                return "Exists"
            self._commit([], None)
            return {"url": f"{self.url}/datasets/me/logits"}
        if path.endswith("/info/lfs/objects/batch"):
            return {"transfer": "basic", "objects": [self._wanted(one) for one in json.loads(body)["objects"]]}
        what = re.fullmatch(r"/api/datasets/me/logits/(preupload|commit|tag)/([^/]+)", path)
        if what is None or not self.commits:
            return "RepoNotFound"
        if what[1] == "preupload":
            large = {one["path"]: one["size"] >= LFS_BYTES for one in json.loads(body)["files"]}
            modes = {name: "lfs" if is_large else "regular" for name, is_large in large.items()}
            return {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}
        if what[1] == "tag":
            tag = json.loads(body)["tag"]
            if tag in self.refs:
                return "Exists"
            self.refs[tag] = self.refs.get(what[2], what[2])
            return {}
        self.meanwhile()
        header, *changes = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit") not in (None, self.refs["main"]):
            return "Stale"
        commit = self._commit(changes, self.refs["main"])
        return {"commitOid": commit, "commitUrl": f"{self.url}/datasets/me/logits/commit/{commit}"}

    def _wanted(self, one: dict[str, Any]) -> dict[str, Any]:
        if self.is_full:
            return {**one, "error": {"code": 507, "message": "no storage left\nsee the page of prices"}}
        upload = {"actions": {"upload": {"href": f"{self.url}/objects/{one['oid']}"}}}
        return {**one, **({} if one["oid"] in self._objects else upload)}

    def _commit(self, changes: list[dict[str, Any]], parent: str | None) -> str:
        commit = f"{len(self.commits) + 1:040x}"
        root = self._root / commit
        if parent is None:
            root.mkdir()
            (root / ".gitattributes").write_text("")
        else:
            shutil.copytree(self.commits[parent], root)
        for change in changes:
            about = change["value"]
            place = root / about["path"]
            place.parent.mkdir(parents=True, exist_ok=True)
            if change["key"] == "deletedFile":
                place.unlink()
            elif change["key"] == "lfsFile":
                place.write_bytes(self._objects[about["oid"]])
            else:
                content = base64.b64decode(about["content"])
                self.received.append((about["path"], len(content)))
                place.write_bytes(content)
        self.push(root, commit, "main")
        return commit

    def _upload(self, request: BaseHTTPRequestHandler) -> None:
        content = request.rfile.read(int(request.headers["Content-Length"]))
        digest = request.path.rpartition("/")[2]
        with self._guard:
            is_broken = self.breaks_after is not None and len(self.received) >= self.breaks_after
            if not is_broken and hashlib.sha256(content).hexdigest() == digest:
                self.received.append((digest, len(content)))
                self._objects[digest] = content
        if is_broken:
            request.close_connection = True
            return
        self._json(request, {})

    def _json(self, request: BaseHTTPRequestHandler, content: Any) -> None:
        """Content, or the name of an error."""
        failed = isinstance(content, str)
        text = json.dumps({"error": content, "url": f"{self.url}/datasets/me/logits"} if failed else content).encode()
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
    place = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": place, "oid": "0" * 40, "size": 0}
    data = path.read_bytes()
    about = {"type": "file", "path": place, "size": len(data)}
    if len(data) >= LFS_BYTES:
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {**about, "oid": "0" * 40, "lfs": lfs}
    return {**about, "oid": hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()}
