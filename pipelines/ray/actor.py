"""The worker side of the Ray engine: an actor that holds one teacher, performs units and writes their shards.

Nothing here imports Ray; the driver (`engine.py`) turns the class into an actor. The teacher stays on the thread that loaded
it. Calls run side by side, so that one unit is written (and uploaded) while the teacher works on the next.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import kdata
from kdata.errors import KdataError
from kdata.format.records import Shard, UnitResult
from kdata.format.schema import DatasetInfo, TeacherInfo
from kdata.jobs.job import Job, UnitCounter, WorkUnit, devices_of
from kdata.observe.energy import Devices
from kdata.store.staging import Staging
from kdata.teachers.base import Teacher
from kdata.teachers.config import TeacherConfig
from kdata.teachers.environment import set_environment
from kdata.teachers.load import load_teacher
from kdata.teachers.model import load_tokenizer, tokenizer_info
from kdata.teachers.sizing import ANY_WORK, Work

Loader = Callable[[TeacherConfig, int], tuple[Teacher, Any]]


def load_both(config: TeacherConfig, max_k: int, work: Work = ANY_WORK) -> tuple[Teacher, Any]:
    """A teacher, loaded for this work, and its tokenizer. Errors as in `load_teacher` and `load_tokenizer`."""
    set_environment()  # nothing has imported torch in this process yet
    teacher = load_teacher(config, max_k=max_k, work=work)
    return teacher, load_tokenizer(config.model, teacher.info.revision, bos=config.bos)


@dataclass(frozen=True)
class ActorFacts:
    """What the driver knows of the teacher in an actor; see `kdata.jobs.job.TeacherFacts`.

    The tokenizer is part of it: sent by the actor it needs no torch in the driver, while loading it by name does.
    """

    info: TeacherInfo
    vocab_size: int
    context: int
    tokenizer: Any
    machine: str
    version: str
    devices: Devices
    """What one actor works on."""

    def identity(self) -> dict[str, Any]:
        """What must be the same in every actor."""
        return {
            "teacher": self.info.model_dump(),
            "vocab_size": self.vocab_size,
            "context": self.context,
            "tokenizer": tokenizer_info(self.tokenizer).model_dump(),
            "kdata": self.version,
        }


@dataclass(frozen=True)
class Assignment:
    """What is the same for all units of a run."""

    job: Job[Any]
    info: DatasetInfo
    staging: Staging


class TeacherActor:
    """One teacher.

    Args:
        loader: called with the other two, on the teacher's thread.
        config: which teacher.
        max_k: largest k that will be asked for.
    """

    def __init__(self, loader: Loader, config: TeacherConfig, max_k: int) -> None:
        self._config = config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kdata-teacher")
        self._loaded = self._thread.submit(loader, config, max_k)
        self._lock = threading.Lock()
        self._begun: set[str] = set()
        self._dropped: set[str] = set()
        self._counters: dict[str, UnitCounter] = {}

    def facts(self) -> ActorFacts:
        """What the teacher is, once it is loaded. Raises what loading raised."""
        with _named_machine():
            teacher, tokenizer = self._loaded.result()
        return ActorFacts(
            info=teacher.info,
            vocab_size=teacher.vocab_size,
            context=teacher.context,
            tokenizer=tokenizer,
            machine=platform.node(),
            version=kdata.__version__,
            devices=devices_of(self._config),
        )

    def do(self, assignment: Assignment, unit: WorkUnit, attempt: str) -> Shard | None:
        """Perform a unit and write its shard under the attempt's name; None where the attempt was dropped before it began."""
        with _named_machine():
            assignment.staging.check()
            try:
                result = self._thread.submit(self._perform, assignment, unit, attempt).result()
                if result is None:
                    return None
                return assignment.staging.write(attempt, assignment.info, assignment.job.name, result)
            finally:
                self._counters.pop(attempt, None)

    def tokens(self) -> dict[str, int]:
        """Tokens done so far, by attempt, of the attempts that are not finished."""
        return {attempt: counter.tokens for attempt, counter in list(self._counters.items())}

    def _perform(self, assignment: Assignment, unit: WorkUnit, attempt: str) -> UnitResult | None:
        with self._lock:
            if attempt in self._dropped:
                return None
            self._begun.add(attempt)
        counter = self._counters[attempt] = UnitCounter()
        teacher, tokenizer = self._loaded.result()
        return assignment.job.perform(teacher, tokenizer, unit, counter)

    def drop(self, attempt: str) -> bool:
        """Drop an attempt; False where the teacher has begun it."""
        with self._lock:
            if attempt in self._begun:
                return False
            self._dropped.add(attempt)
            return True


@contextmanager
def _named_machine() -> Iterator[None]:
    """Add the name of this machine to a KdataError."""
    try:
        yield
    except KdataError as error:
        raise type(error)(f"{error} (on machine {platform.node()})") from error
