"""What a query's text says, by DuckDB's own parse of it: which rows of `tokens` and `entries` it can use.

The payload of a row that a query cannot use need not be read. `row_queries` takes from a select what it says of the rows of a
dataset: its inner joins with `rows`, scores and plans, and those of its conditions that mention nothing of a token but its
row. Their answer holds every row that the select can use, and perhaps more. Whatever is not plainly of this kind is left out
(a condition, a table), or all rows are read (an outer join, a sample).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import duckdb
import numpy as np

Tree = dict[str, Any]
Parameters = list[Any] | dict[str, Any] | None  # of a query, as DuckDB takes them
Condition = tuple[str, frozenset[str]]  # SQL, and the names of its parameters
ROW_COLUMNS = ("id", "global_row")  # columns of a token that are its row's
ROWS = "_row_numbers"  # the table of these, for row queries
# What a condition may consist of. Its functions must be scalar and give the same answer every time.
PLAIN = {"COLUMN_REF", "CONSTANT", "COMPARISON", "CONJUNCTION", "BETWEEN", "OPERATOR", "FUNCTION", "CAST", "CASE"}
PLAIN |= {"PARAMETER", "SUBQUERY"}


def parsed(text: str) -> Tree:
    """DuckDB's own parse of a query; with a key `error` where it cannot be parsed."""
    (tree,) = _ask("select json_serialize_sql(?::varchar)", [text])[0]
    result: Tree = json.loads(tree)
    return result


@cache
def _empty_database() -> duckdb.DuckDBPyConnection:
    """A database for questions about SQL: opening one takes 25 ms. It has no threads, which a fork would lose."""
    return duckdb.connect(config={"threads": 1, "enable_external_access": False})


def _ask(question: str, values: list[str]) -> list[tuple[Any, ...]]:
    with _empty_database().cursor() as cursor:  # one for each thread
        return cursor.execute(question, values).fetchall()


def nodes(tree: Any) -> Iterator[Tree]:
    """Every node of a parsed query."""
    if isinstance(tree, dict):
        yield tree
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from nodes(inner)


@cache
def _same_every_time() -> frozenset[str]:
    """Names of scalar functions whose answer follows from their arguments.

    So do those of arithmetic, some of which (of times) ask for the time zone.
    """
    names = _ask(
        "select function_name from duckdb_functions() group by 1 "
        "having bool_and(function_type = 'scalar' and stability = 'CONSISTENT')",
        [],
    )
    return frozenset({*(name for (name,) in names), "+", "-", "*", "/", "//", "%"})


class _NotPlainError(Exception):
    """A select for which all rows are read."""


@dataclass(frozen=True)
class Part:
    """A part of a FROM as SQL.

    aliases: of its tables, and whether each stands for `tokens` or `entries`. views: those that the others name.
    """

    sql: str
    aliases: dict[str, bool]
    views: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RowQuery:
    """Which rows one select can use of one of its tables.

    column: what is asked for. tables: SQL of a FROM. views: the whole views in it. conditions: SQL of each, with the names of
    its parameters; those that cannot be bound to `tables` must be left out.
    """

    column: str
    tables: str
    views: frozenset[str]
    conditions: list[Condition]


def row_queries(tree: Tree, view: str, views: Iterable[str]) -> list[RowQuery] | None:
    """Row queries that together give every row of `tokens` or `entries` (`view`) that a parsed query can use.

    Args:
        views: the views over whole rows ("rows", "scores.ref").
    Returns:
        None where all rows may be needed.
    """
    names = {str(entry["key"]).lower() for node in nodes(tree) for entry in (node.get("cte_map") or {}).get("map", [])}
    if names & {"tokens", "entries"}:
        return None
    known = {name for name in views if name not in names}
    # In whatever schema: one that is not understood makes the numbers differ.
    references = sum(_view_of(node).split(".")[-1] == view for node in nodes(tree) if _is_table(node))
    queries: list[RowQuery] = []
    try:
        for node in nodes(tree):
            if node.get("type") == "SELECT_NODE":
                queries += _Select(node, known).row_queries(view)
    except _NotPlainError:
        return None
    return queries if len(queries) == references else None


def _view_of(table: Tree) -> str:
    """The view that a table of a FROM names, in lower case ("rows", "scores.ref")."""
    path = [str(name).lower() for name in (table.get("qualified_name") or {}).get("path", [])]
    return ".".join(path[1:] if len(path) > 1 and path[0] == "main" else path)


