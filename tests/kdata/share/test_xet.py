"""A dataset goes to the Hub and back by xet, with hf_xet itself against a stand-in for its store (`tests.xet_store`)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdata
from kdata.check.verify import verify
from kdata.selection.ranked import All
from kdata.selection.select import select
from kdata.share.push import dataset_files
from tests.fakes import digests
from tests.hub_server import LFS_BYTES, HubServer

MAIN = "import sys; from kdata.pipelines.cli.main import main; main()"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """An empty server whose clients use xet."""
    server = HubServer(xet=True)
    yield server
    server.close()


def run(hub: HubServer, cache: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own: hf_xet has one session for each."""
    for record in (hub.asked, hub.sent, hub.received):
        record.clear()
    return subprocess.run(
        [sys.executable, "-c", MAIN, *arguments],
        env=hub.environment(cache) | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_dataset_goes_up_and_down_by_xet(hub: HubServer, copied: Path, tmp_path: Path) -> None:
    dataset = kdata.open(copied)
    large = {name for name in dataset_files(dataset) if (copied / name).stat().st_size >= LFS_BYTES}
    done = run(hub, tmp_path, "push", str(copied), "hf://me/logits", "--tag", "v1")
    assert done.returncode == 0, done.stderr
    assert hub.xet is not None and len(hub.xet.files) >= len(large) and not hub.transfers, "nothing went by HTTP"
    assert not [path for method, path in hub.asked if method == "PUT"]
    pushed = digests(hub.commits[hub.refs["v1"]])
    assert {name: pushed[name] for name in dataset_files(dataset)} == digests(copied)

    xorbs = set(hub.xet.xorbs)
    select(dataset, All())
    done = run(hub, tmp_path, "push", str(copied), "hf://me/logits")
    assert done.returncode == 0, done.stderr
    assert xorbs < set(hub.xet.xorbs) and {name for name, _ in hub.received if name in xorbs} == set(), (
        "only what is new"
    )

    done = run(hub, tmp_path / "other", "pull", "hf://me/logits@v1", str(tmp_path / "here"))
    assert done.returncode == 0, done.stderr
    assert not [name for name, _, _ in hub.sent if name.startswith(("data/", "index/"))], "they came as xorbs"
    here = kdata.open(tmp_path / "here")
    assert here.content_digest == dataset.content_digest and verify(here, deep=True) == []

    query = "select domain, count(*) as n from rows group by 1 order by 1"
    done = run(hub, tmp_path / "third", "sql", "hf://me/logits@v1", query, "--format", "json")
    assert json.loads(done.stdout) == dataset.sql(query).to_pylist(), done.stderr
    assert {name.split("/")[0] for name, _, _ in hub.sent} == {"dataset.json", "manifest.jsonl", "index"}
    assert [path for method, path in hub.asked if path.startswith("/objects/")], "ranges come by the redirect"


@pytest.mark.slow
def test_without_xet_the_client_offers_other_ways_and_reads_what_went_by_it(
    hub: HubServer, copied: Path, tmp_path: Path
) -> None:
    assert run(hub, tmp_path, "push", str(copied), "hf://me/logits").returncode == 0
    select(kdata.open(copied), All())
    (copied / "data.txt").write_text("beside")
    done = run(hub, tmp_path, "push", str(copied), "hf://me/logits", HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    assert hub.transfers and all(ways == ["basic", "multipart"] for ways in hub.transfers)
    done = run(hub, tmp_path / "other", "pull", "hf://me/logits", str(tmp_path / "here"), HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0 and not [name for name, _, _ in hub.sent if name.startswith("xorb/")], done.stderr
    assert kdata.open(tmp_path / "here").content_digest == kdata.open(copied).content_digest
    both = run(hub, tmp_path / "third", "pull", "hf://me/logits", str(tmp_path / "both"))
    assert both.returncode == 0, "a repository with files of both kinds"
    assert digests(tmp_path / "both") == digests(tmp_path / "here")


@pytest.mark.parametrize("has_right", [True, False])
def test_a_refusal_publishes_nothing(hub: HubServer, captured: Path, tmp_path: Path, has_right: bool) -> None:
    """The store of xorbs fails again and again, or the Hub gives no right to write there."""
    hub.breaks_after = 0
    hub.refuses = {} if has_right else {"/xet-write-token": "Forbidden"}
    done = run(hub, tmp_path, "push", str(captured), "hf://me/logits")
    assert bool([path for _, path in hub.asked if path.startswith("/cas/v1/xorbs/")]) == has_right
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "me/logits" in errors[0], done.stderr
    assert set(digests(hub.commits[hub.refs["main"]])) == {".gitattributes"}
