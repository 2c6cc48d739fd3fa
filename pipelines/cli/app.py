"""The command line's dataset commands: a skin over the library. `pipelines/` adds those that make, train and evaluate."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import kdata
from kdata.config import apply_settings, parse_config
from kdata.errors import ConfigError, CorruptError

app = typer.Typer(
    name="kdata",
    help="Logit datasets: capture what a teacher believes, query it, share it, and train students offline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()


class Resume(StrEnum):
    """What to do with work that is already there."""

    auto = "auto"
    never = "never"
    must = "must"


class Format(StrEnum):
    """How a table is printed."""

    table = "table"
    json = "json"
    csv = "csv"


DatasetArgument = Annotated[
    str, typer.Argument(metavar="DATASET", help="Dataset folder, hf://OWNER/NAME, or URL of a store.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any further setting; may be repeated.")
]
TeacherOption = Annotated[str, typer.Option("--teacher", metavar="MODEL", help="Model folder or Hub name.")]
BackendOption = Annotated[str, typer.Option(help="What runs the teacher: vllm, vllm-server or transformers.")]
ResumeOption = Annotated[
    Resume,
    typer.Option(help="auto: go on where a former run stopped; never: refuse; must: refuse a fresh start."),
]


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        out.print(f"kdata {kdata.__version__}")
        raise typer.Exit()


def _with_settings(values: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    return apply_settings({k: v for k, v in values.items() if v is not None}, settings or [])


def _teacher(values: dict[str, Any], model: str, backend: str) -> Any:
    """Take the `teacher` part out of a stage's settings and validate it."""
    from kdata.teachers.config import TeacherConfig

    given = values.pop("teacher", {})
    if not isinstance(given, dict):
        raise ConfigError("teacher must be a mapping: --set teacher.dtype=bfloat16")
    return parse_config(TeacherConfig, {"model": model, "backend": backend, **given}, "teacher settings")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder that `kdata run` wrote.")]) -> None:
    """Write RUN/report.html: what was made, and how good it is."""
    from kdata.pipelines.report.report import write_report

    out.print(f"report: {write_report(run)}")


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of a dataset that is being written.")],
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until nothing is running.")] = False,
) -> None:
    """Say where a run or a capture stands, from another terminal; it is not disturbed."""
    from kdata.observe import status as module

    if watch:
        module.watch(run, out)
    else:
        out.print(module.render(module.status(run), out.width))


@app.command()
def info(dataset: DatasetArgument) -> None:
    """Say what a dataset is and what it holds."""
    opened = kdata.open(dataset)
    about = opened.info
    payload = sum(f.bytes for e in opened.manifest for n, f in e.files.items() if n.startswith("data/"))
    facts = {
        "format": f"kdata {about.format_version}",
        "teacher": f"{about.teacher.model} ({about.teacher.backend} {about.teacher.backend_version}, {about.teacher.dtype})",
        "vocabulary": f"{about.vocab_size:,}",
        "tokenizer": about.tokenizer.hash[:12],
        "codec": f"{about.codec.id} {about.codec.version}: {about.codec.kind} {json.dumps(about.codec.parameters)}",
        "rows": f"{opened.num_rows:,} in {len(opened.manifest)} shards",
        "tokens": f"{opened.num_tokens:,}",
        "payload": f"{payload:,} bytes, {payload / max(opened.num_tokens, 1):.1f} per token",
        "rejected": f"{sum(e.rejected for e in opened.manifest):,}",
        "complete": ", ".join(f"{n}: {'yes' if s.num_units is not None else 'no'}" for n, s in about.sources.items()),
        "fingerprint": opened.content_digest,
    }
    grid = Table(show_header=False, box=None, title=str(opened.path), title_justify="left")
    for key, value in facts.items():
        grid.add_row(f"[bold]{key}", value)
    out.print(grid)
    _print_table(
        opened.sql(
            'select source, domain, count(*) as "rows", sum(num_tokens)::bigint as tokens, avg(nll) as nll, '
            "avg(kept_mass) as kept_mass from rows group by all order by all"
        ),
        Format.table,
    )


