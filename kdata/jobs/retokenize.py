"""Retokenize: a dataset for students with another tokenizer, from the stored beliefs alone.

The text of each row is tokenized again and aligned with the teacher's tokens by bytes (`kdata.corpus.align`). The tokens of
both have to spell the text, byte by byte: a tokenizer that changes texts (lower case, other signs, no spaces) has its rows
refused where it does. What the result holds at the student's tokens:

- **Entries** where a token of the student begins at the byte where one of the teacher begins, and ends no later. The
  teacher's ids become the student's (`kdata.store.token_map`), and probabilities that meet in one id are summed. The
  teacher's actual token becomes the student's actual token, whatever its text alone would become.
- **Entries inside of tokens** (`inside`, ours): where a token of the student begins behind the first bytes of one
  of the teacher and ends no later, the teacher's belief is what it believed of the tokens that begin with these bytes and
  go on: their weights, divided by their sum, and each as the student's token for the bytes that are left. From exact
  probabilities it is the teacher's conditional distribution given that its token goes on; from draws a ratio of two
  unbiased sums; where no such token was kept, nothing is. From top-k data the whole tail counts as tokens that go on
  otherwise: lower bounds. Elsewhere nothing is kept: the dataset keeps distributions at some positions only.
- **log-probabilities** of chunks, the stretches between two boundaries of both tokenizations: the last token of a chunk has
  the sum of the teacher's log-probabilities of the chunk, the others have 0. So the sum over a row is the teacher's own, and
  bits per byte are exact. Ranks and entropies are not known.

With the maps `ranks` and `matched`, for objectives that compare sorted probabilities, the result holds the teacher's exact
entries, none merged and all else in the tail, at the first token of each chunk, where both have read the same bytes; with the
merge `bayesian` at the last one. Ids are those of `kdata.store.token_map`. With `matched`, in a chunk of two or more tokens
of the teacher, the rank at that place is that of its token there among the entries, so that its probability can be told from
that of the others. Where that token is not kept exactly, its log-probability is known all the same: it is added as the last
entry, with a rank one above their number.

From draws the result of the other maps holds draws, each id with the weight that fell on it: unbiased, as the map is linear.
No id counts as exact, since ids that were not drawn may become it too. From top-k data it holds lower bounds, and the rest in
the tail, as `kdata.jobs.average` does for ghost payloads.

Chats are written anew by the student's template; what of them is compared stands in `kdata.jobs.row_tokens`.

The result is an ordinary dataset with the student's tokenizer: plans, SQL, the trainer and other trainers need nothing new.

Shapes: T tokens of the teacher, S of the student, N entries, P positions with entries.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from kdata.calls import validated
from kdata.config import Strict
from kdata.corpus.align import Alignment, align
from kdata.corpus.chat_template import chat_encoder
from kdata.corpus.corpus import CorpusConfig
from kdata.corpus.encode import SpecialTokensInText, TextEncoder
from kdata.errors import ConfigError, DataError, MissingError
from kdata.format.keep import RANKS_VERSION, packed_version
from kdata.format.keep_rules import SORTED_MAPS, KeepAligned, refuse_sorted
from kdata.format.kept import Kept
from kdata.format.manifest import new_info
from kdata.format.records import Record, Reject, RowError, UnitResult, inputs_digest
from kdata.format.schema import FORMAT_VERSION, CodecInfo, DatasetInfo, SourceInfo
from kdata.format.sequences import Sequences
from kdata.jobs.payloads import InputSequence, goes_on, inputs_of_shard
from kdata.jobs.row_tokens import ChatRows, Compared, RowTokens, spelled_by, without_space_before
from kdata.jobs.token_entries import EntryMaps, by_falling_probability, bytes_before, mapped
from kdata.observe.progress import Task
from kdata.store.dataset import Dataset
from kdata.store.open import AnyDataset, open_dataset, opened
from kdata.store.shard import stored_rejects
from kdata.store.token_map import (
    Beginnings,
    TokenMap,
    TokenMapper,
    token_bytes_of,
    token_map,
    write_matched,
)
from kdata.store.tokens import REPLACED, read_tokenizer, tokenizer_hash
from kdata.store.vocabulary import num_ids
from kdata.store.writer import Writer
from kdata.teachers.model import load_tokenizer, tokenizer_files, tokenizer_info

WHOLE = 1 << 40  # tokens: texts are not split
SHORT_TOKENS = 1024  # ids of a tokenizer whose tokens are bytes, characters or little more
SURE = -1 / 1024  # nats: the log-probability nearest to 0 that the codec tells from 0
MOST_OF_A_CHARACTER = 4  # bytes of UTF-8


class RetokenizeConfig(Strict):
    """Which tokenizer, and how ids become its ids."""

    tokenizer: str = Field(min_length=1, description="The student's tokenizer: a model folder or a Hub name.")
    map: TokenMap = Field(
        "prefix",
        description="How the teacher's tokens become the student's. prefix: the student's token with which the text of the "
        "teacher's begins. exact: only tokens of equal text, the rest is dropped, or joins the tail of top-k data. ranks: "
        "exact entries by falling probability, for the objective uld. matched: the same, with the ids of tokens of equal "
        "text, for gold.",
    )
    inside: bool | None = Field(
        None,
        description="Also keep entries where a token of the student begins inside of one of the teacher: of the tokens that "
        "begin as that one does up to there. null: for a tokenizer of at most 1,024 ids, such as one of bytes.",
    )
    merge: Literal["observed", "bayesian"] = Field(
        "observed",
        description="With map matched, whose distribution stands for a chunk of several tokens of the teacher. observed: "
        "that of its first token. bayesian: that of its last one.",
    )

    template_options: dict[str, Any] = Field(
        {},
        description="Of chats: variables that the student's chat template takes, for instance enable_thinking: false.",
    )
    template_date: str | None = Field(
        None, description="Of chats: YYYY-MM-DD, the day that the student's template writes where it asks for today's."
    )
    chat_template: str | None = Field(
        None,
        description="Of chats: template in place of that of the student's tokenizer, a path to a Jinja file or its text.",
    )

    def chats(self) -> CorpusConfig:
        """How the student's template writes chats."""
        return CorpusConfig(
            path="-",
            messages_column="messages",
            template_options=self.template_options,
            template_date=self.template_date,
            chat_template=self.chat_template,
        )

    def template(self) -> dict[str, Any]:
        """The same as a source records it: the text of a template that stands in a file, too."""
        own = self.chats().own_template()
        return {"template_options": self.template_options, "template_date": self.template_date, "chat_template": own}

    @model_validator(mode="after")
    def _merge_is_of_matched(self) -> RetokenizeConfig:
        if self.merge != "observed" and self.map != "matched":
            raise ValueError(f"merge {self.merge} is for map matched, and map is {self.map}")
        if self.inside and self.map in SORTED_MAPS:
            raise ValueError(f"inside is for the maps prefix and exact, and map is {self.map}")
        return self


