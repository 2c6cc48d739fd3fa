"""Two at once on one folder: the second is told who holds it and changes nothing; verify judges what is committed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdata
from kdata.check.verify import verify
from kdata.errors import StorageError
from kdata.format.files import lock_of
from kdata.pipelines.cli.main import call
from kdata.share.card import write_card
from tests.fakes import digests, rows_of_text, run_capture, write_jsonl

COMMANDS = {
    "merge": (["merge", "{d}", "{other}", "{t}"], "t"),
    "split": (["split", "{d}", "{t}"], "t"),
    "head": (["head", "{d}", "{t}"], "t"),
    "push": (["push", "{d}", "{t}"], "t"),
    "push from": (["push", "{d}", "{t}"], "d"),
    "export": (["export", "{d}", "{t}"], "t"),
    "select": (["select", "{d}", "--method", "random", "--share", "0.5"], "d"),
    "score --from": (["score", "{d}", "--from", "{marks}", "--name", "new"], "d"),
    "score": (["score", "{d}", "--model", "{tokenizer}"], "d"),
    "repair": (["repair", "{d}"], "d"),
    "capture": (["capture", "{d}", "--teacher", "{llama}", "--backend", "transformers", "--corpus", "{corpus}"], "d"),
    "report": (["report", "{d}"], "d"),
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
        "import sys, kdata, kdata.share.arrange as arrange\nreal = arrange._write_rows\n"
        "def slow(*arguments):\n    print('writing', flush=True)\n    sys.stdin.readline()\n    real(*arguments)\n"
        "arrange._write_rows = slow\narrange.split(kdata.open(sys.argv[1]), sys.argv[2], by='domain')\n"
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
