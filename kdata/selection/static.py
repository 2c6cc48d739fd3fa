"""Shares that are given, one for every domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from kdata.corpus import nearest
from kdata.errors import ConfigError
from kdata.selection.mixture import Mixture
from kdata.selection.step import Domains
from kdata.selection.work import Work


class Static(Mixture):
    """Every domain of the dataset is named; 0 leaves one out."""

    method: Literal["static"] = "static"
    weights: dict[str, float] = Field(description="Domain -> share, >= 0; scaled to sum to 1.")

    def shares(self, work: Work, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        every = sorted(work.domains())
        unknown = sorted(set(self.weights) - set(every))
        if unknown:
            near = nearest(unknown[0], every)
            raise ConfigError(f"weights names {unknown[0]!r}{near}; the dataset has the domains {every}")
        missing = sorted(set(every) - set(self.weights))
        if missing:
            raise ConfigError(f"weights does not name the domain {missing[0]!r}; name each of {every}, 0 leaves it out")
        return self.weights, {}
