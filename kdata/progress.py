"""Progress of a long stage: what is being done, how much, how fast, how long still.

On a terminal it is one live `rich` line; elsewhere (a log, CI) a plain line every ten seconds, so that a log stays
readable. A JSONL log of the same can be kept beside it.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from kdata.errors import StorageError

console = Console(stderr=True)
PLAIN_EVERY_SEC = 10.0


class _RateColumn(ProgressColumn):
    """Units per second over the recent past."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if task.fields["tokens_sec"]:
            return Text(f"{task.fields['tokens_sec']:,.0f} tokens/s", style="cyan")
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s", style="cyan")


class Stage:
    """One long stage as a context manager.

    Args:
        name: what is being done, shown as it is ("capture").
        total: units in all, or None where unknown.
        unit: what is counted ("tokens", "steps", "rows").
        log: a JSONL file that receives {stage, done, total, unit, seconds, ...facts} at the same rhythm, or None.
    """

    def __init__(self, name: str, total: int | None = None, unit: str = "tokens", log: Path | None = None) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self.tokens = self._skipped = 0
        self._facts: dict[str, object] = {}
        self._log = log
        self._live: Progress | None = None
        self._last_plain = 0.0

    def __enter__(self) -> Stage:
        self._start = self._last_plain = time.monotonic()
        if console.is_terminal:
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _RateColumn(),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[facts]}"),
                console=console,
            )
            self._task = self._live.add_task(self.name, total=self.total, unit=self.unit, facts="", tokens_sec=0)
            self._live.start()
        return self

    def advance(self, count: int, *, tokens: int = 0, **facts: object) -> None:
        """Count `count` more units, with `tokens` in them where the unit is not tokens; `facts` are shown beside."""
        self.done += count
        self.tokens += tokens
        self._facts.update(facts)
        if self._live is not None:
            self._live.update(
                self._task,
                advance=count,
                facts=self._facts_text(),
                tokens_sec=self.tokens / max(self.seconds, 1e-9),
            )
        elif time.monotonic() - self._last_plain >= PLAIN_EVERY_SEC:
            self._last_plain = time.monotonic()
            console.print(self._line(), highlight=False, soft_wrap=True)
            self._write_log()

    def skip(self, count: int) -> None:
        """Count `count` units that were done by a former run: progress, but no speed."""
        self.done += count
        self._skipped += count
        if self._live is not None:
            self._live.update(self._task, advance=count)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        else:
            console.print(self._line(end="failed" if kind else "done"), highlight=False, soft_wrap=True)
        # Where the stage has failed (a full disk, perhaps) its own error is the one to show.
        with suppress(StorageError) if kind else nullcontext():
            self._write_log()

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self._start

    def _facts_text(self) -> str:
        return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self._facts.items())

    def _line(self, end: str = "") -> str:
        seconds = max(self.seconds, 1e-9)
        rate = max(self.done - self._skipped, 0) / seconds
        shown = f"{self.tokens / seconds:,.0f} tokens/s" if self.tokens else f"{rate:,.0f} {self.unit}/s"
        of = f"/{self.total:,}" if self.total else ""
        left = ""
        if not end and self.total and rate:
            left = f"  {(self.total - self.done) / rate:,.0f} s left"
        elif end:
            left = f"  {end} in {self.seconds:,.1f} s"
        return f"{self.name}: {self.done:,}{of} {self.unit}  {shown}{left}  {self._facts_text()}".rstrip()

    def _write_log(self) -> None:
        if self._log is None:
            return
        record = {
            "stage": self.name,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "tokens": self.tokens or (self.done if self.unit == "tokens" else 0),
            "seconds": round(self.seconds, 3),
            **self._facts,
        }
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot write the log {self._log}: {error.strerror}; what was committed is intact"
            ) from error
