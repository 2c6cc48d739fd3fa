"""The golden datasets of format 1.0 stay readable for ever; newer minor versions are read, newer major ones refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdata
from kdata.check.repair import repair
from kdata.check.verify import verify
from kdata.errors import FormatError, MismatchError
from kdata.format.files import file_info
from kdata.format.manifest import digest_of, json_bytes
from kdata.format.schema import NO_IDENTITY, canonical_json, json_digest, payload_schema
from tests.fakes import run_capture
from tests.golden.make import DATASETS, decoded, make

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
EXPECTED = sorted(GOLDEN.glob("v*/*.json"))


def rewrite(path: Path, **changes: Any) -> None:
    """Change dataset.json as its writer would, with matching digests."""
    content = {**json.loads(path.read_bytes()), **changes}
    identity = {key: value for key, value in content.items() if key not in NO_IDENTITY}
    content["fingerprint"] = changes.get("fingerprint") or json_digest(identity)
    path.write_bytes(json_bytes({**content, "digest": digest_of(content)}))


def test_there_are_golden_datasets_of_each_version() -> None:
    assert {p.parent.name for p in EXPECTED} >= {"v1"}
    assert {p.stem for p in EXPECTED if p.parent.name == "v1"} == set(DATASETS)


def same(actual: Any, expected: Any) -> None:
    """Equal in everything; reals within a few units of float32's last place, as libraries differ in exp and log."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            same(actual[key], value)
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            same(one, other)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-6, nan_ok=True)
    else:
        assert actual == expected


