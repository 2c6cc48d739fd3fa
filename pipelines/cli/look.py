"""Commands that look: info, sql, status, report, advise."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter
from rich.table import Table

import kdata
from kdata.errors import ConfigError
from kdata.format.files import lock_of
from kdata.format.keep import KeepConfig
from kdata.observe import status as progress
from kdata.observe.terminal import name_text
from kdata.observe.text import number
from kdata.pipelines.cli.common import (
    CheckOption,
    CheckTime,
    DatasetArgument,
    Format,
    FormatOption,
    SqlFormat,
    local_folder,
    out,
    print_json,
    print_query,
    print_table,
    say,
    say_unchecked,
)
from kdata.selection.plan import open_plan
from kdata.share.provenance import provenance, provenance_lines
from kdata.store.kept_counts import kept_lines

DOMAINS = (
    'select source, domain, count(*) as "rows", sum(num_tokens)::bigint as tokens, avg(nll) as nll, '
    "avg(kept_mass) as kept_mass from rows group by all order by all"
)


def info(
    dataset: DatasetArgument,
    chain: Annotated[
        bool, typer.Option("--provenance", help="Show by which commands it was made, of what, back to the teacher.")
    ] = False,
    format: FormatOption = Format.table,
) -> None:
    """Show what a dataset is and how much it holds.

    \b
    Examples:
      kdata info my-dataset
      kdata info hf://OWNER/NAME --format json
      kdata info my-dataset --provenance
    """
    opened = kdata.open(dataset)
    if chain:
        if format is Format.json:
            print_json(provenance(opened.info))
        else:
            say(*provenance_lines(opened.info))
        return
    facts, domains = facts_of(opened), opened.sql(DOMAINS, values="text")
    if format is Format.json:
        print_json({**facts, "domains": domains.to_pylist()})
        say_unchecked(opened)
        return
    grid = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    for name, line in lines_of(facts).items():
        grid.add_row(name_text(name, "bold"), name_text(line))
    say(str(opened.path))
    out.print(grid)
    print_table(domains, of="domains and sources", every="json")
    say_unchecked(opened)


def facts_of(dataset: kdata.Dataset) -> dict[str, Any]:
    """What a dataset is, as JSON values."""
    about = dataset.info
    return {
        "path": str(dataset.path),
        "format": about.format_version,
        "teacher": about.teacher.model_dump(mode="json"),
        "vocab_size": about.vocab_size,
        "tokenizer": about.tokenizer.hash,
        "codec": about.codec.model_dump(mode="json"),
        **({"kept_at": list(kept_lines(dataset))} if about.codec.keeps_some_positions else {}),
        "rows": dataset.num_rows,
        "shards": len(dataset.manifest),
        "tokens": dataset.num_tokens,
        "payload_bytes": sum(f.bytes for e in dataset.manifest for n, f in e.files.items() if n.startswith("data/")),
        "rejected": sum(entry.rejected for entry in dataset.manifest),
        "complete": {name: source.num_units is not None for name, source in about.sources.items()},
        "content_digest": dataset.content_digest,
    }


def lines_of(facts: dict[str, Any]) -> dict[str, str]:
    """The same for a person."""
    teacher, codec = facts["teacher"], facts["codec"]
    parameters = ", ".join(f"{name} {json.dumps(value)}" for name, value in codec["parameters"].items())
    return {
        "format": f"kdata {facts['format']}",
        "teacher": f"{teacher['model']} ({teacher['backend']} {teacher['backend_version']}, {teacher['dtype']})",
        "vocabulary": f"{facts['vocab_size']:,}",
        "tokenizer": facts["tokenizer"][:12],
        "kept": f"{codec['kind']}: {parameters}" if parameters else codec["kind"],
        **({"positions": "; ".join(facts["kept_at"])} if "kept_at" in facts else {}),
        "codec": f"{codec['id']} {codec['version']}",
        "rows": f"{facts['rows']:,} in {facts['shards']:,} shards",
        "tokens": f"{facts['tokens']:,}",
        "payload": f"{facts['payload_bytes']:,} bytes, {facts['payload_bytes'] / max(facts['tokens'], 1):.1f} per token",
        "rejected": f"{facts['rejected']:,}",
        "complete": ", ".join(f"{name}: {'yes' if whole else 'no'}" for name, whole in facts["complete"].items()),
        "digest": facts["content_digest"],
    }


def sql(
    dataset: DatasetArgument,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="A query in DuckDB's SQL.")],
    format: Annotated[
        SqlFormat, typer.Option(metavar="table|json|csv", help="How the result is printed.")
    ] = SqlFormat.table,
    check: CheckOption = CheckTime.first,
) -> None:
    """Query a dataset in SQL.

    Tables are rows, tokens, entries, manifest, rejects, scores.NAME and plans.NAME; schemas/README.md lists their columns.

    Values that JSON has no form for (dates, blobs, intervals, NaN) are strings, as DuckDB writes them. In csv and table,
    lists, structs and maps are JSON.

    \b
    Examples:
      kdata sql my-dataset "select domain, avg(nll) from rows group by 1"
      kdata sql my-dataset "select id, text from rows" --format csv
      kdata sql my-dataset "select token, avg(entropy) from tokens group by 1"
    """
    opened = kdata.open(dataset, check=check.value)
    print_query(opened, query, format)
    say_unchecked(opened)


def status(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Folder of a run, or of a dataset that is being written, on this machine."),
    ],
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again until the work ends.")] = False,
    format: FormatOption = Format.table,
) -> None:
    """Show how far a run or a capture is.

    Call it from another terminal; the work is not disturbed.
    """
    if watch and format is Format.json:
        raise ConfigError("--watch shows a table; call --format json again and again instead")
    folder = local_folder_of_run(run)
    if watch:
        progress.watch(folder, out)
    elif format is Format.json:
        print_json(TypeAdapter(progress.Status).dump_python(progress.status(folder), mode="json"))
    else:
        out.print(progress.render(progress.status(folder), out.width))


def report(run: Annotated[str, typer.Argument(metavar="RUN", help="Folder that `kdata run` wrote.")]) -> None:
    """Write the report page of a run.

    The page is RUN/report.html.
    """
    from kdata.pipelines.report.report import write_report  # needs the extra `report`, and no other command here does

    folder = local_folder_of_run(run)
    with ExitStack() as stack:
        if folder.is_dir():
            stack.enter_context(lock_of(folder))
        page = write_report(folder)
    say(f"report: {page}")


def local_folder_of_run(run: str) -> Path:
    """The folder of a run on this machine. Raises ConfigError for a URL or hf://."""
    try:
        return local_folder(run)
    except ConfigError as error:
        raise ConfigError(
            f"{run} is not a folder on this machine, and a run is watched where it works; `kdata info` opens a dataset at a "
            "URL"
        ) from error


