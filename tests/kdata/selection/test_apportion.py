"""Largest remainders are exact for any weights, and a domain that holds less than is requested is refused."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdata.errors import ConfigError, DataError
from kdata.selection.apportion import apportion, as_written, share_out

WEIGHTS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.floats(0, 1e6, allow_nan=False) | st.integers(0, 10**12),
    min_size=1,
    max_size=8,
).filter(lambda weights: any(weights.values()))


@given(total=st.integers(0, 10**12), weights=WEIGHTS)
def test_counts_sum_to_the_total_and_each_is_its_quota_rounded(total: int, weights: dict[str, float]) -> None:
    counts = apportion(total, weights)
    whole = sum(as_written(w) for w in weights.values())
    assert sum(counts.values()) == total and counts.keys() == weights.keys()
    for name, weight in weights.items():
        quota = total * as_written(weight) / whole
        assert 0 <= math.floor(quota) <= counts[name] <= math.ceil(quota)


@given(total=st.integers(0, 1000), weights=WEIGHTS, order=st.randoms())
def test_the_order_of_domains_does_not_matter(total: int, weights: dict[str, float], order) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(weights.items())
    order.shuffle(shuffled)
    assert apportion(total, dict(shuffled)) == apportion(total, weights)


@given(total=st.integers(0, 200), weights=WEIGHTS)
def test_no_other_rounding_is_nearer_to_the_quotas(total: int, weights: dict[str, float]) -> None:
    """The purpose of largest remainders: moving one unit never makes the sum of squared distances smaller."""
    counts, whole = apportion(total, weights), sum(as_written(w) for w in weights.values())
    off = {name: counts[name] - total * as_written(w) / whole for name, w in weights.items()}
    for give in off:
        for get in off:
            if give != get and counts[give]:
                assert (off[give] - 1) ** 2 + (off[get] + 1) ** 2 >= off[give] ** 2 + off[get] ** 2


def test_numbers_worked_out_by_hand() -> None:
    # quotas 4.7, 1.6, 1.56, 1.4, 0.74 (of 10): floors 4+1+1+1+0 = 7, three more to the largest remainders .74, .7, .6
    votes = {"a": 47_000, "b": 16_000, "c": 15_600, "d": 14_000, "e": 7_400}
    assert apportion(10, votes) == {"a": 5, "b": 2, "c": 1, "d": 1, "e": 1}
    assert apportion(7, dict.fromkeys("cba", 1)) == {"a": 3, "b": 2, "c": 2}  # equal remainders: by name
    assert apportion(10, {"a": 0.1, "b": 0.2, "c": 0.7}) == {
        "a": 1,
        "b": 2,
        "c": 7,
    }  # one tenth, not 0.1000000000000000055
    assert apportion(3, {"a": 0.0, "b": 2.0}) == {"a": 0, "b": 3}
    assert as_written(0.07) * 100 == 7 and as_written(3) == Fraction(3)


@pytest.mark.parametrize("weights", [{"a": -0.1, "b": 1}, {"a": math.nan}, {"a": math.inf}, {"a": 0.0, "b": 0.0}, {}])
def test_invalid_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="weight"):
        apportion(3, weights)


@given(
    held=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 50), min_size=1),
    weights=st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any),
    factor=st.sampled_from([1.0, 1.5, 2.0, 4.0]),
)
def test_the_largest_size_that_can_be_met_is_met_and_a_larger_one_is_refused(
    held: dict[str, int], weights: list[int], factor: float
) -> None:
    shares = {name: weight for name, weight in zip("abcd", weights, strict=True) if name in held}
    if not any(shares.values()):
        return
    counts = share_out(None, shares, held, factor, "sequences")
    limits = {name: math.floor(as_written(factor) * held[name]) for name in shares}
    assert all(0 <= counts[name] <= limits[name] for name in shares)
    most = sum(counts.values())
    assert share_out(most, shares, held, factor, "sequences") == counts
    over = most + sum(shares.values())  # a quota more for every domain: the fullest one is above its limit then
    with pytest.raises(
        DataError, match=r"sequences are requested, but it holds .* Request at most .*, or set max_repeats="
    ):
        share_out(over, shares, held, factor, "sequences")


def test_a_size_that_cannot_be_met_names_one_that_can() -> None:
    held = {"code": 30, "prose": 100}
    with pytest.raises(
        DataError, match=r"'code': 40 sequences are requested, but it holds 30\. Request at most 60 .*=1\.34"
    ):
        share_out(80, {"code": 1, "prose": 1}, held, 1.0, "sequences")
    assert share_out(80, {"code": 1, "prose": 1}, held, 1.34, "sequences") == {"code": 40, "prose": 40}
    with pytest.raises(DataError, match=r"but it holds 30, 36 with max_repeats=1\.2"):
        share_out(80, {"code": 1, "prose": 1}, held, 1.2, "sequences")
    with pytest.raises(DataError, match=r"'prose' has a share of 50.00% but holds no tokens; set its share to 0"):
        share_out(None, {"code": 1, "prose": 1}, {"code": 5, "prose": 0}, 1.0, "tokens")
    assert share_out(None, {"code": 1, "prose": 0}, {"code": 5, "prose": 0}, 1.0, "tokens") == {"code": 5, "prose": 0}