def expected_of(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "v1" / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("path", EXPECTED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_golden_dataset_reads_as_when_it_was_written(path: Path) -> None:
    dataset = kdata.open(path.with_suffix(""))
    same(decoded(dataset), json.loads(path.read_text("utf-8")))
    assert verify(dataset, deep=True) == []
    assert dataset.sql("select reason from rejects")["reason"].to_pylist() == ["empty"]


def test_words_that_stand_in_files_of_earlier_versions_do_not_change() -> None:
    """Their columns carry descriptions, so another word would change the bytes of every shard that is added to such data.

    Since the golden dataset packed-bound no word has changed.
    """
    root = GOLDEN / "v1/packed-bound"
    codec = kdata.open(root).info.codec
    stored = pa.ipc.open_file(root / "data/capture-00000.arrow").schema
    assert stored.equals(payload_schema(codec.id, codec.version).with_metadata(stored.metadata), check_metadata=True)


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_written_today_reads_the_same(tmp_path: Path, name: str) -> None:
    today, golden = decoded(make(tmp_path / name, name)), expected_of(name)
    added = {"messages", "tools"}  # columns since the first ones: null in rows that are no chats
    assert all(row[name] is None for row in today["index"] for name in added)
    before, after = (
        [{k: v for k, v in row.items() if k not in added} for row in found["index"]] for found in (golden, today)
    )
    same(after, before)
    same(today["rows"], golden["rows"])


@pytest.fixture(params=sorted(DATASETS))
def newer(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A golden dataset as a later minor version might write it: further keys everywhere, and further columns."""
    root = Path(shutil.copytree(GOLDEN / "v1" / request.param, tmp_path / request.param))
    [line] = (root / "manifest.jsonl").read_bytes().splitlines()
    entry = json.loads(line)
    index, payload = root / "index/capture-00000.parquet", root / "data/capture-00000.arrow"
    table = pq.read_table(index)
    pq.write_table(table.append_column("mood", pa.array(["?"] * table.num_rows)), index)
    with pa.ipc.open_file(payload) as reader:
        shard, footer = reader.read_all(), reader.metadata
    shard = shard.append_column("later", pa.array([[1.0]] * shard.num_rows))
    with pa.ipc.new_file(payload, shard.schema, metadata=footer) as writer:
        writer.write_table(shard)
    for path in (index, payload):
        entry["files"][path.relative_to(root).as_posix()] = {**file_info(path).model_dump(), "blake3": "x"}
    entry |= {"codec_error": {**entry["codec_error"], "p99_nats": 0.1}, "host": "later"}
    (root / "manifest.jsonl").write_bytes(canonical_json({**entry, "digest": digest_of(entry)}) + b"\n")
    about = json.loads((root / "dataset.json").read_bytes())
    rewrite(
        root / "dataset.json",
        format_version="1.7",
        teacher={**about["teacher"], "mood": "?"},
        later={"a": 1},
        fingerprint=about["fingerprint"],  # a later version may count other keys
        codec={**about["codec"], "hint": 3},
    )
    return root


def test_a_newer_minor_version_is_read(newer: Path, tmp_path: Path) -> None:
    dataset = kdata.open(newer)
    assert dataset.info.format_version == "1.7"
    golden, actual = expected_of(newer.name), decoded(dataset)
    same(actual["rows"], golden["rows"])
    same([{k: v for k, v in row.items() if k != "mood"} for row in actual["index"]], golden["index"])
    assert verify(dataset, deep=True) == []
    assert dataset.sql("select sum(num_tokens) as n from rows")["n"].to_pylist() == [13]


def test_a_newer_minor_version_is_neither_extended_nor_repaired(
    newer: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    with pytest.raises(MismatchError, match=r"format_version: '1.7' -> '1.0'"):
        run_capture(newer, corpus_file, tokenizer_dir)
    with pytest.raises(FormatError, match=r"has format 1.7, this kdata repairs 1.0; use the kdata that wrote it"):
        repair(newer)


def test_a_newer_major_version_is_refused_with_the_remedy(tmp_path: Path) -> None:
    root = Path(shutil.copytree(GOLDEN / "v1" / "plain-topk", tmp_path / "major"))
    rewrite(root / "dataset.json", format_version="2.0")
    with pytest.raises(FormatError, match=r"has format 2.0, this kdata reads up to 1.x; upgrade kdata"):
        kdata.open(root)


@pytest.mark.parametrize(
    ("codec", "error"),
    [
        ({"id": "wavelet"}, "codec 'wavelet' is unknown to this kdata .*upgrade kdata"),
        ({"version": 2}, "has version 2, this kdata reads up to 1; upgrade"),
    ],
)
def test_a_codec_that_is_unknown_or_newer_is_refused_with_the_remedy(
    tmp_path: Path, codec: dict[str, Any], error: str
) -> None:
    """Its index is readable nevertheless."""
    root = Path(shutil.copytree(GOLDEN / "v1" / "plain-topk", tmp_path / "codec"))
    about = json.loads((root / "dataset.json").read_bytes())
    rewrite(root / "dataset.json", codec={**about["codec"], **codec})
    dataset = kdata.open(root)
    assert dataset.index().num_rows == 3
    with pytest.raises(FormatError, match=error):
        dataset[0]


def test_shards_with_and_without_a_later_column_are_read_together(copied: Path, tmp_path: Path) -> None:
    """The index had no `messages` and `tools` at first: they are null there for every reader and in every copy."""
    from kdata.share.arrange import split

    lines = [json.loads(line) for line in (copied / "manifest.jsonl").read_bytes().splitlines()]
    assert len(lines) > 1
    path = f"index/{lines[0]['name']}.parquet"
    pq.write_table(pq.read_table(copied / path).drop_columns(["messages", "tools"]), copied / path)
    lines[0]["files"][path] = file_info(copied / path).model_dump()
    lines[0]["digest"] = digest_of(lines[0])
    (copied / "manifest.jsonl").write_bytes(b"".join(canonical_json(line) + b"\n" for line in lines))
    dataset = kdata.open(copied)
    assert verify(dataset, deep=True) == []
    for table in (dataset.index(), dataset.index(["messages", "id"]), dataset.sql("select id, messages from rows")):
        assert table.num_rows == dataset.num_rows and table["messages"].null_count == dataset.num_rows
    assert dataset.index(["messages", "id"]).column_names == ["messages", "id"]
    parts = split(dataset, tmp_path / "parts", by="domain").values()
    assert [part.index(["messages"])["messages"].null_count for part in parts] == [part.num_rows for part in parts]
