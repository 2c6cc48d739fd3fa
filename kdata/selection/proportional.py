"""The dataset's own shares: what a mixture is compared with, and what restores them after a selection that shifted them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from kdata.selection.mixture import Mixture
from kdata.selection.step import Domains, held_by
from kdata.selection.work import Work


class Proportional(Mixture):
    """Each domain's share of the dataset's units, whatever plan is taken further."""

    method: Literal["proportional"] = "proportional"

    def shares(self, work: Work, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        return held_by(domains, self.unit), {}
