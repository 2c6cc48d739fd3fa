"""Progress of long work: what is being done, how much, how fast, how long still, and what it costs.

On a terminal it is a live display of two lines, elsewhere (a log, CI) a plain line every ten seconds, so that a log stays
readable. The same goes to a JSONL log (`kdata/journal.py`). A thread of its own keeps the rhythm: one unit of work may take
minutes.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from contextlib import nullcontext, suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from kdata.errors import StorageError
from kdata.format.records import Shard
from kdata.observe.energy import Devices, Meter, local_devices
from kdata.observe.journal import Line, State, append, started
from kdata.observe.text import duration

console = Console(stderr=True)
BEAT_SEC = 10.0  # between plain lines, and between lines of the log
TICK_SEC = 1.0  # between lines of the log at first: young work changes fast, and a minute of it should not be lost


@dataclass
class Figures:
    """What was counted so far.

    Units that a former run did (`skipped`) are progress, but no speed. Rates are taken at the last unit that was done,
    `worked` seconds after the start, so that they stand still while a long one is under way, and the time left runs down.
    """

    unit: str
    total: int | None = None
    done: int = 0
    skipped: int = 0
    tokens: int = 0
    worked: float = 0.0
    shards: int = 0
    facts: dict[str, float | int | str] = field(default_factory=dict)
    _bytes: int = 0
    _stored_tokens: int = 0
    _mass: float = 0.0
    _targets: int = 0

    def add(self, count: int, tokens: int, seconds: float) -> None:
        """Count units that were done now, `seconds` after the start."""
        self.done += count
        self.tokens += count if self.unit == "tokens" else tokens
        self.worked = seconds

    def store(self, shard: Shard) -> None:
        """Count a shard; the means weigh by its tokens (bytes) and its target tokens (kept mass)."""
        entry = shard.entry
        self.shards += 1
        if entry.tokens:
            self._bytes += round(shard.bytes_per_token * entry.tokens)
            self._stored_tokens += entry.tokens
        if shard.kept_mass is not None:
            self._mass += shard.kept_mass * entry.target_tokens
            self._targets += entry.target_tokens

    @property
    def bytes_per_token(self) -> float | None:
        """Payload bytes per token of all shards."""
        return self._bytes / self._stored_tokens if self._stored_tokens else None

    @property
    def kept_mass(self) -> float | None:
        """Mean kept probability at the target tokens of all shards."""
        return self._mass / self._targets if self._targets else None

    def per_sec(self, count: int) -> float | None:
        """So many in the time worked, per second."""
        return count / self.worked if count and self.worked > 0 else None

    def seconds_left(self, seconds: float) -> float | None:
        """How long still, `seconds` after the start; None where nothing tells."""
        rate = self.per_sec(self.done - self.skipped)
        if rate is None or self.total is None:
            return None
        return max((self.total - self.done) / rate - (seconds - self.worked), 0.0)

    def count_text(self) -> str:
        """1,200/4,500 documents, as wide as it will be at the end."""
        of = f"{self.total:,}" if self.total else ""
        return f"{self.done:>{len(of)},}{'/' if of else ''}{of} {self.unit}"

    def texts(self) -> list[str]:
        """Rate and what else is known, most important first."""
        rate, what = self.per_sec(self.tokens), "tokens"
        if not self.tokens:
            rate, what = self.per_sec(self.done - self.skipped), self.unit
        parts = [] if rate is None else [f"{rate:,.0f} {what}/s"]
        if self.shards:
            parts.append(f"{self.shards:,} shard{'s' if self.shards > 1 else ''}")
        if self.bytes_per_token is not None:
            parts.append(f"{self.bytes_per_token:,.1f} bytes/token")
        if self.kept_mass is not None:
            parts.append(f"kept mass {self.kept_mass:.3f}")
        return parts + [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.facts.items()]

    def logged(self, seconds: float, state: State) -> dict[str, Any]:
        """The same as fields of a log's line."""
        rate, left = self.per_sec(self.tokens), self.seconds_left(seconds) if state == "running" else None
        return {
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "tokens": self.tokens,
            "tokens_per_sec": None if rate is None else round(rate, 2),
            "busy_seconds": round(self.worked, 3),
            "shards": self.shards or None,
            "bytes_per_token": None if self.bytes_per_token is None else round(self.bytes_per_token, 3),
            "kept_mass": None if self.kept_mass is None else round(self.kept_mass, 6),
            "seconds_left": None if left is None else round(left, 1),
            "facts": self.facts,
        }


