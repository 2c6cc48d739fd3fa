"""Push: a shared folder opens with the real `datasets`, and holds only what belongs to the dataset."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

import kdata
from kdata.check.verify import PAGES, verify
from kdata.errors import ConfigError, CorruptError, KdataError
from kdata.selection.ranked import All
from kdata.selection.select import select
from kdata.share.arrange import head
from kdata.share.fitness import About
from kdata.share.publication import publication
from kdata.share.push import dataset_files, push
from kdata.store.hub import hub_name
from tests.fakes import digests

# In a process of its own: tests/trainer holds a module called datasets too.
LOAD = """
import json, sys
from datasets import load_dataset
result = {}
for stream in (False, True):
    for data_dir in (None, "data"):
        place = {"data_dir": data_dir, "cache_dir": sys.argv[2]}
        loaded = load_dataset(sys.argv[1], split="train", streaming=stream, **place)
        rows = list(loaded)
        result[f"{stream} {data_dir}"] = [len(rows), sorted(rows[0]), [r["id"] for r in rows]]
        if data_dir:
            result["first"] = {k: rows[0][k] for k in ("input_ids", "rank_codes", "num_exact_codes")}
print(json.dumps(result))
"""


def test_a_pushed_folder_opens_with_the_real_datasets_library(captured: Path, tmp_path: Path) -> None:
    target = tmp_path / "shared"
    assert push(kdata.open(captured), str(target)) == str(target)
    output = subprocess.run(
        [sys.executable, "-c", LOAD, str(target), str(tmp_path / "cache")],
        capture_output=True, text=True, cwd=tmp_path, timeout=200, check=False,
    )  # fmt: skip
    assert output.returncode == 0, output.stderr
    result, dataset = json.loads(output.stdout), kdata.open(captured)
    ids = dataset.index(["id"])["id"].to_pylist()
    for stream in (False, True):
        assert result[f"{stream} None"] == [25, sorted(dataset.index().column_names), ids]
        count, columns, payload_ids = result[f"{stream} data"]
        assert (count, payload_ids) == (25, ids) and {"input_ids", "tail_codes", "num_exact_codes"} <= set(columns)
    first = dataset[0]
    assert (
        result["first"]["input_ids"] == first.token_ids.tolist()
        and result["first"]["rank_codes"] == first.rank.tolist()
    )
    assert result["first"]["num_exact_codes"] == first.num_exact.tolist()


def test_a_copy_holds_the_files_of_the_dataset_and_no_others(copied: Path, tmp_path: Path) -> None:
    select(kdata.open(copied), All())
    (copied / "notes.txt").write_text("mine")
    (copied / "plans/all.json.tmp").write_text("left by a killed run")
    push(kdata.open(copied), str(tmp_path / "shared"))
    before, after = digests(copied), digests(tmp_path / "shared")
    assert set(before) - set(after) == {"notes.txt", "plans/all.json.tmp"} and set(after) - set(before) == set(PAGES)
    assert all(after[name] == before[name] for name in set(before) & set(after))
    assert kdata.open(tmp_path / "shared").content_digest == kdata.open(copied).content_digest


def test_a_damaged_dataset_is_not_shared(copied: Path, tmp_path: Path) -> None:
    path = copied / "index/capture-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(CorruptError, match="is damaged and was not shared"):
        push(kdata.open(copied), str(tmp_path / "shared"))
    path.write_bytes(content)
    (tmp_path / "secret").write_bytes((copied / "tokenizer/tokenizer.json").read_bytes())
    (copied / "tokenizer/tokenizer.json").unlink()
    (copied / "tokenizer/tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptError, match="outside the dataset"):
        push(kdata.open(copied), str(tmp_path / "shared"))
    assert not (tmp_path / "shared").exists()


def test_a_link_that_belongs_to_nothing_stays_behind(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (copied / "tokenizer/link.json").symlink_to(tmp_path / "secret")
    (copied / "data/stray.arrow").write_text("")
    push(kdata.open(copied), str(tmp_path / "shared"))
    assert not list((tmp_path / "shared").rglob("link.json")) + list((tmp_path / "shared").rglob("stray.arrow"))


def test_a_destination_that_is_not_free_or_not_valid_is_refused(captured: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    for target in (tmp_path / "full", tmp_path / "full/file", captured):
        with pytest.raises(ConfigError, match="not an empty folder"):
            push(kdata.open(captured), str(target))
    with pytest.raises(
        ConfigError, match=r"is a URL, and this needs a local path: push copies to a folder or to the Hub"
    ):
        push(kdata.open(captured), "s3://bucket/name")
    with pytest.raises(ConfigError, match="write hf://OWNER/NAME"):
        push(kdata.open(captured), "hf://nobody")
    assert hub_name("hf://datasets/a/b") == hub_name("hf://a/b") == "a/b"


class EmptyRepository:
    """A stand-in for the Hub's client: a repository that was just created."""

    def dataset_info(self, name: str) -> Any:
        return SimpleNamespace(sha="c0")

    def list_repo_files(self, name: str, **options: Any) -> list[str]:
        return [".gitattributes"]


