"""`kdata status`: what a run or a dataset is doing, seen from another process, which neither disturbs it nor is fooled."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import time
from datetime import UTC, datetime, timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import kdata
from kdata.errors import CorruptError, MissingError, TeacherError
from kdata.format.files import journal_of
from kdata.format.manifest import read_info, write_info
from kdata.observe.journal import append, read_journal
from kdata.observe.progress import RunStage, Task
from kdata.observe.status import Row, Status, render, status, watch
from kdata.pipelines.cli.main import app
from tests.fakes import StandInTeacher, digests, rows_of_text, run_capture, run_generate, write_jsonl
from tests.kdata.observe.test_progress import shard

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload", __name__])
NAMES = ["prepare", "generate", "capture", "train", "report"]


def text_of(shown: Status, width: int = 120, **options: Any) -> str:
    """A status as a terminal of so many columns shows it."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(render(shown, width, **options))
    return console.file.getvalue()  # type: ignore[attr-defined]


def states(shown: Status) -> dict[str, str]:
    """Task by stage."""
    return {row.name: row.state for row in shown.rows}


# --------------------------------------------------------------------------------------------------- a run


def write_state(run: Path, *done: str) -> None:
    """The run's own state, as `pipelines/runner.py` writes it."""
    run.mkdir(exist_ok=True)
    state = {"settings": {"name": "quickstart"}, "stages": NAMES, "seconds": dict.fromkeys(done, 1.0)}
    (run / "run.json").write_text(json.dumps(state))


def work(run: Path, ready: Any) -> None:
    """A run as far as the middle of its capture; then it says so, and waits for its end."""
    log = run / "progress.jsonl"
    write_state(run)
    with RunStage("prepare", log):
        for name in ("teacher", "reference"):
            with Task(f"train the built-in {name}", 500, "tokens") as task:
                task.advance(500)
    with RunStage("generate", log), Task("generate: writing", 8, "prompts") as task:
        task.advance(8, tokens=90, shard=shard(120, 90, 7_000, 0.9))
    write_state(run, "prepare", "generate")
    with RunStage("capture", log) as run_stage, Task("capture: reading", 100, "documents") as task:
        task.skip(20, shard=shard(1000, 990, 64_000, 0.93))
        task.advance(20, tokens=1000, shard=shard(1000, 990, 66_000, 0.95))
        for part in (task, run_stage):
            part._note()
        ready.set()
        time.sleep(600)


@pytest.fixture
def at_work(tmp_path: Path) -> Any:
    """A process in the middle of a run."""
    ready = CONTEXT.Event()
    process = CONTEXT.Process(target=work, args=(tmp_path / "run", ready))
    process.start()
    assert ready.wait(60)
    yield tmp_path / "run", process
    process.kill()
    process.join()


EXPECTED = {
    "prepare": "done", "train the built-in teacher": "done", "train the built-in reference": "done",
    "generate": "done", "capture": "running", "train": "waiting", "report": "waiting",
}  # fmt: skip


def test_a_run_at_work_then_killed(at_work: tuple[Path, BaseProcess]) -> None:
    run, process = at_work
    before = digests(run)
    shown = status(run)
    assert (shown.title, shown.state, shown.pid) == ("quickstart", "running", process.pid)
    assert states(shown) == EXPECTED and list(states(shown)) == list(EXPECTED)
    assert [row.name for row in shown.rows if row.part] == [
        "train the built-in teacher",
        "train the built-in reference",
    ]
    line = next(row.line for row in shown.rows if row.name == "capture")
    assert line is not None and (line.done, line.total, line.shards, line.tokens) == (40, 100, 2, 1000)
    assert (line.bytes_per_token, line.kept_mass) == (65.0, 0.94) and line.seconds_left is not None
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    shown = status(run)
    assert (shown.state, shown.pid) == ("stopped", None)
    assert states(shown) == {**EXPECTED, "capture": "stopped"}
    assert digests(run) == before, "nothing was written"


