"""Push: a shared folder opens with the real `datasets`, and holds only what belongs to the dataset."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kdata
from kdata.check.verify import PAGES
from kdata.errors import ConfigError, CorruptError, KdataError
from kdata.selection.ranked import All
from kdata.selection.select import select
from kdata.share.push import push
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
    with pytest.raises(ConfigError, match="write hf://OWNER/NAME"):
        push(kdata.open(captured), "hf://nobody")
    assert hub_name("hf://datasets/a/b") == hub_name("hf://a/b") == "a/b"


def test_a_hub_that_cannot_be_reached_gives_one_error(captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(KdataError, match=r"hf://nobody/nothing cannot be opened"):
        kdata.open("hf://nobody/nothing")
    with pytest.raises(KdataError):
        push(kdata.open(captured), "hf://nobody/nothing")
    assert not (captured / "README.md").exists()
