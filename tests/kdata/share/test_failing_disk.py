"""Every command that writes, on a disk that fails at each of its calls: one line with a remedy and no half result."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdata
from kdata.check.verify import verify
from kdata.selection.plan import make_plan
from kdata.teachers.model import load_tokenizer, tokenizer_files
from tests.fakes import digests, rows_of_text, run_capture, write_jsonl
from tests.faults import BROKEN, FULL, TOO_MANY_FILES, Fault, Server

PRELOAD = (
    "tests.preload", "kdata.pipelines.cli.main", "kdata.pipelines.cli.share", "kdata.pipelines.cli.check",
    "kdata.pipelines.cli.choose", "kdata.share.push", "kdata.share.interchange.exporter", "kdata.check.repair",
)  # fmt: skip
COMMANDS = {
    "merge": ["merge", "{d}", "{other}", "{out}/new"],
    "merge --link": ["merge", "--link", "{d}", "{other}", "{out}/new"],
    "split": ["split", "{d}", "{out}/new"],
    "head": ["head", "{d}", "{out}/new", "-n", "5"],
    "push": ["push", "{d}", "{out}/new"],
    "export": ["export", "{d}", "{out}/new.parquet"],
    "select": ["select", "{d}", "--method", "random", "--share", "0.5", "--name", "new"],
    "score": ["score", "{d}", "--from", "{marks}", "--name", "new"],
    "repair": ["repair", "{d}"],
    "plan show": ["plan", "show", "{d}", "half", "--picture", "{out}/new.png"],
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(PRELOAD) as server:
        yield server


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A dataset with a plan, another one with other ids, marks for each row."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, prefix in (("d", ""), ("other", "x")):
        rows = [{**row, "id": prefix + row["id"]} for row in rows_of_text(6)]
        dataset = run_capture(folder / name, write_jsonl(folder / f"{name}.jsonl", rows), tokenizer_dir)
    dataset = kdata.open(folder / "d")
    ids = dataset.index(["id"])["id"].to_pylist()
    make_plan(dataset, "half", ids[:3], method="sql", parameters={}).save(dataset.path / "plans")
    dataset.sql("select id, num_tokens::double as mark from rows").to_pandas().to_parquet(folder / "marks.parquet")
    return folder


def prepared(inputs: Path, place: Path, command: str) -> tuple[list[str], Path]:
    """The arguments of a command, and the folder in which it may write."""
    place.mkdir()
    shutil.copytree(inputs / "d", place / "d")
    if command == "repair":
        next((place / "d" / "data").glob("*.arrow")).write_bytes(b"damaged")
    names = {"d": place / "d", "other": inputs / "other", "marks": inputs / "marks.parquet", "out": place}
    return [word.format(**names) for word in COMMANDS[command]], place


@pytest.mark.parametrize(
    ("number", "calls"), [(errno.ENOSPC, FULL), (errno.EIO, BROKEN), (errno.EMFILE, TOO_MANY_FILES)], ids=str
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_a_failing_disk(
    server: Server, inputs: Path, tmp_path: Path, command: str, number: int, calls: tuple[str, ...]
) -> None:
    def run(name: str, fault: Fault | None) -> tuple[object, Path]:
        arguments, place = prepared(inputs, tmp_path / name, command)
        outcome = server.run("kdata.pipelines.cli.main:call", [arguments], [place], fault)
        assert outcome.state == "done", f"{fault}: {outcome.text}{outcome.output}"
        return outcome, place

    whole, place = run("whole", Fault("once", at=0, calls=calls))
    assert whole.result == (0 if command != "repair" else whole.result), whole.output  # type: ignore[attr-defined]
    total = whole.calls  # type: ignore[attr-defined]
    assert total > 3
    step = max(total // 5, 1)
    for at in range(1, total + 1, step):
        outcome, place = run(str(at), Fault("from", number, at, calls))
        output = outcome.output  # type: ignore[attr-defined]
        assert "Traceback" not in output, f"call {at}: {output}"
        if outcome.result == 0:  # type: ignore[attr-defined]
            continue  # what failed was only the removal of something
        assert output.count("error: ") == 1 and output.strip().splitlines()[-1].startswith("error: "), (
            f"call {at}: {output}"
        )
        made = command.split()[0] in ("head", "merge", "split")
        if (place / "new").exists() and made:  # only reading it again failed: it is whole
            assert all(verify(kdata.open(p.parent)) == [] for p in (place / "new").rglob("dataset.json")), f"call {at}"
        elif number != errno.EIO:
            assert not (place / "new").exists() and not (place / "new.parquet").exists(), f"call {at}"
        if command != "repair":
            kept = [p for p in verify(kdata.open(place / "d")) if not p.path.endswith(".tmp")]
            assert [p for p in kept if not p.path.startswith(("plans/new", "scores/new"))] == []
        shutil.rmtree(place)


def keep_tokenizer(model: str, place: str) -> None:
    """What every capture does with its tokenizer, with the temporary folder of the system in `place`."""
    tempfile.tempdir = place
    with tokenizer_files(load_tokenizer(model, None)) as folder:
        assert (folder / "tokenizer.json").exists()


def test_the_temporary_folder_of_a_tokenizer_on_a_failing_disk(
    server: Server, tokenizer_dir: Path, tmp_path: Path
) -> None:
    target = "tests.kdata.share.test_failing_disk:keep_tokenizer"
    whole = server.run(target, [tokenizer_dir, tmp_path], [tmp_path], Fault("once", at=0, calls=FULL))
    assert whole.state == "done" and whole.calls >= 4, whole.text
    for at in range(1, whole.calls + 1):
        outcome = server.run(target, [tokenizer_dir, tmp_path], [tmp_path], Fault("from", errno.ENOSPC, at, FULL))
        assert outcome.state == "failed" and "StorageError" in outcome.error, f"call {at}: {outcome.text}"
        assert str(tmp_path) in outcome.text and "the disk is full; free some space" in outcome.text
        assert list(tmp_path.iterdir()) == []


def test_after_a_failing_disk_the_same_command_does_its_work(server: Server, inputs: Path, tmp_path: Path) -> None:
    arguments, place = prepared(inputs, tmp_path / "x", "merge")
    for at in (2, 9, 17, 30):
        outcome = server.run("kdata.pipelines.cli.main:call", [arguments], [place], Fault("kill", at=at))
        assert outcome.state == "killed" and not (place / "new").exists()
    assert server.run("kdata.pipelines.cli.main:call", [arguments], [place]).result == 0
    assert {p.name for p in place.iterdir()} == {"d", "new"}
    assert verify(kdata.open(place / "new"), deep=True) == [] and digests(place / "d") == digests(inputs / "d")
