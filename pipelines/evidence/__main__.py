"""The command line: `python -m kdata.pipelines.evidence run QUESTION --out DIR`, then `report QUESTION --out DIR`."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

from kdata.pipelines.builtin.builtin import builtin_reference, builtin_teacher, ensure_corpus
from kdata.pipelines.evidence import capacity, offline, positions, raw_question, selection, tokenizers
from kdata.pipelines.evidence.data import DataConfig, EvidenceData
from kdata.pipelines.evidence.raw import SHARES
from kdata.pipelines.evidence.runs import Figures, load_runs, run_all
from kdata.trainer.config import CheckpointStudent, ScratchStudent

SHARED = (
    Path(__file__).parents[3] / "shared"
)  # a folder beside the project with teacher, reference and corpus; optional
LARGE = {
    "student": ScratchStudent(hidden_size=512, num_layers=8, num_heads=8),
    "steps": 2000,
    "batch_tokens": 65_536,
    "learning_rate": 1e-3,
    "train_tokens": 270_000_000,
    "period_steps": 100,
}
# A language model of 270M parameters reads some 350 tokens/s of one core's time in bfloat16, and is ruined without its <bos>.
LLM = {
    "train_tokens": 100_000,
    "clean_times": 6,
    "heldout_tokens": 12_000,
    "validation_tokens": 600,
    "steps": 200,
    "bos": "add",
    "dtype": "bfloat16",
}


class Question(StrEnum):
    """The questions."""

    offline = "offline"
    positions = "positions"
    tokenizers = "tokenizers"
    selection = "selection"
    mixture = "mixture"
    raw = "raw"
    capacity = "capacity"


class Bos(StrEnum):
    """What `teacher.bos` can be."""

    add = "add"
    omit = "omit"


class Precision(StrEnum):
    """Of a student's matrix products."""

    fp32 = "fp32"
    bf16 = "bf16"


class Size(StrEnum):
    """Size of the runs: small for two cores, large for a GPU with a teacher and a corpus of your own.

    llm: two cores and a language model as teacher, whose students have the tokenizer of the reference.
    """

    small = "small"
    large = "large"
    llm = "llm"


@dataclass(frozen=True)
class Comparison:
    """The runs of a question in order, the settings that they share, and how one is measured; see `run_all`."""

    runs: list[tuple[str, int]]
    identity: dict[str, Any]
    measure: Callable[[str, int], Figures]
    describe: Callable[[str], dict[str, Any]] = lambda setting: {}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Which = Annotated[Question, typer.Argument(help="The question.")]
Out = Annotated[Path, typer.Option(help="Folder of data, runs and report; use one for each question.")]


