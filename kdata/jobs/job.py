"""Jobs for a teacher, cut into units of work, and the loop that performs and commits them.

A job (`CaptureJob`, `GenerateJob`, `RereadJob`) cuts its inputs into units and performs a unit with a teacher. It is plain
data, so it can be sent to another process. An engine performs units and commits the results: `LocalEngine` one after another
in this process, the Ray engine (`pipelines/ray`) on many machines. A unit depends on the job and its number only, so every
engine writes the same dataset.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from kdata.errors import ConfigError, TeacherError
from kdata.format.files import journal_of
from kdata.format.keep import KeepConfig
from kdata.format.manifest import new_info
from kdata.format.records import Reject, Shard, UnitResult
from kdata.format.rejects import refused
from kdata.format.schema import FORMAT_VERSION, DatasetInfo, ManifestEntry, SourceInfo, TeacherInfo
from kdata.jobs.changes import ID_ELSEWHERE, Rest, close_gaps
from kdata.jobs.payloads import MOST_FAILED
from kdata.observe.energy import Devices, local_devices
from kdata.observe.progress import Task, console
from kdata.store.dataset import Dataset
from kdata.store.kept_counts import kept_lines
from kdata.store.shard import stored_rejects, stored_shard
from kdata.store.url_writer import writer_at
from kdata.store.writer import Writer
from kdata.teachers.base import OnTokens, Teacher, ignore_tokens
from kdata.teachers.config import TeacherConfig, refuse_kept
from kdata.teachers.model import tokenizer_files, tokenizer_info


class WorkUnit(Protocol):
    """Inputs that are worked on, committed and repeated together; their outcome is a `UnitResult`."""

    number: int

    @property
    def documents(self) -> int:
        """Inputs in all, refused ones too."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens that the teacher reads, or writes at most."""
        ...

    @property
    def ids(self) -> list[str]:
        """Ids of the rows that it can become."""
        ...

    rejects: list[Reject]
    """Inputs that were refused before the teacher works."""

    def reject(self, ids: set[str], reason: str, detail: str) -> None:
        """Put aside the inputs that would become a row with one of these ids."""
        ...


U = TypeVar("U", bound=WorkUnit)


OnUnitTokens = Callable[[int, int], None]
"""Called with the number of a unit and how many of its tokens are done so far, from any thread."""


class TeacherFacts(Protocol):
    """What is known of a teacher that may be in another process."""

    @property
    def info(self) -> TeacherInfo:
        """Who it is."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of its head."""
        ...

    @property
    def context(self) -> int:
        """Longest sequence, in tokens."""
        ...


class Job(Protocol[U]):
    """Work for a teacher; see `CaptureJob`."""

    name: str
    """Name of the source, and prefix of its shards."""
    doing: str
    """The activity, as progress shows it: "reading"."""
    noun: str
    """The inputs, as progress counts them: "documents"."""
    keep: KeepConfig
    strict: bool
    """See `RowsConfig`."""
    follows: Sequence[str]
    """Settings that identify the inputs by content; see `Writer`."""

    @property
    def total(self) -> int | None:
        """Inputs in all; None where the number is known only after reading all of them."""
        ...

    def source(self, facts: TeacherFacts) -> SourceInfo:
        """Everything that decides the rows. Raises ConfigError where this teacher cannot do it."""
        ...

    def follow(self, writer: Writer, facts: TeacherFacts, tokenizer: Any) -> Rest[U] | None:
        """Bring what is committed in line with inputs that have changed; the units still to be done, None for `units`."""
        ...

    def units(self, facts: TeacherFacts, tokenizer: Any) -> Iterator[U]:
        """The work, cut deterministically, numbered from 0."""
        ...

    def perform(self, teacher: Teacher, tokenizer: Any, unit: U, on_tokens: OnTokens = ignore_tokens) -> UnitResult:
        """Have one unit done; `on_tokens` is passed to the teacher."""
        ...


class Engine(Protocol):
    """Performs units and commits their results."""

    @property
    def facts(self) -> TeacherFacts:
        """The teacher at work."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its fast tokenizer."""
        ...

    @property
    def devices(self) -> Devices | None:
        """The devices of the teacher; None: one GPU of this machine, or its cores."""
        ...

    def run(
        self, job: Job[U], units: Iterable[U], writer: Writer, on_tokens: OnUnitTokens
    ) -> Iterator[tuple[U, Shard]]:
        """Perform units and commit them; yield each once it is committed, in any order."""
        ...


