"""Plans: which sequences, how often. A plan is a small Parquet of ids and repeats, and a JSON that says how they were chosen.

Data is never copied to be reweighted: a trainer reads dataset and plan. A plan lists the best rows first, so that a later
step can choose the first ones. Opening a plan of 100 million rows does not read them; `ids` does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from kdata.calls import validated
from kdata.config import as_written, first_problem
from kdata.errors import ConfigError, CorruptError, DataError, MismatchError, MissingError, first_line
from kdata.format.files import file_info, lock_of, matches, storage_errors, without_hidden, write_atomically
from kdata.format.manifest import digest_of, write_json
from kdata.format.positions import ChosenPositions, position_problem
from kdata.format.schema import Contract, Digest, FileInfo
from kdata.store.dataset import Dataset
from kdata.store.index import largest_column
from kdata.store.listed import PLANS, read_listing
from kdata.store.open import AnyDataset, opened
from kdata.store.queryable import check_new_name, is_name

PLAN_SCHEMA = pa.schema([pa.field("id", pa.string(), False), pa.field("repeats", pa.int32(), False)])
# Columns that a plan has where it chooses positions of its rows; weights only where they are not all 1.
POSITIONS_FIELD = pa.field("positions", pa.list_(pa.int32()), False)
WEIGHTS_FIELD = pa.field("weights", pa.list_(pa.float32()), False)
MAX_SEQUENCES = 1_000_000_000  # of a plan, repeats counted
CountBy = Literal["sequences", "tokens"]


class DomainChoice(Contract):
    """What a plan chose of one domain, and how much the dataset holds of it."""

    dataset_sequences: int = Field(ge=0, description="Sequences of the domain in the dataset.")
    dataset_tokens: int = Field(ge=0, description="Their tokens.")
    rows: int = Field(ge=0, description="Distinct sequences chosen.")
    sequences: int = Field(ge=0, description="Sequences chosen, repeats counted.")
    tokens: int = Field(ge=0, description="Their tokens, repeats counted.")
    requested: int | None = Field(
        None,
        description="What the method requested of this domain, in `unit`; null where it requests nothing of single domains.",
    )


class PositionShare(Contract):
    """Positions of one domain in a plan."""

    targets: int = Field(ge=0, description="Target positions of the rows that were chosen, each row once.")
    positions: int = Field(ge=0, description="Those of them that the plan chooses.")


class PositionsInfo(Contract):
    """How the positions of a plan were chosen."""

    rule: str = Field(description="Rule that chose them: entropy, surprise, random, margin, span, sql, ...")
    parameters: dict[str, Any] = Field(description="Parameters of the rule, and the threshold that it came to.")
    sql: str | None = Field(None, description="The DuckDB query that chose them; null when a rule did.")
    targets: int = Field(ge=0, description="Target positions of the rows that were chosen, each row once.")
    positions: int = Field(ge=1, description="Those of them that the plan chooses.")
    rows_left_out: int = Field(
        ge=0, description="Rows that were chosen and are not in the plan, because no position of them is chosen."
    )
    weighted: bool = Field(False, description="Whether the table has weights.")
    domains: dict[str, PositionShare] = Field(description="The same numbers of each domain.")


class ConditionInfo(Contract):
    """A condition on the rows of a plan, and what it left out."""

    condition: str = Field(description="The condition, SQL.")
    left_out: int = Field(ge=0, description="Rows for which it is not true.")
    unknown: int = Field(ge=0, description="Those of them for which it is null, because something is not known.")
    alone: int = Field(ge=0, description="Rows that it leaves out and no other condition does.")
    examples: list[str] = Field(description="Ids of some rows that it leaves out, those whose MD5 is smallest.")


class ConditionsInfo(Contract):
    """What the conditions of a plan left out, before its method chose."""

    rows: int = Field(ge=0, description="Rows of the dataset, or of the parent plan.")
    passed: int = Field(ge=0, description="Rows that meet every condition.")
    conditions: list[ConditionInfo] = Field(description="Each condition.")


class PlanInfo(Contract):
    """NAME.json beside NAME.parquet: how the rows of a plan were chosen."""

    name: str = Field(description="Name of the plan.")
    method: str = Field(description="Method that chose the rows: all, random, difference, sql, ...")
    parameters: dict[str, Any] = Field(description="Parameters of the method.")
    sql: str | None = Field(description="The DuckDB query that chose the ids; null when no query did.")
    dataset_digest: str = Field(
        alias="dataset_fingerprint", description="Content digest of the dataset that it selects from."
    )
    dataset_identity: Digest | None = Field(
        None,
        exclude_if=lambda digest: digest is None,
        description="`fingerprint` of that dataset; absent from older plans.",
    )
    scores: dict[str, str] = Field(description="Sidecars that were read: name to digest.")
    parents: dict[str, str] = Field({}, description="Plans that were read: name to `digest` of their JSON.")
    num_rows: int = Field(ge=0, description="Distinct sequences chosen.")
    num_tokens: int = Field(ge=0, description="Tokens, repeats counted.")
    count_by: CountBy | None = Field(
        None, alias="unit", description="What `requested` counts: sequences or tokens; null where a query chose."
    )
    requested: int | None = Field(None, description="Units requested in all; null where no number was requested.")
    domains: dict[str, DomainChoice] = Field({}, description="What was requested and chosen of each domain.")
    shares: dict[str, dict[str, float]] = Field(
        description="Per domain: share of tokens in the dataset and in the plan."
    )
    where: ConditionsInfo | None = Field(
        None,
        exclude_if=lambda info: info is None,
        description="What conditions left out before the method chose; absent without conditions.",
    )
    positions: PositionsInfo | None = Field(
        None,
        exclude_if=lambda info: info is None,
        description="How positions of the rows were chosen; absent where every target of a row counts.",
    )
    table: FileInfo | None = Field(None, description="Digest and size of NAME.parquet; null until it is saved.")
    digest: str = Field("", description="SHA-256 of everything else in the file; shows a damaged byte.")


def plan_schema(*, positions: bool = False, weights: bool = False) -> pa.Schema:
    """Columns of NAME.parquet."""
    return pa.schema([*PLAN_SCHEMA, *[POSITIONS_FIELD] * positions, *[WEIGHTS_FIELD] * weights])


class Plan:
    """A selection, and how it was chosen (`info`); see `kdata.select`, `kdata.make_plan` and `Plan.load`.

    `plan_digest` is the digest of its JSON file, "" before it is saved.
    """

    def __init__(
        self, table: pa.Table | Path, info: PlanInfo, plan_digest: str = "", table_info: FileInfo | None = None
    ) -> None:
        self._table, self.info, self.plan_digest, self._table_info = table, info, plan_digest, table_info

    def __repr__(self) -> str:
        return f"Plan({self.info.name!r}, rows={self.info.num_rows:,}, tokens={self.info.num_tokens:,})"

    @cached_property
    def table(self) -> pa.Table:
        """Columns id and repeats, and perhaps positions and weights, in order.

        Raises CorruptError where the file does not hold a plan's rows.
        """
        if isinstance(self._table, pa.Table):
            return self._table
        if self._table_info is not None:
            _refuse_other_table(self._table, self._table_info)
        chosen = self.info.positions
        schema = plan_schema(positions=chosen is not None, weights=chosen is not None and chosen.weighted)
        try:
            table = pq.read_table(self._table).cast(schema)
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptError(f"{self._table} is not a plan: {error}") from error
        if any(column.null_count for column in table.columns):
            raise CorruptError(f"{self._table} is not a plan: one of {schema.names} is null in a row")
        if int(pc.sum(table["repeats"].cast(pa.int64())).as_py() or 0) > MAX_SEQUENCES:
            raise CorruptError(f"{self._table} chooses more than {MAX_SEQUENCES:,} sequences, repeats counted")
        if table.num_rows and table["repeats"].to_numpy().min() < 1:
            raise CorruptError(f"{self._table} has repeats below 1; run `kdata select` again")
        return table

    @cached_property
    def ids(self) -> list[str]:
        """Ids, R of them."""
        ids: list[str] = self.table["id"].to_pylist()
        return ids

    @property
    def repeats(self) -> np.ndarray:
        """How often each id is chosen, int32 [R] >= 1."""
        repeats: np.ndarray = self.table["repeats"].to_numpy()
        return repeats

    @validated
    def choice(self, dataset: Dataset) -> tuple[np.ndarray, ChosenPositions | None]:
        """Global row numbers int64 [sum of repeats], in plan order; and which positions of them count, None: every target.

        Raises:
            MismatchError: the dataset has changed since the plan was written.
            CorruptError: positions or weights of a row are not well-formed. (Whether they are targets is seen when the row is
                read.)
        """
        self.check(dataset)
        if isinstance(self._table, Path) and self.info.positions is not None:
            _refuse_more_values(self._table, dataset.num_tokens)
        rows = dataset.rows_of(self.ids)
        return np.repeat(rows, self.repeats), None if self.info.positions is None else self._positions(dataset, rows)

    def _positions(self, dataset: Dataset, rows: np.ndarray) -> ChosenPositions:
        chosen = self.info.positions
        assert chosen is not None
        offsets, positions = _lists(self.table["positions"], np.int32)
        weights = None
        num_tokens = dataset.index(["num_tokens"])["num_tokens"].to_numpy()[rows]
        if chosen.weighted:
            own_offsets, weights = _lists(self.table["weights"], np.float32)
            if not np.array_equal(own_offsets, offsets):
                differs = np.flatnonzero(np.diff(own_offsets) != np.diff(offsets))
                self._refuse_row(int(differs[0]), "it has another number of weights than of positions")
        if len(np.unique(rows)) < len(rows):
            raise CorruptError(f"plan {self.info.name!r} has a row twice; run `kdata select` again")
        problem = position_problem(offsets, positions, num_tokens, weights)
        if problem is not None:
            self._refuse_row(*problem)
        if len(positions) != chosen.positions:
            raise CorruptError(
                f"plan {self.info.name!r} has {len(positions):,} positions and its JSON says {chosen.positions:,}; run "
                "`kdata select` again"
            )
        return ChosenPositions.of(rows, offsets, positions, weights)

    def _refuse_row(self, number: int, problem: str) -> NoReturn:
        raise CorruptError(f"plan {self.info.name!r}, row {self.ids[number]!r}: {problem}; run `kdata select` again")

    @property
    def dataset_digest(self) -> str:
        """Content digest of the dataset that the plan belongs to."""
        return self.info.dataset_digest

    @classmethod
    @validated
    def load(cls, path: str | Path) -> Plan:
        """Open NAME.parquet and NAME.json; `path` is either of them, or the path without an ending.

        Raises:
            MissingError: one of the two does not exist.
            CorruptError: one of the two is damaged, or they do not belong together.
        """
        table_path, info_path = plan_files(Path(path))
        for needed in (table_path, info_path):
            if not needed.exists():
                raise MissingError(
                    f"plan {table_path.stem!r}: {needed} does not exist; write the plan with `kdata select`"
                )
        _, content = read_listing(info_path, PLANS)
        try:
            info = PlanInfo.model_validate(content)
        except ValidationError as error:
            raise CorruptError(f"{info_path} does not describe a plan: {first_problem(error)}") from error
        if info.table is not None:
            _refuse_other_table(table_path, info.table)
        try:
            num_rows = pq.read_metadata(table_path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise CorruptError(f"{table_path} is not a plan: {error}") from error
        if num_rows != info.num_rows:
            raise CorruptError(f"{table_path} has {num_rows} rows and {info_path.name} says {info.num_rows}")
        unsaved = info.model_copy(update={"table": None, "digest": ""})  # the two fields describe the files
        return cls(table_path, unsaved, info.digest, info.table)

    @validated
    def save(self, directory: Path) -> Path:
        """Write NAME.parquet and NAME.json into `directory` (the JSON last); return the Parquet's path.

        Raises:
            StorageError: another process writes to the dataset, or the disk refuses.
        """
        in_dataset = directory.name == "plans" and (directory.parent / "dataset.json").exists()
        with storage_errors(directory), lock_of(directory.parent if in_dataset else directory):
            directory.mkdir(parents=True, exist_ok=True)
            check_new_name("plan", self.info.name, (p.stem for p in without_hidden(directory, "*.parquet")))
            path, _ = plan_files(directory / self.info.name)
            sink = pa.BufferOutputStream()
            pq.write_table(self.table, sink, compression="zstd")
            write_atomically(path, sink.getvalue().to_pybytes())
            self.plan_digest = write_plan_info(path, self.info)
        return path

    @validated
    def check(self, dataset: Dataset) -> None:
        """Raise MismatchError where the plan is of another dataset, or the dataset has changed since it was written."""
        if self.info.dataset_identity not in (None, dataset.info.identity_digest):
            raise MismatchError(
                f"plan {self.info.name!r} was written for another dataset than {dataset.path}: another teacher, tokenizer, "
                "codec or vocabulary. Run `kdata select` again."
            )
        if dataset.content_digest != self.info.dataset_digest:
            raise MismatchError(
                f"plan {self.info.name!r} belongs to another state of {dataset.path} (digest "
                f"{self.info.dataset_digest[:12]}, now {dataset.content_digest[:12]}): rows were added or changed. Run "
                "`kdata select` again."
            )

    @validated
    def rows(self, dataset: Dataset) -> np.ndarray:
        """Global row numbers int64 [sum of repeats], in plan order. `choice` gives the positions, too.

        Raises:
            MismatchError: the dataset has changed since the plan was written.
            ConfigError: the plan chooses positions, which would be ignored.
        """
        if self.info.positions is not None:
            raise ConfigError(
                f"plan {self.info.name!r} chooses positions of its rows, and whole rows were asked for; use a plan without "
                "positions, or `Plan.choice`, which gives rows and positions"
            )
        rows, _ = self.choice(dataset)
        return rows


def _refuse_other_table(path: Path, info: FileInfo) -> None:
    if not path.is_file() or not matches(path, info):
        raise CorruptError(f"{path} is not the plan that was saved; run `kdata select` again")


def _refuse_more_values(path: Path, most: int) -> None:
    """Raise CorruptError where a column says that it has more values than the dataset has tokens: a small file can."""
    try:
        count = largest_column(path)
    except (pa.ArrowException, OSError) as error:
        raise CorruptError(f"{path} is not a plan: {error}") from error
    if count > most:
        raise CorruptError(
            f"{path} has {count:,} values in a column, more than the dataset's {most:,} tokens; run `kdata select` again"
        )


def _lists(column: pa.ChunkedArray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Offsets int64 [R+1] and values of a list column without null lists. Raises CorruptError where a value is null."""
    parts = [chunk.flatten() for chunk in column.chunks]
    if any(part.null_count for part in parts):
        raise CorruptError("a plan has a position or a weight that is null; run `kdata select` again")
    counts = [pc.list_value_length(chunk).to_numpy() for chunk in column.chunks]
    offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts]))
    return offsets, np.concatenate([np.zeros(0, dtype), *(part.to_numpy() for part in parts)])


