"""Commands that train: run (a whole recipe), train, evaluate, hacking.

What needs torch is imported inside the functions, after the arguments are checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import kdata
from kdata.config import parse_config, read_yaml
from kdata.errors import ConfigError, DataError, MissingError
from kdata.format.files import lock_of, storage_errors, write_atomically
from kdata.observe.style import check_picture
from kdata.observe.text import number
from kdata.pipelines.cli.common import (
    MAX_DOMAINS,
    WIDE,
    DatasetArgument,
    Format,
    FormatOption,
    Resume,
    ResumeOption,
    SetOption,
    StrictOption,
    local_folder,
    option,
    print_json,
    print_rows,
    say,
    say_rejected,
    with_settings,
)
from kdata.pipelines.report.audits import course_words
from kdata.pipelines.report.course import draw_course
from kdata.selection.plan import Plan, open_plan
from kdata.selection.show import EMPTY
from kdata.store.gguf import is_gguf
from kdata.store.queryable import is_name
from kdata.trainer.config import EvaluateConfig, TrainConfig
from kdata.trainer.objective_config import SORTED_OBJECTIVES, ObjectiveConfig, resolve_tail, token_map_of

# Lines of the table of one student: heading and format, by the figure's name.
FIGURES = {
    "nll": ("NLL", ".3f"), "teacher_nll": ("  of the teacher", ".3f"), "ppl": ("perplexity", ",.1f"),
    "bits_per_byte": ("bits per byte of text", ".3f"),
    "kl": ("KL(teacher || student)", ".3f"), "reverse_kl": ("reverse KL", ".3f"), "tv": ("total variation", ".3f"),
    "acceptance": ("acceptance of drafts", ".1%"), "accepted_length": ("  tokens per step", ".2f"),
    "loyalty": ("probability loyalty", ".1%"), "top1": ("label loyalty: top-1 agreement", ".1%"),
    "top5": ("top-5 agreement", ".1%"), "ece": ("calibration error", ".2%"), "teacher_ece": ("  of the teacher", ".2%"),
    "tokens": ("tokens", ",d"),
}  # fmt: skip


def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that kdata has.")
    ],
    out_dir: Annotated[
        str | None, typer.Option("--out", metavar="FOLDER", help="Run folder. [default: runs/NAME]")
    ] = None,
    strict: StrictOption = None,
    set: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe with every setting, and stop.")] = False,
    resume: ResumeOption = Resume.auto,
) -> None:
    """Run a recipe: capture, select, train, evaluate, report.

    The same command continues after an interruption.
    """
    from kdata.pipelines.recipe import load_recipe

    resolved = load_recipe(Path(recipe), set or [], {} if strict is None else {"strict": strict})
    folder = Path("runs") / resolved.name if out_dir is None else local_folder(out_dir)
    if dry_run:
        say(f"# would run into {folder}")
        print(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False), end="")
        return
    from kdata.pipelines.runner import execute

    page = execute(resolved, folder, resume=resume.value)
    results = json.loads((folder / "results.json").read_text("utf-8"))
    print_students(results, folder / "results.json")
    say(f"report: {page}")
    say_rejected([f"{folder}/{name}" for name in ("dataset", "heldout", *(["validation"] if resolved.rounds else []))])


def largest_domains(tokens_of: Mapping[str, int]) -> tuple[list[str], str]:
    """The domains that a table has columns for, in their order, and a line about the others; "" where there are none."""
    largest = set(sorted(tokens_of, key=lambda name: (-tokens_of[name], name))[:MAX_DOMAINS])
    left = f"the {len(largest)} largest of {len(tokens_of):,} domains" if len(tokens_of) > len(largest) else ""
    return [name for name in tokens_of if name in largest], left


def print_students(results: dict[str, Any], file: Path) -> None:
    """One row per student: held-out NLL per domain and overall, KL to the teacher, top-1 agreement.

    file: has all of it.
    """
    students = list(results["students"].values())
    first = students[0]["domains"]
    domains, left = largest_domains({name: first[name]["tokens"] for name in first})
    columns = ["student", *(name or EMPTY for name in domains), "all", "KL", "top-1"]
    rows = [
        [
            student["label"],
            *(f"{student['domains'][d]['nll']:.3f}" for d in domains),
            f"{student['overall']['nll']:.3f}",
            f"{student['overall']['kl']:.3f}",
            f"{student['overall']['top1']:.1%}",
        ]
        for student in students
    ]
    floor = [f"{first[d]['teacher_nll']:.3f}" for d in domains]
    rows.append(["the teacher itself", *floor, f"{students[0]['overall']['teacher_nll']:.3f}", "", ""])
    print_rows(
        columns,
        rows,
        right=[False, *(True for _ in columns[1:])],
        title="Held-out text: NLL per domain and in all, KL to the teacher, top-1 agreement",
        caption="NLL and KL in nats per token: lower is better" + (f"; {left}: {file} has all" if left else ""),
    )


def train(
    dataset: DatasetArgument,
    out_dir: Annotated[
        str, typer.Option("--out", metavar="FOLDER", help="Folder for checkpoints, metrics and the student.")
    ],
    plan: Annotated[
        str | None,
        typer.Option(metavar="PLAN", help="Name of a plan of the dataset, or a plan file. Without: every row."),
    ] = None,
    steps: Annotated[int | None, option("steps", TrainConfig)] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Tokenizer of the student, where it is another than the dataset's: a model folder or a Hub name. The "
            "dataset is retokenized into FOLDER/retokenized.",
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE", help="YAML file of settings; --steps and --set override it."),
    ] = None,
    set: SetOption = None,
) -> None:
    """Train a student from a dataset; no teacher is needed.

    The student is in FOLDER/model. The same command continues after an interruption.

    \b
    Examples:
      kdata train my-dataset --out student
      kdata train my-dataset --plan difference --out student --steps 1000
      kdata train my-dataset --tokenizer other-model --out student
    """
    folder, config = local_folder(out_dir), train_config(file, steps, set)
    opened = kdata.open(dataset)
    if tokenizer is not None:
        config, retokenize = for_another_tokenizer(config, opened, plan, tokenizer)
        dataset, opened = retokenized(opened, retokenize, folder)
    chosen = None if plan is None else plan_file(opened, plan)
    from kdata.trainer.train import train as train_student

    train_student(config, dataset, chosen, folder)
    say(f"student: {folder / 'model'}")


def for_another_tokenizer(
    config: TrainConfig, opened: kdata.Dataset, plan: str | None, tokenizer: str
) -> tuple[TrainConfig, kdata.RetokenizeConfig]:
    """The settings for a dataset that is retokenized, checked before it is, and how it is to be.

    Without another word the text counts where no distribution is kept, in every phase, since a student whose tokens are
    shorter than the teacher's learns most of them from it.

    Raises:
        ConfigError: a plan, or a phase with a dataset or a plan of its own; an objective that draws cannot serve; objectives
            that need the ids of entries in different ways; or one that does not go with an encoder-decoder.
        MissingError: there is no model of the student's name.
    """
    if plan is not None or any(phase.dataset or phase.plan for phase in config.phases):
        raise ConfigError(
            "a plan chooses rows and tokens of a dataset as it is, and --tokenizer makes another one, of the one that is "
            "named first; run `kdata retokenize` for each, and name and choose from what it writes"
        )
    phases = [
        phase if phase.objective is None else phase.model_copy(update={"objective": _with_text(phase.objective)})
        for phase in config.phases
    ]
    changed = config.model_copy(update={"objective": _with_text(config.objective), "phases": phases})
    if changed != config:
        say("objective.cross_entropy_elsewhere is 1: where no distribution is kept, the text counts")
    objectives = [resolved.objective for resolved in changed.resolved_phases()]
    token_map = token_map_of(ObjectiveConfig(weights={name: 1.0 for o in objectives for name in o.weights}))
    held = opened.info.tail
    if token_map in SORTED_OBJECTIVES.values() and held == "draws":
        held = "ghost"  # of exact entries
    for objective in objectives:
        resolve_tail(objective, held, kind="combined", token_map=token_map)
    from kdata.trainer.encoder_decoder import refuse_settings
    from kdata.trainer.student import encoder_decoder_of

    if (name := encoder_decoder_of(changed.student)) is not None:
        refuse_settings(name, changed)
    return changed, kdata.RetokenizeConfig(tokenizer=tokenizer, map=token_map)


def _with_text(objective: ObjectiveConfig) -> ObjectiveConfig:
    if "alm" in objective.weights or "cross_entropy_elsewhere" in objective.model_fields_set:
        return objective
    return objective.model_copy(update={"cross_entropy_elsewhere": 1.0})


def retokenized(opened: kdata.Dataset, config: kdata.RetokenizeConfig, folder: Path) -> tuple[str, kdata.Dataset]:
    """The dataset for a student with another tokenizer, made in FOLDER/retokenized.

    Raises:
        DataError: most of the rows do not go into it.
        And as `kdata.retokenize`.
    """
    place = folder / "retokenized"
    made, report = kdata.retokenize(place, opened, config)
    say(*(f"  {line}" for line in report.lines()))
    say_rejected([str(place)], list(made.info.sources))
    if report.refused > report.rows:
        raise DataError(
            f"{report.refused:,} of {report.refused + report.rows:,} rows were left out, for the reasons above, so the "
            "student would learn from a small part of the text; take a tokenizer that keeps texts as they are (look at lower "
            f"case and normalization in that of {config.tokenizer}), or train on what is left: `kdata train {place}`"
        )
    return str(place), made


def train_config(file: str | None, steps: int | None, set: list[str] | None) -> TrainConfig:
    """Settings of a file, then --steps, then --set. Raises ConfigError or MissingError."""
    values = {} if file is None else read_yaml(Path(file))
    values = with_settings(values if steps is None else {**values, "steps": steps}, set)
    return parse_config(TrainConfig, values, file or "train settings")


def plan_file(dataset: kdata.Dataset, plan: str) -> Path:
    """The Parquet file of a plan that is named by its name in the dataset, or by a path. Raises MissingError."""
    if is_name(plan) and not Path(plan).exists():
        open_plan(dataset, plan)
        return dataset.path / "plans" / plan
    Plan.load(plan).check(dataset)
    return Path(plan)


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a trained student, such as student/model.")],
    dataset: DatasetArgument,
    save: Annotated[str | None, typer.Option(metavar="FILE", help="Also write the result as JSON.")] = None,
    format: FormatOption = Format.table,
    set: SetOption = None,
) -> None:
    """Measure a student on a held-out dataset."""
    config = parse_config(EvaluateConfig, with_settings({}, set), "evaluate settings")
    folder = Path(model)
    if not folder.is_dir() and not is_gguf(model):
        raise MissingError(f"{model} does not exist or is not a folder; name a student's folder, such as student/model")
    check_save(save)
    kdata.open(dataset)
    from kdata.trainer.evaluate import evaluate as measure_student

    measured = saved(save, lambda: measure_student(folder, dataset, config=config))
    if format is Format.json:
        print_json(measured)
        return
    print_evaluation(measured)
    for line in draft_lines(measured["drafts"]):
        say(line)
    for task, scores in measured["tasks"].items():
        say(f"{task}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))


def check_save(save: str | None) -> None:
    """Refuse a place where a result cannot be written. Raises MissingError and ConfigError."""
    if save is not None and not Path(save).parent.is_dir():
        raise MissingError(f"--save {save}: the folder {Path(save).parent} does not exist; create it first")
    if save is not None and Path(save).is_dir():
        raise ConfigError(f"--save {save} is a folder; name a file")


def saved(save: str | None, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, also written as JSON where that is asked for; the file is locked meanwhile."""
    with ExitStack() as stack:
        if save is not None:
            stack.enter_context(lock_of(Path(save)))
        measured = measure()
        if save is not None:
            with storage_errors(Path(save)):
                write_atomically(Path(save), json.dumps(measured, indent=2).encode() + b"\n")
    return measured


