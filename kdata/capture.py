"""Capture: a teacher reads existing text, and what it believed at every position goes into shards.

The corpus is cut into work units of about `unit_tokens` in its own order; a unit is one shard and one call of the
teacher, so a restart repeats exactly the calls that were not committed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from kdata.corpus import Corpus, CorpusConfig, Document, TextEncoder
from kdata.dataset import Dataset
from kdata.errors import ConfigError, TooLongError
from kdata.keep import KeepConfig
from kdata.schema import SourceInfo
from kdata.shard import Record, Reject, Unit
from kdata.teachers import Readout, Teacher, TeacherConfig, load_teacher, load_tokenizer
from kdata.work import LocalEngine, TeacherFacts, check_k, run_job


class CaptureConfig(KeepConfig):
    """What is read, and how much of it is kept."""

    corpus: CorpusConfig
    max_tokens: int | None = Field(None, ge=2, description="Longest sequence; null takes the teacher's context.")
    long_text: Literal["split", "reject", "refuse"] = Field(
        "split",
        description="A text longer than that: split into pieces DOC#0, DOC#1 ... read one by one; put aside in "
        "rejects; or refuse the run.",
    )
    append_eos: bool = Field(False, description="End every text with the tokenizer's end-of-sequence token.")
    unit_tokens: int = Field(32768, ge=1, description="Tokens of one work unit, which is one shard.")
    name: str = Field("capture", pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of the source; prefix of shards.")


@dataclass
class ReadingUnit:
    """Sequences that are read, committed and repeated together."""

    number: int
    sequences: list[Record] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    documents: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(len(s.token_ids) for s in self.sequences)

    @property
    def ids(self) -> list[str]:
        """Ids of the rows that it can become."""
        return [s.id for s in self.sequences]


def capture(
    root: Path,
    teacher_config: TeacherConfig,
    config: CaptureConfig,
    *,
    resume: str = "auto",
    log: Path | None = None,
) -> Dataset:
    """Read a corpus with a teacher and add it to the dataset at `root` (made when absent).

    Args:
        root: dataset folder.
        resume: auto, never or must; see `Writer`.
        log: JSONL file for progress.
    Raises:
        MismatchError: the dataset was begun with other settings.
        TooLongError: `long_text` is refuse and a text is too long.
        DataError: empty corpus, duplicate id.
    """
    corpus = Corpus(config.corpus)
    teacher = load_teacher(teacher_config, max_k=config.k)
    try:
        return capture_with(root, teacher, teacher_config, corpus, config, resume=resume, log=log)
    finally:
        teacher.close()


def capture_with(
    root: Path,
    teacher: Teacher,
    teacher_config: TeacherConfig,
    corpus: Corpus,
    config: CaptureConfig,
    *,
    resume: str = "auto",
    log: Path | None = None,
) -> Dataset:
    """The same with a teacher that is already loaded."""
    engine = LocalEngine(teacher, load_tokenizer(teacher_config.model, teacher.info.revision))
    return run_job(root, CaptureJob(config, corpus), teacher_config, engine, resume=resume, log=log)


class CaptureJob:
    """A corpus that is to be read; see `kdata.work.Job`."""

    doing, noun = "reading", "documents"

    def __init__(self, config: CaptureConfig, corpus: Corpus) -> None:
        self.config, self.name = config, config.name
        self.keep: KeepConfig = config
        self._corpus = corpus

    @property
    def total(self) -> int:
        """Documents in all."""
        return self._corpus.num_rows

    def source(self, facts: TeacherFacts) -> SourceInfo:
        """Everything that decides the rows."""
        config = self.config
        check_k(config, facts)
        own = config.model_dump(exclude={"corpus", "name", "max_tokens", *KeepConfig.model_fields})
        settings = {**own, **config.settings(), "kind": config.kind, "max_tokens": self._limit(facts)}
        return SourceInfo(kind="capture", settings={**settings, "corpus": self._corpus.settings()}, num_units=None)

    def _limit(self, facts: TeacherFacts) -> int:
        limit = self.config.max_tokens or facts.context
        if limit > facts.context:
            raise ConfigError(f"max_tokens={limit} exceeds what the teacher can read, {facts.context}; lower it")
        return limit

    def units(self, facts: TeacherFacts, tokenizer: Any) -> Iterator[ReadingUnit]:
        """The corpus in its own order; a unit closes with the document that reaches `unit_tokens`."""
        return reading_units(self._corpus, tokenizer, self.config, self._limit(facts))

    def perform(self, teacher: Teacher, tokenizer: Any, unit: ReadingUnit) -> Unit:
        """Have one unit read."""
        readouts = teacher.read([s.token_ids for s in unit.sequences], self.keep) if unit.sequences else []
        records = [record_of(s, r) for s, r in zip(unit.sequences, readouts, strict=True)]
        return Unit(unit.number, records, unit.rejects, inputs=inputs_digest(unit.sequences))


def record_of(sequence: Record, readout: Readout) -> Record:
    """Fill a record's distributions from a readout; every recorded position is a target."""
    sequence.target_mask = readout.rank > 0
    sequence.logprob, sequence.rank, sequence.log_tail = readout.logprob, readout.rank, readout.log_tail
    sequence.log_z, sequence.entropy, sequence.kept = readout.log_z, readout.entropy, readout.kept
    return sequence


