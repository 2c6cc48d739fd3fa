"""Conditions on rows (`--where`): SQL over the columns of a row and of its scores, and how many rows each leaves out.

A condition names columns of `rows`, or NAME.COLUMN of a score: `language.code = 'en' and duplicates.near_keep`. A row passes
where the condition is true. Where it is null, because a number is not known, the row is left out, and counted as unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kdata.errors import ConfigError
from kdata.store.sql_tree import Tree, nodes, parsed, varying_calls, varying_functions

EXAMPLES = 5  # ids of rows that a condition leaves out
_REFUSED = {"SUBQUERY": "a subquery", "WINDOW": "a window function", "PARAMETER": "a parameter", "STAR": "a star"}


def check_condition(text: str) -> list[str]:
    """Names before a dot in a condition: of scores, or of columns that are structs; in lower case.

    Raises ConfigError where it is not one condition on a row.
    """
    whole = _parse(text, f"select {text}")
    node = _parse(text, f"select ({text}\n)")  # as it is used
    if any(_is_more(one) for one in (whole, node)):
        raise ConfigError(f"condition {text!r} is more than one condition; write what is true of a row that passes")
    if calls := varying_calls(node["select_list"], varying_functions()):
        raise ConfigError(
            f"condition {text!r} calls {calls[0]}, which does not give one answer, the same every time; a condition must "
            "pass the same rows whenever it is read"
        )
    names, bound = set[str](), set[str]()
    for inner in nodes(node["select_list"]):
        if inner.get("class") == "LAMBDA":  # its parameters are no scores
            bound |= {one["column_names"][0].lower() for one in nodes(inner["lhs"]) if one.get("class") == "COLUMN_REF"}
        what = _REFUSED.get(str(inner.get("class")))
        if what is not None:
            raise ConfigError(f"condition {text!r} has {what}; a condition is about the columns of one row")
        path = inner["column_names"] if inner.get("class") == "COLUMN_REF" else []
        if len(path) > 2 and path[0].lower() == "scores":
            raise ConfigError(f"condition {text!r} names {'.'.join(path)}; write {'.'.join(path[1:])}")
        if len(path) > 1:
            names.add(str(path[0]).lower())
    return sorted(names - bound)


def _parse(text: str, query: str) -> Tree:
    tree = parsed(query)
    if tree.get("error"):
        raise ConfigError(f"condition {text!r} is not SQL: {tree.get('error_message')}")
    statements: list[Tree] = tree["statements"]
    node: Tree = statements[0]["node"] if len(statements) == 1 else {}
    return node


def _is_more(node: Tree) -> bool:
    """Whether a parsed query is more than one expression behind `select`."""
    further = ("modifiers", "where_clause", "group_expressions", "having", "qualify", "sample")
    return (
        node.get("type") != "SELECT_NODE"
        or len(node["select_list"]) != 1
        or node["from_table"]["type"] != "EMPTY"
        or bool(node["cte_map"]["map"])
        or any(node.get(key) for key in further)
    )


def all_true(conditions: Iterable[str]) -> str:
    """The conditions as one that is true or false, never null."""
    return " and ".join(f"coalesce(({condition}\n)::boolean, false)" for condition in conditions)


def counts_query(source: str, conditions: Sequence[str]) -> str:
    """A query with one row: how many rows a relation has and how many pass, then of each condition how many rows it leaves
    out, in how many it is null, how many no other leaves out, and EXAMPLES ids of the first.

    The ids are those whose MD5 is smallest: the same ones whatever the order of rows.

    Args:
        source: what stands behind `from`; it has a column `rows.id`.
    """
    passes = [f"coalesce(({condition}\n)::boolean, false) as pass_{n}" for n, condition in enumerate(conditions)]
    nulls = [f"({condition}\n)::boolean is null as null_{n}" for n, condition in enumerate(conditions)]
    every = range(len(conditions))
    columns = ["count(*)", f"count(*) filter ({' and '.join(f'pass_{n}' for n in every)})"]
    for n in every:
        others = " and ".join([f"not pass_{n}", *(f"pass_{other}" for other in every if other != n)])
        columns += [
            f"count(*) filter (not pass_{n})",
            f"count(*) filter (null_{n})",
            f"count(*) filter ({others})",
            f"coalesce(arg_min(id, (md5(id), id), {EXAMPLES}) filter (not pass_{n}), [])",
        ]
    inner = f"select rows.id as id, {', '.join([*passes, *nulls])} from {source}"
    return f"select {', '.join(columns)} from ({inner})"


def added(totals: list[Any] | None, row: Sequence[Any]) -> list[Any]:
    """The answers of two `counts_query` over different rows, as one over all of them; ids stand behind one another."""
    return list(row) if totals is None else [a + b for a, b in zip(totals, row, strict=True)]
