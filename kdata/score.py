"""Scores: numbers per sequence from elsewhere, as a sidecar that is joined by id. The payload is never touched.

A sidecar `scores/NAME/` has one Parquet part per shard and `scores/NAME.json`, which says which model, on which dataset,
and the digest of each part. Here a model scores (id, nll, num_target_tokens); `kdata/score_file.py` takes numbers from a
file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from kdata.dataset import Dataset
from kdata.errors import (
    ConfigError,
    CorruptError,
    MismatchError,
    MissingError,
    TeacherError,
    settings_difference,
)
from kdata.keep import KeepConfig
from kdata.manifest import digest_of, file_info, first_problem, inside, write_atomically, write_json
from kdata.progress import Stage
from kdata.schema import Contract, FileInfo, ManifestEntry, Strict, TeacherInfo, fingerprint
from kdata.shard import storage_errors
from kdata.sql import check_new_name, is_name
from kdata.teachers import TeacherConfig, load_teacher, load_tokenizer, tokenizer_info

SCORE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), False),
        pa.field("nll", pa.float64(), True),
        pa.field("num_target_tokens", pa.int32(), False),
    ]
)


class ScoreConfig(Strict):
    """Which model scores, and what the sidecar is called."""

    model: TeacherConfig
    name: str = Field("ref", pattern=r"^[A-Za-z][A-Za-z0-9_]*$", description="Name of the sidecar, scores.NAME in SQL.")


class ScoreInfo(Contract):
    """scores/NAME.json."""

    name: str = Field(description="Name of the sidecar, scores.NAME in SQL.")
    unit: str = Field(description="What the number is: nats per target token, or whatever was brought.")
    model: TeacherInfo | None = Field(description="Who scored; null where the numbers were brought.")
    tokenizer_hash: str | None = Field(description="Its tokenizer; the same as the dataset's. Null where brought.")
    dataset_fingerprint: str = Field(description="Fingerprint of the dataset that was scored.")
    columns: list[str] = Field(["nll", "num_target_tokens"], description="Columns of the parts beside `id`.")
    origin: FileInfo | None = Field(
        None, description="Digest and size of the file that was brought; null where a model scored."
    )
    files: dict[str, FileInfo] = Field(description="Parts, by path inside the dataset; empty until all are there.")
    digest: str = Field("", description="SHA-256 of everything else in the file: finds a damaged byte.")


def score(dataset: Dataset, config: ScoreConfig, *, log: Path | None = None) -> ScoreInfo:
    """Score every sequence of a dataset: mean NLL in nats over the same target positions as the teacher's.

    A part that is there already, made by the same model for the same shard, is kept.

    Raises:
        MismatchError: the model has another tokenizer, or the sidecar is another model's.
        ConfigError: a sequence is longer than the model's context.
        TeacherError: the model's log-probabilities are not finite.
    """
    tokenizer = load_tokenizer(config.model.model, config.model.revision)
    own = tokenizer_info(tokenizer).hash
    if own != dataset.info.tokenizer.hash:
        raise MismatchError(
            f"{config.model.model} has another tokenizer ({own[:12]}) than the dataset "
            f"({dataset.info.tokenizer.hash[:12]}); a per-token score needs the same one"
        )
    model = load_teacher(config.model, max_k=1)
    try:
        longest = max(dataset.index(["num_tokens"])["num_tokens"].to_pylist(), default=0)
        if longest > model.context:
            raise ConfigError(
                f"the dataset has a sequence of {longest:,} tokens, {config.model.model} reads at most {model.context:,}; "
                "score with a model of a longer context"
            )
        info = ScoreInfo(
            name=config.name,
            unit="nats per target token",
            model=model.info,
            tokenizer_hash=own,
            dataset_fingerprint=dataset.fingerprint,
            files={},
        )
        with (
            storage_errors(dataset.path),
            Stage(f"score {config.name}: reading", dataset.num_tokens, "tokens", log) as stage,
        ):
            begin_sidecar(dataset, info)
            for number, entry in enumerate(dataset.manifest):
                if _has_part(dataset, config.name, entry):
                    stage.skip(entry.tokens)
                    continue
                write_part(dataset, config.name, entry, _score_shard(dataset, number, entry, model))
                stage.advance(entry.tokens)
            return finish_sidecar(dataset, info)
    finally:
        model.close()


def _score_shard(dataset: Dataset, number: int, entry: ManifestEntry, model: Any) -> pa.Table:
    sequences = dataset.shard(number)
    ids = [sequences.token_ids[a:b] for a, b in sequences.spans()]
    nlls = [
        sequence_nll(readout.logprob, sequences.target_mask[a:b])
        for readout, (a, b) in zip(model.read(ids, KeepConfig(kind="topk", k=1)), sequences.spans(), strict=True)
    ]
    counts = [int(sequences.target_mask[a:b].sum()) for a, b in sequences.spans()]
    names = pq.read_table(dataset.shard_file(entry, "index"), columns=["id"])["id"]
    return pa.table({"id": names, "nll": nlls, "num_target_tokens": counts}, schema=SCORE_SCHEMA)


def sequence_nll(logprob_T: np.ndarray, mask_T: np.ndarray) -> float | None:
    """Mean negative log-probability over the masked positions, nats per token; None without any.

    Raises TeacherError where it is not finite.
    """
    if not mask_T.any():
        return None
    if not np.isfinite(logprob_T[mask_T]).all():
        raise TeacherError("the model gives a token a log-probability that is not finite; are its weights sound?")
    return float(-logprob_T[mask_T].astype(np.float64).mean())


def begin_sidecar(dataset: Dataset, info: ScoreInfo) -> None:
    """Start or go on with a sidecar. Raises MismatchError where another model's stands under that name."""
    path = dataset.path / "scores" / f"{info.name}.json"
    check_new_name("score", info.name, (other.stem for other in path.parent.glob("*.json")))
    (dataset.path / "scores" / info.name).mkdir(parents=True, exist_ok=True)
    if path.exists():
        before = load_score_info(dataset, info.name)
        # Of another fingerprint: rows were added since. Each part knows its shard, so those that fit are kept.
        changing = {"files", "dataset_fingerprint", "digest"}
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


def score_fingerprint(dataset: Dataset, name: str) -> str:
    """SHA-256 (hex) of a complete sidecar. Raises MissingError when it is not complete or is of other rows."""
    info = load_score_info(dataset, name)
    if info.dataset_fingerprint != dataset.fingerprint or not info.files:
        raise MissingError(f"score {name!r} does not cover the dataset as it is now; run `kdata score` again")
    return fingerprint(info.model_dump())


def checked_fingerprint(dataset: Dataset, name: str) -> str:
    """The same, after comparing every part that is here with its digest. Raises CorruptError where one differs."""
    found = score_fingerprint(dataset, name)
    if dataset.sql_filesystem is not None:
        return found  # the parts are elsewhere, and only some of their columns are read
    for relative, info in load_score_info(dataset, name).files.items():
        path = inside(dataset.path, relative)
        if not path.is_file() or file_info(path) != info:
            raise CorruptError(f"{path} is not what was committed; remove scores/{name} and run `kdata score` again")
    return found
