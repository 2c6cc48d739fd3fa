"""Generate: a teacher writes text from prompts, and the distributions that it samples from are kept in the same pass.

Only written tokens are targets; the prompt is stored without distributions. Recorded is the raw distribution at temperature
1, whatever the sampling settings are, and also where a structured output forbids most of it; the settings are in
dataset.json. Seeds derive from the run's seed, the prompt's id and the number of the sample, so the same settings write the
same dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from kdata.calls import validated
from kdata.config import RowsConfig
from kdata.corpus.chat_template import ChatError, chat_encoder
from kdata.corpus.corpus import Corpus, CorpusConfig, Document
from kdata.corpus.encode import TextEncoder
from kdata.corpus.messages import as_json
from kdata.errors import ConfigError
from kdata.format.json_text import parse_row
from kdata.format.keep import KeepConfig
from kdata.format.keep_rules import KeepRole, KeepRule, KeepSpan
from kdata.format.records import Record, Reject, RowError, UnitResult, digest_of, inputs_digest
from kdata.format.rejects import checked
from kdata.format.schema import SourceInfo
from kdata.jobs.bos import check_bos
from kdata.jobs.changes import StoredRow, digest
from kdata.jobs.corpus_job import CorpusJob, load_and_run, run_with
from kdata.jobs.job import TeacherFacts, check_k
from kdata.jobs.longest import ANY_ID, model_limit, work_of
from kdata.jobs.payloads import InputSequence, outcome_of, refuse_hopeless_unit, tools_json
from kdata.store.dataset import Dataset
from kdata.teachers.base import Completion, OnTokens, Teacher, ignore_tokens
from kdata.teachers.config import SamplingConfig, TeacherConfig
from kdata.teachers.load import check_teacher
from kdata.teachers.model import load_tokenizer
from kdata.teachers.sizing import ANY_WORK, Work
from kdata.teachers.windows import each


class GenerateConfig(RowsConfig, KeepConfig):
    """What a teacher writes, and from which prompts."""

    prompts: CorpusConfig
    num_samples: int = Field(1, ge=1, description="Completions per prompt.")
    sampling: SamplingConfig = SamplingConfig()
    seed: int = Field(0, ge=0, description="Seed of the whole generation.")
    unit_prompts: int = Field(256, ge=1, description="Prompts of one work unit, which is one shard.")
    name: str = Field("generate", pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of the source; prefix of shards.")

    @model_validator(mode="after")
    def _rule_fits(self) -> GenerateConfig:
        rule = self.positions
        if rule is not None and rule.rule == "stored":
            raise ValueError("positions.rule stored is for `kdata reread`, which reads rows of a dataset")
        if isinstance(rule, KeepRole) and "assistant" not in rule.roles:
            raise ValueError(
                f"positions.roles is {rule.roles}, and all that is written is of role assistant: nothing would be kept"
            )
        return self


@dataclass(frozen=True)
class Prompt:
    """A row that is to be continued: its text (of a chat: as the template renders it), and token ids int32 [T].

    token_bytes: of a chat, uint16 [T], see `EncodedChat`; else None.
    """

    document: Document
    text: str
    token_ids: np.ndarray
    token_bytes: np.ndarray | None = None

    @property
    def id(self) -> str:
        """Id of the row."""
        return self.document.id

    @property
    def domain(self) -> str:
        """Domain of the row."""
        return self.document.domain


@dataclass
class WritingUnit:
    """Prompts that are continued, committed and repeated together; see `WorkUnit`."""

    number: int
    prompts: list[Prompt] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    samples: int = 1
    max_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Largest number of tokens that may be written."""
        return len(self.prompts) * self.samples * self.max_tokens

    @property
    def ids(self) -> list[str]:
        """Ids of the rows that it can become."""
        return [f"{prompt.document.id}~{n}" for prompt in self.prompts for n in range(self.samples)]

    @property
    def documents(self) -> int:
        """Prompts in all, refused ones too."""
        return len(self.prompts) + len(self.rejects)

    def add(self, parts: list[Prompt | Reject]) -> None:
        """Add what one row of the prompts became."""
        self.prompts += [part for part in parts if not isinstance(part, Reject)]
        self.rejects += [part for part in parts if isinstance(part, Reject)]

    def reject(self, ids: set[str], reason: str, detail: str) -> None:
        """See `WorkUnit.reject`."""
        refused = {p.id: p.domain for p in self.prompts if any(f"{p.id}~{n}" in ids for n in range(self.samples))}
        self.prompts = [p for p in self.prompts if p.id not in refused]
        self.rejects += [Reject(prompt, domain, reason, detail) for prompt, domain in refused.items()]