def plan_files(path: Path) -> tuple[Path, Path]:
    """NAME.parquet and NAME.json of a plan, from either of them or from the path without an ending."""
    base = path.with_suffix("") if path.suffix in (".parquet", ".json") else path
    return base.with_name(base.name + ".parquet"), base.with_name(base.name + ".json")


@validated
def open_plan(dataset: Dataset, name: str) -> Plan:
    """A plan of this dataset by its name. Raises as `Plan.load` and `Plan.check`, and ConfigError for an invalid name."""
    if not is_name(name):
        raise ConfigError(f"{name!r} is not a valid plan name; use letters, digits and _, beginning with a letter")
    dataset.fetch_plan(name)
    plan = Plan.load(dataset.path / "plans" / name)
    plan.check(dataset)
    return plan


def write_plan_info(table_path: Path, info: PlanInfo) -> str:
    """Write NAME.json beside a finished NAME.parquet; return its digest."""
    content = info.model_copy(update={"table": file_info(table_path)}).model_dump()
    write_json(table_path.with_suffix(".json"), content)
    return digest_of(content)


def plan_info(domains: dict[str, DomainChoice], dataset: Dataset, **fields: Any) -> PlanInfo:
    """The description of a plan of a dataset from what it chose of each domain.

    Raises DataError where it chose nothing, or more than any reader takes.
    """
    if not any(domain.rows for domain in domains.values()):
        why = "; request more, or loosen its condition"
        if fields.get("count_by") == "tokens" and fields.get("requested"):
            why = (
                f": {fields['requested']:,} tokens are requested in all, and the first sequence of each domain (or of "
                "all, where they are chosen together) is longer than what is requested there; request more (size or share)"
            )
        raise DataError(f"plan {fields['name']!r} selects no row{why}")
    sequences = sum(domain.sequences for domain in domains.values())
    if sequences > MAX_SEQUENCES:
        raise DataError(
            f"plan {fields['name']!r} would choose {sequences:,} sequences, repeats counted, and a plan has at most "
            f"{MAX_SEQUENCES:,}; repeat rows less often, or request less"
        )
    in_dataset = sum(domain.dataset_tokens for domain in domains.values())
    in_plan = sum(domain.tokens for domain in domains.values())
    shares = {
        name: {"dataset": domain.dataset_tokens / in_dataset, "plan": domain.tokens / in_plan}
        for name, domain in sorted(domains.items())
    }
    num_rows = sum(domain.rows for domain in domains.values())
    of = {"dataset_digest": dataset.content_digest, "dataset_identity": dataset.info.identity_digest}
    return PlanInfo(domains=domains, shares=shares, num_rows=num_rows, num_tokens=in_plan, **of, **fields)


