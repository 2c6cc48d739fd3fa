"""Turn shares into whole numbers by the method of largest remainders (Hamilton), in exact arithmetic.

A share written as 0.1 means exactly one tenth, not the nearest binary fraction, so no result depends on rounding. The
counts add up to the total, none is negative, and each is its quota rounded down or up. If two remainders are equal, the
name that comes first (by code points) gets the extra unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated

from pydantic import AfterValidator

from kdata.errors import ConfigError, DataError

MOST_REPEATS = 10_000  # of `max_repeats`


def exact(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Weights as fractions that sum to 1. Raises ConfigError unless they are finite, >= 0 and not all 0."""
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"the weight of {name!r} is {weight}; weights must be finite and >= 0")
    fractions = {name: as_written(weight) for name, weight in weights.items()}
    whole = sum(fractions.values())
    if not whole:
        raise ConfigError(f"weights {dict(weights)} are all 0; give at least one domain a weight above 0")
    return {name: fraction / whole for name, fraction in fractions.items()}


def _checked(weights: dict[str, float]) -> dict[str, float]:
    exact(weights)
    return weights


# A field of settings: refused where `exact` refuses it, before anything is read.
Weights = Annotated[dict[str, float], AfterValidator(_checked)]


def as_written(number: float) -> Fraction:
    """The decimal number that a float is written as, exactly: 0.1 is one tenth."""
    return Fraction(number) if isinstance(number, int) else Fraction(repr(float(number)))


def apportion(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Divide `total` >= 0 whole units by weight: an int >= 0 for each name; they sum to `total`.

    Raises:
        ConfigError: see `exact`.
    """
    return _largest_remainders(total, exact(weights))


def _largest_remainders(total: int, shares: Mapping[str, Fraction]) -> dict[str, int]:
    quotas = {name: total * share for name, share in shares.items()}
    counts = {name: math.floor(quota) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: (counts[name] - quotas[name], name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def share_out(
    size: int | None, weights: Mapping[str, float], held: Mapping[str, int], max_repeats: float, count_by: str
) -> dict[str, int]:
    """Units to request of each domain: `size` of them by weight, or as many as the weights allow.

    Args:
        size: units in all; None: the largest number that can be met.
        held: units that each domain holds, repeats not counted. `weights` names every domain.
        max_repeats: >= 1; a domain gives at most this many times what it holds, rounded down.
        count_by: what a message calls the units.
    Raises:
        ConfigError: see `exact`.
        DataError: a domain holds less than is requested, or nothing.
    """
    shares = exact(weights)
    limits = {name: math.floor(held[name] * as_written(max_repeats)) for name in shares}
    most = min(math.floor(limits[name] / share) for name, share in shares.items() if share)
    empty = sorted(name for name, share in shares.items() if share and not held[name])
    if empty:
        raise DataError(
            f"domain {empty[0]!r} has a share of {float(shares[empty[0]]):.2%} but holds no {count_by}; set its share to 0"
        )
    requested = _largest_remainders(most if size is None else size, shares)
    for name in sorted(requested):
        if requested[name] > limits[name]:
            factor = math.ceil(Fraction(requested[name] * 100, held[name])) / 100
            raise DataError(
                f"domain {name!r}: {requested[name]:,} {count_by} are requested, but it holds {held[name]:,}"
                + (f", {limits[name]:,} with max_repeats={max_repeats:g}" if max_repeats > 1 else "")
                + f". Request at most {most:,} {count_by} in all (size)"
                + (f", or set max_repeats={factor:g}." if factor <= MOST_REPEATS else ".")
            )
    return requested
