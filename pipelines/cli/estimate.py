"""The command `kdata estimate`: what a recipe, a capture or a generation will take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdata.observe.text import duration, human_bytes, number
from kdata.pipelines.cli.common import Format, FormatOption, SetOption, print_json, print_rows, say

JOBS = ("capture", "generate")


def estimate(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|capture|generate", help="A recipe as for `kdata run`, or one of these commands."
        ),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGUMENTS]", help="Those of `kdata capture` or `kdata generate`.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="What an hour of this machine costs. Without: no money.")
    ] = None,
    probe_tokens: Annotated[
        int, typer.Option(metavar="N", min=0, help="Tokens that are read or written to measure; 0 measures nothing.")
    ] = 8192,
    format: FormatOption = Format.table,
    set: SetOption = None,
) -> None:
    """Say what a run will take: tokens, bytes, memory, hours.

    The teacher reads or writes a little, and every student takes three steps. Nothing is kept.

    \b
    Examples:
      kdata estimate quickstart
      kdata estimate capture my-dataset --teacher MODEL --corpus texts.parquet
    """
    from kdata.pipelines.estimate import as_json_object, cost, estimate_capture, estimate_recipe, lines_of, total

    if what in JOBS:
        job, teacher = _job(what, [*(arguments or []), *(part for text in set or [] for part in ("--set", text))])
        stages, memory = estimate_capture(job, teacher, probe_tokens)
    else:
        if arguments:
            context.fail(f"No such option or argument: {arguments[0]}")
        from kdata.pipelines.recipe import load_recipe

        stages, memory = estimate_recipe(load_recipe(Path(what), set or []), probe_tokens)
    if format is Format.json:
        print_json(as_json_object(stages, memory, price_per_hour))
        return
    rows = [*stages, *([total(stages)] if len(stages) > 1 else [])]
    columns = ["", "tokens", "on disk", "memory", "time", *([] if price_per_hour is None else ["cost"])]
    cells = [
        [
            row.name,
            f"{row.tokens:,}",
            "—" if row.disk_bytes is None else human_bytes(row.disk_bytes),
            "—" if row.memory_bytes is None else human_bytes(row.memory_bytes),
            "—" if row.hours is None else duration(3600 * row.hours),
            *([] if price_per_hour is None else [number(cost(row.hours, price_per_hour), ",.2f")]),
        ]
        for row in rows
    ]
    print_rows(columns, cells, right=[column != "" for column in columns])
    say(*lines_of(memory), *dict.fromkeys(row.note for row in stages if row.note is not None))


def _job(what: str, arguments: list[str]) -> tuple[Any, Any]:
    """The job that a command line stands for, and its teacher. Errors as of that command."""
    from kdata.pipelines.cli import make
    from kdata.pipelines.cli.main import Loaded
    from kdata.pipelines.estimate import refuse_cluster

    values = Loaded("")[what].make_context(f"kdata {what}", arguments).params
    names = {
        "capture": ("targets", "kind", "k", "num_draws", "threshold", "max_tokens", "long_text", "strict"),
        "generate": ("kind", "k", "num_draws", "threshold", "strict"),
    }[what]
    options = make.without_none(**{name: values[name] for name in names})
    make.folder_or_url(values["dataset"])
    columns = make.without_none(messages_column=values["messages_column"], text_column=values.get("text_column"))
    common = (options, values["backend"], values["engine"], list(values["set"] or []))
    if what == "capture":
        job, teacher, where = make.capture_job(values["teacher"], {"path": values["corpus"], **columns}, *common)
        refuse_cluster(where)
        return job, teacher
    options["sampling"] = make.sampling_options(values["max_tokens"], values["json_schema"])
    writing, teacher, where = make.generate_job(values["teacher"], {"path": values["prompts"], **columns}, *common)
    refuse_cluster(where)
    return writing, teacher
