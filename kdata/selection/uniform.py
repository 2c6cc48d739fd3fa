"""The same share for every domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from kdata.selection.mixture import Mixture
from kdata.selection.step import Domains
from kdata.selection.work import Work


class Uniform(Mixture):
    """1/N of each of N domains."""

    method: Literal["uniform"] = "uniform"

    def shares(self, work: Work, domains: Domains) -> tuple[Mapping[str, float], dict[str, Any]]:
        """See `Mixture.shares`."""
        return dict.fromkeys(domains, 1), {}