@validated
def generate(
    root: Path | str,
    config: GenerateConfig,
    teacher_config: TeacherConfig,
    *,
    resume: str = "auto",
    log: Path | None = None,
) -> Dataset:
    """Write text from prompts and add it to the dataset at `root` (created if needed). Errors as in `capture`."""
    job = GenerateJob(config, Corpus(config.prompts))
    return load_and_run(root, job, teacher_config, resume=resume, log=log)


def generate_with(
    root: Path | str,
    teacher: Teacher,
    teacher_config: TeacherConfig,
    prompts: Corpus,
    config: GenerateConfig,
    *,
    resume: str = "auto",
    log: Path | None = None,
) -> Dataset:
    """As `generate`, with a teacher that is already loaded."""
    return run_with(root, GenerateJob(config, prompts), teacher, teacher_config, resume=resume, log=log)


class GenerateJob(CorpusJob[Prompt, WritingUnit]):
    """Prompts for a teacher to continue; see `kdata.jobs.job.Job`."""

    doing, noun = "writing", "prompts"
    columns = ("prompt", "messages", "tools")
    renames = False  # the seed of a sample depends on the id
    config: GenerateConfig

    def work(self, teacher: TeacherConfig, *, look: bool = True) -> Work:
        """What the teacher is loaded for; `look`: at the prompts, and not at the settings alone.

        Raises as `check_teacher` and `load_tokenizer`.
        """
        if not look:
            return ANY_WORK
        check_teacher(teacher, max_k=self.keep.k, work=Work(1))  # before the tokenizer: that takes seconds
        more = self.config.sampling.max_tokens
        return work_of(self._corpus, teacher, lambda: self.lengths_of(teacher), writes=True, of_huge=0, more=more)

    def lengths_of(self, teacher: TeacherConfig) -> Callable[[Document], list[int]]:
        """How many tokens a prompt has; empty for one that is refused. Raises as `load_tokenizer`."""
        tokenizer = load_tokenizer(teacher.model, teacher.revision, bos=teacher.bos)
        _, prompt_of = (_chats if self.config.prompts.messages_column else _texts)(tokenizer, self.config, ANY_ID)
        room = self._room(model_limit(teacher))

        def lengths(document: Document) -> list[int]:
            prompt = prompt_of(document)
            return [] if isinstance(prompt, Reject) or len(prompt.token_ids) > room else [len(prompt.token_ids)]

        return lengths

    def source(self, facts: TeacherFacts) -> SourceInfo:
        """The settings that determine the rows."""
        config = self.config
        check_k(config, facts)
        own = config.model_dump(exclude={"prompts", "name", "strict", *KeepConfig.model_fields})
        settings = {**own, **config.settings(), "kind": config.kind, "context": facts.context}
        return SourceInfo(kind="generate", settings={**settings, "prompts": self._corpus.settings()}, num_units=None)

    def preparation(
        self, facts: TeacherFacts, tokenizer: Any
    ) -> tuple[TextEncoder, Callable[[Document], list[Prompt | Reject]]]:
        """The encoder, and how a row becomes a prompt; one that the template refuses or that leaves no room is a reject."""
        config = self.config
        texts, prompt_of = (_chats if config.prompts.messages_column else _texts)(tokenizer, config, facts.vocab_size)
        if isinstance(config.positions, KeepSpan) and texts.byte_lengths(np.zeros(0, np.int32)) is None:
            raise ConfigError(
                "positions.rule span finds tokens by the bytes that they stand for, and with this tokenizer those of a text "
                "that is written depend on the text; use the rule entropy, role or random"
            )
        room = self._room(facts.context)

        def prompts_of(document: Document) -> list[Prompt | Reject]:
            prompt = prompt_of(document)
            if isinstance(prompt, Reject):
                return [prompt]
            if len(prompt.token_ids) == 0:
                return [Reject(document.id, document.domain, "empty", "the prompt has no token")]
            if len(prompt.token_ids) > room:
                detail = f"the prompt has {len(prompt.token_ids):,} tokens, at most {room:,} leave room to write"
                return [Reject(document.id, document.domain, "too_long", detail)]
            return [prompt]

        return texts, prompts_of

    def _room(self, context: int) -> int:
        """Tokens of the longest prompt that can be continued."""
        return context - max(self.config.sampling.min_tokens, 1)

    def unit(self, number: int) -> WritingUnit:
        """An empty unit."""
        return WritingUnit(number, samples=self.config.num_samples, max_tokens=self.config.sampling.max_tokens)

    def is_full(self, unit: WritingUnit) -> bool:
        """A unit holds `unit_prompts` prompts, refused ones too."""
        return unit.documents >= self.config.unit_prompts

    def perform(
        self, teacher: Teacher, tokenizer: Any, unit: WritingUnit, on_tokens: OnTokens = ignore_tokens
    ) -> UnitResult:
        """Have one unit written. Raises ConfigError where the first prompts show that `teacher.bos` must be set."""
        if unit.number == 0 and self.config.prompts.messages_column is None:  # a chat begins as its template says
            check_bos(teacher, tokenizer, [prompt.token_ids for prompt in unit.prompts], self.keep)
        return checked(write_unit(teacher, unit, self.config, tokenizer, on_tokens), self.strict)

    def rows_of(self, item: Prompt) -> list[StoredRow]:
        """See `Followed`: prompt and id decide what is written, as the seed of a sample follows from the id."""
        document = item.document
        chat = (as_json(document.chat.messages), tools_json(document)) if document.chat else (None, None)
        names = [f"{document.id}~{n}" for n in range(self.config.num_samples)]
        about = (document.domain, document.origin, document.license)
        return [
            StoredRow(digest(name, item.text, *chat, *self.kept_by(name, document.domain)), (name, *about))
            for name in names
        ]

    def stored_key(self, row: dict[str, Any]) -> bytes:
        """See `Followed`: the last message of a chat is what the teacher wrote."""
        messages = None if row["messages"] is None else as_json(parse_row(row["messages"])[:-1])
        return digest(row["id"], row["prompt"], messages, row["tools"], *self.kept_by(row["id"], row["domain"]))

    def inputs_of(self, payload: pa.Table) -> str:
        """See `Followed`: the digest is of the prompts, each once, up to the first token that was written."""
        prompts: dict[str, np.ndarray] = {}
        columns = (payload[name] for name in ("id", "input_ids", "target_mask"))
        for row_id, token_ids, target_mask in zip(*columns, strict=True):
            start = target_mask.as_py().index(True)
            prompts.setdefault(row_id.as_py().rpartition("~")[0], token_ids.values.to_numpy()[:start])
        return digest_of(prompts.items())


