"""What a training run is told, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kdata.config import Strict
from kdata.errors import ConfigError
from kdata.trainer.distributed import Parallel
from kdata.trainer.domain_weights import DDKMixture, FixedMixture, MixtureConfig
from kdata.trainer.metrics import LoggerName
from kdata.trainer.objectives import ObjectiveConfig
from kdata.trainer.schedule import Shape
from kdata.trainer.student import ScratchStudent, StudentConfig


class StageConfig(Strict):
    """One stage of several in a row: its data, and what differs from the run's own settings."""

    name: str = Field(description="Name of the stage in metrics.")
    dataset: str | None = Field(default=None, description="Logit dataset; None: the run's.")
    plan: str | None = Field(
        default=None, description="Plan file; None: the run's where the dataset is the run's, otherwise every sequence."
    )
    steps: int | None = Field(default=None, ge=1, description="Optimizer steps; None: the run's.")
    objective: ObjectiveConfig | None = Field(default=None, description="What the student minimises; None: the run's.")
    learning_rate: float | None = Field(default=None, gt=0, description="Peak learning rate; None: the run's.")
    warmup_steps: int | None = Field(default=None, ge=0, description="Steps of linear rise; None: the run's.")
    decay: Shape | None = Field(default=None, description="Shape after the rise; None: the run's.")
    final_learning_rate_share: float | None = Field(
        default=None, ge=0, le=1, description="Learning rate at the stage's last step, of its peak; None: the run's."
    )
    mixture: MixtureConfig | None = Field(default=None, description="How domains are mixed; None: the run's.")


