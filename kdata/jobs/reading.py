"""Capture: a teacher reads existing text, and its distribution at every position goes into shards.

The corpus is cut into work units of about `unit_tokens` tokens, in the order of the corpus. A unit is one shard and one call
of the teacher, so a restart repeats exactly the calls that were not committed.

In a text every token but the first is a target. In a chat the targets are the tokens that the assistant wrote (`targets`).
Nothing is kept at other positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from kdata.corpus.chat_template import ChatError, Targets, chat_encoder, refuse_hopeless
from kdata.corpus.corpus import Corpus, CorpusConfig, Document
from kdata.corpus.encode import TextEncoder
from kdata.corpus.messages import as_json
from kdata.errors import ConfigError, TeacherError, TooLongError
from kdata.format.keep import KeepConfig
from kdata.format.records import Reject, UnitResult, inputs_digest
from kdata.format.schema import SourceInfo
from kdata.jobs.bos import check_bos
from kdata.jobs.job import LocalEngine, TeacherFacts, check_k, devices_of, run_job
from kdata.jobs.payloads import InputSequence
from kdata.store.dataset import Dataset
from kdata.teachers.base import OnTokens, Teacher, ignore_tokens
from kdata.teachers.config import TeacherConfig
from kdata.teachers.load import load_teacher
from kdata.teachers.model import load_tokenizer
from kdata.teachers.windows import each


class CaptureConfig(KeepConfig):
    """What a teacher reads, and how much of its distributions is kept."""

    corpus: CorpusConfig
    max_tokens: int | None = Field(None, ge=2, description="Longest sequence; null takes the teacher's context.")
    long_text: Literal["split", "reject", "refuse"] | None = Field(
        None,
        description="A text longer than that: split into pieces DOC#0, DOC#1 ... read one by one; put aside in "
        "rejects; or refuse the run. null splits texts and rejects chats, whose pieces would be no chats.",
    )
    targets: Targets | None = Field(
        None,
        description="Tokens of a chat that count, and of which anything is kept: all; those of the assistant's turns with "
        "their end-of-turn tokens (assistant); or of its last turn (last_assistant). null: assistant for chats; of a text "
        "all count.",
    )
    tool_call_targets: bool = Field(
        True,
        description="Tool calls that the assistant writes count too; false leaves them out, to the end of the turn.",
    )
    append_eos: bool = Field(False, description="End every text with the tokenizer's end-of-sequence token.")
    unit_tokens: int = Field(32768, ge=1, description="Tokens of one work unit, which is one shard.")
    name: str = Field("capture", pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of the source; prefix of shards.")

    @model_validator(mode="after")
    def _chats_and_texts(self) -> CaptureConfig:
        if self.corpus.messages_column is None:
            if self.targets not in (None, "all") or not self.tool_call_targets:
                raise ValueError(
                    "targets and tool_call_targets choose among the turns of a chat: name a messages_column"
                )
        elif self.long_text == "split":
            raise ValueError("long_text=split: the pieces of a chat are no chats; reject or refuse long ones")
        elif self.append_eos:
            raise ValueError("append_eos: the chat template ends the turns of a chat itself; leave it away")
        return self

    @property
    def when_long(self) -> Literal["split", "reject", "refuse"]:
        """`long_text`, resolved."""
        return self.long_text or ("reject" if self.corpus.messages_column else "split")

    @property
    def counted(self) -> Targets:
        """`targets`, resolved."""
        return self.targets or ("assistant" if self.corpus.messages_column else "all")


@dataclass
class ReadingUnit:
    """Sequences that are read, committed and repeated together; see `WorkUnit`."""

    number: int
    sequences: list[InputSequence] = field(default_factory=list)
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
    root: Path | str,
    config: CaptureConfig,
    teacher_config: TeacherConfig,
    *,
    resume: str = "auto",
    log: Path | None = None,
) -> Dataset:
    """Read a corpus with a teacher and add it to the dataset at `root` (made when absent).

        kdata.capture("out", CaptureConfig(corpus=CorpusConfig(path="texts.parquet")), TeacherConfig(model="MODEL"))

    Args:
        root: dataset folder, or a URL.
        config: the corpus, what is kept of each distribution, and how texts are cut.
        teacher_config: the model, and what runs it.
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
    root: Path | str,
    teacher: Teacher,
    teacher_config: TeacherConfig,
    corpus: Corpus,
    config: CaptureConfig,
    *,
    resume: str = "auto",
    log: Path | None = None,
) -> Dataset:
    """As `capture`, with a teacher that is already loaded."""
    tokenizer = load_tokenizer(teacher_config.model, teacher.info.revision, bos=teacher_config.bos)
    engine = LocalEngine(teacher, tokenizer, devices_of(teacher_config))
    return run_job(root, CaptureJob(config, corpus), engine, resume=resume, log=log)


