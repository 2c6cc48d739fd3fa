"""Choose the best rows, exactly, out of more than fits in memory. Every method but `sql` ends here.

A `Ranking` gives each row a value. `count_units` counts what each domain (or the whole dataset) holds; the method turns that
into the number of units that it requests; `choose_best` fills the table `chosen`. Rows are chosen by falling value, ties by
id, for as long as they fit: the first row that does not fit ends it. If more is requested than there is, all rows are chosen
once or several times first (whole passes), and the rest is chosen by value.

`whole_query` writes this as one query, which the plan records. `choose_best` gets the same result in three passes, and none
of them sorts rows that are not chosen:

1. every row's value, without its id, goes into a table (20 bytes a row);
2. a histogram shows in which bin the choice ends; it is repeated inside this bin until few rows are left;
3. rows above the bin are chosen, and the rows in it are placed one by one.

The result is exact for any values (equal, tiny, huge), and the same for any order of shards and any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from kdata.errors import DataError
from kdata.selection.plan import CountBy
from kdata.selection.session import Session
from kdata.selection.step import Chosen, Counts
from kdata.store.sql import literal

BINS = 4096
EDGE_ROWS = 5_000  # at most this many rows of a part are placed one by one
WEIGHT = {"sequences": "1", "tokens": "num_tokens"}

# How often a row is chosen: once in every pass, and then as many of its repeats as still fit into the rest.
PLACED = """select *, sum(repeats::bigint * {weight}) over (partition by part order by value desc, id) as reached
    from {candidates}"""
TIMES = "(passes * repeats + greatest(0, least(repeats, repeats + floor((rest - reached) / {weight}))))::integer"

CHOSEN_COUNTS = """
select domain, count(*), sum(repeats)::bigint, sum(repeats::bigint * num_tokens)::bigint, min(value)
from chosen join codes using (code) where repeats > 0 group by domain order by domain
"""


@dataclass(frozen=True)
class Ranking:
    """Which rows come first.

    Attributes:
        sql: a query over `rows` and scores that gives all columns of `rows` and a finite `value`. It runs on one piece of
            the dataset at a time, so a row's value must follow from this row and its scores.
        bindings: parameters bound in the query.
        scores: sidecars that the query reads.
        by_domain: whether units are requested of each domain; otherwise of all rows together.
        count_by: what the units are.
    """

    sql: str
    bindings: dict[str, Any]
    scores: list[str]
    by_domain: bool
    count_by: CountBy


def count_units(session: Session, ranking: Ranking, domains: list[str]) -> dict[str, int]:
    """Give every row its value, in the table `keys`, and count the units that each domain (or "", all rows) holds.

    Args:
        domains: every domain of the dataset.
    Returns:
        Units by domain, or of "" where the ranking is not by domain; repeats of the parent plan counted.
    Raises:
        DataError: a row has no value or no token, or its value is not finite.
    """
    session.put("codes", {"code": pa.int32(), "domain": pa.string()}, list(enumerate(domains)))
    session.execute("create or replace temp table keys (part integer, value double, mass bigint)")
    query = f"select part, value, repeats::bigint * {WEIGHT[ranking.count_by]} from {_candidates(ranking)}"
    session.gather("keys", query, ranking.scores, ranking.bindings, ["codes"])
    check_values(session, "keys", ranking.scores)
    masses = dict(session.fetch("select part, sum(mass)::bigint from keys group by part"))
    return {name: masses.get(part, 0) for part, name in enumerate(domains if ranking.by_domain else [""])}


def choose_best(session: Session, ranking: Ranking, held: Mapping[str, int], requested: Mapping[str, int]) -> Chosen:
    """Fill the table `chosen` (id, value, repeats; null and 0 mean not chosen) with the best rows.

    Args:
        held: what `count_units` returned for this session and ranking.
        requested: units to choose, with the keys of `held`.
    """
    passes = {name: divmod(requested[name], held[name]) if held[name] else (0, 0) for name in held}
    names = list(held)
    columns = {"part": pa.int32(), "rest": pa.int64(), "low": pa.float64(), "high": pa.float64(), "passes": pa.int64()}
    edges = _edges(session, {part: passes[name][1] for part, name in enumerate(names)})
    session.put("bounds", columns, [(*edge, passes[names[edge[0]]][0]) for edge in edges])
    _fill_chosen(session, ranking)
    counts = session.fetch(CHOSEN_COUNTS)
    return Chosen(
        domains={domain: Counts(rows, sequences, tokens) for domain, rows, sequences, tokens, _ in counts},
        lowest={domain: value for domain, _, _, _, value in counts},
        sql=whole_query(session.rows("main.rows"), ranking, passes),
        count_by=ranking.count_by,
        requested=requested,
        by_domain=ranking.by_domain,
    )


def _candidates(ranking: Ranking) -> str:
    """The ranking's rows with the part that they belong to: the number of their domain, or 0."""
    if ranking.by_domain:
        return f"(select *, code as part from ({ranking.sql}) join codes using (domain))"
    return f"(select *, 0 as part from ({ranking.sql}))"


