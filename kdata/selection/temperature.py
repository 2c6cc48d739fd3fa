"""Temperature mixing: small domains get more than their share, as multilingual models are trained (arXiv 1907.05019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from kdata.selection.mixture import Mixture
from kdata.selection.step import Domains, held_by
from kdata.selection.work import Work


class Temperature(Mixture):
    """Share proportional to p^(1/T), p the domain's share of the dataset's units: T = 1 is proportional, large T uniform."""

    method: Literal["temperature"] = "temperature"
    temperature: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="T: above 1 flattens the shares, below 1 sharpens them. Often 5 for languages.",
    )

    def shares(self, work: Work, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        held = held_by(domains, self.unit)
        largest = max(held.values())
        return {domain: (units / largest) ** (1 / self.temperature) for domain, units in held.items()}, {}