class CaptureJob:
    """A corpus for a teacher to read; see `kdata.jobs.job.Job`."""

    doing, noun = "reading", "documents"

    def __init__(self, config: CaptureConfig, corpus: Corpus) -> None:
        self.config, self.name = config, config.name
        self.keep: KeepConfig = config
        self._corpus = corpus

    def __getstate__(self) -> dict[str, Any]:
        """Without the corpus: another process gets units, and needs no more to perform them."""
        return {**self.__dict__, "_corpus": None}

    @property
    def total(self) -> int | None:
        """Documents in all; None where that is not known."""
        return self._corpus.num_rows

    def source(self, facts: TeacherFacts) -> SourceInfo:
        """The settings that determine the rows."""
        config = self.config
        check_k(config, facts)
        own = config.model_dump(exclude={"corpus", "name", "max_tokens", *KeepConfig.model_fields})
        resolved = {"long_text": config.when_long, "targets": config.counted, "max_tokens": self._limit(facts)}
        settings = {**own, **config.settings(), "kind": config.kind, **resolved}
        return SourceInfo(kind="capture", settings={**settings, "corpus": self._corpus.settings()}, num_units=None)

    def _limit(self, facts: TeacherFacts) -> int:
        limit = self.config.max_tokens or facts.context
        if limit > facts.context:
            raise ConfigError(
                f"max_tokens={limit} exceeds what the teacher can read, {facts.context} tokens; lower max_tokens, or leave "
                "it at null"
            )
        return limit

    def units(self, facts: TeacherFacts, tokenizer: Any) -> Iterator[ReadingUnit]:
        """The corpus in its own order; a unit closes with the document that reaches `unit_tokens`."""
        return reading_units(self._corpus, tokenizer, self.config, self._limit(facts))

    def perform(
        self, teacher: Teacher, tokenizer: Any, unit: ReadingUnit, on_tokens: OnTokens = ignore_tokens
    ) -> UnitResult:
        """Have one unit read. Raises ConfigError where the first texts show that `teacher.bos` must be set."""
        if unit.number == 0 and self.config.corpus.messages_column is None:  # a chat begins as its template says
            check_bos(teacher, tokenizer, [s.token_ids for s in unit.sequences], self.keep)
        return read_unit(teacher, self.keep, unit, on_tokens)


def read_unit(teacher: Teacher, keep: KeepConfig, unit: ReadingUnit, on_tokens: OnTokens = ignore_tokens) -> UnitResult:
    """Have a unit's sequences read; a sequence at which the teacher fails becomes a reject."""
    tokens = [s.token_ids for s in unit.sequences]
    answers = each(lambda some: teacher.read([tokens[i] for i in some], keep, on_tokens), len(tokens))
    records, rejects = [], list(unit.rejects)
    for sequence, answer in zip(unit.sequences, answers, strict=True):
        if isinstance(answer, TeacherError):
            rejects.append(Reject(sequence.id, sequence.domain, "teacher_failed", str(answer)))
        else:
            records.append(sequence.record(answer))
    return UnitResult(unit.number, records, rejects, inputs=inputs_digest(unit.sequences))


