"""Scores: numbers for each sequence, in a sidecar that is joined to the rows by id. The payload is never changed.

A sidecar is a folder `scores/NAME/` with one Parquet part per shard, and `scores/NAME.json`, which names the model, the
dataset and the digest of each part. `kdata.jobs.scoring` writes a model's scores (id, nll, num_target_tokens, and on request
the NLL of each token, see `kdata.store.token_scores`); `kdata.selection.score_file` writes numbers from a file;
`kdata.hygiene.inspect` writes what the checks of hygiene found in the texts.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from kdata.config import first_problem
from kdata.errors import ConfigError, CorruptError, MismatchError, settings_difference
from kdata.format.files import matches, write_atomically
from kdata.format.manifest import write_json
from kdata.format.schema import Contract, Digest, FileInfo, ManifestEntry, TeacherInfo, json_digest
from kdata.store.dataset import Dataset
from kdata.store.index import UNREADABLE, damaged
from kdata.store.listed import COPIED, SCORES, listed, read_listing, refuse_other_dataset
from kdata.store.queryable import check_new_name, is_name
from kdata.store.token_scores import TOKEN_NLL

SCORE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), False),
        pa.field("nll", pa.float64(), True),
        pa.field("num_target_tokens", pa.int32(), False),
    ]
)
TOKEN_SCORE_SCHEMA = SCORE_SCHEMA.append(TOKEN_NLL)


class ScoreInfo(Contract):
    """scores/NAME.json."""

    name: str = Field(description="Name of the sidecar, scores.NAME in SQL.")
    unit: str = Field(
        description="What the number is: nats per target token, or what the user says of an imported number."
    )
    model: TeacherInfo | None = Field(
        description="The model that scored; null where the numbers are from a file, or from the dataset itself."
    )
    tokenizer_hash: str | None = Field(
        description="Its tokenizer, the same as the dataset's; null where there is no model."
    )
    dataset_digest: str = Field(
        alias="dataset_fingerprint", description="Content digest of the dataset that was scored."
    )
    dataset_identity: Digest | None = Field(
        None,
        exclude_if=lambda digest: digest is None,
        description="`fingerprint` of that dataset; absent from older scores.",
    )
    columns: list[str] = Field(["nll", "num_target_tokens"], description="Columns of the parts beside `id`.")
    origin: FileInfo | None = Field(
        None, description="Digest and size of the file that the numbers are from; null where they were computed."
    )
    settings: dict[str, Any] | None = Field(
        None,
        exclude_if=lambda settings: settings is None,
        description="Check of `kdata hygiene` that made the columns, with its settings and the versions of its packages; "
        "absent from other scores.",
    )
    files: dict[str, FileInfo] = Field(description="Parts, by path inside the dataset; empty until all are written.")
    digest: str = Field("", description="SHA-256 of everything else in the file; shows a damaged byte.")


def check_score_name(name: str) -> None:
    """Raise ConfigError where SQL could not name such a score without quotes."""
    if not is_name(name):
        raise ConfigError(f"{name!r} is not a valid score name; use letters, digits and _, beginning with a letter")


def refuse_other_settings(dataset: Dataset, info: ScoreInfo) -> None:
    """Raise MismatchError where a sidecar of that name has other settings, ConfigError where one differs in case alone."""
    check_new_name("score", info.name, listed(dataset.path, SCORES))
    path = dataset.path / "scores" / f"{info.name}.json"
    if not path.exists():
        return
    before = load_score_info(dataset, info.name)
    # The dataset digest may differ: rows were added. Each part records its shard, so parts of unchanged shards are kept.
    changing = {"files", "dataset_digest", "dataset_identity", "digest"}
    if info.origin is None:
        changing.add("origin")  # margins of an older kdata name a temporary file
    difference = settings_difference(before.model_dump(exclude=changing), info.model_dump(exclude=changing))
    if difference:
        raise MismatchError(
            f"scores.{info.name} exists with other settings (before -> now):\n{difference}\n"
            f"Choose another name, or remove {path.with_suffix('')} and {path.name}."
        )


def begin_sidecar(dataset: Dataset, info: ScoreInfo) -> None:
    """Start or continue a sidecar. Raises MismatchError where a sidecar of that name has other settings."""
    path = dataset.path / "scores" / f"{info.name}.json"
    refuse_other_settings(dataset, info)
    folder = dataset.path / "scores" / info.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COPIED).unlink(missing_ok=True)
    older: list[ManifestEntry] = []
    if path.exists():
        older = _older_parts(dataset, load_score_info(dataset, info.name))
    write_json(path, _of(dataset, info).model_dump())
    for entry in older:
        write_part(dataset, info.name, entry, _read(_part(dataset, info.name, entry)))


def _read(path: Path) -> pa.Table:
    return pq.read_table(path, partitioning=None)  # otherwise a folder NAME=VALUE above would become a column


def read_ids(path: Path) -> pa.ChunkedArray:
    """The ids of a part of a score. Raises CorruptError where it has none."""
    try:
        return pq.read_table(path, columns=["id"], partitioning=None)["id"]
    except UNREADABLE as error:
        raise damaged(path, error) from error


def _older_parts(dataset: Dataset, info: ScoreInfo) -> list[ManifestEntry]:
    """Shards whose part an older kdata wrote and is undamaged: such parts do not say yet which score they are of."""
    parts = []
    for entry in dataset.manifest:
        path, file = _part(dataset, info.name, entry), info.files.get(f"scores/{info.name}/{entry.name}.parquet")
        if file is not None and path.is_file() and matches(path, file):
            stored = pq.read_schema(path).metadata or {}
            if stored.get(b"kdata.shard") == _shard_digest(entry) and b"kdata.score" not in stored:
                parts.append(entry)
    return parts


def _shard_digest(entry: ManifestEntry) -> bytes:
    return entry.files[f"data/{entry.name}.arrow"].sha256.encode()


def _of(dataset: Dataset, info: ScoreInfo) -> ScoreInfo:
    return info.model_copy(update={"dataset_identity": dataset.info.identity_digest})


def write_part(dataset: Dataset, name: str, entry: ManifestEntry, table: pa.Table) -> None:
    """Write the scores of one shard, whole or not at all."""
    sink = pa.BufferOutputStream()
    metadata = _part_metadata(dataset, name, entry, table)
    # A dictionary of the values of tokens would be as long as they are.
    short = [field.name for field in table.schema if not pa.types.is_list(field.type)]
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd", use_dictionary=short)
    write_atomically(_part(dataset, name, entry), sink.getvalue().to_pybytes())


def _part_metadata(dataset: Dataset, name: str, entry: ManifestEntry, table: pa.Table) -> dict[bytes, bytes]:
    """What a part says of itself, so that a run that goes on knows its own: which shard, of which score, which numbers."""
    score = load_score_info(dataset, name).model_dump(exclude={"files", "dataset_digest", "digest"})
    return {
        b"kdata.shard": _shard_digest(entry),
        b"kdata.score": json_digest(score).encode(),
        b"kdata.numbers": _numbers_digest(table).encode(),
    }


def _numbers_digest(table: pa.Table) -> str:
    """SHA-256 (hex) of the values of a part. Until a score is complete, no JSON has the digests of its parts."""
    plain = pa.table({name: table[name].combine_chunks() for name in table.column_names})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, plain.schema) as writer:
        writer.write_table(plain)
    return hashlib.sha256(sink.getvalue()).hexdigest()


def has_part(dataset: Dataset, name: str, entry: ManifestEntry) -> bool:
    """True where a part exists that this score wrote for this shard as it is now, undamaged. Older parts do not say so."""
    try:
        table = _read(_part(dataset, name, entry))
    except (pa.ArrowException, OSError, ValueError):
        return False
    stored = table.schema.metadata or {}
    return all(stored.get(key) == value for key, value in _part_metadata(dataset, name, entry, table).items())


def finish_sidecar(dataset: Dataset, info: ScoreInfo) -> ScoreInfo:
    """Complete a sidecar: record the digests of all its parts."""
    files = {}
    for entry in dataset.manifest:
        content = _part(dataset, info.name, entry).read_bytes()
        relative = f"scores/{info.name}/{entry.name}.parquet"
        files[relative] = FileInfo(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    info = _of(dataset, info).model_copy(update={"files": files})
    write_json(dataset.path / "scores" / f"{info.name}.json", info.model_dump())
    return info


def _part(dataset: Dataset, name: str, entry: ManifestEntry) -> Path:
    return dataset.path / "scores" / name / f"{entry.name}.parquet"


def load_score_info(dataset: Dataset, name: str) -> ScoreInfo:
    """Read scores/NAME.json, of a complete score or not.

    Raises:
        ConfigError: an invalid name.
        MissingError: there is none; lists the scores that exist.
        CorruptError: it is damaged, or was renamed.
        MismatchError: it is of another dataset.
    """
    check_score_name(name)
    dataset.fetch_sidecar(name)
    path = dataset.path / "scores" / f"{name}.json"
    listing, content = read_listing(path, SCORES)
    refuse_other_dataset(listing, SCORES, dataset.info.identity_digest, dataset.path)
    try:
        return ScoreInfo.model_validate(content)
    except ValidationError as error:
        raise CorruptError(
            f"{path} is damaged ({first_problem(error)}); remove it and run `{listing.command}` again"
        ) from error


def refuse_missing_column(dataset: Dataset, name: str, column: str, method: str) -> None:
    """Raise ConfigError where a score lacks the column that a method reads, and as `load_score_info` does."""
    columns = load_score_info(dataset, name).columns
    if column.lower() not in (one.lower() for one in columns):
        raise ConfigError(
            f"{method} needs the column {column!r} of the score {name!r}, which has {', '.join(columns)}; name another score "
            "(--score), or another column where the method takes one (--set column=COLUMN)"
        )


def score_digest(dataset: Dataset, name: str) -> str:
    """SHA-256 (hex) of a complete sidecar. Raises as `load_score_info` and `Dataset.listing`."""
    info = load_score_info(dataset, name)
    dataset.listing(SCORES, name)
    return json_digest(info.model_dump())


def checked_score_digest(dataset: Dataset, name: str) -> str:
    """The same, after comparing every local part with its digest. Raises CorruptError where one differs."""
    digest = score_digest(dataset, name)
    dataset.listed_files(SCORES, name)  # parts at a URL stay there; comparing them would read them whole
    return digest