def _whole(name: str, repeats: np.ndarray) -> np.ndarray:
    """Repeats as int32 [R]. Raises DataError unless each is a whole number >= 1."""
    if repeats.dtype.kind not in "iufO":
        raise DataError(f"plan {name!r}: repeats must be whole numbers >= 1, not {repeats.dtype}")
    numbers = np.array([np.nan if value is None else float(value) for value in repeats], np.float64)
    bad = np.flatnonzero(~((numbers >= 1) & (numbers < 2**31) & (numbers == np.floor(numbers))))
    if len(bad):
        raise DataError(f"plan {name!r}: repeats must be whole numbers >= 1, but row {bad[0]} has {repeats[bad[0]]}")
    return numbers.astype(np.int32)


def domain_choices(dataset: Dataset, rows: np.ndarray, times: np.ndarray) -> dict[str, DomainChoice]:
    """What is chosen of each domain of a dataset.

    Args:
        rows: int64 [R], distinct global rows. times: int [R], how often each is chosen.
    """
    index = dataset.index(["domain", "num_tokens"])
    names, number_R = np.unique(np.array(index["domain"].to_pylist(), dtype=object), return_inverse=True)
    tokens_R = index["num_tokens"].to_numpy().astype(np.int64)
    times_R = np.zeros(len(tokens_R), np.int64)
    times_R[rows] = times
    domains = {}
    for number, domain in enumerate(names):
        here = number_R == number
        domains[str(domain)] = DomainChoice(
            dataset_sequences=int(here.sum()),
            dataset_tokens=int(tokens_R[here].sum()),
            rows=int((times_R[here] > 0).sum()),
            sequences=int(times_R[here].sum()),
            tokens=int((times_R * tokens_R)[here].sum()),
        )
    return domains


