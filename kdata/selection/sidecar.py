"""Scores: numbers per sequence from elsewhere, as a sidecar that is joined by id. The payload is never touched.

A sidecar `scores/NAME/` has one Parquet part per shard and `scores/NAME.json`, which says which model, on which dataset,
and the digest of each part. Here a model scores (id, nll, num_target_tokens); `kdata/score_file.py` takes numbers from a
file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from kdata.config import first_problem
from kdata.errors import ConfigError, CorruptError, MismatchError, MissingError, settings_difference
from kdata.format.files import file_info, inside, write_atomically
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
    unit: str = Field(description="What the number is: nats per target token, or whatever was brought.")
    model: TeacherInfo | None = Field(description="Who scored; null where the numbers were brought.")
    tokenizer_hash: str | None = Field(description="Its tokenizer; the same as the dataset's. Null where brought.")
    dataset_digest: str = Field(alias="dataset_fingerprint", description="Fingerprint of the dataset that was scored.")
    columns: list[str] = Field(["nll", "num_target_tokens"], description="Columns of the parts beside `id`.")
    origin: FileInfo | None = Field(
        None, description="Digest and size of the file that was brought; null where a model scored."
    )
    files: dict[str, FileInfo] = Field(description="Parts, by path inside the dataset; empty until all are there.")
    digest: str = Field("", description="SHA-256 of everything else in the file: finds a damaged byte.")


def begin_sidecar(dataset: Dataset, info: ScoreInfo) -> None:
    """Start or go on with a sidecar. Raises MismatchError where another model's stands under that name."""
    path = dataset.path / "scores" / f"{info.name}.json"
    check_new_name("score", info.name, (other.stem for other in path.parent.glob("*.json")))
    (dataset.path / "scores" / info.name).mkdir(parents=True, exist_ok=True)
    if path.exists():
        before = load_score_info(dataset, info.name)
        # Another dataset digest: rows were added since. Each part knows its shard, so those that fit are kept.
        changing = {"files", "dataset_digest", "digest"}
        difference = settings_difference(before.model_dump(exclude=changing), info.model_dump(exclude=changing))
        if difference:
            raise MismatchError(
                f"scores.{info.name} was made otherwise (before -> now):\n{difference}\n"
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


def _has_part(dataset: Dataset, name: str, entry: ManifestEntry) -> bool:
    """True where a readable part stands that was made from this very shard."""
    path = _part(dataset, name, entry)
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return False
    return metadata.get(b"kdata.shard") == _shard_digest(entry).encode()


def finish_sidecar(dataset: Dataset, info: ScoreInfo) -> ScoreInfo:
    """Record the digests of all parts: the sidecar is complete."""
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
    """Read scores/NAME.json. Raises MissingError with the names that are there."""
    if not is_name(name):
        raise ConfigError(f"{name!r} is no name for a score: letters, digits and _, beginning with a letter")
    dataset.fetch_sidecar(name)
    path = dataset.path / "scores" / f"{name}.json"
    if not path.exists():
        there = sorted(p.stem for p in (dataset.path / "scores").glob("*.json"))
        raise MissingError(f"there is no score {name!r} (there are: {there or 'none'}); make it with `kdata score`")
    try:
        content = json.loads(path.read_bytes())
        info = ScoreInfo.model_validate(content)
        if info.digest and info.digest != digest_of(content):
            raise CorruptError(f"{path} does not match its own digest; remove it and run `kdata score` again")
        return info
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is damaged ({error}); remove it and run `kdata score` again") from error
    except ValidationError as error:
        raise CorruptError(
            f"{path} is damaged ({first_problem(error)}); remove it and run `kdata score` again"
        ) from error


def score_digest(dataset: Dataset, name: str) -> str:
    """SHA-256 (hex) of a complete sidecar. Raises MissingError when it is not complete or is of other rows."""
    info = load_score_info(dataset, name)
    if info.dataset_digest != dataset.content_digest or not info.files:
        raise MissingError(f"score {name!r} does not cover the dataset as it is now; run `kdata score` again")
    return json_digest(info.model_dump())


def checked_score_digest(dataset: Dataset, name: str) -> str:
    """The same, after comparing every part that is here with its digest. Raises CorruptError where one differs."""
    found = score_digest(dataset, name)
    if dataset.sql_filesystem is not None:
        return found  # the parts are elsewhere, and only some of their columns are read
    for relative, info in load_score_info(dataset, name).files.items():
        path = inside(dataset.path, relative)
        if not path.is_file() or file_info(path) != info:
            raise CorruptError(f"{path} is not what was committed; remove scores/{name} and run `kdata score` again")
    return found
