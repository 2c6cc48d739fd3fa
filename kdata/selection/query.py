"""The method `sql`: the rows that a query returns, as ids and how often each is chosen."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from kdata.errors import ConfigError, DataError, MissingError
from kdata.selection.session import DomainSizes, Session
from kdata.selection.step import Chosen, Counts, Step
from kdata.store.dataset import Dataset
from kdata.store.sql import check_recordable, mentions, reads_of

# The order of the answer is the order of the plan. Without a column `repeats` a row is chosen once, or as often as in the
# parent plan.
FILL_CHOSEN = """
create or replace temp table chosen as
select answer.id, -answer._place::double as value, {repeats}::integer as repeats, rows.domain, rows.num_tokens
from answer left join rows on answer.id = rows.id
"""
COUNTS = """
select domain, count(*), sum(repeats)::bigint, sum(repeats::bigint * num_tokens)::bigint
from chosen group by domain order by domain
"""


class Sql(Step):
    """The rows that your query returns, in its order.

    It reads `rows` (with `repeats` and `place` where there is a parent plan), tokens, entries, scores and plans.
    """

    CHOOSES: ClassVar[str] = "rows of your query"

    method: Literal["sql"] = "sql"
    sql: str | None = Field(
        None, description="Query that returns a column `id` and optionally `repeats`; its order is kept."
    )

    def sidecars(self, dataset: Dataset) -> list[str]:
        """See `Step.sidecars`."""
        return mentions(dataset, self.sql or "")["scores"]

    def reads(self, dataset: Dataset) -> frozenset[str]:
        """See `Step.reads`. A query whose text does not say what it reads gets nothing, and is refused by `choose`."""
        return reads_of(dataset, self.sql or "") or frozenset()

    def choose(self, session: Session, domains: DomainSizes) -> tuple[Chosen, dict[str, Any]]:
        """See `Step.choose`."""
        if not self.sql:
            raise ConfigError('method sql needs a query: --sql "select id from rows where ..."')
        session.show(session.dataset.manifest, [])
        if session.parent is None:  # as in `kdata sql`: a column `repeats` would clash in joins with plans
            rows = session.rows("every_row")
            session.execute(f"create or replace view rows as select * exclude (repeats, place) from ({rows})")
        session.refuse_writing(self.sql)
        check_recordable(self.sql)
        # Column names in lower case, as SQL ignores case; the order of the answer in a column of its own.
        with session.tokens_of(self.sql):
            session.execute(f"create or replace temp view user_query as {self.sql.strip().rstrip(';')}")
            columns = {
                name.lower(): kind
                for name, kind in session.fetch("select column_name, column_type from (describe user_query)")
            }
            kept = ", ".join(f'"{name}" as {name}' for name in ("id", "repeats") if name in columns) or "*"
            session.execute(
                f"create or replace temp table answer as select {kept}, row_number() over () as _place from user_query"
            )
        self._check(session, columns)
        unchanged = "1" if session.parent is None else "rows.repeats"
        repeats = "answer.repeats" if "repeats" in columns else unchanged
        session.execute(FILL_CHOSEN.format(repeats=repeats))
        unknown = session.fetch("select id from chosen where domain is null order by value desc limit 1")
        if unknown:
            where = f"{session.dataset.path}" + (f", plan {self.parent!r}," if self.parent else "")
            among = " among those that meet the conditions (where)" if self.where else ""
            raise MissingError(f"{where} has no row with id {unknown[0][0]!r}{among}")
        counts = {domain: Counts(*numbers) for domain, *numbers in session.fetch(COUNTS)}
        parents = tuple(mentions(session.dataset, self.sql)["plans"])
        return Chosen(counts, self.sql.strip(), parents=parents), {}

    def _check(self, session: Session, columns: dict[str, str]) -> None:
        if "id" not in columns:
            raise ConfigError(f"the query must return a column `id`; it returns {list(columns)}")
        name = self.name or self.method
        [(rows, nulls)] = session.fetch("select count(*), count(*) filter (id is null) from answer")
        if columns["id"] != "VARCHAR" or nulls:
            raise ConfigError(
                f"the column `id` of the query is {columns['id']} with {nulls} nulls; it must hold ids as text, without nulls"
            )
        if not rows:
            raise DataError(f"plan {name!r} selects no row; loosen the query's condition")
        if twice := session.fetch("select id from answer group by id having count(*) > 1 order by id limit 1"):
            raise DataError(
                f"plan {name!r}: the query returns id {twice[0][0]!r} twice; return it once, with a column `repeats`"
            )
        if "repeats" in columns:
            invalid = session.fetch(
                "select _place - 1, repeats from answer where repeats is null "
                "or not (repeats::double between 1 and 2147483647) or repeats::double <> floor(repeats::double) "
                "order by _place limit 1"
            )
            if invalid:
                number, value = invalid[0]
                raise DataError(f"plan {name!r}: repeats must be whole numbers >= 1, but row {number} has {value}")
