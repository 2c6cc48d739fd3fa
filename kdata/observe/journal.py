"""The progress log: one JSON object per line, each complete in itself, and the sums over a log.

`kdata run` writes RUN/progress.jsonl. Work on a single dataset writes `.NAME.progress.jsonl` beside the dataset, because
nothing in a dataset may depend on the clock. A line is written when work begins, every ten seconds (more often at first), and
when it ends. A process that is killed loses its last seconds only. `took` sums these lines over all attempts and needs no
other state. A line that was cut off by a crash is ignored.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import psutil
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from kdata.format.files import journal_of, not_through_a_link, storage_errors
from kdata.format.plain import plain_lines
from kdata.observe.energy import Devices

# The start of a process is computed from the system clock, so it moves when the clock is set. A process that gets the id of a
# dead process within a minute of that process's start does not occur in practice.
MAX_LINE_BYTES = 1 << 20
START_SLACK_SEC = 60.0
Count = Annotated[int, Field(ge=-(2**53), le=2**53)]  # what arithmetic of a display bears
State = Literal["running", "done", "failed", "stopped"]


class Line(BaseModel):
    """One line of a progress log."""

    # JSON has no infinity and no NaN (a loss may be either): they are written as strings.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")
    time: AwareDatetime = Field(description="When the line was written, ISO 8601, UTC.")
    since: AwareDatetime = Field(description="When this work began.")
    stage: str = Field(description="What is being done.")
    source: str | None = Field(
        None, description="Source of a dataset that the work is for; null for other work. Absent in older logs."
    )
    within: str | None = Field(description="Work that this is a part of; null where it is a part of nothing.")
    state: State = Field(description="running, done, failed (by an error), or stopped (by Ctrl-C).")
    error: str | None = Field(description="Kind of the error, where it failed.")
    done: Count = Field(description="Units done (committed, where shards are written), those of former attempts too.")
    total: Count | None = Field(description="Units in all, where known.")
    unit: str | None = Field(description="What is counted; null for work that only holds other work.")
    tokens: Count = Field(
        description="Tokens read, written or trained on in this attempt, those of units that are under way too."
    )
    tokens_done: Count = Field(0, description="The same with the tokens of former attempts. Absent in older logs.")
    tokens_total: Count | None = Field(
        None, description="Tokens in all; null where neither known nor estimated. Absent in older logs."
    )
    tokens_estimated: bool = Field(
        False, description="Whether tokens_total is an estimate, from the units cut so far. Absent in older logs."
    )
    tokens_per_sec: float | None = Field(description="Rate of `tokens` over `busy_seconds`; null without tokens.")
    busy_seconds: float = Field(description="Seconds from the start of this work to its last change, loading excluded.")
    shards: Count | None = Field(description="Shards committed, by former attempts too.")
    bytes_per_token: float | None = Field(description="Payload bytes per token of these shards.")
    kept_mass: float | None = Field(description="Mean kept probability at their targets, by target token.")
    seconds: float = Field(description="Wall seconds since this work began.")
    seconds_left: float | None = Field(description="Estimate from what this attempt did; null where there is none.")
    devices: Devices = Field(description="What it ran on: kind, count, name, here.")
    energy_joules: float | None = Field(description="Energy of those devices so far; null where they do not tell.")
    facts: dict[str, float | Count | str] = Field(description="Further figures, such as a loss.")
    host: str = Field(description="Machine of the process.")
    pid: Count = Field(description="Number of the process.")
    process_started: float = Field(description="When the process began, seconds since 1970.")


class Took(BaseModel):
    """What work took, summed over all attempts."""

    name: str
    tokens: int = 0
    tokens_per_sec: float | None = None
    seconds: float | None = None
    device_hours: dict[str, float] = {}
    energy_joules: float | None = None


def find_journal(root: Path) -> Path:
    """The log of the work on a dataset: its own, or that of the run that the dataset belongs to."""
    own, run = journal_of(root), root.resolve().parent
    return run / "progress.jsonl" if not own.exists() and (run / "run.json").exists() else own


def append(path: Path, line: Line) -> None:
    """Add one line, in one write. Raises StorageError."""
    with storage_errors(path):
        torn = path.exists() and not _ends_with_newline(path)
        with open(path, "ab", opener=not_through_a_link) as file:  # in one write: a line is far smaller than the buffer
            file.write((b"\n" if torn else b"") + line.model_dump_json().encode() + b"\n")


def _ends_with_newline(path: Path) -> bool:
    """True for an empty file too."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_journal(path: Path) -> list[Line]:
    """All lines of a log, in order; none where there is no log. Lines of another form are ignored.

    Raises CorruptError for what is no log at all: a device, or a line without an end.
    """
    lines = []
    for text in plain_lines(path, MAX_LINE_BYTES) if path.exists() else ():
        try:
            lines.append(Line.model_validate_json(text))
        except (ValidationError, RecursionError):  # cut off, or of another version
            continue
    return lines


