"""DDK's first weights (arXiv 2407.16154): more of the domains in which the student is far behind the teacher.

Here the weights are computed once and stay the same for the whole plan. The trainer can update such weights while it trains
(`trainer/domain_weights.py`). On our raw corpus such updates gave students of cross-entropy 1.3 ± 0.7 % of NLL, and distilled
ones nothing that three seeds can show: weights of domains cannot tell good rows of a domain from bad ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, FiniteFloat, model_validator

from kdata.errors import ConfigError, DataError
from kdata.selection.mixtures import Mixture
from kdata.selection.session import DomainSizes, Session
from kdata.store.queryable import NAME

# Sums of cross-entropy and of target tokens, and the number of rows that lack one. It runs on one piece of the dataset at a
# time.
LOSSES = """
select domain, sum(rows.nll * rows.num_target_tokens), sum({student} * rows.num_target_tokens), sum(rows.num_target_tokens),
    count(*) filter (rows.nll is null or {student} is null)
from rows {join}
where rows.num_target_tokens > 0
group by domain
order by domain
"""
BY_SCORE = {"student": "student.nll", "join": "left join scores.{score} as student using (id)"}
TEACHER_ALONE = {"student": "rows.nll", "join": ""}


def first_weights(student: Mapping[str, float], teacher: Mapping[str, float], limit: float) -> dict[str, float]:
    """r0[i] = exp(l_S[i] / l_T[i]) / sum_j, l = exp(cross-entropy).

    Args:
        student, teacher: mean cross-entropy of each domain, nats per token.
        limit: larger ratios l_S / l_T count as this one. The paper has no limit; we need one, as the ratio is an exponent.
    """
    ratios = {domain: min(math.exp(min(loss - teacher[domain], 700.0)), limit) for domain, loss in student.items()}
    top = max(ratios.values())  # subtracted from every exponent, so that nothing overflows; it cancels
    scores = {domain: math.exp(ratio - top) for domain, ratio in ratios.items()}
    total = math.fsum(scores.values())
    return {domain: score / total for domain, score in scores.items()}


class Ddk(Mixture):
    """More of the domains in which the student is far behind the teacher, by its loss there.

    The losses are means over the rows to choose from; the paper measures held-out text of each domain.
    """

    CHOOSES: ClassVar[str] = "domains that lag"
    SOURCE: ClassVar[str] = "arXiv 2407.16154"

    method: Literal["ddk"] = "ddk"
    score: str | None = Field(
        None, pattern=NAME.pattern, description="Sidecar with the student's NLL of each sequence; or `losses`."
    )
    losses: dict[str, FiniteFloat] | None = Field(
        None,
        description="Domain -> the student's cross-entropy, nats per token; or `score`. The teacher's is the dataset's.",
    )
    exponent_limit: float = Field(
        10.0, gt=0, le=700, description="Larger ratios of perplexities count as this one; e to it must be finite."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Ddk:
        if (self.score is None) == (self.losses is None):
            raise ValueError("ddk needs the student's losses: either score (a sidecar) or losses (numbers), not both")
        return self

    def score_columns(self) -> dict[str, str]:
        """See `Step.score_columns`."""
        return {self.score: "nll"} if self.score else {}

    def shares(self, session: Session, domains: DomainSizes) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        student, teacher = self._losses(session)
        if set(student) != set(domains):
            raise ConfigError(
                f"losses names {sorted(student)}, but the domains to choose from are {sorted(domains)}; name each of them"
            )
        weights = first_weights(student, teacher, self.exponent_limit)
        return weights, {"losses": dict(sorted(student.items())), "teacher_losses": dict(sorted(teacher.items()))}

    def _losses(self, session: Session) -> tuple[dict[str, float], dict[str, float]]:
        """Mean cross-entropy of student and teacher in each domain, nats per target token."""
        form = BY_SCORE if self.score else TEACHER_ALONE
        sql = LOSSES.format(student=form["student"], join=form["join"].format(score=self.score))
        sums: dict[str, list[list[float]]] = {}
        for _ in session.pieces(self.sidecars(session.dataset)):
            for domain, *parts in session.fetch(sql):
                if num_missing := parts.pop():
                    raise DataError(
                        f"{num_missing} rows of domain {domain!r} lack the student's loss or the teacher's; run `kdata "
                        "score` again, or make a plan without these rows (method sql) and choose from it (--parent PLAN)"
                    )
                sums.setdefault(domain, []).append([float(part) for part in parts])
        totals = {domain: [math.fsum(column) for column in zip(*parts, strict=True)] for domain, parts in sums.items()}
        # Rounded to 1e-9 nats: smaller differences come from the order in which threads add.
        teacher = {domain: round(t / n, 9) for domain, (t, _, n) in totals.items()}
        if self.losses is not None:
            return self.losses, teacher
        return {domain: round(s / n, 9) for domain, (_, s, n) in totals.items()}, teacher
