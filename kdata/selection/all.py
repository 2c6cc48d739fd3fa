"""Every sequence that has a target, once: the baseline that selects nothing."""

from __future__ import annotations

from typing import Literal

from kdata.plan import Unit
from kdata.selection.rank import Ranking, take
from kdata.selection.step import Domains, Made, Step, made
from kdata.selection.work import Work

ALL = "select rows.*, 0 as value from rows where num_target_tokens > 0"
UNIT: Unit = "sequences"


class All(Step):
    """Everything, in the order of ids."""

    method: Literal["all"] = "all"

    def make(self, work: Work, domains: Domains) -> Made:
        """See `Step.make`."""
        return made(take(work, Ranking(ALL, {}, [], False, UNIT), dict, sorted(domains)), self.settings(), UNIT)
