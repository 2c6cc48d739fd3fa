"""Fewer of the same: at most so many units, each domain with the share that it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from kdata.selection.apportion import apportion
from kdata.selection.mixture import Apportioned
from kdata.selection.step import Domains, Held
from kdata.selection.work import Work


class Cap(Apportioned):
    """The last step, most often: a budget. What has fewer units is taken as it is."""

    method: Literal["cap"] = "cap"
    size: int = Field(ge=1, description="Units, at most, shared out by largest remainder.")

    def weigh(self, work: Work, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Apportioned.weigh`: what each domain holds, known when it is counted."""
        return {}, {}

    def requests(self, weights: Mapping[str, float], held: Held) -> dict[str, int]:
        """See `Apportioned.requests`."""
        total = sum(held.values())
        return dict(held) if total <= self.size else apportion(self.size, held)
