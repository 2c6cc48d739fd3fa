"""The state of a run or of a dataset that is being written, seen from another terminal.

Everything is read from files: the run's state, the progress log, a dataset's manifest. Nothing is written and no lock is
taken, so the work is not disturbed. Work counts as running only while the process that wrote its last line is alive.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kdata.errors import CorruptError, MissingError
from kdata.format.json_text import read_json
from kdata.format.manifest import read_info, read_manifest
from kdata.observe.journal import Line, Took, alive, find_journal, last_lines, lines_of, read_journal, took, total
from kdata.observe.terminal import name_text
from kdata.observe.text import duration, energy_text, hours_text, visible_name

WATCH_SEC = 2.0
WIDE = 110  # terminals of at least this width name the units
State = Literal["waiting", "running", "done", "failed", "stopped", "unknown"]
STYLES = {"running": "bold cyan", "done": "green", "failed": "bold red", "stopped": "bold yellow", "waiting": "dim"}


@dataclass(frozen=True)
class Row:
    """One stage: its state, and its last line in the log, where it has one."""

    name: str
    state: State
    line: Line | None = None
    part: bool = False
    shards: int | None = None
    bytes_per_token: float | None = None
    updated: datetime | None = None


@dataclass(frozen=True)
class Status:
    """The state of a run or a dataset."""

    title: str
    state: State
    rows: list[Row] = field(default_factory=list)
    took: Took | None = None
    host: str | None = None
    """The other machine that the work ran on, where `state` is unknown."""
    pid: int | None = None
    """The process that does the work."""


def status(path: Path) -> Status:
    """The state of the run or dataset in a folder.

    Raises:
        MissingError: the folder holds neither.
        CorruptError: its run.json, dataset.json or manifest is damaged.
    """
    if (path / "run.json").exists():
        return _run(path)
    if (path / "dataset.json").exists():
        return _dataset(path)
    raise MissingError(
        f"{path} is neither a run (it has no run.json) nor a dataset (no dataset.json); name the folder of one. A dataset "
        "begins once its teacher is loaded"
    )


def _run(path: Path) -> Status:
    try:
        state = read_json(path / "run.json")
        name, finished = str(state["settings"]["name"]), state["seconds"]
        names = [str(stage) for stage in state.get("stages", finished)]
        if not isinstance(finished, dict):
            raise ValueError("seconds is not an object")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{path / 'run.json'} is damaged ({error}); `kdata run` into another folder") from error
    lines = last_lines(read_journal(path / "progress.jsonl"))
    rows = [row for stage in names for row in _stage(stage, stage in finished, lines)]
    return _status(name, rows, lines, all(stage in finished for stage in names))


def _stage(name: str, finished: bool, lines: Sequence[Line]) -> list[Row]:
    """The rows of one stage of a recipe: the stage, and the tasks in it where there are several."""
    own = [line for line in lines if line.stage == name and line.within is None]
    inner = _within(name, lines)
    state, last = _state(own, finished, "waiting"), _latest(own)
    alone = inner[0] if len(inner) == 1 else last
    parts = inner if len(inner) > 1 else []
    # The tasks of a stage that is done are done, whatever the log of a former attempt says.
    return [Row(name, state, alone, updated=last.time if last else None)] + [
        Row(part.stage, _state([part], state == "done", "unknown"), part, part=True, updated=part.time)
        for part in parts
    ]


def _within(name: str, lines: Sequence[Line]) -> list[Line]:
    """The latest line of every task in a stage of a recipe, at any depth."""
    names = {name}
    for line in lines:
        if line.unit is None and line.within in names:
            names.add(line.stage)
    latest: dict[str, Line] = {}
    for line in lines:
        if line.unit is not None and line.within in names:
            latest[line.stage] = line
    return list(latest.values())


def _dataset(path: Path) -> Status:
    info, manifest = read_info(path), read_manifest(path)
    lines = last_lines(read_journal(find_journal(path)))
    rows: list[Row] = []
    mine: list[Line] = []
    for name, source in info.sources.items():
        spans = lines_of(lines, name)
        mine += spans
        entries = [entry for entry in manifest if entry.source == name]
        tokens = sum(entry.tokens for entry in entries)
        payload = sum(f.bytes for entry in entries for file, f in entry.files.items() if file.startswith("data/"))
        state, last = _state(spans, source.num_units is not None, "unknown"), _latest(spans)
        size = payload / tokens if tokens else None
        rows.append(Row(name, state, last, False, len(entries), size, last.time if last else None))
    rows.sort(key=lambda row: (row.line is None, row.line.since.timestamp() if row.line else 0.0))
    finished = all(source.num_units is not None for source in info.sources.values())
    return _status(str(path), rows, mine, finished)


def _status(title: str, rows: list[Row], lines: Sequence[Line], finished: bool) -> Status:
    """The status of the whole, from all its lines; the sum is over lines that are not within others."""
    state, last = _state(lines, finished, "unknown"), _latest(lines)
    if state == "done" and not finished and last is not None:  # between two stages
        there = alive(last)
        state = "running" if there else "stopped" if there is False else "unknown"
    return Status(
        title,
        state,
        rows,
        total(took(_outermost(lines))) if lines else None,
        last.host if last is not None and state == "unknown" else None,
        last.pid if last is not None and state == "running" else None,
    )


def _outermost(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if line.within is None] or list(lines)


def _latest(lines: Sequence[Line]) -> Line | None:
    return max(lines, key=lambda line: line.time, default=None)


def _state(lines: Sequence[Line], finished: bool, absent: State) -> State:
    """The state of work, by the last lines of all attempts.

    Args:
        finished: whether its result exists.
        absent: the state where the log has no line of it.
    """
    if any(line.state == "running" and alive(line) for line in lines):
        return "running"
    last = _latest(lines)
    if finished or last is None:
        return "done" if finished else absent
    if last.state == "running":
        return "stopped" if alive(last) is False else "unknown"
    return last.state


def render(shown: Status, width: int = 120, now: datetime | None = None) -> Group:
    """A status as text for a terminal of so many columns."""
    now = now or datetime.now(UTC)
    wide = width >= WIDE
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("stage")  # the one that gives way where the terminal is narrow
    table.add_column("state", no_wrap=True)
    for name in ("done", "tokens/s", "left", "shards", "B/token", "kept", *(["updated"] if wide else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in shown.rows:
        label = name_text(f"{'  ' if row.part else ''}{row.name}", no_wrap=True, overflow="ellipsis")
        table.add_row(label, Text(row.state, STYLES.get(row.state, "magenta")), *map(name_text, _cells(row, wide, now)))
    return Group(_headline(shown, now), table, *_totals(shown))


def _headline(shown: Status, now: datetime) -> Text:
    text = Text.assemble(name_text(shown.title, "bold"), ": ", (shown.state, STYLES.get(shown.state, "magenta")))
    if shown.pid is not None:
        text.append(f" (process {shown.pid})")
    if shown.state == "unknown":
        host = visible_name(shown.host or "")
        where = f"look on {host}, where it was at work" if host else "no log says whether a process writes it"
        text.append(f" ({where})")
    elif shown.state in ("stopped", "failed"):
        text.append(" (the same command goes on where it was)")
    newest = max((row.updated for row in shown.rows if row.updated is not None), default=None)
    return text if newest is None else text.append(f", last line {_ago(newest, now)}")


def _cells(row: Row, wide: bool, now: datetime) -> list[str]:
    line = row.line
    shards, size = row.shards, row.bytes_per_token
    updated = [] if not wide else ["" if row.updated is None else _ago(row.updated, now)]
    if line is None or line.unit is None:
        return ["", "", "", _number(shards, ","), _number(size, ".1f"), "", *updated]
    done, total, unit, sign = line.done, line.total, line.unit, ""
    if row.state == "running" and line.tokens_total:  # tokens move between commits
        done, total, unit, sign = line.tokens_done, line.tokens_total, "tokens", "~" if line.tokens_estimated else ""
    count = _short(done) + (f"/{sign}{_short(total)}" if total and total != done else "")
    return [
        f"{count} {unit}" if wide else count,
        "" if line.tokens_per_sec is None else _short(round(line.tokens_per_sec)),
        duration(line.seconds_left) if row.state == "running" and line.seconds_left is not None else "",
        _number(line.shards if shards is None else shards, ","),
        _number(line.bytes_per_token if size is None else size, ".1f"),
        _number(line.kept_mass, ".3f"),
        *updated,
    ]


def _totals(shown: Status) -> list[Text]:
    took = shown.took
    if took is None or took.seconds is None:
        return []
    hours = hours_text(took.device_hours) or "not counted"
    lines = [
        f"{'took' if shown.state == 'done' else 'so far'} {duration(took.seconds)}; device hours: {hours}",
        f"energy: {energy_text(took.energy_joules)}",
    ]
    return [name_text(line, "dim") for line in lines]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _short(count: int) -> str:
    """A count in at most seven characters: 999,999, 1.23M, 45.6B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.4g}{letter}"
    return f"{count:,}"


def _ago(then: datetime, now: datetime) -> str:
    seconds = max((now - then).total_seconds(), 0.0)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def watch(path: Path, console: Console) -> None:
    """Show a status again and again until nothing is running; errors as in `status`."""
    shown = status(path)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(render(shown, console.width), refresh=True)
            if shown.state != "running":
                return
            time.sleep(WATCH_SEC)
            begun = time.monotonic()
            shown = status(path)
            time.sleep(4 * (time.monotonic() - begun))  # the log of a long run takes long to read
