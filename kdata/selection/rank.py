"""Taking the best rows, exactly, out of more than fits the memory. Every method but `sql` ends here.

A method says of each row a value, and how many units (sequences or tokens) are to be taken of each domain or of all. Rows
are taken by falling value, ties by id, for as long as they fit: the first row that does not ends it. Where more is asked
for than there is, whole passes over everything come first. `whole_query` is this as one query, and what a plan records;
`take` does the same in three passes of which none sorts what is not taken:

1. every row's value, without its id, goes into a table (20 bytes a row);
2. a histogram finds the bin in which the taking ends, and is made again inside this bin until few rows are left in it;
3. what lies above the bin is taken, and the rows in it are placed one by one.

Exact whatever the values (equal, tiny, huge), and the same for any order of shards and number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from kdata.errors import DataError
from kdata.selection.plan import CountBy
from kdata.selection.session import Session
from kdata.store.sql import literal

BINS = 4096
EDGE_ROWS = 5_000  # rows of a part in the last bin, which are placed one by one
WEIGHT = {"sequences": "1", "tokens": "num_tokens"}

# How often a row is taken: once a pass, and then as many of its repeats as still fit into the rest.
PLACED = """select *, sum(repeats::bigint * {weight}) over (partition by part order by value desc, id) as reached
    from {candidates}"""
TIMES = "(passes * repeats + greatest(0, least(repeats, repeats + floor((rest - reached) / {weight}))))::integer"


@dataclass(frozen=True)
class Ranking:
    """What is taken first.

    Args:
        sql: a query over `rows` and scores that gives all columns of `rows` and a finite `value`. It is run on a piece of
            the dataset at a time, so what it says of a row must follow from this row and its scores.
        given: parameters that are bound in it.
        scores: sidecars that it reads.
        by_domain: units are asked of each domain; otherwise of all rows together.
        unit: what is counted.
    """

    sql: str
    given: dict[str, Any]
    scores: list[str]
    by_domain: bool
    unit: CountBy


# Units to take of each domain (or of "", all rows) from the units that it holds, each mention of a row counted once.
Requests = Callable[[Mapping[str, int]], dict[str, int]]


@dataclass(frozen=True)
class Taken:
    """What a step took: the table `chosen` (id, value, repeats; null and 0 are not taken) of its `Session`, and per domain
    distinct rows, sequences, tokens, and the smallest value. `requests`: `by_domain` or of ""; `sql`: as recorded."""

    domains: dict[str, tuple[int, int, int, float]]
    requests: dict[str, int]
    sql: str
    by_domain: bool


def take(session: Session, ranking: Ranking, requests: Requests, domains: list[str]) -> Taken:
    """Take what is asked for.

    Args:
        domains: every domain of the dataset.
    Raises:
        DataError: a row has no value, or one that is not finite; and what `requests` raises.
    """
    session.put("codes", {"code": pa.int32(), "domain": pa.string()}, list(enumerate(domains)))
    held = _collect(session, ranking, domains)
    asked = requests(held)
    names = list(held)  # of parts: the domains, or "" for all of them
    passes = {name: divmod(asked[name], held[name]) if held[name] else (0, 0) for name in names}
    columns = {"part": pa.int32(), "rest": pa.int64(), "low": pa.float64(), "high": pa.float64(), "passes": pa.int64()}
    ends = _edges(session, {part: passes[name][1] for part, name in enumerate(names)})
    session.put("bounds", columns, [(*end, passes[names[end[0]]][0]) for end in ends])
    _choose(session, ranking)
    found = session.fetch(
        "select domain, count(*), sum(repeats)::bigint, sum(repeats::bigint * num_tokens)::bigint, min(value) "
        "from chosen join codes using (code) where repeats > 0 group by domain order by domain"
    )
    sql = whole_query(session.rows("main.rows"), ranking, passes)
    by_domain = ranking.by_domain
    return Taken({domain: numbers for domain, *numbers in found}, asked, sql, by_domain)  # type: ignore[misc]


def _candidates(ranking: Ranking) -> str:
    """The method's rows with the part that they belong to."""
    if ranking.by_domain:
        return f"(select *, code as part from ({ranking.sql}) join codes using (domain))"
    return f"(select *, 0 as part from ({ranking.sql}))"


