"""Selection methods: each is a DuckDB query over `rows` and the scores, and its result a plan.

A method returns ids; `select` turns them into a plan with its SQL, parameters and realised shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from kdata.dataset import Dataset
from kdata.errors import ConfigError, DataError
from kdata.plan import Plan, make_plan
from kdata.schema import Strict
from kdata.score import score_fingerprint

# MiniPLM (arXiv 2410.17215): r(x) = NLL_ref(x) - NLL_teacher(x), mean per token; the top share of all sequences is
# kept, globally and deterministically. Ties go by id. (0.07 * 100 is 7.000000000000001 in floating point: hence 1e-9.)
DIFFERENCE = """
select id, ref.nll - rows.nll as difference
from rows join scores.{score} as ref using (id)
where rows.nll is not null
qualify row_number() over (order by difference desc, id) <= ceil($share * count(*) over () - 1e-9)
order by difference desc, id
"""

# A hash of id and seed orders the rows: the same rows whatever the order of shards or threads.
RANDOM = """
select id from rows
where nll is not null
qualify row_number() over (order by md5($seed || ':' || id), id) <= ceil($share * count(*) over () - 1e-9)
order by id
"""

ALL = "select id from rows where nll is not null order by id"


class SelectConfig(Strict):
    """Which sequences to take."""

    method: Literal["difference", "random", "all", "sql"] = Field("difference", description="How rows are chosen.")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z][A-Za-z0-9_]*$", description="Name of the plan; null takes the method's."
    )
    share: float = Field(0.5, gt=0, le=1, description="Share of the sequences that is kept (difference, random).")
    score: str = Field(
        "ref", pattern=r"^[A-Za-z][A-Za-z0-9_]*$", description="Sidecar with the reference NLL (difference)."
    )
    seed: int = Field(0, ge=0, description="Seed (random).")
    sql: str | None = Field(None, description="Query that returns a column `id` and optionally `repeats` (sql).")


@dataclass(frozen=True)
class Choice:
    """What a method chose: a table with `id` (and `repeats`), the SQL and what it was given."""

    table: pa.Table
    sql: str
    parameters: dict[str, Any]
    scores: dict[str, str]


def select(dataset: Dataset, config: SelectConfig) -> Plan:
    """Choose rows and save the plan at `plans/NAME.parquet` of the dataset.

    Raises:
        ConfigError: method and settings do not fit.
        DataError: nothing selected, or the score does not cover the rows.
        QueryError: DuckDB refused the query.
    """
    choice = METHODS[config.method](dataset, config)
    columns = choice.table.column_names
    repeats = np.array(choice.table["repeats"].to_pylist(), object) if "repeats" in columns else None
    plan = make_plan(
        dataset,
        config.name or config.method,
        choice.table["id"].to_pylist(),
        method=config.method,
        parameters=choice.parameters,
        sql=choice.sql.strip(),
        scores=choice.scores,
        repeats=repeats,
    )
    plan.save(dataset.path / "plans")
    return plan


def _difference(dataset: Dataset, config: SelectConfig) -> Choice:
    scores = {config.score: score_fingerprint(dataset, config.score)}
    sql = DIFFERENCE.format(score=config.score)
    table = dataset.sql(sql, {"share": config.share})
    without = dataset.sql(
        f"select count(*) as n from rows left join scores.{config.score} as ref using (id) "
        "where rows.nll is not null and ref.nll is null"
    )["n"][0].as_py()
    if without:
        raise DataError(f"score {config.score!r} lacks {without} rows that the teacher scored; run `kdata score` again")
    threshold = min(table["difference"].to_pylist(), default=None)
    return Choice(table, sql, {"share": config.share, "score": config.score, "threshold": threshold}, scores)


def _random(dataset: Dataset, config: SelectConfig) -> Choice:
    given = {"share": config.share, "seed": str(config.seed)}
    return Choice(dataset.sql(RANDOM, given), RANDOM, {"share": config.share, "seed": config.seed}, {})


def _all(dataset: Dataset, config: SelectConfig) -> Choice:
    return Choice(dataset.sql(ALL), ALL, {}, {})


def _sql(dataset: Dataset, config: SelectConfig) -> Choice:
    if not config.sql:
        raise ConfigError('method sql needs a query: --sql "select id from rows where ..."')
    table = dataset.sql(config.sql)
    if "id" not in table.column_names:
        raise ConfigError(f"the query must return a column `id`; it returns {table.column_names}")
    if not pa.types.is_string(table.schema.field("id").type) or table["id"].null_count:
        raise ConfigError("the column `id` of the query must hold ids of rows, as text and without nulls")
    return Choice(table, config.sql, {}, {})


METHODS = {"difference": _difference, "random": _random, "all": _all, "sql": _sql}