def check_values(session: Session, table: str, scores: list[str]) -> None:
    """Raise DataError unless every `value` of a table is a finite number and every `mass` is above 0."""
    [(num_missing, num_infinite, num_empty)] = session.fetch(
        "select count(*) filter (value is null), count(*) filter (isnan(value) or abs(value) > 1e300), "
        f"count(*) filter (mass < 1) from {table}"
    )
    remedy = "make a plan without these rows (method sql) and choose from it (--parent PLAN)"
    if num_missing:
        lack = f"score {' and '.join(map(repr, scores))} lacks them (run `kdata score` again), or " if scores else ""
        raise DataError(
            f"{num_missing} rows have no value: {lack}the teacher's NLL is not known, as in imported rows ({remedy})"
        )
    if num_infinite:
        raise DataError(f"{num_infinite} rows have a value that is not a finite number; {remedy}")
    if num_empty:
        raise DataError(f"{num_empty} rows have no token; {remedy}")


def _edges(session: Session, rests: dict[int, int]) -> list[tuple[int, int, float, float]]:
    """Where the choice ends in each part: (part, units left for values in [low, high], low, high). All above are chosen."""
    edges = [(part, 0, math.inf, math.inf) for part, rest in rests.items() if not rest]
    spans = {part: (-math.inf, math.inf) for part, rest in rests.items() if rest}
    columns, inside = {"part": pa.int32(), "low": pa.float64(), "high": pa.float64()}, "value between low and high"
    while spans:
        session.put("spans", columns, [(part, *span) for part, span in spans.items()])
        for part, rows, low, high in session.fetch(
            f"select part, count(*), min(value), max(value) from keys join spans using (part) where {inside} group by part"
        ):
            spans[part] = low, high
            if rows <= EDGE_ROWS or low == high:
                edges.append((part, rests[part], *spans.pop(part)))
        session.put("spans", columns, [(part, *span) for part, span in spans.items()])
        # The bin never falls as the value rises, in floating point too: a bin is all that lies between two values.
        ended: set[int] = set()
        for part, _, mass, low, high in session.fetch(
            f"select part, least({BINS - 1}, floor((value - low) / (high - low) * {BINS}))::integer as bin, "
            f"sum(mass)::bigint, min(value), max(value) from keys join spans using (part) where {inside} "
            "group by part, bin order by part, bin desc"
        ):
            if part not in ended and mass > rests[part]:
                ended.add(part)
                spans[part] = low, high
            elif part not in ended:
                rests[part] -= mass
    return edges


def _fill_chosen(session: Session, ranking: Ranking) -> None:
    """Fill the table `chosen`: how often each row is chosen. Rows of the last bin are in it twice, the first time as null."""
    session.execute("drop table keys")
    session.execute(
        "create or replace temp table chosen "
        "(id varchar, value double, repeats integer, code integer, num_tokens integer, each integer)"
    )
    part, codes = ("code", "") if ranking.by_domain else ("0", "join codes using (domain)")
    query = (
        "select id, value, case when value > high then (passes + 1) * repeats when value < low then passes * repeats end, "
        f"code, num_tokens, repeats from {_candidates(ranking)} join bounds using (part) {codes} "
        "where value >= low or passes > 0"
    )
    session.gather("chosen", query, ranking.scores, ranking.bindings, ["codes", "bounds"])
    session.execute(
        "create or replace temp table edge as select chosen.* exclude (repeats), each as repeats, part, passes, rest "
        f"from chosen join bounds on part = {part} where repeats is null"
    )
    weight = WEIGHT[ranking.count_by]
    session.execute(
        f"insert into chosen select id, value, {TIMES.format(weight=weight)}, code, num_tokens, each "
        f"from ({PLACED.format(weight=weight, candidates='edge')})"
    )


def whole_query(rows: str, ranking: Ranking, passes: dict[str, tuple[int, int]]) -> str:
    """The same choice as one query over the views of `kdata sql`, with the parameters written in.

    Args:
        rows: the query behind the view `rows`.
        passes: of each part, the whole passes over it and the units that are left.
    """
    listing = ",\n    ".join(f"({literal(name)}, {times}, {rest})" for name, (times, rest) in passes.items())
    join = "join budgets on part = domain" if ranking.by_domain else "cross join budgets"
    weight, values = WEIGHT[ranking.count_by], ranking.sql.strip()
    for name, value in ranking.bindings.items():
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