class TrainConfig(BaseModel):
    """One training run. Equal `steps` and `batch_tokens` mean equal compute."""

    model_config = ConfigDict(extra="forbid")

    label: str = Field(default="student", description="Name of the run in results.")
    student: StudentConfig = Field(default_factory=ScratchStudent, description="The model that learns.")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="What it minimises.")
    steps: int = Field(default=300, ge=1, description="Optimizer steps; of each stage that does not say otherwise.")
    stages: list[StageConfig] = Field(
        default=[],
        description="Stages in a row, for instance general text, then a task: the student and AdamW's averages go on, data, "
        "learning rate and weights begin anew. Empty: one stage of the settings here.",
    )
    batch_tokens: int = Field(
        default=4096,
        ge=2,
        description="Cells of an optimizer step, of all ranks, a multiple of context_tokens; free cells count.",
    )
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=2,
        description="Cells of one forward and backward pass of one rank; times the ranks it divides batch_tokens. None: "
        "batch_tokens over the ranks.",
    )
    context_tokens: int = Field(default=512, ge=2, description="Tokens of a row; no document may be longer.")
    seed: int = Field(default=0, ge=0, description="Seed of the initial weights and of the order of data.")
    mixture: MixtureConfig | None = Field(
        default=None, description="Domains drawn by weights; None: as they come in dataset and plan."
    )
    learning_rate: float = Field(default=2e-3, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(default=30, ge=0, description="Steps of linear rise to the peak; 0: none.")
    decay: Shape = Field(default="cosine", description="Shape after the rise.")
    final_learning_rate_share: float = Field(
        default=0.1, ge=0, le=1, description="Learning rate at the last step as a share of the peak."
    )
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW's decay, on matrices only.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's averaging rates.")
    clip_norm: float = Field(default=1.0, ge=0, description="Largest gradient norm; 0: no clipping.")
    precision: Literal["fp32", "bf16", "auto"] = Field(
        default="fp32",
        description="Matrix products of forward and backward; weights and sums stay float32. auto: bf16 where the processor "
        "multiplies it (elsewhere it is several times slower than fp32), else fp32; what was taken stands in train.json.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute a layer's activations again in the backward pass instead of keeping them: about a third more "
        "time, memory for one layer instead of all; the same gradients.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is one.")
    parallel: Parallel = Field(
        default="ddp",
        description="How ranks share the work where torchrun started several. ddp: each holds the whole student. fsdp: "
        "weights, gradients and optimizer state are cut among them.",
    )
    window_documents: int = Field(default=1024, ge=1, description="Shuffled documents that are packed together.")
    prefetch_batches: int = Field(default=4, ge=0, description="Micro-batches read ahead; 0: none.")
    loggers: list[LoggerName] = Field(
        default=[], description="Where metrics go beside metrics.jsonl: tensorboard, wandb, trackio; each an extra."
    )
    log_every_steps: int = Field(default=10, ge=1, description="Steps between lines of metrics.jsonl.")
    checkpoint_every_steps: int = Field(default=100, ge=0, description="Steps between checkpoints; 0: only at the end.")

    def resolved_stages(self) -> list[Stage]:
        """The stages in a row, with nothing left open.

        Raises:
            ConfigError: a name stands twice, or a stage's warm-up is as long as the stage.
        """
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ConfigError(f"stages are named {names}; give each a name of its own")
        resolved: list[Stage] = []
        for given in self.stages or [StageConfig(name="train")]:
            own = {field: getattr(given, field) for field in SHARED}
            stage = Stage(
                name=given.name,
                dataset=given.dataset,
                plan=given.plan,
                first_step=resolved[-1].end if resolved else 0,
                **{field: getattr(self, field) if value is None else value for field, value in own.items()},
            )
            if stage.warmup_steps >= stage.steps:
                raise ConfigError(
                    f"stage {stage.name!r}: warmup_steps={stage.warmup_steps} must be less than steps={stage.steps}"
                )
            resolved.append(stage)
        return resolved


@dataclass(frozen=True)
class Stage:
    """A stage with every setting decided; see `StageConfig`. Its steps are [first_step, end) of the run."""

    name: str
    dataset: str | None
    plan: str | None
    first_step: int
    steps: int
    objective: ObjectiveConfig
    learning_rate: float
    warmup_steps: int
    decay: Shape
    final_learning_rate_share: float
    mixture: FixedMixture | DDKMixture | None

    @property
    def end(self) -> int:
        """Steps of the run when the stage is over."""
        return self.first_step + self.steps

    def settings(self) -> dict[str, Any]:
        """What decides the stage's numbers, as JSON values; without paths, as data is known by its content."""
        own = {name: getattr(self, name) for name in ("first_step", *SHARED)}
        dumped = {n: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for n, v in own.items()}
        if dumped["mixture"] is not None:
            dumped["mixture"].pop("heldout", None)
        return dumped


# Settings of a stage that the run has too.
SHARED = (
    "steps", "objective", "learning_rate", "warmup_steps", "decay", "final_learning_rate_share", "mixture",
)  # fmt: skip
# Settings that say where and how fast, not what: a run may go on with others.
RUNTIME = {
    "label", "device", "parallel", "micro_batch_tokens", "gradient_checkpointing", "prefetch_batches", "loggers",
    "log_every_steps", "checkpoint_every_steps",
}  # fmt: skip


class TrainResult(BaseModel):
    """What a run made and what it used; OUT/train.json."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    label: str
    model_dir: str = Field(description="Where the student is, relative to OUT.")
    metrics: str = Field(description="metrics.jsonl, relative to OUT.")
    params: int = Field(description="Trainable parameters.")
    steps: int
    tokens: int = Field(description="Tokens in documents, really seen.")
    target_tokens: int = Field(description="Counted positions, really seen.")
    train_seconds: float = Field(description="Seconds in the loop, over all resumptions.")
    wait_share: float = Field(description="Share of those seconds spent waiting for data, on the main rank.")
    losses: dict[str, float] = Field(description="Objectives at the last step, nats per counted token.")
    plan: str | None = Field(description="Name of the last stage's plan; None: the whole dataset.")
    dataset_digest: str = Field(alias="dataset_fingerprint", description="Of the last stage's dataset.")
    config: TrainConfig
