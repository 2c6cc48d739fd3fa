"""Commands that choose: score, select, plan show, plan compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

import kdata
from kdata.config import parse_config
from kdata.errors import ConfigError
from kdata.pipelines.cli.app import BackendOption, DatasetArgument, SetOption, _with_settings, app, out

if TYPE_CHECKING:
    from kdata.selection.show import Shown

plan_app = typer.Typer(help="Look at plans: what was taken from where, and what tells two of them apart.")
app.add_typer(plan_app, name="plan")

MemoryOption = Annotated[
    str | None, typer.Option("--memory", metavar="SIZE", help="Most memory for DuckDB (3GB); the rest goes to disk.")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads of DuckDB; one per core if not given.")]


@app.command()
def score(
    dataset: DatasetArgument,
    model: Annotated[
        str | None, typer.Option(help="Reference model: folder or Hub name, with the teacher's tokenizer.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE.parquet", help="Bring numbers instead: id and numeric columns."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the sidecar: scores.NAME in SQL.")] = "ref",
    unit: Annotated[str, typer.Option(help="What the numbers are, for --from.")] = "as brought",
    backend: BackendOption = "transformers",
    set: SetOption = None,
) -> None:
    """Add a sidecar: a reference model's NLL of every sequence, or numbers of your own."""
    if (model is None) == (file is None):
        raise ConfigError("give either --model (a reference model scores) or --from (your own numbers)")
    opened = kdata.open(dataset)
    if file is not None:
        from kdata.selection.score_file import bring

        brought = bring(opened, file, name, unit=unit)
        for column, rows in brought.covered.items():
            out.print(
                f"scores.{name}.{column} covers {rows:,} of {opened.num_rows:,} rows of {opened.path}", soft_wrap=True
            )
        return
    from kdata.jobs.scoring import ScoreConfig
    from kdata.jobs.scoring import score as run

    values = _with_settings({"model": {"model": model, "backend": backend}, "name": name}, set)
    run(opened, parse_config(ScoreConfig, values, "score settings"))
    out.print(f"scores.{values['name']} covers {opened.num_rows:,} rows of {opened.path}")


@app.command()
def select(
    dataset: DatasetArgument,
    method: Annotated[
        str | None,
        typer.Option(
            help="difference (MiniPLM, if not given), random, all, sql; static, uniform, proportional, temperature, ddk, cap."
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="PLAN", help="Take this plan of the dataset further.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the plan; the method's if not given.")] = None,
    share: Annotated[float | None, typer.Option(help="Share that is kept (difference, random).")] = None,
    by_domain: Annotated[
        bool | None, typer.Option("--by-domain", help="That share of each domain (difference, random).")
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="Sidecar: the reference's NLL (difference), the student's (ddk).")
    ] = None,
    sql: Annotated[str | None, typer.Option(help="Query that returns ids, and repeats if you like (sql).")] = None,
    weights: Annotated[str | None, typer.Option(metavar="D=W,D=W", help="Shares of the domains (static).")] = None,
    temperature: Annotated[float | None, typer.Option(help="T of p^(1/T) (temperature).")] = None,
    size: Annotated[
        int | None, typer.Option(help="Units in all (mixtures, cap); else the most that can be met.")
    ] = None,
    count_by: Annotated[str | None, typer.Option(help="What sizes and shares count: sequences or tokens.")] = None,
    max_repeats: Annotated[float | None, typer.Option(help="Most repetition of a domain (mixtures).")] = None,
    take: Annotated[str | None, typer.Option(help="Of a domain: random, or first of the plan (mixtures, cap).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed (random, mixtures, cap).")] = None,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    set: SetOption = None,
) -> None:
    """Write a plan: which sequences to train on, and how often."""
    from kdata.selection.select import parse_step
    from kdata.selection.select import select as run
    from kdata.selection.show import table_of
    from kdata.store.open import open_dataset
    from kdata.store.sql import Room

    given: dict[str, Any] = {
        "method": method or ("sql" if sql else None), "parent": source, "name": name, "share": share, "by_domain": by_domain,
        "score": score, "sql": sql, "weights": None if weights is None else _numbers(weights), "temperature": temperature,
        "size": size, "count_by": count_by, "max_repeats": max_repeats, "take": take, "seed": seed,
    }  # fmt: skip
    plan = run(open_dataset(dataset), parse_step(_with_settings(given, set)), Room(memory, threads))
    _print(table_of(plan))


def _numbers(text: str) -> dict[str, float]:
    """`a=0.5,b=0.5` as a mapping. Raises ConfigError."""
    found: dict[str, float] = {}
    for part in text.split(","):
        domain, equals, number = part.rpartition("=")
        if domain.strip() in found:
            raise ConfigError(f"--weights names {domain.strip()!r} twice")
        try:
            found[domain.strip()] = float(number)
        except ValueError as error:
            raise ConfigError(f"--weights {part!r}: write it as DOMAIN=NUMBER") from error
        if not equals or not domain.strip():
            raise ConfigError(f"--weights {part!r}: write it as DOMAIN=NUMBER")
    return found


def _print(shown: Shown) -> None:
    table = Table(title=shown.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for column in shown.columns:
        table.add_column(Text(column), justify="left" if column == "domain" else "right")
    for row in shown.rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)
    for note in shown.notes:
        out.print(note, markup=False, highlight=False, soft_wrap=True)


@plan_app.command()
def show(
    dataset: DatasetArgument,
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="Name of a plan of the dataset.")],
    picture: Annotated[
        Path | None, typer.Option(help="Where the picture goes: .png, .svg or .pdf; plan-NAME.png if not given.")
    ] = None,
) -> None:
    """What a plan took from where: a table, and a picture."""
    from kdata.selection.plan import open_plan
    from kdata.selection.show import draw, table_of
    from kdata.store.open import open_dataset

    opened = open_dataset(dataset)
    found = open_plan(opened, plan)
    _print(table_of(found))
    out.print(f"picture: {draw(opened, found, picture or Path(f'plan-{found.info.name}.png'))}", soft_wrap=True)


@plan_app.command()
def compare(
    dataset: DatasetArgument,
    first: Annotated[str, typer.Argument(metavar="PLAN", help="Name of a plan of the dataset.")],
    second: Annotated[str, typer.Argument(metavar="OTHER", help="Name of another.")],
) -> None:
    """What two plans have in common, domain by domain, and what only one of them takes."""
    from kdata.selection.show import compare as run
    from kdata.store.open import open_dataset

    _print(run(open_dataset(dataset), first, second))
