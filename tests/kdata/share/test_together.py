"""Two at once on one folder: the second is told who holds it and changes nothing; verify judges what is committed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdata
from kdata.check.verify import verify
from kdata.errors import KdataError, StorageError
from kdata.format.files import lock_of
from kdata.pipelines.cli.main import call
from kdata.selection.plan import make_plan
from kdata.share.arrange import head
from kdata.share.card import write_card
from kdata.share.fitness import About
from kdata.share.push import push
from tests.fakes import digests, rows_of_text, run_capture, write_jsonl

TINY = ("--set", "warmup_steps=0", "--set", "student.kind=scratch", "--set", "student.hidden_size=16")
COMMANDS = {
    "merge": (["merge", "{d}", "{other}", "{t}"], "t"),
    "split": (["split", "{d}", "{t}"], "t"),
    "head": (["head", "{d}", "{t}"], "t"),
    "push": (["push", "{d}", "{t}"], "t"),
    "push from": (["push", "{d}", "{t}"], "d"),
    "export": (["export", "{d}", "{t}"], "t"),
    "import": (["import", "{rows}", "{t}", "--format", "plain", "--tokenizer", "{tokenizer}"], "t"),
    "select": (["select", "{d}", "--method", "random", "--share", "0.5"], "d"),
    "score --from": (["score", "{d}", "--from", "{marks}", "--name", "new"], "d"),
    "score": (["score", "{d}", "--model", "{tokenizer}"], "d"),
    "repair": (["repair", "{d}"], "d"),
    "capture": (["capture", "{d}", "--teacher", "{llama}", "--backend", "transformers", "--corpus", "{corpus}"], "d"),
    "evaluate": (["evaluate", "{llama}", "{d}", "--save", "{t}"], "t"),
    "report": (["report", "{d}"], "d"),
    "run": (["run", "quickstart", "--out", "{t}"], "t"),
    "train": (["train", "{d}", "--out", "{t}", "--steps", "1", *TINY], "t"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for name, prefix in (("d", ""), ("other", "x")):
        rows = [{**row, "id": prefix + row["id"]} for row in rows_of_text(6)]
        run_capture(folder / name, write_jsonl(folder / f"{name}.jsonl", rows), tokenizer_dir)
    dataset = kdata.open(folder / "d")
    dataset.sql("select id, num_tokens::double as mark from rows").to_pandas().to_parquet(folder / "marks.parquet")
    return folder


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Processes that hold the lock of `t` and of `d`; ended with the test."""
    processes: dict[str, subprocess.Popen[str]] = {}
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom kdata.format.files import lock_of\n"
        "with lock_of(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(120)\n"
    )
    for name in ("t", "d"):
        processes[name] = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / name)], stdout=subprocess.PIPE, text=True
        )
        assert processes[name].stdout.readline() == "held\n"  # type: ignore[union-attr]
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


