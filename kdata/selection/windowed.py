"""Methods whose choice depends on the order of all rows: each is one window query over their numbers.

The numbers go into a temporary table, a piece of the dataset at a time, and DuckDB sorts it, on disk where memory is full.
So a row costs more than by `kdata.selection.rank`, which sorts none that it does not choose.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from pydantic import Field

from kdata.errors import DataError
from kdata.selection.rank import check_values
from kdata.selection.session import DomainSizes, Session
from kdata.selection.step import Chosen, Counts, Step
from kdata.store.sql import literal

COUNTS = """
select domain, count(*), sum(repeats)::bigint, sum(repeats::bigint * num_tokens)::bigint, min(number)
from chosen group by domain order by domain
"""
# What the plan records: the same choice over the views of `kdata sql`.
WHOLE = """with rows as (
    {rows}
), numbers as (
    select id, domain, repeats, num_tokens, {part} as part, value as number from ({values})
), chosen as (
    {window}
)
select id, repeats from chosen order by value desc, id"""


class Windowed(Step):
    """A method that chooses by a window query; rows of a parent plan keep their repeats."""

    by_domain: bool = Field(False, description="Choose in each domain apart; otherwise among all sequences together.")

    @abstractmethod
    def values(self) -> str:
        """A query over `rows` and scores that gives all columns of `rows` and a number, `value`; see `rank.Ranking.sql`."""

    @abstractmethod
    def window(self) -> str:
        """A query over `numbers` (id, domain, repeats, num_tokens, part, number): the chosen rows, with a `value`."""

    def choose(self, session: Session, domains: DomainSizes) -> tuple[Chosen, dict[str, Any]]:
        """See `Step.choose`. Raises DataError where a row has no number, or the query leaves nothing."""
        scores, part = self.sidecars(session.dataset), "domain" if self.by_domain else "''"
        session.execute(
            "create or replace temp table numbers "
            "(id varchar, domain varchar, repeats integer, num_tokens integer, part varchar, number double)"
        )
        for _ in session.pieces(scores):
            session.execute(
                f"insert into numbers select id, domain, repeats, num_tokens, {part}, value from ({self.values()})"
            )
        check_values(session, "(select number as value, num_tokens as mass from numbers)", scores)
        session.execute(f"create or replace temp table chosen as {self.window()}")
        counts = session.fetch(COUNTS)
        if not counts:
            raise DataError(f"plan {self.name or self.method!r} selects no row: {self.nothing()}")
        chosen = Chosen(
            domains={domain: Counts(rows, sequences, tokens) for domain, rows, sequences, tokens, _ in counts},
            lowest={domain: number for domain, _, _, _, number in counts},
            sql=WHOLE.format(
                rows=session.rows("main.rows"), part=part, values=self.values().strip(), window=self.window().strip()
            ),
        )
        return chosen, self.recorded()

    @abstractmethod
    def nothing(self) -> str:
        """What to change where nothing is chosen."""


def random_number(seed: int) -> str:
    """SQL of a number in [0, 1) for each `part`, from the seed: see `kdata.selection.ranked.RANDOM`."""
    return f"md5_number({literal(f'{seed}:')} || part)::double / 340282366920938463463374607431768211456.0::double"