@app.command()
def run(
    question: Which,
    out: Out,
    teacher: Annotated[
        str | None, typer.Option(help="Model folder; default: shared/, else the built-in teacher.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Folder of a smaller model; default: like teacher.")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Parquet file with id, domain, text; default: like teacher.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds of each setting.")] = 3,
    size: Annotated[
        Size, typer.Option(help="small: two cores. large: a GPU (selection, mixture). llm: a language model (raw).")
    ] = Size.small,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default: depends on the question.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=2, help="Token positions of a step; default: like steps.")
    ] = None,
    train_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of training text; default: like steps.")
    ] = None,
    heldout_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of text to measure on; default: like steps.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate; default: like steps.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="fp32 or bf16, of the student; default: fp32.")] = None,
    bos: Annotated[
        Bos | None, typer.Option(help="As teacher.bos (offline, positions, tokenizers): add or omit.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="Trained student to start from; default: random weights.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only the setting of this name, or all with it in theirs; repeatable.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Start no run after this many minutes.")] = 1e9,
    threads: Annotated[int, typer.Option(min=1, help="Number of threads of this process.")] = 1,
) -> None:
    """Train and measure the runs that are missing. Several such processes on the same folder share the work."""
    torch.set_num_threads(threads)
    ends = time.monotonic() + 60 * minutes
    options = {
        "steps": steps, "batch_tokens": batch_tokens, "train_tokens": train_tokens, "heldout_tokens": heldout_tokens,
        "learning_rate": learning_rate, "precision": precision, "bos": bos,
        "student": None if student is None else CheckpointStudent(model=student),
    }  # fmt: skip
    of_targets = question in (Question.offline, Question.positions, Question.tokenizers)
    if size is Size.large and of_targets:
        raise typer.BadParameter(
            f"the question {question.value} has the size small only: its reference, full distillation, is written for CPUs"
        )
    if bos is not None and not of_targets:
        raise typer.BadParameter(
            f"the question {question.value} takes no --bos: it reads the text as the tokenizer says"
        )
    if size is Size.large and question is Question.capacity:
        raise typer.BadParameter("the question capacity has the size small only: its students are small")
    if size is Size.large and question is Question.raw:
        raise typer.BadParameter("the question raw has the size small only: its corpus is made in memory")
    if size is Size.llm and (question is not Question.raw or teacher is None):
        raise typer.BadParameter("the size llm is of the question raw alone, and needs --teacher: the language model")
    sources = _sources(out, {"teacher": teacher, "reference": reference, "corpus": corpus})
    sized = {Size.small: {}, Size.large: LARGE, Size.llm: {**LLM, "tokenizer": sources["reference"]}}[size]
    chosen = {**sized, **sources, **{n: v for n, v in options.items() if v is not None}}
    if (changed := chosen.get("steps")) is not None:
        chosen["warmup_steps"] = changed // 10
    others: dict[Question, Callable[..., Comparison]] = {Question.raw: _raw, Question.capacity: _capacity}
    comparison = (_targets if of_targets else others.get(question, _choice))(question, chosen, out, seeds)

    def measure(name: str, seed: int) -> Figures:
        figures = comparison.measure(name, seed)
        typer.echo(f"{name}, seed {seed}: nll {figures['nll']:.4f}, kl {figures['kl']:.4f}")
        return figures

    names = {name for name, _ in comparison.runs}
    wanted = [
        (name, seed)
        for name, seed in comparison.runs
        if not only or any(name == part if part in names else part in name for part in only)
    ]
    run_all(
        out / "runs",
        wanted,
        measure,
        comparison.identity,
        describe=comparison.describe,
        keep_going=lambda: time.monotonic() < ends,
    )


@app.command()
def report(question: Which, out: Out) -> None:
    """Write results.json, table.md and evidence.png of the runs that are measured."""
    from kdata.pipelines.evidence import figures, positions_figures, raw_figures, selection_figures

    if question is Question.positions:
        settings = positions.settings("student")  # with the rule that needs one, whoever it was
        plot = partial(positions_figures.plot, settings)
        typer.echo(figures.write_report(out, load_runs(out / "runs", [s.name for s in settings]), plot))
        return
    if question is Question.tokenizers:
        keys = [s.key for s in tokenizers.SETTINGS]
        typer.echo(tokenizers.write_report(out, load_runs(out / "runs", keys)))
        return
    if question is Question.capacity:
        typer.echo(capacity.write_report(out, load_runs(out / "runs", [s.key for s in capacity.SETTINGS])))
        return
    if question is Question.offline:
        runs = load_runs(out / "runs", [s.name for s in offline.SETTINGS])
        typer.echo(figures.write_report(out, runs, describe=offline.describe))
        return
    if question is Question.raw:
        keys = [selection.key_of(s) for s in raw_question.SETTINGS]
        typer.echo(raw_figures.write_report(out, load_runs(out / "runs", keys)))
        return
    choice = _name(question)
    keys = [selection.key_of(s) for s in selection.SETTINGS[choice]]
    typer.echo(selection_figures.write_report(choice, out, load_runs(out / "runs", keys)))


def _targets(question: Question, chosen: dict[str, Any], out: Path, seeds: int) -> Comparison:
    of_data = ("teacher", "bos", "corpus", "train_tokens", "heldout_tokens")
    data = {name: chosen.pop(name) for name in of_data if name in chosen}
    chosen.pop("reference", None)
    if question is Question.tokenizers:
        own = tokenizers.TokenizersConfig(data=DataConfig(**data, context_tokens=tokenizers.CONTEXT), **chosen)
        measure = tokenizers.Tokenizers(own, EvidenceData(own.data, out / "data")).measure
        return Comparison(tokenizers.runs(seeds), own.identity(), measure)
    config = offline.OfflineConfig(data=DataConfig(**data), **chosen)
    student = config.student.model if isinstance(config.student, CheckpointStudent) else None
    settings = offline.SETTINGS if question is Question.offline else positions.settings(student)
    asked = offline.Offline(config, EvidenceData(config.data, out / "data"), settings)
    runs = offline.runs(seeds) if question is Question.offline else positions.runs(settings, seeds)
    return Comparison(runs, config.identity(), asked.measure, lambda name: offline.find(name, settings).describe())


def _capacity(question: Question, chosen: dict[str, Any], out: Path, seeds: int) -> Comparison:
    data: dict[str, Any] = {"train_tokens": 60_000, "heldout_tokens": 12_000, "context_tokens": 128}
    data |= {
        name: chosen.pop(name) for name in ("teacher", "corpus", "train_tokens", "heldout_tokens") if name in chosen
    }
    config = capacity.CapacityConfig(data=DataConfig(**data), **chosen)
    describe = cast(Callable[[str], dict[str, Any]], lambda name: capacity.find(name).describe())
    return Comparison(
        capacity.runs(seeds), config.identity(), capacity.Capacity(config, out / "data").measure, describe
    )


def _choice(question: Question, chosen: dict[str, Any], out: Path, seeds: int) -> Comparison:
    backend = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    config = selection.SelectionConfig(backend=backend, **chosen)
    choice = selection.Selection(config, _name(question), out / "data")
    return Comparison(selection.runs(_name(question), seeds), config.identity(), choice.measure)


def _raw(question: Question, chosen: dict[str, Any], out: Path, seeds: int) -> Comparison:
    tokens: int = chosen.get("train_tokens", raw_question.RawConfig.model_fields["train_tokens"].default)
    config = raw_question.RawConfig(benchmark_tokens=round(SHARES["benchmark"] * tokens), **chosen)
    asked = raw_question.Raw(config, out / "data")
    describe = cast(Callable[[str], dict[str, Any]], raw_question.describe)
    return Comparison(raw_question.runs(seeds, config.tokenizer), config.identity(), asked.measure, describe)


def _name(question: Question) -> selection.Question:
    return cast(selection.Question, question.value)


def _sources(out: Path, options: dict[str, str | None]) -> dict[str, Any]:
    """Teacher, reference and corpus: as the options say, else from the folder beside the project, else the built-in ones.

    There is less built-in text, so the built-in corpus also lowers the number of tokens and steps.
    """
    beside = {
        "teacher": SHARED / "models" / "teacher-10m",
        "reference": SHARED / "models" / "ref-1m",
        "corpus": SHARED / "data" / "corpus.parquet",
    }
    named = {name: value for name, value in options.items() if value is not None}
    if len(named) == len(options):
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
