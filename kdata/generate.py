"""Generate: a teacher writes text from prompts, and the distributions it wrote from are kept in the same pass.

Only what the teacher wrote counts as a target; the prompt is stored without distributions. What is recorded is the raw
distribution at temperature 1, whatever the sampling settings; those stand in dataset.json. Seeds derive from the run's
seed, the prompt's id and the sample's number, so that the same settings write the same dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from kdata.capture import inputs_digest, record_of, unread
from kdata.corpus import Corpus, CorpusConfig, Document, TextEncoder
from kdata.dataset import Dataset
from kdata.keep import KeepConfig
from kdata.schema import SourceInfo
from kdata.shard import Record, Reject, Unit
from kdata.teachers import Completion, SamplingConfig, Teacher, TeacherConfig, load_teacher, load_tokenizer
from kdata.work import LocalEngine, TeacherFacts, check_k, run_job


class GenerateConfig(KeepConfig):
    """What is written, from which prompts."""

    prompts: CorpusConfig
    num_samples: int = Field(1, ge=1, description="Completions per prompt.")
    sampling: SamplingConfig = SamplingConfig()
    seed: int = Field(0, ge=0, description="Seed of the whole generation.")
    unit_prompts: int = Field(256, ge=1, description="Prompts of one work unit, which is one shard.")
    name: str = Field("generate", pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of the source; prefix of shards.")


@dataclass
class WritingUnit:
    """Prompts that are continued, committed and repeated together."""

    number: int
    prompts: list[tuple[Document, np.ndarray]] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    samples: int = 1

    @property
    def ids(self) -> list[str]:
        """Ids of the rows that it can become."""
        return [f"{document.id}~{n}" for document, _ in self.prompts for n in range(self.samples)]

    @property
    def documents(self) -> int:
        """Prompts in all, refused ones too."""
        return len(self.prompts) + len(self.rejects)


def generate(
    root: Path,
    teacher_config: TeacherConfig,
    config: GenerateConfig,
    *,
    resume: str = "auto",
    log: Path | None = None,
) -> Dataset:
    """Write text from prompts and add it to the dataset at `root` (made when absent). Errors as in `capture`."""
    prompts = Corpus(config.prompts)
    teacher = load_teacher(teacher_config, max_k=config.k)
    try:
        return generate_with(root, teacher, teacher_config, prompts, config, resume=resume, log=log)
    finally:
        teacher.close()


def generate_with(
    root: Path,
    teacher: Teacher,
    teacher_config: TeacherConfig,
    prompts: Corpus,
    config: GenerateConfig,
    *,
    resume: str = "auto",
    log: Path | None = None,
) -> Dataset:
    """The same with a teacher that is already loaded."""
    engine = LocalEngine(teacher, load_tokenizer(teacher_config.model, teacher.info.revision))
    return run_job(root, GenerateJob(config, prompts), teacher_config, engine, resume=resume, log=log)


class GenerateJob:
    """Prompts that are to be continued; see `kdata.work.Job`."""

    doing, noun = "writing", "prompts"

    def __init__(self, config: GenerateConfig, prompts: Corpus) -> None:
        self.config, self.name = config, config.name
        self.keep: KeepConfig = config
        self._prompts = prompts

    @property
    def total(self) -> int:
        """Prompts in all."""
        return self._prompts.num_rows

    def source(self, facts: TeacherFacts) -> SourceInfo:
        """Everything that decides the rows."""
        config = self.config
        check_k(config, facts)
        own = config.model_dump(exclude={"prompts", "name", *KeepConfig.model_fields})
        settings = {**own, **config.settings(), "kind": config.kind, "context": facts.context}
        return SourceInfo(kind="generate", settings={**settings, "prompts": self._prompts.settings()}, num_units=None)

    def units(self, facts: TeacherFacts, tokenizer: Any) -> Iterator[WritingUnit]:
        """Prompts in their own order, `unit_prompts` at a time."""
        return writing_units(self._prompts, TextEncoder(tokenizer), self.config, facts.context)

    def perform(self, teacher: Teacher, tokenizer: Any, unit: WritingUnit) -> Unit:
        """Have one unit written."""
        return write_unit(teacher, unit, self.config, TextEncoder(tokenizer), tokenizer)


def writing_units(prompts: Corpus, encoder: TextEncoder, config: GenerateConfig, context: int) -> Iterator[WritingUnit]:
    """Cut prompts into units of `unit_prompts`; a prompt that leaves no room to write is refused."""
    unit = WritingUnit(0, samples=config.num_samples)
    room = context - max(config.sampling.min_tokens, 1)
    for document in prompts.documents():
        if unit.documents == config.unit_prompts:
            yield unit
            unit = WritingUnit(unit.number + 1, samples=config.num_samples)
        [(_, ids, _), *more] = encoder.pieces(document.text, 2**31)
        assert not more
        ids = ids[: len(ids) - len(encoder.suffix)]
        if len(ids) == 0:
            unit.rejects.append(Reject(document.id, document.domain, "empty", "the prompt has no token"))
        elif len(ids) > room:
            detail = f"the prompt has {len(ids):,} tokens, at most {room:,} leave room to write"
            unit.rejects.append(Reject(document.id, document.domain, "too_long", detail))
        else:
            unit.prompts.append((document, ids))
    if unit.documents:
        yield unit


def write_unit(
    teacher: Teacher, unit: WritingUnit, config: GenerateConfig, encoder: TextEncoder, tokenizer: Any
) -> Unit:
    """Have one unit written."""
    jobs = [(d, ids, n) for d, ids in unit.prompts for n in range(config.num_samples)]
    seeds = [sample_seed(config.seed, document.id, n) for document, _, n in jobs]
    completions = teacher.write([ids for _, ids, _ in jobs], config, config.sampling, seeds) if jobs else []
    records = [
        _record(document, number, completion, encoder, tokenizer)
        for (document, _, number), completion in zip(jobs, completions, strict=True)
    ]
    asked = [unread(d.id, d, ids, None, d.text) for d, ids in unit.prompts]
    return Unit(unit.number, records, unit.rejects, inputs=inputs_digest(asked))


def _record(document: Document, number: int, completion: Completion, encoder: TextEncoder, tokenizer: Any) -> Record:
    ids = completion.readout.token_ids
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    record = record_of(
        unread(f"{document.id}~{number}", document, ids, encoder.byte_lengths(ids), text), completion.readout
    )
    record.prompt = document.text
    record.finish_reason = completion.finish_reason
    return record


def sample_seed(seed: int, prompt_id: str, number: int) -> int:
    """A 63-bit seed for one sample, independent of every other and of the order of work."""
    digest = hashlib.blake2b(f"{seed}\0{prompt_id}\0{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
