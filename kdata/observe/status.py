"""Where work stands, seen from another terminal: a run, or a dataset that is being written.

Everything is read from files: the run's state, the log of progress, a dataset's manifest. Nothing is written and no lock is
taken, so the work is not disturbed. Work counts as running only while the process that wrote its last line is there.
"""

from __future__ import annotations

import json
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
from kdata.format.manifest import read_info, read_manifest
from kdata.observe.journal import Line, Took, alive, find_journal, last_lines, lines_of, read_journal, took, total
from kdata.observe.text import duration, energy_text, hours_text

WATCH_SEC = 2.0
WIDE = 110  # columns from which units are named
State = Literal["waiting", "running", "done", "failed", "stopped", "unknown"]
STYLES = {"running": "bold cyan", "done": "green", "failed": "bold red", "stopped": "bold yellow", "waiting": "dim"}


@dataclass(frozen=True)
class Row:
    """One stage: how it stands, and its last line in the log, where it has one."""

    name: str
    state: State
    line: Line | None = None
    part: bool = False
    shards: int | None = None
    bytes_per_token: float | None = None
    updated: datetime | None = None


@dataclass(frozen=True)
class Status:
    """How a run or a dataset stands."""

    title: str
    state: State
    rows: list[Row] = field(default_factory=list)
    took: Took | None = None
    host: str | None = None
    """Another machine that the work was on, where `state` is unknown."""
    pid: int | None = None
    """The process at work."""


def status(path: Path) -> Status:
    """How the run or dataset in a folder stands.

    Raises:
        MissingError: the folder holds neither.
        CorruptError: its run.json, dataset.json or manifest is damaged.
    """
    if (path / "run.json").exists():
        return _run(path)
    if (path / "dataset.json").exists():
        return _dataset(path)
    raise MissingError(
        f"{path} is neither a run (it has no run.json) nor a dataset (no dataset.json); a dataset is there once its teacher "
        "is loaded"
    )


def _run(path: Path) -> Status:
    try:
        state = json.loads((path / "run.json").read_text("utf-8"))
        name, finished = str(state["settings"]["name"]), state["seconds"]
        names = list(state.get("stages", finished))
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path / 'run.json'} is damaged ({error}); `kdata run` into another folder") from error
    lines = last_lines(read_journal(path / "progress.jsonl"))
    rows = [row for stage in names for row in _stage(stage, stage in finished, lines)]
    return _status(name, rows, lines, all(stage in finished for stage in names))


def _stage(name: str, finished: bool, lines: Sequence[Line]) -> list[Row]:
    """The rows of one stage of a recipe: itself, and what is in it where that is more than one thing."""
    own = [line for line in lines if line.stage == name and line.within is None]
    inner = _within(name, lines)
    state, last = _state(own, finished, "waiting"), _latest(own)
    alone = inner[0] if len(inner) == 1 else last
    parts = inner if len(inner) > 1 else []
    # What is in a stage that is done has been done, whatever a former attempt left behind.
    return [Row(name, state, alone, updated=last.time if last else None)] + [
        Row(part.stage, _state([part], state == "done", "unknown"), part, part=True, updated=part.time)
        for part in parts
    ]


def _within(name: str, lines: Sequence[Line]) -> list[Line]:
    """The latest line of every piece of work in a stage of a recipe, however deep."""
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
    """The whole, by all its lines; those that are not within others are added up."""
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
    """How work stands, by the last lines of all attempts at it.

    Args:
        finished: whether its result is there.
        absent: what it is where the log has no line of it.
    """
    if any(line.state == "running" and alive(line) for line in lines):
        return "running"
    last = _latest(lines)
    if finished or last is None:
        return "done" if finished else absent
    if last.state == "running":
        return "stopped" if alive(last) is False else "unknown"
    return last.state


def render(found: Status, width: int = 120, now: datetime | None = None) -> Group:
    """A status as text for a terminal of so many columns."""
    now = now or datetime.now(UTC)
    wide = width >= WIDE
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("stage")  # the one that gives way where the terminal is narrow
    table.add_column("state", no_wrap=True)
    for name in ("done", "tokens/s", "left", "shards", "B/token", "kept", *(["updated"] if wide else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        label = Text(f"{'  ' if row.part else ''}{row.name}", no_wrap=True, overflow="ellipsis")
        table.add_row(label, Text(row.state, STYLES.get(row.state, "magenta")), *_cells(row, wide, now))
    return Group(_headline(found, now), table, *_totals(found))


def _headline(found: Status, now: datetime) -> Text:
    text = Text.assemble((found.title, "bold"), ": ", (found.state, STYLES.get(found.state, "magenta")))
    if found.pid is not None:
        text.append(f" (process {found.pid})")
    if found.state == "unknown":
        where = (
            f"look on {found.host}, where it was at work" if found.host else "no log tells who writes it, or whether"
        )
        text.append(f" ({where})")
    elif found.state in ("stopped", "failed"):
        text.append(" (the same command goes on where it was)")
    newest = max((row.updated for row in found.rows if row.updated is not None), default=None)
    return text if newest is None else text.append(f", last line {_ago(newest, now)}")


def _cells(row: Row, wide: bool, now: datetime) -> list[str]:
    line = row.line
    shards, size = row.shards, row.bytes_per_token
    updated = [] if not wide else ["" if row.updated is None else _ago(row.updated, now)]
    if line is None or line.unit is None:
        return ["", "", "", _number(shards, ","), _number(size, ".1f"), "", *updated]
    done = _short(line.done) + (f"/{_short(line.total)}" if line.total and line.total != line.done else "")
    return [
        f"{done} {line.unit}" if wide else done,
        "" if line.tokens_per_sec is None else _short(round(line.tokens_per_sec)),
        duration(line.seconds_left) if row.state == "running" and line.seconds_left is not None else "",
        _number(line.shards if shards is None else shards, ","),
        _number(line.bytes_per_token if size is None else size, ".1f"),
        _number(line.kept_mass, ".3f"),
        *updated,
    ]


def _totals(found: Status) -> list[Text]:
    took = found.took
    if took is None or took.seconds is None:
        return []
    hours = hours_text(took.device_hours) or "not counted"
    lines = [
        f"{'took' if found.state == 'done' else 'so far'} {duration(took.seconds)}; device hours: {hours}",
        f"energy: {energy_text(took.energy_joules)}",
    ]
    return [Text(line, "dim") for line in lines]


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
    """Show a status until nothing is running; errors as in `status`."""
    found = status(path)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(render(found, console.width), refresh=True)
            if found.state != "running":
                return
            time.sleep(WATCH_SEC)
            begun = time.monotonic()
            found = status(path)
            time.sleep(4 * (time.monotonic() - begun))  # the log of a long run takes a while to read
