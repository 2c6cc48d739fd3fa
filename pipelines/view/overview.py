"""Domains and histograms of a dataset in one query: of all rows, and of those that are chosen."""

from __future__ import annotations

import math
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


def overview_query(source: str, numbers: list[str], whole: list[bool], *, by_domain: bool) -> str:
    """The query whose rows `domains_of` and `histogram_of` read.

    Args:
        source: what stands behind `from`; it has the columns of `rows`, `is_chosen` and `times`.
        numbers: in SQL, over these columns; each has a histogram.
        whole: whether each is a whole number. Bins of these are whole numbers wide: of other widths some would hold more
            numbers than others, and the bars would go up and down with that.
    """
    values = "".join(f", {number}::double as value_{part}" for part, number in enumerate(numbers))
    ends = ", ".join(
        f"{end}(value_{part}) filter (isfinite(value_{part})) as {name}_{part}"
        for part in range(len(numbers))
        for end, name in (("min", "low"), ("max", "high"))
    )
    # The difference of the ends may be above what a float holds.
    width = "coalesce(nullif(high_{part} / {bins} - low_{part} / {bins}, 0), 1)"
    whole_width = "ceil((high_{part} - low_{part} + 1) / {bins})"
    each = [
        _HISTOGRAM.format(
            part=part,
            last=BINS - 1,
            width=(whole_width if is_whole else width).format(part=part, bins=f"{BINS}.0::double"),
        )
        for part, is_whole in enumerate(whole)
    ]
    selects = [_DOMAINS, *each] if by_domain else each
    return _WITH.format(numbers=values, source=source, ends=ends) + "union all\n".join(selects)


def histogram_of(found: Iterable[dict[str, Any]], part: int, *, whole: bool) -> dict[str, Any]:
    """The histogram of the number at a place: edges [B + 1] of B bins, counts `all`, `chosen` [B]; empty where no row has it.

    whole: of whole numbers, as `overview_query` has them; then the upper edge of a bin is the next one's first number.
    """
    bins = {one["bin"]: one for one in found if one["part"] == part}
    if not bins:
        return {"edges": [], "all": [], "chosen": [], "whole": whole}
    low, high = (next(iter(bins.values()))[end] for end in ("low", "high"))
    width = math.ceil((high - low + 1) / BINS) if whole else high / BINS - low / BINS or 1.0
    number = max(bins) + 1 if whole else BINS
    edges = [low + width * n for n in range(number + 1)]
    # Rounding may put the last one below the largest value, and a width of whole numbers far above it.
    edges[-1] = high + 1 if whole else max(edges[-1], high)
    counts = {key: [bins[n][name] if n in bins else 0 for n in range(number)]
              for key, name in (("all", "every"), ("chosen", "chosen"))}  # fmt: skip
    return {"edges": edges, **counts, "whole": whole}


def domains_of(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows, tokens and mean NLL of each domain, of all of it and of what is chosen; the largest first."""
    lines = sorted((one for one in found if one["part"] == -1), key=lambda one: (-one["tokens"], one["domain"]))
    return [
        {
            "domain": one["domain"],
            "all": {"rows": one["every"], "tokens": one["tokens"], "nll": one["nll"]},
            "chosen": {"rows": one["chosen"], "tokens": one["chosen_tokens"] or 0, "nll": one["chosen_nll"]},
        }
        for one in lines
    ]