def test_the_second_is_told_who_holds_the_folder(
    inputs: Path,
    tmp_path: Path,
    holder: dict[str, subprocess.Popen[str]],
    tokenizer_dir: Path,
    llama_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(inputs / "d", tmp_path / "d")
    rows = tmp_path / "rows.parquet"
    assert call(["export", str(inputs / "d"), str(rows)]) == 0
    names = {
        "d": tmp_path / "d", "t": tmp_path / "t", "other": inputs / "other", "marks": inputs / "marks.parquet",
        "tokenizer": tokenizer_dir, "llama": llama_dir, "corpus": inputs / "d.jsonl", "rows": rows,
    }  # fmt: skip
    before = digests(tmp_path)
    for command, (words, held) in sorted(COMMANDS.items(), key=lambda item: item[1][1]):
        capsys.readouterr()
        if held == "t":  # only the lock of the target is in the way
            holder["d"].kill()
            holder["d"].wait()
            (tmp_path / ".d.lock").unlink(missing_ok=True)
            before.pop(".d.lock", None)
        status = call([word.format(**names) for word in words])
        printed = capsys.readouterr().err.strip()
        wanted = f"(process {holder[held].pid} on "
        assert status == 1 and wanted in printed and "is being written by another process" in printed, (
            f"{command}: {printed}"
        )
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and printed.endswith(errors[0]) and "Traceback" not in printed, f"{command}: {printed}"
        assert digests(tmp_path) == before, command


def test_a_card_is_not_written_under_a_writer(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "d", tmp_path / "d")
    dataset = kdata.open(tmp_path / "d")
    with lock_of(tmp_path / "d"), pytest.raises(StorageError, match="is being written by another process"):
        write_card(dataset)
    assert write_card(dataset).exists()


def test_two_splits_to_one_target(inputs: Path, tmp_path: Path) -> None:
    """The first goes on undisturbed while the second is refused."""
    code = (
        "import sys, kdata, kdata.share.arrange as arrange\nreal = arrange.write_rows\n"
        "def slow(*arguments):\n    print('writing', flush=True)\n    sys.stdin.readline()\n    real(*arguments)\n"
        "arrange.write_rows = slow\narrange.split(kdata.open(sys.argv[1]), sys.argv[2], by='domain')\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(inputs / "d"), str(tmp_path / "t")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert first.stdout is not None and first.stdout.readline() == "writing\n"
    with pytest.raises(StorageError, match=rf"/t is being written by another process \(process {first.pid} on "):
        kdata.split(kdata.open(inputs / "d"), tmp_path / "t", by="domain")
    first.communicate("\n\n")
    assert first.returncode == 0
    for part in ("code", "prose"):
        assert verify(kdata.open(tmp_path / "t" / part), deep=True) == []
    assert {p.name for p in tmp_path.iterdir()} == {"t"}


def test_verify_during_a_capture_finds_nothing_and_damage_all_the_same(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    root = tmp_path / "d"
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.fakes import generate_and_capture\n"
        "generate_and_capture(*map(Path, sys.argv[1:4]), 0.05)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(root), str(corpus_file), str(tokenizer_dir)])
    times = 0
    while process.poll() is None:
        time.sleep(0.02)
        if not (root / "manifest.jsonl").exists():
            continue
        assert verify(kdata.open(root), deep=times % 3 == 0) == []
        times += 1
    assert process.returncode == 0 and times >= 3
    assert verify(kdata.open(root), deep=True) == []


def test_verify_beside_a_writer_reports_what_is_committed_and_no_more(
    inputs: Path, tmp_path: Path, holder: dict[str, subprocess.Popen[str]]
) -> None:
    root = Path(shutil.copytree(inputs / "d", tmp_path / "d"))
    for relative in ("data/capture-00009.arrow", "index/capture-00009.parquet.tmp", "scores/new/capture-00000.parquet"):
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        (root / relative).write_text("of the next commit")
    with (root / "manifest.jsonl").open("ab") as file:
        file.write(b'{"half":')
    dataset = kdata.open(root)
    assert verify(dataset) == []
    with pytest.raises(StorageError, match="share it when that has finished"):
        push(dataset, tmp_path / "pushed")
    shard = next(iter(dataset.manifest[0].files))
    (root / shard).write_bytes(b"damaged")
    assert [problem.path for problem in verify(dataset)] == [shard]
    holder["d"].kill()
    holder["d"].wait()
    paths = [problem.path for problem in verify(dataset)]
    assert {shard, "data/capture-00009.arrow", "manifest.jsonl"} <= set(paths)


def test_verify_sees_all_whatever_the_order_of_sources_in_the_manifest(inputs: Path, tmp_path: Path) -> None:
    """A second source may have a name that comes first; nobody writes, so files that nothing names are problems."""
    root = Path(shutil.copytree(inputs / "d", tmp_path / "d"))
    lines = (root / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (root / "manifest.jsonl").write_bytes(b"".join(reversed(lines)))
    assert len(lines) > 1 and verify(kdata.open(root)) == []
    (root / "data/x.arrow").write_text("stray")
    assert [problem.path for problem in verify(kdata.open(root))] == ["data/x.arrow"]


def test_a_source_that_changes_while_it_is_pushed_is_not_published(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kdata.share.push as module

    root = Path(shutil.copytree(inputs / "d", tmp_path / "d"))
    dataset = kdata.open(root)
    make_plan(dataset, "p", dataset.index(["id"])["id"].to_pylist()[:2], method="sql", parameters={}).save(
        root / "plans"
    )
    real = module.publication

    def change(own: kdata.Dataset, about: About) -> dict[str, bytes]:
        pages = real(own, about)
        (root / "plans" / "p.parquet").write_bytes(b"half of another plan")
        return pages

    monkeypatch.setattr(module, "publication", change)
    with pytest.raises(KdataError, match="was not whole and is removed"):
        push(dataset, tmp_path / "pushed")
    assert {p.name for p in tmp_path.iterdir()} == {"d"}


@pytest.mark.parametrize("command", ["merge", "split", "head", "push"])
def test_everything_is_on_the_disk_before_the_folder_gets_its_name(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    flushed: set[str] = set()
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "t":
            places = [Path(source), *Path(source).rglob("*")]
            assert {str(place) for place in places} <= flushed
            flushed.clear()
        real(source, target)

    monkeypatch.setattr(os, "fsync", lambda handle: flushed.add(os.readlink(f"/proc/self/fd/{handle}")))
    monkeypatch.setattr(os, "rename", rename)
    dataset, other = kdata.open(inputs / "d"), kdata.open(inputs / "other")
    calls = {
        "merge": lambda: kdata.merge([dataset, other], tmp_path / "t"),
        "split": lambda: kdata.split(dataset, tmp_path / "t", by="domain"),
        "head": lambda: head(dataset, tmp_path / "t", 3),
        "push": lambda: push(dataset, tmp_path / "t"),
    }
    calls[command]()
    assert flushed == {str(tmp_path)}  # the folder that now names it