def positions_info(dataset: Dataset, rows: np.ndarray, counts: np.ndarray, **fields: Any) -> PositionsInfo:
    """The description of chosen positions: how many of how many, in all and in each domain.

    Args:
        rows: int64 [R], distinct global rows that were chosen. counts: int [R], chosen positions of each; 0 leaves a row out.
        fields: further fields of PositionsInfo.
    Raises:
        DataError: no position is chosen.
    """
    index = dataset.index(["domain", "num_target_tokens"])
    if not counts.sum():
        if not np.nan_to_num(index["num_target_tokens"].to_numpy().astype(np.float64)[rows]).any():
            raise DataError("the chosen rows have no target position to choose from; choose other rows")
        raise DataError(f"the rule {fields['rule']!r} chooses no position of the rows; loosen it, or choose other rows")
    names, number_R = np.unique(np.array(index["domain"].to_pylist(), dtype=object)[rows], return_inverse=True)
    targets = np.nan_to_num(index["num_target_tokens"].to_numpy().astype(np.float64)[rows])
    in_all, chosen = (np.bincount(number_R, values).astype(np.int64).tolist() for values in (targets, counts))
    return PositionsInfo(
        targets=sum(in_all),
        positions=sum(chosen),
        rows_left_out=int((counts == 0).sum()),
        domains={
            str(name): PositionShare(targets=all_here, positions=here)
            for name, all_here, here in zip(names, in_all, chosen, strict=True)
        },
        **fields,
    )


