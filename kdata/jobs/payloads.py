"""Sequences that a teacher reads, and the checks that several payloads belong to the same rows.

A further payload is a separate dataset (see schemas/README.md, section 13). Two datasets have the same rows if ids, token
ids and target masks agree, in order; ids mean the same tokens where `kdata.store.vocabulary` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from kdata.corpus.corpus import Document
from kdata.corpus.messages import as_json
from kdata.errors import DistributionError, MismatchError, TeacherError
from kdata.format.keep_rules import KeepRule
from kdata.format.kept import Kept
from kdata.format.records import Record, Reject, RowError
from kdata.format.schema import index_schema, json_digest
from kdata.format.sequences import Sequences
from kdata.jobs.kept_positions import kept_positions
from kdata.store.dataset import Dataset
from kdata.store.index import UNREADABLE, damaged, read_index
from kdata.store.payload import PayloadReader
from kdata.store.shard import check_record
from kdata.teachers.base import Readout

T = TypeVar("T")
MOST_FAILED = 8  # rows without usable numbers, and no other: then the teacher is at fault, not the rows


@dataclass(frozen=True)
class InputSequence:
    """One sequence that a teacher reads, without anything of the teacher in it; arrays [T] as in `Record`.

    marked: bool [T], tokens that the rule `role` or `stored` of `kdata.format.keep_rules` chooses; None for other rules.
    """

    id: str
    domain: str
    token_ids: np.ndarray
    target_mask: np.ndarray
    text: str | None
    messages: str | None = None
    tools: str | None = None
    token_bytes: np.ndarray | None = None
    origin: str | None = None
    license: str | None = None
    prompt: str | None = None
    finish_reason: str | None = None
    marked: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        name: str,
        document: Document,
        token_ids: np.ndarray,
        token_bytes: np.ndarray | None,
        text: str,
        target_mask: np.ndarray | None = None,
        marked: np.ndarray | None = None,
        **fields: str | None,
    ) -> InputSequence:
        """A sequence of a document of the corpus.

        Args:
            name: id of the row.
            target_mask: bool [T]; None: every position but the first is a target.
            marked: see the class.
            fields: messages, prompt and finish_reason, where there are any.
        """
        return cls(
            id=name,
            domain=document.domain,
            token_ids=token_ids,
            target_mask=np.arange(len(token_ids)) > 0 if target_mask is None else target_mask,
            text=text,
            tools=tools_json(document),
            token_bytes=token_bytes,
            origin=document.origin,
            license=document.license,
            marked=marked,
            **fields,
        )

    def record(self, readout: Readout, rule: KeepRule | None = None) -> Record:
        """This sequence with the teacher's distributions at its targets, and at no other position.

        Args:
            rule: at which targets entries are kept; None: at all.
        Raises:
            TeacherError: the teacher recorded nothing at a target.
            ConfigError: the rule does not fit the row.
        """
        missing = self.target_mask & (readout.rank == 0)
        if missing.any():
            raise TeacherError(
                f"{self.id}: the teacher recorded nothing at {int(missing.sum())} of the positions asked for"
            )
        at_targets = readout.only(self.target_mask)
        kept = at_targets.kept
        if rule is not None:
            kept = kept.only(kept_positions(rule, self, at_targets))
        return Record(**self._about(), kept=kept, **at_targets.measures())

    def _about(self) -> dict[str, Any]:
        """The fields of a `Record` that are not the teacher's."""
        return {name: value for name, value in vars(self).items() if name != "marked"}

    def record_from(self, payload: Sequences, row: int) -> Record:
        """This sequence with the distributions of one row of decoded sequences."""
        begin, end = (int(x) for x in payload.offsets[row : row + 2])
        span, first = slice(begin, end), payload.entry_offsets[begin]
        entries = slice(first, payload.entry_offsets[end])
        num_exact = payload.num_exact[span]
        num_drawn = payload.num_kept[span] - num_exact
        kept = Kept(num_exact, num_drawn, payload.entry_ids[entries], payload.entry_logprobs[entries])
        if payload.draw_logprobs is not None:
            own = payload.draw_logprobs[entries][kept.is_draw]
            kept = Kept(kept.num_exact, kept.num_drawn, kept.ids, kept.logprobs, own)
        return Record(**self._about(), kept=kept, **payload.measures(lambda values: values[span]))


def tools_json(document: Document) -> str | None:
    """The tools of a chat as the index keeps them; None without any."""
    return as_json(document.chat.tools) if document.chat and document.chat.tools else None


def split_known(sequences: list[InputSequence], vocab_size: int) -> tuple[list[InputSequence], list[Reject]]:
    """Sequences of ids that the head of a teacher has; and the others, as rejects."""
    known, rejects = [], []
    for sequence in sequences:
        beyond = beyond_head(sequence.token_ids, vocab_size)
        if beyond is None:
            known.append(sequence)
        else:
            rejects.append(Reject(sequence.id, sequence.domain, "vocabulary", beyond))
    return known, rejects


def beyond_head(token_ids: np.ndarray, vocab_size: int) -> str | None:
    """What is wrong where a token id is outside the head of a teacher; else None."""
    if not len(token_ids) or token_ids.max() < vocab_size:
        return None
    return f"token id {token_ids.max()} is outside the teacher's head of {vocab_size:,} rows"


