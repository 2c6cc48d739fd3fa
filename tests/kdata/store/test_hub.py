"""A dataset on the Hub: pinned to a commit, copied file by file. With a stand-in for the Hub: none can be reached here."""

from __future__ import annotations

import pickle
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

import kdata
from kdata.check.verify import verify
from kdata.errors import ConfigError, CorruptError, DependencyError, MissingError
from kdata.selection.plan import Plan, make_plan, open_plan
from kdata.selection.ranked import Random
from kdata.selection.select import select
from kdata.store.hub import hub_address, hub_name
from tests.fakes import digests


class StandInHub:
    """A stand-in for the Hub with one repository, me/logits: a folder per commit. `read` lists the files that were read."""

    def __init__(self, root: Path) -> None:
        self.root, self.main, self.read = root, "", list[str]()

    def push(self, dataset: Path, commit: str) -> None:
        """Make a copy of a dataset the newest commit."""
        shutil.copytree(dataset, self.root / commit)
        self.main = commit

    def dataset_info(self, name: str, *, revision: str | None = None) -> Any:
        """As of `HfApi`: the commit of a branch, a tag or a commit."""
        commit = self.main if revision in (None, "main") else revision
        if name != "me/logits" or not (self.root / str(commit)).is_dir():
            raise huggingface_hub.errors.RepositoryNotFoundError("404 not found", response=_NOT_FOUND)
        return types.SimpleNamespace(sha=commit)


_NOT_FOUND = types.SimpleNamespace(headers={}, request=None)
HUB: StandInHub


