"""Commands that share and rearrange datasets: push, export, merge, split, head."""

from __future__ import annotations

from typing import Annotated, get_args

import typer

import kdata
from kdata.errors import ConfigError
from kdata.pipelines.cli.common import DatasetArgument, NewFolderArgument, local_folder, say, say_rows
from kdata.selection.plan import open_plan
from kdata.share.arrange import head as take_head
from kdata.share.arrange import merge as merge_datasets
from kdata.share.arrange import split as split_dataset
from kdata.share.interchange.exporter import ExportFormat, export_dataset
from kdata.share.interchange.megatron import export_megatron
from kdata.share.interchange.speculators import export_speculators
from kdata.share.push import push as push_dataset
from kdata.store.url import is_url


def push(
    dataset: DatasetArgument,
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="A new folder, or hf://OWNER/NAME (needs HF_TOKEN).")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="On the Hub: everyone may read it. Otherwise it is private.")
    ] = False,
    allow_secrets: Annotated[
        bool, typer.Option("--allow-secrets", help="Share texts that hold what looks like a key or token.")
    ] = False,
    hidden: Annotated[bool, typer.Option("--with-hidden", help="Share hidden states, too; they are large.")] = False,
) -> None:
    """Copy a dataset to a folder or to the Hub.

    The dataset is verified first, its texts are searched for keys and tokens, and
    it gets a card (README.md).
    """
    if is_url(destination):
        raise ConfigError(f"{destination}: push copies to a folder or to hf://OWNER/NAME; name one of these")
    place = push_dataset(kdata.open(dataset), destination, public=public, allow_secrets=allow_secrets, hidden=hidden)
    say(f"pushed to {place}")


def export(
    dataset: DatasetArgument,
    target: Annotated[
        str, typer.Argument(metavar="FILE", help="Parquet file to write; megatron and speculators: a new folder.")
    ],
    format: Annotated[
        str,
        typer.Option(
            metavar="plain|axolotl|megatron|speculators",
            help="plain: nested lists. axolotl: its columns. megatron: its cache of log-probabilities. speculators: hidden "
            "states (see `kdata hidden`) and tokens.",
        ),
    ] = "plain",
    version: Annotated[int, typer.Option("--columns", metavar="1|2", help="Version of axolotl's columns.")] = 2,
    hidden: Annotated[
        str | None, typer.Option("--hidden", metavar="NAME", help="Hidden states, for speculators.")
    ] = None,
    seq_length: Annotated[
        int | None,
        typer.Option("--seq-length", metavar="N", help="Tokens of a sample, for megatron: its --seq-length."),
    ] = None,
) -> None:
    """Write a dataset in another tool's format.

    Prints what that format cannot hold.
    """
    if format not in (*get_args(ExportFormat), "megatron", "speculators"):
        raise ConfigError(f"--format {format}: use plain, axolotl, megatron or speculators")
    if (format == "speculators") != (hidden is not None) or (format == "megatron") != (seq_length is not None):
        raise ConfigError(
            "--format speculators needs --hidden NAME, --format megatron needs --seq-length N, and other formats take neither"
        )
    file = local_folder(target)
    if hidden is not None:
        losses = export_speculators(kdata.open(dataset), hidden, file)
    elif seq_length is not None:
        losses = export_megatron(kdata.open(dataset), file, seq_length)
    else:
        losses = export_dataset(kdata.open(dataset), file, format, version=version)  # type: ignore[arg-type]
    say(f"{file}: written{'; not in it:' if losses else ''}", *(f"  {line}" for line in losses))


def merge(
    datasets: Annotated[list[str], typer.Argument(metavar="DATASET", help="Two or more datasets of one teacher.")],
    target: NewFolderArgument,
    link: Annotated[
        bool, typer.Option("--link/--copy", help="Link the payloads (on one file system), or copy them.")
    ] = False,
) -> None:
    """Put the rows of several datasets into one.

    Scores and plans are not copied: they belong to one dataset as it is.
    """
    root = local_folder(target)
    say_rows(merge_datasets([kdata.open(name) for name in datasets], root, link=link))


def split(
    dataset: DatasetArgument,
    target: Annotated[
        str, typer.Argument(metavar="OUT", help="New folder on this machine; each part gets a folder in it.")
    ],
    by: Annotated[
        str, typer.Option(metavar="domain|plan", help="domain: a part for each. plan: the plan's rows, and the rest.")
    ] = "domain",
    plan: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the plan, for --by plan.")] = None,
) -> None:
    """Cut a dataset into parts.

    Scores, plans and rejects are not copied.
    """
    if by not in ("domain", "plan"):
        raise ConfigError(f"--by {by}: use domain or plan")
    if (by == "plan") != (plan is not None):
        raise ConfigError("--by plan and --plan NAME belong together; give both or neither")
    root, opened = local_folder(target), kdata.open(dataset)
    chosen = None if plan is None else open_plan(opened, plan)
    for part in split_dataset(opened, root, by=by, plan=chosen).values():  # type: ignore[arg-type]
        say_rows(part)


def head(
    dataset: DatasetArgument,
    target: NewFolderArgument,
    num_rows: Annotated[int, typer.Option("-n", "--num-rows", metavar="N", min=1, help="Number of rows.")] = 100,
) -> None:
    """Copy the first rows of a dataset.

    Scores, plans and rejects are not copied.
    """
    root = local_folder(target)
    say_rows(take_head(kdata.open(dataset), root, num_rows))
