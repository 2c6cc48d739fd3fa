"""Commands that make datasets: capture, generate, reread, combine, retokenize, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field

import kdata
from kdata.config import parse_config, read_yaml
from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.errors import ConfigError, nearest
from kdata.format.keep import KeepConfig
from kdata.jobs.combine import CombineConfig
from kdata.jobs.combine import combine as combine_datasets
from kdata.jobs.job import run_job
from kdata.jobs.reading import CaptureConfig, CaptureJob
from kdata.jobs.reread import keep_like, reread_with, work_on
from kdata.jobs.retokenize import RetokenizeConfig
from kdata.jobs.retokenize import retokenize as retokenize_dataset
from kdata.jobs.soften import SoftenConfig
from kdata.jobs.soften import soften as soften_dataset
from kdata.jobs.writing import GenerateConfig, GenerateJob
from kdata.pipelines.cli.common import (
    BackendOption,
    DatasetArgument,
    NewDatasetArgument,
    NewFolderArgument,
    Resume,
    ResumeOption,
    SetOption,
    StrictOption,
    TeacherOption,
    local_folder,
    option,
    say,
    say_rejected,
    say_rows,
    teacher_config,
    with_settings,
)
from kdata.pipelines.engine import LocalConfig, is_here, open_engine
from kdata.pipelines.ray.workers import RayConfig
from kdata.share.interchange.importer import ImportConfig, import_dataset
from kdata.store.url import is_url
from kdata.teachers.config import SamplingConfig, TeacherConfig

ENGINES: dict[str, type[LocalConfig] | type[RayConfig]] = {"local": LocalConfig, "ray": RayConfig}


class PromptsConfig(CorpusConfig):
    """Where prompts come from."""

    text_column: str | None = Field(
        "prompt", description="Column with the prompt; null where a messages_column is given."
    )


class GenerateSettings(GenerateConfig):
    """What `kdata generate` takes."""

    prompts: PromptsConfig


EngineOption = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(ENGINES),
        help="Where the teacher works: in this process, or on a Ray cluster (--set engine.KEY=VALUE). [default: local]",
    ),
]
AS_DATASET = "as in DATASET"
KindOption = Annotated[str | None, option("kind", KeepConfig)]
KOption = Annotated[int | None, option("k", KeepConfig)]
NumDrawsOption = Annotated[int | None, option("num_draws", KeepConfig)]
ThresholdOption = Annotated[float | None, option("threshold", KeepConfig)]
MessagesOption = Annotated[str | None, option("messages_column", CorpusConfig, metavar="COLUMN")]


def capture(
    dataset: NewDatasetArgument,
    teacher: TeacherOption,
    corpus: Annotated[str, option("path", CorpusConfig, flag="--corpus", metavar="PLACE")],
    messages_column: MessagesOption = None,
    targets: Annotated[str | None, option("targets", CaptureConfig)] = None,
    backend: BackendOption = None,
    engine: EngineOption = None,
    kind: KindOption = None,
    k: KOption = None,
    num_draws: NumDrawsOption = None,
    threshold: ThresholdOption = None,
    max_tokens: Annotated[int | None, option("max_tokens", CaptureConfig)] = None,
    long_text: Annotated[str | None, option("long_text", CaptureConfig)] = None,
    strict: StrictOption = None,
    resume: ResumeOption = Resume.auto,
    set: SetOption = None,
) -> None:
    """Have a teacher read text; keep its distributions.

    A corpus has the columns id, domain and text; other names go into --set corpus.KEY=COLUMN. The same command continues
    after an interruption.

    \b
    Examples:
      kdata capture my-dataset --teacher MODEL --corpus texts.parquet
      kdata capture my-topk --teacher MODEL --corpus texts --kind topk --k 64
    """
    options = without_none(
        strict=strict, targets=targets, kind=kind, k=k, num_draws=num_draws, threshold=threshold, max_tokens=max_tokens,
        long_text=long_text,
    )  # fmt: skip
    source = without_none(path=corpus, messages_column=messages_column)
    place = folder_or_url(dataset)
    job, who, where = capture_job(teacher, source, options, backend, engine, set)
    with open_engine(where, who, max_k=job.keep.k, work=job.work(who, look=is_here(where))) as opened:
        say_rows(run_job(place, job, opened, resume=resume.value))
    say_rejected([dataset], [job.name])


def capture_job(
    teacher: str,
    source: dict[str, Any],
    options: dict[str, Any],
    backend: str | None,
    engine: str | None,
    set: list[str] | None,
) -> tuple[CaptureJob, TeacherConfig, LocalConfig | RayConfig]:
    """What `kdata capture` does, with whom and where; `source` are options of the corpus. Raises ConfigError."""
    values = with_settings({"corpus": source, **options}, set)
    who, where = teacher_config(values, teacher, backend), engine_config(values, engine)
    config = parse_config(CaptureConfig, values, "capture settings")
    return CaptureJob(config, Corpus(config.corpus)), who, where


def generate(
    dataset: NewDatasetArgument,
    teacher: TeacherOption,
    prompts: Annotated[str, option("path", PromptsConfig, flag="--prompts", metavar="PLACE")],
    text_column: Annotated[str | None, option("text_column", PromptsConfig, metavar="COLUMN")] = None,
    messages_column: MessagesOption = None,
    backend: BackendOption = None,
    engine: EngineOption = None,
    kind: KindOption = None,
    k: KOption = None,
    num_draws: NumDrawsOption = None,
    threshold: ThresholdOption = None,
    max_tokens: Annotated[int | None, option("max_tokens", SamplingConfig)] = None,
    json_schema: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="File with the JSON Schema that every text follows (backend vllm, vllm-server)."
        ),
    ] = None,
    strict: StrictOption = None,
    resume: ResumeOption = Resume.auto,
    set: SetOption = None,
) -> None:
    """Have a teacher write text; keep its distributions.

    Prompts have the columns id, domain and prompt. What the teacher believes is recorded at temperature 1, whatever the
    sampling settings (--set sampling.KEY=VALUE).
    """
    source = without_none(path=prompts, text_column=text_column, messages_column=messages_column)
    options = {
        "sampling": sampling_options(max_tokens, json_schema),
        **without_none(kind=kind, k=k, num_draws=num_draws, threshold=threshold, strict=strict),
    }
    place = folder_or_url(dataset)
    job, who, where = generate_job(teacher, source, options, backend, engine, set)
    with open_engine(where, who, max_k=job.keep.k, work=job.work(who, look=is_here(where))) as opened:
        say_rows(run_job(place, job, opened, resume=resume.value))
    say_rejected([dataset], [job.name])


def sampling_options(max_tokens: int | None, json_schema: str | None) -> dict[str, Any]:
    """The options of `kdata generate` that are settings of sampling. Raises as `read_yaml`."""
    schema = None if json_schema is None else {"json_schema": read_yaml(Path(json_schema))}
    return without_none(max_tokens=max_tokens, structured_output=schema)


def generate_job(
    teacher: str,
    source: dict[str, Any],
    options: dict[str, Any],
    backend: str | None,
    engine: str | None,
    set: list[str] | None,
) -> tuple[GenerateJob, TeacherConfig, LocalConfig | RayConfig]:
    """What `kdata generate` does, with whom and where; `source` are options of the prompts. Raises ConfigError."""
    values = with_settings({"prompts": source, **options}, set)
    who, where = teacher_config(values, teacher, backend), engine_config(values, engine)
    config = parse_config(GenerateSettings, values, "generate settings")
    return GenerateJob(config, Corpus(config.prompts)), who, where


def reread(
    dataset: DatasetArgument,
    target: Annotated[str, typer.Argument(metavar="OUT", help="Dataset to write: a folder or a URL.")],
    teacher: TeacherOption,
    backend: BackendOption = None,
    engine: EngineOption = None,
    kind: Annotated[str | None, option("kind", KeepConfig, default=AS_DATASET)] = None,
    k: Annotated[int | None, option("k", KeepConfig, default=AS_DATASET)] = None,
    num_draws: Annotated[int | None, option("num_draws", KeepConfig, default=AS_DATASET)] = None,
    threshold: Annotated[float | None, option("threshold", KeepConfig, default=AS_DATASET)] = None,
    strict: StrictOption = None,
    resume: ResumeOption = Resume.auto,
    set: SetOption = None,
) -> None:
    """Have a second teacher read the rows of a dataset.

    Ids, tokens and targets stay the same. What is kept is as in DATASET, unless an option says otherwise.
    """
    values = with_settings(without_none(kind=kind, k=k, num_draws=num_draws, threshold=threshold, strict=strict), set)
    who, where = teacher_config(values, teacher, backend), engine_config(values, engine)
    place, opened = folder_or_url(target), kdata.open(dataset)
    with open_engine(where, who, max_k=keep_like(opened, None, values).k, work=work_on(opened)) as at_work:
        say_rows(reread_with(place, at_work, opened, values, resume=resume.value))
    say_rejected([target], list(opened.info.sources))


def combine(
    datasets: Annotated[
        list[str],
        typer.Argument(metavar="DATASET", help="Two or more datasets with the same rows, one for each teacher."),
    ],
    target: NewFolderArgument,
    weights: Annotated[str | None, option("weights", CombineConfig, metavar="W,W,...|DATASET")] = None,
    by_domain: Annotated[
        list[str] | None, option("by_domain", CombineConfig, metavar="DOMAIN=W,W,...|DOMAIN=DATASET")
    ] = None,
    resume: ResumeOption = Resume.auto,
    set: SetOption = None,
) -> None:
    """Combine the distributions of several teachers.

    Either their weighted average, or one teacher for each domain. The name of a dataset in place of weights takes that
    dataset alone. --by-domain may be repeated.
    """
    values: dict[str, Any] = {} if weights is None else {"weights": shares_of(weights, datasets)}
    for item in by_domain or []:
        domain, equals, text = item.partition("=")
        if not equals or not domain:
            raise ConfigError(f"--by-domain {item!r}: write it as DOMAIN=0.7,0.3 or DOMAIN=DATASET")
        values.setdefault("by_domain", {})[domain] = shares_of(text, datasets)
    config = parse_config(CombineConfig, with_settings(values, set), "combine settings")
    root = local_folder(target)
    result, report = combine_datasets(root, [kdata.open(name) for name in datasets], config, resume=resume.value)
    say_rows(result)
    say(*(f"  {line}" for line in report.lines()))


def retokenize(
    dataset: DatasetArgument,
    target: NewFolderArgument,
    tokenizer: Annotated[str, option("tokenizer", RetokenizeConfig, metavar="MODEL")],
    map: Annotated[str | None, option("map", RetokenizeConfig)] = None,
    resume: ResumeOption = Resume.auto,
    set: SetOption = None,
) -> None:
    """Turn a dataset into one for another tokenizer.

    No teacher is needed. The same texts are cut anew, and what is stored is
    aligned by bytes. Rows that do not align are refused, counted and named.
    """
    values = with_settings(without_none(tokenizer=tokenizer, map=map), set)
    config = parse_config(RetokenizeConfig, values, "retokenize settings")
    result, report = retokenize_dataset(local_folder(target), kdata.open(dataset), config, resume=resume.value)
    say_rows(result)
    say(*(f"  {line}" for line in report.lines()))
    if report.kept < report.targets:
        say("  train with objective.cross_entropy_elsewhere=1, so that the others count too")
    say_rejected([target], list(result.info.sources))


def soften(
    dataset: DatasetArgument,
    target: NewFolderArgument,
    pattern: Annotated[
        list[str] | None,
        typer.Option("--pattern", metavar="REGEX", help="Regular expression (RE2) of private text. May be repeated."),
    ] = None,
    plan: Annotated[str | None, option("plan", SoftenConfig, metavar="PLAN")] = None,
    likelihood: Annotated[float | None, option("likelihood", SoftenConfig)] = None,
    drop_above: Annotated[float | None, option("drop_above", SoftenConfig)] = None,
    resume: ResumeOption = Resume.auto,
    set: SetOption = None,
) -> None:
    """Soften what is stored where the text may be private.

    For a dataset to publish. The rows stay; at private positions distributions
    get a higher temperature and noise, or are dropped. No formal guarantee.
    """
    values = without_none(patterns=pattern, plan=plan, likelihood=likelihood, drop_above=drop_above)
    config = parse_config(SoftenConfig, with_settings(values, set), "soften settings")
    result, report = soften_dataset(local_folder(target), kdata.open(dataset), config, resume=resume.value)
    say_rows(result)
    say(*(f"  {line}" for line in report.lines()))
    say_rejected([target], list(result.info.sources))


def shares_of(text: str, datasets: list[str]) -> list[float]:
    """Numbers as they are; or 1 for the dataset that is named, by its address or its last part, and 0 for the others."""
    names = datasets if text in datasets else [name.rstrip("/").rpartition("/")[2] for name in datasets]
    if names.count(text) == 1:
        return [float(name == text) for name in names]
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        listing = ", ".join(datasets)
        raise ConfigError(f"{text!r} is neither weights (0.7,0.3) nor one of the datasets {listing}") from error


def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILES",
            help="File or folder of another tool's Parquet or JSON lines (vllm: JSON, megatron: tar), hf://OWNER/NAME, or "
            "a URL.",
        ),
    ],
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Folder of the dataset to write.")],
    format: Annotated[str, option("format", ImportConfig)],
    tokenizer: Annotated[str | None, option("tokenizer", ImportConfig, metavar="PLACE")] = None,
    vocab_size: Annotated[int | None, option("vocab_size", ImportConfig)] = None,
    aligned: Annotated[str | None, option("aligned", ImportConfig)] = None,
    values: Annotated[str | None, option("values", ImportConfig)] = None,
    over_one: Annotated[str | None, option("over_one", ImportConfig)] = None,
    strict: StrictOption = None,
    resume: ResumeOption = Resume.auto,
    set: SetOption = None,
) -> None:
    """Import another tool's logit dataset.

    Nothing is recomputed: what the files lack stays unknown, and what is wrong with them is counted and printed.
    """
    settings = with_settings(
        without_none(
            format=format,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            aligned=aligned,
            values=values,
            over_one=over_one,
            strict=strict,
        ),
        set,
    )
    config = parse_config(ImportConfig, settings, "import settings")
    root = local_folder(dataset)
    result, report = import_dataset(source, root, config, resume=resume.value)
    say(f"{result.path}: imported from {config.format}")
    say(*(f"  {line}" for line in report.lines(config.over_one)))
    say_rejected([dataset], [config.name])


def without_none(**options: Any) -> dict[str, Any]:
    """Those options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def engine_config(values: dict[str, Any], kind: str | None) -> LocalConfig | RayConfig:
    """Take the `engine` part out of a command's settings and validate it. Raises ConfigError."""
    own = values.pop("engine", {})
    if not isinstance(own, dict):
        raise ConfigError("engine must be a mapping; write for instance --engine ray --set engine.min_teachers=8")
    name = kind or own.get("kind", "local")
    if name not in ENGINES:
        raise ConfigError(f"--engine {name}: there is no such engine{nearest(name, list(ENGINES))}; use local or ray")
    return parse_config(ENGINES[name], own, "engine settings")


def folder_or_url(dataset: str) -> Path | str:
    """Where a teacher's work is written. Raises ConfigError for hf://."""
    return dataset if is_url(dataset) else local_folder(dataset)