PromptOf = Callable[[Document], Prompt | Reject]


def _texts(tokenizer: Any, config: GenerateConfig, vocab_size: int) -> tuple[TextEncoder, PromptOf]:
    """The encoder, and how a text becomes a prompt: with the special tokens before it, without those after it."""
    encoder = TextEncoder(tokenizer, vocab_size=vocab_size, special_tokens_in_text=config.prompts.spelled)

    def prompt_of(document: Document) -> Prompt | Reject:
        try:
            return Prompt(document, document.text, encoder.prompt(document.text))
        except RowError as error:
            return Reject(document.id, document.domain, error.reason, error.detail)

    return encoder, prompt_of


def _chats(tokenizer: Any, config: GenerateConfig, vocab_size: int) -> tuple[TextEncoder, PromptOf]:
    """The encoder, and how a chat becomes a prompt: up to where the assistant begins its turn."""
    encoder = chat_encoder(tokenizer, config.prompts, vocab_size)

    def prompt_of(document: Document) -> Prompt | Reject:
        assert document.chat is not None
        if not document.chat.messages:
            return Reject(document.id, document.domain, "empty", "the chat has no message")
        try:
            chat = encoder.prompt(document.chat)
        except ChatError as error:
            return Reject(document.id, document.domain, "template", str(error))
        except RowError as error:
            return Reject(document.id, document.domain, error.reason, error.detail)
        return Prompt(document, chat.text, chat.token_ids, chat.token_bytes)

    return encoder.texts, prompt_of


