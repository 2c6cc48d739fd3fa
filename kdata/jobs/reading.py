"""Capture: a teacher reads existing text, and its distribution at every position goes into shards.

The corpus is cut into work units of about `unit_tokens` tokens, in the order of the corpus. A unit is one shard and one call
of the teacher, so a restart repeats exactly the calls that were not committed.

In a text every token but the first is a target. In a chat the targets are the tokens that the assistant wrote (`targets`).
Nothing is kept at other positions, and at some targets the teacher's numbers alone, where the setting `positions` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from kdata.calls import validated
from kdata.config import RowsConfig
from kdata.corpus.chat_template import ChatError, Targets, chat_encoder
from kdata.corpus.corpus import Corpus, CorpusConfig, Document
from kdata.corpus.encode import TextEncoder
from kdata.corpus.messages import as_json
from kdata.errors import ConfigError, TooLongError
from kdata.format.keep import KeepConfig
from kdata.format.keep_rules import KeepRole
from kdata.format.records import Record, Reject, RowError, UnitResult, inputs_digest, inputs_of
from kdata.format.rejects import checked
from kdata.format.schema import SourceInfo, content_hash
from kdata.jobs.bos import check_bos
from kdata.jobs.changes import StoredRow, digest
from kdata.jobs.corpus_job import CorpusJob, load_and_run, run_with
from kdata.jobs.job import TeacherFacts, check_k
from kdata.jobs.longest import ANY_ID, model_limit, work_of
from kdata.jobs.payloads import InputSequence, outcome_of, refuse_hopeless_unit, split_known
from kdata.store.dataset import Dataset
from kdata.teachers.base import OnTokens, Teacher, ignore_tokens
from kdata.teachers.config import TeacherConfig
from kdata.teachers.load import check_teacher
from kdata.teachers.model import load_tokenizer
from kdata.teachers.sizing import Work
from kdata.teachers.windows import each


class CaptureConfig(RowsConfig, KeepConfig):
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

    @model_validator(mode="after")
    def _rule_fits(self) -> CaptureConfig:
        rule = self.positions
        if rule is None:
            return self
        if rule.rule == "stored":
            raise ValueError("positions.rule stored is for `kdata reread`, which reads rows of a dataset")
        if isinstance(rule, KeepRole) and self.corpus.messages_column is None:
            raise ValueError("positions.rule role chooses among the messages of a chat: name a messages_column")
        read = self.corpus.domains
        unread = [domain for domain in rule.domains if read is not None and domain not in read]
        if unread:
            raise ValueError(f"positions.domains names {unread[0]!r}, which corpus.domains leaves out")
        return self

    @property
    def roles(self) -> list[str]:
        """Roles whose messages the rule `role` chooses; none with another rule."""
        return self.positions.roles if isinstance(self.positions, KeepRole) else []

    @property
    def when_long(self) -> Literal["split", "reject", "refuse"]:
        """`long_text`, resolved."""
        return self.long_text or ("reject" if self.corpus.messages_column else "split")

    @property
    def counted(self) -> Targets:
        """`targets`, resolved."""
        return self.targets or ("assistant" if self.corpus.messages_column else "all")


SequencesOf = Callable[[Document], list[InputSequence | Reject]]


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

    def add(self, parts: list[InputSequence | Reject]) -> None:
        """Add what one document became."""
        self.documents += 1
        self.sequences += [part for part in parts if not isinstance(part, Reject)]
        self.rejects += [part for part in parts if isinstance(part, Reject)]

    def reject(self, ids: set[str], reason: str, detail: str) -> None:
        """See `WorkUnit.reject`."""
        self.rejects += [Reject(s.id, s.domain, reason, detail) for s in self.sequences if s.id in ids]
        self.sequences = [s for s in self.sequences if s.id not in ids]


@validated
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
        MismatchError: the dataset was begun with other settings, or from another corpus of which nothing is left.
        TooLongError: `long_text` is refuse and a text is too long.
        DataError: empty corpus; `strict` is set and a row cannot be used.
    """
    job = CaptureJob(config, Corpus(config.corpus))
    return load_and_run(root, job, teacher_config, resume=resume, log=log)


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
    return run_with(root, CaptureJob(config, corpus), teacher, teacher_config, resume=resume, log=log)


