"""A share of the sequences at random: the baseline that every other method is measured against."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from kdata.selection.step import Ranked

# A number in [0, 1) that follows from the seed and the id alone, the same in every version of DuckDB, on every machine
# and in any order of shards: the MD5 of "SEED:ID" as a little-endian integer, over 2^128. It costs 0.12 microseconds a
# row (one core); DuckDB's own hash() costs less and may change with its version.
RANDOM = """
select rows.*, md5_number($seed || ':' || id)::double / 340282366920938463463374607431768211456.0::double as value
from rows
where num_target_tokens > 0
"""


class Random(Ranked):
    """A share at random: another seed is another choice, a larger share holds the smaller one."""

    method: Literal["random"] = "random"
    seed: int = Field(0, ge=0, description="Seed.")

    def values(self) -> str:
        """See `Ranked.values`."""
        return RANDOM

    def given(self) -> dict[str, Any]:
        """See `Ranked.given`."""
        return {"seed": self.seed}
