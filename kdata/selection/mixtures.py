"""Methods that ask a number of units of each domain: what they have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from kdata.errors import ConfigError, nearest
from kdata.selection.apportion import apportion, exact, share_out
from kdata.selection.plan import CountBy
from kdata.selection.rank import Ranking, take
from kdata.selection.ranked import RANDOM
from kdata.selection.session import Session
from kdata.selection.step import Domains, Held, Made, Step, held_by, made

FIRST = "select rows.*, -place as value from rows where num_target_tokens > 0"


class Apportioned(Step):
    """A method that takes a number of units of each domain."""

    unit: CountBy = Field(
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
    def weigh(self, session: Session, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """Weight of each domain of the dataset, and what else a plan records of how it came about."""

    @abstractmethod
    def requests(self, weights: Mapping[str, float], held: Held) -> dict[str, int]:
        """Units to take of each domain."""

    def make(self, session: Session, domains: Domains) -> Made:
        """See `Step.make`."""
        if self.take == "first" and self.parent is None:
            raise ConfigError("take=first takes the first sequences of a plan: name it (--parent PLAN), or take=random")
        sql, given = (FIRST, {}) if self.take == "first" else (RANDOM, {"seed": self.seed})
        weights, told = self.weigh(session, domains)
        ranking = Ranking(sql, given, [], True, self.unit)
        taken = take(session, ranking, lambda held: self.requests(weights, held), sorted(domains))
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
    def shares(self, session: Session, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """As `weigh`, in any scale, and domains that are not named have none.

        Args:
            domains: those of which something may be taken, with what the dataset has of them that counts.
        """

    def weigh(self, session: Session, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Apportioned.weigh`; they sum to 1."""
        held = session.domains(countable=True)
        given, told = self.shares(session, held)
        weights = {**dict.fromkeys(domains, 0), **given}
        if missing := sorted(set(domains) - set(held)):
            told = {**told, "nothing_to_take": missing}
        return weights, {**told, "weights": {domain: float(share) for domain, share in sorted(exact(weights).items())}}

    def requests(self, weights: Mapping[str, float], held: Held) -> dict[str, int]:
        """See `Apportioned.requests`. Raises DataError where a domain does not hold what is asked of it."""
        return share_out(self.size, weights, held, self.max_repeats, self.unit)


class Cap(Apportioned):
    """The last step, most often: a budget. What has fewer units is taken as it is."""

    method: Literal["cap"] = "cap"
    size: int = Field(ge=1, description="Units, at most, shared out by largest remainder.")

    def weigh(self, session: Session, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Apportioned.weigh`: what each domain holds, known when it is counted."""
        return {}, {}

    def requests(self, weights: Mapping[str, float], held: Held) -> dict[str, int]:
        """See `Apportioned.requests`."""
        total = sum(held.values())
        return dict(held) if total <= self.size else apportion(self.size, held)


class Proportional(Mixture):
    """Each domain's share of the dataset's units, whatever plan is taken further."""

    method: Literal["proportional"] = "proportional"

    def shares(self, session: Session, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        return held_by(domains, self.unit), {}


class Static(Mixture):
    """Every domain of the dataset is named; 0 leaves one out."""

    method: Literal["static"] = "static"
    weights: dict[str, float] = Field(description="Domain -> share, >= 0; scaled to sum to 1.")

    def shares(self, session: Session, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        every = sorted(session.domains())
        unknown = sorted(set(self.weights) - set(every))
        if unknown:
            near = nearest(unknown[0], every)
            raise ConfigError(f"weights names {unknown[0]!r}{near}; the dataset has the domains {every}")
        missing = sorted(set(every) - set(self.weights))
        if missing:
            raise ConfigError(f"weights does not name the domain {missing[0]!r}; name each of {every}, 0 leaves it out")
        return self.weights, {}


class Temperature(Mixture):
    """Share proportional to p^(1/T), p the domain's share of the dataset's units: T = 1 is proportional, large T uniform."""

    method: Literal["temperature"] = "temperature"
    temperature: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="T: above 1 flattens the shares, below 1 sharpens them. Often 5 for languages.",
    )

    def shares(self, session: Session, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        held = held_by(domains, self.unit)
        largest = max(held.values())
        return {domain: (units / largest) ** (1 / self.temperature) for domain, units in held.items()}, {}


class Uniform(Mixture):
    """1/N of each of N domains."""

    method: Literal["uniform"] = "uniform"

    def shares(self, session: Session, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        return dict.fromkeys(domains, 1), {}
