"""Rows of which the teacher is sure: jointly with the student (KD^3), or by the margin of its first choice (WAD)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kdata.selection.prune import by_number
from kdata.selection.ranked import Ranked
from kdata.store.queryable import NAME

# log of p_teacher * p_student, geometric means over the target tokens of a row.
JOINT = """
select rows.*, -(rows.nll + student.nll) as value
from rows left join scores.{score} as student using (id)
where rows.num_target_tokens > 0
"""


class Confidence(Ranked):
    """Joint confidence (KD^3, ICCV 2023): text that teacher and student predict well, of each domain.

    KD^3 keeps the web images of which both networks are confident, and renews the choice while the student learns. We could
    not verify its formula. A row of text has no class: ours is the product of both models' probabilities of the actual
    tokens, as geometric means. To renew it, score the current student (`kdata score --name student2`) and select again.
    """

    CHOOSES: ClassVar[str] = "KD^3: both models sure"
    SOURCE: ClassVar[str] = "KD^3, ICCV 2023"

    VALUE: ClassVar[str | None] = "log of the teacher's times the student's probability, per target token"

    method: Literal["confidence"] = "confidence"
    score: str = Field("student", pattern=NAME.pattern, description="Sidecar with the student's NLL.")
    by_domain: bool = Field(True, description="Choose the share of each domain; otherwise of all sequences together.")

    def score_columns(self) -> dict[str, str]:
        """See `Step.score_columns`."""
        return {self.score: "nll"}

    def values(self) -> str:
        """See `Ranked.values`."""
        return JOINT.format(score=self.score)


class Margin(Ranked):
    """Rows with the largest margin between the teacher's first two choices (WAD, ICCV 2023), on average over their targets.

    WAD weights pseudo-labels by that margin, and each of five rounds admits a smaller share; a round here is one plan.
    """

    CHOOSES: ClassVar[str] = "WAD: clear favorites"
    SOURCE: ClassVar[str] = "WAD, ICCV 2023"

    VALUE: ClassVar[str | None] = "mean of p1 − p2 over the targets"

    method: Literal["margin"] = "margin"
    score: str = Field(
        "margin", pattern=NAME.pattern, description="Sidecar with a column `margin`; `kdata score --margins` writes it."
    )
    by_domain: bool = Field(True, description="Choose the share of each domain; otherwise of all sequences together.")

    def score_columns(self) -> dict[str, str]:
        """See `Step.score_columns`."""
        return {self.score: "margin"}

    def values(self) -> str:
        """See `Ranked.values`."""
        return by_number("", self.score, "margin")
