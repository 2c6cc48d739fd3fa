"""A run: a recipe, its folder, and what the recipe's names stand for there."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal

from kdata.config import parse_config
from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.errors import CorruptError, DataError
from kdata.format.files import write_atomically
from kdata.format.json_text import read_json
from kdata.format.keep import KeepConfig
from kdata.jobs.job import Engine
from kdata.jobs.reading import CaptureJob
from kdata.jobs.writing import GenerateConfig, GenerateJob
from kdata.pipelines.builtin.builtin import builtin_reference, builtin_teacher, ensure_corpus
from kdata.pipelines.builtin.corpus import CorpusFiles
from kdata.pipelines.builtin.gemma import gemma_teacher
from kdata.pipelines.engine import is_here, open_engine
from kdata.pipelines.recipe import BUILTIN, GEMMA, TEACHER, Recipe, StudentRun, TextConfig
from kdata.selection.ranked import Difference
from kdata.store.url import cache_dir
from kdata.teachers.config import TeacherConfig
from kdata.trainer.config import ScratchStudent, TrainConfig


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
        paths = {"generate": self.dataset_path, "capture": self.dataset_path, "heldout": self.heldout_path}
        return paths if self.recipe.rounds is None else {**paths, "validation": self.validation_path}

    @property
    def validation_path(self) -> Path:
        return self.out / "validation"

    def round_folder(self, number: int) -> Path:
        """What a round writes, but for rows, scores and plans of the dataset."""
        return self.out / "rounds" / str(number)

    def round_student(self, number: int) -> Path:
        """The training run of a round; round 0 is the ordinary training of the student that rounds carry on."""
        if number:
            return self.round_folder(number) / "student"
        return self.out / "students" / self.recipe.rounds_of().student_of(list(self.recipe.students))

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
        jobs += [] if self.recipe.rounds is None else [self.validation_job()]
        work = reduce(or_, [job.work(self.teacher_config, look=look) for job in jobs])
        generating = self.generate_job()
        if generating is not None:
            work |= generating.work(self.teacher_config, look=look)
        return self._opened.enter_context(
            open_engine(self.recipe.engine, self.teacher_config, max_k=self.recipe.keep.k, work=work)
        )

    def generate_job(self, keep: KeepConfig | None = None) -> GenerateJob | None:
        """What the teacher writes; None where the recipe leaves it out.

        Args:
            keep: what is kept of it; None: what the recipe says.
        """
        stage = self.recipe.generate
        if stage is None:
            return None
        prompts = self.corpus(stage.prompts, "prompts")
        values = {
            **(keep or self.recipe.keep).model_dump(),
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

    def validation_job(self) -> CaptureJob:
        """What the teacher reads for rounds to be measured on; every position is kept, as of the held-out text."""
        text = self.recipe.rounds_of().validation
        return CaptureJob(self.recipe.capture_config(text, "validation"), Corpus(text))

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


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON atomically."""
    write_atomically(path, json.dumps(values, indent=2).encode() + b"\n")


def read_state(path: Path) -> dict[str, Any]:
    """A JSON file of the run. Raises CorruptError where it cannot be read."""
    try:
        return read_json(path)
    except (OSError, DataError) as error:
        raise CorruptError(f"{path} cannot be read ({error}); name another folder with --out") from error