def _collect(session: Session, ranking: Ranking, domains: list[str]) -> dict[str, int]:
    """Fill the table `keys` (part, value, mass in units) and return the mass of each part."""
    session.execute("create or replace temp table keys (part integer, value double, mass bigint)")
    for _ in session.pieces(ranking.scores):
        session.execute(
            f"insert into keys select part, value, repeats::bigint * {WEIGHT[ranking.unit]} from {_candidates(ranking)}",
            ranking.given,
        )
    [(missing, wild, light)] = session.fetch(
        "select count(*) filter (value is null), count(*) filter (isnan(value) or abs(value) > 1e300), "
        "count(*) filter (mass < 1) from keys"
    )
    if missing:
        which = " and ".join(repr(name) for name in ranking.scores)
        raise DataError(
            f"{missing} rows have no value: score {which} lacks them (run `kdata score` again), or the teacher's NLL is not "
            "known (imported rows: leave them out by a query, method sql, and take that plan further)"
        )
    if wild or light:
        what = f"{wild} rows whose value is no finite number" if wild else f"{light} rows without a token"
        raise DataError(f"there are {what}; leave them out by a query (method sql) and take that plan further")
    masses = dict(session.fetch("select part, sum(mass)::bigint from keys group by part"))
    return {name: masses.get(part, 0) for part, name in enumerate(domains if ranking.by_domain else [""])}


def _edges(session: Session, rests: dict[int, int]) -> list[tuple[int, int, float, float]]:
    """Where the taking ends in each part: (part, units left for values in [low, high], low, high); all above are taken."""
    ends = [(part, 0, math.inf, math.inf) for part, rest in rests.items() if not rest]
    spans = {part: (-math.inf, math.inf) for part, rest in rests.items() if rest}
    columns, inside = {"part": pa.int32(), "low": pa.float64(), "high": pa.float64()}, "value between low and high"
    while spans:
        session.put("spans", columns, [(part, *span) for part, span in spans.items()])
        for part, rows, low, high in session.fetch(
            f"select part, count(*), min(value), max(value) from keys join spans using (part) where {inside} group by part"
        ):
            spans[part] = low, high
            if rows <= EDGE_ROWS or low == high:
                ends.append((part, rests[part], *spans.pop(part)))
        session.put("spans", columns, [(part, *span) for part, span in spans.items()])
        # The bin never falls as the value rises, in floating point too: a bin is all that lies between two values.
        passed: set[int] = set()
        for part, _, mass, low, high in session.fetch(
            f"select part, least({BINS - 1}, floor((value - low) / (high - low) * {BINS}))::integer as bin, "
            f"sum(mass)::bigint, min(value), max(value) from keys join spans using (part) where {inside} "
            "group by part, bin order by part, bin desc"
        ):
            if part not in passed and mass > rests[part]:
                passed.add(part)
                spans[part] = low, high
            elif part not in passed:
                rests[part] -= mass
    return ends


def _choose(session: Session, ranking: Ranking) -> None:
    """Fill the table `chosen`: how often each row is taken; rows of the last bin stand there with null, and once more."""
    session.execute("drop table keys")
    session.execute(
        "create or replace temp table chosen "
        "(id varchar, value double, repeats integer, code integer, num_tokens integer, each integer)"
    )
    part, codes = ("code", "") if ranking.by_domain else ("0", "join codes using (domain)")
    for _ in session.pieces(ranking.scores):
        session.execute(
            "insert into chosen select id, value, case when value > high then (passes + 1) * repeats "
            "when value < low then passes * repeats end, code, num_tokens, repeats "
            f"from {_candidates(ranking)} join bounds using (part) {codes} where value >= low or passes > 0",
            ranking.given,
        )
    session.execute(
        "create or replace temp table edge as select chosen.* exclude (repeats), each as repeats, part, passes, rest "
        f"from chosen join bounds on part = {part} where repeats is null"
    )
    weight = WEIGHT[ranking.unit]
    session.execute(
        f"insert into chosen select id, value, {TIMES.format(weight=weight)}, code, num_tokens, each "
        f"from ({PLACED.format(weight=weight, candidates='edge')})"
    )


def whole_query(rows: str, ranking: Ranking, passes: dict[str, tuple[int, int]]) -> str:
    """The same as one query over the views that `kdata sql` has, parameters put in."""
    listing = ",\n    ".join(f"({literal(name)}, {times}, {rest})" for name, (times, rest) in passes.items())
    join = "join budgets on part = domain" if ranking.by_domain else "cross join budgets"
    weight, values = WEIGHT[ranking.unit], ranking.sql.strip()
    for name, value in ranking.given.items():
        values = values.replace(f"${name}", literal(value) if isinstance(value, str) else repr(value))
    return f"""with rows as (
    {rows}
), candidates as (
    {values}
), budgets (part, passes, rest) as (values
    {listing}
), placed as (
    {PLACED.format(weight=weight, candidates=f"candidates {join}")}
), taken as (
    select id, value, {TIMES.format(weight=weight)} as repeats from placed
)
select id, repeats from taken where repeats > 0 order by value desc, id"""