@validated
def make_plan(
    dataset: AnyDataset,
    name: str,
    ids: list[str],
    *,
    method: str,
    parameters: dict[str, Any],
    sql: str | None = None,
    scores: dict[str, str] | None = None,
    repeats: np.ndarray | None = None,
    positions: Sequence[Sequence[int] | np.ndarray] | None = None,
    weights: Sequence[Sequence[float] | np.ndarray] | None = None,
) -> Plan:
    """Make a plan of `ids`, with realised shares per domain.

    Args:
        positions: which positions of each id count, rising, at least one; None: every target.
        weights: how much each of them counts, > 0; None: 1.
    Raises:
        DataError: no id, a repeated id, invalid repeats, positions or weights.
    """
    dataset, parameters = opened(dataset), as_written(parameters)
    try:
        json.dumps(parameters)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"plan {name!r}: parameters are kept as JSON, and this cannot be: {first_line(error)}"
        ) from error
    if not ids:
        raise DataError(f"plan {name!r} selects no row: the list of ids is empty; give at least one id")
    if len(set(ids)) != len(ids):
        raise DataError(f"plan {name!r}: an id is in the list twice; list it once, and give its `repeats`")
    times = np.ones(len(ids), np.int32) if repeats is None else _whole(name, repeats)
    if times.shape != (len(ids),):
        raise DataError(f"plan {name!r}: give one number of repeats for each id, {len(ids):,}, not {list(times.shape)}")
    rows = dataset.rows_of(ids)
    columns: dict[str, Any] = {"id": ids, "repeats": times}
    chosen = None
    if positions is not None:
        columns |= _position_columns(dataset, name, ids, rows, positions, weights)
        counts = np.array([len(own) for own in positions])
        of = {"rule": method, "parameters": parameters, "sql": sql, "weighted": weights is not None}
        chosen = positions_info(dataset, rows, counts, **of)
    elif weights is not None:
        raise DataError(f"plan {name!r}: weights are of positions; give the positions, too")
    fields = {"name": name, "method": method, "parameters": parameters, "sql": sql, "scores": scores or {}}
    info = plan_info(domain_choices(dataset, rows, times), dataset, positions=chosen, **fields)
    schema = plan_schema(positions=positions is not None, weights=weights is not None)
    return Plan(pa.table(columns, schema=schema), info)


