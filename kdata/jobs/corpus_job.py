"""What capture and generation have in common: rows of a corpus, prepared one by one and cut into units of work."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa

from kdata.corpus.corpus import Corpus, Document
from kdata.corpus.encode import TextEncoder
from kdata.errors import ConfigError, DataError
from kdata.format.keep import KeepConfig
from kdata.format.keep_rules import KeepRandom
from kdata.format.records import Reject, UnitResult
from kdata.format.schema import SourceInfo
from kdata.jobs.changes import CORPUS_IDENTITY, Rest, StoredRow, follow
from kdata.jobs.job import Job, LocalEngine, TeacherFacts, WorkUnit, devices_of, run_job
from kdata.observe.progress import console
from kdata.store.dataset import Dataset
from kdata.store.writer import Writer
from kdata.teachers.base import OnTokens, Teacher, ignore_tokens
from kdata.teachers.config import TeacherConfig
from kdata.teachers.load import load_teacher
from kdata.teachers.model import load_tokenizer
from kdata.teachers.sizing import Work

# Reasons that are a setting's fault where no row at all can be used.
OF_A_SETTING = ("template", "vocabulary", "chat", "not_text", "no_domain", "no_id")


class Item(Protocol):
    """What a row of the corpus becomes: a sequence to read, or a prompt."""

    @property
    def id(self) -> str:
        """Its id."""
        ...

    @property
    def domain(self) -> str:
        """Its domain."""
        ...


class CorpusUnit(WorkUnit, Protocol):
    """A unit that is filled row by row."""

    def add(self, parts: list[Any]) -> None:
        """Add what one row of the corpus became."""
        ...


I = TypeVar("I", bound=Item)  # noqa: E741
C = TypeVar("C", bound=CorpusUnit)


class CorpusJob(ABC, Generic[I, C]):
    """Rows of a corpus for a teacher; see `kdata.jobs.job.Job` and `kdata.jobs.changes.Followed`.

    A subclass says how a row becomes items, when a unit is full, and what is done with one.
    """

    doing: str
    noun: str
    columns: Sequence[str]
    renames: bool
    follows: Sequence[str] = CORPUS_IDENTITY

    def __init__(self, config: Any, corpus: Corpus) -> None:
        self.config, self.name, self.strict = config, config.name, config.strict
        self.keep: KeepConfig = config
        self._corpus = corpus

    def kept_by(self, row_id: str, domain: str) -> list[str]:
        """What decides, beside a row's content, at which positions distributions are kept: part of `StoredRow.key`."""
        rule, parts = self.keep.positions, []
        if rule is not None and rule.domains:
            parts.append("whole" if domain in rule.domains else "by rule")
        if isinstance(rule, KeepRandom) and domain not in rule.domains:
            parts.append(row_id)
        return parts

    def __getstate__(self) -> dict[str, Any]:
        """Without the corpus: another process gets units, and needs no more to perform them."""
        return {**self.__dict__, "_corpus": None}

    @property
    def total(self) -> int | None:
        """Rows in all; None where that is not known."""
        return self._corpus.num_rows

    @abstractmethod
    def work(self, teacher: TeacherConfig, *, look: bool = True) -> Work:
        """What the teacher is loaded for; `look`: at the rows, and not at the settings alone.

        Raises as `check_teacher` and `load_tokenizer`.
        """

    @abstractmethod
    def source(self, facts: TeacherFacts) -> SourceInfo:
        """See `Job.source`."""

    @abstractmethod
    def preparation(
        self, facts: TeacherFacts, tokenizer: Any
    ) -> tuple[TextEncoder, Callable[[Document], list[I | Reject]]]:
        """The encoder of texts, and how a row of the corpus becomes items or rejects."""

    @abstractmethod
    def unit(self, number: int) -> C:
        """An empty unit."""

    @abstractmethod
    def is_full(self, unit: C) -> bool:
        """Whether a unit takes no further row."""

    @abstractmethod
    def perform(self, teacher: Teacher, tokenizer: Any, unit: C, on_tokens: OnTokens = ignore_tokens) -> UnitResult:
        """See `Job.perform`."""

    @abstractmethod
    def rows_of(self, item: I) -> list[StoredRow]:
        """See `Followed.rows_of`."""

    @abstractmethod
    def stored_key(self, row: dict[str, Any]) -> bytes:
        """See `Followed.stored_key`."""

    @abstractmethod
    def inputs_of(self, payload: pa.Table) -> str:
        """See `Followed.inputs_of`."""

    def parts(self, facts: TeacherFacts, tokenizer: Any, *, says: bool = False) -> Iterator[list[I | Reject]]:
        """What each row of the corpus becomes, in order. A piece of a split text whose id is a row's already is a reject.

        Args:
            says: print at the end what was done with special tokens.
        """
        (texts, items_of), with_number = self.preparation(facts, tokenizer), set[str]()

        def once(part: I | Reject) -> I | Reject:
            if isinstance(part, Reject) or "#" not in part.id:  # only a piece, DOC#0, can have the id of a row
                return part
            if part.id in with_number:
                detail = "an earlier row or piece of a text has the same id; a text that is split takes ID#0, ID#1 ..."
                return Reject(part.id, part.domain, "id_twice", detail)
            with_number.add(part.id)
            return part

        for document in self._corpus.documents():
            yield [document] if isinstance(document, Reject) else [once(part) for part in items_of(document)]
        for line in (*texts.note_lines(), *self._corpus.note_lines()) if says else ():
            console.print(line, soft_wrap=True)

    def units(self, facts: TeacherFacts, tokenizer: Any) -> Iterator[C]:
        """The corpus in its own order, cut into units.

        Raises DataError or ConfigError where no row at all can be used, and a setting is likely at fault.
        """
        for unit in self._cut(self.parts(facts, tokenizer, says=True), itertools.count()):
            if unit.number == 0:
                self._refuse_hopeless(unit)
            yield unit

    def _cut(self, rows: Iterator[list[I | Reject]], numbers: Iterator[int]) -> Iterator[C]:
        """What rows of the corpus became, in units with these numbers."""
        unit = self.unit(next(numbers))
        for row in rows:
            unit.add(row)
            if self.is_full(unit):
                yield unit
                unit = self.unit(next(numbers))
        if unit.documents:
            yield unit

    def _refuse_hopeless(self, first: C) -> None:
        """Raise where nothing of the first unit can be used."""
        reject = next((reject for reject in first.rejects if reject.reason in OF_A_SETTING), None)
        if reject is None or first.ids:
            return
        kind = ConfigError if reject.reason in ("template", "vocabulary") else DataError
        what = "row" if reject.reason != "template" else "chat"
        remedy = "; name a model folder with its own tokenizer" if reject.reason == "vocabulary" else ""
        raise kind(f"not one {what} could be used. {reject.id}: {reject.detail}{remedy}")

    def follow(self, writer: Writer, facts: TeacherFacts, tokenizer: Any) -> Rest[C]:
        """See `Job.follow`."""
        pending = follow(writer, self, self.parts(facts, tokenizer))
        return Rest(pending.rows, self._cut(pending.of(self.parts(facts, tokenizer, says=True)), pending.numbers))


def load_and_run(
    root: Path | str, job: CorpusJob[Any, Any], teacher_config: TeacherConfig, *, resume: str, log: Path | None
) -> Dataset:
    """Load a teacher, have it do a job, and free it."""
    teacher = load_teacher(teacher_config, max_k=job.keep.k, work=job.work(teacher_config))
    try:
        return run_with(root, job, teacher, teacher_config, resume=resume, log=log)
    finally:
        teacher.close()


def run_with(
    root: Path | str,
    job: Job[Any],
    teacher: Teacher,
    teacher_config: TeacherConfig,
    *,
    resume: str,
    log: Path | None,
) -> Dataset:
    """Have a loaded teacher do a job in this process."""
    tokenizer = load_tokenizer(teacher_config.model, teacher.info.revision, bos=teacher_config.bos)
    engine = LocalEngine(teacher, tokenizer, devices_of(teacher_config))
    return run_job(root, job, engine, resume=resume, log=log)
