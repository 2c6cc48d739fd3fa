"""Several payloads of the same rows: what one teacher believed of them, and another.

A further payload is a dataset of its own (see schemas/README.md, section 13). That two datasets have the same rows and the
same vocabulary is checked here, by content: ids, token ids and target masks in order; tokenizer hash and vocabulary size.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from kdata.corpus.corpus import Document
from kdata.corpus.messages import as_json
from kdata.errors import MismatchError, TeacherError
from kdata.format.kept import Kept
from kdata.format.records import Record
from kdata.format.schema import TokenizerInfo, index_schema, json_digest
from kdata.format.sequences import Sequences
from kdata.store.dataset import Dataset
from kdata.store.index import UNREADABLE, damaged, read_index
from kdata.teachers.base import Readout


def record_of(sequence: Record, readout: Readout) -> Record:
    """Fill a record's distributions from a readout: those of its targets, and of no other position.

    Raises TeacherError where a target was not recorded.
    """
    missing = sequence.target_mask & (readout.rank == 0)
    if missing.any():
        raise TeacherError(
            f"{sequence.id}: the teacher recorded nothing at {int(missing.sum())} of the positions asked for"
        )
    kept = readout.only(sequence.target_mask)
    sequence.logprob, sequence.rank, sequence.log_tail = kept.logprob, kept.rank, kept.log_tail
    sequence.log_z, sequence.entropy, sequence.kept = kept.log_z, kept.entropy, kept.kept
    return sequence


def unread(name: str, document: Document, ids: np.ndarray, token_bytes: np.ndarray | None, text: str) -> Record:
    """A record whose distributions are still to come; every position but the first is a target."""
    nothing = np.zeros(0, np.float32)
    return Record(
        id=name,
        domain=document.domain,
        token_ids=ids,
        target_mask=np.arange(len(ids)) > 0,
        logprob=nothing,
        rank=np.zeros(0, np.int32),
        log_tail=nothing,
        kept=Kept.concatenate([]),
        text=text,
        tools=as_json(document.chat.tools) if document.chat and document.chat.tools else None,
        token_bytes=token_bytes,
        origin=document.origin,
        license=document.license,
    )


REREAD = "have the teacher read the first one's rows: kdata reread FIRST OUT --teacher MODEL"


def records_of(dataset: Dataset, shard: int, stored: Sequences) -> list[Record]:
    """The rows of a shard with nothing of the teacher in them, to be filled with what another believes.

    Args:
        stored: the shard, decoded (`dataset.shard(shard)`).
    """
    entry = dataset.manifest[shard]
    columns = [name for name in index_schema().names if name in Record.__dataclass_fields__]
    path = dataset.checked_file(entry, "index")
    try:
        rows = read_index(path, columns).to_pylist()
        token_bytes = _token_bytes(dataset, shard)
    except UNREADABLE as error:
        raise damaged(path, error) from error
    nothing = np.zeros(0, np.float32)
    return [
        Record(
            **row,
            token_ids=stored.token_ids[begin:end],
            target_mask=stored.target_mask[begin:end],
            token_bytes=own,
            logprob=nothing,
            rank=np.zeros(0, np.int32),
            log_tail=nothing,
            kept=Kept.concatenate([]),
        )
        for row, own, (begin, end) in zip(rows, token_bytes, stored.spans(), strict=True)
    ]


def _token_bytes(dataset: Dataset, shard: int) -> list[np.ndarray | None]:
    with pa.memory_map(str(dataset.checked_file(dataset.manifest[shard], "data"))) as source:
        field = pa.ipc.open_file(source).schema.get_field_index("token_bytes")
        options = pa.ipc.IpcReadOptions(included_fields=[field])
        column = pa.ipc.open_file(source, options=options).read_all()["token_bytes"]
        return [value.values.to_numpy().copy() if value.is_valid else None for value in column]


def fill(record: Record, from_: Sequences, row: int) -> Record:
    """Put the distributions of one row of decoded sequences into a record."""
    begin, end = (int(x) for x in from_.offsets[row : row + 2])
    span, first = slice(begin, end), from_.entry_offsets[begin]
    entries = slice(first, from_.entry_offsets[end])
    num_exact = from_.num_exact[span]
    kept = Kept(num_exact, from_.num_kept[span] - num_exact, from_.entry_ids[entries], from_.entry_logprobs[entries])
    if from_.draw_logprobs is not None:
        own = from_.draw_logprobs[entries][kept.is_draw]
        kept = Kept(kept.num_exact, kept.num_drawn, kept.ids, kept.logprobs, own)
    record.logprob, record.rank, record.log_tail = from_.logprob[span], from_.rank[span], from_.log_tail[span]
    record.log_z = None if from_.log_z is None else from_.log_z[span]
    record.entropy, record.kept = from_.entropy[span], kept
    return record


def refuse_other_vocabulary(
    first: str, ours: TokenizerInfo, vocab_size: int, second: str, theirs: TokenizerInfo, other_size: int
) -> None:
    """Raise MismatchError unless two payloads have one tokenizer (by its hash) and one vocabulary size."""
    if "unknown" in (ours.hash, theirs.hash):
        unknown = first if ours.hash == "unknown" else second
        raise MismatchError(
            f"the tokenizer of {unknown} is not known (it was imported without), so that nobody can say whether its ids "
            "mean the same; import it again with --tokenizer FOLDER"
        )
    if ours.hash != theirs.hash:
        raise MismatchError(
            f"{first} and {second} have different tokenizers ({ours.hash[:12]} and {theirs.hash[:12]}): the same id is "
            "another token. Only teachers with one tokenizer can be combined; choose another teacher."
        )
    if vocab_size != other_size:
        raise MismatchError(
            f"{first} has {vocab_size:,} token ids, {second} {other_size:,}, though the tokenizer is the same: one head has "
            "rows that the other lacks. Only teachers with one vocabulary size can be combined; choose another teacher."
        )


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
    """How the next source is resumed: what "must" be there is the first source, not those that come after it."""
    return "auto" if resume == "must" else resume


def source_digest(dataset: Dataset, source: str) -> str:
    """SHA-256 (hex) over the identity and one source's shards: like the dataset's fingerprint, but other sources may grow."""
    entries = [entry for entry in dataset.manifest if entry.source == source]
    shards = [(entry.name, sorted((k, v.sha256) for k, v in entry.files.items())) for entry in entries]
    return json_digest({"identity": dataset.info.identity_digest, "shards": shards})
