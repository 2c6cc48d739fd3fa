"""Commands that put a teacher to work, here or on a cluster: generate, capture, reread."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdata.config import parse_config, read_yaml
from kdata.corpus.corpus import Corpus
from kdata.errors import ConfigError, nearest
from kdata.jobs.job import run_job
from kdata.pipelines.cli.app import (
    BackendOption,
    DatasetArgument,
    Resume,
    ResumeOption,
    SetOption,
    TeacherOption,
    _done,
    _local,
    _teacher,
    _with_settings,
    app,
)
from kdata.pipelines.engine import LocalConfig, open_engine
from kdata.pipelines.ray.workers import RayConfig
from kdata.store.url import is_url

KindOption = Annotated[str, typer.Option(help="What is kept: hybrid, topk, adaptive or sampled.")]
KOption = Annotated[int, typer.Option(help="Exact entries at every position (adaptive: at most so many).")]
DrawsOption = Annotated[int, typer.Option(help="Random draws at every position (hybrid, sampled).")]
MessagesOption = Annotated[
    str | None, typer.Option(help="Column with chat messages; they are rendered with the model's own chat template.")
]
EngineOption = Annotated[
    str,
    typer.Option(
        help="Where the teacher works: local, or ray (actors on a cluster; see pipelines/README.md, --set engine.KEY=VALUE)."
    ),
]
ENGINES: dict[str, type[LocalConfig] | type[RayConfig]] = {"local": LocalConfig, "ray": RayConfig}


def _source(path: str, text_column: str | None, messages_column: str | None) -> dict[str, Any]:
    """Where text comes from, with the columns that were named."""
    columns = {"text_column": text_column, "messages_column": messages_column}
    return {"path": path, **{name: column for name, column in columns.items() if column is not None}}


def _engine(values: dict[str, Any], kind: str) -> LocalConfig | RayConfig:
    """Take the `engine` part out of a stage's settings and validate it."""
    given = values.pop("engine", {})
    if not isinstance(given, dict):
        raise ConfigError("engine must be a mapping: --engine ray --set engine.min_teachers=8")
    if kind not in ENGINES:
        raise ConfigError(f"there is no engine {kind!r}{nearest(kind, list(ENGINES))}; kdata has {list(ENGINES)}")
    return parse_config(ENGINES[kind], given, "engine settings")


def _place(dataset: str) -> Path | str:
    """A dataset that is to be written: a folder, or the URL of a store."""
    return dataset if is_url(dataset) else _local(dataset)


@app.command()
def generate(
    dataset: DatasetArgument,
    teacher: TeacherOption,
    prompts: Annotated[
        str,
        typer.Option(help="Prompts, columns id, domain and a text column: file, folder, or hf://datasets/OWNER/NAME."),
    ],
    prompt_column: Annotated[str | None, typer.Option(help="Column with the prompt; `prompt` if not given.")] = None,
    messages_column: MessagesOption = None,
    backend: BackendOption = "vllm",
    engine: EngineOption = "local",
    kind: KindOption = "hybrid",
    k: KOption = 16,
    num_draws: DrawsOption = 16,
    max_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 128,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON Schema of what is written (backend vllm).")
    ] = None,
    resume: ResumeOption = Resume.auto,
    set: SetOption = None,
) -> None:
    """Have a teacher write text from prompts, keeping the distributions it wrote from."""
    from kdata.jobs.writing import GenerateConfig, GenerateJob

    sampling: dict[str, Any] = {"max_tokens": max_tokens}
    if json_schema is not None:
        sampling["structured_output"] = {"json_schema": read_yaml(json_schema)}
    source = _source(prompts, prompt_column, messages_column)
    values = _with_settings(
        {"prompts": source, "kind": kind, "k": k, "num_draws": num_draws, "sampling": sampling}, set
    )
    if "messages_column" not in values["prompts"]:
        values["prompts"].setdefault("text_column", "prompt")
    who = _teacher(values, teacher, backend)
    where = _engine(values, engine)
    config = parse_config(GenerateConfig, values, "generate settings")
    place, job = _place(dataset), GenerateJob(config, Corpus(config.prompts))
    with open_engine(where, who, max_k=config.k) as opened:
        _done(run_job(place, job, opened, resume=resume.value))


@app.command()
def capture(
    dataset: DatasetArgument,
    teacher: TeacherOption,
    corpus: Annotated[
        str, typer.Option(help="Text, columns id, domain, text: file, folder, or hf://datasets/OWNER/NAME.")
    ],
    messages_column: MessagesOption = None,
    targets: Annotated[
        str | None, typer.Option(help="Tokens of a chat that count: assistant (if not given), last_assistant or all.")
    ] = None,
    backend: BackendOption = "vllm",
    engine: EngineOption = "local",
    kind: KindOption = "hybrid",
    k: KOption = 16,
    num_draws: DrawsOption = 16,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest sequence; the teacher's context if not given.")
    ] = None,
    long_text: Annotated[
        str | None,
        typer.Option(help="A longer text: split, reject or refuse; texts are split and chats rejected if not given."),
    ] = None,
    resume: ResumeOption = Resume.auto,
    set: SetOption = None,
) -> None:
    """Have a teacher read text, keeping its top-k distribution at every position."""
    from kdata.jobs.reading import CaptureConfig, CaptureJob

    values = _with_settings(
        {
            "corpus": _source(corpus, None, messages_column),
            "kind": kind,
            "k": k,
            "num_draws": num_draws,
            "max_tokens": max_tokens,
            "long_text": long_text,
            "targets": targets,
        },
        set,
    )
    who = _teacher(values, teacher, backend)
    where = _engine(values, engine)
    config = parse_config(CaptureConfig, values, "capture settings")
    place, job = _place(dataset), CaptureJob(config, Corpus(config.corpus))
    with open_engine(where, who, max_k=config.k) as opened:
        _done(run_job(place, job, opened, resume=resume.value))


@app.command()
def reread(
    dataset: DatasetArgument,
    target: Annotated[str, typer.Argument(metavar="OUT", help="The further payload, a dataset of its own.")],
    teacher: TeacherOption,
    backend: BackendOption = "vllm",
    engine: EngineOption = "local",
    kind: Annotated[str | None, typer.Option(help="hybrid, topk, adaptive or sampled; else as the dataset.")] = None,
    k: Annotated[int | None, typer.Option(help="Exact entries at every position; else as the dataset.")] = None,
    num_draws: Annotated[int | None, typer.Option(help="Random draws at every position; else as the dataset.")] = None,
    resume: ResumeOption = Resume.auto,
    set: SetOption = None,
) -> None:
    """Have a second teacher read the rows of a dataset: same ids, tokens and targets, in a dataset beside it."""
    from kdata.jobs.reread import keep_like, reread_with
    from kdata.store.open import open_dataset

    values = _with_settings({"kind": kind, "k": k, "num_draws": num_draws}, set)
    who = _teacher(values, teacher, backend)
    where = _engine(values, engine)
    opened, place = open_dataset(dataset), _place(target)
    with open_engine(where, who, max_k=keep_like(opened, None, values).k) as at_work:
        _done(reread_with(place, at_work, opened, values, resume=resume.value))
