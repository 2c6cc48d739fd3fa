"""Robust active selection: uncertain rows tell most, unless the teacher is wrong there; a game decides."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kdata.selection.apportion import as_written
from kdata.selection.windowed import Windowed, random_number
from kdata.store.queryable import NAME

# Null stays null, and what is no margin becomes NaN: both are errors. `greatest` would ignore them.
GAINS = """
select rows.*, case when margin.margin is null then null
    when margin.margin between 0 and 1 then greatest(1 - margin.margin, 1e-6) else 'nan'::double end as value
from rows left join scores.{score} as margin using (id)
where rows.num_target_tokens > 0
"""
# Rows by falling gain g. `inverse` is the sum of 1 / g so far, in whole billionths, so that no order of additions changes it.
# The game's value at place j is (j - m) / inverse; at its largest, j*, the game ends, and row i <= j* has the probability
# (1 / g_i) / inverse. `reached` adds up k times these, each at most 1; a row is drawn where it passes a whole number plus the
# random start (systematic sampling).
GAME = """
with placed as (
    select *, row_number() over falling as place, count(*) over (partition by part) as held,
        sum(round(1e9 / number)::hugeint) over (falling rows unbounded preceding) as inverse
    from numbers
    window falling as (partition by part order by number desc, id)
), game as (
    select *, first_value(place) over best as last_place, first_value(inverse) over best as last_inverse
    from placed
    window best as (partition by part order by case when place > {wrong} * held then (place - {wrong} * held) / inverse end
        desc nulls last, place rows between unbounded preceding and unbounded following)
), drawn as (
    select *, least(1e12::hugeint, round(1e12 * ceil({share} * held) * round(1e9 / number) / last_inverse)::hugeint) as mass,
        sum(mass) over (partition by part order by number desc, id rows unbounded preceding) as reached
    from game where place <= last_place
)
select id, domain, repeats, num_tokens, part, number, -place as value
from drawn
where (reached + {start}) // 1000000000000 > (reached - mass + {start}) // 1000000000000
"""


class Robust(Windowed):
    """Robust active selection (arXiv 2210.01213): a draw of uncertain rows, fewer of those where the teacher may err.

    The gain of a row is 1 minus the teacher's mean margin. An adversary spoils a share `wrong` of the rows; the query has
    the probabilities that are best against it. The paper has no public code: the closed form is our derivation, checked
    against a linear program. The estimate of `wrong` is the user's.
    """

    CHOOSES: ClassVar[str] = "unsure but trusted"
    SOURCE: ClassVar[str] = "arXiv 2210.01213"

    method: Literal["robust"] = "robust"
    share: float = Field(
        0.5, gt=0, le=1, description="Share to draw, about: a row that would be drawn more than once is drawn once."
    )
    wrong: float = Field(
        0.1, gt=0, lt=1, description="Share of the rows on which the teacher is wrong, as you expect it."
    )
    score: str = Field(
        "margin", pattern=NAME.pattern, description="Sidecar with a column `margin`; `kdata score --margins` writes it."
    )
    seed: int = Field(0, ge=0, description="Seed of the random start.")

    def score_columns(self) -> dict[str, str]:
        """See `Step.score_columns`."""
        return {self.score: "margin"}

    def values(self) -> str:
        """See `Windowed.values`."""
        return GAINS.format(score=self.score)

    def window(self) -> str:
        """See `Windowed.window`."""
        start = f"floor(1e12 * {random_number(self.seed)})::hugeint"
        # Decimals, as they are written: 0.1 of 10 rows is one row.
        return GAME.format(share=_decimal(self.share), wrong=_decimal(self.wrong), start=start)

    def nothing(self) -> str:
        """See `Windowed.nothing`."""
        return "fewer than one row is drawn; set a larger share"


def _decimal(number: float) -> str:
    fraction = as_written(number)
    return f"({fraction.numerator}::double / {fraction.denominator})"