def reading_units(corpus: Corpus, tokenizer: Any, config: CaptureConfig, limit: int) -> Iterator[ReadingUnit]:
    """Cut a corpus into units, deterministically: a unit closes with the document that reaches `unit_tokens`."""
    sequences_of = (
        _chats(tokenizer, config, limit) if config.corpus.messages_column else _texts(tokenizer, config, limit)
    )
    unit = ReadingUnit(0)
    for document in corpus.documents():
        unit.documents += 1
        for sequence in sequences_of(document):
            if isinstance(sequence, Reject):
                unit.rejects.append(sequence)
            else:
                unit.sequences.append(sequence)
        if unit.tokens >= config.unit_tokens:
            yield unit
            unit = ReadingUnit(unit.number + 1)
    if unit.number == 0:
        refuse_hopeless(len(unit.sequences), unit.rejects)
    if unit.documents:
        yield unit


SequencesOf = Callable[[Document], list[InputSequence | Reject]]


def _texts(tokenizer: Any, config: CaptureConfig, limit: int) -> SequencesOf:
    """How a text becomes one sequence, several pieces, or a reject."""
    encoder = TextEncoder(tokenizer)
    eos = tokenizer.eos_token_id if config.append_eos else None
    if config.append_eos and eos is None:
        raise ConfigError("append_eos: the tokenizer has no end-of-sequence token; leave append_eos at false")
    if limit < encoder.num_special + 2:
        raise ConfigError(
            f"max_tokens={limit} leaves no room for text beside {encoder.num_special} special tokens; raise max_tokens"
        )

    def sequences_of(document: Document) -> list[InputSequence | Reject]:
        if not document.text.strip():
            return [Reject(document.id, document.domain, "empty", "the text is empty")]
        pieces = encoder.pieces(document.text, limit - (eos is not None))
        if len(pieces) > 1 and config.when_long != "split":
            return [_too_long(document, sum(len(ids) for _, ids, _ in pieces), limit, config)]
        if eos is not None:
            text, ids, token_bytes = pieces[-1]
            pieces[-1] = text, np.append(ids, np.int32(eos)), np.append(token_bytes, np.uint16(0))
        names = [document.id] if len(pieces) == 1 else [f"{document.id}#{n}" for n in range(len(pieces))]
        return [
            InputSequence.of(name, document, ids, token_bytes, text)
            if len(ids) > 1
            else Reject(name, document.domain, "no_targets", "one token: nothing to predict")
            for name, (text, ids, token_bytes) in zip(names, pieces, strict=True)
        ]

    return sequences_of


def _chats(tokenizer: Any, config: CaptureConfig, limit: int) -> SequencesOf:
    """How a chat becomes one sequence, or a reject."""
    encoder = chat_encoder(tokenizer, config.corpus)

    def sequences_of(document: Document) -> list[InputSequence | Reject]:
        assert document.chat is not None
        if not document.chat.messages:
            return [Reject(document.id, document.domain, "empty", "the chat has no message")]
        try:
            chat = encoder.whole(document.chat, config.counted, tool_calls=config.tool_call_targets)
        except ChatError as error:
            return [Reject(document.id, document.domain, "template", str(error))]
        if len(chat.token_ids) > limit:
            return [_too_long(document, len(chat.token_ids), limit, config)]
        if not chat.target_mask.any():
            return [
                Reject(document.id, document.domain, "no_targets", f"no token of it counts (targets: {config.counted})")
            ]
        messages = as_json(document.chat.messages)
        return [
            InputSequence.of(
                document.id,
                document,
                chat.token_ids,
                chat.token_bytes,
                chat.text,
                chat.target_mask,
                messages=messages,
            )
        ]

    return sequences_of


def _too_long(document: Document, tokens: int, limit: int, config: CaptureConfig) -> Reject:
    detail = f"the {'chat' if document.chat else 'text'} has {tokens:,} tokens, the limit is {limit:,}"
    if config.when_long == "refuse":
        others = "reject" if document.chat else "split or reject"
        raise TooLongError(f"{document.id}: {detail}; set long_text to {others}, or raise max_tokens")
    return Reject(document.id, document.domain, "too_long", detail)
