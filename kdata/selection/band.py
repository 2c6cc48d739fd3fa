"""A band of perplexity: neither the text that the model finds easiest, nor the text that it finds hardest."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kdata.selection.apportion import as_written
from kdata.selection.prune import by_number
from kdata.selection.windowed import Windowed
from kdata.store.queryable import NAME

# Rows in the order of their numbers, ties by id; those at places from low to high of their part, in whole numbers, so that
# nothing depends on rounding. The middle of the band comes first.
BAND = """
select *, -abs((place + 0.5) / held - {middle}) as value
from (
    select *, row_number() over (partition by part order by number, id) - 1 as place,
        count(*) over (partition by part) as held
    from numbers
)
where place * {low_of}::hugeint >= held * {low}::hugeint and place * {high_of}::hugeint < held * {high}::hugeint
"""


class Band(Windowed):
    """A band of perplexity: rows from one quantile of the NLL to another; by default the middle half.

    Source: Perplexed by Perplexity (arXiv 2405.20541), which prunes by a small reference model's perplexity and finds that
    the best band (low, medium, high) depends on the corpus; When Less Is More (arXiv 2309.04564) finds the middle best.
    """

    CHOOSES: ClassVar[str] = "middle of the NLL"
    SOURCE: ClassVar[str] = "arXiv 2405.20541"

    method: Literal["band"] = "band"
    low: float = Field(
        0.25, ge=0, lt=1, description="Quantile of the NLL where the band begins; 0: at the easiest row."
    )
    high: float = Field(0.75, gt=0, le=1, description="Quantile where it ends; 1: at the hardest row.")
    score: str | None = Field(
        None, pattern=NAME.pattern, description="Sidecar with a number for each row; null: the teacher's NLL."
    )
    column: str = Field("nll", pattern=NAME.pattern, description="Column of that sidecar.")

    @model_validator(mode="after")
    def _fits(self) -> Band:
        if self.low >= self.high:
            raise ValueError(f"the band from {self.low} to {self.high} is empty; set low below high")
        if self.score is None and self.column != "nll":
            raise ValueError(f"column {self.column!r} is of a score; name the score, too")
        return self

    def score_columns(self) -> dict[str, str]:
        """See `Step.score_columns`."""
        return {self.score: self.column} if self.score else {}

    def values(self) -> str:
        """See `Windowed.values`."""
        return by_number("", self.score, self.column)

    def window(self) -> str:
        """See `Windowed.window`."""
        # A quantile of more digits is that of fewer in any dataset, and DuckDB's integers have 38.
        low, high = (as_written(quantile).limit_denominator(10**18) for quantile in (self.low, self.high))
        return BAND.format(
            low=low.numerator, low_of=low.denominator, high=high.numerator, high_of=high.denominator,
            middle=float((low + high) / 2),
        )  # fmt: skip

    def nothing(self) -> str:
        """See `Windowed.nothing`."""
        return "no row is between low and high; set them further apart"