class _Tracked:
    """What `Task` and `RunStage` share: a beginning, an end, a rhythm, and a log."""

    def __init__(self, name: str, log: Path | None, devices: Devices | None) -> None:
        self.name, self.log, self.devices = name, log, devices
        self.run_stage: RunStage | None = None
        self._lock = threading.RLock()
        self._stop = threading.Event()

    def _begin(self) -> None:
        self.run_stage = _around.get()
        if self.run_stage is not None:
            self.log, self.devices = self.log or self.run_stage.log, self.devices or self.run_stage.devices
        self._since, self._start = datetime.now(UTC), time.monotonic()
        if self.log is not None:
            self.devices = self.devices or local_devices()
            self._meter, self._process_started = Meter(self.devices), started()
            if self.run_stage is not None and self.run_stage.devices is not None and not self.run_stage.devices.count:
                self.run_stage.devices = self.devices  # known now, and at work for it since it began
        self._note()
        self._thread = threading.Thread(target=self._beats, name="kdata-progress", daemon=True)
        self._thread.start()

    def _end(self, error: BaseException | None) -> None:
        self._stop.set()
        self._thread.join()
        # Where the work has failed (a full disk, perhaps) its own error is the one to show.
        with suppress(StorageError) if error else nullcontext():
            self._write(_state(error), type(error).__name__ if error else None)

    def _beats(self) -> None:
        noted = printed = 0.0
        while not self._stop.wait(TICK_SEC):
            now = self.seconds
            if now - noted >= min(max(now / 60, TICK_SEC), BEAT_SEC):
                noted = now
                self._note()
            if now - printed >= BEAT_SEC:
                printed = now
                self._show()

    def _show(self) -> None:
        """Print a plain line, where one is due."""

    def _note(self) -> None:
        # A log that cannot be written stops no work: the last line says all that this one says, and is the one that must be.
        with suppress(StorageError):
            self._write("running", None)

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._start

    def _logged(self, seconds: float, state: State) -> dict[str, Any]:
        raise NotImplementedError

    def _write(self, state: State, error: str | None) -> None:
        if self.log is None:
            return
        assert self.devices is not None
        with self._lock:
            seconds = self.seconds
            line = Line(
                time=datetime.now(UTC),
                since=self._since,
                stage=self.name,
                within=None if self.run_stage is None else self.run_stage.name,
                state=state,
                error=error,
                seconds=round(seconds, 3),
                devices=self.devices,
                energy_joules=self._meter.joules(),
                host=platform.node(),
                pid=os.getpid(),
                process_started=self._process_started,
                **self._logged(seconds, state),
            )
            append(self.log, line)


class RunStage(_Tracked):
    """A stage of a run, which holds tasks: a context manager, not shown, but logged with all that is done in it.

    Tasks in it (wherever they are begun in this thread) go to its log, and their tokens count as its own.

    Args:
        name: what the log calls it.
        log: a JSONL file, or None for the log of the run stage around.
        devices: what works; None: as the run stage around, or one GPU of this machine, or its cores.
    """

    def __init__(self, name: str, log: Path | None = None, devices: Devices | None = None) -> None:
        super().__init__(name, log, devices)
        self.tokens, self.busy_seconds = 0, 0.0

    def __enter__(self) -> RunStage:
        self._begin()
        self._token: Token[RunStage | None] = _around.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _around.reset(self._token)
        self._end(error)

    def count(self, tokens: int, busy_seconds: float) -> None:
        """Count what a task in it did."""
        with self._lock:
            self.tokens += tokens
            self.busy_seconds += busy_seconds
        if self.run_stage is not None:
            self.run_stage.count(tokens, busy_seconds)

    def _logged(self, seconds: float, state: State) -> dict[str, Any]:
        figures = Figures("tokens", tokens=self.tokens, worked=self.busy_seconds)
        return {**figures.logged(seconds, state), "unit": None}


