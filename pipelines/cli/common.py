"""What the commands share: arguments and options, settings made of them, and how results are printed."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pyarrow as pa
import typer
from pyarrow import csv
from pydantic import BaseModel, Field
from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text
from typer.models import OptionInfo

import kdata
from kdata.config import RowsConfig, apply_settings, parse_config
from kdata.errors import ConfigError, QueryError, nearest
from kdata.format.rejects import rejected_line
from kdata.observe.progress import console
from kdata.observe.terminal import PlainConsole, name_text
from kdata.observe.text import visible, visible_json, visible_name
from kdata.pipelines.ray.tasks import RayTasks, RayTasksConfig
from kdata.store.open import open_dataset
from kdata.store.sql import strict_json
from kdata.store.url import is_url
from kdata.teachers.config import TeacherConfig

MAX_ROWS = 200  # of a table on a terminal
MAX_DOMAINS = 20  # that a table on a terminal has columns for
BESIDE = 2  # spaces before a column of a table
NARROW = 12  # characters of text to which a column may shrink; longer text is wrapped
WIDE = 20  # characters that a column needs at most; longer text is wrapped
out = PlainConsole()


class Resume(StrEnum):
    """What to do with work that is already there."""

    auto = "auto"
    never = "never"
    must = "must"


class CheckTime(StrEnum):
    """When a query's files are compared with their digests; see `kdata.open`."""

    first = "first"
    later = "later"
    whole = "whole"


SpreadOption = Annotated[
    str | None,
    typer.Option(
        metavar="local|ray",
        help="Where the work is done: here, or on a Ray cluster (--set engine.KEY=VALUE). [default: local]",
    ),
]
CheckOption = Annotated[
    CheckTime,
    typer.Option(
        metavar="first|later|whole",
        help="When files are compared with their digests: first, or not now. At a URL parts are read, which have none; "
        "whole copies and compares the files.",
    ),
]


class Format(StrEnum):
    """How a result is printed."""

    table = "table"
    json = "json"


class SqlFormat(StrEnum):
    """How the result of a query is printed."""

    table = "table"
    json = "json"
    csv = "csv"


class FieldOption(OptionInfo):
    """An option that sets a field of a settings model; `models` are those that have the field."""

    def __init__(self, field: str, models: tuple[type[BaseModel], ...], **options: Any) -> None:
        super().__init__(default=..., **options)
        self.field, self.models = field, models


@contextmanager
def spread(values: dict[str, Any], kind: str | None) -> Iterator[RayTasks | None]:
    """Take the `engine` part out of a command's settings; give what does its work elsewhere, or None. Raises ConfigError."""
    own = values.pop("engine", {})
    if not isinstance(own, dict):
        raise ConfigError("engine must be a mapping; write for instance --engine ray --set engine.address=auto")
    name = kind or own.get("kind", "local")
    if name == "local" and not set(own) - {"kind"}:
        yield None
    elif name == "ray":
        with RayTasks(parse_config(RayTasksConfig, {**own, "kind": name}, "engine settings")) as tasks:
            yield tasks
    elif name == "local":
        raise ConfigError(f"engine.{min(set(own) - {'kind'})} is a setting of the Ray engine; add --engine ray")
    else:
        raise ConfigError(
            f"--engine {name}: there is no such engine{nearest(name, ['local', 'ray'])}; use local or ray"
        )


def option(
    field: str,
    *models: type[BaseModel],
    flag: str | None = None,
    metavar: str | None = None,
    default: str | None = None,
) -> FieldOption:
    """An option for a field of settings, with the field's description and default.

    Declare it with the default None: not given, it stays out of the settings, and the model decides.

    Args:
        models: the models that have the field; several for the methods of `kdata select`.
        flag: name of the option, where it is not the field's own with dashes.
        default: where the value comes from instead, in words.
    """
    return FieldOption(
        field,
        models,
        param_decls=[flag or "--" + field.replace("_", "-")],
        help=field_help(field, models, default),
        metavar=metavar or _metavar(models[0].model_fields[field].annotation),
        show_default=False,  # it is in the text: the parameter's own default is None
    )


