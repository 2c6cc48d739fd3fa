"""Starting again under other settings, two writers at once, and disks that refuse."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdata
from kdata.check.verify import verify
from kdata.errors import ConfigError, CorruptError, MismatchError, StorageError
from kdata.observe.progress import Task
from tests.fakes import (
    StandInTeacher,
    digests,
    rows_of_text,
    run_capture,
    run_generate,
    save_tokenizer,
    write_jsonl,
)
from tests.faults import mounted


@pytest.fixture
def begun(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> Path:
    """A dataset whose capture stopped after two units."""

    class Stopped(Exception):
        pass

    def stop(call: int) -> None:
        if call == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run_capture(tmp_path / "d", corpus_file, tokenizer_dir, teacher=StandInTeacher(before_call=stop))
    assert len(kdata.open(tmp_path / "d").manifest) == 2
    return tmp_path / "d"


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "k": ({"k": 9}, "codec.parameters.k: 8 -> 9"),
    "kind": ({"kind": "topk"}, "codec.kind: 'hybrid' -> 'topk'"),
    "teacher": ({"teacher": StandInTeacher("another")}, "teacher.weights_hash"),
    "vocabulary": ({"teacher": StandInTeacher(vocab_size=400)}, "vocab_size: 300 -> 400"),
    "context": ({"teacher": StandInTeacher(context=32)}, "max_tokens: 64 -> 32"),
    "max_tokens": ({"max_tokens": 20}, "max_tokens: 64 -> 20"),
    "long_text": ({"long_text": "reject"}, "long_text: 'split' -> 'reject'"),
    "append_eos": ({"append_eos": True}, "append_eos: False -> True"),
    "unit_tokens": ({"unit_tokens": 121}, "unit_tokens: 120 -> 121"),
    "limit": ({"reading": {"limit": 3}}, "corpus.limit: None -> 3"),
    "domains": ({"reading": {"domains": ["code"]}}, "corpus.domains: None -> ['code']"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_with_another_setting_is_refused_and_the_setting_named(
    begun: Path, corpus_file: Path, tokenizer_dir: Path, change: str
) -> None:
    settings, difference = CHANGES[change]
    before = digests(begun)
    with pytest.raises(MismatchError) as caught:
        run_capture(begun, corpus_file, tokenizer_dir, **settings)
    assert difference in str(caught.value) and "another folder" in str(caught.value)
    assert digests(begun) == before


def test_a_resume_with_another_corpus_or_tokenizer_is_refused(
    begun: Path, tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(corpus_file.read_text().replace('"text": "', '"text": "other '))
    with pytest.raises(MismatchError, match=r"corpus\.sha256"):
        run_capture(begun, other, tokenizer_dir)
    save_tokenizer(tmp_path / "tokenizer", lines=["quite another text to learn from, zzz zzz zzz"])
    with pytest.raises(MismatchError, match=r"tokenizer\.hash"):
        run_capture(begun, corpus_file, tmp_path / "tokenizer")
    moved = Path(shutil.copy(corpus_file, tmp_path / "elsewhere.jsonl"))
    assert run_capture(begun, moved, tokenizer_dir).num_rows == 25  # the same content under another name


class Stopped(Exception):
    pass


def begun_in_vain(place: Path, corpus_file: Path, tokenizer_dir: Path) -> Path:
    """A dataset whose capture stopped before its first shard."""

    def stop(call: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        run_capture(place, corpus_file, tokenizer_dir, teacher=StandInTeacher(before_call=stop))
    assert (place / "dataset.json").exists() and not kdata.open(place).manifest
    return place


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_ended_before_its_first_shard_binds_nobody(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, change: str
) -> None:
    place, settings = begun_in_vain(tmp_path / "d", corpus_file, tokenizer_dir), CHANGES[change][0]
    run_capture(place, corpus_file, tokenizer_dir, **settings)
    run_capture(tmp_path / "fresh", corpus_file, tokenizer_dir, **settings)
    assert digests(place) == digests(tmp_path / "fresh")


def test_another_tokenizer_takes_the_place_of_that_of_a_run_without_shards(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    save_tokenizer(tmp_path / "tokenizer", lines=["quite another text to learn from, zzz zzz zzz"])
    place = begun_in_vain(tmp_path / "d", corpus_file, tmp_path / "tokenizer")
    run_capture(place, corpus_file, tokenizer_dir)
    assert verify(kdata.open(place), deep=True) == []
    run_capture(tmp_path / "fresh", corpus_file, tokenizer_dir)
    assert digests(place) == digests(tmp_path / "fresh")


def test_a_generation_cannot_continue_with_other_settings(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    run_generate(tmp_path / "d", corpus_file, tokenizer_dir)
    for settings, difference in (
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"num_samples": 2}, "num_samples: 1 -> 2"),
        ({"sampling": {"max_tokens": 9}}, "sampling.max_tokens: 12 -> 9"),
    ):
        with pytest.raises(MismatchError, match=difference):
            run_generate(tmp_path / "d", corpus_file, tokenizer_dir, **settings)
    with pytest.raises(MismatchError, match="work: 'generate' -> 'capture'"):
        run_capture(tmp_path / "d", corpus_file, tokenizer_dir, name="generate")


def test_the_resume_modes_auto_never_and_must(
    begun: Path, tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    with pytest.raises(MismatchError, match="already holds 2 shards of 'capture'"):
        run_capture(begun, corpus_file, tokenizer_dir, resume="never")
    with pytest.raises(MismatchError, match="has no source 'capture' to continue"):
        run_capture(tmp_path / "fresh", corpus_file, tokenizer_dir, resume="must")
    assert not (tmp_path / "fresh").exists()
    with pytest.raises(MismatchError, match="has no source 'second' to continue"):
        run_capture(begun, corpus_file, tokenizer_dir, name="second", resume="must")
    assert run_capture(begun, corpus_file, tokenizer_dir, resume="must").num_rows == 25
    assert run_capture(tmp_path / "fresh", corpus_file, tokenizer_dir, resume="never").num_rows == 25


def test_committed_units_are_not_read_again(
    begun: Path, corpus_file: Path, tokenizer_dir: Path, captured: Path
) -> None:
    teacher = StandInTeacher()
    run_capture(begun, corpus_file, tokenizer_dir, teacher=teacher)
    assert teacher.calls == 2
    run_capture(begun, corpus_file, tokenizer_dir, teacher=teacher)
    assert teacher.calls == 2
    assert digests(begun) == digests(captured)


def test_the_same_corpus_in_a_second_source_is_refused_for_its_ids(
    begun: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    from kdata.errors import DataError

    with pytest.raises(DataError, match="already has a row with id 'doc-000'"):
        run_capture(begun, corpus_file, tokenizer_dir, name="second")


def test_two_writers_at_once_are_refused(begun: Path, tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(begun)

    def second(call: int) -> None:
        for root in (begun, link, Path(os.path.relpath(begun))):
            with pytest.raises(StorageError, match="is being written by another process"):
                run_capture(root, corpus_file, tokenizer_dir)

    dataset = run_capture(begun, corpus_file, tokenizer_dir, teacher=StandInTeacher(before_call=second))
    assert verify(dataset, deep=True) == []


def test_a_folder_with_other_files_is_refused_and_unchanged(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "draft.tmp").write_text("precious")
    before = digests(tmp_path)
    with pytest.raises(ConfigError, match=r"is not a dataset and holds other things \('thesis.tex'\)"):
        run_capture(tmp_path, corpus_file, tokenizer_dir)
    assert digests(tmp_path) == before


def test_other_files_in_a_dataset_are_unchanged(begun: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    (begun / "plans").mkdir()
    (begun / "plans" / "mine.tmp").write_text("precious")
    (begun / "data" / "capture-00002.arrow.tmp").write_text("left by a killed run")
    run_capture(begun, corpus_file, tokenizer_dir)
    assert (begun / "plans" / "mine.tmp").exists()
    assert not (begun / "data" / "capture-00002.arrow.tmp").exists()


def test_a_manifest_without_its_dataset_json_is_refused(begun: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    (begun / "dataset.json").unlink()
    with pytest.raises(CorruptError, match=r"has a manifest but no dataset\.json"):
        run_capture(begun, corpus_file, tokenizer_dir, k=9)


# ---------------------------------------------------------------------------------------- disks that refuse


@pytest.mark.parametrize("kib", [0, 4, 8, 24, 40, 56, 72, 88, 104, 120])
def test_a_full_disk_keeps_what_was_committed(
    tmp_path: Path, captured: Path, corpus_file: Path, tokenizer_dir: Path, kib: int
) -> None:
    """A real file system of fixed size, filled but for so many KiB before the run; freed for the resume."""
    with mounted(tmp_path / "disk", "size=1m") as disk:
        size = 1024 * (1024 - kib)
        (disk / "ballast").write_bytes(b"\0" * size)
        with pytest.raises(StorageError, match=r"the disk is full; free some space, then run the same command again"):
            run_capture(disk / "d", corpus_file, tokenizer_dir)
        if (disk / "d" / "dataset.json").exists():
            assert all(problem.stray for problem in verify(kdata.open(disk / "d"), deep=True))
        (disk / "ballast").unlink()
        run_capture(disk / "d", corpus_file, tokenizer_dir)
        assert digests(disk / "d") == digests(captured)


def test_a_read_only_file_system_is_named(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    with mounted(tmp_path / "disk", "size=4m") as disk:
        whole = run_capture(disk / "d", corpus_file, tokenizer_dir, reading={"limit": 4}).path
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for root in (disk / "new", whole):
            with pytest.raises(StorageError, match="the file system is read-only; choose another folder"):
                run_capture(root, corpus_file, tokenizer_dir)
        assert verify(kdata.open(whole), deep=True) == []
        assert kdata.open(whole).sql("select count(*) as n from rows")["n"][0].as_py() == 4


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "no permission"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_injected_faults_of_the_disk(
    begun: Path,
    monkeypatch: pytest.MonkeyPatch,
    corpus_file: Path,
    tokenizer_dir: Path,
    captured: Path,
    number: int,
    message: str,
) -> None:
    """Fault injection at fsync, for disks that cannot be mounted here."""

    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError, match=message):
            run_capture(begun, corpus_file, tokenizer_dir)
    assert len(kdata.open(begun).manifest) == 2
    run_capture(begun, corpus_file, tokenizer_dir)
    assert digests(begun) == digests(captured)


def test_a_path_through_a_file_is_named(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        run_capture(tmp_path / "file" / "d", corpus_file, tokenizer_dir)


def test_a_log_on_a_full_disk_does_not_hide_the_stage_s_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full refuses every write as a full disk does."""
    with pytest.raises(KeyError, match="the cause"), Task("stage", log=Path("/dev/full")):
        raise KeyError("the cause")
    with (
        pytest.raises(StorageError, match="cannot write /dev/full: the disk is full"),
        Task("stage", log=Path("/dev/full")),
    ):
        pass


def test_a_failing_teacher_keeps_what_was_committed(
    tmp_path: Path, jsonl: Callable[..., Path], tokenizer_dir: Path
) -> None:
    from kdata.errors import TeacherError

    def fail(call: int) -> None:
        if call == 1:
            raise TeacherError("the engine died")

    corpus = write_jsonl(tmp_path / "c.jsonl", rows_of_text(8))
    with pytest.raises(TeacherError, match="the engine died"):
        run_capture(tmp_path / "d", corpus, tokenizer_dir, teacher=StandInTeacher(before_call=fail))
    dataset = kdata.open(tmp_path / "d")
    assert len(dataset.manifest) == 1 and verify(dataset, deep=True) == []