_around: ContextVar[RunStage | None] = ContextVar("run_stage", default=None)


class Task(_Tracked):
    """One long task as a context manager.

    Args:
        name: what is being done, shown as it is ("capture: reading").
        total: units in all, or None where unknown.
        unit: what is counted ("tokens", "steps", "rows").
        log: a JSONL file (`kdata.observe.journal.Line`), or None for the log of the run stage around, if there is one.
        devices: what works; None: as the run stage around, or one GPU of this machine, or its cores.
    Raises:
        StorageError: at the end, where the log cannot be written.
    """

    def __init__(
        self,
        name: str,
        total: int | None = None,
        unit: str = "tokens",
        log: Path | None = None,
        devices: Devices | None = None,
    ) -> None:
        super().__init__(name, log, devices)
        self.figures = Figures(unit, total)
        self._live: Live | None = None
        self._spinner = Spinner("dots")
        self._outcome = ""
        self._counted = (0, 0.0)  # tokens and seconds that the run stage around has been told of

    def __enter__(self) -> Task:
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(self, console=console, refresh_per_second=5)
        self._begin()
        if self._live is not None:
            self._live.start()
        return self

    def advance(self, count: int, *, tokens: int = 0, shard: Shard | None = None, **facts: float | int | str) -> None:
        """Count `count` more units, with `tokens` in them where the unit is not tokens.

        Args:
            shard: what they became.
            facts: further figures, shown beside.
        """
        with self._lock:
            self.figures.add(count, tokens, self.seconds)
            if shard is not None:
                self.figures.store(shard)
            self.figures.facts.update(facts)
        if self.run_stage is not None and self.figures.tokens:
            now = self.figures.tokens, self.figures.worked
            self.run_stage.count(now[0] - self._counted[0], now[1] - self._counted[1])
            self._counted = now

    def skip(self, count: int, *, shard: Shard | None = None) -> None:
        """Count `count` units that were done by a former run: progress, but no speed."""
        with self._lock:
            self.figures.done += count
            self.figures.skipped += count
            if shard is not None:
                self.figures.store(shard)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outcome = f"{_state(error)} in {duration(self.seconds)}"
        if self._live is not None:
            self._live.stop()
        self._end(error)
        self._show()

    def _show(self) -> None:
        if self._live is None:
            console.print(self._line(), highlight=False, markup=False, soft_wrap=True)

    def _line(self) -> str:
        with self._lock:
            parts = [f"{self.name}: {self.figures.count_text().lstrip()}", self._time_text(), *self.figures.texts()]
        return "  ".join(part for part in parts if part)

    def _time_text(self) -> str:
        left = self.figures.seconds_left(self.seconds)
        return self._outcome or ("" if left is None else f"{duration(left)} left")

    def __rich__(self) -> Group:
        """The live display: how far on the first line, how fast and what else on the second."""
        with self._lock:
            figures, seconds = self.figures, self._time_text()
            first = Table.grid(padding=(0, 1), expand=True)
            for ratio in (None, None, 1, None, None):
                first.add_column(ratio=ratio, no_wrap=True, overflow="ellipsis")
            bar = ProgressBar(
                total=figures.total, completed=figures.done, pulse=not self._outcome and not figures.total
            )
            mark = Text("✓" if self._outcome.startswith("done") else "✗") if self._outcome else self._spinner
            first.add_row(mark, Text(self.name, style="bold"), bar, Text(figures.count_text()), Text(seconds, "cyan"))
            second = Text("  " + "  ".join(figures.texts()), style="dim", no_wrap=True, overflow="ellipsis")
            return Group(first, second) if figures.texts() else Group(first)

    def _logged(self, seconds: float, state: State) -> dict[str, Any]:
        return self.figures.logged(seconds, state)


def _state(error: BaseException | None) -> State:
    return "done" if error is None else "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