def field_help(field: str, models: tuple[type[BaseModel], ...], default: str | None = None) -> str:
    """Description and default of a field; of a field of several methods each variant, with the methods that have it."""
    variants: dict[str, list[str]] = {}
    for model in models:
        text = f"{model.model_fields[field].description}{_shown(default or _default(model, field))}"
        method = model.model_fields["method"].default if len(models) > 1 else ""
        variants.setdefault(text, []).append(method)
    if len(models) == 1:
        return next(iter(variants))
    return " ".join(f"{', '.join(methods)}: {text}" for text, methods in variants.items())


def _default(model: type[BaseModel], field: str) -> str:
    about = model.model_fields[field]
    value = None if about.is_required() else about.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None or value in ([], {}) else str(value)


def _shown(default: str) -> str:
    return f" [default: {default}]" if default else ""


def _metavar(annotation: Any) -> str | None:
    """The choices of a field, or what kind of value it takes."""
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    inner = [kind for kind in get_args(annotation) if kind is not type(None)]
    if annotation is bool:
        return None
    return {int: "N", float: "X", str: "TEXT"}.get(annotation) or (_metavar(inner[0]) if inner else None)


class ReadingModel(TeacherConfig):
    """A model that only reads, so that the backend that needs no further installation does."""

    backend: Literal["vllm", "vllm-server", "transformers"] = Field("transformers", description="What runs the model.")


DatasetArgument = Annotated[
    str,
    typer.Argument(metavar="DATASET", help="Dataset: a folder, hf://OWNER/NAME, or a URL such as s3://BUCKET/NAME."),
]
DatasetsArgument = Annotated[
    list[str], typer.Argument(metavar="DATASET", help="Datasets, each a folder, hf://OWNER/NAME, or a URL.")
]
NewDatasetArgument = Annotated[
    str, typer.Argument(metavar="DATASET", help="Dataset to write: a new folder or one to go on with, or a URL.")
]
NewFolderArgument = Annotated[str, typer.Argument(metavar="OUT", help="New folder on this machine.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, nested keys with dots. May be repeated."),
]
TeacherOption = Annotated[str, option("model", TeacherConfig, flag="--teacher", metavar="MODEL")]
BackendOption = Annotated[str | None, option("backend", TeacherConfig)]
StrictOption = Annotated[bool | None, option("strict", RowsConfig)]
ResumeOption = Annotated[
    Resume,
    typer.Option(
        metavar="auto|never|must",
        help="auto: continue earlier work. never: refuse if there is any. must: refuse if there is none.",
    ),
]
FormatOption = Annotated[Format, typer.Option(metavar="table|json", help="How the result is printed.")]


