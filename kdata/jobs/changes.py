"""Go on with a dataset whose corpus has changed: stored rows that are as before stay, and are not read again.

Every part of the corpus (a sequence, a prompt, a reject) is compared by content with the rows of committed shards. A shard
whose rows are all there stays as it is. If only some are there, these are copied into a new shard, without decoding them.
Stored rows that the corpus does not have any more are taken out. What is not stored is cut into units with free numbers.
The rules are in kdata/README.md.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from kdata.format.records import HasTokens, Reject, Shard
from kdata.format.schema import IDENTITY_KEYS, ManifestEntry, shard_name
from kdata.observe.progress import console
from kdata.store.dataset import Dataset
from kdata.store.index import read_index
from kdata.store.pick import tables
from kdata.store.shard import stored_rejects, write_tables
from kdata.store.writer import Writer

U = TypeVar("U")
LABELS = ("id", "domain", "origin", "license")  # columns of the index that may change without being read again
# Settings that identify a corpus by content.
CORPUS_IDENTITY = tuple(f"{part}.{key}" for part in ("corpus", "prompts") for key in IDENTITY_KEYS)
ID_ELSEWHERE = "the dataset has a row with this id already"  # of another source
# Reasons that a teacher gives. Whether such a reject still holds is known only where its whole unit is as before.
BY_TEACHER = ("teacher_failed", "not_finite")


@dataclass(frozen=True)
class StoredRow:
    """A row as a job expects to find it in the dataset: a digest of all that decides its numbers, and its labels."""

    key: bytes
    labels: tuple[str | None, ...]


class Followed(Protocol):
    """What is needed of a job whose inputs may change; see `CorpusJob`."""

    name: str
    columns: Sequence[str]
    """Columns of the index that `stored_key` needs."""
    renames: bool
    """Whether a row keeps its numbers under another id."""

    def rows_of(self, item: Any) -> list[StoredRow]:
        """The rows that an item becomes."""
        ...

    def stored_key(self, row: dict[str, Any]) -> bytes:
        """`StoredRow.key` of a row of the index."""
        ...

    def inputs_of(self, payload: pa.Table) -> str:
        """`ManifestEntry.inputs` of the rows of a payload."""
        ...


@dataclass
class Pending:
    """The parts of a corpus that are still to be done, in the order of the corpus.

    todo: 1 for each part that is to be done, 0 for each that is stored. rows: rows of the corpus of which all is stored.
    """

    todo: bytearray
    rows: int
    used: set[int]

    def of(self, parts: Iterator[list[Any]]) -> Iterator[list[Any]]:
        """The parts that are to be done, row by row; rows without any are left out."""
        place = 0
        for row in parts:
            chosen = [part for n, part in enumerate(row, place) if self.todo[n]]
            place += len(row)
            if chosen:
                yield chosen

    @property
    def numbers(self) -> Iterator[int]:
        """Numbers of new units: those that no shard has."""
        return (number for number in itertools.count() if number not in self.used)


@dataclass
class Rest(Generic[U]):
    """The units of what is still to be done, and how many rows of the corpus are stored whole."""

    rows: int
    units: Iterator[U]


def digest(*texts: str | None) -> bytes:
    """16 bytes that identify some texts, in order."""
    state = hashlib.blake2b(digest_size=16)
    for text in texts:
        content = b"" if text is None else text.encode()
        state.update(b"-" if text is None else b"%d:" % len(content))
        state.update(content)
    return state.digest()


@dataclass
class _Claim:
    """A stored row that stays: its place in its shard, the part that it is (by order), and its labels now."""

    row: int
    part: int
    labels: tuple[str | None, ...]


@dataclass
class _Committed:
    """A committed shard, and what of it stays."""

    entry: ManifestEntry
    keys: list[bytes]
    labels: list[tuple[str | None, ...]]
    rejects: list[Reject]
    claims: dict[int, _Claim] = field(default_factory=dict)
    kept_rejects: list[Reject] = field(default_factory=list)
    failed_parts: list[int] = field(default_factory=list)
    _inputs: Any = field(default_factory=hashlib.sha256)

    @staticmethod
    def read(root: Path, entry: ManifestEntry, job: Followed) -> _Committed:
        rows = read_index(root / f"index/{entry.name}.parquet", [*LABELS, *job.columns]).to_pylist()
        labels = [tuple(row[name] for name in LABELS) for row in rows]
        return _Committed(entry, [job.stored_key(row) for row in rows], labels, stored_rejects(root, entry))

    @cached_property
    def failed(self) -> set[str]:
        """Ids of the rejects that the teacher gave."""
        return {reject.id for reject in self.rejects if reject.reason in BY_TEACHER}

    def count_input(self, item: HasTokens) -> None:
        """Add an item that is of this shard to the digest of its inputs."""
        self._inputs.update(item.id.encode() + b"\0" + item.token_ids.astype("<i4").tobytes())

    def settle_failed(self) -> list[int]:
        """Keep the teacher's rejects where the whole unit is as before; otherwise return the parts to be done again."""
        whole = len(self.claims) == len(self.keys) and self._inputs.hexdigest() == self.entry.inputs
        if whole:
            self.kept_rejects += [reject for reject in self.rejects if reject.reason in BY_TEACHER]
            return []
        again = set(self.failed_parts)
        self.claims = {row: claim for row, claim in self.claims.items() if claim.part not in again}
        return self.failed_parts

    @property
    def stays(self) -> bool:
        """Whether nothing of it has changed."""
        return (
            len(self.claims) == len(self.keys)
            and len(self.kept_rejects) == len(self.rejects)
            and all(claim.labels == self.labels[row] for row, claim in self.claims.items())
        )