def write_unit(
    teacher: Teacher,
    unit: WritingUnit,
    config: GenerateConfig,
    tokenizer: Any,
    on_tokens: OnTokens = ignore_tokens,
) -> UnitResult:
    """Have one unit written; a prompt at which the teacher fails becomes a reject."""
    jobs = [(prompt, n) for prompt in unit.prompts for n in range(config.num_samples)]
    seeds = [sample_seed(config.seed, prompt.document.id, n) for prompt, n in jobs]

    def ask(some: list[int]) -> list[Completion]:
        prompts = [jobs[i][0].token_ids for i in some]
        return teacher.write(prompts, config, config.sampling, [seeds[i] for i in some], on_tokens)

    encoder = TextEncoder(tokenizer)
    records: list[Record] = []
    rejects: list[Reject] = []
    answers = each(ask, len(jobs))
    for (prompt, number), answer in zip(jobs, answers, strict=True):
        record = partial(_record, prompt, number, config.sampling, encoder, tokenizer, config.positions)
        row_id = f"{prompt.id}~{number}"
        outcome = outcome_of(answer, record, row_id, prompt.domain, teacher.vocab_size)
        if isinstance(outcome, Reject):
            rejects.append(outcome)
        else:
            records.append(outcome)
    refuse_hopeless_unit(len(jobs), len(records), rejects)
    return UnitResult(unit.number, records, [*unit.rejects, *rejects], inputs=inputs_digest(unit.prompts))


def _record(
    prompt: Prompt,
    number: int,
    sampling: SamplingConfig,
    encoder: TextEncoder,
    tokenizer: Any,
    rule: KeepRule | None,
    completion: Completion,
) -> Record:
    ids, start, document = completion.readout.token_ids, completion.num_prompt_tokens, prompt.document
    text, token_bytes, messages = _decode(tokenizer, ids, special=False), encoder.byte_lengths(ids), None
    if document.chat is not None:
        # The text of a chat holds the special tokens, as the prompt does: a capture of the same chat stores the same.
        text = prompt.text + _text_from(tokenizer, ids, start, special=True)
        written = encoder.byte_lengths(ids[start:], special=True)
        token_bytes = None if written is None else np.concatenate([prompt.token_bytes, written])
        reply = _before_stop(_text_from(tokenizer, ids, start, special=False), sampling.stop)
        messages = as_json([*document.chat.messages, {"role": "assistant", "content": reply}])
    sequence = InputSequence.of(
        f"{document.id}~{number}",
        document,
        ids,
        token_bytes,
        text,
        np.arange(len(ids)) >= start,
        messages=messages,
        prompt=prompt.text,
        finish_reason=completion.finish_reason,
    )
    return sequence.record(completion.readout, rule)


def _decode(tokenizer: Any, ids: np.ndarray, *, special: bool) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    return text


def _text_from(tokenizer: Any, ids: np.ndarray, start: int, *, special: bool) -> str:
    """Text of the tokens from `start` on, cut from the whole text: some decoders drop a space at the start of a text."""
    whole, before = (_decode(tokenizer, part, special=special) for part in (ids, ids[:start]))
    return whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, ids[start:], special=special)


def _before_stop(text: str, stops: list[str]) -> str:
    """A reply without the stop string that ended it, and without the rest of the last token."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def sample_seed(seed: int, prompt_id: str, number: int) -> int:
    """A 63-bit seed for one sample, independent of every other and of the order of work."""
    digest = hashlib.blake2b(f"{seed}\0{prompt_id}\0{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