def advise(
    dataset: DatasetArgument,
    plan: Annotated[
        str | None, typer.Option(metavar="PLAN", help="Name of a plan of the dataset. Without: every row.")
    ] = None,
    format: FormatOption = Format.table,
) -> None:
    """Say what measured runs recommend for a dataset.

    The runs are students that were trained with a small teacher. It also says what no run was made for.

    \b
    Examples:
      kdata advise my-dataset
      kdata advise my-dataset --plan difference --format json
    """
    from kdata.pipelines.evidence import advice

    opened = kdata.open(dataset)
    advised = advice.advise(
        opened, None if plan is None else open_plan(opened, plan), results=advice.RESULTS, capacity=advice.CAPACITY
    )
    if format is Format.json:
        print_json(advised)
    else:
        say(*advice_lines(advised))


def advice_lines(advised: dict[str, Any]) -> list[str]:
    """Advice for a person."""
    data, evidence = advised["data"], advised["evidence"]
    lines = [
        f"data: {settings_text(data['keep'])}; {data['rows']:,} rows, {data['tokens']:,} tokens, {data['vocab_size']:,} ids",
        f"evidence: {evidence['runs']:,} runs of {evidence['settings']:,} settings; {set_up_text(evidence['set_up'])}",
        "figures: held-out NLL above full distillation, mean and 95 % interval over runs",
        f"what to keep: {measured_text(advised['keep'])}",
    ]
    if advised["keep"] is not None:
        lines.append(
            f"  the fewest bytes that cannot be told from the closest, {measured_text(advised['closest'])}; "
            f"--set {' --set '.join(settings_text(advised['keep']['keep']).split(', '))}"
        )
    lines += [
        f"this dataset: {measured_text(advised['own'])}",
        f"the text alone: {measured_text(advised['text_alone'])}",
    ]
    own = [c for c in advised["objective"] if c["of_this_kind"]]
    if not own:
        lines.append(f"objective: none was compared with another on kind {data['keep']['kind']}")
    for compared in own or advised["objective"]:
        best, others = compared["best"], compared["others"]
        lines.append(
            f"{'objective' if own else '  on another kind'}: {best['objective']} is the best of {len(others) + 1} on "
            f"{settings_text(compared['on'])}: {gap_text(best)}; next {others[0]['objective']}: {gap_text(others[0])}"
        )
    return [
        *lines,
        *size_lines(advised["sizes"]),
        "no evidence for:",
        *(f"  {what}" for what in advised["no_evidence"]),
    ]