class CaptureJob(CorpusJob[InputSequence, ReadingUnit]):
    """A corpus for a teacher to read; see `kdata.jobs.job.Job`."""

    doing, noun = "reading", "documents"
    columns = ("content_hash", "num_target_tokens", "text", "messages", "tools")
    renames = True
    config: CaptureConfig

    def work(self, teacher: TeacherConfig, *, look: bool = True) -> Work:
        """What the teacher is loaded for; `look`: at the texts, and not at the settings alone.

        Raises as `check_teacher` and `load_tokenizer`.
        """
        if not look:
            return Work(self.config.max_tokens, writes=False)
        check_teacher(teacher, max_k=self.keep.k, work=Work(1))  # before the tokenizer: that takes seconds
        of_huge = self._limit_of(teacher) if self.config.when_long == "split" else 0
        return work_of(self._corpus, teacher, lambda: self.lengths_of(teacher), writes=False, of_huge=of_huge)

    def lengths_of(self, teacher: TeacherConfig) -> Callable[[Document], list[int]]:
        """How many tokens the sequences of a document have. Raises as `load_tokenizer`, and TooLongError where texts do."""
        chats = self.config.corpus.messages_column is not None
        tokenizer = load_tokenizer(teacher.model, teacher.revision, bos=teacher.bos)
        _, sequences_of = (_chats if chats else _texts)(tokenizer, self.config, self._limit_of(teacher), ANY_ID)
        return lambda document: [len(s.token_ids) for s in sequences_of(document) if isinstance(s, InputSequence)]

    def _limit_of(self, teacher: TeacherConfig) -> int:
        """Tokens of the longest sequence, as far as that is known before the teacher is loaded."""
        return self.config.max_tokens or model_limit(teacher)

    def source(self, facts: TeacherFacts) -> SourceInfo:
        """The settings that determine the rows."""
        config = self.config
        check_k(config, facts)
        own = config.model_dump(exclude={"corpus", "name", "strict", "max_tokens", *KeepConfig.model_fields})
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

    def preparation(self, facts: TeacherFacts, tokenizer: Any) -> tuple[TextEncoder, SequencesOf]:
        """The encoder, and how a row becomes sequences or rejects."""
        prepare = _chats if self.config.corpus.messages_column else _texts
        return prepare(tokenizer, self.config, self._limit(facts), facts.vocab_size)

    def unit(self, number: int) -> ReadingUnit:
        """An empty unit."""
        return ReadingUnit(number)

    def is_full(self, unit: ReadingUnit) -> bool:
        """A unit closes with the document that reaches `unit_tokens`."""
        return unit.tokens >= self.config.unit_tokens

    def perform(
        self, teacher: Teacher, tokenizer: Any, unit: ReadingUnit, on_tokens: OnTokens = ignore_tokens
    ) -> UnitResult:
        """Have one unit read. Raises ConfigError where the first texts show that `teacher.bos` must be set."""
        if unit.number == 0 and self.config.corpus.messages_column is None:  # a chat begins as its template says
            check_bos(teacher, tokenizer, [s.token_ids for s in unit.sequences], self.keep)
        return checked(read_unit(teacher, self.keep, unit, on_tokens), self.strict)

    def rows_of(self, item: InputSequence) -> list[StoredRow]:
        """See `Followed`: of a text that is read everything but its labels decides the numbers."""
        targets = str(int(item.target_mask.sum()))
        kept_by = self.kept_by(item.id, item.domain)
        key = digest(content_hash(item.token_ids), targets, item.text, item.messages, item.tools, *kept_by)
        return [StoredRow(key, (item.id, item.domain, item.origin, item.license))]

    def stored_key(self, row: dict[str, Any]) -> bytes:
        """See `Followed`."""
        content = (row["content_hash"], str(row["num_target_tokens"]), row["text"], row["messages"], row["tools"])
        return digest(*content, *self.kept_by(row["id"], row["domain"]))

    def inputs_of(self, payload: pa.Table) -> str:
        """See `Followed`."""
        return inputs_of(payload)


