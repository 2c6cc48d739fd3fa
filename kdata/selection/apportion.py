"""Whole numbers out of shares: Hamilton's method of largest remainders, in exact arithmetic.

A share that is written 0.1 means one tenth, not the nearest binary fraction, so nothing hangs on rounding. Counts add up
to the total, none is negative, each is its quota rounded down or up, and of two equal remainders the first name in order
of code points gets the unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from kdata.errors import ConfigError, DataError


def exact(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Weights as fractions that sum to 1. Raises ConfigError unless they are finite, >= 0 and not all 0."""
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"the weight of {name!r} is {weight}; weights must be finite and >= 0")
    fractions = {name: as_written(weight) for name, weight in weights.items()}
    whole = sum(fractions.values())
    if not whole:
        raise ConfigError(f"weights {dict(weights)} are all 0; give one domain at least a share")
    return {name: fraction / whole for name, fraction in fractions.items()}


def as_written(number: float) -> Fraction:
    """The decimal number that a float is written as, exactly: 0.1 is one tenth."""
    return Fraction(number) if isinstance(number, int) else Fraction(repr(float(number)))


def apportion(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Share `total` >= 0 whole units out by weight: int >= 0 for each name, their sum is `total`.

    Raises:
        ConfigError: see `exact`.
    """
    return _hamilton(total, exact(weights))


def _hamilton(total: int, shares: Mapping[str, Fraction]) -> dict[str, int]:
    quotas = {name: total * share for name, share in shares.items()}
    counts = {name: math.floor(quota) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: (counts[name] - quotas[name], name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def share_out(
    size: int | None, weights: Mapping[str, float], held: Mapping[str, int], max_repeats: float, unit: str
) -> dict[str, int]:
    """Units to take of each domain: `size` of them by weight, or as many as these weights allow.

    Args:
        size: in units; None: the largest that can be met.
        held: units that each domain holds, one mention of a sequence counted once. Every domain is named in `weights`.
        max_repeats: >= 1; a domain gives at most so many times what it holds, rounded down.
        unit: how a message calls the units.
    Raises:
        ConfigError: see `exact`.
        DataError: a domain does not hold what is asked of it, or nothing at all.
    """
    shares = exact(weights)
    limits = {name: math.floor(held[name] * as_written(max_repeats)) for name in shares}
    most = min(math.floor(limits[name] / share) for name, share in shares.items() if share)
    empty = sorted(name for name, share in shares.items() if share and not held[name])
    if empty:
        raise DataError(
            f"domain {empty[0]!r} has a share of {float(shares[empty[0]]):.2%} and no {unit} to take; give it 0"
        )
    counts = _hamilton(most if size is None else size, shares)
    for name in sorted(counts):
        if counts[name] > limits[name]:
            factor = math.ceil(Fraction(counts[name] * 100, held[name])) / 100
            raise DataError(
                f"domain {name!r}: {counts[name]:,} {unit} are asked of it, it holds {held[name]:,}"
                + (f", {limits[name]:,} with max_repeats={max_repeats:g}" if max_repeats > 1 else "")
                + f". Ask for at most {most:,} {unit} in all (size), or allow max_repeats={factor:g}."
            )
    return counts
