"""Whatever a query returns: ids, and how often each is taken."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kdata.errors import ConfigError, DataError, MissingError
from kdata.selection.session import Session
from kdata.selection.step import Domains, Made, Step
from kdata.store.dataset import Dataset
from kdata.store.sql import check_recordable, mentions

# The order of the answer is the order of the plan. Without a column `repeats` a row is taken once, or as often as before.
CHOSEN = """
create or replace temp table chosen as
select answer.id, -answer._place::double as value, {repeats}::integer as repeats, rows.domain, rows.num_tokens
from answer left join rows on answer.id = rows.id
"""
TAKEN = """
select domain, count(*), sum(repeats)::bigint, sum(repeats::bigint * num_tokens)::bigint
from chosen group by domain order by domain
"""


class Sql(Step):
    """A query over `rows` (of a plan that is taken further: with its `repeats` and `place`), `scores.NAME`, `plans.NAME`."""

    method: Literal["sql"] = "sql"
    sql: str | None = Field(
        None, description="Query that returns a column `id` and optionally `repeats`; its order is kept."
    )

    def sidecars(self, dataset: Dataset) -> list[str]:
        """See `Step.sidecars`."""
        return mentions(dataset, self.sql or "")["scores"]

    def make(self, session: Session, domains: Domains) -> Made:
        """See `Step.make`."""
        if not self.sql:
            raise ConfigError('method sql needs a query: --sql "select id from rows where ..."')
        session.show(session.dataset.manifest, [])
        if session.parent is None:  # as `kdata sql` has it: a column repeats would be in the way of joins with plans
            session.execute("create or replace view rows as from every_row")
        session.refuse_writing(self.sql)
        check_recordable(self.sql)
        # Column names in lower case, as SQL does not tell them apart; the order of the answer in a column of its own.
        session.execute(f"create or replace temp view asked as {self.sql.strip().rstrip(';')}")
        columns = {
            name.lower(): kind for name, kind in session.fetch("select column_name, column_type from (describe asked)")
        }
        taken = ", ".join(f'"{name}" as {name}' for name in ("id", "repeats") if name in columns) or "*"
        session.execute(
            f"create or replace temp table answer as select {taken}, row_number() over () as _place from asked"
        )
        self._check(session, columns)
        of_rows = "1" if session.parent is None else "rows.repeats"
        repeats = "answer.repeats" if "repeats" in columns else of_rows
        session.execute(CHOSEN.format(repeats=repeats))
        unknown = session.fetch("select id from chosen where domain is null order by value desc limit 1")
        if unknown:
            where = f"{session.dataset.path}" + (f", plan {self.parent!r}," if self.parent else "")
            raise MissingError(f"{where} has no row with id {unknown[0][0]!r}")
        found = {domain: (rows, sequences, tokens) for domain, rows, sequences, tokens in session.fetch(TAKEN)}
        return Made(found, self.sql.strip(), {}, parents=mentions(session.dataset, self.sql)["plans"])

    def _check(self, session: Session, columns: dict[str, str]) -> None:
        if "id" not in columns:
            raise ConfigError(f"the query must return a column `id`; it returns {list(columns)}")
        name = self.name or self.method
        [(rows, nulls)] = session.fetch("select count(*), count(*) filter (id is null) from answer")
        if columns["id"] != "VARCHAR" or nulls:
            raise ConfigError("the column `id` of the query must hold ids of rows, as text and without nulls")
        if not rows:
            raise DataError(f"plan {name!r} selects no row; loosen its condition")
        if session.fetch("select id from answer group by id having count(*) > 1 limit 1"):
            raise DataError(f"plan {name!r}: an id stands twice; say how often with repeats")
        if "repeats" in columns:
            odd = session.fetch(
                "select _place - 1, repeats from answer where repeats is null "
                "or not (repeats::double between 1 and 2147483647) or repeats::double <> floor(repeats::double) "
                "order by _place limit 1"
            )
            if odd:
                number, value = odd[0]
                raise DataError(f"plan {name!r}: repeats must be whole numbers from 1 on, row {number} has {value}")
