"""The command line: `python -m pipelines.evidence run --out DIR`, then `report`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from pipelines.builtin import BuiltinConfig, ensure_corpus, ensure_teacher
from pipelines.evidence.data import DataConfig, EvidenceData
from pipelines.evidence.offline import SETTINGS, Offline, OfflineConfig, runs
from pipelines.evidence.runs import load_runs, run_all
from trainer.student import CheckpointStudent

SHARED = Path(__file__).parents[3] / "shared"  # a teacher and a corpus beside the project, where somebody put them

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Option(help="Folder of data, runs and report.")]


@app.command()
def run(
    out: Out,
    teacher: Annotated[str | None, typer.Option(help="Folder of a model; default: shared/, else the built-in.")] = None,
    corpus: Annotated[str | None, typer.Option(help="Parquet file with id, domain, text; default as teacher.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each setting.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each student.")] = 300,
    batch_tokens: Annotated[int, typer.Option(min=2, help="Cells of a step.")] = 2048,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    student: Annotated[str | None, typer.Option(help="A trained student to go on from; default: from scratch.")] = None,
    minutes: Annotated[float, typer.Option(help="Begin no run after so many minutes.")] = 1e9,
    threads: Annotated[int, typer.Option(min=1, help="Threads of this process.")] = 1,
) -> None:
    """Train and measure what is not done yet. Several such processes on the same folder share the work."""
    torch.set_num_threads(threads)
    ends = time.monotonic() + 60 * minutes
    teacher, corpus = _sources(out, teacher, corpus)
    config = OfflineConfig(
        data=DataConfig(teacher=teacher, corpus=corpus),
        steps=steps,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        warmup_steps=steps // 10,
    )
    if student is not None:
        config = config.model_copy(update={"student": CheckpointStudent(path=student)})
    offline = Offline(config, EvidenceData(config.data, out / "data"))

    def measure(name: str, seed: int) -> dict[str, float | None]:
        found = offline.measure(name, seed)
        typer.echo(f"{name}, seed {seed}: nll {found['nll']:.4f}, kl {found['kl']:.4f}")
        return found

    run_all(out / "runs", runs(seeds), measure, config.identity(), keep_going=lambda: time.monotonic() < ends)


@app.command()
def report(out: Out) -> None:
    """Write results.json, table.md and evidence.png of the runs that are there."""
    from pipelines.evidence.figures import write_report

    typer.echo(write_report(out, load_runs(out / "runs", [s.name for s in SETTINGS])))


def _sources(out: Path, teacher: str | None, corpus: str | None) -> tuple[str, str]:
    """Teacher and corpus: as named, from the folder beside the project, or the built-in ones."""
    beside = SHARED / "models" / "teacher-10m", SHARED / "data" / "corpus.parquet"
    if all(path.exists() for path in beside):
        return teacher or str(beside[0]), corpus or str(beside[1])
    cache, config = out / "builtin", BuiltinConfig()
    return teacher or str(ensure_teacher(cache, config)), corpus or str(ensure_corpus(cache, config).corpus)


if __name__ == "__main__":
    app()
