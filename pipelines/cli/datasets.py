"""Commands on whole datasets: import, export, repair, merge, split, head, combine, audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import kdata
from kdata.config import parse_config
from kdata.errors import ConfigError, CorruptError
from kdata.pipelines.cli.app import DatasetArgument, Resume, ResumeOption, SetOption, _local, _with_settings, app, out


def _say(lines: list[str]) -> None:
    for line in lines:
        out.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="File or folder of another tool's Parquet or JSONL.")],
    dataset: DatasetArgument,
    format: Annotated[str, typer.Option(help="distillkit, axolotl or plain.")],
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer that made the ids: folder or Hub name.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Number of token ids, where the files do not tell.")] = None,
    aligned: Annotated[
        str | None, typer.Option(help="Token that list j is about: with (j), after (j + 1), end (flush with the last).")
    ] = None,
    over_one: Annotated[
        str, typer.Option(help="Positions that sum to more than 1: keep as they are, mask (leave out), or refuse.")
    ] = "keep",
    resume: ResumeOption = Resume.auto,
    set: SetOption = None,
) -> None:
    """Import another tool's logit dataset as it is; say what it lacks and what is wrong with it."""
    from kdata.share.interchange.importer import ImportConfig, import_dataset

    given: dict[str, Any] = {"format": format, "tokenizer": tokenizer, "vocab_size": vocab_size}
    values = _with_settings({**given, "aligned": aligned, "over_one": over_one}, set)
    config = parse_config(ImportConfig, values, "import settings")
    made, report = import_dataset(source, _local(dataset), config, resume=resume.value)
    out.print(f"{made.path}: imported from {config.format}", highlight=False, soft_wrap=True)
    _say(report.lines(config.over_one))


@app.command()
def export(
    dataset: DatasetArgument,
    target: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    format: Annotated[str, typer.Option(help="plain (nested lists) or axolotl.")] = "plain",
    version: Annotated[int, typer.Option("--columns", help="Version of axolotl's columns, 1 or 2.")] = 2,
) -> None:
    """Write a dataset as nested lists or as axolotl's columns; say what is lost."""
    from kdata.share.interchange.exporter import export_dataset

    if format not in ("plain", "axolotl"):
        raise ConfigError(f"--format {format}: kdata writes plain and axolotl")
    lost = export_dataset(kdata.open(dataset), target, format, version=version)  # type: ignore[arg-type]
    out.print(f"{target}: written{'; not in it:' if lost else ''}", highlight=False, soft_wrap=True)
    _say(lost)


@app.command()
def repair(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Dataset folder.")],
    copy: Annotated[Path | None, typer.Option(help="A whole dataset.json to restore a damaged one from.")] = None,
) -> None:
    """Set damaged shards aside, so that the rest is a dataset again; say which work units to run again."""
    from kdata.check.repair import repair as run

    done = run(dataset, copy=copy)
    if not done.problems:
        out.print(f"{dataset} is whole: nothing to repair", highlight=False, soft_wrap=True)
        return
    _say([f"{p.path}: {p.what}" for p in done.problems])
    if done.aside is not None:
        out.print(f"set aside in {done.aside}: {len(done.moved)} files", highlight=False, soft_wrap=True)
    for source, units in done.units.items():
        out.print(f"run again: units {', '.join(map(str, units))} of {source!r}", highlight=False, soft_wrap=True)
    _say(done.commands)
    if done.remaining:
        listing = "\n".join(f"  {p.path}: {p.what}" for p in done.remaining)
        raise CorruptError(f"{dataset}: this cannot be repaired:\n{listing}")