class StandInHub:
    """A stand-in for the Hub's client that keeps the files of one repository, and applies commits as the Hub does."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.commits = files, 0

    def create_repo(self, name: str, **options: Any) -> str:
        return f"https://hub/{name}"

    def dataset_info(self, name: str) -> Any:
        return SimpleNamespace(sha=f"c{self.commits}")

    def list_repo_files(self, name: str, *, revision: str, repo_type: str) -> list[str]:
        assert revision == f"c{self.commits}" and repo_type == "dataset"
        return list(self.files)

    def create_commit(self, *, operations: list[Any], parent_commit: str, **options: Any) -> None:
        assert parent_commit == f"c{self.commits}"
        self.commits += 1
        for operation in operations:
            if isinstance(operation, huggingface_hub.CommitOperationDelete):
                del self.files[operation.path_in_repo]
            else:
                with operation.as_file() as content:
                    self.files[operation.path_in_repo] = content.read()


def test_a_smaller_dataset_takes_the_place_of_the_former_one(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the Hub's client: after the second push the repository is the second dataset."""
    own = {".gitattributes": b"", "LICENSE": b"mine", "pictures/index/cat.png": b"cat"}
    hub = StandInHub(dict(own))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    select(kdata.open(copied), All())
    push(kdata.open(copied), "hf://me/logits")
    assert len([path for path in hub.files if path.startswith("index/")]) == len(kdata.open(copied).manifest) > 1
    assert "plans/all.json" in hub.files
    push(head(kdata.open(copied), tmp_path / "small", 3), "hf://me/logits")
    assert hub.commits == 2
    small = kdata.open(tmp_path / "small")
    assert set(hub.files) - set(own) == {*dataset_files(small), *PAGES}
    assert {name: hub.files[name] for name in own} == own
    for path, content in hub.files.items():
        (tmp_path / "clone" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / path).write_bytes(content)
    clone = kdata.open(tmp_path / "clone")
    assert clone.content_digest == small.content_digest and clone.num_rows == 3
    assert {problem.path for problem in verify(clone, deep=True)} == {"LICENSE", "pictures/"}
    push(small, "hf://me/logits")
    assert set(hub.files) - set(own) == {*dataset_files(small), *PAGES}, "the same again deletes nothing"


def test_nothing_is_deleted_in_a_repository_that_holds_something_else(
    captured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the Hub's client."""
    own = {"data/train-0.parquet": b"x", "index/page.html": b"y", "dataset.json": b"{}"}
    hub = StandInHub(dict(own))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    push(kdata.open(captured), "hf://me/logits")
    assert {"data/train-0.parquet", "index/page.html"} <= set(hub.files)


def test_the_hub_is_given_a_private_repository_and_the_dataset_s_files(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the Hub's client: no hub can be reached here."""
    calls: dict[str, Any] = {}

    class StandInApi(EmptyRepository):
        def create_repo(self, name: str, **options: Any) -> str:
            calls["create"] = (name, options)
            return f"https://hub/{name}"

        def create_commit(self, **options: Any) -> None:
            calls["commit"] = options

    (copied / "notes.txt").write_text("mine")
    before = digests(copied)
    monkeypatch.setattr(huggingface_hub, "HfApi", StandInApi)
    assert push(kdata.open(copied), "hf://me/logits") == "https://hub/me/logits"
    name, options = calls["create"]
    assert name == "me/logits" and options["private"] and options["repo_type"] == "dataset"
    sent = {operation.path_in_repo: operation for operation in calls["commit"]["operations"]}
    assert "notes.txt" not in sent and {"README.md", "dataset.json", "manifest.jsonl"} <= set(sent)
    with sent["README.md"].as_file() as card:
        assert card.read() == publication(kdata.open(copied), About())["README.md"]
    with sent["croissant.json"].as_file() as page:
        assert json.loads(page.read())["url"] == "https://huggingface.co/datasets/me/logits"
    assert digests(copied) == before, "the dataset itself is only read"


def test_a_hub_that_cannot_be_reached_gives_one_error(captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(KdataError, match=r"hf://nobody/nothing cannot be opened"):
        kdata.open("hf://nobody/nothing")
    with pytest.raises(KdataError):
        push(kdata.open(captured), "hf://nobody/nothing")
    assert not (captured / "README.md").exists()
