"""The page of a dataset while a capture writes it: each load is a whole state, which stays until the next one."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
import time
from http import HTTPStatus
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

import kdata
from kdata.errors import KdataError, MismatchError
from kdata.format.manifest import write_info
from kdata.pipelines.view import server as view_server
from kdata.pipelines.view.server import ViewServer, _Handler
from kdata.pipelines.view.values import View
from tests.browser import needs_browser, result_of
from tests.fakes import run_capture, write_jsonl
from tests.hub_server import HubServer
from tests.pipelines.view.test_view_browser import around

NUM_ROWS = 60
# The teacher's call n waits for a file go-n, so that the capture is as slow as what looks at it.
CAPTURE = """
import itertools, sys, time
from pathlib import Path
from tests.fakes import StandInTeacher, run_capture
out, corpus, tokenizer = (Path(one) for one in sys.argv[1:4])
calls = itertools.count()

def wait(_):
    go = out.with_name(f"go-{next(calls)}")
    while not go.exists():
        time.sleep(0.01)

run_capture(out, corpus, tokenizer, teacher=StandInTeacher(context=128, before_call=wait), kind="topk", k=4, unit_tokens=40)
"""
MAIN = "from kdata.pipelines.cli.main import main; main()"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [
        {"id": f"r{n:02}", "domain": "ab"[n % 2], "text": f"text {n} of the cat and the dog {n * n}"}
        for n in range(NUM_ROWS)
    ]
    return write_jsonl(tmp_path / "texts.jsonl", rows)


class Capture:
    """A process that captures, as far as it may."""

    def __init__(self, root: Path, corpus: Path, tokenizer_dir: Path) -> None:
        self.root, self.calls = root, 0
        command = [sys.executable, "-c", CAPTURE, str(root), str(corpus), str(tokenizer_dir)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    def go_on(self) -> None:
        """Let it read a shard more, if it is not two ahead of what it has committed."""
        shards = len(kdata.open(self.root).manifest) if (self.root / "dataset.json").exists() else 0
        if self.calls <= shards + 2:
            self.root.with_name(f"go-{self.calls}").touch()
            self.calls += 1

    def rows(self) -> int:
        """Rows that it has committed."""
        return len(kdata.open(self.root)) if (self.root / "dataset.json").exists() else 0

    def until_more(self, rows: int) -> None:
        """Let it go on until there are more rows, or it has ended."""
        while self.process.poll() is None and self.rows() <= rows:
            self.go_on()
            time.sleep(0.02)


def get(url: str, name: str, **words: Any) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("GET", f"/api/{name}?{urlencode(words)}", headers={"X-Kdata": "1"})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "file", "hub"])
def test_a_page_is_one_state_and_the_next_load_is_a_newer_one(
    place: str, tmp_path: Path, corpus: Path, tokenizer_dir: Path
) -> None:
    """The folder itself, and what `kdata push --while` sends elsewhere meanwhile; all in processes of their own."""
    root, hub = tmp_path / "d", HubServer()
    environment = hub.environment(tmp_path / "cache")
    address = {"folder": str(root), "file": f"file://{tmp_path}/pushed", "hub": "hf://me/logits"}[place]

    def started(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MAIN, *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    early, _ = (one := started("view", address)).communicate()
    assert one.returncode == 1 and len(early.splitlines()) == 1 and early.startswith("error: "), early
    with Capture(root, corpus, tokenizer_dir) as capture:
        capture.until_more(0)
        pushing = None if place == "folder" else started("push", str(root), address, "--while", "--every", "0.1")
        while pushing is not None and not (len(hub.commits) > 1 or (tmp_path / "pushed/manifest.jsonl").exists()):
            time.sleep(0.05)
        view = started("view", address)
        lines = iter(view.stdout or [])
        url = next(match[0] for line in lines if (match := re.search(r"http://\S+", line)))
        states: dict[str, int] = {}
        seen: dict[str, Any] = {}
        random = Random(1)
        while capture.process.poll() is None or (pushing is not None and pushing.poll() is None):
            if len(states) == 3 and not (tmp_path / "page").exists():
                exporting = started("view", address, "--export", str(tmp_path / "page"), "--rows", "8")
                while exporting.poll() is None:
                    capture.go_on()
                    time.sleep(0.5)
                assert exporting.returncode == 0, exporting.communicate()
            look(url, states, seen, random)
            capture.go_on()
        look(url, states, seen, random)
        view.terminate()
        if pushing is not None:
            output, _ = pushing.communicate()
            assert pushing.returncode == 0, output
    hub.close()
    home = kdata.open(root)
    counts = list(states.values())
    assert counts == sorted(counts) and len(set(counts)) == len(counts) > 3 and counts[-1] == len(home) == NUM_ROWS
    for name in (tmp_path / "page/data").glob("row-*.js"):
        row = json.loads(name.read_text("ascii").partition(", ")[2].rpartition(");")[0])
        seen[row["id"]] = row["tokens"], row["logprob"]
    assert len(seen) > 8
    for number in home.rows_of(sorted(seen)):
        row = home[int(number)]
        tokens, logprobs = seen[row.id]
        assert tokens == row.tokens and logprobs[1:] == pytest.approx(row.logprob[1:].tolist(), rel=1e-4)


def look(url: str, states: dict[str, int], seen: dict[str, Any], random: Random) -> None:
    """What a person does who loads the page, while an older page is open."""
    status, about = get(url, "about")
    assert status == 200, about
    states.setdefault(about["state"], about["rows"])
    assert states[about["state"]] == about["rows"] == sum(one["n"] for one in about["domains"])
    for state in {about["state"], random.choice(list(states))}:
        status, answer = get(url, "rows", state=state, limit=3, offset=random.randrange(max(states[state], 1)))
        if status != 200:
            assert "load it again" in answer["error"] and len(answer["error"].splitlines()) == 1
            continue
        assert answer["total"] == states[state]
        for listed in answer["rows"]:
            status, row = get(url, "row", state=state, number=listed["number"])
            assert status == 200 and row["id"] == listed["id"], row
            assert seen.setdefault(row["id"], (row["tokens"], row["logprob"])) == (row["tokens"], row["logprob"])
        _, overview = get(url, "overview", state=state)
        assert sum(one["all"]["rows"] for one in overview["domains"]) == states[state]


@needs_browser
def test_a_reload_in_a_browser_shows_newer_rows(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    root = tmp_path / "d"

    class Handler(_Handler):
        def do_GET(self) -> None:
            """The harness, and an answer that waits until the dataset has more rows than the page shows."""
            if self.path.startswith("/more?"):
                capture.until_more(int(self.path.partition("?")[2]))
                self._send(HTTPStatus.OK, b"", "text/plain")
            elif self.path == "/harness":
                start = (
                    "frame.onload = () => { frame.onload = null; probe(frame.contentDocument, frame.contentWindow); };"
                )
                page = around("/", STEPS).replace(START, start)
                assert start in page
                content = page.encode()
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            else:
                super().do_GET()

    with Capture(root, corpus, tokenizer_dir) as capture:
        capture.until_more(0)
        with ViewServer(View(kdata.open(root))) as server:
            server.RequestHandlerClass = Handler  # type: ignore[assignment]
            threading.Thread(target=server.serve_forever, daemon=True).start()
            got = result_of(f"{server.url}harness", tmp_path)
            server.shutdown()
    assert "failed" not in got, got
    counts = [one["rows"] for one in got["loads"]]
    assert counts == sorted(set(counts)) and counts[0] > 0, "each load has more rows"
    for one in got["loads"]:
        assert one["listed"] == min(one["rows"], 50) and one["error"] and one["tokens"] > 0
        assert one["later"] == one["total"], "the page stays as it was while the dataset grew"


START = "frame.onload = () => probe(frame.contentDocument, frame.contentWindow);"
STEPS = """
  const loads = [];
  let rows = 0;
  for (let n = 0; n < 4; n += 1) {
    await fetch(`/more?${rows}`);
    const loaded = new Promise(done => { frame.onload = done; });
    frame.contentWindow.location.reload();
    await loaded;
    const at = id => frame.contentDocument.getElementById(id);
    await until(() => at("rows").children.length && at("tokens").children.length);
    rows = Number(at("facts").textContent.match(/([\\d,]+) rows/)[1].replaceAll(",", ""));
    const total = at("total").textContent;
    const one = { rows, total, listed: at("rows").children.length, tokens: at("tokens").children.length };
    one.error = at("error").hidden;
    await fetch(`/more?${rows}`);
    at("order").value = "nll"; at("order").onchange();
    await until(() => [...at("rows").children].length);
    await sleep(300);
    loads.push({ ...one, later: at("total").textContent });
  }
  return { loads };
