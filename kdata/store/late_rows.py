"""Texts are fetched late: of a sorted, limited query over `rows` and scores at a URL, first which shards its rows are in.

DuckDB reads the columns of a sort first, and the others of the rows that are left, but not behind a join. So `select id, text
from rows join scores.ref using (id) order by ref.nll limit 5` would fetch the texts of all shards. `shards_of` asks the same
query for the shards of these rows. The rows of these shards hold an answer of the whole: what is left out sorts behind it.

What is selected may fail for a row that is not shown (a cast of a word to a number): behind a join DuckDB computes it for
every row, so it is an error in a folder. The query for the shards computes it for every row, too, by sorting by it last.
Where it needs a text, all texts are read.
"""

from __future__ import annotations

from copy import deepcopy

import duckdb

from kdata.store.background import interruptible
from kdata.store.sql_tree import (
    TOKEN_VIEWS,
    Parameters,
    Tree,
    nodes,
    parsed,
    same_every_time,
    text_of,
    varying_calls,
    view_of,
)

LONG = {"text", "messages", "tools", "prompt"}  # columns of `rows` that are most of it
MOST_ROWS = 10_000  # of an answer: a longer one is in nearly all shards
SHARD = "_kdata_shard"
# What cannot fail for one row where it does not for another. Not among them: casts, also those that a comparison implies.
TOTAL_CLASSES = {"COLUMN_REF", "CONSTANT", "PARAMETER", "STAR"}
TOTAL_OPERATORS = {"ARRAY_SLICE", "ARRAY_EXTRACT", "OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL"}
TOTAL_FUNCTIONS = {
    "left", "right", "substring", "substr", "length", "len", "strlen", "upper", "ucase", "lower", "lcase", "trim", "ltrim",
    "rtrim", "reverse", "replace", "concat", "||", "contains", "starts_with", "prefix", "suffix", "ends_with",
    "~~", "!~~", "~~*", "!~~*", "list_value", "struct_pack", "md5", "sha256", "hash",
}  # fmt: skip


def shards_of(
    connection: duckdb.DuckDBPyConnection, text: str, parameters: Parameters, known: set[str]
) -> set[str] | None:
    """Names of shards whose rows are enough for a query; None where all may be needed, or it reads no text.

    Args:
        connection: has the views of the query.
        known: names of all shards; an index that names others, or none, does not say which are needed.
    """
    query = _shards_query(parsed(text))
    if query is None or SHARD in text.lower():  # a name of its own that is ours
        return None
    try:
        answer = interruptible(connection, lambda: connection.sql(query, params=parameters).fetchall())
    except duckdb.Error:  # the query itself says what is wrong with it
        return None
    return {name for (name,) in answer} if all(name in known for (name,) in answer) else None


def _shards_query(tree: Tree) -> str | None:
    """The query for the shards; None where the query is not plainly one that it answers for."""
    statements = tree.get("statements") or []
    node = statements[0]["node"] if len(statements) == 1 else {}
    if node.get("type") != "SELECT_NODE" or not _is_plain(node):
        return None
    limit = _rows_of(node["modifiers"])
    names = [own for table in _kept_whole(node["from_table"]) if (own := _name_of_rows(table))]
    may_fail = [one for one in node["select_list"] if not _is_total(one)]
    if limit is None or len(names) != 1 or not _reads_text(node["select_list"]) or _reads_text(may_fail):
        return None
    inner = deepcopy(node)
    inner["select_list"] = [*inner["select_list"], _column(names[0])]
    for modifier in inner["modifiers"]:
        if modifier["type"] == "LIMIT_MODIFIER":
            modifier["limit"], modifier["offset"] = _constant(limit), None
        else:
            modifier["orders"] += [{**modifier["orders"][0], "expression": {**one, "alias": ""}} for one in may_fail]
    return f'select distinct "{SHARD}" from ({text_of(inner)})'


