"""Commands that choose: score, select, plan show, plan compare."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import kdata
from kdata.config import parse_config
from kdata.errors import ConfigError
from kdata.jobs.scoring import ScoreConfig
from kdata.jobs.scoring import score as score_rows
from kdata.jobs.selecting import select as select_rows
from kdata.pipelines.cli.common import (
    CheckOption,
    CheckTime,
    DatasetArgument,
    FieldOption,
    Format,
    FormatOption,
    ReadingModel,
    SetOption,
    SpreadOption,
    option,
    print_json,
    print_rows,
    say,
    say_unchecked,
    spread,
    with_settings,
)
from kdata.pipelines.evidence.verdicts import COLUMNS, LEGEND, verdicts
from kdata.selection.margins import score_margins
from kdata.selection.plan import open_plan
from kdata.selection.position_base import ShareRule
from kdata.selection.position_rules import RULES, Excess, SqlPositions
from kdata.selection.score_file import ImportedScores, bring
from kdata.selection.select import DEFAULT, METHODS, parse_step
from kdata.selection.show import Shown, comparison_table, draw, left_out_texts, table_of
from kdata.selection.show import compare as compare_plans
from kdata.selection.step import Step
from kdata.store.sql import Room


class ScoreSettings(ScoreConfig):
    """What `kdata score` takes."""

    model: ReadingModel


def method_option(field: str, metavar: str | None = None) -> FieldOption:
    """An option for a setting that some of the methods of `kdata select` have."""
    models = [model for model in METHODS.values() if field in model.model_fields]
    return option(field, *models, metavar=metavar)


PlanArgument = Annotated[str, typer.Argument(metavar="PLAN", help="Name of a plan of the dataset.")]


def score(
    dataset: DatasetArgument,
    model: Annotated[str | None, option("model", ReadingModel, metavar="MODEL")] = None,
    file: Annotated[
        str | None,
        typer.Option("--from", metavar="FILE.parquet", help="Add your own numbers instead: columns id and numbers."),
    ] = None,
    name: Annotated[str | None, option("name", ScoreConfig, metavar="NAME")] = None,
    unit: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What your numbers are, for whoever reads the score (--from).")
    ] = None,
    backend: Annotated[str | None, option("backend", ReadingModel)] = None,
    tokens: Annotated[bool | None, option("tokens", ScoreConfig)] = None,
    margins: Annotated[
        bool,
        typer.Option("--margins", help="Add the teacher's mean margin p1 - p2 of each row; with --model: the model's."),
    ] = False,
    set: SetOption = None,
) -> None:
    """Add a score to every row of a dataset, or to every token.

    A reference model's mean NLL of each row (--model, with the teacher's tokenizer), numbers of your own (--from), or the
    teacher's margin (--margins). With --tokens the model's NLL of each token is stored, too.
    """
    if (model is not None) + (file is not None) + (margins and model is None) != 1:
        raise ConfigError(
            "give one of --model MODEL (a reference model scores), --from FILE (your own numbers) and --margins"
        )
    if margins and model is None:
        if set or backend or tokens or unit:
            raise ConfigError("--margins takes --name alone")
        opened, chosen = kdata.open(dataset), name or "margin"
        say_covered(opened, chosen, score_margins(opened, chosen))
        return
    if file is not None:
        if set or backend or tokens:
            raise ConfigError("--backend, --tokens and --set are for --model; --from takes --name and --unit")
        add_numbers(dataset, file, {"unit": unit}, name)
        return
    reader = {key: value for key, value in {"model": model, "backend": backend}.items() if value is not None}
    values = {"model": reader, "name": name, "tokens": tokens, "margins": margins or None}
    config = parse_config(ScoreSettings, with_settings(values, set), "score settings")
    opened = kdata.open(dataset)
    score_rows(opened, config)
    each = f", and each of their {opened.num_tokens:,} tokens: nll_{config.name} of tokens" if config.tokens else ""
    say(f"scores.{config.name} covers {opened.num_rows:,} rows of {opened.path}{each}")


def add_numbers(dataset: str, file: str, options: dict[str, Any], name: str | None) -> None:
    """Make a score of the numbers in a Parquet file, and print what it covers."""
    opened, chosen = kdata.open(dataset), name or str(ScoreConfig.model_fields["name"].default)
    brought = bring(opened, Path(file), chosen, **{key: value for key, value in options.items() if value is not None})
    say_covered(opened, chosen, brought)


def say_covered(opened: kdata.Dataset, name: str, brought: ImportedScores) -> None:
    """Print how many rows have a number, for each column of a score."""
    for column, num_rows in brought.covered.items():
        say(f"scores.{name}.{column} covers {num_rows:,} of {opened.num_rows:,} rows of {opened.path}")


def list_methods(value: bool) -> None:
    """Print every method with its source and what the evidence says, and end."""
    if value:
        known = verdicts()
        lines = [
            [name, method.CHOOSES, method.SOURCE.rpartition(", ")[2].removeprefix("arXiv "), *known[name].cells()]
            for name, method in METHODS.items()
        ]
        columns = ["method", "what it chooses", "source", *COLUMNS]
        print_rows(columns, lines, right=[False] * len(columns), title="methods of kdata select", narrow=True)
        say("", *LEGEND)
        raise typer.Exit


def select(
    dataset: DatasetArgument,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help=f"One of {', '.join(METHODS)}. [default: {DEFAULT}; with --sql: sql]",
        ),
    ] = None,
    parent: Annotated[str | None, option("parent", Step, metavar="PLAN")] = None,
    name: Annotated[str | None, option("name", Step, metavar="PLAN")] = None,
    share: Annotated[float | None, method_option("share")] = None,
    by_domain: Annotated[bool | None, method_option("by_domain")] = None,
    score: Annotated[str | None, method_option("score", "NAME")] = None,
    sql: Annotated[str | None, method_option("sql", "QUERY")] = None,
    where: Annotated[list[str] | None, option("where", Step, metavar="CONDITION")] = None,
    weights: Annotated[str | None, method_option("weights", "DOMAIN=W,...")] = None,
    temperature: Annotated[float | None, method_option("temperature")] = None,
    size: Annotated[int | None, method_option("size")] = None,
    count_by: Annotated[str | None, method_option("count_by")] = None,
    max_repeats: Annotated[float | None, method_option("max_repeats")] = None,
    take: Annotated[str | None, method_option("take")] = None,
    seed: Annotated[int | None, method_option("seed")] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help=f"Choose tokens of the rows, too: one of {', '.join(RULES)}. Its settings: --set positions.KEY=VALUE.",
        ),
    ] = None,
    positions_share: Annotated[float | None, option("share", ShareRule, flag="--positions-share")] = None,
    positions_sql: Annotated[str | None, option("sql", SqlPositions, flag="--positions-sql", metavar="QUERY")] = None,
    positions_score: Annotated[str | None, option("score", Excess, flag="--positions-score", metavar="NAME")] = None,
    positions_reference: Annotated[
        str | None, option("reference", Excess, flag="--positions-reference", metavar="NAME")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Most memory for DuckDB, such as 3GB; it uses the disk beyond that."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads of DuckDB; one for each core if not given.")
    ] = None,
    check: CheckOption = CheckTime.first,
    engine: SpreadOption = None,
    set: SetOption = None,
    list: Annotated[
        bool,
        typer.Option(
            "--list", help="Print every method with source and evidence, and end.", callback=list_methods, is_eager=True
        ),
    ] = False,
) -> None:
    """Choose what to train on: write a plan of rows, or of tokens.

    A plan says which rows, and how often. With --positions it also says which of their tokens count in training. The options
    of a method are named in front of their text.

    \b
    Examples:
      kdata select my-dataset --method difference --share 0.5
      kdata select my-dataset --name easy --sql "select id from rows where nll<4"
      kdata select my-dataset --parent easy --method cap --size 1000000
      kdata select D --where duplicates.near_keep --where "language.code = 'en'"
      kdata select my-dataset --positions entropy --positions-share 0.2
      kdata select D --positions excess --positions-score s --positions-share .6
    """
    rule = {
        "rule": positions or ("sql" if positions_sql else None), "share": positions_share, "sql": positions_sql,
        "score": positions_score, "reference": positions_reference,
    }  # fmt: skip
    chosen_rule = {key: value for key, value in rule.items() if value is not None}
    values = {
        "method": method or ("sql" if sql else None), "positions": chosen_rule or None,
        "parent": parent, "name": name, "where": where or None, "share": share, "by_domain": by_domain,
        "score": score, "sql": sql, "weights": None if weights is None else weights_of(weights), "temperature": temperature,
        "size": size, "count_by": count_by, "max_repeats": max_repeats, "take": take, "seed": seed,
    }  # fmt: skip
    settings = with_settings(values, set)
    if isinstance(settings.get("positions"), dict) and "rule" not in settings["positions"]:
        raise ConfigError(
            f"{', '.join(f'positions.{key}' for key in settings['positions'])} without a rule that chooses positions: add "
            f"--positions RULE, one of {', '.join(RULES)}"
        )
    with spread(settings, engine) as pool:
        step = parse_step(settings)
        opened = kdata.open(dataset, check=check.value)
        print_shown(table_of(select_rows(opened, step, Room(memory, threads), pool=pool)))
    say_unchecked(opened)


def weights_of(text: str) -> dict[str, float]:
    """`a=0.5,b=0.5` as a mapping. Raises ConfigError."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.rpartition("=")
        domain = name.strip()
        if domain in weights:
            raise ConfigError(f"--weights names {domain!r} twice; name each domain once")
        try:
            weights[domain] = float(number)
        except ValueError as error:
            raise ConfigError(f"--weights {part!r}: write it as DOMAIN=NUMBER") from error
        if not equals or not domain:
            raise ConfigError(f"--weights {part!r}: write it as DOMAIN=NUMBER")
    return weights


