"""Methods that request a number of units of each domain: static, uniform, proportional, temperature, cap."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from kdata.errors import ConfigError, nearest
from kdata.selection.apportion import MOST_REPEATS, Weights, apportion, exact, share_out
from kdata.selection.plan import CountBy
from kdata.selection.rank import Ranking, choose_best, count_units
from kdata.selection.ranked import RANDOM
from kdata.selection.session import DomainSizes, Session
from kdata.selection.step import Chosen, Step

FIRST = "select rows.*, -place as value from rows where num_target_tokens > 0"


class OfDomains(Step):
    """Settings of every method that requests units of each domain."""

    count_by: CountBy = Field(
        "tokens",
        description="What sizes and shares count: tokens or sequences. A sequence is chosen whole, so a domain may get up to "
        "one sequence less than its tokens, never more.",
    )
    take: Literal["random", "first"] = Field(
        "random",
        description="Which sequences of a domain: at random by `seed`, or the first of the parent plan.",
    )
    seed: int = Field(0, ge=0, description="Seed (random).")

    def ranking(self) -> Ranking:
        """Which sequences of a domain come first. Raises ConfigError for `first` without a parent plan."""
        if self.take == "random":
            return Ranking(RANDOM, {"seed": self.seed}, [], by_domain=True, count_by=self.count_by)
        if self.parent is None:
            raise ConfigError("take=first chooses the first sequences of a plan: name the plan (--parent PLAN)")
        return Ranking(FIRST, {}, [], by_domain=True, count_by=self.count_by)


class Cap(OfDomains):
    """A budget, usually the last step: at most `size` units, each domain keeping its share. Fewer units are all chosen."""

    CHOOSES: ClassVar[str] = "at most --size units"

    method: Literal["cap"] = "cap"
    size: int = Field(ge=1, examples=[1_000_000], description="Most units, divided by largest remainder.")

    def choose(self, session: Session, domains: DomainSizes) -> tuple[Chosen, dict[str, Any]]:
        """See `Step.choose`."""
        ranking = self.ranking()
        held = count_units(session, ranking, sorted(domains))
        requested = held if sum(held.values()) <= self.size else apportion(self.size, held)
        return choose_best(session, ranking, held, requested), self.recorded()


class Mixture(OfDomains):
    """A method that gives each domain a share."""

    size: int | None = Field(
        None, ge=1, description="Units in all, divided by largest remainder; null: the most that the shares allow."
    )
    max_repeats: float = Field(
        1.0,
        ge=1,
        le=MOST_REPEATS,
        allow_inf_nan=False,
        description="A domain gives at most this many times what it holds; 1: no sequence is repeated.",
    )

    @abstractmethod
    def shares(self, session: Session, domains: DomainSizes) -> tuple[Mapping[str, float], dict[str, Any]]:
        """Share of each domain, in any scale (a domain that is not named gets none), and parameters to record.

        Args:
            domains: those with a row to choose, and what the dataset holds of them in rows with a target.
        """

    def choose(self, session: Session, domains: DomainSizes) -> tuple[Chosen, dict[str, Any]]:
        """See `Step.choose`. Raises DataError where a domain holds less than is requested."""
        ranking = self.ranking()
        nonempty = session.domains(countable=True)
        named, parameters = self.shares(session, nonempty)
        weights = {**dict.fromkeys(domains, 0), **named}
        if empty := sorted(set(domains) - set(nonempty)):
            parameters["nothing_to_take"] = empty
        parameters["weights"] = {domain: float(share) for domain, share in sorted(exact(weights).items())}
        held = count_units(session, ranking, sorted(domains))
        requested = share_out(self.size, weights, held, self.max_repeats, self.count_by)
        return choose_best(session, ranking, held, requested), {**self.recorded(), **parameters}


class Uniform(Mixture):
    """The same share for every domain."""

    CHOOSES: ClassVar[str] = "every domain alike"

    method: Literal["uniform"] = "uniform"

    def shares(self, session: Session, domains: DomainSizes) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        return dict.fromkeys(domains, 1), {}


class Proportional(Mixture):
    """Each domain's share of the dataset's units, whatever the parent plan holds."""

    CHOOSES: ClassVar[str] = "domains by size"

    method: Literal["proportional"] = "proportional"

    def shares(self, session: Session, domains: DomainSizes) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        return units_of(domains, self.count_by), {}


class Temperature(Mixture):
    """Shares p^(1/T), p being a domain's share of the dataset: proportional at T = 1, near uniform at large T."""

    CHOOSES: ClassVar[str] = "domains by size^(1/T)"

    method: Literal["temperature"] = "temperature"
    temperature: float = Field(
        gt=0,
        allow_inf_nan=False,
        examples=[2.0],
        description="T: above 1 flattens the shares, below 1 sharpens them. Often 5 for languages.",
    )

    def shares(self, session: Session, domains: DomainSizes) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        units = units_of(domains, self.count_by)
        largest = max(units.values())
        return {domain: (number / largest) ** (1 / self.temperature) for domain, number in units.items()}, {}


class Static(Mixture):
    """The shares that you set. Name every domain of the dataset; 0 leaves one out."""

    CHOOSES: ClassVar[str] = "your domain weights"

    method: Literal["static"] = "static"
    weights: Weights = Field(
        examples=[{"prose": 0.7, "code": 0.3}], description="Domain -> share, >= 0; scaled to sum to 1."
    )

    def shares(self, session: Session, domains: DomainSizes) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        every = sorted(session.domains())
        unknown = sorted(set(self.weights) - set(every))
        if unknown:
            near = nearest(unknown[0], every)
            raise ConfigError(f"weights names {unknown[0]!r}{near}; the dataset has the domains {every}")
        missing = sorted(set(every) - set(self.weights))
        if missing:
            raise ConfigError(
                f"weights does not name the domain {missing[0]!r}; name each of {every}; 0 leaves one out"
            )
        return self.weights, {}


def units_of(domains: DomainSizes, count_by: CountBy) -> dict[str, int]:
    """Units that the dataset holds of each domain."""
    return {domain: getattr(size, count_by) for domain, size in domains.items()}
