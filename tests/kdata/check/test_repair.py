"""Verify finds every damaged byte, file and manifest line; repair sets it aside, and the same work writes the same bytes."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import kdata
from kdata.check.repair import Repair, repair
from kdata.check.verify import verify
from kdata.errors import ConfigError, CorruptError, KdataError, MismatchError, StorageError
from kdata.format.files import lock_of
from kdata.format.manifest import digest_of, json_bytes, read_manifest, write_info
from kdata.pipelines.cli.main import app
from kdata.selection.ranked import Difference
from kdata.selection.select import select
from kdata.share.push import push
from tests import bucket  # noqa: F401  registers bucket://
from tests.fakes import digests, run_capture, run_generate
from tests.kdata.selection.plans import score_with


@pytest.fixture(scope="module")
def furnished(captured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with everything that a dataset can have: sidecar, plan, rejects, tokenizer."""
    root = Path(shutil.copytree(captured, tmp_path_factory.mktemp("furnished") / "d"))
    dataset = kdata.open(root)
    score_with(dataset, dict.fromkeys(dataset.index(["id"])["id"].to_pylist(), 9.5))
    select(dataset, Difference(share=0.5))
    assert (root / "rejects").is_dir() and (root / "tokenizer").is_dir()
    return root


@pytest.fixture
def damaged(furnished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(furnished, tmp_path / "dataset"))


def is_damaged(root: Path) -> bool:
    """True where opening or verifying reports a problem."""
    try:
        return bool(verify(kdata.open(root)))
    except KdataError:
        return True