def _is_plain(node: Tree) -> bool:
    """Whether a select gives one row for each of its FROM that it keeps, the same every time, sorted and limited.

    `rows` is named once: another mention may need other shards.
    """
    kinds = {modifier["type"] for modifier in node["modifiers"]}
    inner = [*nodes(node)]
    tables = [view_of(one) for one in inner if one.get("type") == "BASE_TABLE"]
    functions = {str(one.get("function_name")).lower() for one in inner if one.get("class") == "FUNCTION"}
    return (
        kinds == {"ORDER_MODIFIER", "LIMIT_MODIFIER"}
        and tables.count("rows") == 1
        and TOKEN_VIEWS.isdisjoint(tables)
        and functions <= same_every_time()
        and not varying_calls(node, set())
        and sum(one.get("type") == "SELECT_NODE" for one in inner) == 1
        and not any(one.get("class") in ("WINDOW", "SUBQUERY") or one.get("sample") for one in inner)
        and not any(node.get(key) for key in ("group_expressions", "group_sets", "having", "qualify"))
        and node.get("aggregate_handling") == "STANDARD_HANDLING"  # not of `group by all`, which has no expressions
        and not any(one.get("class") == "STAR" for one in nodes(_orders(node)))  # order by all: by the texts, too
    )


def _orders(node: Tree) -> list[Tree]:
    return [modifier for modifier in node["modifiers"] if modifier["type"] == "ORDER_MODIFIER"]


def _kept_whole(table: Tree) -> list[Tree]:
    """Tables of a FROM none of whose rows a join fills with nulls."""
    if table["type"] != "JOIN":
        return [table]
    if table.get("ref_type") not in ("REGULAR", "CROSS"):
        return []
    sides = {"INNER": ("left", "right"), "LEFT": ("left",), "SEMI": ("left",), "ANTI": ("left",)}
    return [inner for side in sides.get(table.get("join_type", ""), ()) for inner in _kept_whole(table[side])]


def _name_of_rows(table: Tree) -> str | None:
    """How the query calls the view `rows`; None where this is another table."""
    is_rows = table.get("type") == "BASE_TABLE" and view_of(table) == "rows" and not table.get("column_name_alias")
    return str(table.get("alias") or "rows") if is_rows else None


def _reads_text(expressions: list[Tree]) -> bool:
    inner = [*nodes(expressions)]
    columns = {str(node["column_names"][-1]).lower() for node in inner if node.get("class") == "COLUMN_REF"}
    return bool(columns & LONG) or any(node.get("class") == "STAR" for node in inner)


def _is_total(expression: Tree) -> bool:
    """Whether it plainly has a value for every row, once DuckDB takes it at all."""
    return all(
        node["class"] in TOTAL_CLASSES
        or (node["class"] == "OPERATOR" and node["type"] in TOTAL_OPERATORS)
        or (node["class"] == "CAST" and node.get("try_cast"))
        or (node["class"] == "FUNCTION" and str(node["function_name"]).lower() in TOTAL_FUNCTIONS)
        for node in nodes(expression)
        if "class" in node
    ) and (expression["class"] == "STAR" or not any(node.get("class") == "STAR" for node in nodes(expression)))


def _rows_of(modifiers: list[Tree]) -> int | None:
    """Rows up to the end of the limit; None where that is no number, or many."""
    [limit] = [modifier for modifier in modifiers if modifier["type"] == "LIMIT_MODIFIER"]
    numbers = [_number(limit.get(key)) for key in ("limit", "offset")]
    known = [number for number in numbers if number is not None]
    if limit["limit"] is None or limit["limit_type"] != "ROW_COUNT" or len(known) < 2:
        return None
    return sum(known) if sum(known) <= MOST_ROWS else None


def _number(expression: Tree | None) -> int | None:
    if expression is None:
        return 0
    literal = expression.get("literal") or {}
    return int(literal["text"]) if literal.get("kind") == "INTEGER" and str(literal["text"]).isdigit() else None


def _constant(number: int) -> Tree:
    [limit] = parsed(f"select 1 limit {number}")["statements"][0]["node"]["modifiers"]
    constant: Tree = limit["limit"]
    return constant


def _column(table: str) -> Tree:
    name = table.replace('"', '""')
    [column] = parsed(f'select "{name}".shard as "{SHARD}"')["statements"][0]["node"]["select_list"]
    column_node: Tree = column
    return column_node
