"""What methods have in common: a step takes a dataset, or a plan of it, and makes a plan.

To add a method: a file with a class that has its settings and a `make` (most often inherited, from `Ranked` below or from
`Mixture` in mixture.py), and a line in METHODS of `kdata.selection.select`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import Field

from kdata.config import Strict
from kdata.selection.apportion import apportion, as_written
from kdata.selection.plan import CountBy
from kdata.selection.rank import Ranking, Taken, take
from kdata.selection.session import Session
from kdata.store.dataset import Dataset
from kdata.store.sql import NAME

Domains = Mapping[str, tuple[int, int]]  # of the dataset: domain -> (sequences, tokens)
Held = Mapping[str, int]  # what may be taken: domain -> units, as often as the plan that is taken further has them


@dataclass(frozen=True)
class Made:
    """What a step chose: the table `chosen` (id, value, repeats) of its `Session`, and how it came about.

    taken: per domain distinct rows, sequences, tokens. requests: units asked for, where `by_domain` of each domain,
    otherwise of "" (all); None without any.
    """

    taken: Mapping[str, tuple[int, int, int]]
    sql: str
    parameters: dict[str, Any]
    unit: CountBy | None = None
    requests: dict[str, int] | None = None
    by_domain: bool = False
    parents: list[str] = field(default_factory=list)


class Step(Strict):
    """Settings of every method. `method` names it in METHODS."""

    method: str
    name: str | None = Field(None, pattern=NAME.pattern, description="Name of the plan; null takes the method's.")
    parent: str | None = Field(
        None, pattern=NAME.pattern, description="Plan of the dataset that is taken further; null: the dataset itself."
    )

    def sidecars(self, dataset: Dataset) -> list[str]:
        """Names of the scores that it reads."""
        return []

    @abstractmethod
    def make(self, session: Session, domains: Domains) -> Made:
        """Choose rows. Raises DataError, ConfigError or MissingError where it cannot."""

    def settings(self) -> dict[str, Any]:
        """Settings that a plan records."""
        return self.model_dump(exclude={"method", "name", "parent"})


class Ranked(Step):
    """A method that takes the rows with the largest values: a share of all, or the same share of every domain."""

    VALUE: ClassVar[str | None] = None  # what the value is, on the axis of a plot; None where it says nothing

    share: float = Field(0.5, gt=0, le=1, description="Share that is kept; its number of units is rounded up.")
    unit: CountBy = Field("sequences", description="What the share counts: sequences or tokens.")
    by_domain: bool = Field(False, description="Take the share of each domain; otherwise of all sequences together.")

    @abstractmethod
    def values(self) -> str:
        """See `kdata.selection.rank.Ranking.sql`."""

    def given(self) -> dict[str, Any]:
        """Parameters of `values`, bound by name."""
        return {}

    def make(self, session: Session, domains: Domains) -> Made:
        """See `Step.make`."""
        ranking = Ranking(self.values(), self.given(), self.sidecars(session.dataset), self.by_domain, self.unit)
        taken = take(session, ranking, self._requests, sorted(domains))
        told = self.settings() if self.VALUE is None else {**self.settings(), **self._thresholds(taken)}
        return made(taken, told, self.unit)

    def _requests(self, held: Held) -> dict[str, int]:
        total = math.ceil(as_written(self.share) * sum(held.values()))
        return apportion(total, held) if total else dict.fromkeys(held, 0)

    def _thresholds(self, taken: Taken) -> dict[str, Any]:
        """The smallest value that was taken, of all or of each domain."""
        lowest = {domain: numbers[3] for domain, numbers in taken.domains.items()}
        return {"thresholds": lowest} if self.by_domain else {"threshold": min(lowest.values(), default=None)}


def made(taken: Taken, parameters: dict[str, Any], unit: CountBy) -> Made:
    """What `rank.take` took, as the outcome of a step."""
    return Made(
        {domain: numbers[:3] for domain, numbers in taken.domains.items()},
        taken.sql,
        parameters,
        unit,
        taken.requests,
        taken.by_domain,
    )


def held_by(domains: Domains, unit: CountBy) -> dict[str, int]:
    """Units of each domain."""
    return {domain: sequences if unit == "sequences" else tokens for domain, (sequences, tokens) in domains.items()}
