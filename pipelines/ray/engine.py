"""The Ray engine: units go to actors on any number of machines; this process cuts them, and commits what comes back.

The driver holds the dataset's lock, neither a model nor torch. An actor writes the files of its unit under the name of the
attempt into a place of the run's own (`kdata/staging.py`); the driver renames those it takes and writes the manifest line.
So two attempts at one unit cannot clash, a late one cannot touch what is committed, and only the driver can commit.

What dies is replaced: an actor's units are given out again. A unit that was with an actor that died is from then on given out
alone, so that one that kills its actor is told from its neighbours. At the end of the work, when actors have nothing to do,
they take over units that wait behind another, and do a second time what takes much longer than usual: the first result
counts.
"""

from __future__ import annotations

import secrets
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from kdata.errors import ConfigError, TeacherError
from kdata.format.records import Shard
from kdata.jobs.job import Job, U
from kdata.observe.energy import Devices
from kdata.pipelines.ray.actor import ActorFacts, Assignment, Loader, load_both
from kdata.pipelines.ray.workers import ActorLost, RayConfig, Worker, Workers
from kdata.store.writer import Writer
from kdata.teachers.config import TeacherConfig

DURATIONS = 101  # of the last units, for the median
SLOW_SEC = 10.0  # nothing is done twice that takes less


class RayEngine:
    """Teachers on a cluster; a context manager, at whose end no actor is left. See `kdata.jobs.job.Engine`.

    Args:
        config: how many, with what.
        teacher: which; the model must be a Hub name, or a folder that all machines see under the same path.
        max_k: largest k that will be asked for.
        loader: what loads it, in the actor.
    Raises:
        DependencyError: Ray is not installed.
        ConfigError: fewer GPUs for an actor than the teacher is spread over; no cluster at the address.
        TeacherError: no teacher was ready in time; actors die at loading.
        MismatchError: two machines have different teachers, tokenizers or versions of kdata.
        KdataError: as the teacher raises it.
    """

    def __init__(self, config: RayConfig, teacher: TeacherConfig, *, max_k: int, loader: Loader = load_both) -> None:
        if config.gpus_per_teacher and config.gpus_per_teacher < teacher.tensor_parallel:
            raise ConfigError(
                f"gpus_per_teacher={config.gpus_per_teacher:g}, and the teacher is spread over tensor_parallel="
                f"{teacher.tensor_parallel} GPUs; raise the one or lower the other"
            )
        if Path(teacher.model).is_dir():  # an actor has another working directory
            teacher = teacher.model_copy(update={"model": str(Path(teacher.model).resolve())})
        self._workers = Workers(config, teacher, max_k, loader)

    def __enter__(self) -> RayEngine:
        self._workers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.close()

    @property
    def facts(self) -> ActorFacts:
        """See `Engine.facts`."""
        assert self._workers.facts is not None, "known once the engine is entered"
        return self._workers.facts

    @property
    def tokenizer(self) -> Any:
        """See `Engine.tokenizer`."""
        return self.facts.tokenizer

    @property
    def devices(self) -> Devices:
        """See `Engine.devices`: those of all actors that there may be."""
        one, config = self.facts.devices, self._workers.config
        each = max(int(config.cpus_per_teacher), 1) if one.kind == "cpu" else one.count
        return one.model_copy(update={"count": each * config.most, "here": False})

    def run(self, job: Job[U], units: Iterable[U], writer: Writer) -> Iterator[tuple[U, Shard]]:
        """See `Engine.run`; in the order in which units are done.

        Raises:
            TeacherError: `max_deaths` actors died with a unit.
            KdataError: as the teacher, or the writing of a shard, raises it.
        """
        run = _Run(self._workers, job, units, writer)
        try:
            yield from run.go()
        finally:
            run.end()


