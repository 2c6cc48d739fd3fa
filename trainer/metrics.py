"""The metrics of a training run: metrics.jsonl always, other loggers beside it if the settings name them.

    tensorboard   event files in OUT/tensorboard
    wandb         OUT/wandb; offline unless WANDB_MODE says otherwise; wandb handles its own credentials
    trackio       trackio's local database (TRACKIO_DIR); nothing is sent and no Space is created

wandb and trackio cannot take back a step, and a training that was killed repeats some steps. So each attempt is a run of its
own there, and the attempts of one OUT form a group.

A logger is imported only if it is named, and one that is not installed is an error before the first step. Only the main rank
writes.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from kdata.errors import DependencyError
from kdata.format.files import write_atomically
from kdata.format.json_text import parse_object
from kdata.format.plain import plain_lines

LoggerName = Literal["tensorboard", "wandb", "trackio"]
MAX_LINE_BYTES = 1 << 20
PROJECT = "kdata"


class Logger(Protocol):
    """A logger of another package."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Record the numbers of a step; nested names are joined with slashes."""

    def close(self) -> None:
        """Write pending numbers and close."""


class Metrics:
    """The metrics of one run, as a context manager.

    Args:
        out_dir: the run's folder.
        loggers: loggers beside metrics.jsonl.
        label: the run's name.
        settings: the run's settings, shown by wandb and trackio.
        step: steps that are done; lines of later steps are removed, because those steps will be repeated.
        write: False on ranks that must not write.
    Raises:
        DependencyError: a logger is not installed.
    """

    def __init__(
        self,
        out_dir: Path,
        loggers: list[LoggerName],
        *,
        label: str,
        settings: dict[str, Any],
        step: int = 0,
        write: bool = True,
    ) -> None:
        self.path, self._write = out_dir / "metrics.jsonl", write
        self._loggers: list[Logger] = []
        if write:
            forget_after(self.path, step)
            self._loggers = [LOGGERS[name](out_dir, label, settings, step) for name in loggers]

    def write(self, line: dict[str, Any]) -> None:
        """Write one line: `step`, numbers, strings, and mappings of these."""
        if not self._write:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        numbers = dict(_flat(line))
        step = int(numbers.pop("step"))
        for logger in self._loggers:
            logger.log(numbers, step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for logger in self._loggers:
            logger.close()


def check_installed(loggers: list[LoggerName]) -> None:
    """Raise DependencyError, which names the extra, if a logger cannot be imported."""
    for name in loggers:
        _import(name, name)


def forget_after(metrics: Path, step: int) -> None:
    """Remove the lines of steps that a resumed run will repeat, and a last line that a kill cut off."""

    def valid_lines() -> Iterator[str]:
        for whole in plain_lines(metrics, MAX_LINE_BYTES):
            line = whole.rstrip(b"\r\n")
            try:
                if parse_object(line.decode(), finite=False)["step"] <= step:
                    yield line.decode() + "\n"
            except (ValueError, KeyError, TypeError):  # also bytes that are no UTF-8
                return

    if metrics.exists():
        write_atomically(metrics, "".join(valid_lines()).encode())


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"loggers names {extra}, which cannot be imported ({error}); pip install 'kdata[{extra}]', or leave it out"
        ) from error


class TensorBoard:
    """TensorBoard event files; events of steps that will be repeated are marked as purged."""

    def __init__(self, out_dir: Path, label: str, settings: dict[str, Any], step: int) -> None:
        _import("tensorboard", "tensorboard")
        writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(out_dir / "tensorboard"), purge_step=step + 1)

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Write each number as a scalar."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class Wandb:
    """One Weights & Biases run for each attempt."""

    def __init__(self, out_dir: Path, label: str, settings: dict[str, Any], step: int) -> None:
        wandb = _import("wandb", "wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=label,
            id=_attempt(out_dir, step),
            group=_group(out_dir),
            dir=str(out_dir),
            config=settings,
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Send all numbers in one call."""
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class Trackio:
    """One run in trackio's local database for each attempt."""

    def __init__(self, out_dir: Path, label: str, settings: dict[str, Any], step: int) -> None:
        trackio = _import("trackio", "trackio")
        self._run = trackio.init(
            project=PROJECT, name=_attempt(out_dir, step), group=_group(out_dir), config=settings, embed=False
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Send all numbers in one call."""
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


LOGGERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def _group(out_dir: Path) -> str:
    """A name that is the same for the same folder and different for any other."""
    place = out_dir.resolve()
    digest = hashlib.sha256(str(place).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', '-'.join(place.parts[-2:]))}-{digest}"


def _attempt(out_dir: Path, step: int) -> str:
    """A unique name for this attempt; it says after which step the attempt began."""
    return f"{_group(out_dir)}-from-{step}-{secrets.token_hex(3)}"
