"""Scores: numbers for each sequence, in a sidecar that is joined to the rows by id. The payload is never changed.

A sidecar is a folder `scores/NAME/` with one Parquet part per shard, and `scores/NAME.json`, which names the model, the
dataset and the digest of each part. `kdata.jobs.scoring` writes a model's scores (id, nll, num_target_tokens);
`kdata.selection.score_file` writes numbers from a file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from kdata.config import first_problem
from kdata.errors import ConfigError, CorruptError, DataError, MismatchError, MissingError, settings_difference
from kdata.format.files import file_info, inside, without_hidden, write_atomically
from kdata.format.json_text import read_json
from kdata.format.manifest import digest_of, write_json
from kdata.format.schema import Contract, FileInfo, ManifestEntry, TeacherInfo, json_digest
from kdata.store.dataset import Dataset
from kdata.store.sql import check_new_name, is_name

SCORE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), False),
        pa.field("nll", pa.float64(), True),
        pa.field("num_target_tokens", pa.int32(), False),
    ]
)


class ScoreInfo(Contract):
    """scores/NAME.json."""

    name: str = Field(description="Name of the sidecar, scores.NAME in SQL.")
    unit: str = Field(
        description="What the number is: nats per target token, or what the user says of an imported number."
    )
    model: TeacherInfo | None = Field(description="The model that scored; null where the numbers are from a file.")
    tokenizer_hash: str | None = Field(
        description="Its tokenizer, the same as the dataset's; null where the numbers are from a file."
    )
    dataset_digest: str = Field(
        alias="dataset_fingerprint", description="Content digest of the dataset that was scored."
    )
    columns: list[str] = Field(["nll", "num_target_tokens"], description="Columns of the parts beside `id`.")
    origin: FileInfo | None = Field(
        None, description="Digest and size of the file that the numbers are from; null where a model scored."
    )
    files: dict[str, FileInfo] = Field(description="Parts, by path inside the dataset; empty until all are written.")
    digest: str = Field("", description="SHA-256 of everything else in the file; shows a damaged byte.")


def begin_sidecar(dataset: Dataset, info: ScoreInfo) -> None:
    """Start or continue a sidecar. Raises MismatchError where a sidecar of that name has other settings."""
    path = dataset.path / "scores" / f"{info.name}.json"
    check_new_name("score", info.name, (other.stem for other in without_hidden(path.parent, "*.json")))
    (dataset.path / "scores" / info.name).mkdir(parents=True, exist_ok=True)
    if path.exists():
        before = load_score_info(dataset, info.name)
        # The dataset digest may differ: rows were added. Each part records its shard, so parts of unchanged shards are kept.
        changing = {"files", "dataset_digest", "digest"}
        difference = settings_difference(before.model_dump(exclude=changing), info.model_dump(exclude=changing))
        if difference:
            raise MismatchError(
                f"scores.{info.name} exists with other settings (before -> now):\n{difference}\n"
                f"Choose another name, or remove {path.with_suffix('')} and {path.name}."
            )
    write_json(path, info.model_dump())


def write_part(dataset: Dataset, name: str, entry: ManifestEntry, table: pa.Table) -> None:
    """Write the scores of one shard, whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"kdata.shard": _shard_digest(entry)}), sink, compression="zstd")
    write_atomically(_part(dataset, name, entry), sink.getvalue().to_pybytes())


def _shard_digest(entry: ManifestEntry) -> str:
    return entry.files[f"data/{entry.name}.arrow"].sha256


def has_part(dataset: Dataset, name: str, entry: ManifestEntry) -> bool:
    """True where a readable part exists that was written for this shard as it is now."""
    path = _part(dataset, name, entry)
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return False
    return metadata.get(b"kdata.shard") == _shard_digest(entry).encode()


def finish_sidecar(dataset: Dataset, info: ScoreInfo) -> ScoreInfo:
    """Complete a sidecar: record the digests of all its parts."""
    files = {}
    for entry in dataset.manifest:
        content = _part(dataset, info.name, entry).read_bytes()
        relative = f"scores/{info.name}/{entry.name}.parquet"
        files[relative] = FileInfo(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    info = info.model_copy(update={"files": files})
    write_json(dataset.path / "scores" / f"{info.name}.json", info.model_dump())
    return info


def _part(dataset: Dataset, name: str, entry: ManifestEntry) -> Path:
    return dataset.path / "scores" / name / f"{entry.name}.parquet"


def load_score_info(dataset: Dataset, name: str) -> ScoreInfo:
    """Read scores/NAME.json. Raises MissingError, which lists the scores that exist, or CorruptError."""
    if not is_name(name):
        raise ConfigError(f"{name!r} is not a valid score name; use letters, digits and _, beginning with a letter")
    dataset.fetch_sidecar(name)
    path = dataset.path / "scores" / f"{name}.json"
    if not path.exists():
        names = ", ".join(p.stem for p in without_hidden(dataset.path / "scores", "*.json")) or "none"
        raise MissingError(f"{dataset.path} has no score {name!r} (scores: {names}); write it with `kdata score`")
    try:
        content = read_json(path)
        info = ScoreInfo.model_validate(content)
        if info.digest and info.digest != digest_of(content):
            raise CorruptError(f"{path} does not match its own digest; remove it and run `kdata score` again")
        return info
    except DataError as error:
        raise CorruptError(f"{path} is damaged ({error}); remove it and run `kdata score` again") from error
    except ValidationError as error:
        raise CorruptError(
            f"{path} is damaged ({first_problem(error)}); remove it and run `kdata score` again"
        ) from error


def score_digest(dataset: Dataset, name: str) -> str:
    """SHA-256 (hex) of a complete sidecar. Raises MissingError where it is incomplete or of another state of the dataset."""
    info = load_score_info(dataset, name)
    if info.dataset_digest != dataset.content_digest or not info.files:
        raise MissingError(f"score {name!r} does not cover the dataset as it is now; run `kdata score` again")
    return json_digest(info.model_dump())


def checked_score_digest(dataset: Dataset, name: str) -> str:
    """The same, after comparing every local part with its digest. Raises CorruptError where one differs."""
    digest = score_digest(dataset, name)
    if dataset.sql_filesystem is not None:
        return digest  # the parts are at a URL; comparing them would read them whole
    for relative, info in load_score_info(dataset, name).files.items():
        path = inside(dataset.path, relative)
        if not path.is_file() or file_info(path) != info:
            raise CorruptError(
                f"{path} is not what was committed (missing, or another SHA-256); remove scores/{name} and run `kdata score` "
                "again"
            )
    return digest
