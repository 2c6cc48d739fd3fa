"""hf:// with the real client of the Hub, against a stand-in for the Hub over HTTP (`tests.hub_server`)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdata
from kdata.selection.ranked import Random
from kdata.selection.select import select
from tests.hub_server import AT_ONCE, HubServer
from tests.kdata.selection.plans import Row, dataset_of

A, B, EMPTY = "a" * 40, "b" * 40, "e" * 40


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """me/logits: v1 is a dataset of 300 rows in three shards; v2 and main have another shard; empty is no dataset."""
    root = tmp_path_factory.mktemp("hub")
    rows = [Row(f"row-{n:03}", "ab"[n % 2], 30, 1.0 + n % 7) for n in range(400)]
    dataset_of(root / "v1", rows[:300], shard_rows=100)
    select(kdata.open(root / "v1"), Random(share=0.1, name="some"))
    dataset_of(root / "v2", rows, shard_rows=100)
    (root / "empty").mkdir()
    (root / "empty/README.md").write_text("no dataset")
    server = HubServer()
    server.push(root / "v1", A, "v1")
    server.push(root / "v2", B, "v2", "main")
    server.push(root / "empty", EMPTY, "empty")
    yield server
    server.close()


def run(hub: HubServer, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own; what the server sent is only that."""
    hub.sent.clear()
    code = "import sys; from kdata.pipelines.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", AT_ONCE + code, *arguments],
        env=hub.environment(cache),
        capture_output=True,
        text=True,
        check=False,
    )


def test_sql_fetches_the_columns_that_it_needs(hub: HubServer, tmp_path: Path) -> None:
    query = "select domain, max(nll) as m from rows group by 1 order by 1"
    done = run(hub, tmp_path, "sql", "hf://me/logits@v1", query, "--format", "json")
    assert json.loads(done.stdout) == kdata.open(hub.commits[A]).sql(query).to_pylist(), done.stderr
    assert {name.split("/")[0] for name, _, _ in hub.sent} == {"dataset.json", "manifest.jsonl", "index"}
    assert sum(count for _, _, count in hub.sent) < sum(
        p.stat().st_size for p in hub.commits[A].rglob("*") if p.is_file()
    )


def test_pull_and_diff_of_two_versions(hub: HubServer, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "diff", "hf://me/logits@v1", "hf://me/logits", "--format", "json", "--limit", "1")
    facts = json.loads(done.stdout)
    assert (facts["a"]["commit"], facts["b"]["commit"], facts["shards_in_both"]) == (A, B, 3)
    assert facts["rows"]["added"] == {"count": 100, "tokens": 3000, "first": ["row-300"]}
    assert facts["plans"] == {"added": [], "removed": ["some"], "changed": []}
    assert {name for name, _, _ in hub.sent if "/" in name} <= {"index/capture-00003.parquet", "plans/some.json"}
    done = run(hub, tmp_path, "pull", "hf://me/logits@v1", str(tmp_path / "here"), "--plan", "some")
    assert done.returncode == 0, done.stderr
    [source] = kdata.open(tmp_path / "here").info.sources.values()
    assert (source.inputs[0].address, source.inputs[0].commit) == ("hf://me/logits@v1", A)
    assert run(hub, tmp_path, "pull", "hf://me/logits@v1", str(tmp_path / "all")).returncode == 0
    assert kdata.open(tmp_path / "all").content_digest == kdata.open(hub.commits[A]).content_digest
    assert kdata.Plan.load(tmp_path / "all/plans/some").ids == kdata.Plan.load(hub.commits[A] / "plans/some").ids


def test_the_commit_stays_when_the_branch_moves(hub: HubServer, tmp_path: Path) -> None:
    """The first process opens main; main gets another commit, which a second process opens; the first one reads on."""
    code = (
        "import kdata; d = kdata.open('hf://me/logits@moving'); print(len(d), flush=True); input(); "
        "print(d[299].id, len(d.index()), d.commit)"
    )
    hub.refs["moving"] = A
    first = subprocess.Popen(
        [sys.executable, "-c", code],
        env=hub.environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None and first.stdout.readline() == "300\n"
    hub.refs["moving"] = B
    counts = run(hub, tmp_path, "sql", "hf://me/logits@moving", "select count(*) as n from rows", "--format", "json")
    assert json.loads(counts.stdout) == [{"n": 400}]
    answer, _ = first.communicate("go on\n", timeout=60)
    assert answer.split() == ["row-299", "300", A]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://me/logits@gone", "the Hub has no such revision; it was deleted or renamed"),
        ("hf://me/nothing", "there is no such dataset, or HF_TOKEN has no right to see it"),
        ("hf://me/gated", "access to it has to be granted"),
        ("hf://me/logits@empty", "is not a kdata dataset: it has no dataset.json"),
    ],
)
def test_what_cannot_be_opened_is_one_line(hub: HubServer, tmp_path: Path, address: str, message: str) -> None:
    done = run(hub, tmp_path, "info", address)
    assert done.returncode == 1 and message in done.stderr and address in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_connection_that_ends_half_way(hub: HubServer, tmp_path: Path) -> None:
    hub.cut = re.compile("data/capture-00001")
    failed = run(hub, tmp_path, "pull", "hf://me/logits@v1", str(tmp_path / "here"))
    hub.cut = re.compile("(?!)")
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert failed.returncode == 1 and len(errors) == 1 and "capture-00001" in errors[0], failed.stderr
    assert not (tmp_path / "here").exists() and (tmp_path / ".here.pull").exists()
    assert run(hub, tmp_path, "pull", "hf://me/logits@v1", str(tmp_path / "here")).returncode == 0
    assert "data/capture-00000.arrow" not in {name for name, _, _ in hub.sent}
    assert not (tmp_path / ".here.pull").exists()
    shutil.rmtree(tmp_path / "here")