@app.command()
def verify(
    dataset: DatasetArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Also decode every row and compare it with the index.")] = False,
    against_teacher: Annotated[
        int, typer.Option(metavar="N", help="Also have the teacher read N rows again, and measure what storing cost.")
    ] = 0,
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="The teacher, for --against-teacher.")] = None,
    backend: BackendOption = "transformers",
) -> None:
    """Prove that a dataset is whole; exit status 1 and a list where it is not."""
    from kdata.check.verify import verify as run

    opened = kdata.open(dataset)
    problems = run(opened, deep=deep)
    if problems:
        listing = "\n".join(f"  {p.path}: {p.what}" for p in problems)
        raise CorruptError(f"{opened.path} is not whole:\n{listing}")
    out.print(f"whole: {len(opened.manifest)} shards, {opened.num_rows:,} rows, {opened.num_tokens:,} tokens")
    if against_teacher:
        _remeasure(opened, against_teacher, teacher, backend)


def _remeasure(opened: Any, rows: int, model: str | None, backend: str) -> None:
    from kdata.check.remeasure import against_teacher
    from kdata.teachers.load import load_teacher

    name = model or opened.info.teacher.model
    loaded = load_teacher(_teacher({}, name, backend), max_k=max(opened.info.codec.parameters.get("k", 1), 1))
    try:
        found = against_teacher(opened, loaded, rows)
    finally:
        loaded.close()
    written = [e.codec_error for e in opened.manifest if e.codec_error is not None]
    table = Table("", "measured again", "when written", title=f"{found.rows:,} rows, {found.positions:,} positions")
    for label, field in (
        ("mean error, nats", "mean_nats"),
        ("largest error, nats", "max_nats"),
        ("KL, nats", "kl_nats"),
    ):
        before = max((getattr(e, field) for e in written), default=0.0)
        table.add_row(label, f"{getattr(found.codec, field):.2e}", f"at most {before:.2e}")
    table.add_row("largest difference of a token's log-probability", f"{found.max_logprob_nats:.2e}", "float16")
    table.add_row("largest difference of log_tail", f"{found.max_log_tail_nats:.2e}", "float32")
    if found.same_draws is not None:
        table.add_row("positions with the same draws", f"{found.same_draws:.1%}", "")
    out.print(table)
    limit = 10 * max((e.kl_nats for e in written), default=0.0) + 1e-4
    if found.codec.kl_nats > limit or found.max_logprob_nats > 0.1:
        raise CorruptError(
            f"{opened.path} does not hold what this teacher believes: KL {found.codec.kl_nats:.2e} nats (limit "
            f"{limit:.1e}), a token's log-probability off by {found.max_logprob_nats:.2e}"
        )


@app.command()
def sql(
    dataset: DatasetArgument,
    query: Annotated[str, typer.Argument(help="DuckDB SQL over rows, manifest, rejects, scores.NAME, plans.NAME.")],
    format: Annotated[Format, typer.Option(help="How the result is printed.")] = Format.table,
) -> None:
    """Query a dataset. Views and columns: schemas/README.md."""
    from kdata.store.open import open_dataset

    _print_table(open_dataset(dataset).sql(query), format)


@app.command()
def push(
    dataset: DatasetArgument,
    destination: Annotated[str, typer.Argument(help="A new folder, or hf://OWNER/NAME (needs HF_TOKEN).")],
    public: Annotated[bool, typer.Option("--public", help="Hub: make it public; private otherwise.")] = False,
) -> None:
    """Copy a dataset, verified and with its card, to a folder or to the Hub."""
    from kdata.share.push import push as run

    out.print(f"pushed to {run(kdata.open(dataset), destination, public=public)}")


def _local(dataset: str) -> Path:
    if dataset.startswith("hf:"):
        raise ConfigError("a stage writes to a local folder; push it to the Hub afterwards")
    return Path(dataset)


def _done(dataset: Any) -> None:
    out.print(f"{dataset.path}: {dataset.num_rows:,} rows, {dataset.num_tokens:,} tokens")


def _print_table(table: Any, format: Format) -> None:
    if format is Format.json:
        print(json.dumps(table.to_pylist(), default=str, ensure_ascii=False))
        return
    if format is Format.csv:
        import sys

        from pyarrow import csv

        csv.write_csv(table, sys.stdout.buffer)
        return
    from rich.text import Text

    shown = Table()
    for name in table.column_names:
        shown.add_column(Text(name))
    for row in table.slice(0, 200).to_pylist():
        shown.add_row(*(Text(_cell(value)) for value in row.values()))
    out.print(shown)
    if table.num_rows > 200:
        out.print(f"200 of {table.num_rows:,} rows; --format csv prints all")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)
