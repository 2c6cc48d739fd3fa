"""Work: what a teacher is to do, cut into units, and the loop that has it done and committed.

A job (`CaptureJob`, `GenerateJob`) describes its units and performs one of them with a teacher; it is plain data, so it can
travel to another process. An engine has units performed and committed: `LocalEngine` one after another in this process;
`pipelines/` has one that spreads them over machines. The dataset is the same whatever the engine, as a unit is a function of
the job and its number.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from kdata.dataset import Dataset, open_dataset
from kdata.errors import ConfigError, DataError
from kdata.keep import KeepConfig
from kdata.progress import Stage
from kdata.schema import FORMAT_VERSION, DatasetInfo, SourceInfo, TeacherInfo
from kdata.shard import Shard, Unit
from kdata.teachers import Teacher, TeacherConfig, load_tokenizer, tokenizer_info
from kdata.writer import Behind, Writer, new_info


class WorkUnit(Protocol):
    """Inputs that are worked on, committed and repeated together."""

    number: int

    @property
    def documents(self) -> int:
        """Inputs in all, refused ones too."""
        ...

    @property
    def ids(self) -> list[str]:
        """Ids of the rows that it can become."""
        ...


U = TypeVar("U", bound=WorkUnit)


class TeacherFacts(Protocol):
    """What is known of a teacher without having it."""

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
    """Work for a teacher."""

    name: str
    """Of the source; prefix of its shards."""
    doing: str
    """What is being done, as progress shows it: "reading"."""
    noun: str
    """What is counted: "documents"."""
    keep: KeepConfig

    @property
    def total(self) -> int:
        """Inputs in all."""
        ...

    def source(self, facts: TeacherFacts) -> SourceInfo:
        """Everything that decides the rows. Raises ConfigError where this teacher cannot do it."""
        ...

    def units(self, facts: TeacherFacts, tokenizer: Any) -> Iterator[U]:
        """The work, cut deterministically, numbered from 0."""
        ...

    def perform(self, teacher: Teacher, tokenizer: Any, unit: U) -> Unit:
        """Have one unit done."""
        ...


class Engine(Protocol):
    """What has units performed and committed."""

    @property
    def facts(self) -> TeacherFacts:
        """The teacher at work."""
        ...

    def run(self, job: Job[U], units: Iterable[U], writer: Writer) -> Iterator[tuple[U, Shard]]:
        """Perform units and commit them; yield each once it is committed, in any order."""
        ...


class LocalEngine:
    """One teacher in this process; a unit is committed while the next is worked on."""

    def __init__(self, teacher: Teacher, tokenizer: Any) -> None:
        self.facts, self._tokenizer = teacher, tokenizer

    def run(self, job: Job[U], units: Iterable[U], writer: Writer) -> Iterator[tuple[U, Shard]]:
        """See `Engine.run`; in order."""
        behind: list[U] = []
        with Behind(writer) as commits:
            for unit in units:
                done = commits.commit(job.perform(self.facts, self._tokenizer, unit))
                if done is not None:
                    yield behind.pop(), done
                behind.append(unit)
            last = commits.wait()
            if last is not None:
                yield behind.pop(), last


def run_job(
    root: Path,
    job: Job[U],
    teacher_config: TeacherConfig,
    engine: Engine,
    *,
    resume: str = "auto",
    log: Path | None = None,
) -> Dataset:
    """Do what is not done yet of a job, and mark its source complete.

    Args:
        root: dataset folder, made when absent.
        teacher_config: names the tokenizer.
        resume: auto, never or must; see `Writer`.
        log: JSONL file for progress.
    Raises:
        MismatchError: the dataset was begun with other settings.
        DataError: tokenizer and model disagree; duplicate id.
    """
    facts = engine.facts
    tokenizer = load_tokenizer(teacher_config.model, facts.info.revision)
    source, info = job.source(facts), dataset_info(facts, tokenizer, job.keep)
    cut = 0
    with (
        tokenizer_files(tokenizer) as folder,
        Writer(root, info, job.name, source, resume=resume, tokenizer_dir=folder) as writer,
        Stage(f"{job.name}: {job.doing}", job.total, job.noun, log) as stage,
    ):

        def todo() -> Iterator[U]:
            nonlocal cut
            for unit in job.units(facts, tokenizer):
                cut = unit.number + 1
                if unit.number in writer.committed:
                    stage.skip(unit.documents)
                else:
                    writer.refuse_twice(unit.ids)
                    yield unit

        for unit, shard in engine.run(job, todo(), writer):
            stage.advance(
                unit.documents,
                tokens=shard.entry.target_tokens,
                shards=len(writer.committed),
                **{"bytes/token": shard.bytes_per_token},
                **({} if shard.kept_mass is None else {"kept mass": shard.kept_mass}),
            )
        writer.finish(cut)
    return open_dataset(root)


@contextmanager
def tokenizer_files(tokenizer: Any) -> Iterator[Path]:
    """A temporary folder with a tokenizer's files, for the dataset's own copy."""
    with tempfile.TemporaryDirectory(prefix="kdata-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        yield Path(folder)


def check_k(keep: KeepConfig, facts: TeacherFacts) -> None:
    """Refuse a k that the vocabulary cannot give."""
    if keep.num_exact >= facts.vocab_size:
        raise ConfigError(f"k={keep.k} must be below the vocabulary size {facts.vocab_size}; lower k")


def dataset_info(facts: TeacherFacts, tokenizer: Any, keep: KeepConfig) -> DatasetInfo:
    """Identity of a dataset that this teacher fills. Raises DataError when tokenizer and model disagree."""
    if len(tokenizer) > facts.vocab_size:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} ids, the teacher's head only {facts.vocab_size}: they do not belong "
            "together"
        )
    return new_info(
        format_version=FORMAT_VERSION,
        vocab_size=facts.vocab_size,
        teacher=facts.info,
        tokenizer=tokenizer_info(tokenizer),
        codec=keep.codec(facts.vocab_size),
        tail=keep.tail,
    )