class _Select:
    """One select of a query.

    Args:
        known: views over whole rows.
    """

    def __init__(self, node: Tree, known: set[str]) -> None:
        self.node, self.known = node, known
        self.tables: list[Tree] = []
        self.conditions: list[Tree] = []
        if self._names_tokens(node.get("from_table") or {}):
            if node.get("sample"):
                raise _NotPlainError
            self._walk(node["from_table"])
            self._add(node.get("where_clause"))

    @staticmethod
    def _names_tokens(table: Tree) -> bool:
        """Whether a FROM names `tokens` or `entries` itself, not in a subquery."""
        if table.get("type") == "JOIN":
            return _Select._names_tokens(table["left"]) or _Select._names_tokens(table["right"])
        return table.get("type") == "BASE_TABLE" and _view_of(table) in ("tokens", "entries")

    def _walk(self, table: Tree) -> None:
        """Collect the tables and conditions of a FROM. Raises _NotPlainError for anything but inner joins."""
        if table.get("sample"):
            raise _NotPlainError
        if table["type"] != "JOIN":
            self.tables.append(table)
            return
        if table.get("join_type") != "INNER" or table.get("ref_type") not in ("REGULAR", "CROSS"):
            raise _NotPlainError
        self._walk(table["left"])
        self._walk(table["right"])
        self._add(table.get("condition"))

    def _add(self, condition: Tree | None) -> None:
        if condition and condition.get("type") == "CONJUNCTION_AND":
            for child in condition["children"]:
                self._add(child)
        elif condition:
            self.conditions.append(condition)

    def row_queries(self, view: str) -> list[RowQuery]:
        """One row query for each table of the FROM that is `view`."""
        return [self._row_query(table) for table in self.tables if _view_of(table) == view and _is_table(table)]

    def _row_query(self, own: Tree) -> RowQuery:
        part = self._part(self.node["from_table"], own)
        if part is None:
            raise _NotPlainError
        tokens = {alias for alias, is_tokens in part.aliases.items() if is_tokens}
        unsure = tokens | self._merged()
        conditions = [(_sql(c), _parameters_of(c)) for c in self.conditions if self._is_plain(c, unsure)]
        return RowQuery(f'"{_alias(own)}".global_row', part.sql, part.views, conditions)

    def _merged(self) -> set[str]:
        """Names of columns that USING merges and that may have another type or collation in the row query.

        Such a name alone is the column of the leftmost table, which the row query may lack.
        """
        names = {
            str(name).lower() for node in nodes(self.node["from_table"]) for name in node.get("using_columns") or ()
        }
        is_whole = all(_view_of(t) in self.known | {"tokens", "entries"} for t in self.tables)
        return names - set(ROW_COLUMNS) if is_whole else names

    def _part(self, table: Tree, own: Tree) -> Part | None:
        """A FROM with whole rows only, joined as it was; None where nothing is left of it.

        Args:
            own: the table whose rows are asked for. It is never left out.
        """
        if table["type"] == "JOIN":
            return self._join(table, own)
        view, alias = _view_of(table), _alias(table)
        if not _is_table(table) or table.get("column_name_alias") or table.get("at_clause"):
            if table is own:
                raise _NotPlainError
            return None
        if view in ("tokens", "entries"):
            return Part(f'(select id, global_row from {ROWS}) as "{alias}"', {alias: True})
        if view not in self.known:
            return None
        name = ".".join(f'"{part}"' for part in view.split("."))
        return Part(f'{name} as "{alias}"' if table.get("alias") else name, {alias: False}, frozenset([view]))

    def _join(self, table: Tree, own: Tree) -> Part | None:
        left, right = self._part(table["left"], own), self._part(table["right"], own)
        if left and right and (on := self._on(table, left, right)):
            return Part(f"({left.sql} join {right.sql} {on})", left.aliases | right.aliases, left.views | right.views)
        is_in_right = any(node is own for node in nodes(table["right"]))
        return right if left is None or is_in_right else left

    def _on(self, table: Tree, left: Part, right: Part) -> str | None:
        """What joins two parts; None where nothing equates columns of rows, so that one of them is left out."""
        if using := table.get("using_columns"):
            of_rows = not any((left.aliases | right.aliases).values())
            shared = [name for name in using if of_rows or str(name).lower() in ROW_COLUMNS]
            return "using ({})".format(", ".join(f'"{name}"' for name in shared)) if shared else None
        for condition in self.conditions:
            if condition.get("type") == "COMPARE_EQUAL":
                sides = [self._row_column(condition[side], left.aliases | right.aliases) for side in ("left", "right")]
                if {alias in left.aliases for alias in sides if alias} == {True, False}:
                    return f"on {_sql(condition)}"
        return None

    @staticmethod
    def _row_column(expression: Tree, aliases: dict[str, bool]) -> str | None:
        """The alias in ALIAS.COLUMN, where that is a column of a whole row."""
        names = [str(name).lower() for name in expression.get("column_names") or ()]
        is_column = expression.get("class") == "COLUMN_REF" and len(names) == 2 and names[0] in aliases
        return names[0] if is_column and (not aliases[names[0]] or names[1] in ROW_COLUMNS) else None

    def _is_plain(self, condition: Tree, unsure: set[str]) -> bool:
        """Whether a condition has one answer for a row: no chance, no order, no token but by its row."""
        for node in nodes(condition):
            kind = node.get("class")
            if kind is not None and kind not in PLAIN:
                return False
            if kind == "FUNCTION" and str(node.get("function_name")).lower() not in _same_every_time():
                return False
            # the alias alone is the whole token as a struct
            if kind == "COLUMN_REF" and len(node["column_names"]) == 1 and node["column_names"][0].lower() in unsure:
                return False
            if kind is None and not self._is_plain_table(node):
                return False
        return True

    def _is_plain_table(self, node: Tree) -> bool:
        """Whether a node of a subquery is a select of all that matches, over whole rows."""
        if node.get("modifiers") or node.get("sample") or (node.get("cte_map") or {}).get("map"):
            return False
        kind = node.get("type")
        if kind == "BASE_TABLE":
            return _view_of(node) in self.known
        if kind == "JOIN":
            return node.get("ref_type") in ("REGULAR", "CROSS")
        return kind in (None, "SELECT_NODE", "ORDER_MODIFIER") or not isinstance(kind, str)