def read_unit(teacher: Teacher, keep: KeepConfig, unit: ReadingUnit, on_tokens: OnTokens = ignore_tokens) -> UnitResult:
    """Have a unit's sequences read; a sequence at which the teacher fails becomes a reject.

    Raises TeacherError where it fails at every one of several sequences: then the sequences are not at fault.
    """
    sequences, rejects = split_known(unit.sequences, teacher.vocab_size)
    tokens = [s.token_ids for s in sequences]
    answers = each(lambda some: teacher.read([tokens[i] for i in some], keep, on_tokens), len(tokens))
    records: list[Record] = []
    for sequence, answer in zip(sequences, answers, strict=True):
        record = partial(sequence.record, rule=keep.positions)
        outcome = outcome_of(answer, record, sequence.id, sequence.domain, teacher.vocab_size)
        if isinstance(outcome, Reject):
            rejects.append(outcome)
        else:
            records.append(outcome)
    refuse_hopeless_unit(len(sequences), len(records), rejects)
    return UnitResult(unit.number, records, [*unit.rejects, *rejects], inputs=inputs_digest(unit.sequences))


def _texts(tokenizer: Any, config: CaptureConfig, limit: int, vocab_size: int) -> tuple[TextEncoder, SequencesOf]:
    """The encoder, and how a text becomes one sequence, several pieces, or a reject."""
    encoder = TextEncoder(tokenizer, vocab_size=vocab_size, special_tokens_in_text=config.corpus.spelled)
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
        try:
            pieces = encoder.pieces(document.text, limit, end=eos)
        except RowError as error:
            return [Reject(document.id, document.domain, error.reason, error.detail)]
        if len(pieces) > 1 and config.when_long != "split":
            return [_too_long(document, sum(len(ids) for _, ids, _ in pieces), limit, config)]
        names = [document.id] if len(pieces) == 1 else [f"{document.id}#{n}" for n in range(len(pieces))]
        return [
            InputSequence.of(name, document, ids, token_bytes, text)
            if len(ids) > 1
            else Reject(name, document.domain, "no_targets", "one token: nothing to predict")
            for name, (text, ids, token_bytes) in zip(names, pieces, strict=True)
        ]

    return encoder, sequences_of


def _chats(tokenizer: Any, config: CaptureConfig, limit: int, vocab_size: int) -> tuple[TextEncoder, SequencesOf]:
    """The encoder, and how a chat becomes one sequence, or a reject."""
    encoder = chat_encoder(tokenizer, config.corpus, vocab_size)

    def sequences_of(document: Document) -> list[InputSequence | Reject]:
        assert document.chat is not None
        if not document.chat.messages:
            return [Reject(document.id, document.domain, "empty", "the chat has no message")]
        try:
            chat = encoder.whole(document.chat, config.counted, tool_calls=config.tool_call_targets, roles=config.roles)
        except ChatError as error:
            return [Reject(document.id, document.domain, "template", str(error))]
        except RowError as error:
            return [Reject(document.id, document.domain, error.reason, error.detail)]
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
                chat.role_mask,
                messages=messages,
            )
        ]

    return encoder.texts, sequences_of


def _too_long(document: Document, tokens: int, limit: int, config: CaptureConfig) -> Reject:
    detail = f"the {'chat' if document.chat else 'text'} has {tokens:,} tokens, the limit is {limit:,}"
    if config.when_long == "refuse":
        others = "reject" if document.chat else "split or reject"
        raise TooLongError(f"{document.id}: {detail}; set long_text to {others}, or raise max_tokens")
    return Reject(document.id, document.domain, "too_long", detail)
