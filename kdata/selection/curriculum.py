"""A curriculum by difficulty and task (TAPIR): a share of hard rows that grows from plan to plan, tasks in given ratios."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from kdata.errors import ConfigError, DataError, nearest
from kdata.selection.apportion import MOST_REPEATS, exact, share_out
from kdata.selection.plan import CountBy
from kdata.selection.rank import Ranking, choose_best, count_units
from kdata.selection.session import DomainSizes, Session
from kdata.selection.step import Chosen, Counts, Step
from kdata.store.queryable import NAME

# The ratios of easydistill's `operators/balance.py` (the recipe of DistilQwen2, by TAPIR's authors); they sum to 1.
OTHER_TASKS = (
    "Writing", "Computer Science", "Complex Format", "Common-Sense", "Counterfactual", "Multilingual", "Roleplay",
    "Biology", "Technology", "Ethics", "Sport", "Law", "Medicine", "Literature", "Entertainment", "Art", "Music", "Toxicity",
    "Economy", "Physics", "History", "Chemistry", "Philosophy", "Health", "Ecology", "Grammar", "Paraphrase",
)  # fmt: skip
TASK_RATIOS: dict[str, float] = {
    **{"Math": 0.167, "Reasoning": 0.167, "Code Generation": 0.083, "Code Debug": 0.083, "Others": 0.041},
    **dict.fromkeys(OTHER_TASKS, 0.017),
}

# Rows with a gap, each in one of two parts of its domain, in random order (see `kdata.selection.ranked.RANDOM`).
PARTS = """
select rows.* replace (rows.domain || case when marks."{column}" >= {hard_above} then ', hard' else ', easy' end as domain),
    case when isfinite(marks."{column}"::double)
        then md5_number($seed || ':' || id)::double / 340282366920938463463374607431768211456.0::double
        else 'nan'::double end as value
