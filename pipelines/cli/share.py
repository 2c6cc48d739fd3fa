"""Commands that share and rearrange datasets: push, pull, diff, export, merge, split, head."""

from __future__ import annotations

import json
from textwrap import wrap
from typing import Annotated, Any, get_args

import typer

import kdata
from kdata.errors import ConfigError
from kdata.pipelines.cli.common import (
    DatasetArgument,
    Format,
    FormatOption,
    NewFolderArgument,
    local_folder,
    out,
    print_json,
    print_rows,
    say,
    say_rows,
    say_unchecked,
)
from kdata.selection.plan import open_plan
from kdata.share.arrange import head as take_head
from kdata.share.arrange import merge as merge_datasets
from kdata.share.arrange import split as split_dataset
from kdata.share.diff import diff as diff_datasets
from kdata.share.fitness import About
from kdata.share.follow import push_while_written
from kdata.share.interchange.exporter import ExportFormat, export_dataset
from kdata.share.interchange.megatron import export_megatron
from kdata.share.interchange.speculators import export_speculators
from kdata.share.provenance import shown
from kdata.share.pull import pull as pull_dataset
from kdata.share.push import push as push_dataset


def push(
    dataset: DatasetArgument,
    destination: Annotated[
        str,
        typer.Argument(metavar="DESTINATION", help="A new folder, hf://OWNER/NAME (needs HF_TOKEN), or a URL."),
    ],
    tag: Annotated[
        str | None, typer.Option(metavar="NAME", help="On the Hub: a name for this version, such as v1.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--while", help="Also while it is written: push what is committed, again and again.")
    ] = False,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="With --while: least time between two pushes.")
    ] = 60.0,
    public: Annotated[
        bool, typer.Option("--public", help="On the Hub: everyone may read it. Otherwise it is private.")
    ] = False,
    allow_secrets: Annotated[
        bool, typer.Option("--allow-secrets", help="Share texts that hold what looks like a key or token.")
    ] = False,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="CHECK", help="Leave a check out: leakage, personal, licenses or secrets."),
    ] = None,
    closed_teacher: Annotated[
        bool, typer.Option("--closed-teacher", help="The teacher's weights are not public: look whether they leak.")
    ] = False,
    teacher_license: Annotated[
        str | None, typer.Option(metavar="ID", help="The teacher's license, such as apache-2.0 or llama3.1.")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(metavar="CODE", help="Language of the texts, such as en; may be repeated.")
    ] = None,
    hidden: Annotated[bool, typer.Option("--with-hidden", help="Share hidden states, too; they are large.")] = False,
) -> None:
    """Copy a dataset to a folder, to the Hub or to another URL.

    On the Hub and at a URL only what is new is sent. The dataset is verified
    first. Then kdata looks for leaks of a closed teacher, for personal data (in a
    sample), for licenses that forbid sharing, and for keys and tokens. What it
    found is in the card (README.md) and in audit.json.

    \b
    Examples:
      kdata push my-dataset hf://me/beliefs --teacher-license mit --language en
      kdata push my-dataset shared --closed-teacher --skip personal
      kdata push my-dataset hf://me/beliefs --tag v2
      kdata push being-captured s3://BUCKET/NAME --while
    """
    skipped = (*(skip or ()), *(["secrets"] if allow_secrets else []))
    about = About(closed_teacher, teacher_license, tuple(language or ()), tuple(dict.fromkeys(skipped)))
    if follow:
        place = push_while_written(
            local_folder(dataset), destination, every_sec=every, public=public, about=about, tag=tag, hidden=hidden,
            sent=lambda state: say(f"pushed {state.num_rows:,} rows to {destination}; more is being written"),
        )  # fmt: skip
    else:
        place = push_dataset(kdata.open(dataset), destination, public=public, about=about, tag=tag, hidden=hidden)
    say(f"pushed to {place}")


def pull(
    dataset: DatasetArgument,
    target: NewFolderArgument,
    plan: Annotated[str | None, typer.Option(metavar="NAME", help="Only the rows of this plan, once each.")] = None,
    where: Annotated[
        str | None,
        typer.Option(metavar="SQL", help="Only rows for which this is true: columns of rows, or SCORE.COLUMN."),
    ] = None,
) -> None:
    """Bring a dataset from the Hub or a URL, or rows of it.

    The copy is verified. Called again after an interruption, it goes on; called
    again after its end, it verifies what is there.

    \b
    Examples:
      kdata pull hf://OWNER/NAME@v1 my-dataset
      kdata pull hf://OWNER/NAME some-code --where "domain = 'code'"
    """
    say_rows(pull_dataset(kdata.open(dataset), local_folder(target), plan=plan, where=where))


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="Dataset: a folder, hf://OWNER/NAME[@REVISION], or a URL.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one, or another version of it.")],
    limit: Annotated[
        int, typer.Option(metavar="N", min=0, help="Ids that are named of each kind; all are counted.")
    ] = 10,
    format: FormatOption = Format.table,
) -> None:
    """Show what differs between two datasets or versions.

    Rows are compared by id and content, without the payload. Settings, teacher, scores and plans are compared, too.

    \b
    Examples:
      kdata diff hf://OWNER/NAME@v1 hf://OWNER/NAME@v2
      kdata diff my-dataset other --format json
    """
    a, b = kdata.open(first), kdata.open(second)
    facts = diff_datasets(a, b, limit=limit)
    if format is Format.json:
        print_json(facts)
    else:
        print_difference(facts)
    say_unchecked(a)
    say_unchecked(b)


def print_difference(facts: dict[str, Any]) -> None:
    """Print the result of `diff` for a person."""
    for name in ("a", "b"):
        one = facts[name]
        commit = "" if one["commit"] is None else f" at {one['commit'][:12]}"
        say(
            f"{name}: {one['place']}{commit}: {one['rows']:,} rows, {one['tokens']:,} tokens, {one['content_digest'][:12]}"
        )
    if facts["same"]:
        say("no difference in rows, settings, teacher, scores and plans")
        return
    rows = [
        [kind.replace("_", " "), f"{one['count']:,}", f"{one['tokens']:,}", ", ".join(one["first"])]
        for kind, one in facts["rows"].items()
    ]
    print_rows(["rows", "count", "tokens", "first ids"], rows, right=[False, True, True, False])
    say(*setting_lines(facts["teacher"] | facts["settings"], out.width))
    for kind in ("scores", "plans"):
        if facts[kind] is None:
            say(f"{kind}: not compared, a web server does not list them")
        elif any(facts[kind].values()):
            text = "; ".join(f"{what} {', '.join(names)}" for what, names in facts[kind].items() if names)
            say(*wrap(f"{kind}: {text}", out.width, subsequent_indent="  ", break_on_hyphens=False))


def setting_lines(settings: dict[str, list[str | None]], width: int) -> list[str]:
    """What differs, `a -> b`, below the part of the key that several have in common; long values get lines of their own."""
    lines, above = [], ""
    for key, values in settings.items():
        group, _, name = key.rpartition(".")
        if group != above:
            lines.append(f"{group}:")
            above = group
        a, b = ("(not set)" if value is None else shown(json.loads(value)) for value in values)
        line = f"  {name}: {a} -> {b}"
        lines += [line] if len(line) <= width else [f"  {name}:", f"    {a}", f"    -> {b}"]
    return ["settings, a -> b:", *lines] if lines else []


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