"""


def test_pages_that_are_too_old_are_told_so(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_server, "MOST_STATES", 2)
    root = tmp_path / "d"
    run_capture(root, corpus, tokenizer_dir, unit_tokens=400, kind="topk", k=4)
    lines = (root / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) >= 3
    info = kdata.open(root).info
    sources = {name: one.model_copy(update={"num_units": None}) for name, one in info.sources.items()}
    write_info(root, info.model_copy(update={"sources": sources}))
    (root / "manifest.jsonl").write_bytes(b"")
    with ViewServer(View(kdata.open(root))) as server:
        first = server.newest()
        assert first.about()["rows"] == 0 and first.rows()["rows"] == [] and first.overview()["domains"] == []
        assert server.newest() is first
        for number in range(1, 3):
            (root / "manifest.jsonl").write_bytes(b"".join(lines[:number]))
            newer = server.newest()
            assert newer.about()["rows"] == len(kdata.open(root)) == newer.rows()["total"]
            assert server.of_state(newer.state) is newer is server.of_state("")
        with pytest.raises(MismatchError, match="load it again"):
            server.of_state(first.state)
        (root / "manifest.jsonl").write_bytes(lines[0] + b"{}\n")
        with pytest.raises(KdataError) as error:
            server.newest()
        assert (
            len(str(error.value).splitlines()) == 1
            and server.of_state(newer.state).rows()["total"] == newer.rows()["total"]
        )