class _Comparison:
    """The parts of a corpus, compared with the shards of a source.

    Args:
        present: those of some ids that the dataset has, of any source.
    """

    def __init__(self, job: Followed, shards: list[_Committed], present: Callable[[Iterable[str]], set[str]]) -> None:
        self.job, self.shards, self._present = job, shards, present
        self.todo, self.new_ids = bytearray(), set[str]()
        self._rows_of_the_corpus = array("I")  # parts of each
        self._places = {
            (key, labels[0]): (shard, row)
            for shard in shards
            for row, (key, labels) in enumerate(zip(shard.keys, shard.labels, strict=True))
        }
        self._failed = {row_id: shard for shard in shards for row_id in shard.failed}
        self._rejects: dict[tuple[Any, ...], list[_Committed]] = defaultdict(list)
        for shard in shards:
            for reject in shard.rejects:
                if reject.reason not in BY_TEACHER:
                    self._rejects[_identity(reject)].append(shard)
        self._later: list[tuple[int, StoredRow]] = []

    def run(self, rows: Iterator[list[Any]]) -> None:
        """Compare what each row of the corpus becomes: items (with an id and token ids) and rejects."""
        for parts in rows:
            self._rows_of_the_corpus.append(len(parts))
            for part in parts:
                self.todo.append(0 if self._is_stored(len(self.todo), part) else 1)
        for shard in self.shards:
            for part in shard.settle_failed():
                self.todo[part] = 1
        self._rename()

    def _is_stored(self, number: int, part: Any) -> bool:
        """Whether part `number` is stored; then it is claimed."""
        if isinstance(part, Reject):
            return self._is_stored_reject(part)
        elsewhere = Reject(part.id, part.domain, "id_twice", ID_ELSEWHERE)
        if _identity(elsewhere) in self._rejects and self._present([str(r.labels[0]) for r in self.job.rows_of(part)]):
            return self._is_stored_reject(elsewhere)
        return self._is_stored_item(number, part)

    def _is_stored_reject(self, reject: Reject) -> bool:
        shards = self._rejects.get(_identity(reject))
        if not shards:
            return False
        shards.pop().kept_rejects.append(reject)
        return True

    def _is_stored_item(self, number: int, item: Any) -> bool:
        rows = self.job.rows_of(item)
        places = [self._places.get((row.key, row.labels[0])) for row in rows]
        failed = [self._failed.get(str(row.labels[0])) for row in rows]
        owners = {id(owner): owner for owner in [*(p[0] for p in places if p), *(f for f in failed if f)]}
        if len(owners) != 1 or not all(p or f for p, f in zip(places, failed, strict=True)):
            self.new_ids.update(str(row.labels[0]) for row in rows)
            if self.job.renames and not any(places):
                self._later += [(number, row) for row in rows]
            return False
        [shard] = owners.values()
        shard.count_input(item)
        if not all(places):
            shard.failed_parts.append(number)
        for place, row in zip(places, rows, strict=True):
            if place is not None:
                shard.claims[place[1]] = _Claim(place[1], number, row.labels)
        return True

    def _rename(self) -> None:
        """Give rows that nothing stands for to parts of the same content with another id."""
        free: dict[bytes, list[tuple[_Committed, int]]] = defaultdict(list)
        for shard in self.shards:
            for row, key in enumerate(shard.keys):
                if row not in shard.claims:
                    free[key].append((shard, row))
        for number, wanted in self._later:
            places = free.get(wanted.key)
            if places:
                shard, row = places.pop(0)
                shard.claims[row] = _Claim(row, number, wanted.labels)
                self.todo[number] = 0
                self.new_ids.discard(str(wanted.labels[0]))

    @property
    def rows_done(self) -> int:
        """Rows of the corpus of which all is stored."""
        ends = np.cumsum(np.array(self._rows_of_the_corpus, np.int64))
        open_parts = np.concatenate([[0], np.cumsum(np.frombuffer(self.todo, np.uint8), dtype=np.int64)])
        return int((open_parts[ends] == open_parts[ends - np.array(self._rows_of_the_corpus, np.int64)]).sum())

    def line(self) -> str:
        """What has changed, for a person."""
        stored = sum(len(shard.keys) for shard in self.shards)
        claims = [(claim, shard.labels[row]) for shard in self.shards for row, claim in shard.claims.items()]
        lost = [
            labels[0] for shard in self.shards for row, labels in enumerate(shard.labels) if row not in shard.claims
        ]
        changed = sum(row_id in self.new_ids for row_id in lost)
        labelled = sum(claim.labels != labels for claim, labels in claims)
        said = f"{self.job.name}: the inputs have changed: {len(claims):,} of {stored:,} stored rows stay"
        if labelled:
            said += f", {labelled:,} of them with another id, domain, source or license"
        if lost:
            said += f"; taken out: {len(lost) - changed:,} that are gone and {changed:,} that have changed"
        return f"{said}; {len(self.new_ids):,} to do"