@dataclass(eq=False)
class _Task(Generic[U]):
    """A unit in the driver's books: attempts so far and under way, and how many actors died with it."""

    unit: U
    attempts: int = 0
    running: list[_Attempt[U]] = field(default_factory=list)
    deaths: int = 0
    done: bool = False


@dataclass(eq=False)
class _Attempt(Generic[U]):
    """A unit that an actor has; `began` is when it came first in the actor's row (monotonic seconds).

    result: the answer that is its shard. back: the answer whether the actor gave it back; None where it was not asked, or has
    answered: then it has begun.
    """

    name: str
    task: _Task[U]
    worker: Worker
    result: Any
    began: float
    back: Any = None
    begun: bool = False


class _Run(Generic[U]):
    """One job under way: what waits, what is where, what is done."""

    def __init__(self, workers: Workers, job: Job[U], units: Iterable[U], writer: Writer) -> None:
        self._workers, self._config, self._writer = workers, workers.config, writer
        self._units, self._drawn_all = iter(units), False
        self._staging, self._prefix = writer.staging(), secrets.token_hex(4)  # actors outlive runs; names must not meet
        self._assignment = workers.ray.put(Assignment(job, writer.info, self._staging))
        self._waiting: deque[_Task[U]] = deque()
        self._attempts: list[_Attempt[U]] = []  # under way, in the order in which they were given out
        self._durations: deque[float] = deque(maxlen=DURATIONS)

    def go(self) -> Iterator[tuple[U, Shard]]:
        """Hand out and commit until all is done."""
        while self._hand_out():
            answers = {a.result: (self._settle, a) for a in self._attempts}
            answers |= {a.back: (self._take_back, a) for a in self._attempts if a.back is not None}
            answer = self._workers.wait(list(answers))
            if answer not in answers:
                self._workers.settle(answer)
                continue
            action, attempt = answers[answer]
            committed = action(attempt)
            if committed is not None:
                yield committed

    def _of(self, worker: Worker) -> list[_Attempt[U]]:
        """What an actor has; the first is the one at work."""
        return [attempt for attempt in self._attempts if attempt.worker is worker]

    def _hand_out(self) -> bool:
        """Draw units, start actors for them, and give each actor what it has room for. False where all is done."""
        self._workers.start(self._config.min_teachers)
        self._draw()
        while self._surplus() > 0 and len(self._workers.all) < self._config.most:
            self._workers.start(len(self._workers.all) + 1)
            self._draw()
        for worker in self._workers.ready:
            while self._waiting and self._has_room(worker, self._waiting[0]):
                self._give(self._waiting.popleft(), worker)
        if self._drawn_all and not self._waiting:
            self._help_out()
        return bool(self._waiting) or any(not attempt.task.done for attempt in self._attempts)

    def _surplus(self) -> int:
        """Units in the books beyond what the actors, ready or loading, have room for."""
        return len(self._waiting) + len(self._attempts) - len(self._workers.all) * self._config.units_per_teacher

    def _draw(self) -> None:
        """Draw units until there is one more than fits."""
        while not self._drawn_all and self._surplus() <= 0:
            unit = next(self._units, None)
            if unit is None:
                self._drawn_all = True
            else:
                self._waiting.append(_Task(unit))

    def _has_room(self, worker: Worker, task: _Task[U]) -> bool:
        """A unit that was with an actor that died goes alone."""
        has = self._of(worker)
        if task.deaths or any(attempt.task.deaths for attempt in has):
            return not has
        return len(has) < self._config.units_per_teacher

    def _give(self, task: _Task[U], worker: Worker) -> None:
        name = f"{self._prefix}-{task.unit.number:05d}-{task.attempts}"
        task.attempts += 1
        result = worker.actor.do.remote(self._assignment, task.unit, name)
        attempt = _Attempt(name, task, worker, result, time.monotonic())
        self._attempts.append(attempt)
        task.running.append(attempt)

    def _help_out(self) -> None:
        """Have each idle actor do a second time what is slow, or else ask for a unit back that waits behind another."""
        asked = [attempt for attempt in self._attempts if attempt.back is not None]
        for idle in [worker for worker in self._workers.ready if not self._of(worker)]:
            slow = self._slowest()
            waiting = next((a for a in self._attempts if self._may_wait(a)), None)
            if slow is not None:
                self._give(slow.task, idle)
            elif asked:
                asked.pop()  # what comes back is for this one
            elif waiting is not None:
                waiting.back = waiting.worker.actor.drop.remote(waiting.name)

    def _may_wait(self, attempt: _Attempt[U]) -> bool:
        """Whether it stands behind another, as far as is known."""
        return attempt.back is None and not attempt.begun and attempt is not self._of(attempt.worker)[0]

    def _slowest(self) -> _Attempt[U] | None:
        """The one under way for longest of those that take too long; each unit is done at most twice at a time."""
        if self._config.slow_factor is None or not self._durations:
            return None
        limit = max(self._config.slow_factor * statistics.median(self._durations), SLOW_SEC)
        began = time.monotonic() - limit
        slow = [a for a in self._attempts if a.began < began and not a.task.done and len(a.task.running) == 1]
        return min(slow, key=lambda a: a.began, default=None)

    def _take_back(self, attempt: _Attempt[U]) -> None:
        """Let a unit wait that an actor gave back; an actor that has begun it goes on with it."""
        try:
            given_back = self._workers.get(attempt.back)
        except ActorLost as error:
            self._bury(attempt.worker, str(error))
            return
        attempt.back, attempt.begun = None, not given_back
        if given_back:
            self._forget(attempt)
            self._repeat(attempt.task)

    def _settle(self, attempt: _Attempt[U]) -> tuple[U, Shard] | None:
        """Commit what an attempt brought, if it is the first at its unit to bring it."""
        try:
            shard = self._workers.get(attempt.result)
        except ActorLost as error:
            self._bury(attempt.worker, str(error))
            return None
        task = attempt.task
        self._forget(attempt)
        if shard is None:  # it was given back, and that answer comes later
            self._repeat(task)
        elif not task.done:
            self._durations.append(time.monotonic() - attempt.began)
            task.done = True
            self._writer.adopt(self._staging, attempt.name, shard)
            return task.unit, shard
        return None

    def _forget(self, attempt: _Attempt[U]) -> None:
        """Strike an attempt off the books; the next of its actor begins now."""
        row = self._of(attempt.worker)
        if attempt is row[0] and len(row) > 1:
            row[1].began = time.monotonic()
        self._attempts.remove(attempt)
        attempt.task.running.remove(attempt)

    def _repeat(self, task: _Task[U]) -> None:
        if not task.done and not task.running:
            self._waiting.appendleft(task)

    def _bury(self, worker: Worker, reason: str) -> None:
        """Note the death of an actor; its units are given out again, each alone."""
        self._workers.let_go(worker)
        for attempt in reversed(self._of(worker)):
            task = attempt.task
            self._forget(attempt)
            task.deaths += not task.done
            if task.deaths >= self._config.max_deaths:
                ids = task.unit.ids
                rows = f"rows {ids[0]!r} to {ids[-1]!r}" if ids else "no rows"
                raise TeacherError(
                    f"unit {task.unit.number} ({rows}) was with {task.deaths} actors that died (max_deaths); the last: "
                    f"{reason}. See Ray's log of the actor; smaller units need less memory"
                )
            self._repeat(task)

    def end(self) -> None:
        """Let go of the actors that are still at what others have done: they are slow, and nobody waits for them."""
        results = [attempt.result for attempt in self._attempts]
        for worker in {id(attempt.worker): attempt.worker for attempt in self._attempts}.values():
            self._workers.let_go(worker)
        if results:  # each answer is there once its actor is known to be dead, and writes no more
            self._workers.ray.wait(results, num_returns=len(results), timeout=10.0)
