"""The command line: `python -m kdata.pipelines.evidence run QUESTION --out DIR`, then `report QUESTION --out DIR`."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

from kdata.pipelines.builtin.builtin import builtin_reference, builtin_teacher, ensure_corpus
from kdata.pipelines.evidence import offline, selection
from kdata.pipelines.evidence.data import DataConfig, EvidenceData
from kdata.pipelines.evidence.runs import Figures, load_runs, run_all
from kdata.trainer.student import CheckpointStudent, ScratchStudent

SHARED = (
    Path(__file__).parents[3] / "shared"
)  # teacher, reference and corpus beside the project, where somebody put them
LARGE = {
    "student": ScratchStudent(hidden_size=512, num_layers=8, num_heads=8),
    "steps": 2000,
    "batch_tokens": 65_536,
    "learning_rate": 1e-3,
    "train_tokens": 270_000_000,
    "period_steps": 100,
}


class Question(StrEnum):
    """What can be asked."""

    offline = "offline"
    selection = "selection"
    mixture = "mixture"


class Size(StrEnum):
    """How large the answer is: small for two cores, large for a GPU and a teacher and corpus of your own."""

    small = "small"
    large = "large"


@dataclass(frozen=True)
class Asked:
    """A question that can be measured: its runs in order, what they share, and how one is done."""

    runs: list[tuple[str, int]]
    identity: dict[str, Any]
    measure: Callable[[str, int], Figures]
    told: Callable[[str], dict[str, Any]] = lambda setting: {}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Which = Annotated[Question, typer.Argument(help="What is asked.")]
Out = Annotated[Path, typer.Option(help="Folder of data, runs and report; one for each question.")]


@app.command()
def run(
    question: Which,
    out: Out,
    teacher: Annotated[str | None, typer.Option(help="Folder of a model; default: shared/, else the built-in.")] = None,
    reference: Annotated[str | None, typer.Option(help="Folder of a smaller one; default as teacher.")] = None,
    corpus: Annotated[str | None, typer.Option(help="Parquet file with id, domain, text; default as teacher.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each setting.")] = 3,
    size: Annotated[Size, typer.Option(help="small: two cores. large: a GPU (selection, mixture).")] = Size.small,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default: the question's own.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=2, help="Cells of a step; default as steps.")] = None,
    train_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of text; default as steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate; default as steps.")] = None,
    student: Annotated[str | None, typer.Option(help="A trained student to go on from; default: from scratch.")] = None,
    only: Annotated[str | None, typer.Option(help="Settings whose name contains this; default: all.")] = None,
    minutes: Annotated[float, typer.Option(help="Begin no run after so many minutes.")] = 1e9,
    threads: Annotated[int, typer.Option(min=1, help="Threads of this process.")] = 1,
) -> None:
    """Train and measure what is not done yet. Several such processes on the same folder share the work."""
    torch.set_num_threads(threads)
    ends = time.monotonic() + 60 * minutes
    given = {
        "steps": steps, "batch_tokens": batch_tokens, "train_tokens": train_tokens, "learning_rate": learning_rate,
        "student": None if student is None else CheckpointStudent(path=student),
    }  # fmt: skip
    if size is Size.large and question is Question.offline:
        raise typer.BadParameter(
            "the question offline has one size: its reference, full distillation, is written for CPUs"
        )
    sources = _sources(out, {"teacher": teacher, "reference": reference, "corpus": corpus})
    chosen = {**(LARGE if size is Size.large else {}), **sources, **{n: v for n, v in given.items() if v is not None}}
    if (changed := chosen.get("steps")) is not None:
        chosen["warmup_steps"] = changed // 10
    asked = _offline(chosen, out, seeds) if question is Question.offline else _choice(question, chosen, out, seeds)

    def measure(name: str, seed: int) -> Figures:
        found = asked.measure(name, seed)
        typer.echo(f"{name}, seed {seed}: nll {found['nll']:.4f}, kl {found['kl']:.4f}")
        return found

    wanted = [(name, seed) for name, seed in asked.runs if only is None or only in name]
    run_all(out / "runs", wanted, measure, asked.identity, told=asked.told, keep_going=lambda: time.monotonic() < ends)


@app.command()
def report(question: Which, out: Out) -> None:
    """Write results.json, table.md and evidence.png of the runs that are there."""
    from kdata.pipelines.evidence import figures, selection_figures

    if question is Question.offline:
        typer.echo(figures.write_report(out, load_runs(out / "runs", [s.name for s in offline.SETTINGS])))
        return
    choice = _name(question)
    keys = [selection.key_of(s) for s in selection.SETTINGS[choice]]
    typer.echo(selection_figures.write_report(choice, out, load_runs(out / "runs", keys)))


def _offline(chosen: dict[str, Any], out: Path, seeds: int) -> Asked:
    data = {name: chosen.pop(name) for name in ("teacher", "corpus", "train_tokens") if name in chosen}
    chosen.pop("reference", None)
    config = offline.OfflineConfig(data=DataConfig(**data), **chosen)
    asked = offline.Offline(config, EvidenceData(config.data, out / "data"))
    return Asked(offline.runs(seeds), config.identity(), asked.measure, offline.told)


def _choice(question: Question, chosen: dict[str, Any], out: Path, seeds: int) -> Asked:
    backend = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    config = selection.SelectionConfig(backend=backend, **chosen)
    asked = selection.Selection(config, _name(question), out / "data")
    return Asked(selection.runs(_name(question), seeds), config.identity(), asked.measure)


def _name(question: Question) -> selection.Question:
    return cast(selection.Question, question.value)


def _sources(out: Path, given: dict[str, str | None]) -> dict[str, Any]:
    """Teacher, reference and corpus: as named, from the folder beside the project, or the built-in ones, of which there is
    less text."""
    beside = {
        "teacher": SHARED / "models" / "teacher-10m",
        "reference": SHARED / "models" / "ref-1m",
        "corpus": SHARED / "data" / "corpus.parquet",
    }
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) == len(given):
        return named
    if all(path.exists() for path in beside.values()):
        return {**{name: str(path) for name, path in beside.items()}, **named}
    shipped = {
        "teacher": str(builtin_teacher()),
        "reference": str(builtin_reference()),
        "corpus": str(ensure_corpus(out / "builtin").corpus),
    }
    return {"train_tokens": 300_000, "steps": 40, **shipped, **named}


if __name__ == "__main__":
    app()