def started() -> float:
    """When this process began, seconds since 1970."""
    return psutil.Process().create_time()


def alive(line: Line) -> bool | None:
    """Whether the process that wrote a line is still alive; None where it runs on another machine."""
    if line.host != platform.node():
        return None
    try:
        process = psutil.Process(line.pid)
        same = abs(process.create_time() - line.process_started) < START_SLACK_SEC
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def last_lines(lines: Iterable[Line]) -> list[Line]:
    """The last line of every piece of work, in the order in which they began."""
    last: dict[tuple[object, ...], Line] = {}
    for line in lines:
        last[line.host, line.pid, line.since, line.stage, line.within, line.unit] = line
    return list(last.values())


def lines_of(lines: Iterable[Line], source: str) -> list[Line]:
    """The lines about the work for one source of a dataset."""
    return [line for line in lines if line.unit is not None and _is_about(line, source)]


def _is_about(line: Line, source: str) -> bool:
    if "source" in line.model_fields_set:
        return line.source == source
    return line.stage.startswith(f"{source}: ")  # an older log names the source in the title only


def took(lines: Iterable[Line]) -> list[Took]:
    """What each stage took, summed over all attempts, in the order of their first start.

    Energy is None where that of any attempt is not known. Device hours leave out devices whose number is not known.
    """
    by_stage: dict[str, list[Line]] = {}
    for line in last_lines(lines):
        by_stage.setdefault(line.stage, []).append(line)
    return [_sum(name, spans) for name, spans in by_stage.items()]


def _sum(name: str, spans: list[Line]) -> Took:
    tokens, busy = sum(s.tokens for s in spans), sum(s.busy_seconds for s in spans if s.tokens)
    hours: dict[str, float] = {}
    for span in spans:
        if span.devices.count:
            key = str(span.devices)
            hours[key] = hours.get(key, 0.0) + span.devices.count * span.seconds / 3600
    known = [s.energy_joules for s in spans if s.energy_joules is not None]
    return Took(
        name=name,
        tokens=tokens,
        tokens_per_sec=tokens / busy if tokens and busy else None,
        seconds=sum(s.seconds for s in spans),
        device_hours=hours,
        energy_joules=sum(known) if len(known) == len(spans) else None,
    )


def total(parts: list[Took], name: str = "all") -> Took:
    """Sum of what several stages took, without a rate: rates do not add up."""
    hours: dict[str, float] = {}
    for part in parts:
        for key, value in part.device_hours.items():
            hours[key] = hours.get(key, 0.0) + value
    known = [p.energy_joules for p in parts if p.energy_joules is not None]
    return Took(
        name=name,
        tokens=sum(p.tokens for p in parts),
        seconds=sum(p.seconds or 0.0 for p in parts),
        device_hours=hours,
        energy_joules=sum(known) if parts and len(known) == len(parts) else None,
    )
