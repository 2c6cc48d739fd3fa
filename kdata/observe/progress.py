"""Progress of long work: what is done, how much of it, how fast, how much time is left, and what it costs.

On a terminal it is a live display of two lines. Elsewhere (a log file, CI) it is a plain line every ten seconds. The same
figures go to a JSONL log (`journal.py`). A thread writes both at a steady rhythm, because one unit of work may take minutes.

Work of a teacher is counted in tokens: `Task.plan` announces a unit, `Task.under_way` moves its tokens while the teacher is
at work, and `Task.advance` counts it once it is committed. So the bar, the rate and the time left move between commits.
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

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from kdata.errors import StorageError
from kdata.format.records import Shard
from kdata.observe.energy import Devices, Meter, local_devices
from kdata.observe.journal import Line, State, append, started
from kdata.observe.terminal import PlainConsole, name_text
from kdata.observe.text import duration, visible_name

console = PlainConsole(stderr=True)
BEAT_SEC = 10.0  # between plain lines, and between lines of the log
TICK_SEC = 1.0  # between lines of the log at first: young work changes fast, and a minute of it should not be lost


@dataclass
class Part:
    """Planned work that is not committed yet: its units, its tokens, and how many of the tokens are done."""

    count: int
    tokens: int
    done: int = 0


@dataclass
class Figures:
    """The counts of one task, and what follows from them.

    Units of a former run (`skipped`) count as progress, but not in the rate. `worked` is the time of the last change, in
    seconds after the start: a rate stands still until the next change, and meanwhile the time left runs down.

    Args:
        unit: what `done` and `total` count.
        at_most: tokens of planned work are an upper bound (text that is still to be written), not a count.
    """

    unit: str
    total: int | None = None
    at_most: bool = False
    done: int = 0
    skipped: int = 0
    tokens: int = 0
    skipped_tokens: int = 0
    worked: float = 0.0
    shards: int = 0
    facts: dict[str, float | int | str] = field(default_factory=dict)
    parts: dict[int, Part] = field(default_factory=dict)
    has_plan: bool = False
    _bytes: int = 0
    _stored_tokens: int = 0
    _mass: float = 0.0
    _targets: int = 0

    def plan(self, number: int, count: int, tokens: int) -> None:
        """Announce part `number` of the work: its units and their tokens."""
        self.has_plan = True
        self.parts[number] = Part(count, tokens)

    def under_way(self, number: int, tokens: int, seconds: float) -> None:
        """Set how many tokens of a planned part are done, `seconds` after the start; a committed part stays as it is."""
        part = self.parts.get(number)
        if part is not None:
            part.done = min(tokens, part.tokens)
            self.worked = seconds

    def add(self, count: int, tokens: int, seconds: float, part: int | None = None) -> None:
        """Count units that are done, `seconds` after the start; `part` is the number of the planned part that they were."""
        if part is not None:
            self.parts.pop(part, None)
        self.done += count
        self.tokens += count if self.unit == "tokens" else tokens
        self.worked = seconds

    def skip(self, count: int, tokens: int) -> None:
        """Count units of a former run."""
        self.done += count
        self.skipped += count
        self.skipped_tokens += count if self.unit == "tokens" else tokens

    def store(self, shard: Shard) -> None:
        """Count a shard. Bytes per token are a mean over its tokens, kept mass is one over its targets that have entries."""
        entry = shard.entry
        self.shards += 1
        if entry.tokens:
            self._bytes += round(shard.bytes_per_token * entry.tokens)
            self._stored_tokens += entry.tokens
        if shard.kept_mass is not None:
            self._mass += shard.kept_mass * entry.num_kept_positions
            self._targets += entry.num_kept_positions

    @property
    def bytes_per_token(self) -> float | None:
        """Payload bytes per token of all shards."""
        return self._bytes / self._stored_tokens if self._stored_tokens else None

    @property
    def kept_mass(self) -> float | None:
        """Mean kept probability at the target tokens of all shards, of those that have entries."""
        return self._mass / self._targets if self._targets else None

    @property
    def tokens_now(self) -> int:
        """Tokens of this run: those committed and those under way."""
        return self.tokens + sum(part.done for part in self.parts.values())

    @property
    def tokens_total(self) -> int | None:
        """Tokens of the whole task: exact once all of it is planned, before that units times mean tokens. None: not known."""
        if self.unit == "tokens":
            return self.total
        if not self.has_plan or self.total is None:
            return None
        count, tokens = self.done, self.skipped_tokens + self.tokens
        if not (self.at_most and tokens):  # the mean of what was written is a better guess than the bound
            count += sum(part.count for part in self.parts.values())
            tokens += sum(part.tokens for part in self.parts.values())
        if not tokens:
            return None
        return max(round(tokens * max(self.total, count) / count), self.skipped_tokens + self.tokens_now)

    @property
    def is_estimate(self) -> bool:
        """Whether `tokens_total` is an estimate."""
        if self.unit == "tokens" or self.tokens_total is None or self.total is None:
            return False
        planned = sum(part.count for part in self.parts.values())
        return self.done < self.total if self.at_most else self.done + planned < self.total

    @property
    def by_tokens(self) -> bool:
        """Whether tokens drive the bar: where they are the unit, or work is planned by them."""
        return self.unit == "tokens" or (self.has_plan and (self.total is None or self.tokens_total is not None))

    @property
    def progress(self) -> tuple[int, int | None]:
        """What drives the bar, done and in all; former runs count."""
        return (self.skipped_tokens + self.tokens_now, self.tokens_total) if self.by_tokens else (self.done, self.total)

    def per_sec(self, count: int) -> float | None:
        """`count` per second of the time worked; None before anything is done."""
        return count / self.worked if count and self.worked > 0 else None

    def seconds_left(self, seconds: float) -> float | None:
        """Estimated time left, `seconds` after the start; None where nothing was done yet or the total is not known."""
        done, total = self.progress
        rate = self.per_sec(self.tokens_now if self.by_tokens else self.done - self.skipped)
        if rate is None or total is None:
            return None
        return max((total - done) / rate - (seconds - self.worked), 0.0)

    def count_text(self) -> str:
        """1,200/~4,500 tokens, or 12/36 documents: as wide as it will be at the end."""
        done, total = self.progress
        of = f"{'~' if self.is_estimate else ''}{total:,}" if total else ""
        return f"{done:>{len(of)},}{'/' if of else ''}{of} {'tokens' if self.by_tokens else self.unit}"

    def texts(self) -> list[str]:
        """Rate and further figures, the most important first."""
        rate, what = self.per_sec(self.tokens_now), "tokens"
        if not self.tokens_now:
            rate, what = self.per_sec(self.done - self.skipped), self.unit
        parts = [] if rate is None else [f"{rate:,.0f} {what}/s"]
        if self.by_tokens and self.unit != "tokens":
            parts.append(f"{self.done:,}{f'/{self.total:,}' if self.total else ''} {self.unit}")
        if self.shards:
            parts.append(f"{self.shards:,} shard{'s' if self.shards > 1 else ''}")
        if self.bytes_per_token is not None:
            parts.append(f"{self.bytes_per_token:,.1f} bytes/token")
        if self.kept_mass:  # 0 where all entries are draws
            parts.append(f"kept mass {self.kept_mass:.3f}")
        return parts + [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.facts.items()]

    def logged(self, seconds: float, state: State) -> dict[str, Any]:
        """The same as fields of a log line."""
        rate, left = self.per_sec(self.tokens_now), self.seconds_left(seconds) if state == "running" else None
        return {
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "tokens": self.tokens_now,
            "tokens_done": self.skipped_tokens + self.tokens_now,
            "tokens_total": self.tokens_total,
            "tokens_estimated": self.is_estimate,
            "tokens_per_sec": None if rate is None else round(rate, 2),
            "busy_seconds": round(self.worked, 3),
            "shards": self.shards or None,
            "bytes_per_token": None if self.bytes_per_token is None else round(self.bytes_per_token, 3),
            "kept_mass": None if self.kept_mass is None else round(self.kept_mass, 6),
            "seconds_left": None if left is None else round(left, 1),
            "facts": self.facts,
        }


class _Tracked:
    """What `Task` and `RunStage` share: start, end, the thread that shows progress, and the log."""

    def __init__(self, name: str, log: Path | None, devices: Devices | None, source: str | None = None) -> None:
        self.name, self.log, self.devices, self.source = name, log, devices, source
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
                self.run_stage.devices = self.devices  # known only now
        self._note()
        self._thread = threading.Thread(target=self._beats, name="kdata-progress", daemon=True)
        self._thread.start()

    def _end(self, error: BaseException | None) -> None:
        self._stop.set()
        self._thread.join()
        # Where the work failed (perhaps because the disk is full), its own error is the one to show.
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
        """Print a plain line; not on a terminal."""

    def _note(self) -> None:
        # A log line that cannot be written does not stop the work. Only the last line must be written: it says everything.
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
                source=self.source,
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
    """A stage of a run as a context manager. It is logged but not shown; the tasks in it are shown.

    Tasks that start inside it, in this thread, write to its log, and their tokens count as its own.

    Args:
        name: what the log calls it.
        log: a JSONL file; None takes the log of the enclosing run stage.
        devices: what does the work; None: as the enclosing run stage, or one GPU of this machine, or its cores.
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
        """Count tokens of a task in it."""
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
        total: units in all, or None where that is not known.
        unit: what is counted ("tokens", "steps", "rows").
        log: a JSONL file (`kdata.observe.journal.Line`); None takes the log of the enclosing run stage, if there is one.
        devices: what does the work; None: as the enclosing run stage, or one GPU of this machine, or its cores.
        source: the source of a dataset that the work is for.
        at_most: the tokens in `plan` are an upper bound, as of text that is still to be written.
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
        *,
        source: str | None = None,
        at_most: bool = False,
    ) -> None:
        super().__init__(name, log, devices, source)
        self.figures = Figures(unit, total, at_most)
        self._live: Live | None = None
        self._spinner = Spinner("dots")
        self._outcome = ""
        self._counted = (0, 0.0)  # tokens and seconds that the enclosing run stage knows of

    def __enter__(self) -> Task:
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(self, console=console, refresh_per_second=5)
        self._begin()
        if self._live is not None:
            self._live.start()
        return self

    def plan(self, part: int, count: int, tokens: int) -> None:
        """Announce part number `part` of the work, before it begins: its units and the tokens in them."""
        with self._lock:
            self.figures.plan(part, count, tokens)

    def under_way(self, part: int, tokens: int) -> None:
        """Say how many tokens of a planned part are done, in all. From any thread."""
        with self._lock:
            self.figures.under_way(part, tokens, self.seconds)
            self._count_in_run_stage()

    def advance(
        self,
        count: int,
        *,
        tokens: int = 0,
        part: int | None = None,
        shard: Shard | None = None,
        **facts: float | int | str,
    ) -> None:
        """Count `count` more units that are done, with `tokens` in them where the unit is not tokens. From any thread.

        Args:
            part: number of the planned part that they were.
            shard: what they became.
            facts: further figures, shown beside.
        """
        with self._lock:
            self.figures.add(count, tokens, self.seconds, part)
            if shard is not None:
                self.figures.store(shard)
            self.figures.facts.update(facts)
            self._count_in_run_stage()

    def skip(self, count: int, *, tokens: int = 0, shard: Shard | None = None) -> None:
        """Count `count` units, with `tokens` in them, that a former run did: progress, but no speed."""
        with self._lock:
            self.figures.skip(count, tokens)
            if shard is not None:
                self.figures.store(shard)

    def _count_in_run_stage(self) -> None:
        now = self.figures.tokens_now, self.figures.worked
        if self.run_stage is not None and (now[0] or self._counted[0]):
            self.run_stage.count(now[0] - self._counted[0], now[1] - self._counted[1])
            self._counted = now

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
            console.print(visible_name(self._line()), soft_wrap=True)

    def _line(self) -> str:
        with self._lock:
            parts = [f"{self.name}: {self.figures.count_text().lstrip()}", self._time_text(), *self.figures.texts()]
        return "  ".join(part for part in parts if part)

    def _time_text(self) -> str:
        left = self.figures.seconds_left(self.seconds)
        return self._outcome or ("" if left is None else f"{duration(left)} left")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The live display: how far on the first line, how fast and what else on the second, as much of it as fits."""
        with self._lock:
            figures, seconds = self.figures, self._time_text()
            done, total = figures.progress
            first = Table.grid(padding=(0, 1), expand=True)
            for ratio in (None, None, 1, None, None):
                first.add_column(ratio=ratio, no_wrap=True, overflow="ellipsis")
            bar = ProgressBar(total=total, completed=done, pulse=not self._outcome and not total)
            mark = Text("✓" if self._outcome.startswith("done") else "✗") if self._outcome else self._spinner
            first.add_row(
                mark, name_text(self.name, "bold"), bar, name_text(figures.count_text()), Text(seconds, "cyan")
            )
            second = ""
            for text in figures.texts():
                if second and len(second) + 2 + len(text) > options.max_width:
                    break
                second += f"  {text}"
        yield first
        if second:
            yield name_text(second, "dim", no_wrap=True, overflow="ellipsis")

    def _logged(self, seconds: float, state: State) -> dict[str, Any]:
        return self.figures.logged(seconds, state)


def _state(error: BaseException | None) -> State:
    return "done" if error is None else "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
