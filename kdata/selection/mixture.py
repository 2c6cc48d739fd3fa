"""Methods that ask a number of units of each domain: what they have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from kdata.errors import ConfigError
from kdata.plan import Unit
from kdata.selection.apportion import exact, share_out
from kdata.selection.random import RANDOM
from kdata.selection.rank import Ranking, take
from kdata.selection.step import Domains, Held, Made, Step, made
from kdata.selection.work import Work

FIRST = "select rows.*, -place as value from rows where num_target_tokens > 0"


class Apportioned(Step):
    """A method that takes a number of units of each domain."""

    unit: Unit = Field(
        "tokens",
        description="What sizes and shares count: tokens or sequences. A sequence is taken whole, so a domain may end up to "
        "one sequence short of its tokens, never above them.",
    )
    take: Literal["random", "first"] = Field(
        "random",
        description="Which sequences of a domain: at random by `seed`, or the first of the plan taken further.",
    )
    seed: int = Field(0, ge=0, description="Seed (random).")

    @abstractmethod
    def weigh(self, work: Work, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """Weight of each domain of the dataset, and what else a plan records of how it came about."""

    @abstractmethod
    def requests(self, weights: Mapping[str, float], held: Held) -> dict[str, int]:
        """Units to take of each domain."""

    def make(self, work: Work, domains: Domains) -> Made:
        """See `Step.make`."""
        if self.take == "first" and self.parent is None:
            raise ConfigError("take=first takes the first sequences of a plan: name it (--from PLAN), or take=random")
        sql, given = (FIRST, {}) if self.take == "first" else (RANDOM, {"seed": self.seed})
        weights, told = self.weigh(work, domains)
        ranking = Ranking(sql, given, [], True, self.unit)
        taken = take(work, ranking, lambda held: self.requests(weights, held), sorted(domains))
        return made(taken, {**self.settings(), **told}, self.unit)


class Mixture(Apportioned):
    """A method that gives each domain a share."""

    size: int | None = Field(
        None, ge=1, description="Units in all, shared out by largest remainder; null: the most that the shares allow."
    )
    max_repeats: float = Field(
        1.0,
        ge=1,
        le=10_000,
        allow_inf_nan=False,
        description="A domain gives at most so many times what it holds; 1: no sequence is repeated.",
    )

    @abstractmethod
    def shares(self, work: Work, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """As `weigh`, in any scale, and domains that are not named have none.

        Args:
            domains: those of which something may be taken, with what the dataset has of them that counts.
        """

    def weigh(self, work: Work, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Apportioned.weigh`; they sum to 1."""
        held = work.domains(countable=True)
        given, told = self.shares(work, held)
        weights = {**dict.fromkeys(domains, 0), **given}
        if missing := sorted(set(domains) - set(held)):
            told = {**told, "nothing_to_take": missing}
        return weights, {**told, "weights": {domain: float(share) for domain, share in sorted(exact(weights).items())}}

    def requests(self, weights: Mapping[str, float], held: Held) -> dict[str, int]:
        """See `Apportioned.requests`. Raises DataError where a domain does not hold what is asked of it."""
        return share_out(self.size, weights, held, self.max_repeats, self.unit)
