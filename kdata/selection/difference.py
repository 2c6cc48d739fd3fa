"""Difference sampling (MiniPLM, arXiv 2410.17215): text of which the teacher knows more than a small model does."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kdata.dataset import Dataset
from kdata.selection.step import Ranked
from kdata.sql import NAME

# r(x) = NLL_ref(x) - NLL_teacher(x), mean per token of a chunk; the top share of all chunks is kept, deterministically.
DIFFERENCE = """
select rows.*, ref.nll - rows.nll as value
from rows left join scores.{score} as ref using (id)
where rows.num_target_tokens > 0
"""


class Difference(Ranked):
    """The paper keeps half of all chunks, globally; `by_domain` keeps the same share of each domain, and so the mixture."""

    VALUE: ClassVar[str | None] = "NLL of the reference − NLL of the teacher, nats per target token"

    method: Literal["difference"] = "difference"
    score: str = Field("ref", pattern=NAME.pattern, description="Sidecar with the reference NLL.")

    def sidecars(self, dataset: Dataset) -> list[str]:
        """See `Step.sidecars`."""
        return [self.score]

    def values(self) -> str:
        """See `Ranked.values`."""
        return DIFFERENCE.format(score=self.score)