def draft_lines(drafts: dict[str, Any] | None) -> list[str]:
    """What a teacher accepted of the student's drafts, a line for each way to write; none where it was not measured."""
    if drafts is None:
        return []
    setting = f"drafts for {drafts['draft_for']}, {drafts['draft_tokens']} a step"
    return [
        f"{setting}, {way}: {number(f['acceptance'], '.1%')} accepted, {f['accepted_length']:.2f} tokens per step "
        f"({f['tokens']:,} tokens)"
        for way, f in drafts["overall"].items()
    ]


def print_evaluation(measured: dict[str, Any]) -> None:
    """Every figure of one student, by domain and overall."""
    caption = f"nats per token; KL is {measured['kl_is']}"
    if measured["bounds_are"]:
        caption += f"; reverse KL and total variation are {measured['bounds_are']}"
        caption += f"; acceptance, tokens per step and probability loyalty are {measured['acceptance_is']}"
    domains, left = largest_domains({name: figures["tokens"] for name, figures in measured["domains"].items()})
    caption += f"; {left}: --format json prints all" if left else ""
    scopes = [*(measured["domains"][name] for name in domains), measured["overall"]]  # a domain may be called all
    rows = [[heading, *(number(one[name], form) for one in scopes)] for name, (heading, form) in FIGURES.items()]
    print_rows(
        ["", *(name or EMPTY for name in domains), "all"],
        rows,
        right=[False, *(True for _ in scopes)],
        title=f"{measured['label']} on held-out text",
        caption=caption,
        first=WIDE,
    )