def outcome_of(
    answer: T | TeacherError, record: Callable[[T], Record], row_id: str, domain: str, vocab_size: int
) -> Record | Reject:
    """A teacher's answer as a record, or as a reject where it failed or gave numbers that are no distribution.

    Raises DataError where the arrays of the answer do not belong together: then a program is at fault, not the row.
    """
    try:
        if isinstance(answer, TeacherError):
            raise answer
        outcome = record(answer)
        check_record(outcome, vocab_size)
        return outcome
    except DistributionError as error:
        return Reject(row_id, domain, "not_finite", str(error))
    except TeacherError as error:
        return Reject(row_id, domain, "teacher_failed", str(error))
    except RowError as error:
        return Reject(row_id, domain, error.reason, error.detail)


def refuse_hopeless_unit(asked: int, usable: int, rejects: list[Reject]) -> None:
    """Raise TeacherError where a teacher failed at all of many rows of a unit."""
    if asked >= MOST_FAILED and not usable:
        raise TeacherError(
            f"the teacher gave no usable numbers for any of {asked:,} rows, so the rows are not at fault; check its weights "
            f"and its arithmetic (teacher.dtype). {rejects[-1].id}: {rejects[-1].detail}"
        )


REREAD = "have the teacher read the first one's rows: kdata reread FIRST OUT --teacher MODEL"


def inputs_of_shard(dataset: Dataset, shard: int, stored: Sequences) -> list[InputSequence]:
    """The rows of a shard as another teacher reads them.

    Args:
        stored: the shard, decoded (`dataset.shard(shard)`).
    """
    entry = dataset.manifest[shard]
    columns = [name for name in index_schema().names if name in InputSequence.__dataclass_fields__]
    path = dataset.checked_file(entry, "index")
    try:
        rows = read_index(path, columns).to_pylist()
        token_bytes = _token_bytes(dataset, shard)
    except UNREADABLE as error:
        raise damaged(path, error) from error
    return [
        InputSequence(
            **row,
            token_ids=stored.token_ids[begin:end],
            target_mask=stored.target_mask[begin:end],
            token_bytes=own,
            marked=stored.num_kept[begin:end] > 0,
        )
        for row, own, (begin, end) in zip(rows, token_bytes, stored.spans(), strict=True)
    ]


def _token_bytes(dataset: Dataset, shard: int) -> list[np.ndarray | None]:
    reader = PayloadReader(dataset.checked_file(dataset.manifest[shard], "data"), ["token_bytes"])
    rows = [row for number in range(reader.num_record_batches) for row in reader.batch(number).column("token_bytes")]
    return [row.values.to_numpy().copy() if row.is_valid else None for row in rows]


OTHER_TEACHER = "only teachers with one tokenizer can be combined: choose another teacher"


def refuse_other_rows(first: Dataset, second: Dataset) -> None:
    """Raise MismatchError unless two datasets have the same ids and token ids in the same order, by their indexes.

    Number of targets too; where they are is in the payload: see `refuse_other_targets`.
    """
    columns = ["id", "content_hash", "num_target_tokens"]
    ours, theirs = first.index(columns), second.index(columns)
    if ours.equals(theirs):
        return
    if ours.num_rows != theirs.num_rows:
        raise MismatchError(
            f"{first.path} has {ours.num_rows:,} rows, {second.path} {theirs.num_rows:,}: not the same rows. Take those that "
            f"both have out of each (kdata split --by plan), or {REREAD}"
        )
    row = next(i for i in range(ours.num_rows) if not ours.slice(i, 1).equals(theirs.slice(i, 1)))
    a, b = ours.slice(row, 1).to_pylist()[0], theirs.slice(row, 1).to_pylist()[0]
    what = next(column for column in columns if a[column] != b[column])
    raise MismatchError(
        f"row {row} of {first.path} is {a['id']!r}, and that of {second.path} is not the same: {what} is {a[what]!r} and "
        f"{b[what]!r}. To get a second payload of the same rows, {REREAD}"
    )


def refuse_other_targets(first: Sequences, second: Sequences, where: tuple[Dataset, Dataset], start: int) -> None:
    """Raise MismatchError, naming the row, unless token ids and target masks of decoded rows from `start` on agree."""
    for name in ("token_ids", "target_mask"):
        ours, theirs = getattr(first, name), getattr(second, name)
        if np.array_equal(ours, theirs):
            continue
        place = int(np.flatnonzero(ours != theirs)[0]) if len(ours) == len(theirs) else 0
        row = start + int(np.searchsorted(first.offsets, place, side="right")) - 1
        raise MismatchError(
            f"{where[0].index(['id'])['id'][row].as_py()!r} has another {name} in {where[1].path} than in {where[0].path}: "
            f"not the same rows. To get a second payload of the same rows, {REREAD}"
        )


def goes_on(resume: str) -> str:
    """How to resume the sources after the first one: "must" applies to the first only."""
    return "auto" if resume == "must" else resume


def source_digest(dataset: Dataset, source: str) -> str:
    """SHA-256 (hex) over the identity and the shards of one source: as `content_digest`, but other sources may grow."""
    entries = [entry for entry in dataset.manifest if entry.source == source]
    shards = [(entry.name, sorted((k, v.sha256) for k, v in entry.files.items())) for entry in entries]
    return json_digest({"identity": dataset.info.identity_digest, "shards": shards})