def test_a_run_that_resumes_and_one_that_fails(tmp_path: Path, at_work: tuple[Path, BaseProcess]) -> None:
    run, process = at_work
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    log = run / "progress.jsonl"
    with RunStage("capture", log):
        assert status(run).state == "running", "the teacher is loading"
        assert states(status(run)) == EXPECTED
        with Task("capture: reading", 100, "documents") as task:
            task.advance(60, tokens=3000)
    assert status(run).state == "running", "between two stages"
    with pytest.raises(TeacherError), RunStage("train", log):
        raise TeacherError("the engine died")
    write_state(run, "prepare", "generate", "capture")
    shown = status(run)
    assert states(shown) == {**EXPECTED, "capture": "done", "train": "failed"} and shown.state == "failed"
    assert shown.took is not None and shown.took.tokens == 1000 + 90 + 1000 + 3000, "of both attempts"
    write_state(run, *NAMES)
    assert status(run).state == "done" and set(states(status(run)).values()) == {"done"}


def test_another_process_with_the_same_id_is_not_the_run(tmp_path: Path) -> None:
    write_state(tmp_path)
    log = tmp_path / "progress.jsonl"
    with Task("x", 1, "rows", tmp_path / "own.jsonl"):
        own = read_journal(tmp_path / "own.jsonl")[0]
    line = own.model_copy(update={"stage": "prepare", "unit": None})
    append(log, line.model_copy(update={"process_started": line.process_started - 9_999}))
    assert status(tmp_path).state == states(status(tmp_path))["prepare"] == "stopped"
    append(log, line.model_copy(update={"host": "gpu-7", "time": line.time + timedelta(seconds=1)}))
    assert (status(tmp_path).state, status(tmp_path).host) == ("unknown", "gpu-7")
    assert "unknown (look on gpu-7, where it was at work)" in text_of(status(tmp_path))


def test_an_old_attempt_on_another_machine_does_not_hide_the_present_one(tmp_path: Path) -> None:
    write_state(tmp_path)
    log = tmp_path / "progress.jsonl"
    with RunStage("prepare", log):
        pass
    first, last = read_journal(log)
    log.unlink()
    append(log, first.model_copy(update={"host": "gpu-7", "pid": 1}))
    append(log, last.model_copy(update={"state": "failed", "error": "TeacherError"}))
    assert status(tmp_path).state == states(status(tmp_path))["prepare"] == "failed"


def test_a_run_without_a_log(tmp_path: Path) -> None:
    write_state(tmp_path)
    shown = status(tmp_path)
    assert shown.state == "unknown" and set(states(shown).values()) == {"waiting"} and shown.took is None
    assert "no log says whether a process writes it" in text_of(shown)


# ----------------------------------------------------------------------------------------------- a dataset


def test_a_dataset_that_is_written(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, undisturbed: dict[str, str]
) -> None:
    """Asked in the middle, again and again: the capture goes on, and writes the same bytes."""
    root, seen = tmp_path / "dataset", []

    def look(call: int) -> None:
        seen.append(status(root))

    run_capture(root, corpus_file, tokenizer_dir, teacher=StandInTeacher(before_call=look))
    assert [shown.state for shown in seen] == ["running"] * len(seen) and len(seen) == 4
    assert [row.shards for shown in seen for row in shown.rows][-1] in (2, 3)
    assert digests(root) == undisturbed
    assert {p.name for p in tmp_path.iterdir()} == {"dataset", ".dataset.progress.jsonl"}
    [row] = status(root).rows
    entries = kdata.open(root).manifest
    assert (row.name, row.state, row.shards) == ("capture", "done", len(entries))
    payload = sum(f.bytes for e in entries for name, f in e.files.items() if name.startswith("data/"))
    assert row.bytes_per_token == payload / sum(e.tokens for e in entries)
    assert row.line is not None and row.line.tokens == sum(e.tokens for e in entries)
    kept = kdata.open(root).sql(
        "select sum(kept_mass * num_target_tokens) / sum(num_target_tokens) as m from rows where kept_mass is not null"
    )
    assert row.line.kept_mass == pytest.approx(kept["m"][0].as_py(), abs=1e-6)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path) -> dict[str, str]:
    """Digests of the dataset that nobody looks at while it is written."""
    return digests(run_capture(tmp_path_factory.mktemp("undisturbed") / "dataset", corpus_file, tokenizer_dir).path)