from rows join scores.{score} as marks using (id)
where rows.num_target_tokens > 0 and marks."{column}" is not null
"""
UNMARKED = """
select count(*) from rows left join scores.{score} as marks using (id)
where rows.num_target_tokens > 0 and marks."{column}" is null
"""


class Curriculum(Step):
    """TAPIR (arXiv 2405.13448): hard and easy rows in a given share, tasks in given ratios; a task is a domain.

    A row is hard where the judge's mark of the teacher's answer exceeds that of the student's by `hard_above`. (The paper's
    MFD is the negative of this gap.) Rows without a mark are left out and counted in the plan. Classes with too many rows are
    drawn from at random, those with too few are repeated up to `max_repeats` times. That is as in easydistill. `hard_above`
    and `hard_share` are our defaults: we could verify no number of the paper.
    """

    CHOOSES: ClassVar[str] = "TAPIR: hard, by task"
    SOURCE: ClassVar[str] = "TAPIR, arXiv 2405.13448"

    method: Literal["curriculum"] = "curriculum"
    score: str = Field("marks", pattern=NAME.pattern, description="Sidecar with the gap of the judge's marks.")
    column: str = Field(
        "gap", pattern=NAME.pattern, description="Column of that sidecar: teacher's mark less student's."
    )
    hard_above: float = Field(1.0, description="A row is hard where its gap is at least this.")
    hard_share: float = Field(0.3, ge=0, le=1, description="Share of hard rows in the plan; let it grow by rounds.")
    ratios: dict[str, float] | Literal["tasks"] | None = Field(
        None,
        description="Domain -> share, >= 0, for every domain; tasks: easydistill's ratios of 32 tasks, of those that the "
        "dataset has. null: the shares of the marked rows.",
    )
    size: int | None = Field(None, ge=1, description="Rows in all; null: the most that shares and ratios allow.")
    max_repeats: float = Field(
        1.0,
        ge=1,
        le=MOST_REPEATS,
        allow_inf_nan=False,
        description="A row is repeated at most this many times, on average.",
    )
    seed: int = Field(0, ge=0, description="Seed of the draw.")

    @field_validator("ratios")
    @classmethod
    def _can_be_shares(cls, ratios: dict[str, float] | str | None) -> dict[str, float] | str | None:
        if isinstance(ratios, dict):
            exact(ratios)
        return ratios

    def score_columns(self) -> dict[str, str]:
        """See `Step.score_columns`."""
        return {self.score: self.column}

    def choose(self, session: Session, domains: DomainSizes) -> tuple[Chosen, dict[str, Any]]:
        """See `Step.choose`. Raises DataError where no row has a mark, or a ratio cannot be met."""
        sql = PARTS.format(column=self.column, score=self.score, hard_above=repr(float(self.hard_above)))
        ranking = Ranking(sql, {"seed": self.seed}, [self.score], by_domain=True, count_by="sequences")
        parts = {f"{domain}, {kind}": (domain, kind) for domain in sorted(domains) for kind in ("easy", "hard")}
        held = count_units(session, ranking, sorted(parts))
        unmarked = self._unmarked(session)
        if not any(held.values()):
            raise DataError(
                f"none of {unmarked:,} rows has a number in scores.{self.score}.{self.column}; judge them, or name another "
                "score"
            )
        ratios = self._ratios(_sums(held, parts))
        share_of = {"easy": 1 - self.hard_share, "hard": self.hard_share}
        weights = {name: ratios[domain] * share_of[kind] for name, (domain, kind) in parts.items()}
        for name, (domain, kind) in parts.items():
            if weights[name] and not held[name]:
                raise DataError(
                    f"domain {domain!r} has no {kind} row (hard: {self.column} of at least {self.hard_above:g}), and "
                    f"hard_share {self.hard_share:g} asks for some; change hard_above or hard_share, or give it the ratio 0"
                )
        requested = share_out(self.size, weights, held, self.max_repeats, "sequences")
        chosen = choose_best(session, ranking, held, requested)
        shares = {domain: float(share) for domain, share in sorted(exact(ratios).items())}
        by_part = {name: counts.sequences for name, counts in sorted(chosen.domains.items())}
        parameters = {**self.recorded(), "weights": shares, "without_mark": unmarked, "parts": by_part}
        return _by_domain(chosen, parts), parameters

    def _unmarked(self, session: Session) -> int:
        count = 0
        for _ in session.pieces([self.score]):
            [(here,)] = session.fetch(UNMARKED.format(score=self.score, column=self.column))
            count += here
        return count

    def _ratios(self, held: Mapping[str, int]) -> dict[str, float]:
        """The ratio of each domain, which has so many marked rows. Raises ConfigError."""
        if self.ratios is None:
            return {domain: float(rows) for domain, rows in held.items()}
        table = TASK_RATIOS if self.ratios == "tasks" else self.ratios
        if self.ratios == "tasks":
            unknown = sorted(domain for domain, rows in held.items() if rows and domain not in table)
            if unknown:
                raise ConfigError(
                    f"ratios: domain {unknown[0]!r} is no task of the table{nearest(unknown[0], list(table))}; its tasks are "
                    f"{', '.join(table)}. Name the domains so, or give ratios of your own"
                )
            return {domain: table.get(domain, 0.0) if rows else 0.0 for domain, rows in held.items()}
        for name in table:
            if name not in held:
                raise ConfigError(
                    f"ratios names {name!r}{nearest(name, list(held))}; the dataset has the domains {list(held)}"
                )
        if missing := [domain for domain in held if domain not in table]:
            raise ConfigError(
                f"ratios does not name the domain {missing[0]!r}; name each of {list(held)}; 0 leaves one out"
            )
        return dict(table)


def _sums(of_parts: Mapping[str, int], parts: Mapping[str, tuple[str, str]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, number in of_parts.items():
        domain = parts[name][0]
        sums[domain] = sums.get(domain, 0) + number
    return sums


def _by_domain(chosen: Chosen, parts: Mapping[str, tuple[str, str]]) -> Chosen:
    """The counts of whole domains."""
    counts: dict[str, Counts] = {}
    for name, some in chosen.domains.items():
        domain = parts[name][0]
        before = counts.get(domain, Counts(0, 0, 0))
        counts[domain] = Counts(*(a + b for a, b in zip(before, some, strict=True)))
    count_by: CountBy = "sequences"
    return Chosen(
        domains=counts,
        sql=chosen.sql,
        count_by=count_by,
        requested=_sums(chosen.requested or {}, parts),
        by_domain=True,
    )
