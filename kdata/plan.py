"""Plans: which sequences, how often. A small Parquet of ids and repeats, and a JSON that says how it was made.

Data is never copied to be reweighted; a trainer reads dataset + plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from kdata.dataset import Dataset
from kdata.errors import CorruptError, DataError, MismatchError, MissingError
from kdata.manifest import file_info, first_problem, write_atomically, write_json
from kdata.schema import Contract, FileInfo

PLAN_SCHEMA = pa.schema([pa.field("id", pa.string(), False), pa.field("repeats", pa.int32(), False)])


class PlanInfo(Contract):
    """NAME.json beside NAME.parquet: where a plan came from."""

    name: str = Field(description="Name of the plan.")
    method: str = Field(description="Method that made it: all, random, difference, sql, ...")
    parameters: dict[str, Any] = Field(description="Parameters of the method.")
    sql: str | None = Field(description="The DuckDB query that chose the ids; null when no query did.")
    dataset_fingerprint: str = Field(description="Fingerprint of the dataset that it selects from.")
    scores: dict[str, str] = Field(description="Sidecars that were read: name to fingerprint.")
    num_rows: int = Field(ge=0, description="Distinct sequences taken.")
    num_tokens: int = Field(ge=0, description="Tokens, repeats counted.")
    shares: dict[str, dict[str, float]] = Field(
        description="Per domain: share of tokens in the dataset and in the plan."
    )
    table: FileInfo | None = Field(None, description="Digest and size of NAME.parquet; null until it is saved.")
    digest: str = Field("", description="SHA-256 of everything else in the file: finds a damaged byte.")


@dataclass(frozen=True)
class Plan:
    """A selection: `ids` str [R], `repeats` int32 [R] >= 1, and how it was made."""

    ids: list[str]
    repeats: np.ndarray
    info: PlanInfo

    @property
    def dataset_fingerprint(self) -> str:
        """Fingerprint of the dataset that the plan belongs to."""
        return self.info.dataset_fingerprint

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read PLAN.parquet and PLAN.json; `path` may name either, or neither ending.

        Raises:
            MissingError: one of the two is not there.
            CorruptError: the two do not make a plan.
        """
        base = Path(path)
        base = base.with_suffix("") if base.suffix in (".parquet", ".json") else base
        table_path, info_path = base.with_name(base.name + ".parquet"), base.with_name(base.name + ".json")
        for needed in (table_path, info_path):
            if not needed.exists():
                raise MissingError(f"plan {base.name!r}: {needed} does not exist; make it with `kdata select`")
        try:
            info = PlanInfo.model_validate_json(info_path.read_bytes())
            table = pq.read_table(table_path).cast(PLAN_SCHEMA)
        except ValidationError as error:
            raise CorruptError(f"{info_path} does not describe a plan: {first_problem(error)}") from error
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptError(f"{table_path} is not a plan: {error}") from error
        if info.table is not None and file_info(table_path) != info.table:
            raise CorruptError(f"{table_path} is not the plan that was saved; run `kdata select` again")
        repeats = table["repeats"].to_numpy()
        if len(repeats) != info.num_rows or (len(repeats) and repeats.min() < 1):
            raise CorruptError(f"{table_path} has {len(repeats)} rows and {info_path.name} says {info.num_rows}")
        alone = info.model_copy(update={"table": None, "digest": ""})  # what only a file has
        return cls(table["id"].to_pylist(), repeats, alone)

    def save(self, directory: Path) -> Path:
        """Write NAME.parquet and NAME.json into `directory` (the JSON last); return the Parquet's path."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.info.name}.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(
            pa.table({"id": self.ids, "repeats": self.repeats}, schema=PLAN_SCHEMA), sink, compression="zstd"
        )
        write_atomically(path, sink.getvalue().to_pybytes())
        info = self.info.model_copy(update={"table": file_info(path)})
        write_json(path.with_suffix(".json"), info.model_dump())
        return path

    def rows(self, dataset: Dataset) -> np.ndarray:
        """Global row numbers int64 [sum of repeats], in plan order.

        Raises:
            MismatchError: the dataset has changed since the plan was made.
        """
        if dataset.fingerprint != self.info.dataset_fingerprint:
            raise MismatchError(
                f"plan {self.info.name!r} was made for a dataset with fingerprint "
                f"{self.info.dataset_fingerprint[:12]}, {dataset.path} has {dataset.fingerprint[:12]}: rows were added "
                "or changed. Run `kdata select` again."
            )
        return np.repeat(dataset.rows_of(self.ids), self.repeats)


def _whole(name: str, repeats: np.ndarray) -> np.ndarray:
    """Repeats as int32 [R]. Raises DataError unless each is a whole number >= 1."""
    given = np.array([np.nan if value is None else float(value) for value in repeats], np.float64)
    bad = np.flatnonzero(~((given >= 1) & (given < 2**31) & (given == np.floor(given))))
    if len(bad):
        raise DataError(f"plan {name!r}: repeats must be whole numbers from 1 on, row {bad[0]} has {repeats[bad[0]]}")
    return given.astype(np.int32)


def make_plan(
    dataset: Dataset,
    name: str,
    ids: list[str],
    *,
    method: str,
    parameters: dict[str, Any],
    sql: str | None = None,
    scores: dict[str, str] | None = None,
    repeats: np.ndarray | None = None,
) -> Plan:
    """Make a plan of `ids`, with realised shares per domain. Raises DataError when nothing is selected."""
    if not ids:
        raise DataError(f"plan {name!r} selects no row; loosen its condition")
    if len(set(ids)) != len(ids):
        raise DataError(f"plan {name!r}: an id stands twice; say how often with repeats")
    times = np.ones(len(ids), np.int32) if repeats is None else _whole(name, repeats)
    index = dataset.index(["domain", "num_tokens"])
    rows = dataset.rows_of(ids)
    domains = np.array(index["domain"].to_pylist())
    tokens = index["num_tokens"].to_numpy().astype(np.int64)
    taken = tokens[rows] * times
    shares = {
        str(domain): {
            "dataset": float(tokens[domains == domain].sum() / tokens.sum()),
            "plan": float(taken[domains[rows] == domain].sum() / taken.sum()),
        }
        for domain in np.unique(domains)
    }
    info = PlanInfo(
        name=name,
        method=method,
        parameters=parameters,
        sql=sql,
        dataset_fingerprint=dataset.fingerprint,
        scores=scores or {},
        num_rows=len(ids),
        num_tokens=int(taken.sum()),
        shares=shares,
    )
    return Plan(ids, times, info)
