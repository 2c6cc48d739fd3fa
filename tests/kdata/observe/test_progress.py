"""Progress: correct figures, a display that fits, and a log that has the same figures and survives a killed process."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kdata.errors import StorageError
from kdata.format.records import Shard
from kdata.format.schema import FileInfo, ManifestEntry
from kdata.observe import progress
from kdata.observe.energy import Devices
from kdata.observe.journal import Line, alive, append, last_lines, lines_of, read_journal, took, total
from kdata.observe.progress import Figures, RunStage, Task
from kdata.observe.text import duration, energy_text, hours_text

ROOT = Path(__file__).resolve().parents[3]
CPU = Devices(kind="cpu", count=2, name="CPU core")


def shard(tokens: int, targets: int, payload: int, mass: float | None) -> Shard:
    """A shard with these figures and nothing in it."""
    files = {"data/x-00000.arrow": FileInfo(sha256="0" * 64, bytes=payload)}
    files["index/x-00000.parquet"] = FileInfo(sha256="0" * 64, bytes=7)
    entry = ManifestEntry(
        name="x-00000", source="x", unit=0, rows=1, tokens=tokens, target_tokens=targets, rejected=0, inputs="",
        files=files, codec_error=None,
    )  # fmt: skip
    return Shard(entry, [], mass)


SHARDS = st.lists(
    st.tuples(st.integers(0, 90_000), st.integers(0, 90_000), st.integers(0, 10**8), st.none() | st.floats(0, 1)),
    max_size=30,
)


@given(SHARDS)
def test_means_are_those_of_all_tokens_not_of_shards(parts: list[tuple[int, int, int, float | None]]) -> None:
    figures = Figures("documents")
    for part in parts:
        figures.store(shard(*part))
    sized = [(tokens, payload) for tokens, _, payload, _ in parts if tokens]
    massed = [(targets, mass) for _, targets, _, mass in parts if mass is not None]
    tokens, targets = sum(t for t, _ in sized), sum(t for t, _ in massed)
    assert figures.shards == len(parts)
    if tokens:
        assert figures.bytes_per_token == pytest.approx(sum(p for _, p in sized) / tokens, rel=1e-12)
    if targets:
        assert figures.kept_mass == pytest.approx(sum(t * m for t, m in massed) / targets, abs=1e-12)
    assert (figures.bytes_per_token is None, figures.kept_mass is None) == (not tokens, not targets)


def test_a_large_shard_weighs_more() -> None:
    figures = Figures("documents")
    figures.store(shard(100, 100, 6_000, 0.9))
    figures.store(shard(300, 100, 30_000, 0.5))
    assert (figures.bytes_per_token, figures.kept_mass) == (90.0, pytest.approx(0.7))


def test_time_left_follows_what_this_run_did() -> None:
    figures = Figures("documents", total=1000, done=900, skipped=900)
    assert figures.seconds_left(5.0) is None, "a former run says nothing about the rate"
    figures.add(10, tokens=2_000, seconds=20.0)
    assert (figures.per_sec(figures.tokens), figures.seconds_left(20.0)) == (100.0, 180.0)
    assert figures.seconds_left(50.0) == 150.0, "while a long unit is under way the time left runs down"
    assert figures.seconds_left(900.0) == 0.0
    assert Figures("rows").seconds_left(1.0) is None


def test_tokens_are_counted_once() -> None:
    read, train = Figures("documents"), Figures("tokens", total=100)
    read.add(3, tokens=70, seconds=2.0)
    train.add(50, tokens=0, seconds=2.0)
    assert (read.tokens, train.tokens) == (70, 50)
    assert read.texts() == ["35 tokens/s"] and train.texts() == ["25 tokens/s"]
    plain = Figures("rows")
    plain.add(10, tokens=0, seconds=4.0)
    assert plain.texts() == ["2 rows/s"]


# ------------------------------------------------------------------------------------------- what is shown


def busy(task: Task) -> None:
    """Large but usual figures."""
    task.figures.skipped = task.figures.done = 1_200_000
    task.figures.store(shard(32_768, 32_000, 32_768 * 164, 0.93))
    task.figures.shards = 1_234
    task.figures.add(345_678, tokens=432_100_000, seconds=3_600.0)


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_display_is_two_lines_that_fit(width: int) -> None:
    with Task("capture: reading", 4_500_000, "documents") as task:
        busy(task)
        console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
        lines = [line.rstrip() for line in "".join(s.text for s in console.render(task)).splitlines()]
    assert len(lines) == 2 and max(map(len, lines)) <= width and "…" not in "".join(lines)
    assert "━" * 4 in lines[0] and "capture: reading" in lines[0] and lines[0].endswith(" left")
    assert "1,545,678/4,500,000 documents" in lines[0]
    assert lines[1] == "  120,028 tokens/s  1,234 shards  164.0 bytes/token  kept mass 0.930"


@pytest.mark.parametrize("width", [80, 120])
def test_planned_work_shows_tokens_first_and_whole_figures_only(width: int) -> None:
    with Task("capture: reading", 4_500_000, "documents") as task:
        task.plan(0, 100_000, 24_000_000)
        task.under_way(0, 20_000_000)
        busy(task)
        console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
        lines = [line.rstrip() for line in "".join(s.text for s in console.render(task)).splitlines()]
    assert len(lines) == 2 and max(map(len, lines)) <= width and "…" not in "".join(lines)
    assert re.search(r"[━╸] +452,100,000/~[\d,]+ tokens .* left$", lines[0])
    figures = [
        "125,583 tokens/s",
        "1,545,678/4,500,000 documents",
        "1,234 shards",
        "164.0 bytes/token",
        "kept mass 0.930",
    ]
    assert lines[1] == "  " + "  ".join(figures[: 3 if width == 80 else 5])


def test_planned_tokens_and_estimates() -> None:
    figures = Figures("documents", total=40)
    figures.skip(10, 1_000)
    figures.plan(3, 10, 500)
    assert figures.progress == (1_000, 3_000) and figures.is_estimate, "40 documents of 75 tokens"
    figures.under_way(3, 200, 4.0)
    assert (figures.progress[0], figures.tokens_now, figures.seconds_left(4.0)) == (1_200, 200, 36.0)
    figures.under_way(3, 900, 5.0)
    assert figures.tokens_now == 500, "no more than is in the part, though some was read twice"
    figures.under_way(7, 900, 6.0)
    assert figures.tokens_now == 500 and figures.worked == 5.0, "a part that nobody planned, or that is committed"
    figures.add(10, 480, 8.0, part=3)
    figures.plan(4, 20, 1_520)
    assert (figures.progress, figures.is_estimate) == ((1_480, 3_000), False), "all is planned"
    unknown = Figures("documents")
    unknown.plan(0, 5, 100)
    unknown.under_way(0, 60, 2.0)
    assert (unknown.progress, unknown.count_text(), unknown.seconds_left(2.0)) == ((60, None), "60 tokens", None)


def test_tokens_that_are_written_are_estimated_from_those_written_so_far() -> None:
    figures = Figures("prompts", total=40, at_most=True)
    figures.plan(0, 10, 1_280)
    assert (figures.tokens_total, figures.is_estimate) == (5_120, True)
    figures.add(10, 300, 3.0, part=0)
    figures.plan(1, 30, 3_840)
    assert (figures.tokens_total, figures.is_estimate) == (1_200, True)
    figures.add(30, 1_100, 9.0, part=1)
    assert (figures.progress, figures.is_estimate) == ((1_400, 1_400), False)


CHILD = """
import sys, time
from pathlib import Path
from kdata.observe import progress
from tests.kdata.observe.test_progress import shard
progress.TICK_SEC = progress.BEAT_SEC = 0.05
with progress.Task("capture: reading", 40, "documents", Path(sys.argv[1])) as task:
    for _ in range(8):
        time.sleep(0.05)
        task.advance(5, tokens=1000, shard=shard(1000, 990, 64200, 0.93))
