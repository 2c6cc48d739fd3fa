"""A stand-in for the Hub: what the real client asks for about a dataset repository, on the loopback.

Read: repository, revision, tree (in pages) and file paths as JSON, and files with ranges. Written: new repository, which
files go as LFS objects, upload of these, commits (small files in them, and deletions), and tags. Each commit is a folder of
its own, so old ones stay. Large files go by HTTP, or by xet (`HubServer(xet=True)`, see `tests.xet_store`): then hf_xet sends
and fetches them, and ranges come by the way that the Hub has for clients without it, a redirect to another address.
The client takes the server's address from HF_ENDPOINT at import, so it is another process (`environment`), or one whose
constants are set (`in_process`, which is without xet).
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
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import pytest

from tests.web import Quiet
from tests.xet_store import XetStore

ERRORS = {
    "RevisionNotFound": 404, "EntryNotFound": 404, "RepoNotFound": 404, "GatedRepo": 403, "Forbidden": 403,
    "NoToken": 401, "Exists": 409, "Stale": 412, "BadRange": 416, "TooMany": 429, "Bad": 400, "Failed": 500,
}  # fmt: skip
PIECES_PER_SEC = 20  # that all connections together send, where there is a rate
LFS_BYTES = 1000  # files from this size on are LFS objects
# The client tries five times more where a connection breaks, and waits 23 seconds in all. This lets it try at once.
AT_ONCE = """
import time, types, huggingface_hub.file_download as download, huggingface_hub.utils._http as http
http.time = download.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
"""


class HubServer:
    """One server. commits: folder of each commit, by its 40 digits. refs: commit of each branch and tag of me/logits.

    `sent` has path (xorb/HASH for a part of a xorb), first byte and number of bytes of each answer with content of a file; of
    paths that match `cut` only a half is sent. All of them together take a second for each `bytes_per_sec`, where that is not
    0, and each answer `answer_sec` beside that. `page`: entries in one answer of a tree. `asked` has method and path of each
    request, and `transfers` the ways by which a client offered to send large files by HTTP. me/gated refuses everybody.

    `received` has path or digest, and number of bytes, of each file or xorb that came; `breaks_after`: the connection breaks
    at the upload after so many. `token`: the only one with which something may be written, in me/. `refuses`: part of a path,
    and the name of the error that is the answer there. `is_full`: no large file is taken. `limited`: part of a path, and how
    many questions there are still answered with 429, and "Retry-After: 30". `chunk_bytes`: a larger file goes up by the way
    `multipart`, in parts of so many; 0: none does.
    """

    def __init__(self, *, xet: bool = False) -> None:
        self.xet = XetStore() if xet else None
        self.asked: list[tuple[str, str]] = []
        self.transfers: list[list[str]] = []
        self.bytes_per_sec, self.answer_sec, self.page = 0.0, 0.0, 1000
        self.commits: dict[str, Path] = {}
        self.refs: dict[str, str] = {}
        self.sent: list[tuple[str, int, int]] = []
        self.cut = re.compile("(?!)")
        self.received: list[tuple[str, int]] = []
        self.breaks_after: int | None = None
        self.refuses: dict[str, str] = {}
        self.is_full = False
        self.limited: dict[str, int] = {}
        self.chunk_bytes = 0
        self.token = "hf_" + "w" * 34
        self.meanwhile = lambda: None  # called before each commit, as what somebody else does then
        self._objects: dict[str, bytes] = {}
        self._parts: dict[tuple[str, int], bytes] = {}  # of objects that are not complete
        self._root = Path(tempfile.mkdtemp(prefix="hub"))
        self._guard, self._line = threading.Lock(), threading.Lock()
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
                hub.asked.append(("PUT", self.path))
                hub._upload(self)

            def do_DELETE(self) -> None:
                hub._answer(self, b"")

        self._server = Quiet(("127.0.0.1", 0), Handler)
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

        huggingface_hub.HfFileSystem.clear_instance_cache()  # one that knows another server
        patch.setattr(huggingface_hub.constants, "ENDPOINT", self.url)
        address = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        assert self.xet is None, "hf_xet keeps one session for each process"
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
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
            "HF_TOKEN": self.token,
        }

    def push(self, folder: Path, commit: str, *names: str) -> None:
        """Make a folder the content of a commit, which branches and tags then stand for."""
        self.commits[commit] = folder
        self.refs |= dict.fromkeys(names, commit)

    def bytes_sent(self) -> int:
        """Bytes of all answers with content of a file."""
        return sum(count for _, _, count in self.sent)

    def _answer(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append((request.command, path))
        time.sleep(self.answer_sec)
        if self._is_limited(request, path):
            return
        if path.startswith("/complete/"):
            self._complete(request, path.rpartition("/")[2], json.loads(body))
            return
        if path.startswith("/cas/"):
            self._cas(request, path.removeprefix("/cas"), body)
            return
        if path.startswith("/objects/"):
            digest = path.rpartition("/")[2]
            self._part(request, parse_qs(urlsplit(request.path).query)["name"][0], self._objects[digest], {})
            return
        with self._guard:
            if request.command in ("POST", "DELETE") and "/paths-info/" not in path:
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
        if what in ("xet-read-token", "xet-write-token") and self.xet:
            refusal = self._refusal(request, path) if what == "xet-write-token" else None
            if refusal:
                self._json(request, refusal)
            else:
                self._xet_token(request)
            return
        root = self.commits[commit]
        place = root / rest
        if what == "revision":
            self._json(request, {"id": "me/logits", "sha": commit, "private": False, "siblings": [], "tags": []})
        elif what == "paths-info":
            asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            self._json(request, [self._entry(root, root / name) for name in asked["paths"] if (root / name).exists()])
        elif what == "tree" and place.is_dir():
            asked = {name: values[0] for name, values in parse_qs(urlsplit(request.path).query).items()}
            is_deep, first = asked.get("recursive", "false").lower() == "true", int(asked.get("cursor", "0"))
            paths = sorted(place.rglob("*") if is_deep else place.iterdir())
            entries = [self._entry(root, path) for path in paths[first : first + self.page]]
            after = urlencode({**asked, "cursor": first + self.page})
            more = {"Link": f'<{self.url}{urlsplit(request.path).path}?{after}>; rel="next"'}
            self._json(request, entries, more if first + self.page < len(paths) else {})
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
        if refusal := self._refusal(request, path):
            return refusal
        if path == "/api/repos/create":
            asked = json.loads(body)
            if (asked.get("organization"), asked["name"]) != ("me", "logits"):
                return "Forbidden"
            if self.commits:
                return "Exists"
            self._commit([], None)
            return {"url": f"{self.url}/datasets/me/logits"}
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)
            self.transfers.append(asked["transfers"])
            way = "multipart" if self.chunk_bytes and "multipart" in asked["transfers"] else "basic"
            return {"transfer": way, "objects": [self._wanted(one, way) for one in asked["objects"]]}
        what = re.fullmatch(r"/api/datasets/me/logits/(preupload|commit|tag)/([^/]+)", path)
        if what is None or not self.commits:
            return "RepoNotFound"
        if what[1] == "preupload":
            large = {one["path"]: one["size"] >= LFS_BYTES for one in json.loads(body)["files"]}
            modes = {name: "lfs" if is_large else "regular" for name, is_large in large.items()}
            return {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}
        if what[1] == "tag" and request.command == "DELETE":
            return {} if self.refs.pop(what[2], None) else "RevisionNotFound"
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
        if any(change["value"]["oid"] not in self._objects for change in changes if change["key"] == "lfsFile"):
            return "Bad"
        commit = self._commit(changes, self.refs["main"])
        return {"commitOid": commit, "commitUrl": f"{self.url}/datasets/me/logits/commit/{commit}"}

    def _refusal(self, request: BaseHTTPRequestHandler, path: str) -> str | None:
        """The name of the error that is the answer to somebody without the right token, and where a test wants one."""
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return "NoToken"
        return next((error for part, error in self.refuses.items() if part in path), None)

    def _is_limited(self, request: BaseHTTPRequestHandler, path: str) -> bool:
        """Answer with 429 while that is to be the answer."""
        with self._guard:
            part = next((part for part, left in self.limited.items() if left and part in path), None)
            if part is None:
                return False
            self.limited[part] -= 1
        self._json(request, "TooMany", {"Retry-After": "30"})
        return True

    def _wanted(self, one: dict[str, Any], way: str) -> dict[str, Any]:
        if self.is_full:
            return {**one, "error": {"code": 507, "message": "no storage left\nsee the page of prices"}}
        if one["oid"] in self._objects:
            return one
        upload: dict[str, Any] = {"href": f"{self.url}/objects/{one['oid']}"}
        if way == "multipart" and one["size"] > self.chunk_bytes:
            numbers = range(1, -(-one["size"] // self.chunk_bytes) + 1)
            parts = {f"{number:05}": f"{self.url}/parts/{number}/{one['oid']}" for number in numbers}
            header = {"chunk_size": str(self.chunk_bytes), **parts}
            upload = {"href": f"{self.url}/complete/{one['oid']}", "header": header}
        return {**one, "actions": {"upload": upload}}

    def _complete(self, request: BaseHTTPRequestHandler, digest: str, asked: dict[str, Any]) -> None:
        """Join the parts of an object, whose ETags the client repeats."""
        parts = [self._parts.get((digest, one["partNumber"]), b"") for one in asked["parts"]]
        etags = [hashlib.sha256(part).hexdigest() for part in parts]
        content = b"".join(parts)
        if etags != [one["etag"] for one in asked["parts"]] or hashlib.sha256(content).hexdigest() != digest:
            self._json(request, "Bad")
            return
        self._objects[digest] = content
        self._json(request, {})

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
        digest, part = request.path.rpartition("/")[2], re.fullmatch(r"/parts/(\d+)/.*", request.path)
        if self._is_limited(request, request.path):
            return
        with self._guard:
            is_broken = self.breaks_after is not None and len(self.received) >= self.breaks_after
            if not is_broken and part:
                self.received.append((request.path, len(content)))
                self._parts[digest, int(part[1])] = content
            elif not is_broken and hashlib.sha256(content).hexdigest() == digest:
                self.received.append((digest, len(content)))
                self._objects[digest] = content
        if is_broken:
            request.close_connection = True
            return
        self._json(request, {}, {"ETag": hashlib.sha256(content).hexdigest()})

    def _xet_token(self, request: BaseHTTPRequestHandler) -> None:
        """Where xorbs are, and what allows a client to go there for an hour."""
        until = int(time.time()) + 3600
        token = {"casUrl": f"{self.url}/cas", "exp": until, "accessToken": "x" * 20}
        headers = {"Cas-Url": token["casUrl"], "Token-Expiration": str(until), "Access-Token": token["accessToken"]}
        self._json(request, token, {f"X-Xet-{name}": str(value) for name, value in headers.items()})

    def _cas(self, request: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        """What hf_xet asks for, below its own address."""
        assert self.xet is not None
        name = path.rpartition("/")[2]
        first, last = _range(request)
        if path.startswith("/xorb/"):
            self._part(request, f"xorb/{name}", self.xet.xorbs[name], {})
        elif path.startswith("/v2/reconstructions/") and name in self.xet.files:
            known = self.xet.reconstruction(name, first, last, f"{self.url}/cas/xorb/")
            self._json(request, known or "BadRange")
        elif path.startswith("/v1/xorbs/default/"):
            with self._guard:
                is_broken = self.breaks_after is not None and len(self.received) >= self.breaks_after
                if is_broken:
                    self._json(request, "Failed")
                    return
                self.received.append((name, len(body)))
                self._json(request, {"was_inserted": self.xet.add_xorb(name, body)})
        elif path == "/v2/shards":
            with self._guard:
                self._objects |= self.xet.add_shard(body)
            self._json(request, {"type": "result"})
        else:  # what the client can do without: others' chunks, and telling how it went
            self._json(request, "EntryNotFound")

    def _json(self, request: BaseHTTPRequestHandler, content: Any, headers: dict[str, str] | None = None) -> None:
        """Content, or the name of an error."""
        failed = isinstance(content, str)
        text = json.dumps({"error": content, "url": f"{self.url}/datasets/me/logits"} if failed else content).encode()
        request.send_response(ERRORS[content] if failed else 200)
        if failed:
            request.send_header("X-Error-Code", content)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(text)

    def _file(self, request: BaseHTTPRequestHandler, name: str, content: bytes, commit: str) -> None:
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": commit}
        known = self.xet.hash_of.get(digest) if self.xet else None
        if known is None:
            self._part(request, name, content, headers)
            return
        token = f'<{self.url}/api/datasets/me/logits/xet-read-token/{commit}>; rel="xet-auth"'
        request.send_response(302)
        request.send_header("Location", f"{self.url}/objects/{digest}?{urlencode({'name': name})}")
        linked = {
            "X-Linked-Etag": headers["ETag"],
            "X-Linked-Size": str(len(content)),
            "X-Xet-Hash": known,
            "Link": token,
        }
        for header, value in (headers | linked | {"Content-Length": "0"}).items():
            request.send_header(header, value)
        request.end_headers()

    def _part(self, request: BaseHTTPRequestHandler, name: str, content: bytes, headers: dict[str, str]) -> None:
        """A file, or a range of it."""
        first, last = _range(request)
        has_range = "Range" in request.headers
        part = content[first:] if last is None else content[first : last + 1]
        request.send_response(206 if has_range else 200)
        for header, value in headers.items():
            request.send_header(header, value)
        if has_range:
            request.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        if request.command == "GET":
            self.sent.append((name, first, len(part)))
            is_cut = self.cut.search(name) is not None
            self._send_slowly(request, part[: len(part) // 2] if is_cut else part)
            request.close_connection = is_cut

    def _send_slowly(self, request: BaseHTTPRequestHandler, content: bytes) -> None:
        """Some pieces a second, so that a client with patience for ten seconds sees that something comes."""
        place = 0
        while place < len(content):
            rate = self.bytes_per_sec
            piece = content[place : place + int(rate / PIECES_PER_SEC) + 1] if rate else content[place:]
            if rate:
                with self._line:
                    time.sleep(len(piece) / rate)
            request.wfile.write(piece)
            place += len(piece)

    def _entry(self, root: Path, path: Path) -> dict[str, Any]:
        place = path.relative_to(root).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": place, "oid": "0" * 40, "size": 0}
        data = path.read_bytes()
        about = {"type": "file", "path": place, "size": len(data)}
        if len(data) >= LFS_BYTES:
            digest = hashlib.sha256(data).hexdigest()
            known = self.xet.hash_of.get(digest) if self.xet else None
            lfs = {"oid": digest, "size": len(data), "pointerSize": 130}
            return {**about, "oid": "0" * 40, "lfs": lfs, **({"xetHash": known} if known else {})}
        return {**about, "oid": hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()}


def _range(request: BaseHTTPRequestHandler) -> tuple[int, int | None]:
    """First byte that a request wants, and the last one; None is to the end."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    return (int(asked[1]), int(asked[2]) if asked[2] else None) if asked else (0, None)
