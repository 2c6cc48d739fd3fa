"""Data pruning: keep a share of the rows, at random or the easiest or hardest, and lean on the teacher the more for it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from kdata.selection.ranked import RANDOM, Ranked
from kdata.selection.session import DomainSizes, Session
from kdata.selection.step import Chosen
from kdata.store.queryable import NAME

# The number of each row. A score that has none for a row leaves it null, which is an error.
BY_NUMBER = """
select rows.*, {sign}{number} as value
from rows {join}
where rows.num_target_tokens > 0
"""
TEACHER = {"number": "rows.nll", "join": ""}
SCORE = {"number": 'own."{column}"', "join": "left join scores.{score} as own using (id)"}


def distillation_weight(share: float) -> float:
    """The weight alpha of distillation on a share f of the data: clip(1 - f / 2, 0.5, 1); cross-entropy gets 1 - alpha.

    Our default. The paper (arXiv 2403.07854) says that a small share wants a large weight and all of the data a small one;
    we could verify no formula of it.
    """
    return min(max(1.0 - 0.5 * share, 0.5), 1.0)


class Prune(Ranked):
    """Data pruning (arXiv 2403.07854): a random share, or the easiest or hardest, and the weight of distillation for it.

    The paper finds that a random share with distillation is as good as elaborate choices. The plan records our default
    weight as `distillation_weight`: of forward_kl in `objective.weights`, the rest being cross_entropy.
    """

    CHOOSES: ClassVar[str] = "the easiest or hardest"
    SOURCE: ClassVar[str] = "arXiv 2403.07854"

    method: Literal["prune"] = "prune"
    keep: Literal["random", "easy", "hard"] = Field(
        "random", description="Keep a random share, the rows with the smallest numbers (easy) or the largest (hard)."
    )
    score: str | None = Field(
        None, pattern=NAME.pattern, description="Sidecar with a number for each row; null: the teacher's NLL."
    )
    column: str = Field("nll", pattern=NAME.pattern, description="Column of that sidecar.")
    seed: int = Field(0, ge=0, description="Seed (random).")

    @model_validator(mode="after")
    def _numbers_are_read(self) -> Prune:
        # With a score or a column at hand, a random choice is not what was meant.
        if self.keep == "random" and (self.score is not None or self.column != "nll"):
            raise ValueError(
                "keep 'random' reads no numbers; add keep=easy or keep=hard, or leave score and column out"
            )
        if self.score is None and self.column != "nll":
            raise ValueError(f"column {self.column!r} is of a score; name the score, too")
        return self

    def score_columns(self) -> dict[str, str]:
        """See `Step.score_columns`."""
        return {self.score: self.column} if self.score else {}

    def values(self) -> str:
        """See `Ranked.values`."""
        if self.keep == "random":
            return RANDOM
        return by_number("-" if self.keep == "easy" else "", self.score, self.column)

    def bindings(self) -> dict[str, Any]:
        """See `Ranked.bindings`."""
        return {"seed": self.seed} if self.keep == "random" else {}

    def choose(self, session: Session, domains: DomainSizes) -> tuple[Chosen, dict[str, Any]]:
        """See `Step.choose`."""
        chosen, parameters = super().choose(session, domains)
        return chosen, {**parameters, "distillation_weight": distillation_weight(self.share)}


def by_number(sign: str, score: str | None, column: str) -> str:
    """The query that gives each row the teacher's NLL, or a column of a sidecar, as its value."""
    form = TEACHER if score is None else SCORE
    return BY_NUMBER.format(sign=sign, **{key: text.format(score=score, column=column) for key, text in form.items()})
