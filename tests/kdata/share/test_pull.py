"""`kdata pull`: a copy byte for byte, or the rows of a plan or a condition; what happens when a connection ends."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import kdata
from kdata.check.verify import verify
from kdata.errors import ConfigError, DataError, MismatchError, StorageError
from kdata.format.schema import FileInfo
from kdata.pipelines.cli.main import call
from kdata.selection.ranked import Random
from kdata.selection.select import select
from kdata.store.url import Store
from tests import bucket
from tests.fakes import digests
from tests.kdata.selection.plans import Row, dataset_of, score_with
from tests.web import Files


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> kdata.Dataset:
    """Twelve rows in six shards, with a score and a plan; an empty cache."""
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    rows = [Row(f"row-{n:02}", "ab"[n >= 6], 4 + n % 3, 1.0 + n) for n in range(12)]
    written = dataset_of(tmp_path / "home" / "d", rows, shard_rows=2)
    score_with(written, {row.id: n * 5 % 12 for n, row in enumerate(rows)})
    select(written, Random(share=0.5, name="half"))
    return written


@pytest.fixture
def served(home: kdata.Dataset, serve: Callable[[Path], Files]) -> Files:
    return serve(home.path.parent)


def test_all_of_it_is_a_copy_byte_for_byte(home: kdata.Dataset, tmp_path: Path) -> None:
    (home.path / "README.md").write_text("the card")
    url = f"{bucket.Bucket.protocol}://{home.path}"
    assert call(["pull", url, str(tmp_path / "here")]) == 0
    assert digests(tmp_path / "here") == digests(home.path)
    assert verify(kdata.open(tmp_path / "here")) == []
    assert call(["pull", url, str(tmp_path / "here")]) == 0  # verifies what is there
    select(home, Random(share=0.25, name="newer"))
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):  # the copy lacks a plan
        kdata.pull(kdata.open(url), tmp_path / "here")


def test_a_call_that_was_interrupted_goes_on(
    home: kdata.Dataset, served: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served.cut = re.compile("data/capture-00003")
    url, target = f"{served.url}/d", tmp_path / "here"
    assert call(["pull", url, str(target)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "capture-00003" in errors[0] and not target.exists()
    served.cut, before = re.compile("(?!)"), len(served.sent)
    assert call(["pull", url, str(target)]) == 0
    again = [path for path, _, _ in served.sent[before:]]
    assert "d/data/capture-00003.arrow" in again and "d/data/capture-00000.arrow" not in again
    assert kdata.open(target).content_digest == home.content_digest and verify(kdata.open(target)) == []
    assert not [path for path in target.parent.iterdir() if path.name.endswith(".pull")]


def test_a_pull_that_fails_leaves_no_copy_under_way(
    home: kdata.Dataset, served: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    ended: list[str] = []
    several = threading.Event()

    def fetch(self: Store, relative: str, target: Path, info: FileInfo) -> None:
        begun.append(relative)
        if len(begun) == 1:
            several.wait(10)
            raise StorageError("no")
        several.set()
        time.sleep(0.5)
        ended.append(relative)

    opened = kdata.open(f"{served.url}/d")
    monkeypatch.setattr(Store, "fetch", fetch)
    with pytest.raises(StorageError, match="no"):
        opened.copy_to(tmp_path / "here", lambda size: None)  # type: ignore[attr-defined]
    assert sorted(begun[1:]) == sorted(ended) != []


def test_a_dataset_that_changes_meanwhile_is_refused(home: kdata.Dataset, served: Files, tmp_path: Path) -> None:
    opened = kdata.open(f"{served.url}/d")
    manifest = home.path / "manifest.jsonl"
    whole = manifest.read_bytes()
    manifest.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    with pytest.raises(MismatchError, match="has changed since it was opened; run the same command again"):
        kdata.pull(opened, tmp_path / "here")
    assert not (tmp_path / "here").exists()
    manifest.write_bytes(whole)
    assert kdata.pull(opened, tmp_path / "here").content_digest == home.content_digest


def test_rows_of_a_plan_or_a_condition_fetch_their_shards_only(
    home: kdata.Dataset, served: Files, tmp_path: Path
) -> None:
    opened = kdata.open(f"{served.url}/d")
    some = kdata.pull(opened, tmp_path / "some", where="domain = 'b' and ref.nll < 6 -- a comment")
    query = "select rows.id from rows join scores.ref using (id) where domain = 'b' and ref.nll < 6 order by rows.id"
    expected = home.sql(query)["id"].to_pylist()
    assert some.index()["id"].to_pylist() == expected and expected
    shards = {row["shard"] for row in home.index().to_pylist() if row["id"] in expected}
    assert {path for path, _, _ in served.sent if "/data/" in path} == {f"d/data/{name}.arrow" for name in shards}
    half = kdata.pull(kdata.open(f"{served.url}/d"), tmp_path / "half", plan="half")
    assert sorted(half.index()["id"].to_pylist()) == sorted(kdata.Plan.load(home.path / "plans/half").ids)
    theirs = {row.id: row for row in home}
    for row in half:
        assert (row.token_ids == theirs[row.id].token_ids).all()
    assert verify(half) == []
    [source] = half.info.sources.values()
    assert source.inputs[0].address == f"{served.url}/d" and source.inputs[0].digest == home.content_digest


def test_the_same_call_again_verifies_what_is_there(
    home: kdata.Dataset, served: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pull", f"{served.url}/d", str(tmp_path / "some"), "--where"]
    assert call([*command, "domain = 'b'"]) == 0
    before = digests(tmp_path / "some")
    assert call([*command, "domain = 'b'"]) == 0 and digests(tmp_path / "some") == before
    assert "6 rows" in capsys.readouterr().out.splitlines()[-1]
    for other in ("domain = 'a'", "domain >= 'b'"):  # other rows, and the same rows by another condition
        assert call([*command, other]) == 2 and "not an empty folder" in capsys.readouterr().err
    kdata.pull(home, tmp_path / "half", plan="half")
    kdata.pull(home, tmp_path / "half", plan="half")
    for file in home.path.glob("plans/half.*"):
        file.unlink()
    select(home, Random(share=0.5, name="half", seed=1))
    with pytest.raises(ConfigError, match="not an empty folder"):  # the plan of this name has other rows now
        kdata.pull(home, tmp_path / "half", plan="half")
    part = next((tmp_path / "some" / "data").iterdir())
    part.write_bytes(part.read_bytes()[:-9])
    assert call([*command, "domain = 'b'"]) == 1 and "remove it, and run the same command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"plan": "half", "where": "true"}, ConfigError, "give one of them"),
        ({"where": "num_tokens > 100"}, DataError, "no row of .* meets the condition"),
        ({"where": "1; drop table rows"}, ConfigError, "condition"),
        ({}, ConfigError, "is a folder on this machine"),
    ],
)
def test_what_cannot_be_pulled(
    home: kdata.Dataset, tmp_path: Path, options: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kdata.pull(home, tmp_path / "here", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("options", [[], ["--where", "domain = 'b'"]])
@pytest.mark.parametrize("file", ["dataset.json", "manifest.jsonl"])
def test_a_copy_that_cannot_be_read_is_to_be_removed(
    served: Files, tmp_path: Path, options: list[str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pull", f"{served.url}/d", str(tmp_path / "here"), *options]
    assert call(command) == 0
    (tmp_path / "here" / file).write_text("{\n")
    capsys.readouterr()
    assert call(command) == 1
    error = capsys.readouterr().err
    assert f"error: the copy of {served.url}/d in {tmp_path}/here is damaged (" in error
    assert error.endswith("; remove it, and run the same command again\n")
