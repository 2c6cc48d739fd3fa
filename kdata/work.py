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

from kdata.dataset import Dataset
from kdata.energy import Devices, local_devices
from kdata.errors import ConfigError, DataError
from kdata.journal import journal_of
from kdata.keep import KeepConfig
from kdata.progress import Stage
from kdata.remote import writer_at
from kdata.schema import FORMAT_VERSION, DatasetInfo, SourceInfo, TeacherInfo
from kdata.shard import Shard, Unit, stored_shard
from kdata.teachers import Teacher, TeacherConfig, refuse_kept, tokenizer_info
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
    def total(self) -> int | None:
        """Inputs in all; None where only reading them tells."""
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

    @property
    def tokenizer(self) -> Any:
        """Its fast tokenizer."""
        ...

    @property
    def devices(self) -> Devices | None:
        """What it works on; None: one GPU of this machine, or its cores."""
        ...

    def run(self, job: Job[U], units: Iterable[U], writer: Writer) -> Iterator[tuple[U, Shard]]:
        """Perform units and commit them; yield each once it is committed, in any order."""
        ...


class LocalEngine:
    """One teacher in this process; a unit is committed while the next is worked on."""

    def __init__(self, teacher: Teacher, tokenizer: Any, devices: Devices | None = None) -> None:
        self.facts, self.tokenizer, self.devices = teacher, tokenizer, devices

    def run(self, job: Job[U], units: Iterable[U], writer: Writer) -> Iterator[tuple[U, Shard]]:
        """See `Engine.run`; in order."""
        behind: list[U] = []
        with Behind(writer) as commits:
            for unit in units:
                done = commits.commit(job.perform(self.facts, self.tokenizer, unit))
                if done is not None:
                    yield behind.pop(), done
                behind.append(unit)
            last = commits.wait()
            if last is not None:
                yield behind.pop(), last


def devices_of(config: TeacherConfig) -> Devices:
    """What a teacher in this process works on; those of a served one are not known here."""
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
    """Do what is not done yet of a job, and mark its source complete.

    Args:
        root: dataset folder, made when absent; or a URL, see `kdata/remote.py`.
        resume: auto, never or must; see `Writer`.
        log: JSONL file for progress; None: beside the dataset, see `kdata/journal.py`.
    Returns:
        The dataset; of one at a URL the local copy without the payload, which `kdata.open(URL)` fetches.
    Raises:
        MismatchError: the dataset was begun with other settings.
        DataError: tokenizer and model disagree; duplicate id.
    """
    facts = engine.facts
    tokenizer = engine.tokenizer
    source, info = job.source(facts), dataset_info(facts, tokenizer, job.keep)
    cut = 0
    with (
        tokenizer_files(tokenizer) as folder,
        writer_at(root, info, job.name, source, resume=resume, tokenizer_dir=folder) as writer,
        Stage(f"{job.name}: {job.doing}", job.total, job.noun, log or journal_of(writer.root), engine.devices) as stage,
    ):

        def todo() -> Iterator[U]:
            nonlocal cut
            for unit in job.units(facts, tokenizer):
                cut = unit.number + 1
                if unit.number in writer.committed:
                    stage.skip(unit.documents, shard=stored_shard(writer.root, writer.committed[unit.number]))
                else:
                    writer.refuse_twice(unit.ids)
                    yield unit

        for unit, shard in engine.run(job, todo(), writer):
            # What was read, or what was written: prompts are neither.
            tokens = shard.entry.target_tokens if source.kind == "generate" else shard.entry.tokens
            stage.advance(unit.documents, tokens=tokens, shard=shard)
        writer.finish(cut)
    return Dataset(writer.root)


@contextmanager
def tokenizer_files(tokenizer: Any) -> Iterator[Path]:
    """A temporary folder with a tokenizer's files, for the dataset's own copy."""
    with tempfile.TemporaryDirectory(prefix="kdata-tokenizer-") as folder:
        # Chat templates in tokenizer_config.json: several of them as files would make a folder inside this one.
        tokenizer.save_pretrained(folder, save_jinja_files=False)
        yield Path(folder)


def check_k(keep: KeepConfig, facts: TeacherFacts) -> None:
    """Refuse a k that the vocabulary cannot give, and a kind that the teacher cannot."""
    refuse_kept(keep, facts.info.backend)
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
