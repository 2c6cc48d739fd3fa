"""What a query's text says, by DuckDB's own parse of it: which rows of `tokens` and `entries` it can use.

The payload of a row that a query cannot use need not be read. `row_queries` takes from a select what it says of the rows of a
dataset: its inner, semi and anti joins with `rows`, scores, plans and subqueries over these, and those of its conditions that
mention nothing of a token but its row. A common table expression (CTE) over whole rows is a subquery wherever it is named.
The answer holds every row that the select can use, and perhaps more. Whatever is not plainly of this kind is left out
(a condition, a table), or all rows are read (an outer join, a sample).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeAlias

import duckdb
import numpy as np
import pyarrow as pa

from kdata.store.background import interruptible

Tree = dict[str, Any]
Parameters = list[Any] | dict[str, Any] | None  # of a query, as DuckDB takes them
Condition = tuple[str, frozenset[str]]  # SQL, and the names of its parameters
Columns: TypeAlias = Sequence[tuple[str, str]] | pa.Schema  # names and DuckDB's types, or a schema
MISSING_COLUMN = re.compile(
    r'column "(\w+)" not found|have a column named "(\w+)"|Column "(\w+)" does not exist on (?:left|right)'
    r'|Column "(\w+)" referenced that exists in the SELECT clause'
)
ROW_COLUMNS = ("id", "global_row")  # columns of a token that are its row's
TOKEN_VIEWS = {"tokens", "entries"}
FILTERS = ("SEMI", "ANTI")  # joins that keep rows of the left side, and none of its columns
ROWS = "_row_numbers"  # the table of these, for row queries
# What a condition may consist of. Its functions must be scalar and give the same answer every time.
PLAIN = {"COLUMN_REF", "CONSTANT", "COMPARISON", "CONJUNCTION", "BETWEEN", "OPERATOR", "FUNCTION", "CAST", "CASE"}
PLAIN |= {"PARAMETER", "SUBQUERY"}
# What a subquery may consist of beside these and joins: its answer must be the same every time, but for the order.
PLAIN_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "SUBQUERY", "EXPRESSION_LIST", "EMPTY"}
TIMES = {
    "current_date",
    "current_time",
    "current_timestamp",
    "localtime",
    "localtimestamp",
}  # functions without parentheses
IsBound = Callable[[str, frozenset[str]], bool]  # whether DuckDB finds what a query, with these parameters, names


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
def same_every_time() -> frozenset[str]:
    """Names of scalar functions whose answer follows from their arguments.

    So do those of arithmetic, some of which (of times) ask for the time zone.
    """
    names = _ask(
        "select function_name from duckdb_functions() group by 1 "
        "having bool_and(function_type = 'scalar' and stability = 'CONSISTENT')",
        [],
    )
    return frozenset({*(name for (name,) in names), "+", "-", "*", "/", "//", "%"})


@cache
def varying_functions() -> frozenset[str]:
    """Names of functions whose answer may be another one each time, or many rows, whatever their arguments are.

    Those for which DuckDB knows no form that is CONSISTENT, and macros that call one of them.
    """
    found = _ask(
        "select function_name, bool_and(function_type = 'macro'), list(macro_definition) from duckdb_functions() "
        "group by 1 having not bool_or(coalesce(stability, '') = 'CONSISTENT')",
        [],
    )
    macros = {name: [parsed(f"select {text}") for text in texts] for name, is_macro, texts in found if is_macro}
    varying = {name for name, is_macro, _ in found if not is_macro}
    while (
        more := {name for name, trees in macros.items() if any(varying_calls(tree, varying) for tree in trees)}
        - varying
    ):
        varying |= more
    return frozenset(varying)


def varying_calls(tree: Any, varying: AbstractSet[str]) -> list[str]:
    """What a parsed query calls of these functions, and times that it asks for without parentheses."""
    calls = []
    for node in nodes(tree):
        name = str(node.get("function_name") or "").lower()
        arguments: list[Tree] = node.get("arguments") or node.get("children") or []  # by DuckDB's version
        # DuckDB calls age(X) consistent, though it counts from today.
        if node.get("class") == "FUNCTION" and (name in varying or (name == "age" and len(arguments) == 1)):
            calls.append(name)
        elif node.get("class") == "COLUMN_REF" and str(node["column_names"][0]).lower() in TIMES:
            calls.append(str(node["column_names"][0]))
    return calls


class _NotPlainError(Exception):
    """A select for which all rows are read."""


@dataclass(frozen=True)
class Part:
    """A part of a FROM as SQL.

    aliases: of its tables, and whether each stands for `tokens` or `entries`. chooses: whether a join with it may leave rows
    out. parameters: names of those in it. is_cut: whether its first tables are left out, so that a column that USING merges
    may be another one.
    """

    sql: str
    aliases: dict[str, bool]
    chooses: bool = False
    parameters: frozenset[str] = frozenset()
    is_cut: bool = False


@dataclass(frozen=True)
class RowQuery:
    """Which rows one select can use of one of its tables.

    column: what is asked for. part: the FROM. conditions: SQL of each, with the names of its parameters; those that cannot be
    bound to the FROM must be left out.
    """

    column: str
    part: Part
    conditions: list[Condition]

    def statement(self, conditions: list[Condition]) -> Condition:
        """Its text with some of its conditions."""
        where = "".join(f" and ({text})" for text, _ in conditions)
        names = self.part.parameters.union(*(own for _, own in conditions))
        return f"select distinct {self.column} from {self.part.sql} where true{where}", names


def row_queries(tree: Tree, view: str, views: Iterable[str], is_bound: IsBound) -> list[RowQuery] | None:
    """Row queries that together give every row of `tokens` or `entries` (`view`) that a parsed query can use.

    Args:
        views: the views over whole rows ("rows", "scores.ref").
    Returns:
        None where all rows may be needed.
    """
    names = Counter(str(entry["key"]).lower() for node in nodes(tree) for entry in _ctes(node))
    if TOKEN_VIEWS & names.keys():
        return None
    known = {name for name in views if name not in names}
    once = {name for name, count in names.items() if count == 1 and name not in {*views}}
    tree = _Inlining(known, once, is_bound).inlined(tree, {})
    # In whatever schema: one that is not understood makes the numbers differ.
    references = sum(view_of(node).split(".")[-1] == view for node in nodes(tree) if _is_table(node))
    queries: list[RowQuery] = []
    try:
        for node in nodes(tree):
            if node.get("type") == "SELECT_NODE":
                queries += _Select(node, known, is_bound).row_queries(view)
    except _NotPlainError:
        return None
    return queries if len(queries) == references else None


def _ctes(node: Tree) -> list[Tree]:
    entries: list[Tree] = (node.get("cte_map") or {}).get("map", [])
    return entries


@dataclass(frozen=True)
class _Inlining:
    """Writes CTEs over whole rows where they are named.

    known: views over whole rows. once: names of CTEs that mean one thing in the whole query.
    """

    known: set[str]
    once: set[str]
    is_bound: IsBound

    def inlined(self, tree: Any, scope: dict[str, Tree]) -> Any:
        """A part of a parsed query, each CTE of which `scope` (subqueries by name) holds one as a subquery."""
        if isinstance(tree, list):
            return [self.inlined(inner, scope) for inner in tree]
        if not isinstance(tree, dict):
            return tree
        if _ctes(tree):
            scope, others = dict(scope), []
            for entry in _ctes(tree):
                definition = {**entry["value"], "query_node": self.inlined(entry["value"]["query_node"], scope)}
                if self._is_whole(entry["key"], definition):
                    scope[entry["key"].lower()] = definition
                else:
                    others.append({**entry, "value": definition})
            tree = {**tree, "cte_map": {**tree["cte_map"], "map": others}}
        path = (tree.get("qualified_name") or {}).get("path", [])
        if _is_table(tree) and len(path) == 1 and path[0].lower() in scope:
            whole, own = scope[path[0].lower()], tree["column_name_alias"]
            if not (own and whole["aliases"]) and not tree["sample"] and not tree["at_clause"]:
                subquery = _subquery(whole["query_node"], tree["alias"] or path[0])
                return {**subquery, "column_name_alias": own or whole["aliases"]}
        return {key: value if key == "cte_map" else self.inlined(value, scope) for key, value in tree.items()}

    def _is_whole(self, name: str, definition: Tree) -> bool:
        """Whether a CTE means the same wherever it is written, and gives the same answer every time."""
        if name.lower() not in self.once or definition["key_targets"] or definition["payload_aggregates"]:
            return False
        return _is_whole(_subquery(definition["query_node"], "cte"), self.known, self.is_bound)


def _is_whole(subquery: Tree, known: set[str], is_bound: IsBound) -> bool:
    """Whether a subquery of a FROM gives the same answer every time, wherever it stands.

    Bound alone it names nothing of what is around it, so it cannot name other things elsewhere.
    """
    return _is_plain(subquery, known) and is_bound(f"select 1 from {_table_sql(subquery)}", _parameters_of(subquery))


def _subquery(query: Tree, alias: str) -> Tree:
    """A query as a table of a FROM."""
    table: Tree = dict(parsed("select 1 from (select 1)")["statements"][0]["node"]["from_table"])
    return {**table, "alias": alias, "subquery": {**table["subquery"], "node": query}}


def _is_plain(tree: Tree, known: set[str], unsure: Iterable[str] = ()) -> bool:
    """Whether a condition has one answer for a row, or a table of a FROM one for a query, but for its order.

    So there is no chance in it, no limit, and no token but by its row.

    Args:
        known: the views that it may name.
        unsure: names that may mean something else in a row query where they stand alone (an alias is a whole row, a struct).
    """
    names, stars = {*unsure}, 0
    for node in nodes(tree):
        kind = node.get("class")
        if kind == "STAR":
            stars += 1
            if node.get("relation_name", "").lower() in names:
                return False
        elif kind is not None and kind not in PLAIN:
            return False
        if kind == "FUNCTION" and str(node.get("function_name")).lower() not in same_every_time():
            return False
        if kind == "COLUMN_REF" and len(node["column_names"]) == 1 and node["column_names"][0].lower() in names:
            return False
        if kind is None and not _is_plain_table(node, known):
            return False
    # A star outside of subqueries has columns of tokens.
    inside = [node for query in _queries(tree) for node in nodes(query) if node.get("class") == "STAR"]
    return stars == len(inside)


def _queries(tree: Any) -> Iterator[Tree]:
    """The outermost selects of a tree."""
    if isinstance(tree, dict) and tree.get("type") == "SELECT_NODE":
        yield tree
        return
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _queries(inner)


def _is_plain_table(node: Tree, known: set[str]) -> bool:
    """Whether a node of a subquery that is no expression keeps all that matches, over whole rows."""
    if node.get("sample") or _ctes(node):
        return False
    kind = node.get("type")
    if kind == "BASE_TABLE":
        return view_of(node) in known
    if kind == "JOIN":
        return node.get("ref_type") in ("REGULAR", "CROSS")
    if kind == "DISTINCT_MODIFIER":
        return not node.get("distinct_on_targets")
    return not isinstance(kind, str) or kind in PLAIN_NODES or kind.startswith("ORDER_")


def tables_of(tree: Tree) -> set[str]:
    """The views and CTEs that a parsed query names, in lower case."""
    return {view_of(node) for node in nodes(tree) if _is_table(node)}


def view_of(table: Tree) -> str:
    """The view that a table of a FROM names, in lower case ("rows", "scores.ref")."""
    path = [str(name).lower() for name in (table.get("qualified_name") or {}).get("path", [])]
    return ".".join(path[1:] if len(path) > 1 and path[0] == "main" else path)


class _Select:
    """One select of a query.

    Args:
        known: views over whole rows.
    """

    def __init__(self, node: Tree, known: set[str], is_bound: IsBound) -> None:
        self.node, self.known, self.is_bound = node, known, is_bound
        self.tables: list[Tree] = []
        self.conditions: list[Tree] = []
        self.filters: list[Tree] = []  # semi and anti joins
        if any(_is_table(table) and view_of(table) in TOKEN_VIEWS for table in _joined(node["from_table"])):
            if node.get("sample"):
                raise _NotPlainError
            self._walk(node["from_table"])
            self._add(node.get("where_clause"))

    def _walk(self, table: Tree) -> None:
        """Collect the tables and conditions of a FROM. Raises _NotPlainError for an outer join and the like."""
        if table.get("sample"):
            raise _NotPlainError
        if table["type"] != "JOIN":
            self.tables.append(table)
            return
        if table.get("join_type") not in ("INNER", *FILTERS) or table.get("ref_type") not in ("REGULAR", "CROSS"):
            raise _NotPlainError
        self._walk(table["left"])
        if table["join_type"] in FILTERS:
            self.filters.append(table)
            return
        self._walk(table["right"])
        self._add(table.get("condition"), table)

    def _add(self, condition: Tree | None, table: Tree | None = None) -> None:
        if condition and condition.get("type") == "CONJUNCTION_AND":
            for child in condition["children"]:
                self._add(child, table)
        elif condition and (table is None or self._is_clear(condition, table)):
            self.conditions.append(condition)

    def _is_clear(self, condition: Tree, join: Tree) -> bool:
        """Whether names in the condition of a join mean the same in the whole FROM.

        A name alone is looked up in the tables that are joined. One of the others may have it too.
        """
        if join is self.node["from_table"]:
            return True
        aliases = {_alias(table) for table in _joined(join)}
        names = [node["column_names"] for node in nodes(condition) if node.get("class") == "COLUMN_REF"]
        return all(len(path) == 2 and path[0].lower() in aliases for path in names)

    def row_queries(self, view: str) -> list[RowQuery]:
        """One row query for each table of the FROM that is `view`."""
        return [self._row_query(table) for table in self.tables if view_of(table) == view and _is_table(table)]

    def _row_query(self, own: Tree) -> RowQuery:
        part = self._part(self.node["from_table"], own)
        if part is None:
            raise _NotPlainError
        tokens = {alias for alias, is_tokens in part.aliases.items() if is_tokens}
        unsure = tokens | self._merged()
        filters = (self._condition_of(join, own) for join in self.filters)
        conditions = [*self.conditions, *(condition for condition in filters if condition)]
        plain = [(_sql(c), _parameters_of(c)) for c in conditions if _is_plain(c, self.known, unsure)]
        return RowQuery(f'"{_alias(own)}".global_row', part, plain)

    def _condition_of(self, join: Tree, own: Tree) -> Tree | None:
        """A semi or anti join as a condition; None where its names might mean something else there.

        Args:
            own: the table whose rows are asked for.
        """
        right, condition = join["right"], join["condition"]
        if right["type"] == "SUBQUERY":
            right = {**right, "alias": right["alias"] or "_subquery"}
        if {_alias(table) for table in self.tables} & {_alias(table) for table in _joined(right)}:
            return None
        if using := {str(name).lower() for name in join["using_columns"]}:
            left = _joined(join["left"])
            is_whole = all(view_of(table) in self.known | TOKEN_VIEWS for table in left)
            if not using <= {*ROW_COLUMNS} or not is_whole or right["type"] == "JOIN":
                return None
            if not any(table is own for table in left):
                return None
            text = " and ".join(f'"{_alias(right)}".{name} = "{_alias(own)}".{name}' for name in sorted(using))
            condition = _node(f"select 1 where {text}")["where_clause"]
        elif not self._is_clear(condition, join):
            return None
        verb = "exists" if join["join_type"] == "SEMI" else "not exists"
        exists: Tree = _node(f"select 1 where {verb} (select 1 from a where true)")["where_clause"]
        for node in nodes(exists):
            if node.get("type") == "SELECT_NODE":
                node["from_table"], node["where_clause"] = right, condition
                return exists
        raise AssertionError("it has a select")

    def _merged(self) -> set[str]:
        """Names of columns that USING merges and that may have another type or collation in the row query.

        Such a name alone is the column of the leftmost table, which the row query may lack.
        """
        names = {
            str(name).lower() for node in nodes(self.node["from_table"]) for name in node.get("using_columns") or ()
        }
        is_whole = all(view_of(t) in self.known | TOKEN_VIEWS for t in self.tables)
        return names - set(ROW_COLUMNS) if is_whole else names

    def _part(self, table: Tree, own: Tree) -> Part | None:
        """A FROM with whole rows only, joined as it was; None where nothing is left of it.

        Args:
            own: the table whose rows are asked for. It is never left out.
        """
        if table["type"] == "JOIN":
            return self._part(table["left"], own) if table["join_type"] in FILTERS else self._join(table, own)
        view, alias = view_of(table), _alias(table)
        if table["type"] == "SUBQUERY":
            if not _is_whole(table, self.known, self.is_bound):
                return None
            # DuckDB numbers subqueries without a name, and some may be left out.
            alias = alias or f"_subquery_{next(n for n, t in enumerate(self.tables) if t is table)}"
            return Part(_table_sql({**table, "alias": alias}), {alias: False}, True, _parameters_of(table))
        if not _is_table(table) or table.get("column_name_alias") or table.get("at_clause"):
            if table is own:
                raise _NotPlainError
            return None
        if view in TOKEN_VIEWS:
            return Part(f'(select id, global_row from {ROWS}) as "{alias}"', {alias: True})
        if view not in self.known:
            return None
        name = ".".join(f'"{part}"' for part in view.split("."))
        return Part(f'{name} as "{alias}"' if table.get("alias") else name, {alias: False}, view != "rows")

    def _join(self, table: Tree, own: Tree) -> Part | None:
        left, right = self._part(table["left"], own), self._part(table["right"], own)
        if left and right and (on := self._on(table, left, right)):
            return Part(
                f"({left.sql} join {right.sql} {on})",
                left.aliases | right.aliases,
                left.chooses or right.chooses,
                left.parameters | right.parameters,
                left.is_cut or right.is_cut,
            )
        if left and not any(node is own for node in nodes(table["right"])):
            return left
        return replace(right, is_cut=True) if right else None

    def _on(self, table: Tree, left: Part, right: Part) -> str | None:
        """What joins two parts; None where nothing equates columns of rows, so that one of them is left out."""
        if using := table.get("using_columns"):
            if left.is_cut or right.is_cut:
                return None
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


def _joined(table: Tree) -> list[Tree]:
    """The tables of a FROM."""
    return [*_joined(table["left"]), *_joined(table["right"])] if table["type"] == "JOIN" else [table]


def _is_table(table: Tree) -> bool:
    return table.get("type") == "BASE_TABLE"


def _alias(table: Tree) -> str:
    return str(table.get("alias") or table.get("table_name") or "").lower().replace('"', '""')


def _parameters_of(expression: Tree) -> frozenset[str]:
    return frozenset(str(node["identifier"]) for node in nodes(expression) if node.get("class") == "PARAMETER")


def _node(text: str) -> Tree:
    """The select that a text is."""
    node: Tree = parsed(text)["statements"][0]["node"]
    return node


def _sql(expression: Tree) -> str:
    """An expression of a parsed query as SQL, by DuckDB."""
    return _text_with(select_list=[{**expression, "alias": ""}]).removeprefix("SELECT ")


def _table_sql(table: Tree) -> str:
    """A table of a FROM as SQL, by DuckDB."""
    return _text_with(from_table=table).removeprefix("SELECT 1 FROM ")


def _text_with(**parts: Any) -> str:
    """`select 1` with other parts, as SQL."""
    return text_of({**_node("select 1"), **parts})


def text_of(select: Tree) -> str:
    """A select of a parsed query as SQL, by DuckDB."""
    statement = parsed("select 1")
    statement["statements"][0]["node"] = select
    (text,) = _ask("select json_deserialize_sql(?::json)", [json.dumps(statement)])[0]
    return str(text)


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
    numbers = []
    tables = {ROWS: [("id", "varchar"), ("global_row", "bigint")], **columns_of(connection, views)}
    with empty_database(tables) as scratch:

        def is_bound(text: str, names: frozenset[str]) -> bool:
            try:
                scratch.execute(text, _named(parameters, names))
            except duckdb.Error:
                return False
            return True

        for query in (queries := row_queries(tree, view, views, is_bound)) or ():
            # What a condition takes from a token, an outer select or the select's own list is not bound.
            conditions = [c for c in query.conditions if is_bound(*query.statement([c]))]
            text, names = query.statement(conditions)
            if not (conditions or query.part.chooses) or not is_bound(text, names):
                return None
            try:
                own = _named(parameters, names)
                answer = interruptible(connection, partial(_answer, connection, text, own))
            except duckdb.Error:  # a cast that fails for a row, say: the query may never evaluate it for this row
                return None
            numbers.append(answer.column(0).to_numpy())
    return None if queries is None or not numbers else np.unique(np.concatenate(numbers))


def _answer(connection: duckdb.DuckDBPyConnection, text: str, parameters: Parameters) -> pa.Table:
    return connection.sql(text, params=parameters).to_arrow_table()


def columns_of(connection: duckdb.DuckDBPyConnection, views: Iterable[str]) -> dict[str, Columns]:
    """Columns of these views, those that there are (what DuckDB says of the others it says of the query itself)."""
    columns: dict[str, Columns] = {}
    for name in views:
        try:
            columns[name] = connection.execute(
                f"select column_name, column_type from (describe {_quoted(name)})"
            ).fetchall()
        except duckdb.CatalogException:
            continue
    return columns


def _quoted(view: str) -> str:
    schema, _, table = view.rpartition(".")
    return f'"{schema or "main"}"."{table}"'


@contextmanager
def empty_database(tables: Mapping[str, Columns]) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with empty tables, where names are looked up without opening files. It reads and writes no file."""
    with duckdb.connect(config={"threads": 1, "enable_external_access": False}) as scratch:
        for name, columns in tables.items():
            scratch.execute(f"create schema if not exists {_quoted(name).split('.')[0]}")
            if isinstance(columns, pa.Schema):
                scratch.register("_empty", columns.empty_table())
                scratch.execute(f"create table {_quoted(name)} as from _empty")
                scratch.unregister("_empty")
                continue
            listing = ", ".join(f'"{column}" {kind}' for column, kind in columns)
            scratch.execute(f"create table {_quoted(name)} ({listing})")
        yield scratch