def capture_slowly(root: Path, corpus: Path, tokenizer: Path, ready: Any) -> None:
    """Two shards, then it says so, and waits for its end."""

    def wait(call: int) -> None:
        if call == 3:
            ready.set()
            time.sleep(600)

    run_capture(root, corpus, tokenizer, teacher=StandInTeacher(before_call=wait))


def test_a_killed_capture_is_stopped_and_resume_counts_what_was_committed(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, undisturbed: dict[str, str]
) -> None:
    root, ready = tmp_path / "dataset", CONTEXT.Event()
    process = CONTEXT.Process(target=capture_slowly, args=(root, corpus_file, tokenizer_dir, ready))
    process.start()
    assert ready.wait(60)
    assert (status(root).state, status(root).pid) == ("running", process.pid)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert status(root).state == states(status(root))["capture"] == "stopped"
    assert "capture" in text_of(status(root)) and "the same command goes on where it was" in " ".join(
        text_of(status(root)).split()
    )
    there = len(kdata.open(root).manifest)
    run_capture(root, corpus_file, tokenizer_dir)
    assert digests(root) == undisturbed
    first, last = read_journal(journal_of(root))[-2:]
    entries = kdata.open(root).manifest
    assert (first.done, last.done, last.shards) == (0, 24, len(entries)) and status(root).state == "done"
    assert last.tokens == sum(entry.tokens for entry in entries[there:]), "only what this attempt did"
    payload = sum(f.bytes for e in entries for name, f in e.files.items() if name.startswith("data/"))
    assert last.bytes_per_token == pytest.approx(payload / sum(e.tokens for e in entries), abs=1e-3)


