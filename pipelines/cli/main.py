"""The command `kdata`: the dataset's commands of `kdata/cli.py`, a teacher's, and run, train and evaluate beside them."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import kdata.pipelines.cli.datasets
import kdata.pipelines.cli.plans  # registers score, select, plan
import kdata.pipelines.cli.teachers  # noqa: F401  registers generate, capture, reread
from kdata.config import parse_config, read_yaml
from kdata.errors import KdataError, MissingError
from kdata.format.files import write_atomically
from kdata.observe.text import number
from kdata.pipelines.cli.app import Resume, ResumeOption, SetOption, _with_settings, app, out


@app.command()
def run(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe kdata brings.")
    ],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Run folder; runs/NAME if not given.")] = None,
    set: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
    resume: ResumeOption = Resume.auto,
) -> None:
    """Go the whole way: generate, capture, score, select, train, evaluate, report."""
    from kdata.pipelines.recipe import load_recipe

    resolved = load_recipe(recipe, set or [])
    folder = out_dir or Path("runs") / resolved.name
    if dry_run:
        out.print(f"# would run into {folder}", highlight=False)
        print(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False), end="")
        return
    from kdata.pipelines.runner import execute

    report = execute(resolved, folder, resume=resume.value)
    results = json.loads((folder / "results.json").read_text())
    out.print(students_table(results))
    out.print(f"report: {report}", highlight=False, soft_wrap=True)


def students_table(results: dict[str, Any]) -> Table:
    """One row per student: held-out NLL per domain and overall, KL to the teacher, top-1 agreement."""
    students = list(results["students"].values())
    domains = list(students[0]["domains"])
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Held-out text: NLL per domain and in all, KL to the teacher, top-1 agreement",
        caption="NLL and KL in nats per token: lower is better",
    )
    table.add_column("student", no_wrap=True)
    for column in (*domains, "all", "KL", "top-1"):
        table.add_column(column, justify="right", no_wrap=True)
    for student in students:
        overall = student["overall"]
        table.add_row(
            student["label"],
            *(f"{student['domains'][d]['nll']:.3f}" for d in domains),
            f"[bold]{overall['nll']:.3f}",
            f"{overall['kl']:.3f}",
            f"{overall['top1']:.1%}",
        )
    floor = [f"{students[0]['domains'][d]['teacher_nll']:.3f}" for d in domains]
    table.add_section()
    table.add_row("[dim]the teacher itself", *floor, f"{students[0]['overall']['teacher_nll']:.3f}", "", "")
    return table


# Lines of the table of one student: heading and format, by the figure's name.
FIGURES = {
    "nll": ("NLL", ".3f"), "teacher_nll": ("  of the teacher", ".3f"), "ppl": ("perplexity", ",.1f"),
    "kl": ("KL(teacher || student)", ".3f"), "reverse_kl": ("reverse KL", ".3f"), "tv": ("total variation", ".3f"),
    "top1": ("top-1 agreement", ".1%"), "top5": ("top-5 agreement", ".1%"), "ece": ("calibration error", ".2%"),
    "teacher_ece": ("  of the teacher", ".2%"), "tokens": ("tokens", ",d"),
}  # fmt: skip


def evaluation_table(measured: dict[str, Any], label: str) -> Table:
    """Every figure of one student, by domain and overall."""
    caption = f"nats per token; KL is {measured['kl_is']}"
    if measured["bounds_are"]:
        caption += f"; reverse KL and total variation are {measured['bounds_are']}"
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{label} on held-out text", title_justify="left", caption=caption,
        caption_justify="left", padding=(0, 0, 0, 1),
    )  # fmt: skip
    scopes = {**measured["domains"], "all": measured["overall"]}
    for column in ("", *scopes):
        table.add_column(Text(column), justify="right" if column else "left")
    for name, (heading, form) in FIGURES.items():
        table.add_row(heading, *(number(figures[name], form) for figures in scopes.values()))
    return table


@app.command()
def train(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Logit dataset.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for checkpoints, metrics and the model.")],
    plan: Annotated[Path | None, typer.Option(help="Plan file, or the name of one in the dataset.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    file: Annotated[
        Path | None, typer.Option("--config", help="YAML file of settings; --steps and --set go on top.")
    ] = None,
    set: SetOption = None,
) -> None:
    """Train a student from a dataset and a plan; the teacher is not needed."""
    from kdata.trainer.config import TrainConfig
    from kdata.trainer.train import train as work

    given = {} if file is None else read_yaml(file)
    values = _with_settings(given if steps is None else {**given, "steps": steps}, set)
    config = parse_config(TrainConfig, values, "train settings" if file is None else str(file))
    if plan is not None and len(plan.parts) == 1 and not plan.exists():
        plan = dataset / "plans" / plan
    work(config, dataset, plan, out_dir)
    out.print(f"student: {out_dir / 'model'}", highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a trained student.")],
    heldout: Annotated[Path, typer.Argument(metavar="DATASET", help="Logit dataset of held-out text.")],
    save: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    set: SetOption = None,
) -> None:
    """Measure a student against a held-out logit dataset."""
    from kdata.trainer.evaluate import EvaluateConfig
    from kdata.trainer.evaluate import evaluate as work

    if save is not None and not save.parent.is_dir():
        raise MissingError(f"--save {save}: there is no folder {save.parent}; make it first")
    measured = work(model, heldout, config=parse_config(EvaluateConfig, _with_settings({}, set), "evaluate settings"))
    out.print(evaluation_table(measured, measured["label"]))
    for task, scores in measured["tasks"].items():
        out.print(f"{task}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()), highlight=False)
    if save is not None:
        write_atomically(save, json.dumps(measured, indent=2).encode() + b"\n")


# The extra that brings a package, for commands that start without it. Most stages say so themselves.
EXTRA_OF = {
    "torch": "train",
    "transformers": "train",
    "safetensors": "train",
    "matplotlib": "report",
    "polars": "polars",
}


def main() -> None:
    """Entry point: one clear line and exit status 1 for what kdata refuses, a traceback only with --debug."""
    # vLLM and torch talk to stderr while they load; what matters of it reaches the user as an error of ours.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    errors = Console(stderr=True)
    try:
        app()
    except KdataError as error:
        if "--debug" in sys.argv:
            raise
        errors.print("[bold red]error:[/] ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if "--debug" in sys.argv or package not in EXTRA_OF:
            raise
        errors.print("[bold red]error:[/] ", end="")
        message = f"this command needs {package}, which is not installed: pip install 'kdata[{EXTRA_OF[package]}]'"
        errors.print(message, markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("stopped; the same command goes on where it was", highlight=False)
        sys.exit(130)