"""


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_real_terminal(tmp_path: Path, columns: int) -> None:
    """Frames are drawn over one another and never wrap; the log is written all the same."""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "24", "TERM": "xterm-256color"}
    log = tmp_path / "log.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(log)], cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    shown = b"".join(read_all(master)).decode()
    assert process.wait() == 0, shown
    rows = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", row) for row in re.split(r"[\r\n]+", shown)]
    assert max(map(len, rows)) <= columns
    assert "\x1b[1A" in shown, "each frame goes back over the one before"
    assert any("40/40 documents" in row and "done in" in row for row in rows)
    assert any("tokens/s  8 shards  64.2 bytes/token  kept mass 0.930" in row for row in rows)
    lines = read_journal(log)
    assert [lines[0].state, lines[-1].state] == ["running", "done"] and len(lines) > 2
    assert (lines[-1].done, lines[-1].shards, lines[-1].bytes_per_token) == (40, 8, 64.2)


def read_all(handle: int) -> Iterator[bytes]:
    """What a terminal shows until its other end is closed, which Linux tells by an error."""
    while True:
        try:
            data = os.read(handle, 4096)
        except OSError:
            return
        if not data:
            return
        yield data


def test_elsewhere_a_plain_line_at_a_time(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TICK_SEC", "BEAT_SEC"):
        monkeypatch.setattr(progress, name, 0.01)
    with Task("capture: reading", 100, "documents") as task:
        task.skip(20)
        task.advance(30, tokens=900, shard=shard(1000, 990, 64_200, 0.931))
        shown = capsys.readouterr().err
        while "50/100" not in shown:  # lines come without anything being done
            shown += capsys.readouterr().err
    *running, last = (shown + capsys.readouterr().err).splitlines()
    assert running[-1].startswith("capture: reading: 50/100 documents  ") and " left  " in running[-1]
    for line in (running[-1], last):
        assert line.endswith(" tokens/s  1 shard  64.2 bytes/token  kept mass 0.931")
    assert "  done in " in last


def test_markup_in_a_name_is_text(capsys: pytest.CaptureFixture) -> None:
    with Task("score [red]x[/]: reading", 1, "rows"):
        pass
    assert "score [red]x[/]: reading: 0/1 rows" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- the log


def test_the_log_has_every_figure(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with Task("capture: reading", 100, "documents", log, CPU) as task:
        task.skip(20, shard=shard(1000, 990, 64_200, 0.931))
        task.advance(30, tokens=900, shard=shard(1000, 990, 64_200, 0.931), loss=float("nan"), step=3)
    first, last = [json.loads(line) for line in log.read_text().splitlines()]
    assert last.keys() == first.keys() == Line.model_fields.keys()
    assert first["state"] == "running" and first["done"] == 0 and first["tokens_per_sec"] is None
    expected = {
        "stage": "capture: reading", "within": None, "state": "done", "error": None, "done": 50, "total": 100,
        "unit": "documents", "tokens": 900, "shards": 2, "bytes_per_token": 64.2, "kept_mass": 0.931,
        "seconds_left": None, "facts": {"loss": "NaN", "step": 3}, "pid": os.getpid(),
        "devices": {"kind": "cpu", "count": 2, "name": "CPU core", "here": True},
    }  # fmt: skip
    assert {key: last[key] for key in expected} == expected
    assert datetime.fromisoformat(last["time"]).tzinfo is not None
    assert last["tokens_per_sec"] > 0 and 0 <= last["busy_seconds"] <= last["seconds"]
    assert [line.facts for line in read_journal(log)] == [{}, {"loss": "NaN", "step": 3}]


def test_a_line_names_its_source_and_an_older_one_counts_by_its_title(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for title, source in (("reading", "capture"), ("capture: reading", None), ("capture: reading", "other")):
        with Task(title, 1, "rows", log, source=source):
            pass
    assert {line.stage for line in lines_of(read_journal(log), "capture")} == {"reading"}
    old = [json.loads(text) for text in log.read_text().splitlines()]
    for fields in old:
        for name in ("source", "tokens_done", "tokens_total", "tokens_estimated"):
            del fields[name]
    log.write_text("".join(json.dumps(fields) + "\n" for fields in old))
    lines = lines_of(read_journal(log), "capture")
    assert {line.stage for line in lines} == {"capture: reading"} and len(lines) == 4


def test_every_key_of_the_log_is_documented() -> None:
    """In the table of pipelines/README.md, with the words of the model."""
    section = (ROOT / "pipelines" / "README.md").read_text("utf-8").split("## Watching a run")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE))
    assert rows == {name: field.description for name, field in Line.model_fields.items()}


@pytest.mark.parametrize(
    ("error", "state", "kind"),
    [(ValueError("x"), "failed", "ValueError"), (KeyboardInterrupt(), "stopped", "KeyboardInterrupt")],
)
def test_the_end_of_a_task_is_logged(tmp_path: Path, error: BaseException, state: str, kind: str) -> None:
    log = tmp_path / "log.jsonl"
    with pytest.raises(type(error)), RunStage("capture", log), Task("capture: reading", 10, "documents"):
        raise error
    stage, phase = read_journal(log)[-2:]
    assert (stage.stage, stage.state, stage.error) == ("capture: reading", state, kind)
    assert (phase.stage, phase.state, phase.error) == ("capture", state, kind)


def test_a_line_that_was_cut_off_is_ignored_and_not_continued(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with Task("a", 1, "rows", log):
        pass
    whole = log.read_bytes()
    log.write_bytes(whole + whole[:40])
    with Task("b", 1, "rows", log):
        pass
    assert [line.stage for line in read_journal(log)] == ["a", "a", "b", "b"]
    assert log.read_bytes().startswith(whole + whole[:40] + b"\n")
    assert read_journal(tmp_path / "none") == []
    log.write_bytes(b'{"stage": "of an older version"}\n' + whole)
    assert len(read_journal(log)) == 2


def test_a_log_that_cannot_be_written_does_not_stop_the_work_before_its_end(tmp_path: Path) -> None:
    done = []
    with pytest.raises(StorageError, match="cannot write"), Task("a", 1, "rows", tmp_path / "gone" / "log.jsonl"):
        done.append(1)
    assert done == [1]


def test_a_run_stage_counts_the_tasks_in_it(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    gpus = Devices(kind="gpu", count=4, name="H200", here=False)
    with RunStage("train", log, gpus):
        with RunStage("train ce"), Task("train CE", 100, "tokens") as task:
            task.skip(40)
            task.advance(60)
        with Task("score ref: reading", 5, "rows") as task:
            task.advance(5, tokens=7)
        with Task("built-in corpus", 5, "documents") as task:
            task.advance(5)
    lines = {line.stage: line for line in last_lines(read_journal(log))}
    assert {name: line.within for name, line in lines.items()} == {
        "train": None, "train ce": "train", "train CE": "train ce", "score ref: reading": "train",
        "built-in corpus": "train",
    }  # fmt: skip
    assert {name: line.tokens for name, line in lines.items()} == {
        "train": 67, "train ce": 60, "train CE": 60, "score ref: reading": 7, "built-in corpus": 0,
    }  # fmt: skip
    assert all(line.devices == gpus for line in lines.values())
    parts = lines["train CE"].busy_seconds + lines["score ref: reading"].busy_seconds
    assert lines["train"].busy_seconds == pytest.approx(parts, abs=0.003), "a task without tokens does not count"
    with Task("outside", 1, "rows") as task:
        assert task.run_stage is None and task.log is None


def test_a_run_stage_takes_the_devices_of_its_task(tmp_path: Path) -> None:
    """As where a cluster says what its teachers have once the first is there; a server never says."""
    log = tmp_path / "log.jsonl"
    unknown, cluster = (
        Devices(kind="remote", count=0, name="Ray", here=False),
        Devices(kind="gpu", count=8, name="H200"),
    )
    with RunStage("capture", log, unknown), Task("capture: reading", 1, "rows", devices=cluster):
        pass
    with RunStage("heldout", log, unknown), Task("heldout: reading", 1, "rows"):
        pass
    devices = {line.stage: line.devices for line in last_lines(read_journal(log))}
    assert devices == dict.fromkeys(("capture", "capture: reading"), cluster) | dict.fromkeys(
        ("heldout", "heldout: reading"), unknown
    )
    assert took(read_journal(log))[-1].device_hours == {}


def test_counting_in_threads_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TICK_SEC", "BEAT_SEC"):
        monkeypatch.setattr(progress, name, 0.001)

    def work(task: Task) -> None:
        for _ in range(200):
            task.advance(1, tokens=3)

    log = tmp_path / "log.jsonl"
    with Task("a", 800, "rows", log) as task:
        threads = [threading.Thread(target=work, args=(task,)) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    lines = read_journal(log)
    assert (lines[-1].done, lines[-1].tokens) == (800, 2400)
    assert all(line.tokens == 3 * line.done for line in lines)


# ----------------------------------------------------------------------------- who wrote it, and what it took


@pytest.fixture
def line(tmp_path: Path) -> Line:
    """The last line of this process."""
    with Task("capture: reading", 10, "documents", tmp_path / "one.jsonl", CPU) as task:
        task.advance(10, tokens=100)
    return read_journal(tmp_path / "one.jsonl")[-1]


def test_a_process_is_identified_by_its_id_and_its_start(line: Line) -> None:
    assert alive(line) is True
    other = line.model_copy(update={"process_started": line.process_started - 4000})
    assert alive(other) is False, "another process has its id now"
    assert alive(line.model_copy(update={"host": "elsewhere"})) is None


def test_a_zombie_counts_as_dead(line: Line) -> None:
    process = subprocess.Popen(["sleep", "60"])
    theirs = line.model_copy(update={"pid": process.pid, "process_started": psutil.Process(process.pid).create_time()})
    assert alive(theirs) is True
    process.send_signal(signal.SIGKILL)
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert alive(theirs) is False
    process.wait()
    assert alive(theirs) is False


def span(line: Line, number: int, **fields: object) -> list[Line]:
    """A piece of work of two lines, the first without anything done."""
    own = {"pid": number, "tokens": 0, "seconds": 0.0, "busy_seconds": 0.0, "energy_joules": 0.0}
    return [line.model_copy(update={**own, "state": "running"}), line.model_copy(update={**own, **fields})]


def test_totals_add_up_over_attempts(line: Line) -> None:
    attempts = [
        *span(line, 1, tokens=1000, seconds=1800.0, busy_seconds=10.0, energy_joules=360.0, state="running"),
        *span(line, 2, tokens=3000, seconds=3600.0, busy_seconds=30.0, energy_joules=3600.0),
        *span(line, 3, stage="score: reading", tokens=5, seconds=36.0, busy_seconds=1.0, energy_joules=None),
    ]
    read, score = took(attempts)
    assert (read.name, read.tokens, read.tokens_per_sec, read.seconds) == ("capture: reading", 4000, 100.0, 5400.0)
    assert read.device_hours == {"2 CPU cores": 3.0} and read.energy_joules == 3960.0
    assert score.energy_joules is None and score.device_hours == {"2 CPU cores": pytest.approx(0.02)}
    everything = total([read, score])
    assert (everything.tokens, everything.seconds, everything.energy_joules) == (4005, 5436.0, None)
    assert everything.device_hours == {"2 CPU cores": pytest.approx(3.02)}
    assert total([read]).energy_joules == 3960.0


def test_totals_separate_devices_and_leave_out_unknown_ones(line: Line) -> None:
    gpu, server = (
        Devices(kind="gpu", count=2, name="H200"),
        Devices(kind="remote", count=0, name="a server", here=False),
    )
    attempts = [
        *span(line, 1, seconds=3600.0, devices=gpu),
        *span(line, 2, seconds=1800.0),
        *span(line, 3, seconds=900.0, devices=server),
    ]
    assert took(attempts)[0].device_hours == {"2 x H200": 2.0, "2 CPU cores": 1.0}


def test_a_killed_attempt_counts_up_to_its_last_line(tmp_path: Path, line: Line) -> None:
    log = tmp_path / "log.jsonl"
    for part in (*span(line, 1, seconds=20.0, tokens=7, state="running"), *span(line, 2, seconds=5.0, tokens=1)):
        append(log, part)
    assert [(t.seconds, t.tokens) for t in took(read_journal(log))] == [(25.0, 8)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (125, "2 min 05 s"), (3599.6, "1 h 00 min"),
     (3720, "1 h 02 min"), (86399, "23 h 59 min"), (273_600, "3 d 4 h")],
)  # fmt: skip
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_costs_for_people() -> None:
    assert hours_text({"2 CPU cores": 0.08333, "NVIDIA H200": 12.5}) == "0.0833 (2 CPU cores) + 12.50 (NVIDIA H200)"
    assert energy_text(None) == "not reported by this device"
    assert [energy_text(j) for j in (0.0, 1800.0, 7.2e6)] == ["0 Wh", "0.5 Wh", "2 kWh"]