def hacking(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of `kdata train` with keep_models_every_steps.")],
    dataset: DatasetArgument,
    oracle: Annotated[
        str | None,
        typer.Option(metavar="DATASET", help="The same rows, read by an oracle. Without: the NLL of the text."),
    ] = None,
    trained_on: Annotated[
        str | None, typer.Option(metavar="DATASET", help="The dataset that was trained on, to count its prompts.")
    ] = None,
    save: Annotated[str | None, typer.Option(metavar="FILE", help="Also write the result as JSON.")] = None,
    picture: Annotated[str | None, typer.Option(metavar="FILE", help="Picture to write: .png, .svg or .pdf.")] = None,
    format: FormatOption = Format.table,
    set: SetOption = None,
) -> None:
    """Find where a run learns its teacher's errors.

    Measures each kept model on held-out text (DATASET, of the teacher): its
    distance to the teacher, and to an oracle or the text. Settings: evaluate's.
    """
    config = parse_config(EvaluateConfig, with_settings({}, set), "evaluate settings")
    if not Path(run).is_dir():
        raise MissingError(f"{run} does not exist or is not a folder; name the folder of a `kdata train`")
    check_save(save)
    if picture is not None:
        check_picture(Path(picture))
    for name in (dataset, oracle, trained_on):
        if name is not None:
            kdata.open(name)
    from kdata.trainer.hacking import hacking as look_at

    measured = saved(save, lambda: look_at(Path(run), dataset, oracle=oracle, trained_on=trained_on, config=config))
    if picture is not None:
        say(f"picture: {draw_course(measured, Path(picture))}")
    if format is Format.json:
        print_json(measured)
        return
    print_course(measured)