class LocalEngine:
    """One teacher in this process; a unit is committed while the next is worked on."""

    def __init__(self, teacher: Teacher, tokenizer: Any, devices: Devices | None = None) -> None:
        self.facts, self.tokenizer, self.devices = teacher, tokenizer, devices

    def run(
        self, job: Job[U], units: Iterable[U], writer: Writer, on_tokens: OnUnitTokens
    ) -> Iterator[tuple[U, Shard]]:
        """See `Engine.run`; in order."""
        behind: list[U] = []
        with Behind(writer) as commits:
            for unit in units:
                count = UnitCounter(partial(on_tokens, unit.number))
                done = commits.commit(job.perform(self.facts, self.tokenizer, unit, count))
                if done is not None:
                    yield behind.pop(), done
                behind.append(unit)
            last = commits.wait()
            if last is not None:
                yield behind.pop(), last


class UnitCounter:
    """An `OnTokens` that adds up the tokens of one unit; `report` is called with the sum."""

    def __init__(self, report: OnTokens = ignore_tokens) -> None:
        self._report, self._lock, self.tokens = report, threading.Lock(), 0

    def __call__(self, tokens: int) -> None:
        with self._lock:
            self.tokens += tokens
            self._report(self.tokens)


def devices_of(config: TeacherConfig) -> Devices:
    """The devices of a teacher in this process; those of a served teacher are not known here."""
    if config.backend == "vllm-server":
        return Devices(kind="remote", count=0, name="a served vLLM", here=False)
    return local_devices(config.tensor_parallel)


def run_job(
    root: Path | str,
    job: Job[U],
    engine: Engine,
    *,
    resume: str = "auto",
    log: Path | None = None,
) -> Dataset:
    """Perform the units of a job that are not committed yet, and mark its source complete.

    Args:
        root: dataset folder, created if needed; or a URL, see `kdata/store/url_writer.py`.
        resume: auto, never or must; see `Writer`.
        log: JSONL file for progress; None: beside the dataset, see `kdata/observe/journal.py`.
    Returns:
        The dataset. At a URL: its local copy without the payload; `kdata.open(URL)` fetches that.
    Raises:
        MismatchError: the dataset was begun with other settings, or from other inputs of which nothing is left.
        ConfigError: tokenizer and model disagree.
        DataError: the dataset has all ids already; `strict` is set and a row cannot be used.
        TeacherError: the teacher gives no usable numbers at all.
    """
    facts = engine.facts
    tokenizer = engine.tokenizer
    source, info = job.source(facts), dataset_info(facts, tokenizer, job.keep)
    writes = source.kind == "generate"
    with (
        tokenizer_files(tokenizer) as folder,
        writer_at(root, info, job.name, source, resume=resume, tokenizer_dir=folder, follows=job.follows) as writer,
        Task(
            f"{job.name}: {job.doing}",
            job.total,
            job.noun,
            log or journal_of(writer.root),
            engine.devices,
            source=job.name,
            at_most=writes,
        ) as task,
    ):
        work = _Work(job, engine, writer, task, writes)
        for unit, shard in engine.run(job, work.units(), writer, task.under_way):
            work.count(unit, shard)
        writer.finish(work.end())
    dataset = Dataset(writer.root)
    for line in kept_lines(dataset, look=writer.has_rows):
        console.print(line, soft_wrap=True)
    return dataset