def test_a_dataset_that_is_begun_again_has_a_log_of_its_own(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    import shutil

    root = tmp_path / "dataset"
    for _ in range(2):
        run_capture(root, corpus_file, tokenizer_dir)
        took = status(root).took
        assert took is not None and took.tokens == kdata.open(root).num_tokens
        shutil.rmtree(root)


def test_writing_counts_what_was_written(tmp_path: Path, tokenizer_dir: Path) -> None:
    prompts = write_jsonl(tmp_path / "p.jsonl", rows_of_text(6))
    dataset = run_generate(tmp_path / "d", prompts, tokenizer_dir)
    line = read_journal(journal_of(dataset.path))[-1]
    assert line.tokens == sum(e.target_tokens for e in dataset.manifest) < dataset.num_tokens


def test_a_dataset_of_a_run_uses_the_log_of_the_run(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    from tests.fakes import CaptureConfig, Corpus, CorpusConfig, TeacherConfig, capture_with

    write_state(tmp_path / "run")
    root, log = tmp_path / "run" / "dataset", tmp_path / "run" / "progress.jsonl"
    config = CaptureConfig(corpus=CorpusConfig(path=str(corpus_file)), kind="hybrid", k=8, unit_tokens=120)
    who = TeacherConfig(model=str(tokenizer_dir), backend="transformers")
    with RunStage("capture", log):
        capture_with(root, StandInTeacher(), who, Corpus(config.corpus), config, log=log)
    [row] = status(root).rows
    assert row.line is not None and row.line.within == "capture" and row.line.tokens == kdata.open(root).num_tokens
    assert not journal_of(root).exists()


def test_a_dataset_without_a_log_is_never_running(captured: Path, tmp_path: Path) -> None:
    import shutil

    root = Path(shutil.copytree(captured, tmp_path / "copy"))
    assert states(status(root)) == {"capture": "done"} and status(root).took is None
    write_info(root, _unfinished(root))
    assert states(status(root)) == {"capture": "unknown"} and status(root).state == "unknown"


def _unfinished(root: Path) -> Any:
    info = read_info(root)
    return info.model_copy(
        update={"sources": {n: s.model_copy(update={"num_units": None}) for n, s in info.sources.items()}}
    )


# ------------------------------------------------------------------------------------ what is shown, and asked


def usual(state: Any = "running") -> Status:
    """Large but usual figures in every column."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    from kdata.observe.energy import Devices
    from kdata.observe.journal import Line, Took

    line = Line(
        time=now, since=now, stage="capture: reading", within=None, state="running", error=None, done=1_545_678,
        total=4_500_000, unit="documents", tokens=10**9, tokens_per_sec=120_027.8, busy_seconds=9.0, shards=1_234,
        bytes_per_token=164.23, kept_mass=0.9312, seconds=9.0, seconds_left=7_500.0,
        devices=Devices(kind="gpu", count=8, name="NVIDIA H200"), energy_joules=1.0, facts={}, host="h", pid=1,
        process_started=0.0,
    )  # fmt: skip
    took = Took(name="all", seconds=93_000.0, device_hours={"8 x NVIDIA H200": 206.67}, energy_joules=4.2e8)
    return Status(
        "llama-70b-on-everything", state, [Row("capture", state, line, updated=now), Row("train", "waiting")], took,
        None, 12_345,
    )  # fmt: skip


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(width: int) -> None:
    shown = text_of(usual(), width, now=datetime(2026, 1, 1, 0, 0, 12, tzinfo=UTC))
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width and "…" not in shown
    row = next(line for line in lines if line.strip().startswith("capture"))
    for part in ("running", "1.546M/4.5M", "120,028", "2 h 05 min", "1,234", "164.2", "0.931"):
        assert part in row
    assert ("documents" in row, "12 s ago" in row) == (width == 120, width == 120)
    assert lines[0] == "llama-70b-on-everything: running (process 12345), last line 12 s ago"
    assert "so far 1 d 1 h; device hours: 206.67 (8 x NVIDIA H200)" in shown and "energy: 116.7 kWh" in shown


def test_running_work_shows_its_tokens_between_commits() -> None:
    usually = usual()
    line = usually.rows[0].line
    assert line is not None
    fields = {"tokens_done": 1_234, "tokens_total": 45_600, "tokens_estimated": True}
    for state, cell in (("running", "1,234/~45,600 tokens"), ("done", "1.546M/4.5M documents")):
        row = Row("capture", state, line.model_copy(update=fields), updated=line.time)  # type: ignore[arg-type]
        assert cell in text_of(Status("x", state, [row]), 120)  # type: ignore[arg-type]


def call(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(a) for a in arguments])


def test_the_command(captured: Path, tmp_path: Path) -> None:
    shown = call("status", captured)
    assert shown.exit_code == 0 and "capture" in shown.output and "done" in shown.output
    watched = call("status", captured, "--watch")
    assert watched.exit_code == 0 and "took" in watched.output
    nothing = call("status", tmp_path)
    assert nothing.exit_code == 1 and isinstance(nothing.exception, MissingError)
    assert "is neither a run (it has no run.json) nor a dataset" in str(nothing.exception)
    (tmp_path / "run.json").write_text('{"settings": {}}')
    with pytest.raises(CorruptError, match=r"run\.json is damaged"):
        status(tmp_path)


def test_watching_ends_with_the_work(at_work: tuple[Path, BaseProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    run, process = at_work
    asked = []

    def sleep(seconds: float) -> None:
        asked.append(seconds)
        if len(asked) == 3:
            process.kill()
            process.join()

    monkeypatch.setattr("kdata.observe.status.time.sleep", sleep)
    console = Console(width=120, file=io.StringIO(), force_terminal=True)
    watch(run, console)
    assert len(asked) >= 3 and "stopped" in console.file.getvalue()  # type: ignore[attr-defined]