def with_settings(values: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    """Options that were given, with `--set` on top."""
    return apply_settings({key: value for key, value in values.items() if value is not None}, settings or [])


def teacher_config(
    values: dict[str, Any], name: str, backend: str | None, kind: type[TeacherConfig] = TeacherConfig
) -> TeacherConfig:
    """Take the `teacher` part out of a command's settings and validate it as `kind`. Raises ConfigError."""
    own = values.pop("teacher", {})
    if not isinstance(own, dict):
        raise ConfigError("teacher must be a mapping; write for instance --set teacher.dtype=bfloat16")
    options = {"model": name, **({} if backend is None else {"backend": backend})}
    return parse_config(kind, {**options, **own}, "teacher settings")


def local_folder(place: str) -> Path:
    """A folder on this machine that a command writes to. Raises ConfigError for a URL or hf://."""
    if is_url(place) or place.startswith("hf:"):
        raise ConfigError(
            f"{place} is not a folder on this machine, and this command writes to one; name a folder, then share it with "
            "`kdata push`"
        )
    return Path(place)


def say(*lines: str) -> None:
    """Print lines as they are, however long."""
    for line in lines:
        out.print(visible_name(line), soft_wrap=True)


def say_unchecked(dataset: kdata.Dataset) -> None:
    """Say, beside the answer, which views were read without a comparison with their digests."""
    if not dataset.unchecked:
        return
    names = ", ".join(sorted(dataset.unchecked))
    why = (
        "--check later"
        if dataset.check == "later"
        else f"parts were read from {dataset.place}; `kdata sql` and `select` copy and compare with --check whole"
    )
    console.print(f"not compared with their digests ({why}): {names}; `kdata verify` compares them", soft_wrap=True)


def say_rows(dataset: kdata.Dataset) -> None:
    """Print where a dataset is and how much it holds."""
    say(f"{dataset.path}: {dataset.num_rows:,} rows, {dataset.num_tokens:,} tokens")


def say_rejected(places: Iterable[str], sources: list[str] | None = None) -> None:
    """Print how many inputs of some sources (None: all) of datasets were rejected, why, and where they are written."""
    say(rejected_line({place: open_dataset(place).rejected(sources) for place in places}))


def print_json(value: Any) -> None:
    """Print a value as one line of JSON; NaN and infinities are strings."""
    print_json_text(json.dumps(value, default=str, ensure_ascii=False))


def print_json_text(text: str) -> None:
    """Print JSON that nothing in a terminal obeys."""
    print(visible_json(strict_json(text)))


def print_query(dataset: kdata.Dataset, query: str, format: SqlFormat) -> None:
    """Run a query and print its result while it comes. Raises QueryError where two columns of JSON have one name."""
    with dataset.sql_stream(query, values="json" if format is SqlFormat.json else "text") as batches:
        {SqlFormat.table: print_first_rows, SqlFormat.csv: print_csv, SqlFormat.json: print_json_rows}[format](batches)


def print_json_rows(batches: pa.RecordBatchReader) -> None:
    """Print a list of objects, of columns whose values are JSON text."""
    names = batches.schema.names
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise QueryError(f"--format json: two columns are named {repeated!r}; name one of them with `as`")
    keys = [json.dumps(name, ensure_ascii=False) for name in names]
    before = "["
    for batch in batches:
        rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
        objects = (", ".join(f"{key}: {value or 'null'}" for key, value in zip(keys, row, strict=True)) for row in rows)
        for content in objects:
            print(before + visible_json(strict_json(f"{{{content}}}")), end="")
            before = ", "
    print("[]" if before == "[" else "]")


def print_csv(batches: pa.RecordBatchReader) -> None:
    """Print a result as CSV: byte for byte into a file or a pipe; on a terminal control characters are escapes."""
    if not sys.stdout.isatty():
        with csv.CSVWriter(sys.stdout.buffer, batches.schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        return
    for number, table in enumerate(
        itertools.chain([batches.schema.empty_table()], (pa.Table.from_batches([batch]) for batch in batches))
    ):
        sink = pa.BufferOutputStream()
        csv.write_csv(table, sink, csv.WriteOptions(include_header=number == 0))
        print(visible(sink.getvalue().to_pybytes().decode()), end="")


def print_first_rows(batches: pa.RecordBatchReader) -> None:
    """Print a result for a person, at most MAX_ROWS rows of it; the others are counted."""
    first, num_rows = [], 0
    for batch in batches:
        first += [batch.slice(0, MAX_ROWS - num_rows)] if num_rows < MAX_ROWS else []
        num_rows += batch.num_rows
    print_table(pa.Table.from_batches(first, schema=batches.schema), num_rows)


def print_table(table: pa.Table, num_rows: int | None = None, *, of: str = "rows", every: str = "csv") -> None:
    """Print a table for a person, at most MAX_ROWS rows of it, and how many there are: `num_rows`, or those of the table.

    of: what a row of it is. every: the --format of the command that prints all.
    """
    num_rows = table.num_rows if num_rows is None else num_rows
    numbers = [
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        for kind in table.schema.types
    ]
    columns = table.column_names
    shown = [[cell(value) for value in column.to_pylist()] for column in table.slice(0, MAX_ROWS).columns]
    rows = [list(row) for row in zip(*shown, strict=True)]
    widths = [max(len(column), *(min(len(row[n]), WIDE) for row in rows), 0) for n, column in enumerate(columns)]
    if rows and sum(widths) + 2 * len(widths) > out.width:
        print_records(columns, rows)
    else:
        print_rows(columns, rows, right=numbers)
    if num_rows > MAX_ROWS:
        say(f"{MAX_ROWS} of {num_rows:,} {of}; --format {every} prints all")


def print_records(columns: list[str], rows: list[list[str]]) -> None:
    """Print each row below the other, a column a line: for tables that are wider than the terminal."""
    for number, row in enumerate(rows, 1):
        grid = Table(
            title=Text(f"row {number}"), title_justify="left", box=None, show_header=False, padding=(0, 1, 0, 0)
        )
        for _ in range(2):
            grid.add_column(overflow="fold")  # a number or an id that does not fit goes on below
        for column, text in zip(columns, row, strict=True):
            grid.add_row(name_text(f"  {column}", "bold"), visible(text))
        out.print(grid)


def print_rows(
    columns: Iterable[str],
    rows: Iterable[list[str]],
    *,
    right: list[bool],
    title: str | None = None,
    caption: str | None = None,
    narrow: bool = False,
    first: int = NARROW,
) -> None:
    """Print a table; columns that are marked in `right` are numbers.

    Columns that do not fit into the terminal stand in further tables below, each with the first column again, which gets at
    least `first` characters. narrow: one space between columns and no line, in one table whatever its width.
    """
    names, cells = list(columns), list(rows)
    blocks = [list(range(len(names)))] if narrow else column_blocks(names, cells, right, out.width, first)
    for number, block in enumerate(blocks, 1):
        table = Table(
            title=name_text(title) if title and number == 1 else None, title_justify="left",
            caption=caption if number == len(blocks) else None, caption_justify="left",
            box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1),
        )  # fmt: skip
        if narrow:
            table.box, table.padding, table.pad_edge = None, (0, 1, 0, 0), False
        whole = sum(BESIDE + max(cell_len(names[n]), longest_cell(cells, n)) for n in block)
        for n in block:
            # Where something has to be narrower it is headings and text: of a fixed width, numbers are never broken.
            width = narrowest(names, cells, n) if right[n] and whole >= out.width else None
            justify: Literal["left", "right"] = "right" if right[n] else "left"
            table.add_column(name_text(names[n]), justify=justify, overflow="fold", width=width)
        for row in cells:
            table.add_row(*(visible(row[n]) for n in block))
        out.print(table)


def longest_cell(rows: list[list[str]], column: int) -> int:
    """The width of the widest cell of a column, 0 without rows."""
    return max((cell_len(visible(row[column])) for row in rows), default=0)


def narrowest(names: list[str], rows: list[list[str]], column: int) -> int:
    """The width in which no cell of a column and no word of its heading is broken."""
    return max(longest_cell(rows, column), max(map(cell_len, names[column].split()), default=0))


def column_blocks(
    names: list[str], rows: list[list[str]], right: list[bool], width: int, first: int
) -> list[list[int]]:
    """Places of the columns of each table, so that no number and no word of a heading is broken; one where all fit."""
    if not names:
        return []
    needed = [narrowest(names, rows, n) for n in range(len(names))]
    least = [BESIDE + (size if right[n] else min(size, NARROW if n else first)) for n, size in enumerate(needed)]
    blocks, free = [[0]], width - 1 - least[0]
    for place in range(1, len(names)):
        if least[place] > free and len(blocks[-1]) > 1:
            blocks.append([0])
            free = width - 1 - least[0]
        blocks[-1].append(place)
        free -= least[place]
    return blocks


def cell(value: Any) -> str:
    """A value of a query, for a person."""
    if isinstance(value, float):
        is_plain = value == 0 or 1e-3 <= abs(value) < 1e15 or not math.isfinite(value)
        return f"{value:.4f}" if is_plain else f"{value:.4e}"
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)
