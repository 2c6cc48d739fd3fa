"""The command `hygiene`: what the texts of a dataset or of a corpus are, as columns to choose by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import duckdb
import pyarrow as pa
import typer

import kdata
from kdata.config import parse_config
from kdata.corpus.corpus import Corpus, CorpusConfig, Document
from kdata.corpus.hygiene import open_file
from kdata.errors import ConfigError, MissingError, nearest
from kdata.hygiene.checks import HygieneConfig
from kdata.hygiene.inspect import Report, inspect_corpus, inspect_dataset
from kdata.hygiene.summary import summary
from kdata.hygiene.texts import chat_text, is_dataset
from kdata.observe.text import one_line
from kdata.pipelines.cli.common import SetOption, SpreadOption, option, print_rows, say, spread, with_settings
from kdata.pipelines.ray.tasks import RayTasks
from kdata.selection.show import SHOWN_CHARS
from kdata.store.conditions import check_condition, counts_query
from kdata.store.sql_tree import empty_database
from kdata.store.url import is_url


def hygiene(
    place: Annotated[
        str, typer.Argument(metavar="PLACE", help="A dataset; with --out a corpus: a file, folder or hf://.")
    ],
    out: Annotated[
        str | None, typer.Option(metavar="FILE.parquet", help="PLACE is a corpus: write its columns to this file.")
    ] = None,
    checks: Annotated[list[str] | None, option("checks", HygieneConfig)] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION", help="With --out: say what this would leave out, with examples. May be repeated."
        ),
    ] = None,
    messages_column: Annotated[str | None, option("messages_column", CorpusConfig, metavar="COLUMN")] = None,
    engine: SpreadOption = None,
    set: SetOption = None,
) -> None:
    """Find duplicates, test questions, poor and personal text.

    Nothing is deleted. For a dataset each check is a score: choose by `kdata select --where`. For a corpus that no teacher
    has read yet, --out writes the same columns to a file: read what passes with --set corpus.hygiene=FILE and corpus.where.
    --set overlap.NAME=FILE names an evaluation set.

    \b
    Examples:
      kdata hygiene my-dataset --set overlap.gsm8k=gsm8k.jsonl
      kdata select my-dataset --where duplicates.near_keep --method all
      kdata hygiene texts.parquet --out h.parquet --where duplicates.near_keep
      kdata capture my-dataset --teacher MODEL --corpus texts.parquet \\
        --set corpus.hygiene=h.parquet --set corpus.where=duplicates.near_keep
    """
    settings = with_settings({"checks": checks or None}, set)
    with spread(settings, engine) as pool:
        check(place, out, settings, messages_column, where or [], pool)


def check(
    place: str,
    out: str | None,
    settings: dict[str, Any],
    messages_column: str | None,
    where: list[str],
    pool: RayTasks | None,
) -> None:
    """Do the checks, here or in a pool, and say what they found."""
    source = settings.pop("corpus", {})
    if not isinstance(source, dict):
        raise ConfigError("corpus must be a mapping; write for instance --set corpus.text_column=content")
    config = parse_config(HygieneConfig, settings, "hygiene settings")
    if out is None:
        if source or messages_column or where:
            raise ConfigError(
                "--messages-column, --where and corpus.KEY are for a corpus: name a file to write with --out"
            )
        of_dataset(place, config, pool)
        return
    if is_dataset(place):
        raise ConfigError(f"{place} is a dataset: leave --out away, and each check becomes a score of it")
    own = {"path": place, **({} if messages_column is None else {"messages_column": messages_column}), **source}
    of_corpus(parse_config(CorpusConfig, own, "corpus settings"), config, Path(out), where, pool)


def of_dataset(place: str, config: HygieneConfig, pool: RayTasks | None) -> None:
    """Do the checks on a dataset, and say what they found."""
    if not (is_url(place) or place.startswith("hf:") or is_dataset(place)) and Path(place).exists():
        raise MissingError(f"{place} is not a dataset; for a corpus name the file to write: --out FILE.parquet")
    dataset = kdata.open(place)
    report = inspect_dataset(dataset, config, pool=pool)
    joins = " ".join(f"left join scores.{config.prefix}{check} as {check} using (id)" for check in config.chosen)

    def fetch(query: str) -> list[list[Any]]:
        table = dataset.sql(query)
        return [list(row) for row in zip(*(column.to_pylist() for column in table.columns), strict=True)]

    say(*(f"scores.{name} covers {report.rows:,} rows of {dataset.path}" for name in [*report.written, *report.kept]))
    say_report(report)
    say(*summary(config, f"rows {joins}", fetch))


def of_corpus(
    corpus: CorpusConfig, config: HygieneConfig, file: Path, conditions: list[str], pool: RayTasks | None
) -> None:
    """Do the checks on a corpus, and say what they found, and what conditions would leave out."""
    refuse_unknown(config, conditions)
    report = inspect_corpus(corpus, config, file, pool=pool)
    say(f"{file} has the columns of {report.rows:,} rows of {corpus.path}")
    say_report(report)
    connection, _ = open_file(file)
    with connection:
        say(*summary(config, "rows", lambda query: connection.sql(query).fetchall()))
        if conditions:
            say_left_out(corpus, conditions, connection)


def refuse_unknown(config: HygieneConfig, conditions: list[str]) -> None:
    """Raise ConfigError, before time is spent, where conditions name what the file will not have."""
    for condition in conditions:
        for name in check_condition(condition):
            if name not in ("rows", *config.chosen):
                raise ConfigError(
                    f"condition {condition!r} reads {name}, and the checks are {', '.join(config.chosen)}"
                    f"{nearest(name, list(config.chosen))}; choose among their columns, or name further checks"
                )
    checks = [pa.field(check, pa.struct(list(config.arrow_schema(check)))) for check in config.chosen]
    schema = pa.schema([("id", pa.string()), ("domain", pa.string()), *checks])
    with empty_database({"rows": schema}) as scratch:
        try:
            scratch.execute(counts_query("rows", conditions) if conditions else "select 1")
        except duckdb.Error as error:
            raise ConfigError(f"conditions {conditions}: {str(error).strip()}") from error


def say_report(report: Report) -> None:
    """Say which rows and items were passed over."""
    if report.rejected:
        say(f"{report.rejected:,} rows that cannot be used are left out; `kdata capture` says why")
    for name, (count, words) in report.skipped_items.items():
        say(f"overlap: {count:,} items of {name} have no text of {words} words, and are not searched for")


def say_left_out(corpus: CorpusConfig, conditions: list[str], connection: duckdb.DuckDBPyConnection) -> None:
    """Say how many rows each condition leaves out, and print some of them."""
    try:
        [row] = connection.sql(counts_query("rows", conditions)).fetchall()
    except duckdb.Error as error:
        raise ConfigError(f"conditions {conditions}: {str(error).strip()}") from error
    total, passed, *each = row
    parts = [each[4 * number : 4 * number + 4] for number in range(len(conditions))]
    cells = [[text, *(f"{n:,}" for n in part[:3])] for text, part in zip(conditions, parts, strict=True)]
    columns = ["condition", "leaves out", "not known", "that no other does"]
    print_rows(columns, cells, right=[False, True, True, True], title=f"{passed:,} of {total:,} rows pass")
    texts = texts_of(corpus, {name for part in parts for name in part[3]})
    shown = [
        [text, name, texts.get(name, "")] for text, part in zip(conditions, parts, strict=True) for name in part[3]
    ]
    if shown:
        print_rows(["left out by", "id", "text"], shown, right=[False] * 3, title="Rows that are left out, for example")


def texts_of(corpus: CorpusConfig, ids: set[str]) -> dict[str, str]:
    """The beginning of the texts of some rows."""
    texts: dict[str, str] = {}
    for document in Corpus(corpus).documents():
        if isinstance(document, Document) and document.id in ids:
            text = document.text if document.chat is None else chat_text(document.chat.messages)
            texts[document.id] = one_line(text, SHOWN_CHARS)
        if len(texts) == len(ids):
            break
    return texts