def print_course(measured: dict[str, Any]) -> None:
    """The table of a run's models, and what it says, for a person."""
    z = {} if measured["fit"] is None else {one["step"]: one["z"] for one in measured["fit"]["z"]}
    rows = [
        [
            f"{model['step']:,}",
            number(model["epochs"], ".1f"),
            f"{model['proxy']:.4f}",
            f"{model['golden']:.4f}",
            f"{model['nll']:.4f}",
            f"{model['top1']:.1%}",
            number(z.get(model["step"]), "+.1f"),
        ]
        for model in measured["models"]
    ]
    columns = ["step", "epochs", "proxy", "golden", "NLL", "top-1", "z"]
    print_rows(
        columns, rows, right=[True] * len(columns), title=f"{measured['label']}: nats per token on held-out text"
    )
    say(f"proxy: KL to the teacher, {measured['proxy_is']}", f"golden: {measured['golden_is']}")
    if (data := measured["data"]) is not None:
        say(
            f"trained on {data['rows']:,} rows, {data['unique_prompts']:,} different prompts, "
            f"{data['answers_per_prompt']:.1f} answers each, {data['epochs']:.1f} epochs"
        )
    if measured["fit"] is not None:
        departs = "rises above" if measured["fit"]["departs"] else "does not rise above"
        say(f"z: the proxy {departs} the power law of its first {measured['fit']['models']} models")
    say(*course_words(measured))