def _position_columns(
    dataset: Dataset,
    name: str,
    ids: list[str],
    rows: np.ndarray,
    positions: Sequence[Sequence[int] | np.ndarray],
    weights: Sequence[Sequence[float] | np.ndarray] | None,
) -> dict[str, Any]:
    """The columns of a plan with positions. Raises DataError where they cannot be right."""
    lengths = [[len(own) for own in lists] for lists in (positions, positions if weights is None else weights)]
    if len(lengths[0]) != len(ids) or lengths[0] != lengths[1]:
        raise DataError(f"plan {name!r}: give one list of positions for each id, and as many weights as positions")
    for row_id, own in zip(ids, positions, strict=True):
        if len(own) and np.asarray(own).dtype.kind not in "iu":
            raise DataError(f"plan {name!r}, row {row_id!r}: positions are whole numbers, and {own[0]!r} is none")
    for row_id, weight in zip(ids, weights or (), strict=weights is not None):
        if len(weight) and np.asarray(weight).dtype.kind not in "iuf":
            raise DataError(f"plan {name!r}, row {row_id!r}: weights are numbers, and {weight[0]!r} is none")
    flat = np.concatenate([np.asarray(own, np.int64) for own in positions])
    own_weights = None if weights is None else np.concatenate([np.asarray(own, np.float32) for own in weights])
    num_tokens = dataset.index(["num_tokens"])["num_tokens"].to_numpy()[rows]
    problem = position_problem(np.concatenate([[0], np.cumsum(lengths[0])]), flat, num_tokens, own_weights)
    if problem is not None:
        raise DataError(f"plan {name!r}, row {ids[problem[0]]!r}: {problem[1]}")
    columns = {"positions": [np.asarray(own, np.int32) for own in positions]}
    if weights is not None:
        columns["weights"] = [np.asarray(own, np.float32) for own in weights]
    return columns
