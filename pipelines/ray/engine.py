"""The Ray engine: this process (the driver) cuts units of work and commits results; actors on any machine perform them.

The driver holds the dataset's lock, but no model and no torch. An actor writes the files of its unit into a staging folder of
the run, under the name of the attempt (`kdata/store/staging.py`). The driver renames the files that it accepts and writes the
manifest line. So two attempts at one unit cannot clash, a late attempt cannot change what is committed, and only the driver
commits.

A dead actor is replaced, and its units are assigned again. From then on such a unit is assigned alone, so that a unit that
kills its actor is told apart from its neighbors. Near the end, idle actors take over units that wait behind another one, and
repeat a unit that takes much longer than usual: the first result counts.
"""

from __future__ import annotations

import itertools
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
from kdata.jobs.job import Job, OnUnitTokens, U
from kdata.observe.energy import Devices
from kdata.pipelines.ray.actor import ActorFacts, Assignment, Loader, load_both
from kdata.pipelines.ray.workers import ActorLost, RayConfig, Worker, Workers
from kdata.store.gguf import is_gguf
from kdata.store.writer import Writer
from kdata.teachers.config import TeacherConfig

DURATIONS = 101  # of the last units, for the median
SLOW_SEC = 10.0  # a unit that takes less is never performed twice
TOKENS_SEC = 1.0  # pause before an actor is asked again how many tokens it has done


class RayEngine:
    """Teachers on a cluster, as a context manager that ends every actor. See `kdata.jobs.job.Engine`.

    Args:
        config: number of actors and what each may use.
        teacher: the model must be a Hub name, or a folder that all machines see under the same path.
        max_k: largest k that will be asked for.
        loader: loads teacher and tokenizer in the actor.
    Raises:
        DependencyError: Ray is not installed.
        ConfigError: an actor has fewer GPUs than the teacher is spread over; no cluster at the address.
        TeacherError: no teacher was ready in time; actors die while they load.
        MismatchError: two machines have different teachers, tokenizers or versions of kdata.
        KdataError: as the teacher raises it.
    """

    def __init__(self, config: RayConfig, teacher: TeacherConfig, *, max_k: int, loader: Loader = load_both) -> None:
        if config.gpus_per_teacher and config.gpus_per_teacher < teacher.tensor_parallel:
            raise ConfigError(
                f"gpus_per_teacher={config.gpus_per_teacher:g}, and the teacher is spread over tensor_parallel="
                f"{teacher.tensor_parallel} GPUs; raise the one or lower the other"
            )
        # An actor has another working directory.
        if Path(teacher.model).is_dir() or is_gguf(teacher.model):
            teacher = teacher.model_copy(update={"model": str(Path(teacher.model).resolve())})
        if teacher.lora is not None:
            teacher = teacher.model_copy(update={"lora": str(Path(teacher.lora).resolve())})
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

    def run(
        self, job: Job[U], units: Iterable[U], writer: Writer, on_tokens: OnUnitTokens
    ) -> Iterator[tuple[U, Shard]]:
        """See `Engine.run`; in the order in which units are done.

        Raises:
            TeacherError: `max_deaths` actors died with a unit.
            KdataError: as the teacher, or the writing of a shard, raises it.
        """
        run = _Run(self._workers, job, units, writer, on_tokens)
        try:
            yield from run.go()
        finally:
            run.end()


@dataclass(eq=False)
class _Task(Generic[U]):
    """A unit as the driver sees it: attempts so far and under way, and how many actors died with it."""

    unit: U
    attempts: int = 0
    running: list[_Attempt[U]] = field(default_factory=list)
    deaths: int = 0
    done: bool = False


@dataclass(eq=False)
class _Attempt(Generic[U]):
    """A unit that an actor has; `began` is when it became the actor's first (monotonic seconds).

    result: the future of its shard. back: the future that says whether the actor dropped it; None where the driver did not
    ask, or has the answer. begun: the actor has begun it and keeps it.
    """

    name: str
    task: _Task[U]
    worker: Worker
    result: Any
    began: float
    back: Any = None
    begun: bool = False
    tokens: int = 0