class _Work(Generic[U]):
    """The units of a job that are not committed yet, and the progress through all of them."""

    def __init__(self, job: Job[U], engine: Engine, writer: Writer, task: Task, writes: bool) -> None:
        self._job, self._engine, self._writer, self._task, self._writes = job, engine, writer, task, writes
        self._cut, self._rows, self._failed = 0, 0, 0
        self._rest: Rest[U] | None = None

    def units(self) -> Iterator[U]:
        """Units for the engine; those that are committed are skipped."""
        facts, tokenizer, writer, task = self._engine.facts, self._engine.tokenizer, self._writer, self._task
        if writer.is_followed:
            self._rest = self._job.follow(writer, facts, tokenizer)
        if self._rest is not None:
            task.skip(self._rest.rows)
            for entry in writer.committed.values():
                self._skip(0, entry)
        committed = dict(writer.committed)
        for unit in self._job.units(facts, tokenizer) if self._rest is None else self._rest.units:
            self._cut = unit.number + 1
            if unit.number in committed:
                self._skip(unit.documents, committed[unit.number], len(unit.ids))
            else:
                self._refuse_present(unit)
                if self._job.strict and unit.rejects:
                    raise refused(unit.rejects[0])
                task.plan(unit.number, unit.documents, unit.tokens)
                yield unit

    def _skip(self, documents: int, entry: ManifestEntry, rows: int = 0) -> None:
        """Count a shard that an earlier run committed; `rows`: how many it could have become."""
        shard = stored_shard(self._writer.root, entry)
        if self._job.strict and entry.rejected:
            raise refused(stored_rejects(self._writer.root, entry)[0])
        self._rows += entry.rows
        self._failed += rows if not entry.rows else 0
        self._task.skip(documents, tokens=self._tokens_of(shard), shard=shard)

    def _refuse_present(self, unit: U) -> None:
        """Put aside rows whose id the dataset has already. Raises DataError where that is all that there is."""
        ids = unit.ids
        present = self._writer.present(ids)
        if present and len(present) == len(ids) and not self._rows:
            self._writer.refuse_twice(ids)
        if present:
            unit.reject(present, "id_twice", ID_ELSEWHERE)

    def count(self, unit: U, shard: Shard) -> None:
        """Count a unit that is committed. Raises TeacherError where the teacher has not given one usable row so far."""
        self._rows += shard.entry.rows
        self._failed += len(unit.ids) if not shard.entry.rows else 0
        self._task.advance(unit.documents, tokens=self._tokens_of(shard), part=unit.number, shard=shard)
        if self._failed >= MOST_FAILED:
            self._refuse_hopeless()

    def _refuse_hopeless(self) -> None:
        if self._failed and not self._rows:
            raise TeacherError(
                f"the teacher has not given usable numbers for any of {self._failed:,} rows, so the rows are not at fault; "
                f"check the weights and the arithmetic (teacher.dtype). The reasons: kdata sql {self._writer.root} "
                '"select id, reason, detail from rejects"'
            )

    def end(self) -> int:
        """Number of units in all, once all are committed. Errors as in `count`."""
        self._refuse_hopeless()
        if self._rest is not None:
            close_gaps(self._writer)
            return len(self._writer.committed)
        return self._cut

    def _tokens_of(self, shard: Shard) -> int:
        """Tokens that the teacher read or wrote; prompts are neither."""
        return shard.entry.target_tokens if self._writes else shard.entry.tokens


def check_k(keep: KeepConfig, facts: TeacherFacts) -> None:
    """Raise ConfigError for a k that exceeds the vocabulary, a kind that the teacher cannot record, or an idle rule."""
    refuse_kept(keep, facts.info.backend)
    if keep.positions is not None:
        keep.positions.check(facts.vocab_size)
    if keep.kind in ("topk", "adaptive", "hybrid") and keep.k >= facts.vocab_size:
        raise ConfigError(f"k={keep.k} must be below the vocabulary size {facts.vocab_size}; lower k")


def dataset_info(facts: TeacherFacts, tokenizer: Any, keep: KeepConfig) -> DatasetInfo:
    """Identity of a dataset that this teacher fills."""
    return new_info(
        format_version=FORMAT_VERSION,
        vocab_size=facts.vocab_size,
        teacher=facts.info,
        tokenizer=tokenizer_info(tokenizer),
        codec=keep.codec(facts.vocab_size),
        tail=keep.tail,
    )


class Behind:
    """Commits results in order on a thread, one behind the teacher, so that encoding and hashing overlap with the engine.

    A context manager. An error of a commit is raised by the next call, or at the end.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kdata-commit")
        self._pending: Future[Shard] | None = None

    def __enter__(self) -> Behind:
        return self

    def commit(self, unit: UnitResult) -> Shard | None:
        """Begin to commit a result once the one before is committed. Returns the shard of that one, or raises its error."""
        before = self.wait()
        self._pending = self._thread.submit(self._writer.commit, unit)
        return before

    def wait(self) -> Shard | None:
        """Wait until everything is committed; the last shard, or None where no commit was under way."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # After an error of the teacher the result before it is still committed; the error raised is the teacher's.
            with suppress(Exception) if kind else nullcontext():
                self.wait()
        finally:
            self._thread.shutdown()