@app.command()
def merge(
    datasets: Annotated[list[str], typer.Argument(metavar="DATASET DATASET ...", help="Datasets of one teacher.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    link: Annotated[
        bool, typer.Option("--link/--copy", help="Link the payloads (one file system), or copy them.")
    ] = False,
) -> None:
    """Put the rows of several datasets into one. Sidecars and plans stay behind: they belong to one state of one dataset."""
    from kdata.share.arrange import merge as run

    _made(run([kdata.open(name) for name in datasets], target, link=link))


@app.command()
def split(
    dataset: DatasetArgument,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="New folder, in which each part has one.")],
    by: Annotated[str, typer.Option(help="domain: a part for each; plan: the plan's rows, and the rest.")] = "domain",
    plan: Annotated[str | None, typer.Option(help="Name of the plan (by plan).")] = None,
) -> None:
    """Cut a dataset in disjoint parts. Sidecars, plans and rejects stay behind."""
    from kdata.selection.plan import Plan
    from kdata.share.arrange import split as run

    if by not in ("domain", "plan"):
        raise ConfigError(f"--by {by}: split by domain or by plan")
    opened = kdata.open(dataset)
    chosen = None if plan is None else Plan.load(opened.path / "plans" / plan)
    for part in run(opened, target, by=by, plan=chosen).values():  # type: ignore[arg-type]
        _made(part)


@app.command()
def head(
    dataset: DatasetArgument,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    num_rows: Annotated[int, typer.Option("-n", help="Rows.")] = 100,
) -> None:
    """Take the first rows of a dataset. Sidecars, plans and rejects stay behind."""
    from kdata.share.arrange import head as run

    _made(run(kdata.open(dataset), target, num_rows))


@app.command()
def combine(
    datasets: Annotated[
        list[str],
        typer.Argument(metavar="DATASET DATASET ...", help="Payloads of the same rows, one for each teacher."),
    ],
    target: Annotated[str, typer.Argument(metavar="OUT", help="Folder of the combination.")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="Shares in order, 0.7,0.3, or the name of one dataset that counts alone; equal if not given."
        ),
    ] = None,
    by_domain: Annotated[
        list[str] | None,
        typer.Option(metavar="DOMAIN=SHARES", help="The same for the rows of one domain; may be repeated."),
    ] = None,
    resume: ResumeOption = Resume.auto,
    set: SetOption = None,
) -> None:
    """Average the distributions of several teachers, or choose one of them for each domain."""
    from kdata.jobs.combine import CombineConfig
    from kdata.jobs.combine import combine as run

    values: dict[str, Any] = {} if weights is None else {"weights": _shares(weights, datasets)}
    for item in by_domain or []:
        domain, equals, text = item.partition("=")
        if not equals or not domain:
            raise ConfigError(f"--by-domain {item!r}: write it as DOMAIN=0.7,0.3 or DOMAIN=DATASET")
        values.setdefault("by_domain", {})[domain] = _shares(text, datasets)
    config = parse_config(CombineConfig, _with_settings(values, set), "combine settings")
    made, report = run(_local(target), [kdata.open(name) for name in datasets], config, resume=resume.value)
    _made(made)
    _say(report.lines())


def _shares(text: str, datasets: list[str]) -> list[float]:
    """Numbers as given; or 1 for the dataset that is named, by its path or its folder's name, and 0 for the others."""
    names = datasets if text in datasets else [Path(name).name for name in datasets]
    if names.count(text) == 1:
        return [float(name == text) for name in names]
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        listing = ", ".join(datasets)
        raise ConfigError(f"{text!r} is neither shares (0.7,0.3) nor one of the datasets {listing}") from error


@app.command()
def audit(
    datasets: Annotated[list[str], typer.Argument(metavar="DATASET ...", help="All that is released of one teacher.")],
    hidden_size: Annotated[int | None, typer.Option(help="The teacher's hidden size, where it is known.")] = None,
    head: Annotated[
        Path | None, typer.Option(help="The teacher's folder: compare with its true output projection.")
    ] = None,
    block: Annotated[int | None, typer.Option(help="Frequent ids in the second attack; twice the hidden size.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Does a release give the teacher's output projection away? Exit status 1 where an attack succeeds."""
    from kdata.check.audit import audit as run
    from kdata.check.audit import load_head

    opened = [kdata.open(name) for name in datasets]
    found = run(opened, hidden_size=hidden_size, head_VD=None if head is None else load_head(head), block=block)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        _say(found.lines())
    if found.verdict == "FAIL":
        raise typer.Exit(1)


def _made(dataset: kdata.Dataset) -> None:
    text = f"{dataset.path}: {dataset.num_rows:,} rows, {dataset.num_tokens:,} tokens"
    out.print(text, highlight=False, soft_wrap=True)