def _identity(reject: Reject) -> tuple[Any, ...]:
    return (reject.id, reject.domain, reject.reason, reject.detail)


def follow(writer: Writer, job: Followed, rows: Iterator[list[Any]]) -> Pending:
    """Bring the shards of a source in line with inputs that have changed, and return what is still to be done.

    Args:
        rows: what each row of the corpus becomes, in order: items and rejects.

    Prints one line that counts what stays, what was taken out and what is to be done.

    Raises:
        MismatchError: there are stored rows, and none of them is in the inputs any more: these are other inputs.
    """
    writer.sweep()
    shards = [_Committed.read(writer.root, entry, job) for _, entry in sorted(writer.committed.items())]
    comparison = _Comparison(job, shards, writer.present)
    comparison.run(rows)
    if any(shard.keys for shard in shards) and not any(shard.claims for shard in shards):
        writer.refuse_other_inputs()
    changed = [shard for shard in shards if not shard.stays]
    if changed or writer.has_other_inputs:
        say_changes(comparison.line())
        numbers = itertools.count(max(writer.committed, default=-1) + 1)
        staying = [shard for shard in changed if shard.claims or shard.kept_rejects]
        added = [_copied(writer, job, shard, number) for shard, number in zip(staying, numbers, strict=False)]
        writer.follow([shard.entry for shard in changed], added)
    return Pending(comparison.todo, comparison.rows_done, set(writer.committed))


def say_changes(line: str) -> None:
    """Print one line about inputs that have changed."""
    console.print(line, soft_wrap=True)


def close_gaps(writer: Writer) -> None:
    """Move the last shards to numbers that no shard has, because the units of a source count from 0 without a gap."""
    while (gap := next(n for n in itertools.count() if n not in writer.committed)) < len(writer.committed):
        entry = writer.committed[max(writer.committed)]
        writer.fetch(entry)
        payload, index = tables(Dataset(writer.root), entry, np.arange(entry.rows), shard_name(writer.source, gap))
        shard = write_tables(
            writer.root, writer.info, writer.source, gap, payload, index, entry.codec_error,
            rejects=stored_rejects(writer.root, entry), inputs=entry.inputs, work_digest=entry.work_digest,
        )  # fmt: skip
        writer.follow([entry], [shard])


def _copied(writer: Writer, job: Followed, shard: _Committed, number: int) -> Shard:
    """The rows and rejects of a shard that stay, with their labels of now, as a new shard; nothing is decoded."""
    entry = shard.entry
    writer.fetch(entry)
    claims = sorted(shard.claims.values(), key=lambda claim: (claim.part, claim.row))
    rows = np.array([claim.row for claim in claims], np.int64)
    payload, index = tables(Dataset(writer.root), entry, rows, shard_name(writer.source, number))
    for place, name in enumerate(LABELS):
        values = pa.array([claim.labels[place] for claim in claims], pa.string())
        for table in ("index", "payload") if name == "id" else ("index",):
            if table == "index":
                index = _with_column(index, name, values)
            else:
                payload = _with_column(payload, name, values)
    error = entry.codec_error if claims else None
    return write_tables(
        writer.root, writer.info, writer.source, number, payload, index, error,
        rejects=shard.kept_rejects, inputs=job.inputs_of(payload), work_digest=entry.work_digest,
    )  # fmt: skip


def _with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), values)