@dataclass
class RetokenizeReport:
    """What was counted: targets of the student, those with entries, rows, and rows that were refused; of the rows that this
    call wrote, positions whose ids were mapped, and the kept mass that has no id of the student there (sum). is_sorted: the
    map keeps that mass as sorted probabilities. of_turns: tokens of the assistant's turns in chats, as the student's template
    writes them; without_target: those of them that are no targets."""

    targets: int = 0
    kept: int = 0
    rows: int = 0
    refused: int = 0
    mapped: int = 0
    dropped: float = 0.0
    of_turns: int = 0
    without_target: int = 0
    is_sorted: bool = False

    def lines(self) -> list[str]:
        """The same for a person."""
        lines = [
            f"{self.kept:,} of {self.targets:,} targets of the student have a distribution "
            f"({self.kept / max(self.targets, 1):.0%}); the others lie across two tokens of the teacher, or it kept nothing "
            "that goes on so",
        ]
        if self.of_turns:
            lines.append(
                f"{self.without_target:,} of {self.of_turns:,} tokens of the assistant's turns are no targets: the student's "
                "template writes them, or they reach over the border of a message"
            )
        if self.dropped > 1e-4 * self.mapped:
            but = ": it is compared by rank" if self.is_sorted else ""
            lines.append(f"{self.dropped / self.mapped:.2%} of the kept mass has no token of the student{but}")
        return lines