def _is_table(table: Tree) -> bool:
    return table.get("type") == "BASE_TABLE"


def _alias(table: Tree) -> str:
    return str(table.get("alias") or table.get("table_name") or "").lower().replace('"', '""')


def _parameters_of(expression: Tree) -> frozenset[str]:
    return frozenset(str(node["identifier"]) for node in nodes(expression) if node.get("class") == "PARAMETER")


def _sql(expression: Tree) -> str:
    """An expression of a parsed query as SQL, by DuckDB."""
    statement = parsed("select 1")
    statement["statements"][0]["node"]["select_list"] = [{**expression, "alias": ""}]
    (text,) = _ask("select json_deserialize_sql(?::json)", [json.dumps(statement)])[0]
    return str(text).removeprefix("SELECT ")


def rows_of(
    connection: duckdb.DuckDBPyConnection, tree: Tree, view: str, views: Iterable[str], parameters: Parameters
) -> np.ndarray | None:
    """Global row numbers, rising, of all rows of `tokens` or `entries` (`view`) that a query can use, and perhaps of more.

    Args:
        connection: has the views, and the table ROWS.
        views: see `row_queries`.
        parameters: of the query.
    Returns:
        int64; None where all rows may be needed.
    """
    queries = row_queries(tree, view, views)
    if queries is None:
        return None
    numbers = []
    with duckdb.connect() as scratch:
        _copy_empty(connection, scratch, views)
        for query in queries:
            conditions = [c for c in query.conditions if _is_bound(scratch, query, [c], parameters)]
            if (not conditions and query.views <= {"rows"}) or not _is_bound(scratch, query, conditions, parameters):
                return None
            text, values = _statement(query, conditions, parameters)
            try:
                answer = connection.sql(text, params=values).to_arrow_table()
            except duckdb.Error:  # a cast that fails for a row, say: the query may never evaluate it for this row
                return None
            numbers.append(answer.column(0).to_numpy())
    return np.unique(np.concatenate(numbers)) if numbers else None


def _copy_empty(
    connection: duckdb.DuckDBPyConnection, scratch: duckdb.DuckDBPyConnection, views: Iterable[str]
) -> None:
    """Give a scratch connection empty tables like these views: names are looked up there without opening files again."""
    scratch.execute(f"create table {ROWS} (id varchar, global_row bigint)")
    for name in views:
        schema, _, table = name.rpartition(".")
        place = f'"{schema or "main"}"."{table}"'
        try:
            columns = connection.execute(f"select column_name, column_type from (describe {place})").fetchall()
        except duckdb.CatalogException:  # there is no such view, which DuckDB says of the query itself
            continue
        scratch.execute(f'create schema if not exists "{schema or "main"}"')
        listing = ", ".join(f'"{column}" {kind}' for column, kind in columns)
        scratch.execute(f"create table {place} ({listing})")


def _statement(query: RowQuery, conditions: list[Condition], parameters: Parameters) -> tuple[str, dict[str, Any]]:
    where = "".join(f" and ({text})" for text, _ in conditions)
    by_name = (
        {str(n): v for n, v in enumerate(parameters, 1)} if isinstance(parameters, list | tuple) else parameters or {}
    )
    names = {name for _, own in conditions for name in own}
    text = f"select distinct {query.column} from {query.tables} where true{where}"
    return text, {name: value for name, value in by_name.items() if name in names}


def _is_bound(
    scratch: duckdb.DuckDBPyConnection, query: RowQuery, conditions: list[Condition], parameters: Parameters
) -> bool:
    """Whether every name in some conditions is one of the row query's tables.

    What a condition takes from a token, from an outer select or from the select's own list is not.
    """
    try:
        scratch.execute(*_statement(query, conditions, parameters))
    except duckdb.Error:
        return False
    return True
