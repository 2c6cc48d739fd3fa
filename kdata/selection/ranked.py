"""Methods that give each row a number and choose the rows with the largest: difference, random, all."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import Field

from kdata.selection.apportion import apportion, as_written
from kdata.selection.plan import CountBy
from kdata.selection.rank import Ranking, choose_best, count_units
from kdata.selection.session import DomainSizes, Session
from kdata.selection.step import Chosen, Step
from kdata.store.queryable import NAME

# r(x) = NLL_ref(x) - NLL_teacher(x), mean per token of a chunk; the top share of all chunks is kept, deterministically.
DIFFERENCE = """
select rows.*, ref.nll - rows.nll as value
from rows left join scores.{score} as ref using (id)
where rows.num_target_tokens > 0
"""

# A number in [0, 1) that follows from the seed and the id alone, so it is the same in every version of DuckDB, on every
# machine and in any order of shards: the MD5 of "SEED:ID" as a little-endian integer, over 2^128. It costs 0.12
# microseconds a row (one core); DuckDB's own hash() costs less and may change with its version.
RANDOM = """
select rows.*, md5_number($seed || ':' || id)::double / 340282366920938463463374607431768211456.0::double as value
from rows
where num_target_tokens > 0
"""

ALL = "select rows.*, 0 as value from rows where num_target_tokens > 0"


class Ranked(Step):
    """A method that chooses the rows with the largest values: a share of all rows, or the same share of every domain."""

    VALUE: ClassVar[str | None] = None  # label of the value on a plot's axis; None: the value means nothing to a reader

    share: float = Field(0.5, gt=0, le=1, description="Share to choose; its number of units is rounded up.")
    count_by: CountBy = Field("sequences", description="What the share counts: sequences or tokens.")
    by_domain: bool = Field(False, description="Choose the share of each domain; otherwise of all sequences together.")

    @abstractmethod
    def values(self) -> str:
        """The query that gives each row its value; see `kdata.selection.rank.Ranking.sql`."""

    def bindings(self) -> dict[str, Any]:
        """Parameters of `values`, bound by name."""
        return {}

    def choose(self, session: Session, domains: DomainSizes) -> tuple[Chosen, dict[str, Any]]:
        """See `Step.choose`."""
        ranking = Ranking(self.values(), self.bindings(), self.sidecars(session.dataset), self.by_domain, self.count_by)
        held = count_units(session, ranking, sorted(domains))
        total = math.ceil(as_written(self.share) * sum(held.values()))
        requested = apportion(total, held) if total else dict.fromkeys(held, 0)
        chosen = choose_best(session, ranking, held, requested)
        return chosen, {**self.recorded(), **self._thresholds(chosen)}

    def _thresholds(self, chosen: Chosen) -> dict[str, Any]:
        """The smallest chosen value, of all or of each domain."""
        if self.VALUE is None:
            return {}
        if self.by_domain:
            return {"thresholds": dict(chosen.lowest)}
        return {"threshold": min(chosen.lowest.values(), default=None)}


class Difference(Ranked):
    """Difference sampling (MiniPLM, arXiv 2410.17215): text that the teacher predicts much better than a small model does.

    The paper keeps half of all chunks, globally; `by_domain` keeps the same share of each domain, and so the mixture.
    On our raw corpus with a small teacher it helps where the reference has read that corpus and each domain keeps its share.
    With a reference that has read clean text alone it does not, the half of everything costs, and so does all of it with a
    language model as teacher: that knows what a crawl brings along (`kdata select --list`, pipelines/README.md).
    """

    CHOOSES: ClassVar[str] = "MiniPLM: teacher leads"
    SOURCE: ClassVar[str] = "MiniPLM, arXiv 2410.17215"

    VALUE: ClassVar[str | None] = "NLL of the reference − NLL of the teacher, nats per target token"

    method: Literal["difference"] = "difference"
    score: str = Field("ref", pattern=NAME.pattern, description="Sidecar with the reference NLL.")

    def score_columns(self) -> dict[str, str]:
        """See `Step.score_columns`."""
        return {self.score: "nll"}

    def values(self) -> str:
        """See `Ranked.values`."""
        return DIFFERENCE.format(score=self.score)


class Random(Ranked):
    """A random share. Another seed gives another choice; with the same seed a larger share contains the smaller one."""

    CHOOSES: ClassVar[str] = "a random share"

    method: Literal["random"] = "random"
    seed: int = Field(0, ge=0, description="Seed.")

    def values(self) -> str:
        """See `Ranked.values`."""
        return RANDOM

    def bindings(self) -> dict[str, Any]:
        """See `Ranked.bindings`."""
        return {"seed": self.seed}


class All(Step):
    """Every row that has a target, in the order of ids."""

    CHOOSES: ClassVar[str] = "all that meet --where"

    method: Literal["all"] = "all"

    def choose(self, session: Session, domains: DomainSizes) -> tuple[Chosen, dict[str, Any]]:
        """See `Step.choose`."""
        ranking = Ranking(ALL, {}, [], by_domain=False, count_by="sequences")
        held = count_units(session, ranking, sorted(domains))
        return choose_best(session, ranking, held, requested=held), self.recorded()
