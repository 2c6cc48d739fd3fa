"""Difference sampling (MiniPLM, arXiv 2410.17215): text of which the teacher knows more than a small model does."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from kdata.selection.plan import CountBy
from kdata.selection.rank import Ranking, take
from kdata.selection.session import Session
from kdata.selection.step import Domains, Made, Ranked, Step, made
from kdata.store.dataset import Dataset
from kdata.store.sql import NAME

# r(x) = NLL_ref(x) - NLL_teacher(x), mean per token of a chunk; the top share of all chunks is kept, deterministically.
DIFFERENCE = """
select rows.*, ref.nll - rows.nll as value
from rows left join scores.{score} as ref using (id)
where rows.num_target_tokens > 0
"""


class Difference(Ranked):
    """The paper keeps half of all chunks, globally; `by_domain` keeps the same share of each domain, and so the mixture."""

    VALUE: ClassVar[str | None] = "NLL of the reference − NLL of the teacher, nats per target token"

    method: Literal["difference"] = "difference"
    score: str = Field("ref", pattern=NAME.pattern, description="Sidecar with the reference NLL.")

    def sidecars(self, dataset: Dataset) -> list[str]:
        """See `Step.sidecars`."""
        return [self.score]

    def values(self) -> str:
        """See `Ranked.values`."""
        return DIFFERENCE.format(score=self.score)


ALL = "select rows.*, 0 as value from rows where num_target_tokens > 0"
UNIT: CountBy = "sequences"


class All(Step):
    """Everything, in the order of ids."""

    method: Literal["all"] = "all"

    def make(self, session: Session, domains: Domains) -> Made:
        """See `Step.make`."""
        return made(take(session, Ranking(ALL, {}, [], False, UNIT), dict, sorted(domains)), self.settings(), UNIT)


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
