"""Domains and histograms of a dataset in one query: of all rows, and of those that are chosen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

BINS = 40

# Threads add in any order, which shows in the last digit: an export of the same rows has the same bytes by rounding.
# A bin's number follows from its value by the same arithmetic as `histogram_of` makes edges by.
_WITH = """with base as materialized (select domain, num_tokens, nll, is_chosen, times{numbers} from {source}),
ends as (select {ends} from base)
"""
_DOMAINS = """select -1 as part, domain, null::bigint as bin, count(*) as every, count(*) filter (is_chosen) as chosen,
    sum(num_tokens)::bigint as tokens, (sum(num_tokens * times) filter (is_chosen))::bigint as chosen_tokens,
    round(avg(nll), 9) as nll, round(avg(nll) filter (is_chosen), 9) as chosen_nll, null::double as low, null::double as high
from base group by domain
"""
_HISTOGRAM = """select {part} as part, null as domain,
    least(greatest(floor((value_{part} - low_{part}) / {width})::bigint, 0), {last}) as bin, count(*) as every,
    count(*) filter (is_chosen) as chosen, null as tokens, null as chosen_tokens, null as nll, null as chosen_nll,
    any_value(low_{part}) as low, any_value(high_{part}) as high
from base cross join ends where isfinite(value_{part}) group by bin
"""


def overview_query(source: str, numbers: list[str], *, by_domain: bool) -> str:
    """The query whose rows `domains_of` and `histogram_of` read.

    Args:
        source: what stands behind `from`; it has the columns of `rows`, `is_chosen` and `times`.
        numbers: in SQL, over these columns; each has a histogram.
    """
    values = "".join(f", {number}::double as value_{part}" for part, number in enumerate(numbers))
    ends = ", ".join(
        f"{end}(value_{part}) filter (isfinite(value_{part})) as {name}_{part}"
        for part in range(len(numbers))
        for end, name in (("min", "low"), ("max", "high"))
    )
    # The difference of the ends may be above what a float holds.
    width = "coalesce(nullif(high_{part} / {bins} - low_{part} / {bins}, 0), 1)"
    each = [
        _HISTOGRAM.format(part=part, last=BINS - 1, width=width.format(part=part, bins=f"{BINS}.0::double"))
        for part in range(len(numbers))
    ]
    selects = [_DOMAINS, *each] if by_domain else each
    return _WITH.format(numbers=values, source=source, ends=ends) + "union all\n".join(selects)


def histogram_of(found: Iterable[dict[str, Any]], part: int) -> dict[str, Any]:
    """The histogram of the number at a place: edges [BINS + 1], counts `all`, `chosen` [BINS]; empty where no row has it."""
    counts: dict[str, list[int]] = {"all": [0] * BINS, "chosen": [0] * BINS}
    edges: list[float] = []
    for one in found:
        if one["part"] != part:
            continue
        width = one["high"] / BINS - one["low"] / BINS or 1.0
        edges = [one["low"] + width * n for n in range(BINS + 1)]
        edges[-1] = max(edges[-1], one["high"])  # rounding may put it below the largest value
        counts["all"][one["bin"]], counts["chosen"][one["bin"]] = one["every"], one["chosen"]
    return {"edges": edges, **counts} if edges else {"edges": [], "all": [], "chosen": []}


def domains_of(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows, tokens and mean NLL of each domain, of all of it and of what is chosen."""
    lines = sorted((one for one in found if one["part"] == -1), key=lambda one: one["domain"])
    return [
        {
            "domain": one["domain"],
            "all": {"rows": one["every"], "tokens": one["tokens"], "nll": one["nll"]},
            "chosen": {"rows": one["chosen"], "tokens": one["chosen_tokens"] or 0, "nll": one["chosen_nll"]},
        }
        for one in lines
    ]