@dataclass(frozen=True)
class _Work(EntryMaps):
    """encoders: of the student, by what the name of a special token in a text is. special: int64, ids of the teacher that
    mark structure. chats: None where the dataset has none."""

    dataset: Dataset
    tokenizer: Any
    encoders: dict[SpecialTokensInText, TextEncoder]
    special: np.ndarray
    chats: ChatRows | None
    config: RetokenizeConfig


@validated
def retokenize(
    root: Path | str, dataset: AnyDataset, config: RetokenizeConfig, *, resume: str = "auto", log: Path | None = None
) -> tuple[Dataset, RetokenizeReport]:
    """Write a dataset of the same texts with another tokenizer.

    Args:
        root: dataset folder, created if needed.
        resume: auto, never or must; see `Writer`.
        log: JSONL file for progress.
    Returns:
        The dataset, and what was counted.
    Raises:
        MissingError: there is no such tokenizer, or the dataset carries none.
        ConfigError: the tokenizer is not fast, or is the dataset's own; there are chats, and it has no chat template.
        DataError: the dataset is not complete, lacks the mass of the tail, or no row could be aligned.
        MismatchError: `root` was begun with other settings.
        CorruptError: the dataset is damaged.
    """
    dataset = opened(dataset)
    root = Path(root)
    if root.resolve() == dataset.path.resolve():
        raise ConfigError(f"{root} is the dataset that is read; the result needs a folder of its own")
    work = _open(dataset, config)
    info, report = _identity(work, config), RetokenizeReport(is_sorted=config.map == "matched")
    with Task("retokenize", dataset.num_tokens, "tokens", log) as task, tokenizer_files(work.tokenizer) as files:
        if config.map == "matched":
            write_matched(files, work.map_V, info.vocab_size)
        for source in dataset.info.sources:
            _run(root, info, work, source, config, files, report, task, resume)
            resume = goes_on(resume)
    result = open_dataset(root)
    report.targets = sum(entry.target_tokens for entry in result.manifest)
    report.kept = sum(entry.num_kept_positions for entry in result.manifest)
    report.rows = sum(entry.rows for entry in result.manifest)
    report.refused = sum(entry.rejected for entry in result.manifest)
    if report.refused and not report.rows:
        first = next(reject for entry in result.manifest for reject in stored_rejects(root, entry))
        raise DataError(
            f"none of {report.refused:,} rows could be aligned with {config.tokenizer}. Row {first.id!r}: {first.detail}; "
            f"all reasons are in {root}/rejects"
        )
    return result, report