def files_of(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def capture_again(root: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    run_capture(root, corpus_file, tokenizer_dir)


def test_a_flipped_bit_anywhere_is_found(furnished: Path, damaged: Path) -> None:
    """In every file: a few random places each, and each bit of the small JSON files' exponents and escapes by chance."""
    rng = np.random.default_rng(3)
    assert not is_damaged(damaged)
    for name in files_of(furnished):
        original = (furnished / name).read_bytes()
        for place in rng.integers(0, len(original), 6 if name.endswith((".arrow", ".parquet")) else 40):
            flipped = bytearray(original)
            flipped[place] ^= 1 << int(rng.integers(8))
            (damaged / name).write_bytes(flipped)
            assert is_damaged(damaged), f"{name}, byte {place}"
        (damaged / name).write_bytes(original)
    assert not is_damaged(damaged)


def test_a_flip_that_changes_no_value_is_found(damaged: Path) -> None:
    """1e-05 and 1E-05 are one number: the digest of the values cannot tell, the form can."""
    for name in ("manifest.jsonl", "dataset.json"):
        text = (damaged / name).read_text()
        changed = re.sub(r"(\d)e(-\d\d)", r"\1E\2", text, count=1) if name == "manifest.jsonl" else text + " "
        assert changed != text
        (damaged / name).write_text(changed)
        assert [p.path for p in verify(kdata.open(damaged))] == [name]
        assert [p.path for p in repair(damaged).problems] == [name]
        assert (damaged / name).read_text() == text


def test_a_missing_file_is_found(furnished: Path, damaged: Path) -> None:
    """Sidecars and plans may go as a whole; half of one, and anything else, may not."""
    for name in files_of(furnished):
        (damaged / name).unlink()
        assert is_damaged(damaged), name
        shutil.copyfile(furnished / name, damaged / name)


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_a_truncated_file_is_found(furnished: Path, damaged: Path, cut: int) -> None:
    for name in files_of(furnished):
        content = (furnished / name).read_bytes()
        (damaged / name).write_bytes(content[:-cut])
        assert is_damaged(damaged), name
        (damaged / name).write_bytes(content)


def drop(lines: list[bytes]) -> list[bytes]:
    return [lines[0], *lines[2:]]


def double(lines: list[bytes]) -> list[bytes]:
    return [*lines, lines[1]]


def swap(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"unit":1', b'"unit":7'), *lines[2:]]


def tear(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[-1][:-30]]


@pytest.mark.parametrize("change", [drop, double, swap, tear])
def test_a_missing_repeated_wrong_or_torn_manifest_line_is_found_and_repaired(
    captured: Path, copied: Path, corpus_file: Path, tokenizer_dir: Path, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    before = digests(captured)
    lines = (copied / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (copied / "manifest.jsonl").write_bytes(b"".join(change(lines)))
    assert is_damaged(copied)
    done = repair(copied)
    assert done.problems and not done.remaining
    assert not is_damaged(copied)
    assert (done.units == {}) == (change is double)
    capture_again(copied, corpus_file, tokenizer_dir)
    assert digests(copied) == before


@pytest.mark.parametrize("left", [0.1, 0.5, 0.99])
def test_half_a_line_at_the_end_is_what_a_kill_leaves(copied: Path, left: float) -> None:
    content = (copied / "manifest.jsonl").read_bytes()
    line = content.splitlines()[-1].replace(b"}", b"]")  # so that no half of it ends in a brace
    with (copied / "manifest.jsonl").open("ab") as file:
        file.write(line[: int(left * len(line))])
    (problem,) = verify(kdata.open(copied), deep=True)
    assert problem.path == "manifest.jsonl" and "a killed run left it" in problem.what and not problem.stray
    assert repair(copied).remaining == [] and (copied / "manifest.jsonl").read_bytes() == content


@pytest.mark.parametrize("tail", ["nothing but zeros", "zeros from the second line on", "the last line's end"])
def test_lost_lines_of_committed_shards_are_damage_and_not_shared(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, tail: str
) -> None:
    """Of a capture that was stopped, whose source is not complete: nothing else says how many shards there are."""
    root = tmp_path / "d"
    run_capture(root, corpus_file, tokenizer_dir, unit_tokens=20)
    info = kdata.open(root).info
    source = info.sources["capture"].model_copy(update={"num_units": None})
    write_info(root, info.model_copy(update={"sources": {"capture": source}}))
    content = (root / "manifest.jsonl").read_bytes()
    first = content.index(b"\n") + 1
    changed = {
        "nothing but zeros": bytes(len(content)),
        "zeros from the second line on": content[:first] + bytes(len(content) - first),
        "the last line's end": content[:-2] + b"\xff\xff",
    }[tail]
    (root / "manifest.jsonl").write_bytes(changed)
    with pytest.raises(CorruptError):
        dataset = kdata.open(root)
        assert [p for p in verify(dataset) if p.path == "manifest.jsonl" and not p.stray]
        push(dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["data", "index", "rejects"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_set_aside_and_the_same_capture_writes_the_same_bytes(
    captured: Path, copied: Path, corpus_file: Path, tokenizer_dir: Path, folder: str, how: str
) -> None:
    before = digests(captured)
    entry = next(e for e in read_manifest(copied) if e.rejected and e.unit < len(read_manifest(copied)) - 1)
    path = next(copied / name for name in entry.files if name.startswith(folder))
    content = path.read_bytes()
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if how == "cut" else content[:20] + bytes([content[20] ^ 4]) + content[21:])
    done = repair(copied)
    assert [p.path for p in done.problems if "committed" in p.what or "missing" in p.what] == [
        path.relative_to(copied).as_posix()
    ]
    assert done.units == {"capture": [entry.unit]} and not done.remaining
    assert done.aside == copied.with_name("dataset.aside") / "1"
    assert sorted(done.moved) == sorted(
        set(entry.files) - ({path.relative_to(copied).as_posix()} if how == "remove" else set())
    )
    assert (done.aside / "manifest.jsonl").read_bytes() == (captured / "manifest.jsonl").read_bytes()
    assert done.commands[0].startswith(
        f"kdata capture {copied} --teacher stand-in --backend stand-in --corpus CORPUS --k 8"
    )

    rest = kdata.open(copied)
    assert verify(rest, deep=True) == []
    assert rest.num_rows == kdata.open(captured).num_rows - entry.rows
    assert rest.info.sources["capture"].num_units is None
    capture_again(copied, corpus_file, tokenizer_dir)
    assert digests(copied) == before
    assert repair(copied).problems == []


def test_folders_that_a_killed_repair_made_and_did_not_fill_are_removed(damaged: Path) -> None:
    """A kill between making the folder and moving the file into it."""
    aside = damaged.with_name(f"{damaged.name}.aside")
    (aside / "1/rejects").mkdir(parents=True)
    (aside / "1/data").mkdir()
    (aside / "1/data/capture-00007.arrow").write_bytes(b"moved before the kill")
    (damaged / "data/capture-99999.arrow").write_bytes(b"of a killed run")
    assert repair(damaged).aside == aside / "2"
    assert not (aside / "1/rejects").exists() and (aside / "1/data/capture-00007.arrow").exists()


def test_the_lines_of_two_sources_keep_their_order(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    root = tmp_path / "d"
    run_generate(root, corpus_file, tokenizer_dir)
    capture_again(root, corpus_file, tokenizer_dir)
    before = digests(root)
    names = [e.name for e in read_manifest(root)]
    assert names[0].startswith("generate") and names[-1].startswith("capture")
    (root / f"data/{names[1]}.arrow").unlink()
    assert repair(root).units == {"generate": [1]}
    run_generate(root, corpus_file, tokenizer_dir)
    assert digests(root) == before


def test_sidecars_plans_and_the_tokenizer_are_set_aside(
    furnished: Path, damaged: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    for name in ("scores/ref/capture-00001.parquet", "plans/difference.parquet", "tokenizer/tokenizer_config.json"):
        with (damaged / name).open("r+b") as file:
            file.seek(30)
            old = file.read(1)[0]
            file.seek(30)
            file.write(bytes([old ^ 1]))
    done = repair(damaged)
    assert {p.path for p in done.problems} == {
        "scores/ref/capture-00001.parquet",
        "plans/difference.parquet",
        "tokenizer/tokenizer_config.json",
    }
    assert not (damaged / "scores/ref.json").exists() and not (damaged / "plans/difference.json").exists()
    assert not done.units and not done.remaining
    assert any(c.startswith("kdata score") for c in done.commands)
    capture_again(damaged, corpus_file, tokenizer_dir)
    assert verify(kdata.open(damaged), deep=True) == []


def test_a_damaged_dataset_json_is_restored_from_a_copy_or_refused(
    captured: Path, copied: Path, tmp_path: Path
) -> None:
    path = copied / "dataset.json"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CorruptError, match=r"cannot be made from the shards.*--copy FILE"):
        repair(copied)
    other = Path(shutil.copytree(captured, tmp_path / "other"))
    about = json.loads((other / "dataset.json").read_text())
    about["vocab_size"] = 301
    from kdata.format.manifest import write_json
    from kdata.format.schema import NO_IDENTITY, json_digest

    write_json(other / "dataset.json", about)
    with pytest.raises(CorruptError, match="was edited"):
        repair(copied, copy=other / "dataset.json")
    about["fingerprint"] = json_digest({key: value for key, value in about.items() if key not in NO_IDENTITY})
    write_json(other / "dataset.json", about)
    with pytest.raises(MismatchError, match=r"does not fit shard capture-00000.*its vocab_size is not that"):
        repair(copied, copy=other / "dataset.json")
    done = repair(copied, copy=captured / "dataset.json")
    assert done.moved == ["dataset.json"] and not done.remaining
    assert digests(copied) == digests(captured)
    path.unlink()
    repair(copied, copy=captured)
    assert digests(copied) == digests(captured)


def test_a_whole_dataset_stays_as_it_is(captured: Path, copied: Path) -> None:
    assert repair(copied) == Repair()
    assert digests(copied) == digests(captured) and not copied.with_name("dataset.aside").exists()


def test_a_dataset_that_is_being_written_is_not_repaired(copied: Path) -> None:
    with lock_of(copied), pytest.raises(StorageError, match="being written"):
        repair(copied)


@pytest.mark.parametrize("place", ["hf://OWNER/NAME", "https://example.org/d"])
def test_where_nothing_can_be_changed_nothing_is_repaired(place: str) -> None:
    with pytest.raises(ConfigError, match="is a URL, and this needs a local path: repair changes files where they are"):
        repair(place)


def test_a_dataset_at_a_url_is_repaired_there(
    damaged: Path, corpus_file: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost shard, a damaged one, a stray and a damaged plan: all go to URL.aside, and the capture fills the gap."""
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    url, whole = f"bucket://{damaged}", digests(damaged)
    assert repair(url) == Repair() and digests(damaged) == whole
    shards = sorted(path.stem for path in (damaged / "data").iterdir())
    (damaged / f"data/{shards[0]}.arrow").unlink()
    flip(damaged / f"index/{shards[1]}.parquet")
    (damaged / "data/capture-99999.arrow").write_bytes(b"of a killed run")
    flip(damaged / "plans/difference.parquet")
    done = repair(url)
    assert done.aside == f"{url}.aside/1" and done.units["capture"][:2] == [0, 1] and done.remaining == []
    assert any(f"kdata capture {url} " in command for command in done.commands)
    aside = files_of(damaged.with_name(f"{damaged.name}.aside") / "1")
    assert {
        f"data/{shards[1]}.arrow",
        f"index/{shards[1]}.parquet",
        "data/capture-99999.arrow",
        "plans/difference.json",
    } <= {*aside}
    assert verify(kdata.open(url), deep=True) == []
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "another machine"))
    run_capture(url, corpus_file, tokenizer_dir)
    after = digests(damaged)
    assert after == {name: digest for name, digest in whole.items() if not name.startswith("plans/")}
    assert repair(url) == Repair()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_command_says_what_to_run(copied: Path) -> None:
    run = CliRunner().invoke
    assert "nothing to repair" in run(app, ["repair", str(copied)]).output
    next((copied / "data").iterdir()).unlink()
    result = run(app, ["repair", str(copied)])
    assert result.exit_code == 0 and "run again: units" in result.output and "kdata capture" in result.output


@pytest.mark.parametrize("name", [".", "..", "./", "data", "data/..", "../elsewhere", "/etc/passwd", "scores", "a\0b"])
def test_a_score_that_names_a_folder_moves_no_more_than_itself(damaged: Path, name: str) -> None:
    """The JSON of a score from a stranger may name anything, with a digest that fits."""
    (damaged.parent / "elsewhere").write_text("precious")
    path = next((damaged / "scores").glob("*.json"))
    content = json.loads(path.read_text())
    content["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    path.write_bytes(json_bytes({**content, "digest": digest_of(content)}))
    shards = {name: digest for name, digest in digests(damaged).items() if name.split("/")[0] in ("data", "index")}
    with contextlib.suppress(KdataError):
        repair(damaged)
    assert (damaged / "dataset.json").exists() and (damaged.parent / "elsewhere").read_text() == "precious"
    assert shards.items() <= digests(damaged).items()


def test_a_stray_name_with_a_number_that_is_none_is_set_aside(damaged: Path) -> None:
    for name in ("capture-" + "9" * 200, "capture-²"):
        (damaged / "data" / f"{name}.arrow").write_text("stray")
    assert len(repair(damaged).moved) == 2 and not is_damaged(damaged)


def test_a_number_of_units_that_cannot_be_is_refused(damaged: Path) -> None:
    """Its digest fits: 10^12 units would be listed one by one, and fill the memory. Found by the fuzz campaign."""
    about = json.loads((damaged / "dataset.json").read_bytes())
    name = next(iter(about["sources"]))
    about["sources"][name]["num_units"] = 10**12
    about["digest"] = digest_of(about)
    (damaged / "dataset.json").write_bytes(json_bytes(about))
    before = digests(damaged)
    with pytest.raises(CorruptError, match="1,000,000,000,000 units"):
        repair(damaged)
    assert digests(damaged) == before
