"""Datasets at a URL: the same bytes as in a folder, nothing lost with the machine that wrote them, nothing read unchecked."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from fsspec.registry import _registry

import kdata
from kdata.check.verify import verify
from kdata.errors import ConfigError, CorruptError, DependencyError, MismatchError, MissingError, StorageError
from kdata.format.schema import FileInfo
from kdata.store.url import Store, copy_of, is_url
from tests.bucket import Bucket
from tests.fakes import (
    StandInTeacher,
    digests,
    held_by_another_process,
    rows_of_text,
    run_capture,
    run_generate,
    write_jsonl,
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["bucket", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place in the stand-in for an object store, and on fsspec's own view of the disk."""
    return f"{request.param}://{tmp_path}/store/deep/d"


@pytest.fixture
def behind(tmp_path: Path) -> Path:
    """Where the objects of `url` are."""
    return tmp_path / "store/deep/d"


def both(root: Any, corpus: Path, tokenizer: Path, **settings: Any) -> kdata.Dataset:
    run_generate(root, corpus, tokenizer)
    return run_capture(root, corpus, tokenizer, **settings)


def test_a_url_gets_the_bytes_of_a_folder_and_is_opened_from_any_machine(
    tmp_path: Path, url: str, behind: Path, corpus_file: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(tmp_path / "local", corpus_file, tokenizer_dir)
    expected = digests(tmp_path / "local")
    written = both(url, corpus_file, tokenizer_dir)
    assert digests(behind) == expected
    assert written.num_rows == kdata.open(tmp_path / "local").num_rows
    assert not list(written.path.rglob("*.arrow"))  # the payload is at the URL alone
    again = both(url, corpus_file, tokenizer_dir)
    assert digests(behind) == expected and again.num_rows == written.num_rows
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "elsewhere"))
    opened = kdata.open(url)
    assert opened.path.is_relative_to(tmp_path / "elsewhere") and opened.path.name == "d"
    assert set(digests(opened.path)) == {"dataset.json", "manifest.jsonl"}  # the rest when it is needed
    assert verify(opened, deep=True) == [] and digests(opened.path) == expected