def _open(dataset: Dataset, config: RetokenizeConfig) -> _Work:
    """Check what is asked for, and load the tokenizers."""
    refuse_sorted(dataset.info.codec, dataset.place, "retokenize")
    if config.map in SORTED_MAPS:
        _refuse_unsorted(dataset, config.map)
    if dataset.info.tail == "absent":
        raise DataError(
            f"{dataset.path} was imported from a format that does not hold the mass outside the kept entries; have its "
            "teacher read the rows: kdata reread"
        )
    unfinished = [name for name, source in dataset.info.sources.items() if source.num_units is None]
    if unfinished:
        raise DataError(f"source {unfinished[0]!r} of {dataset.path} is not complete; finish it first")
    folder = dataset.tokenizer_dir
    if folder is None or not (folder / "tokenizer.json").is_file():
        raise MissingError(
            f"{dataset.place} carries no tokenizer/tokenizer.json, so the text of its ids is not known; import it again with "
            "--tokenizer FOLDER"
        )
    teacher, tokenizer = read_tokenizer(folder / "tokenizer.json"), load_tokenizer(config.tokenizer)
    student = tokenizer.backend_tokenizer
    if tokenizer_hash(student) == dataset.info.tokenizer.hash:
        raise ConfigError(f"{config.tokenizer} is the dataset's own tokenizer; train on the dataset as it is")
    mapper = TokenMapper(student, config.map)
    map_V = token_map(mapper, teacher, dataset.info.vocab_size)
    # The tokens around a text are matched by what they are for.
    for their_id, own_id in (
        (dataset.info.tokenizer.bos_id, tokenizer.bos_token_id),
        (dataset.info.tokenizer.eos_id, tokenizer.eos_token_id),
    ):
        if their_id is not None and their_id < len(map_V):
            map_V[their_id] = -1 if own_id is None else own_id
    about = dataset.info.tokenizer
    special = _marks(teacher, about.bos_id, about.eos_id)
    theirs, own = token_bytes_of(teacher, names=True), token_bytes_of(student, names=True)
    chats = None
    if dataset.index(["messages"])["messages"].null_count < dataset.num_rows:
        own_special = _marks(student, tokenizer.bos_token_id, tokenizer.eos_token_id)
        chats = ChatRows(chat_encoder(tokenizer, config.chats()), theirs, own, special, own_special)
        for their_id, own_id in _end_of_turn(dataset, chats):
            map_V[their_id] = own_id
    # Measured (trainer/README.md): it helps a student of bytes, and costs one of 4,096 tokens a little.
    inside = num_ids(student) <= SHORT_TOKENS if config.inside is None else config.inside
    inside = inside and config.map not in SORTED_MAPS
    modes: tuple[SpecialTokensInText, ...] = ("keep", "split")
    return _Work(
        dataset=dataset,
        tokenizer=tokenizer,
        encoders={mode: TextEncoder(tokenizer, special_tokens_in_text=mode) for mode in modes},
        special=special,
        chats=chats,
        theirs=theirs,
        own=own,
        map_V=map_V,
        mapper=mapper,
        beginnings=Beginnings(token_bytes_of(teacher)) if inside else None,
        spare=np.setdiff1d(np.arange(num_ids(student), dtype=np.int32), map_V),
        draws=dataset.info.tail == "draws" and config.map not in SORTED_MAPS,
        config=config,
    )


def _marks(tokenizer: Any, *more: int | None) -> np.ndarray:
    """Ids of a tokenizer that mark structure, int64."""
    added = tokenizer.get_added_tokens_decoder()
    marks = {number for number, token in added.items() if token.special} | {
        number for number in more if number is not None
    }
    return np.array(sorted(marks), np.int64)


def _end_of_turn(dataset: Dataset, chats: ChatRows) -> list[tuple[int, int]]:
    """The ids that end a turn, of teacher and student, by the first chats that show them; none where these show none."""
    for number in range(len(dataset.manifest)):
        rows = [row for row in inputs_of_shard(dataset, number, dataset.shard(number)) if row.messages is not None]
        for row in rows:
            try:
                compared = chats.compared(row)
            except RowError:
                continue
            if compared.marks:
                t, s = compared.marks[0]
                return [(int(compared.theirs.ids[t]), int(compared.own.ids[s]))]
        if rows:
            break
    return []


def _refuse_unsorted(dataset: Dataset, map: TokenMap) -> None:
    """Raise ConfigError where a dataset has no exact entries at every target."""
    if dataset.info.tail == "draws" and dataset.info.codec.kind not in ("hybrid", "threshold"):
        raise ConfigError(
            f"map {map} needs exact entries at every target, and {dataset.place} is of kind {dataset.info.codec.kind}; have "
            "its teacher read the rows with another kind (kdata reread), or use map prefix"
        )


def _identity(work: _Work, config: RetokenizeConfig) -> DatasetInfo:
    about, size = work.dataset.info, num_ids(work.tokenizer.backend_tokenizer)
    parameters: dict[str, Any] = {"id_bytes": 2 if size <= 2**16 else 3}
    if work.draws:
        most = about.codec.most_draws + int(about.codec.parameters.get("k", 0)) + 1
        parameters["num_draws"] = min(most, 2**16 - 1)
    rule = KeepAligned(map=config.map, inside=work.beginnings is not None, of=about.codec.parameters.get("positions"))
    if config.map == "matched":
        counts = {"matched": int((work.map_V >= 0).sum()), "num_teacher": about.vocab_size}
        rule = rule.model_copy(update={"merge": config.merge, **counts})
    parameters["positions"] = rule.model_dump()
    version = RANKS_VERSION if config.map in SORTED_MAPS else packed_version(size, True)
    codec = CodecInfo(id="packed", version=version, kind="combined", parameters=parameters)
    return new_info(
        format_version=FORMAT_VERSION,
        vocab_size=size,
        teacher=about.teacher.model_copy(
            update={"logprobs": "sums over chunks of bytes, of another tokenizer's tokens"}
        ),
        tokenizer=tokenizer_info(work.tokenizer),
        codec=codec,
        tail="draws" if work.draws else "ghost",
    )


