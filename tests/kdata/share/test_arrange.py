"""Merged, split and cut datasets: every row keeps its id, its content hash and every decoded number."""

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
from kdata.format.schema import content_hash
from kdata.pipelines.cli.main import app
from kdata.selection.plan import make_plan
from kdata.share.arrange import folder_name, head, merge, split
from tests.fakes import StandInTeacher, digests, rows_of_text, run_capture, run_generate, write_jsonl


def rows_by_id(dataset: kdata.Dataset) -> dict[str, dict[str, Any]]:
    """What is known of each row, index and payload, without where it lies."""
    index = dataset.index().drop_columns(["shard", "row", "source"]).to_pylist()
    found = {}
    for about, sequence in zip(index, dataset, strict=True):
        assert about["content_hash"] == content_hash(sequence.token_ids)
        arrays = {k: v.tobytes() for k, v in vars(sequence.sequence).items() if v is not None}
        found[about["id"]] = {**about, **arrays}
    return found


def renamed_capture(root: Path, tokenizer_dir: Path, prefix: str, **settings: Any) -> kdata.Dataset:
    rows = [{**row, "id": prefix + row["id"]} for row in rows_of_text(10)]
    source = write_jsonl(root.with_name(f"{root.name}.jsonl"), rows)
    return run_capture(root, source, tokenizer_dir, **settings)


@pytest.mark.parametrize("link", [False, True])
def test_merged_rows_are_the_rows(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, link: bool) -> None:
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
    with pytest.raises(DataError, match=r"id 'doc-000' stands in .* and in"):
        merge([dataset, dataset], tmp_path / "out")
    with pytest.raises(DataError, match="two datasets or more"):
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


@pytest.mark.parametrize("kind", ["topk", "hybrid", "sampled"])
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


def test_what_was_split_is_not_gone_on_with(
    tmp_path: Path, captured: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    part = head(kdata.open(captured), tmp_path / "out", 3)
    with pytest.raises(MismatchError, match=r"work: 'split' -> 'capture'"):
        run_capture(part.path, corpus_file, tokenizer_dir)


def test_taken_names_and_odd_ones(tmp_path: Path, captured: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="not an empty folder"):
        head(kdata.open(captured), tmp_path / "out", 3)
    with pytest.raises(ConfigError, match="at least one"):
        head(kdata.open(captured), tmp_path / "new", 0)
    assert [folder_name(n) for n in ("a/b", "..", "über", "x y")] == ["a-b", "unnamed", "ber", "x-y"]


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
