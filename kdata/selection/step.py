"""What every method is: typed settings, and a `choose` that picks rows of a dataset or of one of its plans."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import Field

from kdata.config import Strict
from kdata.selection.plan import CountBy
from kdata.selection.position_rules import PositionsConfig
from kdata.selection.session import DomainSizes, Session
from kdata.store.dataset import Dataset
from kdata.store.queryable import NAME

# Plans record this setting under an older key. They keep it, so that old and new plans read alike.
RECORDED_AS = {"count_by": "unit"}


class Counts(NamedTuple):
    """What was chosen of one domain: distinct rows; sequences and tokens with repeats counted."""

    rows: int
    sequences: int
    tokens: int


@dataclass(frozen=True)
class Chosen:
    """The rows that a step chose: they are in the table `chosen` (id, value, repeats) of its `Session`.

    Attributes:
        domains: counts of each domain of which something was chosen.
        sql: the query that gives the same rows, for the plan to record.
        lowest: the smallest chosen value of each domain; empty where a query chose.
        count_by: what `requested` counts; None where a query chose.
        requested: units requested of each domain, or of "" (all domains together); None where a query chose.
        by_domain: whether `requested` names domains.
        parents: names of further plans that were read.
    """

    domains: Mapping[str, Counts]
    sql: str
    lowest: Mapping[str, float] = field(default_factory=dict)
    count_by: CountBy | None = None
    requested: Mapping[str, int] | None = None
    by_domain: bool = False
    parents: tuple[str, ...] = ()


class Step(Strict):
    """Settings that every method has. `method` is its key in METHODS."""

    # For `kdata select --list`, a line of 80 columns for each method: what it chooses, and where it is from.
    CHOOSES: ClassVar[str] = ""
    SOURCE: ClassVar[str] = ""

    method: str
    name: str | None = Field(None, pattern=NAME.pattern, description="Name of the plan; null takes the method's name.")
    parent: str | None = Field(
        None, pattern=NAME.pattern, description="Choose from this plan of the dataset; null: from the whole dataset."
    )
    where: list[str] = Field(
        [],
        exclude_if=lambda conditions: not conditions,
        description="Only rows that meet this: SQL over their columns, and SCORE.COLUMN of scores. May be repeated; the plan "
        "says what each leaves out.",
    )
    positions: PositionsConfig | None = Field(
        None,
        exclude_if=lambda rule: rule is None,
        description="Which tokens of the chosen rows count in training, by a `rule`; null: every target.",
    )

    def score_columns(self) -> dict[str, str]:
        """The scores that the method ranks by, each with the column that it needs."""
        return {}

    def sidecars(self, dataset: Dataset) -> list[str]:
        """Names of the scores that the step reads."""
        return list(self.score_columns())

    def reads(self, dataset: Dataset) -> frozenset[str]:
        """The views that the step reads beside `rows` and the parent plan, as `kdata.store.sql.reads_of` names them."""
        return frozenset(f"scores.{name}".lower() for name in self.sidecars(dataset))

    @abstractmethod
    def choose(self, session: Session, domains: DomainSizes) -> tuple[Chosen, dict[str, Any]]:
        """Fill the table `chosen` of the session. Return what was chosen, and the parameters for the plan to record.

        Args:
            domains: every domain of the dataset.
        Raises:
            DataError, ConfigError, MissingError: the settings do not fit the data.
        """

    def recorded(self) -> dict[str, Any]:
        """The settings that a plan records, under the keys that plans have always used."""
        settings = self.model_dump(exclude={"method", "name", "parent", "positions", "where"})
        return {RECORDED_AS.get(key, key): value for key, value in settings.items()}

    @classmethod
    def from_recorded(cls, parameters: Mapping[str, Any]) -> Self:
        """The settings of a plan from the parameters that it records; other parameters are ignored."""
        keys = {recorded: key for key, recorded in RECORDED_AS.items()}
        settings = {keys.get(key, key): value for key, value in parameters.items()}
        return cls(**{key: value for key, value in settings.items() if key in cls.model_fields})