def show(
    dataset: DatasetArgument,
    plan: PlanArgument,
    picture: Annotated[
        str | None, typer.Option(metavar="FILE", help="Picture to write: .png, .svg or .pdf. [default: plan-NAME.png]")
    ] = None,
    format: FormatOption = Format.table,
) -> None:
    """Show what a plan takes of each domain.

    Prints a table, and rows that a condition left out, and draws a picture. --format json prints the plan's description, and
    draws only if --picture is given.
    """
    opened = kdata.open(dataset)
    chosen = open_plan(opened, plan)
    file = Path(picture or f"plan-{chosen.info.name}.png")
    if format is Format.json:
        print_json(chosen.info.model_dump(mode="json"))
        if picture is not None:
            draw(opened, chosen, file)
            say_unchecked(opened)
        return
    print_shown(table_of(chosen))
    if examples := left_out_texts(opened, chosen):
        rows = [[condition, name, text] for condition, name, text in examples]
        print_rows(["left out by", "id", "text"], rows, right=[False] * 3, title="Rows that were left out, for example")
    say(f"picture: {draw(opened, chosen, file)}")
    say_unchecked(opened)


def compare(
    dataset: DatasetArgument,
    plan: PlanArgument,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Name of another plan of the dataset.")],
    format: FormatOption = Format.table,
) -> None:
    """Show what two plans have in common.

    Prints for each domain how many rows both take, and how many only one of them; and, where one of the plans chooses
    positions, how many tokens count in both.
    """
    comparison = compare_plans(kdata.open(dataset), plan, other)
    if format is Format.json:
        print_json(asdict(comparison))
        return
    print_shown(comparison_table(comparison))


def print_shown(shown: Shown) -> None:
    """Print a table about plans, with its notes."""
    right = [column != "domain" for column in shown.columns]
    print_rows(shown.columns, shown.rows, right=right, title=shown.title)
    say(*shown.notes)