def missing_column(error: duckdb.Error) -> re.Match[str] | None:
    """The column that DuckDB did not find: the last group that matched, of which the third is a column of USING."""
    return MISSING_COLUMN.search(str(error))


def meant_columns(
    scratch: duckdb.DuckDBPyConnection, text: str, parameters: Parameters, candidates: Iterable[str]
) -> list[str] | None:
    """Those of some further columns of `tokens` that a query means by their names, in lower case.

    A name that means something without such a column (an alias, a column of a CTE) is none of them. So what a query means
    does not depend on which columns there are.

    Args:
        scratch: see `empty_database`; it has `tokens` without these columns, and gets those that are meant.
        text: one query; it is bound, not run.
        candidates: names in lower case.
    Returns:
        None where DuckDB refuses the query.
    """
    left = {*candidates}
    meant: list[str] = []
    while True:
        try:
            scratch.execute(f"explain {text}", parameters)
            return meant
        except duckdb.Error as error:
            match = missing_column(error)
            name = "" if match is None else match[match.lastindex or 0].lower()
            if name not in left:
                return None
        left.remove(name)
        meant.append(name)
        scratch.execute(f'alter table tokens add column "{name}" float')


def _named(parameters: Parameters, names: frozenset[str]) -> dict[str, Any]:
    """Some of a query's parameters, by name; those of `?` are numbered from 1."""
    by_name = (
        {str(n): v for n, v in enumerate(parameters, 1)} if isinstance(parameters, list | tuple) else parameters or {}
    )
    return {name: value for name, value in by_name.items() if name in names}