def size_lines(sizes: list[dict[str, Any]]) -> list[str]:
    """What was measured of sizes, and what follows from it."""
    if not sizes:
        return ["student size: not measured"]
    best = min(sizes, key=lambda size: size["nll"]["mean"])
    ends = {
        size["params"]: [size["nll"]["mean"] + sign * (size["nll"]["half_width"] or 0.0) for sign in (-1, 1)]
        for size in sizes
    }
    apart = all(low > ends[best["params"]][1] for params, (low, _) in ends.items() if params != best["params"])
    named = ", ".join(f"{params:,}" for params in ends)
    lines = [
        f"student size: of {named} parameters {best['params']:,} had the lowest "
        f"NLL, and its interval {'is apart from' if apart else 'overlaps with'} the others'"
    ]
    for size in sizes:
        parts = [f"  {size['params']:,}: NLL {size['nll']['mean']:.3f} ({size['nll']['count']} runs)"]
        if size["against_text_alone"] is not None:
            parts.append(f"{percent_text(size['against_text_alone'])} against the text alone")
        if size["smaller_teacher"] is not None:
            own, smaller = ("—" if params is None else f"{params:,.0f}" for params in size["teachers"])
            parts.append(
                f"{percent_text(size['smaller_teacher'])} with a teacher of {smaller} in place of {own} parameters"
            )
        lines.append(", ".join(parts))
    return lines


def measured_text(setting: dict[str, Any] | None) -> str:
    """A setting of the evidence with its figures."""
    if setting is None:
        return "not measured"
    size = setting["bytes_per_token"]
    return f"{setting['name']}, {gap_text(setting)}" + ("" if size is None else f", {size:.1f} bytes a token")


def gap_text(setting: dict[str, Any]) -> str:
    """Mean and interval of a setting, in percent, and how many runs it is from."""
    gap = setting["nll_against_online"]
    return f"{percent_text(gap)} ({gap['count']} runs)"


def percent_text(gap: dict[str, Any]) -> str:
    """Mean and interval of a difference, in percent."""
    return f"{gap['mean']:+.2%}" + ("" if gap["half_width"] is None else f" ± {gap['half_width']:.2%}")


def settings_text(keep: dict[str, Any]) -> str:
    """What is kept, as settings of `kdata capture`, without those that are seldom changed and were not."""
    seldom = {name: KeepConfig.model_fields[name].default for name in ("tau", "draw_method", "min_k")}
    return ", ".join(f"{name}={value}" for name, value in keep.items() if seldom.get(name) != value)


def set_up_text(set_up: dict[str, Any]) -> str:
    """Teacher, student and steps of the runs; a dash where they are not known."""
    student = set_up.get("student") or {}
    counts = {name: number(set_up.get(name), ",") for name in ("teacher_params", "vocab_size", "steps", "batch_tokens")}
    return (
        f"teacher {set_up.get('teacher', '—')} ({counts['teacher_params']} parameters, {counts['vocab_size']} ids), student "
        f"{student.get('model') or student.get('kind', '—')}, {counts['steps']} steps of {counts['batch_tokens']} tokens"
    )