def _run(
    root: Path,
    info: DatasetInfo,
    work: _Work,
    source: str,
    config: RetokenizeConfig,
    files: Path,
    report: RetokenizeReport,
    task: Task,
    resume: str,
) -> None:
    """Retokenize the shards of one source."""
    dataset = work.dataset
    about = dataset.info.sources[source]
    settings = {
        "of": {"fingerprint": dataset.content_digest, "codec": dataset.info.codec.model_dump()},
        "map": config.map,
        "inside": work.beginnings is not None,
        **({"merge": config.merge} if config.map == "matched" else {}),
        **({} if work.chats is None else config.template()),
        "made_by": {"kind": about.kind, **about.settings},
    }
    result = SourceInfo(kind="retokenize", settings=settings, num_units=None, inputs=[dataset.as_input(source)])
    with Writer(root, info, source, result, resume=resume, tokenizer_dir=files) as writer:
        shards = [number for number, entry in enumerate(dataset.manifest) if entry.source == source]
        for number in shards:
            entry = dataset.manifest[number]
            if entry.unit in writer.committed:
                task.skip(entry.tokens)
                continue
            task.advance(entry.tokens, shard=writer.commit(_unit(work, number, report)))
        writer.finish(len(shards))


def _unit(work: _Work, number: int, report: RetokenizeReport) -> UnitResult:
    stored = work.dataset.shard(number)
    result = UnitResult(work.dataset.manifest[number].unit, [])
    for place, row in enumerate(inputs_of_shard(work.dataset, number, stored)):
        try:
            result.records.append(_record(work, row, stored.one(place), report))
        except RowError as error:
            result.rejects.append(Reject(row.id, row.domain, error.reason, error.detail))
    result.inputs = inputs_digest(result.records)
    return result


def _record(work: _Work, row: InputSequence, stored: Sequences, report: RetokenizeReport) -> Record:
    """One row with the student's tokens. Raises RowError where its text cannot be aligned."""
    compared = _compared(work, row)
    theirs, own = compared.theirs, compared.own
    aligned = align(theirs.num_bytes, own.num_bytes, theirs.special, own.special)
    merge = work.config.merge if work.config.map in SORTED_MAPS else None
    at_S = aligned.within_S if merge is None else aligned.met_at(last=merge == "bayesian")
    size_T = len(theirs.ids)
    target_T = row.target_mask[:size_T] & ~compared.closed_T
    target_S, logprob_S = _chunks(aligned, target_T, compared.closed_S, stored.logprob[:size_T])
    if merge is not None:  # so that the end of each chunk can be seen
        last_S = aligned.ends(aligned.chunk_S, last=True)
        logprob_S[last_S] = np.minimum(logprob_S[last_S], SURE)
    for t, s in compared.marks:
        at_S[s], target_S[s], logprob_S[s] = t, row.target_mask[t], stored.logprob[t]
    if not target_S.any():
        raise RowError("no_targets", "no token of the student is left that can be predicted")
    kept_S = target_S & (at_S >= 0)
    if merge is None:
        before_S = bytes_before(work, theirs.ids, theirs.num_bytes, aligned)
        kept_S &= before_S >= 0
    kept_S[kept_S] = (stored.num_kept if merge is None else stored.num_exact)[at_S[kept_S]] > 0
    size = len(own.ids)
    rank_S = np.zeros(size, np.int32)
    if merge is None:
        kept, log_tail_P, dropped = mapped(work, theirs.ids, stored, at_S[kept_S], before_S[kept_S], own.ids[kept_S])
    else:
        counts_C = np.bincount(aligned.chunk_T[aligned.chunk_T >= 0], minlength=max(aligned.num_chunks, 1))
        merged_T = counts_C[aligned.chunk_T] > 1
        merged_T &= aligned.chunk_T >= 0
        ranks = work.config.map == "ranks"
        kept, log_tail_P, rank_P, dropped = by_falling_probability(
            work, theirs.ids, stored, at_S[kept_S], merged_T, ranks=ranks
        )
        rank_S[kept_S] = rank_P
    counts_S = np.zeros((2, size), np.int32)
    counts_S[:, kept_S] = kept.num_exact, kept.num_drawn
    log_tail_S = np.where(target_S, np.float32(0), np.float32(np.nan))
    log_tail_S[kept_S] = log_tail_P
    report.mapped += int((kept.num_exact + kept.num_drawn > 0).sum())
    report.dropped += dropped
    if compared.turns_S is not None:
        report.of_turns += int(compared.turns_S.sum())
        report.without_target += int((compared.turns_S & ~target_S).sum())
    return Record(
        id=row.id,
        domain=row.domain,
        token_ids=own.ids,
        target_mask=target_S,
        text=compared.text,
        messages=row.messages,
        tools=row.tools,
        token_bytes=compared.token_bytes,
        origin=row.origin,
        license=row.license,
        prompt=compared.prompt,
        finish_reason=row.finish_reason,
        kept=Kept(counts_S[0], counts_S[1], kept.ids, kept.logprobs),
        logprob=np.where(target_S, logprob_S, np.nan).astype(np.float32),
        rank=rank_S,
        log_tail=log_tail_S,
        entropy=np.full(size, np.nan, np.float32),
    )


