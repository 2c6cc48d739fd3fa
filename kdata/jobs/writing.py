"""Generate: a teacher writes text from prompts, and the distributions that it samples from are kept in the same pass.

Only written tokens are targets; the prompt is stored without distributions. Recorded is the raw distribution at temperature
1, whatever the sampling settings are, and also where a structured output forbids most of it; the settings are in
dataset.json. Seeds derive from the run's seed, the prompt's id and the number of the sample, so the same settings write the
same dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from kdata.corpus.chat_template import ChatError, chat_encoder, refuse_hopeless
from kdata.corpus.corpus import Corpus, CorpusConfig, Document
from kdata.corpus.encode import TextEncoder
from kdata.corpus.messages import as_json
from kdata.errors import TeacherError
from kdata.format.keep import KeepConfig
from kdata.format.records import Record, Reject, UnitResult, inputs_digest
from kdata.format.schema import SourceInfo
from kdata.jobs.bos import check_bos
from kdata.jobs.job import LocalEngine, TeacherFacts, check_k, devices_of, run_job
from kdata.jobs.payloads import InputSequence
from kdata.store.dataset import Dataset
from kdata.teachers.base import Completion, OnTokens, Teacher, ignore_tokens
from kdata.teachers.config import SamplingConfig, TeacherConfig
from kdata.teachers.load import load_teacher
from kdata.teachers.model import load_tokenizer
from kdata.teachers.windows import each


class GenerateConfig(KeepConfig):
    """What a teacher writes, and from which prompts."""

    prompts: CorpusConfig
    num_samples: int = Field(1, ge=1, description="Completions per prompt.")
    sampling: SamplingConfig = SamplingConfig()
    seed: int = Field(0, ge=0, description="Seed of the whole generation.")
    unit_prompts: int = Field(256, ge=1, description="Prompts of one work unit, which is one shard.")
    name: str = Field("generate", pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of the source; prefix of shards.")


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


def generate(
    root: Path | str,
    config: GenerateConfig,
    teacher_config: TeacherConfig,
    *,
    resume: str = "auto",
    log: Path | None = None,
) -> Dataset:
    """Write text from prompts and add it to the dataset at `root` (created if needed). Errors as in `capture`."""
    prompts = Corpus(config.prompts)
    teacher = load_teacher(teacher_config, max_k=config.k)
    try:
        return generate_with(root, teacher, teacher_config, prompts, config, resume=resume, log=log)
    finally:
        teacher.close()


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
    tokenizer = load_tokenizer(teacher_config.model, teacher.info.revision, bos=teacher_config.bos)
    engine = LocalEngine(teacher, tokenizer, devices_of(teacher_config))
    return run_job(root, GenerateJob(config, prompts), engine, resume=resume, log=log)


class GenerateJob:
    """Prompts for a teacher to continue; see `kdata.jobs.job.Job`."""

    doing, noun = "writing", "prompts"

    def __init__(self, config: GenerateConfig, prompts: Corpus) -> None:
        self.config, self.name = config, config.name
        self.keep: KeepConfig = config
        self._prompts = prompts

    def __getstate__(self) -> dict[str, Any]:
        """Without the prompts: another process gets units, and needs no more to perform them."""
        return {**self.__dict__, "_prompts": None}

    @property
    def total(self) -> int | None:
        """Prompts in all; None where that is not known."""
        return self._prompts.num_rows

    def source(self, facts: TeacherFacts) -> SourceInfo:
        """The settings that determine the rows."""
        config = self.config
        check_k(config, facts)
        own = config.model_dump(exclude={"prompts", "name", *KeepConfig.model_fields})
        settings = {**own, **config.settings(), "kind": config.kind, "context": facts.context}
        return SourceInfo(kind="generate", settings={**settings, "prompts": self._prompts.settings()}, num_units=None)

    def units(self, facts: TeacherFacts, tokenizer: Any) -> Iterator[WritingUnit]:
        """Prompts in their own order, `unit_prompts` at a time."""
        return writing_units(self._prompts, tokenizer, self.config, facts.context)

    def perform(
        self, teacher: Teacher, tokenizer: Any, unit: WritingUnit, on_tokens: OnTokens = ignore_tokens
    ) -> UnitResult:
        """Have one unit written. Raises ConfigError where the first prompts show that `teacher.bos` must be set."""
        if unit.number == 0 and self.config.prompts.messages_column is None:  # a chat begins as its template says
            check_bos(teacher, tokenizer, [prompt.token_ids for prompt in unit.prompts], self.keep)
        return write_unit(teacher, unit, self.config, tokenizer, on_tokens)


def writing_units(prompts: Corpus, tokenizer: Any, config: GenerateConfig, context: int) -> Iterator[WritingUnit]:
    """Cut prompts into units of `unit_prompts`; a prompt that the template refuses or that leaves no room is a reject."""
    prompt_of = _chats(tokenizer, config) if config.prompts.messages_column else _texts(tokenizer)
    samples, longest = config.num_samples, config.sampling.max_tokens
    unit = WritingUnit(0, samples=samples, max_tokens=longest)
    room = context - max(config.sampling.min_tokens, 1)
    for document in prompts.documents():
        if unit.documents == config.unit_prompts:
            yield _checked(unit)
            unit = WritingUnit(unit.number + 1, samples=samples, max_tokens=longest)
        prompt = prompt_of(document)
        if isinstance(prompt, Reject):
            unit.rejects.append(prompt)
        elif len(prompt.token_ids) == 0:
            unit.rejects.append(Reject(document.id, document.domain, "empty", "the prompt has no token"))
        elif len(prompt.token_ids) > room:
            detail = f"the prompt has {len(prompt.token_ids):,} tokens, at most {room:,} leave room to write"
            unit.rejects.append(Reject(document.id, document.domain, "too_long", detail))
        else:
            unit.prompts.append(prompt)
    if unit.documents:
        yield _checked(unit)


def _checked(unit: WritingUnit) -> WritingUnit:
    if unit.number == 0:
        refuse_hopeless(len(unit.prompts), unit.rejects)
    return unit


def _texts(tokenizer: Any) -> Callable[[Document], Prompt | Reject]:
    """A text as a prompt: with the special tokens before it, without those after it."""
    encoder = TextEncoder(tokenizer)

    def prompt_of(document: Document) -> Prompt:
        [(text, ids, _)] = encoder.pieces(document.text, 2**31)
        return Prompt(document, text, ids[: len(ids) - len(encoder.suffix)])

    return prompt_of


def _chats(tokenizer: Any, config: GenerateConfig) -> Callable[[Document], Prompt | Reject]:
    """A chat as a prompt: up to where the assistant begins its turn."""
    encoder = chat_encoder(tokenizer, config.prompts)

    def prompt_of(document: Document) -> Prompt | Reject:
        assert document.chat is not None
        if not document.chat.messages:
            return Reject(document.id, document.domain, "empty", "the chat has no message")
        try:
            chat = encoder.prompt(document.chat)
        except ChatError as error:
            return Reject(document.id, document.domain, "template", str(error))
        return Prompt(document, chat.text, chat.token_ids, chat.token_bytes)

    return prompt_of


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

    encoder, records, rejects = TextEncoder(tokenizer), [], list(unit.rejects)
    answers = each(ask, len(jobs))
    for (prompt, number), answer in zip(jobs, answers, strict=True):
        document = prompt.document
        if isinstance(answer, TeacherError):
            rejects.append(Reject(f"{document.id}~{number}", document.domain, "teacher_failed", str(answer)))
        else:
            records.append(_record(prompt, number, answer, config.sampling, encoder, tokenizer))
    return UnitResult(unit.number, records, rejects, inputs=inputs_digest(unit.prompts))


def _record(
    prompt: Prompt, number: int, completion: Completion, sampling: SamplingConfig, encoder: TextEncoder, tokenizer: Any
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
    return sequence.record(completion.readout)


def _decode(tokenizer: Any, ids: np.ndarray, *, special: bool) -> str:
    return tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)


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
