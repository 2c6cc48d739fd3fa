"""`kdata diff` against sets in Python, and how much of the index it reads; `kdata info --provenance`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kdata
from kdata.errors import ConfigError
from kdata.pipelines.cli.main import call
from kdata.pipelines.cli.share import setting_lines
from kdata.selection.ranked import Random
from kdata.selection.select import select
from kdata.share.arrange import head
from kdata.share.diff import diff
from kdata.share.provenance import provenance, provenance_lines
from tests.kdata.selection.plans import Row, dataset_of, score_with
from tests.web import Files


def rows(count: int) -> list[Row]:
    return [Row(f"row-{n:03}", "ab"[n % 2], 3 + n % 4, 1.0 + n, f"text {n}") for n in range(count)]


@given(
    st.dictionaries(st.integers(0, 30), st.tuples(st.integers(2, 4), st.sampled_from([0.5, 1.5])), max_size=20),
    st.dictionaries(st.integers(0, 30), st.tuples(st.integers(2, 4), st.sampled_from([0.5, 1.5])), max_size=20),
    st.integers(0, 5),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_those_of_sets(
    tmp_path_factory: pytest.TempPathFactory, before: dict[int, Any], after: dict[int, Any], limit: int
) -> None:
    root = tmp_path_factory.mktemp("diff")
    made = [
        dataset_of(root / name, [Row(f"{n:02}", tokens=t, nll=nll) for n, (t, nll) in which.items()], shard_rows=4)
        for name, which in (("a", before), ("b", after))
    ]
    a, b = ({row["id"]: row for row in one.index().to_pylist()} for one in made)
    expected = {
        "added": b.keys() - a.keys(),
        "removed": a.keys() - b.keys(),
        "changed": {n for n in a.keys() & b.keys() if a[n]["content_hash"] != b[n]["content_hash"]},
    }
    same_text = (a.keys() & b.keys()) - expected["changed"]
    expected["read_again"] = {n for n in same_text if a[n]["nll"] != b[n]["nll"]}
    facts = diff(*made, limit=limit)
    for kind, ids in expected.items():
        assert facts["rows"][kind]["first"] == sorted(ids)[:limit]
        tokens = sum((b if n in b else a)[n]["num_tokens"] for n in ids)
        assert (facts["rows"][kind]["count"], facts["rows"][kind]["tokens"]) == (len(ids), tokens)
    assert not facts["settings"] and facts["same"] == (not any(expected.values()))


def test_shards_in_both_are_not_read_and_of_others_the_columns_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    first = dataset_of(tmp_path / "home/a", rows(30), shard_rows=10)
    second = dataset_of(tmp_path / "home/b", rows(40), shard_rows=10)
    files = Files(tmp_path / "home")
    try:
        facts = diff(kdata.open(f"{files.url}/a"), kdata.open(f"{files.url}/b"), limit=2)
    finally:
        files.close()
    assert facts["shards_in_both"] == 3
    assert facts["rows"]["added"] == {"count": 10, "tokens": 47, "first": ["row-030", "row-031"]}
    assert {path for path, _, _ in files.sent if "/index/" in path} == {"b/index/capture-00003.parquet"}
    assert not any("/data/" in path for path, _, _ in files.sent)
    assert facts["plans"] is None and diff(first, second)["plans"] == {"added": [], "removed": [], "changed": []}


def test_scores_plans_and_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (dataset_of(tmp_path / name, rows(20), shard_rows=10) for name in "ab")
    for dataset, share in ((a, 0.5), (b, 0.25)):
        select(dataset, Random(share=share, name="some"))
    select(a, Random(share=0.5, name="only_here"))
    score_with(b, {f"row-{n:03}": float(n) for n in range(20)})
    info = b.path / "dataset.json"
    content = json.loads(info.read_text())
    facts = diff(kdata.open(a.path), kdata.open(b.path))
    assert facts["plans"] == {"added": [], "removed": ["only_here"], "changed": ["some"]}
    assert facts["scores"] == {"added": ["ref"], "removed": [], "changed": []} and not facts["same"]
    assert content["fingerprint"] == a.info.identity_digest
    other = dataset_of(tmp_path / "c", rows(20), shard_rows=10, source="generate")
    facts = diff(a, other)
    assert {key.split(".")[1] for key in facts["settings"]} == {"capture", "generate"} and not facts["teacher"]
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "80")
    assert call(["diff", str(a.path), str(other.path)]) == 0
    page = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in page[2:])  # the first two name the datasets
    begin = page.index("settings, a -> b:")
    assert "sources.capture:" in page[begin:] and "  kind: capture -> (not set)" in page[begin:]
    assert not any('"' in line for line in page[begin:])
    long = {"teacher.model": ['"' + "a" * 50 + '"', '"' + "b" * 50 + '"'], "teacher.dtype": [None, '"float32"']}
    assert setting_lines(long, 80) == [
        "settings, a -> b:", "teacher:", "  model:", "    " + "a" * 50, "    -> " + "b" * 50,
        "  dtype: (not set) -> float32",
    ]  # fmt: skip
    assert call(["diff", str(a.path), str(b.path)]) == 0
    page = capsys.readouterr().out
    assert "read again" in page and "plans: removed only_here; changed some" in page and "scores: added ref" in page
    assert call(["diff", str(a.path), str(a.path), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True
    assert call(["diff", str(a.path), str(a.path)]) == 0 and "no difference" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="negative"):
        diff(a, b, limit=-1)


def test_the_chain_goes_back_to_the_teacher(
    captured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """head of a pull of a capture: each step names the dataset that it was made from, and the first one the teacher."""
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    origin = kdata.open(captured)
    files = Files(captured.parent)
    try:
        url = f"{files.url}/{captured.name}"
        pulled = kdata.pull(kdata.open(url), tmp_path / "pulled", where="num_tokens > 3")
    finally:
        files.close()
    last = head(pulled, tmp_path / "last", 2)
    [step] = provenance(last.info).values()
    assert step["command"] == "split" and step["settings"] == {"by": "head", "part": 2}
    assert step["inputs"] == [{"digest": pulled.content_digest, "address": None, "commit": None}]
    before = step["before"]
    assert before["command"] == "split" and before["settings"] == {"by": "where", "part": "num_tokens > 3"}
    assert before["inputs"] == [{"digest": origin.content_digest, "address": url, "commit": None}]
    assert before["before"]["command"] == "capture" and before["before"]["before"] is None
    assert before["before"]["teacher"]["model"] == origin.info.teacher.model
    assert before["before"]["settings"]["corpus"]["sha256"]
    assert call(["info", str(last.path), "--provenance"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines() == provenance_lines(last.info)
    settings = dict(line.strip().split("=", 1) for line in printed.splitlines() if "=" in line)
    assert settings["part"] == "num_tokens > 3" and settings["by"] == "where"  # the step before, which is below
    assert settings["corpus.sha256"] == before["before"]["settings"]["corpus"]["sha256"][:12]
    assert all(len(line) <= 80 for line in printed.splitlines() if "=" in line) and "null" not in printed
    assert url in printed and "kdata capture" in printed and origin.info.teacher.model in printed
