"""Rows of a corpus that pass a condition on the columns that `kdata hygiene` wrote of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from kdata.errors import ConfigError, DataError, MismatchError, MissingError, first_line
from kdata.format.files import file_info
from kdata.format.json_text import parse_json
from kdata.store.conditions import all_true, check_condition
from kdata.store.sql import files_view, literal, unglobbed

# Of the file: JSON with `corpus` (see `Corpus.rows_identity`) and `checks` (settings); `where`, if it has only such rows.
METADATA = b"kdata.hygiene"


@dataclass(frozen=True)
class Passing:
    """Which rows pass.

    Attributes:
        ids: of every row of the file, and whether it passes.
        count: rows that pass, of the domains that are read.
        digest: SHA-256 (hex) of the file.
        lacks_left_out: whether the file was made of the rows that met a condition, and all others of the corpus are left out.
    """

    ids: dict[str, bool]
    count: int
    digest: str
    lacks_left_out: bool


def open_file(file: Path) -> tuple[duckdb.DuckDBPyConnection, dict[str, Any]]:
    """A connection with the file's columns in the view `rows`, which can read nothing else; and what the file says of itself.

    Raises:
        MissingError: there is no such file.
        DataError: it is not a file of `kdata hygiene`.
    """
    if not file.is_file():
        raise MissingError(f"{file} does not exist; write it with `kdata hygiene CORPUS --out {file}`")
    try:
        about = parse_json((pq.read_schema(file).metadata or {}).get(METADATA, b"null"))
        if about is None:
            raise ValueError("it does not say of which corpus it is")
        if not isinstance(about, dict) or not {"corpus", "checks"} <= set(about):
            raise ValueError("its metadata is incomplete")
        connection = duckdb.connect()
        connection.execute("set enable_progress_bar = false")
        files_view(connection, "rows", [unglobbed(file.resolve())], pa.schema([]))
        connection.execute(f"set allowed_paths = [{literal(str(file.resolve()))}]")
        connection.execute("set enable_external_access = false")
        connection.execute("set lock_configuration = true")
    except (pa.ArrowException, OSError, ValueError, duckdb.Error) as error:
        raise DataError(
            f"{file} is not a file that `kdata hygiene` wrote ({first_line(error)}); write it again"
        ) from error
    return connection, about


def passing(file: Path, condition: str, identity: dict[str, Any], domains: list[str] | None) -> Passing:
    """Which rows pass a condition.

    Args:
        identity: of the corpus that is read, see `Corpus.rows_identity`.
        domains: those that are read; None: all.
    Raises:
        MissingError, DataError: see `open_file`.
        MismatchError: the file is of another corpus.
        ConfigError: the condition is no condition on its columns.
        DataError: no row passes.
    """
    check_condition(condition)
    connection, about = open_file(file)
    with connection:
        if about["corpus"] != identity:
            raise MismatchError(
                f"{file} is of another corpus, of another state of this one, or of other columns; run `kdata hygiene` again"
            )
        try:
            query = f"select id, domain, {all_true([condition])} as passes from rows"
            table = connection.sql(query).to_arrow_table()
        except duckdb.Error as error:
            raise ConfigError(f"condition {condition!r} on {file}: {str(error).strip()}") from error
    ids, passes = table["id"].to_pylist(), table["passes"].to_pylist()
    wanted = None if domains is None else set(domains)
    count = sum(
        passes[n] and (wanted is None or domain in wanted) for n, domain in enumerate(table["domain"].to_pylist())
    )
    if not count:
        raise DataError(f"condition {condition!r} leaves no row of {file}; loosen it")
    by_id = dict(zip(ids, passes, strict=True))
    if len(by_id) < len(ids):
        raise DataError(f"{file} has an id twice; write it again with `kdata hygiene`")
    return Passing(by_id, count, file_info(file).sha256, "where" in about)