def _compared(work: _Work, row: InputSequence) -> Compared:
    """Both sides of a row. Raises RowError where it cannot be aligned."""
    if row.messages is not None:
        assert work.chats is not None
        chat = work.chats.compared(row)
        # Only the mark that the ids are mapped to: another one ends something else.
        marks = [(t, s) for t, s in chat.marks if work.map_V[chat.theirs.ids[t]] == chat.own.ids[s]]
        return dataclasses.replace(chat, marks=marks)
    text, theirs = _teachers_tokens(work, row)
    # A name that the teacher read as text is text, not a mark of the student.
    reads_marks = bool((np.isin(theirs.ids, work.special) & ~theirs.special).any())
    own = _students_tokens(work, text, ends=theirs.ends, mode="keep" if reads_marks else "split")
    return Compared(
        text=text,
        theirs=theirs,
        own=own,
        token_bytes=own.num_bytes.astype(np.uint16),
        closed_T=np.zeros(len(theirs.ids), bool),
        closed_S=np.zeros(len(own.ids), bool),
        marks=[(len(theirs.ids) - 1, len(own.ids) - 1)] if theirs.ends and own.ends else [],
        turns_S=None,
        prompt=row.prompt,
    )


def _teachers_tokens(work: _Work, row: InputSequence) -> tuple[str, RowTokens]:
    """Text and tokens of a row; of a text that was cut inside a character, without its last tokens.

    Raises:
        RowError: its text is not known, or its tokens do not spell it.
    """
    if row.text is None:
        raise RowError("not_spelled", "the dataset does not hold the text")
    ids = row.token_ids
    marks = np.isin(ids, work.special)
    special = _around(marks if row.token_bytes is None else marks & (row.token_bytes == 0))
    num_bytes, spelled = spelled_by(ids, special, work.theirs)
    content = row.text.encode()
    if spelled != content:
        text = row.text.rstrip(REPLACED).encode()
        num_bytes, spelled = without_space_before(num_bytes, spelled, text)
        content, size = _up_to_a_character(spelled, num_bytes, text)
        ids, num_bytes, special = ids[:size], num_bytes[:size], special[:size]
    ends = bool(len(special) and special[-1] and ids[-1] == work.dataset.info.tokenizer.eos_id)
    return content.decode(), RowTokens(ids, num_bytes, special, ends)


