"""Merge, split and head: every row keeps its id, its content hash and every decoded number."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kdata
from kdata.check.verify import verify
from kdata.errors import ConfigError, CorruptError, DataError, MismatchError, StorageError
from kdata.format.schema import ManifestEntry, content_hash
from kdata.pipelines.cli.main import app
from kdata.selection.plan import make_plan
from kdata.share.arrange import folder_name, head, merge, split
from kdata.share.interchange.exporter import export_dataset
from kdata.share.interchange.importer import ImportConfig, import_dataset
from kdata.share.push import push
from tests import bucket  # noqa: F401, registers bucket://
from tests.fakes import StandInTeacher, digests, rows_of_text, run_capture, run_generate, write_jsonl


def rows_by_id(dataset: kdata.Dataset) -> dict[str, dict[str, Any]]:
    """Everything about each row, from index and payload, except the shard that holds it."""
    index = dataset.index().drop_columns(["shard", "row", "source"]).to_pylist()
    rows = {}
    for number, about in enumerate(index):
        sequence = dataset.take(np.array([number]))
        assert about["content_hash"] == content_hash(sequence.token_ids)
        arrays = {k: v.tobytes() for k, v in vars(sequence).items() if v is not None}
        rows[about["id"]] = {**about, **arrays}
    return rows


def renamed_capture(root: Path, tokenizer_dir: Path, prefix: str, **settings: Any) -> kdata.Dataset:
    rows = [{**row, "id": prefix + row["id"]} for row in rows_of_text(10)]
    source = write_jsonl(root.with_name(f"{root.name}.jsonl"), rows)
    return run_capture(root, source, tokenizer_dir, **settings)


@pytest.mark.parametrize("link", [False, True])
def test_a_merged_dataset_has_the_rows_of_its_inputs(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, link: bool
) -> None:
    one = run_capture(tmp_path / "one", corpus_file, tokenizer_dir)
    run_generate(one.path, corpus_file, tokenizer_dir)
    one, two = kdata.open(one.path), renamed_capture(tmp_path / "two", tokenizer_dir, "x")
    before = digests(one.path) | digests(two.path)
    merged = merge([one, two], tmp_path / "out", link=link)
    assert rows_by_id(merged) == rows_by_id(one) | rows_by_id(two)
    assert verify(merged, deep=True) == []
    assert list(merged.info.sources) == ["capture", "capture-2", "generate"]
    assert merged.info.identity_digest == one.info.identity_digest
    assert merged.num_tokens == one.num_tokens + two.num_tokens
    refused = [e.rejected for d in (one, two) for e in d.manifest]
    assert merged.sql("select count(*) as n from rejects")["n"].to_pylist() == [sum(refused)] != [0]
    assert set(merged.index()["source"].to_pylist()) == {"capture", "capture-2", "generate"}
    assert all(s == f"{n}-{u:05d}" for s, n, u in ((e.name, e.source, e.unit) for e in merged.manifest))
    payloads = list((merged.path / "data").iterdir())
    assert {os.stat(p).st_nlink for p in payloads} == ({2} if link else {1})
    assert digests(one.path) | digests(two.path) == before
    assert merged.tokenizer_dir is not None
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == ["out"]


def test_what_is_not_of_one_kind_is_not_merged(tmp_path: Path, captured: Path, tokenizer_dir: Path) -> None:
    dataset = kdata.open(captured)
    with pytest.raises(MismatchError, match=r"codec.parameters.k: 8 -> 5"):
        merge([dataset, renamed_capture(tmp_path / "k", tokenizer_dir, "x", k=5)], tmp_path / "out")
    with pytest.raises(MismatchError, match=r"teacher.weights_hash"):
        other = renamed_capture(tmp_path / "t", tokenizer_dir, "x", teacher=StandInTeacher("salt"))
        merge([dataset, other], tmp_path / "out")
    with pytest.raises(DataError, match=r"both have a row with id 'doc-000'"):
        merge([dataset, dataset], tmp_path / "out")
    with pytest.raises(DataError, match="needs two datasets or more, but got 1"):
        merge([dataset], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_is_not_merged_and_links_need_a_file_system(
    tmp_path: Path, copied: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = renamed_capture(tmp_path / "other", tokenizer_dir, "x")

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        with pytest.raises(StorageError, match=r"cannot be linked .*--copy"):
            merge([kdata.open(copied), other], tmp_path / "out", link=True)
    path = next((copied / "data").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match="is damaged"):
        merge([kdata.open(copied), other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["topk", "hybrid", "sampled", "threshold"])
def test_a_split_by_domain_is_a_partition(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, kind: str) -> None:
    dataset = run_capture(tmp_path / "d", corpus_file, tokenizer_dir, kind=kind, temperatures=[2.0])
    parts = split(dataset, tmp_path / "out", by="domain")
    assert sorted(parts) == ["code", "prose"] == sorted(p.name for p in (tmp_path / "out").iterdir())
    assert rows_by_id(parts["code"]) | rows_by_id(parts["prose"]) == rows_by_id(dataset)
    for name, part in parts.items():
        assert set(part.index()["domain"].to_pylist()) == {name}
        assert verify(part, deep=True) == []
        assert part.info.identity() == dataset.info.identity()
        about = part.info.sources["capture"]
        assert about.kind == "split" and about.settings["of"] == dataset.content_digest
        assert about.num_units == len(part.manifest)
        assert [row["row"] for row in part.index().to_pylist()][:2] == [0, 1]
        assert all(entry.codec_error is not None and entry.codec_error.max_nats > 0 for entry in part.manifest) or (
            kind == "sampled"
        )
    assert merge(list(parts.values()), tmp_path / "again").num_rows == dataset.num_rows


def test_a_split_by_plan_gives_its_rows_and_the_rest(tmp_path: Path, copied: Path) -> None:
    dataset = kdata.open(copied)
    ids = dataset.index(["id"])["id"].to_pylist()
    plan = make_plan(dataset, "few", [ids[5], ids[2]], method="sql", parameters={}, repeats=np.array([3, 1]))
    parts = split(dataset, tmp_path / "out", by="plan", plan=plan)
    assert parts["few"].index(["id"])["id"].to_pylist() == [ids[2], ids[5]]
    assert rows_by_id(parts["few"]) | rows_by_id(parts["rest"]) == rows_by_id(dataset)
    with pytest.raises(ConfigError, match="--plan NAME"):
        split(dataset, tmp_path / "none", by="plan")


@pytest.mark.parametrize("count", [1, 7, 25, 99])
def test_the_head_is_the_first_rows(tmp_path: Path, captured: Path, count: int) -> None:
    dataset = kdata.open(captured)
    part = head(dataset, tmp_path / "out", count)
    first = list(rows_by_id(dataset).items())[:count]
    assert list(rows_by_id(part).items()) == first
    assert verify(part, deep=True) == []
    assert part.info.sources["capture"].num_units == len(part.manifest)


def test_what_a_run_left_that_was_killed_after_its_rename_is_removed(tmp_path: Path, captured: Path) -> None:
    """The same command is refused then, as its work is done, and cleans up nevertheless."""
    head(kdata.open(captured), tmp_path / "out", 3)
    left = tmp_path / ".out.0123abcd.tmp.lock"
    left.touch()
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        head(kdata.open(captured), tmp_path / "out", 3)
    assert not left.exists()


def test_a_part_is_not_continued_by_the_capture_of_the_whole(
    tmp_path: Path, captured: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    part = head(kdata.open(captured), tmp_path / "out", 3)
    with pytest.raises(MismatchError, match=r"work: 'split' -> 'capture'"):
        run_capture(part.path, corpus_file, tokenizer_dir)


def test_a_target_that_is_not_free_is_refused_and_folder_names_are_plain(tmp_path: Path, captured: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="not an empty folder"):
        head(kdata.open(captured), tmp_path / "out", 3)
    with pytest.raises(ConfigError, match="ask for at least one row"):
        head(kdata.open(captured), tmp_path / "new", 0)
    assert [folder_name(n) for n in ("a/b", "..", "über", "x y")] == ["a-b", "unnamed", "ber", "x-y"]


def test_inputs_may_be_at_a_url_and_outputs_may_not(
    tmp_path: Path, captured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    remote, local = kdata.open(f"bucket://{captured}"), kdata.open(captured)
    assert rows_by_id(head(remote, tmp_path / "head", 3)) == rows_by_id(head(local, tmp_path / "local", 3))
    parts = split(remote, tmp_path / "parts", by="domain")
    assert rows_by_id(merge(list(parts.values()), tmp_path / "merged")) == rows_by_id(local)
    push(remote, tmp_path / "copy")
    assert kdata.open(tmp_path / "copy").content_digest == local.content_digest
    export_dataset(remote, tmp_path / "rows.parquet", "plain")
    for write in (
        lambda: head(local, "s3://bucket/d", 3),
        lambda: split(local, Path("s3://bucket/d"), by="domain"),  # a Path has one slash less
        lambda: merge(list(parts.values()), "s3://bucket/d"),
        lambda: export_dataset(local, "s3://bucket/rows.parquet", "plain"),
        lambda: import_dataset(tmp_path / "rows.parquet", "s3://bucket/d", ImportConfig(format="plain")),
    ):
        with pytest.raises(ConfigError, match=r"^s3:/.* is a URL, and this needs a local path: [^\n]+$"):
            write()


def test_only_shards_that_hold_a_row_of_the_result_are_read(
    tmp_path: Path, captured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = kdata.open(captured)
    read: set[tuple[str, str]] = set()
    shard_file = kdata.Dataset.shard_file

    def recording(self: kdata.Dataset, entry: ManifestEntry, folder: str) -> Path:
        read.add((folder, entry.name))
        return shard_file(self, entry, folder)

    monkeypatch.setattr(kdata.Dataset, "shard_file", recording)
    head(dataset, tmp_path / "out", int(dataset.shard_starts[1]))
    first = dataset.manifest[0].name
    assert read == {("data", first), ("index", first)} and len(dataset.manifest) > 1


def test_the_commands(tmp_path: Path, captured: Path) -> None:
    root = Path(shutil.copytree(captured, tmp_path / "d"))
    run = CliRunner().invoke
    assert run(app, ["split", str(root), str(tmp_path / "parts")]).exit_code == 0
    parts = [str(tmp_path / "parts" / n) for n in ("code", "prose")]
    result = run(app, ["merge", *parts, str(tmp_path / "back"), "--link"])
    assert result.exit_code == 0 and "25 rows" in result.output
    assert rows_by_id(kdata.open(tmp_path / "back")) == rows_by_id(kdata.open(root))
    result = run(app, ["head", str(root), str(tmp_path / "h"), "-n", "4"])
    assert result.exit_code == 0 and "4 rows" in result.output
