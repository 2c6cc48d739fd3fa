"""Hostile and damaged bytes: one CorruptError wherever they are read, and `verify` finds every one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kdata
from kdata.check.verify import verify
from kdata.errors import CorruptError, FormatError, KdataError, MissingError
from kdata.format.manifest import digest_of, read_manifest
from kdata.format.schema import canonical_json
from tests.fakes import digests, run_capture


def read_everything(root: Path) -> bytes:
    """Every number and text that a reader can get, as bytes."""
    dataset = kdata.open(root)
    parts = [
        repr(dataset.index().to_pylist()).encode(),
        repr(dataset.info).encode(),
        dataset.content_digest.encode(),
    ]
    for row in dataset:
        parts += [values.tobytes() for values in vars(row.sequence).values() if values is not None]
    return b"".join(parts)


def committed(root: Path) -> list[str]:
    return [name for entry in read_manifest(root) for name in entry.files]


@settings(max_examples=60)
@given(data=st.data())
def test_a_flipped_bit_in_a_shard_gives_one_corrupt_error_and_verify_finds_it(
    captured: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(committed(captured)))
    original = (captured / name).read_bytes()
    place, bit = data.draw(st.integers(0, len(original) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(original)
    damaged[place] ^= 1 << bit
    root = in_a_copy(captured)
    (root / name).write_bytes(damaged)
    assert [p.path for p in verify(kdata.open(root))] == [name]
    if not name.startswith("rejects/"):
        with pytest.raises(CorruptError, match=Path(name).name):
            read_everything(root)


@settings(max_examples=30)
@given(data=st.data())
def test_a_truncated_shard_gives_one_corrupt_error(captured: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([n for n in committed(captured) if not n.startswith("rejects/")]))
    original = (captured / name).read_bytes()
    root = in_a_copy(captured)
    (root / name).write_bytes(original[: data.draw(st.integers(0, len(original) - 1))])
    assert [p.path for p in verify(kdata.open(root))] == [name]
    with pytest.raises(CorruptError, match=Path(name).name):
        read_everything(root)


@settings(max_examples=150)
@given(name=st.sampled_from(["dataset.json", "manifest.jsonl"]), data=st.data())
def test_a_flipped_bit_in_a_json_file_is_always_detected(captured: Path, name: str, data: st.DataObject) -> None:
    """Refused with one kdata error, or the file still says the same (a flip in white space, say)."""
    original = (captured / name).read_bytes()
    damaged = bytearray(original)
    damaged[data.draw(st.integers(0, len(original) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    root = in_a_copy(captured)
    (root / name).write_bytes(damaged)
    try:
        seen = read_everything(root)
    except (CorruptError, FormatError) as error:
        assert str(root) in str(error)
    else:
        assert seen == read_everything(captured)


@pytest.mark.parametrize("name", ["dataset.json", "manifest.jsonl"])
def test_json_files_cut_anywhere_are_refused(captured: Path, name: str) -> None:
    content = (captured / name).read_bytes()
    root = in_a_copy(captured)
    for size in np.linspace(0, len(content) - 2, 30).astype(int):
        (root / name).write_bytes(content[:size])
        with pytest.raises(CorruptError):
            kdata.open(root)


_COPIES: dict[Path, tuple[Path, dict[str, bytes]]] = {}


def in_a_copy(source: Path) -> Path:
    """A copy of a dataset in its first state: copied once, restored at each call."""
    if source not in _COPIES:
        target = Path(shutil.copytree(source, source.with_name("damaged")))
        _COPIES[source] = target, {str(p): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    root, contents = _COPIES[source]
    for path, content in contents.items():
        if not os.path.exists(path) or Path(path).read_bytes() != content:
            Path(path).write_bytes(content)
    return root


def test_a_payload_that_differs_from_its_index_is_refused(copied: Path) -> None:
    """A payload swapped together with its digest: the index, which has other rows, tells."""
    one, two = read_manifest(copied)[:2]
    files = dict(one.files)
    shutil.copyfile(copied / f"data/{two.name}.arrow", copied / f"data/{one.name}.arrow")
    files[f"data/{one.name}.arrow"] = two.files[f"data/{two.name}.arrow"]
    rewrite_manifest(copied, 0, files={k: v.model_dump() for k, v in files.items()}, rows=two.rows, tokens=two.tokens)
    with pytest.raises(CorruptError):
        read_everything(copied)
    assert [problem.path for problem in verify(kdata.open(copied))] == [f"index/{one.name}.parquet"]


def rewrite_manifest(root: Path, line: int, **changes: object) -> None:
    """Change one line as an attacker would: with a matching digest."""
    lines = (root / "manifest.jsonl").read_bytes().splitlines()
    content = {**json.loads(lines[line]), **changes}
    lines[line] = canonical_json({**content, "digest": digest_of(content)})
    (root / "manifest.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def test_every_change_to_a_manifest_number_is_detected(copied: Path) -> None:
    lines = (copied / "manifest.jsonl").read_text()
    (copied / "manifest.jsonl").write_text(lines.replace('"target_tokens":', '"target_tokens":1', 1))
    with pytest.raises(CorruptError, match=r"manifest.jsonl line 1 is damaged: it does not match its own digest"):
        kdata.open(copied)


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside", "data/../../outside", "data/\0x", "link/x", "."])
def test_a_manifest_names_the_files_of_its_shard_and_no_others(copied: Path, path: str) -> None:
    files = {path: {"sha256": "0" * 64, "bytes": 6}}
    rewrite_manifest(copied, 0, files=files)
    with pytest.raises(CorruptError, match="cannot have the files"):
        kdata.open(copied)


def test_a_shard_s_file_may_not_be_a_link_to_outside_of_the_dataset(copied: Path) -> None:
    shard = copied / "data/capture-00000.arrow"
    shard.rename(copied.parent / "outside")
    shard.symlink_to(copied.parent / "outside")
    with pytest.raises(CorruptError, match="outside the dataset"):
        kdata.open(copied)


def test_a_shard_that_occurs_twice_or_is_missing_is_named(copied: Path) -> None:
    lines = (copied / "manifest.jsonl").read_bytes()
    (copied / "manifest.jsonl").write_bytes(lines + lines.splitlines()[0] + b"\n")
    with pytest.raises(CorruptError, match="capture-00000 occurs twice"):
        kdata.open(copied)
    (copied / "manifest.jsonl").write_bytes(lines)
    (copied / "data/capture-00001.arrow").unlink()
    with pytest.raises(CorruptError, match=r"capture-00001.arrow is missing"):
        read_everything(copied)
    assert [(p.path, p.what) for p in verify(kdata.open(copied))] == [("data/capture-00001.arrow", "is missing")]


def test_a_complete_source_without_all_lines_is_refused_until_it_is_captured_again(
    copied: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    before = digests(copied)
    lines = (copied / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (copied / "manifest.jsonl").write_bytes(b"".join(lines[:2]))
    with pytest.raises(CorruptError, match=r"lacks units \[2, 3\] of source 'capture', which is marked complete"):
        kdata.open(copied)
    run_capture(copied, corpus_file, tokenizer_dir)
    assert digests(copied) == before


def test_a_last_line_that_was_cut_off_is_ignored_and_a_writer_removes_it(
    copied: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    before = digests(copied)
    info = json.loads((copied / "dataset.json").read_bytes())
    info["sources"]["capture"]["num_units"] = None
    (copied / "dataset.json").write_text(json.dumps({**info, "digest": digest_of(info)}))
    lines = (copied / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    for keep in (0, 1, len(lines[-1]) - 1):
        (copied / "manifest.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:keep])
        assert len(kdata.open(copied).manifest) == len(lines) - 1
    run_capture(copied, corpus_file, tokenizer_dir)
    assert digests(copied) == before


def test_verify_names_stray_files_and_accepts_a_whole_dataset(copied: Path) -> None:
    assert verify(kdata.open(copied), deep=True) == []
    (copied / "data/capture-00099.arrow").write_bytes(b"left by a killed run")
    [problem] = verify(kdata.open(copied))
    assert problem.path == "data/capture-00099.arrow" and "no manifest line" in problem.what and problem.stray


@pytest.mark.parametrize("name", ["scores/x.json", "plans/x.json"])
def test_a_folder_with_the_name_of_a_json_file_is_a_problem(copied: Path, name: str) -> None:
    (copied / name).mkdir(parents=True)
    assert any(p.path == name and "cannot be read" in p.what for p in verify(kdata.open(copied)))


def test_verify_checks_the_dataset_s_own_tokenizer(copied: Path) -> None:
    path = copied / "tokenizer/tokenizer.json"
    content = path.read_text()
    for damaged in (content.replace("Ġthe", "Ġhte"), content[:99], "[]"):
        path.write_text(damaged)
        assert [p.path for p in verify(kdata.open(copied))] == ["tokenizer/tokenizer.json"]


def test_a_newer_major_version_is_refused_and_a_newer_minor_is_read(copied: Path) -> None:
    def rewrite(**changes: object) -> None:
        content = {**json.loads((copied / "dataset.json").read_bytes()), **changes}
        (copied / "dataset.json").write_text(json.dumps({**content, "digest": digest_of(content)}))

    rewrite(format_version="1.7", something_new={"a": 1})
    assert kdata.open(copied).num_rows == 25
    rewrite(format_version="2.0")
    with pytest.raises(FormatError, match=r"has format 2.0, this kdata reads up to 1.x; upgrade kdata"):
        kdata.open(copied)
    rewrite(format_version="one")
    with pytest.raises(FormatError, match="names no format version"):
        kdata.open(copied)


def test_something_else_than_a_dataset_is_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="does not exist"):
        kdata.open(tmp_path / "nowhere")
    with pytest.raises(MissingError, match=r"has no dataset\.json"):
        kdata.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(KdataError, match="is a file"):
        kdata.open(tmp_path / "file")


def test_sql_names_the_damaged_index_file(copied: Path) -> None:
    path = copied / "index/capture-00001.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptError, match=r"capture-00001.parquet is damaged"):
        kdata.open(copied).sql("select * from rows")


def test_an_index_with_more_rows_than_the_payload_is_refused(copied: Path) -> None:
    """Both files are readable and have matching digests, but different rows."""
    entry = read_manifest(copied)[0]
    path = copied / f"index/{entry.name}.parquet"
    pq.write_table(pq.read_table(path).slice(0, 1), path)
    import hashlib

    content = path.read_bytes()
    files = {k: v.model_dump() for k, v in entry.files.items()}
    files[f"index/{entry.name}.parquet"] = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }
    rewrite_manifest(copied, 0, files=files)
    with pytest.raises(CorruptError, match="holds 1 rows, the manifest says"):
        kdata.open(copied).index()