def _around(marks: np.ndarray) -> np.ndarray:
    """Of tokens that mark structure and stand for no byte, those before and behind all others, bool [T]: elsewhere one would
    part what the student reads as one text."""
    around: np.ndarray = np.logical_and.accumulate(marks) | np.logical_and.accumulate(marks[::-1])[::-1]
    return around


def _up_to_a_character(spelled: bytes, num_bytes: np.ndarray, text: bytes) -> tuple[bytes, int]:
    """The bytes up to the last token that ends where a character ends, and the number of these tokens.

    Args:
        text: without the sign for the character that was cut.
    Raises:
        RowError: the tokens spell another text.
    """
    if not spelled.startswith(text) or len(spelled) - len(text) >= MOST_OF_A_CHARACTER:
        raise RowError(
            "not_spelled", "the tokens do not spell the text: it is not all UTF-8, or was cut inside a character"
        )
    ends = np.cumsum(num_bytes)
    for size in range(len(num_bytes), 0, -1):
        end = int(ends[size - 1])
        if end <= len(text) and (end == len(text) or text[end] & 0xC0 != 0x80):
            return text[:end], size
    return b"", 0


def _students_tokens(work: _Work, text: str, *, ends: bool, mode: SpecialTokensInText = "keep") -> RowTokens:
    """The student's tokens of a text, with those that its tokenizer puts around one.

    Args:
        ends: the teacher's tokens hold the end of the sequence; the student's then do too, where its tokenizer has one.
        mode: what the name of a special token in the text is.
    Raises:
        RowError: the tokens spell another text, because the tokenizer changes it, or there is nothing to predict.
    """
    encoder = work.encoders[mode]
    try:
        [(_, ids, given)] = encoder.pieces(text, WHOLE)
    except ConfigError as error:  # of a kind whose special tokens cannot be read as text
        raise RowError("special_tokens", "the text spells out special tokens of the student, and is text") from error
    first, last, places = len(encoder.prefix), len(ids) - len(encoder.suffix), np.arange(len(ids))
    special = (given == 0) & ((places < first) | (places >= last))
    num_bytes, spelled = spelled_by(ids, special, work.own)
    content = text.encode()
    num_bytes, spelled = without_space_before(num_bytes, spelled, content)
    if spelled != content:
        raise RowError("normalized", "the tokenizer of the student changes the text, so its tokens do not spell it")
    eos = work.tokenizer.eos_token_id
    has_end = bool(len(ids) and special[-1] and ids[-1] == eos)
    if ends and eos is not None and not has_end:
        ids, num_bytes, special = np.append(ids, np.int32(eos)), np.append(num_bytes, 0), np.append(special, True)
        has_end = True
    if len(ids) < 2:
        raise RowError("no_targets", f"the text is {len(ids)} token of the student, and nothing predicts the first")
    return RowTokens(ids, num_bytes, special, has_end)


def _chunks(
    aligned: Alignment, target_T: np.ndarray, closed_S: np.ndarray, logprob_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Targets of the student, bool [S], and log-probabilities, float64 [S]: those of a chunk at its last token.

    A token is a target where every token of its chunk can be one, of the teacher and of the student: of a chunk whose first
    token nothing predicts, the rest has no log-probability of its own.

    Args:
        closed_S: tokens of the student that can be none.
    """
    of_T, of_S, count = aligned.chunk_T, aligned.chunk_S, aligned.num_chunks
    counted_T = (of_T >= 0) & target_T
    open_C = np.bincount(of_T[(of_T >= 0) & ~target_T], minlength=count) > 0
    open_C[of_S[(of_S >= 0) & closed_S]] = True
    if of_S[0] >= 0:
        open_C[of_S[0]] = True
    sums_C = np.bincount(of_T[counted_T], weights=logprob_T[counted_T].astype(np.float64), minlength=count)
    in_chunk = np.flatnonzero(of_S >= 0)
    target_S, logprob_S = np.zeros(len(of_S), bool), np.zeros(len(of_S))
    target_S[in_chunk] = ~open_C[of_S[in_chunk]]
    last = aligned.ends(of_S, last=True)
    logprob_S[last] = sums_C[of_S[last]]
    return target_S, logprob_S