class HubFiles(LocalFileSystem):
    """A stand-in for `HfFileSystem`: hf://datasets/me/logits@COMMIT/PATH, read only."""

    protocol = "hf"
    cachable = False

    def _strip_protocol_(self, path: str) -> str:
        name = str(path).removeprefix("hf://")
        assert name.startswith("datasets/me/logits@"), f"{path} is not pinned to a commit"
        return str(HUB.root / name.removeprefix("datasets/me/logits@"))

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("hf://")

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        HUB.read.append(self._strip_protocol_(path).removeprefix(f"{HUB.root}/").partition("/")[2])
        return LocalFileSystem()._open(self._strip_protocol_(path), mode, block_size)

    def get_file(self, path: str, target: str, **options: Any) -> None:  # type: ignore[override]
        """Copy a file here."""
        with self._open(path) as source:
            Path(target).write_bytes(source.read())

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Size and kind."""
        return LocalFileSystem().info(self._strip_protocol_(path))

    def ls(self, path: str, detail: bool = False, **options: Any) -> list[Any]:
        """What is in a folder."""
        return LocalFileSystem().ls(self._strip_protocol_(path), detail=detail)


@pytest.fixture
def hub(captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandInHub:
    """The captured dataset with a score-free plan `half`, as commit aaaa; an empty cache."""
    global HUB
    HUB = StandInHub(tmp_path / "hub")
    first = shutil.copytree(captured, tmp_path / "first")
    select(kdata.open(first), Random(share=0.5, name="half"))
    HUB.push(first, "aaaa")
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: HUB)
    monkeypatch.setitem(_registry, "hf", HubFiles)
    return HUB


def test_opening_reads_two_small_files_and_info_no_payload(hub: StandInHub, captured: Path) -> None:
    opened = kdata.open("hf://me/logits")
    assert hub.read == ["dataset.json", "manifest.jsonl"]
    assert repr(opened) == repr(kdata.open(captured)).replace(str(captured), "hf://me/logits")
    counts = "select domain, count(*) as n from rows group by all order by all"
    assert opened.sql(counts).equals(kdata.open(captured).sql(counts))
    assert {path.split("/")[0] for path in hub.read} == {"dataset.json", "manifest.jsonl", "index"}
    assert not (opened.path / "index").exists()


def test_a_row_copies_its_shard_and_no_other(hub: StandInHub, captured: Path) -> None:
    opened, local = kdata.open("hf://datasets/me/logits"), kdata.open(captured)
    row = opened[len(opened) - 1]
    assert (row.id, row.text, row.tokens) == (local[-1].id, local[-1].text, local[-1].tokens)
    name = opened.manifest[-1].name
    copies = {path for path in digests(opened.path) if not path.startswith("tokenizer/")}
    assert copies == {"dataset.json", "manifest.jsonl", f"data/{name}.arrow", f"index/{name}.parquet"}
    before = len(hub.read)
    np.testing.assert_array_equal(opened[-1].token_ids, local[-1].token_ids)
    assert len(hub.read) == before


def test_an_open_dataset_stays_at_its_commit(hub: StandInHub, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = kdata.open("hf://me/logits")
    (copied / "index/capture-00000.parquet").write_bytes(b"another commit")
    hub.push(copied, "bbbb")
    assert opened[0].id == "doc-000"
    again = pickle.loads(pickle.dumps(opened))
    assert again.path == opened.path and again.content_digest == opened.content_digest and again[0].id == "doc-000"
    assert kdata.open("hf://me/logits@aaaa")[0].id == "doc-000"


def test_the_copy_follows_the_newest_commit(hub: StandInHub, tmp_path: Path, captured: Path) -> None:
    from kdata.share.arrange import head

    first = kdata.open("hf://me/logits")
    first.fetch()
    part = head(kdata.open(captured), tmp_path / "part", 3)
    hub.push(part.path, "bbbb")
    second = kdata.open("hf://me/logits")
    assert second.path == first.path and len(second) == 3 and second[2].id == part[2].id
    assert verify(second, deep=True) == []
    assert len(kdata.open("hf://me/logits@aaaa")) == len(kdata.open(captured))  # with a copy of its own


def test_fetch_makes_the_copy_whole(hub: StandInHub) -> None:
    opened = kdata.open("hf://me/logits")
    opened.fetch()
    assert digests(opened.path) == digests(hub.root / "aaaa")
    assert verify(opened, deep=True) == []
    assert kdata.open(opened.path).content_digest == opened.content_digest
    before = len(hub.read)
    opened.fetch()
    assert not [path for path in hub.read[before:] if path.endswith((".arrow", ".parquet"))]


def test_a_plan_on_the_hub_is_copied_when_it_is_named(hub: StandInHub, captured: Path) -> None:
    opened = kdata.open("hf://me/logits")
    assert not (opened.path / "plans").exists()
    theirs = Plan.load(hub.root / "aaaa/plans/half")
    assert opened.sql("select count(*) as n from plans.half")["n"][0].as_py() == len(theirs.ids)
    assert open_plan(opened, "half").ids == theirs.ids
    mine = make_plan(opened, "mine", ["doc-001"], method="sql", parameters={})
    mine.save(opened.path / "plans")
    assert open_plan(kdata.open("hf://me/logits"), "mine").ids == ["doc-001"]
    with pytest.raises(MissingError, match="does not exist"):
        open_plan(opened, "neither")


def test_a_damaged_file_is_refused(hub: StandInHub) -> None:
    path = hub.root / "aaaa/data/capture-00001.arrow"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    opened = kdata.open("hf://me/logits")
    assert opened[0].id == "doc-000"
    with pytest.raises(CorruptError, match=r"hf://me/logits/data/capture-00001\.arrow is damaged"):
        opened.shard(1)
    with pytest.raises(CorruptError, match="is damaged"):
        opened.fetch()
    assert not (opened.path / "data/capture-00001.arrow").exists()


def test_a_damaged_file_of_the_copy_is_copied_again(hub: StandInHub, captured: Path) -> None:
    opened = kdata.open("hf://me/logits")
    opened.fetch()
    path = opened.path / "data/capture-00000.arrow"
    path.write_bytes(b"x" * path.stat().st_size)
    np.testing.assert_array_equal(kdata.open("hf://me/logits")[0].token_ids, kdata.open(captured)[0].token_ids)


def test_wrong_addresses_and_a_missing_client_are_refused(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("hf://me", "hf://me/logits/data", "hf://"):
        with pytest.raises(ConfigError, match="write hf://OWNER/NAME"):
            kdata.open(address)
    for address in ("hf://nobody/nothing", "hf://me/logits@cccc"):
        with pytest.raises(MissingError, match=f"{address} cannot be opened: there is no such dataset, or HF_TOKEN"):
            kdata.open(address)
    assert hub_address("hf://datasets/a/b@v1/x") == ("a/b", "v1/x") and hub_address("hf://a/b") == ("a/b", None)
    with pytest.raises(ConfigError, match="names a revision"):
        hub_name("hf://a/b@v1")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DependencyError, match=r"kdata\[hub\]"):
        kdata.open("hf://me/logits")