def inputs_digest(sequences: list[Record]) -> str:
    """SHA-256 over ids and token ids, in order."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(sequence.id.encode() + b"\0" + sequence.token_ids.astype("<i4").tobytes())
    return digest.hexdigest()


def reading_units(corpus: Corpus, tokenizer: Any, config: CaptureConfig, limit: int) -> Iterator[ReadingUnit]:
    """Cut a corpus into units, deterministically: a unit closes with the document that reaches `unit_tokens`."""
    encoder = TextEncoder(tokenizer)
    eos = tokenizer.eos_token_id if config.append_eos else None
    if config.append_eos and eos is None:
        raise ConfigError("append_eos: the tokenizer has no end-of-sequence token")
    if limit < encoder.num_special + 2:
        raise ConfigError(f"max_tokens={limit} leaves no room for text beside {encoder.num_special} special tokens")
    unit = ReadingUnit(0)
    for document in corpus.documents():
        _add(unit, document, encoder, config, limit, eos)
        if unit.tokens >= config.unit_tokens:
            yield unit
            unit = ReadingUnit(unit.number + 1)
    if unit.documents:
        yield unit


def _add(
    unit: ReadingUnit,
    document: Document,
    encoder: TextEncoder,
    config: CaptureConfig,
    limit: int,
    eos: int | None,
) -> None:
    unit.documents += 1
    if not document.text.strip():
        unit.rejects.append(Reject(document.id, document.domain, "empty", "the text is empty"))
        return
    pieces = encoder.pieces(document.text, limit - (eos is not None))
    if len(pieces) > 1 and config.long_text != "split":
        detail = f"the text has {sum(len(p[1]) for p in pieces):,} tokens, the limit is {limit:,}"
        if config.long_text == "refuse":
            raise TooLongError(f"{document.id}: {detail}; set long_text to split or reject, or raise max_tokens")
        unit.rejects.append(Reject(document.id, document.domain, "too_long", detail))
        return
    for number, (text, ids, token_bytes) in enumerate(pieces):
        if eos is not None and number == len(pieces) - 1:
            ids, token_bytes = np.append(ids, np.int32(eos)), np.append(token_bytes, np.uint16(0))
        name = document.id if len(pieces) == 1 else f"{document.id}#{number}"
        if len(ids) < 2:
            unit.rejects.append(Reject(name, document.domain, "no_targets", "one token: nothing to predict"))
            continue
        unit.sequences.append(unread(name, document, ids, token_bytes, text))


def unread(name: str, document: Document, ids: np.ndarray, token_bytes: np.ndarray | None, text: str) -> Record:
    """A record whose distributions are still to come."""
    from kdata.codec import Kept

    nothing = np.zeros(0, np.float32)
    return Record(
        id=name,
        domain=document.domain,
        token_ids=ids,
        target_mask=np.zeros(0, bool),
        logprob=nothing,
        rank=np.zeros(0, np.int32),
        log_tail=nothing,
        kept=Kept.concatenate([]),
        text=text,
        token_bytes=token_bytes,
        origin=document.origin,
        license=document.license,
    )