class _Run(Generic[U]):
    """One job under way: units that wait, units that actors have, and what is done."""

    def __init__(
        self, workers: Workers, job: Job[U], units: Iterable[U], writer: Writer, on_tokens: OnUnitTokens
    ) -> None:
        self._workers, self._config, self._writer, self._on_tokens = workers, workers.config, writer, on_tokens
        drawn = iter(units)
        first = list(
            itertools.islice(drawn, 1)
        )  # before actors get `writer.info`: drawing records inputs that have changed
        self._units, self._drawn_all = itertools.chain(first, drawn), False
        self._staging, self._prefix = writer.staging(), secrets.token_hex(4)  # actors outlive runs: names must differ
        self._assignment = workers.ray.put(Assignment(job, writer.info, self._staging))
        self._waiting: deque[_Task[U]] = deque()
        self._attempts: list[_Attempt[U]] = []  # under way, in the order of their assignment
        self._durations: deque[float] = deque(maxlen=DURATIONS)
        self._token_counts: dict[Any, Worker] = {}  # futures of `TeacherActor.tokens`
        self._counted = time.monotonic()

    def go(self) -> Iterator[tuple[U, Shard]]:
        """Assign and commit until all is done."""
        while self._hand_out():
            self._ask_for_tokens()
            answers = {a.result: (self._settle, a) for a in self._attempts}
            answers |= {a.back: (self._take_back, a) for a in self._attempts if a.back is not None}
            answer = self._workers.wait([*answers, *self._token_counts])
            if answer in self._token_counts:
                self._count_tokens(answer)
                continue
            if answer not in answers:
                self._workers.settle(answer)
                continue
            action, attempt = answers[answer]
            committed = action(attempt)
            if committed is not None:
                yield committed

    def _ask_for_tokens(self) -> None:
        """Ask the actors that have units how far they are, at most once in TOKENS_SEC."""
        if time.monotonic() - self._counted < TOKENS_SEC:
            return
        self._counted = time.monotonic()
        for worker in self._workers.ready:
            if self._of(worker) and worker not in self._token_counts.values():
                self._token_counts[worker.actor.tokens.remote()] = worker

    def _count_tokens(self, answer: Any) -> None:
        """Report the tokens of an actor's units. Of two attempts at one unit the one that is further ahead counts."""
        worker = self._token_counts.pop(answer)
        try:
            counts = self._workers.get(answer)
        except ActorLost:  # the futures of its units say so too, and `_bury` handles it there
            return
        for attempt in self._of(worker):
            attempt.tokens = counts.get(attempt.name, attempt.tokens)
            task = attempt.task
            self._on_tokens(task.unit.number, max((a.tokens for a in task.running), default=0))

    def _of(self, worker: Worker) -> list[_Attempt[U]]:
        """The attempts that an actor has; it is at work on the first."""
        return [attempt for attempt in self._attempts if attempt.worker is worker]

    def _hand_out(self) -> bool:
        """Draw units, start actors for them, and assign to each actor as many as it may hold. False where all is done."""
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
        """Units drawn beyond those that the actors, ready or loading, may hold."""
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
        """Whether an actor may hold one more unit. A unit whose actor died is assigned alone."""
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
        """Give each idle actor a slow unit to repeat, or else ask another actor to drop a unit that waits there."""
        asked = [attempt for attempt in self._attempts if attempt.back is not None]
        for idle in [worker for worker in self._workers.ready if not self._of(worker)]:
            slow = self._slowest()
            waiting = next((a for a in self._attempts if self._may_wait(a)), None)
            if slow is not None:
                self._give(slow.task, idle)
            elif asked:
                asked.pop()  # the unit that is dropped there is for this one
            elif waiting is not None:
                waiting.back = waiting.worker.actor.drop.remote(waiting.name)

    def _may_wait(self, attempt: _Attempt[U]) -> bool:
        """Whether it waits behind another unit, as far as the driver knows."""
        return attempt.back is None and not attempt.begun and attempt is not self._of(attempt.worker)[0]

    def _slowest(self) -> _Attempt[U] | None:
        """Of the attempts that take too long the longest; a unit has at most two attempts at a time."""
        if self._config.slow_factor is None or not self._durations:
            return None
        limit = max(self._config.slow_factor * statistics.median(self._durations), SLOW_SEC)
        began = time.monotonic() - limit
        slow = [a for a in self._attempts if a.began < began and not a.task.done and len(a.task.running) == 1]
        return min(slow, key=lambda a: a.began, default=None)

    def _take_back(self, attempt: _Attempt[U]) -> None:
        """Queue a unit that an actor dropped; an actor that has begun it goes on with it."""
        try:
            was_dropped = self._workers.get(attempt.back)
        except ActorLost as error:
            self._bury(attempt.worker, str(error))
            return
        attempt.back, attempt.begun = None, not was_dropped
        if was_dropped:
            self._forget(attempt)
            self._repeat(attempt.task)

    def _settle(self, attempt: _Attempt[U]) -> tuple[U, Shard] | None:
        """Commit the shard of an attempt, if it is the first of its unit."""
        try:
            shard = self._workers.get(attempt.result)
        except ActorLost as error:
            self._bury(attempt.worker, str(error))
            return None
        task = attempt.task
        self._forget(attempt)
        if shard is None:  # it was dropped, and the answer that says so comes later
            self._repeat(task)
        elif not task.done:
            self._durations.append(time.monotonic() - attempt.began)
            task.done = True
            self._writer.adopt(self._staging, attempt.name, shard)
            return task.unit, shard
        return None

    def _forget(self, attempt: _Attempt[U]) -> None:
        """Remove an attempt; its actor begins the next one now."""
        attempts = self._of(attempt.worker)
        if attempt is attempts[0] and len(attempts) > 1:
            attempts[1].began = time.monotonic()
        self._attempts.remove(attempt)
        attempt.task.running.remove(attempt)

    def _repeat(self, task: _Task[U]) -> None:
        if not task.done and not task.running:
            self._waiting.appendleft(task)

    def _bury(self, worker: Worker, reason: str) -> None:
        """Remove a dead actor; its units are assigned again, each alone."""
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
        """End the actors that still work on units that others have finished: nobody waits for them."""
        results = [attempt.result for attempt in self._attempts]
        for worker in {id(attempt.worker): attempt.worker for attempt in self._attempts}.values():
            self._workers.let_go(worker)
        if results:  # a future is ready once its actor is known to be dead and writes no more
            self._workers.ray.wait(results, num_returns=len(results), timeout=10.0)