def test_a_run_that_was_interrupted_continues_on_another_machine(
    tmp_path: Path, url: str, behind: Path, corpus_file: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is at the URL after each commit is all that the next machine has."""
    counts = []

    def look(call: int) -> None:
        manifest = behind / "manifest.jsonl"
        counts.append(len(manifest.read_bytes().splitlines()) if manifest.exists() else 0)
        if call == 2:
            raise ConfigError("the machine is gone")

    with pytest.raises(ConfigError, match="the machine is gone"):
        run_capture(url, corpus_file, tokenizer_dir, teacher=StandInTeacher(before_call=look))
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "elsewhere"))
    partial = kdata.open(url)
    assert len(partial.manifest) == 2 and counts[-1] >= 1 and verify(partial, deep=True) == []
    teacher = StandInTeacher()
    run_capture(url, corpus_file, tokenizer_dir, teacher=teacher)
    run_capture(tmp_path / "local", corpus_file, tokenizer_dir)
    assert digests(behind) == digests(tmp_path / "local")
    assert teacher.calls == len(kdata.open(tmp_path / "local").manifest) - 2


def test_a_corpus_that_has_changed_goes_on_at_a_url(
    tmp_path: Path, url: str, behind: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a folder, to the last byte, from a machine that has no copy of the dataset."""
    rows = rows_of_text(9)
    before, after = [{**rows[0], "domain": None}, *rows[1:]], [rows[0], *rows[2:7], {**rows[7], "text": "the log"}]
    for root in (url, tmp_path / "local"):
        run_capture(root, write_jsonl(tmp_path / "c.jsonl", before), tokenizer_dir, unit_tokens=25)
        monkeypatch.setenv("KDATA_CACHE", str(tmp_path / f"elsewhere-{type(root).__name__}"))
        teacher = StandInTeacher()
        corpus = write_jsonl(tmp_path / "c.jsonl", after)
        run_capture(root, corpus, tokenizer_dir, teacher=teacher, unit_tokens=25)
        assert 1 <= teacher.calls <= 2
    assert digests(behind) == digests(tmp_path / "local")
    assert verify(kdata.open(url), deep=True) == []


def test_a_copy_follows_what_is_at_the_url(
    tmp_path: Path, url: str, behind: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    run_generate(url, corpus_file, tokenizer_dir)
    first = kdata.open(url)
    (first.path / "plans").mkdir()
    (first.path / "plans" / "mine.json").write_text("{}")
    run_capture(url, corpus_file, tokenizer_dir)
    second = kdata.open(url)
    assert second.path == first.path and second.num_rows > first.num_rows
    assert len(list(second)) == second.num_rows
    assert (first.path / "plans" / "mine.json").exists()
    (behind / "dataset.json").unlink()
    (behind / "manifest.jsonl").unlink()
    with pytest.raises(MissingError, match=r"is not a kdata dataset: it has no dataset\.json"):
        kdata.open(url)
    assert not first.path.exists()
    for path in sorted(behind.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    run_capture(url, corpus_file, tokenizer_dir, teacher=StandInTeacher("another"))
    assert verify(kdata.open(url), deep=True) == []


@pytest.mark.parametrize(
    "name", ["data/capture-00001.arrow", "index/capture-00000.parquet", "tokenizer/tokenizer.json"]
)
def test_a_damaged_or_missing_file_is_refused_when_it_is_copied(
    url: str, behind: Path, corpus_file: Path, tokenizer_dir: Path, name: str
) -> None:
    run_capture(url, corpus_file, tokenizer_dir)
    content = (behind / name).read_bytes()
    (behind / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptError, match=rf"{name} is damaged"):
        kdata.open(url).fetch()
    (behind / name).unlink()
    with pytest.raises(CorruptError, match=rf"{name} is missing"):
        kdata.open(url).fetch()
    (behind / name).write_bytes(content)
    assert verify(kdata.open(url), deep=True) == []


def test_a_manifest_that_names_files_outside_of_the_copy_is_refused(
    url: str, behind: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    from kdata.format.manifest import read_manifest, write_manifest

    run_capture(url, corpus_file, tokenizer_dir)
    entry, *rest = read_manifest(behind)
    files = {"../../outside": next(iter(entry.files.values()))}
    write_manifest(behind, [entry.model_copy(update={"files": files}), *rest])
    with pytest.raises(CorruptError, match="cannot have the files"):
        kdata.open(url)


def test_other_settings_and_foreign_folders_are_refused(
    url: str, behind: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    behind.mkdir(parents=True)
    (behind / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"is not a dataset and holds other things \('thesis.tex'\)"):
        run_capture(url, corpus_file, tokenizer_dir)
    (behind / "thesis.tex").unlink()
    run_capture(url, corpus_file, tokenizer_dir)
    with pytest.raises(MismatchError, match="k: 8 -> 9"):
        run_capture(url, corpus_file, tokenizer_dir, k=9)
    (behind / "dataset.json").unlink()
    with pytest.raises(CorruptError, match=r"has a manifest but no dataset\.json"):
        run_capture(url, corpus_file, tokenizer_dir)


def test_two_writers_at_once_are_refused_on_one_machine_and_on_two(
    tmp_path: Path, url: str, behind: Path, corpus_file: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(call: int) -> None:
        if call != 1:
            return
        end = time.monotonic() + 60
        while not (behind / "manifest.jsonl").exists():  # the first commit runs behind the teacher
            assert time.monotonic() < end
            time.sleep(0.01)
        with pytest.raises(StorageError, match="is being written by another process"):
            run_capture(url, corpus_file, tokenizer_dir)
        with monkeypatch.context() as elsewhere:  # where no lock can be seen
            elsewhere.setenv("KDATA_CACHE", str(tmp_path / "elsewhere"))
            run_capture(url, corpus_file, tokenizer_dir)

    with pytest.raises(StorageError, match="its manifest has changed"):
        run_capture(url, corpus_file, tokenizer_dir, teacher=StandInTeacher(before_call=second))
    assert verify(kdata.open(url), deep=True) == []
    run_capture(tmp_path / "local", corpus_file, tokenizer_dir)
    run_capture(url, corpus_file, tokenizer_dir)
    assert digests(behind) == digests(tmp_path / "local")


def test_a_second_process_hears_who_writes_to_a_url_however_it_is_spelled(
    tmp_path: Path, behind: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "store")
    url = f"file://{behind}"
    spellings = [
        url,
        f"{url}/",
        f"local://{behind}",
        f"file://{behind.parent}/../deep/d",
        f"file://{tmp_path}/link/deep/d",
    ]
    with held_by_another_process(url, corpus_file, tokenizer_dir) as pid:
        before = digests(behind)
        for spelling in spellings:
            with pytest.raises(StorageError) as caught:
                run_capture(spelling, corpus_file, tokenizer_dir)
            assert str(caught.value).startswith(
                f"{spelling.rstrip('/')} is being written by another process (process {pid} on "
            )
        assert digests(behind) == before
        run_capture(f"{url}2", corpus_file, tokenizer_dir)  # another place
    run_capture(url, corpus_file, tokenizer_dir)  # a dead process holds nothing
    run_capture(tmp_path / "local", corpus_file, tokenizer_dir)
    assert digests(behind) == digests(tmp_path / "local")


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("memory://x/y", "memory:///x/y"),
        ("memory:///x/y/", "memory:///x/y"),
        ("local:///no/such/../place", "file:///no/place"),
        ("file:///no/place", "file:///no/place"),
    ],
)
def test_one_spelling_stands_for_all(url: str, canonical: str) -> None:
    assert Store(url).canonical == canonical


def test_the_leftovers_of_a_killed_run_are_removed_and_nothing_else(
    url: str, behind: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    run_capture(url, corpus_file, tokenizer_dir)
    before = digests(behind)
    for left in ("units-00ff.tmp/00001-0/data/capture-00001.arrow", "notes/mine.tmp"):
        (behind / left).parent.mkdir(parents=True)
        (behind / left).write_text("x")
    run_capture(url, corpus_file, tokenizer_dir)
    assert digests(behind) == {**before, "notes/mine.tmp": digests(behind)["notes/mine.tmp"]}


# ------------------------------------------------------------------------------------------------------ refusals


def test_which_names_are_urls() -> None:
    assert is_url("s3://bucket/name") and is_url("file:///disk/name") and is_url("bucket://x")
    assert not is_url("hf://owner/name") and not is_url("runs/d") and not is_url(Path("s3:/bucket"))


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="so it must hold no password") as caught:
        Store("ftp://anna:geheim@host/name")
    assert "geheim" not in str(caught.value)


def test_an_unknown_kind_of_url_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        kdata.open("nosuch://bucket/name")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # a test before this one may have loaded it
    with pytest.raises(DependencyError, match=r"s3:// needs a package that is not installed: .*s3fs"):
        kdata.open("s3://bucket/name")


def test_an_error_of_a_store_becomes_one_error_with_its_reason(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the clients of stores raise is not all OSError."""
    client = types.ModuleType("gcsfs.retry")
    client.HttpError = type("HttpError", (Exception,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gcsfs.retry", client)
    store = Store(url)
    check, refused = "check the URL, the network and the credentials", "access is refused: check the credentials"
    for error, remedy in ((client.HttpError("no, 403"), check), (PermissionError("no, 403"), refused)):

        def refuse(*arguments: Any, error: Exception = error, **options: Any) -> bytes:
            raise error

        monkeypatch.setattr(store.fs, "cat_file", refuse, raising=False)
        with pytest.raises(StorageError, match=rf"cannot read {url}/x: {type(error).__name__}: no, 403; {remedy}"):
            store.read("x")
    monkeypatch.undo()


def test_a_mistyped_name_does_not_create_a_bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Clients of object stores make the bucket, when asked for a folder in one."""
    store, folders = Store(f"bucket://{tmp_path}/d"), []
    monkeypatch.setattr(store, "_root", "no-such-bucket/d")
    monkeypatch.setattr(Bucket, "makedirs", lambda self, path, **options: folders.append(path))
    monkeypatch.setattr(Bucket, "exists", lambda self, path, **options: False)
    monkeypatch.setattr(Bucket, "put_file", lambda self, *a, **o: os.stat(tmp_path / "absent"))
    with pytest.raises(StorageError, match=r"cannot write .*; there is no such place: check the name"):
        store.put(tmp_path / "x", "data/x")
    assert folders == []


def test_a_disk_that_refuses_a_copy_is_not_taken_for_the_store(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, about = Store(url), FileInfo(bytes=1, sha256="0" * 64)
    for place, remedy in (("/cache/x", "no permission to write there"), (store._path("x"), "access is refused")):

        def refuse(*arguments: Any, place: str = place, **options: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", place)

        monkeypatch.setattr(store.fs, "get_file", refuse, raising=False)
        with pytest.raises(StorageError, match=rf"cannot read {url}/x: .*; {remedy}"):
            store.fetch("x", tmp_path / "copy" / "x", about)
    monkeypatch.undo()


def test_writers_and_readers_have_separate_copies(url: str) -> None:
    assert copy_of(url, "datasets") != copy_of(f"{url}x", "datasets")
    assert copy_of(url, "datasets") == copy_of(f"{url}/", "datasets") != copy_of(url, "writing")


def test_a_dataset_that_grows_between_the_two_reads_of_an_opening_is_read_again(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dataset.json is of before another source began, the manifest of after: the two do not belong together."""
    run_generate(tmp_path / "d", corpus_file, tokenizer_dir)
    shutil.copytree(tmp_path / "d", tmp_path / "before")
    run_capture(tmp_path / "d", corpus_file, tokenizer_dir)
    expected, read, asked = kdata.open(tmp_path / "d").num_rows, Store.read, []
    assert expected > kdata.open(tmp_path / "before").num_rows

    def growing(self: Store, relative: str) -> bytes | None:
        asked.append(relative)
        if asked == ["dataset.json"]:
            return (tmp_path / "before" / relative).read_bytes()
        return read(self, relative)

    monkeypatch.setattr(Store, "read", growing)
    assert kdata.open(f"file://{tmp_path}/d").num_rows == expected and len(asked) == 5
    asked.clear()
    shutil.copyfile(tmp_path / "before/dataset.json", tmp_path / "d/dataset.json")
    with pytest.raises(CorruptError, match="does not belong to this dataset"):
        kdata.open(f"file://{tmp_path}/d")


OPEN = """
import sys, kdata
print("ready", flush=True)
sys.stdin.readline()
print({kdata.open(sys.argv[1]).num_rows for _ in range(60)})
"""


def test_processes_that_open_a_url_at_once_share_a_copy_and_see_all_of_it(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    """Each opening writes the manifest's copy again, which others read."""
    expected = run_capture(tmp_path / "d", corpus_file, tokenizer_dir, unit_tokens=30).num_rows
    pipe, command = subprocess.PIPE, [sys.executable, "-c", OPEN, f"file://{tmp_path}/d"]
    openers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
    for one in openers:
        assert one.stdout is not None and one.stdout.readline() == "ready\n"
    for one in openers:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    assert [one.communicate()[0] for one in openers] == [f"{{{expected}}}\n"] * 4
