"""Means over seeds with 95 % confidence intervals (Student's t), and paired differences to a reference.

Runs of the same seed share initial weights and batches. Their difference therefore says more than two intervals side by side:
what is due to chance in both cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdata.errors import ConfigError, DataError
from kdata.pipelines.evidence.runs import Figures

# 97.5 % quantile of Student's t at 1, 2, ... 30 degrees of freedom.
T_975 = (
    12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139,
    2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
    2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds; half_width of its 95 % confidence interval, None for a single seed."""

    mean: float
    half_width: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval: t(0.975, n - 1) s / sqrt(n), s with n - 1 in its denominator.

    Raises:
        DataError: no value, or one that is not finite.
        ConfigError: more than 31 values.
    """
    count = len(values)
    if not count or not all(map(math.isfinite, values)):
        raise DataError(f"a mean needs finite values, at least one; got {list(values)}")
    if count > len(T_975) + 1:
        raise ConfigError(f"{count} seeds; intervals are known for at most {len(T_975) + 1}")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    return Estimate(mean, T_975[count - 2] * math.sqrt(variance / count), count)


def summarise(seeds: Mapping[int, Figures]) -> dict[str, Estimate]:
    """Estimates of the figures that all seeds have."""
    names = [n for n in next(iter(seeds.values())) if all(f.get(n) is not None for f in seeds.values())]
    return {name: estimate([float(f[name] or 0.0) for f in seeds.values()]) for name in names}


def relative_difference(seeds: Mapping[int, Figures], reference: Mapping[int, Figures], name: str) -> Estimate | None:
    """Mean of (figure - reference) / reference over the seeds that both have; None if they share none."""
    shared = [(seeds[s][name], reference[s][name]) for s in seeds if s in reference]
    pairs = [(a, b) for a, b in shared if a is not None and b]
    return estimate([(a - b) / b for a, b in pairs]) if pairs else None
