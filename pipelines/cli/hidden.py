"""The command that stores hidden states."""

from __future__ import annotations

from typing import Annotated

import typer

import kdata
from kdata.config import parse_config
from kdata.jobs.hidden import HiddenConfig, plan_hidden, store_hidden
from kdata.pipelines.cli.common import DatasetArgument, ReadingModel, SetOption, option, say, with_settings


class HiddenSettings(HiddenConfig):
    """What `kdata hidden` takes."""

    model: ReadingModel


def hidden(
    dataset: DatasetArgument,
    model: Annotated[str, option("model", ReadingModel, metavar="MODEL", flag="--teacher")],
    layers: Annotated[str | None, option("layers", HiddenConfig, metavar="I,...,head")] = None,
    dtype: Annotated[str | None, option("dtype", HiddenConfig)] = None,
    name: Annotated[str | None, option("name", HiddenConfig, metavar="NAME")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and end.")] = False,
    set: SetOption = None,
) -> None:
    """Store a model's hidden states beside a dataset.

    For who trains draft models (EAGLE) or needs full distributions. The size is
    printed first; a disk that is too small ends the command.
    """
    chosen = None if layers is None else [int(part) if part.isdigit() else part for part in layers.split(",")]
    values = {"model": {"model": model}, "layers": chosen, "dtype": dtype, "name": name}
    config = parse_config(HiddenSettings, with_settings(values, set), "hidden settings")
    opened = kdata.open(dataset)
    say(*plan_hidden(opened, config).lines())
    if dry_run:
        return
    info = store_hidden(opened, config)
    say(f"{opened.path}/hidden/{info.name}: {opened.num_rows:,} rows, {opened.num_tokens:,} tokens")
