"""Settings and result of a training run, settings of a student and of an evaluation.

Needs no torch: the command line reads defaults and descriptions from here. The settings of the loss are in
`kdata.trainer.objective_config`, those of domain weights in `kdata.trainer.domain_weights`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kdata.config import Settings, Strict, WithoutSecrets
from kdata.errors import ConfigError
from kdata.trainer.domain_weights import DDKMixture, FixedMixture, MixtureConfig
from kdata.trainer.metrics import LoggerName
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.schedule import Shape

Architecture = Literal["llama", "mamba", "t5gemma"]
Attention = Literal["default", "varlen"]
Device = Literal["auto", "cpu", "cuda"]
OptimizerName = Literal["adamw", "muon", "adamw_8bit"]
Parallel = Literal["ddp", "fsdp"]
Precision = Literal["fp32", "bf16"]
MODELS = "models"  # folder of a run for the students of single steps

OF_ATTENTION = ("num_heads", "num_kv_heads", "intermediate_size", "max_positions")  # sizes of a student with attention


class ScratchStudent(Settings):
    """A student with random initial weights; its vocabulary is the dataset's."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["scratch"] = "scratch"
    architecture: Architecture = Field(
        default="llama",
        exclude_if=lambda architecture: architecture == "llama",  # as in records of runs before there were others
        description="llama: a decoder with attention. mamba: a state-space model, which has no attention and no longest "
        "document (Mamba, arXiv 2312.00752), so num_heads, num_kv_heads, intermediate_size and max_positions are not its. "
        "t5gemma: an encoder that reads the prompt and a decoder that learns the rest, of these sizes each (T5Gemma, arXiv "
        "2504.06225).",
    )
    hidden_size: int = Field(default=128, ge=2, description="Width D of the hidden states.")
    num_layers: int = Field(default=4, ge=1, description="Number of transformer layers.")
    num_heads: int = Field(
        default=4, ge=1, description="Number of attention heads. hidden_size / num_heads must be an even number."
    )
    num_kv_heads: int | None = Field(
        default=None, ge=1, description="Number of key-value heads (grouped-query attention); null: num_heads."
    )
    intermediate_size: int | None = Field(
        default=None,
        ge=1,
        description="Width of the feed-forward layers; null: 8/3 of hidden_size, rounded up to a multiple of 32.",
    )
    max_positions: int = Field(
        default=2048, ge=2, description="Tokens of the longest document that the student can read."
    )
    tied_embeddings: bool = Field(default=True, description="Use one matrix for input and output embeddings.")
    init_std: float = Field(default=0.02, gt=0, description="Standard deviation of the initial weights.")

    @model_validator(mode="after")
    def _sizes_of_the_architecture(self) -> ScratchStudent:
        for name in OF_ATTENTION if self.architecture == "mamba" else ():
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={value} would be ignored: architecture mamba has no such size; leave it out")
        return self


class LoraConfig(Strict):
    """Low-rank adapters (LoRA, arXiv 2106.09685): the student's own weights stay as they are, and only the adapters learn.

    With base weight W, a layer computes W x + alpha / rank * B A x. A has `rank` rows; B is 0 at the start.
    """

    rank: int = Field(
        default=16, ge=1, description="Rows of A and columns of B: the rank of the change to each weight."
    )
    alpha: float = Field(default=32.0, gt=0, description="The change is multiplied by alpha / rank.")
    targets: list[str] | Literal["all-linear"] = Field(
        default="all-linear",
        description="Layers with an adapter, by the last parts of their names, for instance [q_proj, v_proj]. all-linear: "
        "every linear layer but the head. The embeddings and the head cannot have one.",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of an adapter's inputs set to 0 in training.")
    merge: bool = Field(
        default=False,
        description="Where the result goes. false: OUT/model is the folder of the adapter, as PEFT writes it. true: "
        "OUT/model is the whole student, the adapter merged into its weights, and OUT/adapter is the adapter.",
    )


class QuantizeConfig(Strict):
    """Train for rounded weights (quantization-aware, by torchao): every linear layer but the head computes with them.

    OUT/model is the quantized model in torchao's form, OUT/dequantized its rounded weights as an ordinary model.
    """

    weights: Literal["int2", "int3", "int4", "int8"] = Field(
        default="int4", description="Type of the weights, symmetric around 0: int4 has the whole numbers from -8 to 7."
    )
    group_size: int | None = Field(
        default=32,
        ge=2,
        description="Neighboring weights of one output that share a scale; must divide the inputs of every layer. null: all "
        "weights of an output.",
    )
    inputs: Literal["int8"] | None = Field(
        default="int8",
        description="Type of a layer's inputs, with a scale and a zero for each token as it is read; null: not rounded.",
    )


class CheckpointStudent(Settings):
    """A student that starts from trained weights."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["checkpoint"] = "checkpoint"
    model: str = Field(
        description="Folder of a model or of a LoRA adapter in Hugging Face format, a GGUF file, or a name on the Hub. "
        "It must have the teacher's tokenizer."
    )
    revision: str | None = Field(
        default=None, description="Commit, tag or branch on the Hub; null: the default branch."
    )
    keep_layers: int | list[int] | None = Field(
        default=None,
        description="Layers of the checkpoint that the student keeps: how many, evenly spaced with the first and the last, "
        "or their numbers from 0, rising. null: all.",
    )
    lora: LoraConfig | None = Field(
        default=None,
        description="Train low-rank adapters instead of the weights; needs the extra peft. null: train all weights.",
    )
    quantize: QuantizeConfig | None = Field(
        default=None,
        exclude_if=lambda quantize: quantize is None,
        description="Train for weights of a few bits, and write them; needs the extra torchao. null: float32.",
    )

    @model_validator(mode="after")
    def _adapters_of_an_ordinary_model_on_disk(self) -> CheckpointStudent:
        if self.lora is not None and self.keep_layers is not None:
            raise ValueError(
                "lora does not go with keep_layers: an adapter belongs to a model on disk, and the one with fewer layers "
                "is on no disk. Leave lora at null, or train the smaller model first and name its folder"
            )
        if self.lora is not None and self.quantize is not None:
            raise ValueError(
                "lora does not go with quantize: rounding is learned by the weights themselves, which an adapter leaves as "
                "they are; leave one of them at null"
            )
        return self


class PrunedSizes(Strict):
    """Sizes of a pruned student, none above the model's; null: the model's. The size of a head stays as it is."""

    hidden_size: int | None = Field(default=None, ge=1, description="Width D of the hidden states; null: the model's.")
    intermediate_size: int | None = Field(
        default=None, ge=1, description="Channels of each feed-forward layer; null: the model's."
    )
    num_heads: int | None = Field(
        default=None,
        ge=1,
        description="Attention heads (of queries) of each layer, as many for each key-value head, so a multiple of their "
        "number. Where the model has one key-value head for each, these go with them. null: the model's.",
    )
    num_layers: int | None = Field(default=None, ge=1, description="Transformer layers; null: the model's.")

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that are set, by name."""
        return {name: size for name in PrunedSizes.model_fields if (size := getattr(self, name)) is not None}


class PruneConfig(PrunedSizes):
    """The most important parts of a model by their activations on rows of the dataset (Minitron, arXiv 2407.14679)."""

    importance_rows: int = Field(
        default=512,
        ge=1,
        description="Rows of the dataset on which activations are measured, drawn by the seed; all where there are fewer.",
    )
    candidates: list[PrunedSizes] = Field(
        default=[],
        description="Sizes to compare before training: the student is the one with the least forward KL. Their numbers of "
        "parameters differ by a tenth at most. Empty: the sizes above.",
    )
    candidate_tokens: int = Field(
        default=2048, ge=1, description="Target tokens of those rows on which candidates are compared; whole rows."
    )

    @model_validator(mode="after")
    def _says_what_is_pruned(self) -> PruneConfig:
        if self.candidates and self.sizes:
            raise ValueError(
                f"{' and '.join(self.sizes)} would be ignored, because candidates have sizes of their own; give one of both"
            )
        if not all(one.sizes for one in self.candidates or [self]):
            raise ValueError(
                "nothing is pruned without a size: set hidden_size, intermediate_size, num_heads or num_layers (of every "
                "candidate), or start from the whole model with kind checkpoint"
            )
        return self


class PrunedStudent(PruneConfig):
    """A student that starts from the most important parts of a trained model."""

    kind: Literal["pruned"] = "pruned"
    model: str = Field(
        description="Folder of a model in Hugging Face format, a GGUF file, or a name on the Hub: a Llama, Mistral, Qwen2, "
        "Qwen3 or Gemma 3 (text) with the dataset's tokenizer, most often its teacher."
    )
    revision: str | None = Field(
        default=None, description="Commit, tag or branch on the Hub; null: the default branch."
    )


StudentConfig = Annotated[ScratchStudent | CheckpointStudent | PrunedStudent, Field(discriminator="kind")]


class InputMask(Strict):
    """A share of the student's input tokens that is replaced by a mask token (MEAP, arXiv 2502.07490)."""

    share: float = Field(
        default=0.15,
        gt=0,
        lt=1,
        description="Probability of each token of a document to be replaced. 0.15 is the choice of the paper's authors.",
    )
    token_id: int = Field(
        ge=0, description="Id that stands in its place: a mask token, or one that the text does not use."
    )


class PhaseConfig(Strict):
    """One phase of a training run: its data, and the settings that differ from the run's."""

    name: str = Field(description="Name of the phase in the metrics.")
    dataset: str | None = Field(
        default=None, description="Logit dataset: a folder, a URL or hf://OWNER/NAME; null: the run's."
    )
    plan: str | None = Field(
        default=None,
        description="Plan: the name of one in the dataset, or a file. null: the run's plan if the dataset is the run's, "
        "otherwise every sequence.",
    )
    steps: int | None = Field(default=None, ge=1, description="Number of optimizer steps; null: the run's.")
    objective: ObjectiveConfig | None = Field(
        default=None, description="The loss that the student minimizes; null: the run's."
    )
    learning_rate: float | None = Field(default=None, gt=0, description="Peak learning rate; null: the run's.")
    warmup_steps: int | None = Field(
        default=None, ge=0, description="Steps of linear rise to the peak; 0: none; null: the run's."
    )
    decay: Shape | None = Field(default=None, description="Shape of the decay after the warm-up; null: the run's.")
    final_learning_rate_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Learning rate at the phase's last step, as a share of its peak; null: the run's.",
    )
    mixture: MixtureConfig | None = Field(default=None, description="Weights of the domains; null: the run's.")


class TrainConfig(WithoutSecrets):
    """One training run. Equal `steps` and `batch_tokens` mean equal compute."""

    model_config = ConfigDict(extra="forbid")

    label: str = Field(default="student", description="Name of the run in tables and reports.")
    student: StudentConfig = Field(
        default_factory=ScratchStudent,
        description="The model to train. kind: scratch starts from random weights, checkpoint from a trained model, pruned "
        "from the most important parts of one.",
    )
    objective: ObjectiveConfig = Field(
        default_factory=ObjectiveConfig, description="The loss that the student minimizes."
    )
    steps: int = Field(
        default=300, ge=1, description="Number of optimizer steps; of each phase that does not set its own."
    )
    phases: list[PhaseConfig] = Field(
        default=[],
        description="Phases of training, in order, for instance general text, then a task. The student and the optimizer's "
        "averages carry over; data, learning rate and weights start anew. Empty: one phase with the settings here.",
    )
    batch_tokens: int = Field(
        default=4096,
        ge=2,
        description="Token positions of one optimizer step, over all ranks; a multiple of context_tokens. Padding counts.",
    )
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=2,
        description="Token positions of one forward and backward pass of one rank. Times the number of ranks, it must divide "
        "batch_tokens. null: batch_tokens over the number of ranks, so no accumulation.",
    )
    context_tokens: int = Field(default=512, ge=2, description="Tokens of one packed row. No document may be longer.")
    seed: int = Field(default=0, ge=0, description="Seed of the initial weights and of the order of the data.")
    data_order: Literal["dataset", "seed"] = Field(
        default="dataset",
        description="What decides the order of the data beside the plan. dataset: the dataset's content and the seed. seed: "
        "the seed alone, so that datasets of the same text give the same batches; not with a mixture.",
    )
    mixture: MixtureConfig | None = Field(
        default=None, description="Weights of the domains; null: the shares that the dataset and the plan have."
    )
    prompt_share: float | None = Field(
        default=0.5,
        gt=0,
        lt=1,
        exclude_if=lambda share: share == 0.5,
        description="Of students with an encoder: the share of a document without a prompt (its second token counts) that "
        "the encoder reads; these tokens are not learned. The prompt of other documents is what stands before their first "
        "token that counts. null: documents without a prompt are refused.",
    )
    input_mask: InputMask | None = Field(
        default=None,
        exclude_if=lambda mask: mask is None,
        description="Replace some of the student's input tokens by a mask token; the targets stay the teacher's for the "
        "clean text, at every position. Other tokens in every step, the same ones after a resume. null: none.",
    )
    optimizer: OptimizerName = Field(
        default="adamw",
        description="adamw: AdamW of torch. muon: Muon of torch for the matrices inside of the layers, its steps scaled to "
        "AdamW's size (arXiv 2502.16982), so that learning_rate and weight_decay serve both, and AdamW for all else. "
        "adamw_8bit: AdamW that keeps its averages in 8 bits (extra bitsandbytes), 2 bytes per parameter instead of 8. The "
        "last two do not divide their state among ranks (parallel: fsdp).",
    )
    learning_rate: float = Field(default=2e-3, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(default=30, ge=0, description="Steps of linear rise to the peak; 0: none.")
    decay: Shape = Field(default="cosine", description="Shape of the decay after the warm-up.")
    final_learning_rate_share: float = Field(
        default=0.1, ge=0, le=1, description="Learning rate at the last step, as a share of the peak; 0: decay to 0."
    )
    weight_decay: float = Field(default=0.1, ge=0, description="Weight decay, on matrices only; 0: none.")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95), description="Decay rates of AdamW's averages of the gradient and of its square."
    )
    clip_norm: float = Field(
        default=1.0, ge=0, description="Largest norm of the gradient; a larger one is scaled down. 0: no clipping."
    )
    precision: Literal["fp32", "bf16", "auto"] = Field(
        default="fp32",
        description="Precision of matrix products; weights and sums are float32 in any case. auto: bf16 if the processor or "
        "GPU multiplies it in hardware, else fp32. train.json records the choice.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Recompute each layer's activations in the backward pass instead of storing them: about a third more "
        "time, memory for one layer instead of all, the same gradients.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the student's layers with torch.compile: faster after a start of seconds to minutes; sums "
        "are in another order. Needs Triton on a GPU, a C++ compiler on a CPU.",
    )
    attention: Attention = Field(
        default="default",
        description="How attention is computed. default: as transformers does, with a mask that keeps packed documents "
        "apart. varlen: FlashAttention over each document, without a mask; only on a GPU with bf16, and for models without "
        "dropout, soft-cap or sinks in their attention.",
    )
    device: Device = Field(default="auto", description="Where to compute. auto: cuda if there is a GPU, else cpu.")
    parallel: Parallel = Field(
        default="ddp",
        description="How the ranks that torchrun started share the work. ddp: each rank holds the whole student. fsdp: "
        "weights, gradients and optimizer state are divided among the ranks.",
    )
    window_documents: int = Field(
        default=1024,
        ge=1,
        description="Number of shuffled documents that are packed together; more fills the rows better.",
    )
    shuffle_group_tokens: int | None = Field(
        default=None,
        ge=0,
        description="Shards are read in random order, as many together as hold about this many tokens, and rows are shuffled "
        "inside of such a group alone. 0: all shards together. null: 0 for a folder; 524,288 for a dataset at a URL or on "
        "the Hub, where a group is copied before its first step and the next one meanwhile.",
    )
    prefetch_batches: int = Field(
        default=4, ge=0, description="Micro-batches that are read ahead; 0: none, reading and training take turns."
    )
    loggers: list[LoggerName] = Field(
        default=[],
        description="Where metrics go beside metrics.jsonl: tensorboard, wandb, trackio. Each needs the extra of its name.",
    )
    log_every_steps: int = Field(default=10, ge=1, description="Steps between two lines of metrics.jsonl.")
    checkpoint_every_steps: int = Field(
        default=100, ge=0, description="Steps between two checkpoints; 0: only one, at the end."
    )
    keep_models_every_steps: int = Field(
        default=0,
        ge=0,
        exclude_if=lambda steps: steps == 0,
        description="Also write the student of every so many steps, to OUT/models/step-00000100 and so on, and keep all of "
        "them: `kdata hacking` compares them. 0: none.",
    )

    def resolved_phases(self) -> list[Phase]:
        """The phases in order, every setting resolved.

        Raises:
            ConfigError: two phases share a name, a warm-up is as long as its phase, or settings exclude each other.
        """
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ConfigError(f"phases are named {names}; give each phase a name of its own")
        resolved: list[Phase] = []
        for settings in self.phases or [PhaseConfig(name="train")]:
            own = {field: getattr(settings, field) for field in SHARED}
            phase = Phase(
                name=settings.name,
                dataset=settings.dataset,
                plan=settings.plan,
                first_step=resolved[-1].end if resolved else 0,
                **{field: getattr(self, field) if value is None else value for field, value in own.items()},
            )
            if phase.warmup_steps >= phase.steps:
                raise ConfigError(
                    f"phase {phase.name!r}: warmup_steps={phase.warmup_steps} must be less than steps={phase.steps}"
                )
            if phase.mixture is not None and self.data_order == "seed":
                raise ConfigError(
                    f"phase {phase.name!r}: data_order=seed does not go with a mixture; remove one of the two"
                )
            resolved.append(phase)
        return resolved


@dataclass(frozen=True)
class Phase:
    """A phase with every setting resolved; see `PhaseConfig`. Its steps are [first_step, end) of the run."""

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
        """Steps of the run when the phase is over."""
        return self.first_step + self.steps

    def settings(self) -> dict[str, Any]:
        """What decides the phase's numbers, as JSON values. No paths: data is identified by its content."""
        own = {name: getattr(self, name) for name in ("first_step", *SHARED)}
        dumped = {n: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for n, v in own.items()}
        if dumped["mixture"] is not None:
            dumped["mixture"].pop("heldout", None)
        return dumped


# Settings that a phase and the run both have.
SHARED = (
    "steps", "objective", "learning_rate", "warmup_steps", "decay", "final_learning_rate_share", "mixture",
)  # fmt: skip
# Settings that say where and how fast, not what: a run may resume with other values.
RUNTIME = {
    "label", "device", "parallel", "micro_batch_tokens", "gradient_checkpointing", "compile", "attention",
    "prefetch_batches", "loggers", "log_every_steps", "checkpoint_every_steps",
    "keep_models_every_steps",
}  # fmt: skip


class TrainResult(BaseModel):
    """What a training run produced and what it used; the content of OUT/train.json."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    label: str
    model_dir: str = Field(description="Folder of the student, relative to OUT.")
    metrics: str = Field(description="Path of metrics.jsonl, relative to OUT.")
    params: int = Field(description="Number of trainable parameters.")
    steps: int
    tokens: int = Field(description="Tokens of documents that were trained on; padding does not count.")
    target_tokens: int = Field(description="Positions that counted in the loss.")
    train_seconds: float = Field(description="Seconds in the loop, over all resumptions.")
    wait_share: float = Field(description="Share of those seconds that the main rank waited for data.")
    losses: dict[str, float] = Field(description="Objectives at the last step, nats per counted token.")
    plan: str | None = Field(description="Name of the last phase's plan; null: the whole dataset.")
    dataset_digest: str = Field(alias="dataset_fingerprint", description="Content digest of the last phase's dataset.")
    config: TrainConfig

    @model_validator(mode="before")
    @classmethod
    def _former_keys(cls, values: Any) -> Any:
        """Read the train.json of older runs, in which `phases`, `student.model` and `compared_tokens` have other names."""
        config = values.get("config") if isinstance(values, dict) else None
        if not isinstance(config, dict):
            return values
        config = {"phases" if key == "stages" else key: value for key, value in config.items()}
        if isinstance(student := config.get("student"), dict):
            config["student"] = {"model" if key == "path" else key: value for key, value in student.items()}
        for part in (config, *(config.get("phases") or [])):
            if isinstance(part, dict) and isinstance(objective := part.get("objective"), dict):
                names = {"window_tokens": "compared_tokens"}
                part["objective"] = {names.get(key, key): value for key, value in objective.items()}
        return {**values, "config": config}


class EvaluateConfig(WithoutSecrets):
    """How much is measured, and how samples are written."""

    model_config = ConfigDict(extra="forbid")

    batch_tokens: int = Field(
        default=8192, ge=2, description="Token positions of one forward pass; changes memory and speed only."
    )
    max_documents: int | None = Field(
        default=None, ge=1, description="Number of documents to measure per domain, the first ones; null: all."
    )
    sample_tokens: int = Field(
        default=64, ge=1, description="Tokens that the student writes for each prompt, and the teacher of draft_for."
    )
    sample_temperature: float = Field(
        default=0.0, ge=0, description="Sampling temperature. 0: greedy; 1: the student's own distribution."
    )
    seed: int = Field(default=0, ge=0, description="Seed of sampling.")
    device: Device = Field(default="auto", description="Where to compute. auto: cuda if there is a GPU, else cpu.")
    draft_tokens: int = Field(
        default=4, ge=1, description="Drafts of one step of speculative decoding, for accepted_length and draft_for."
    )
    draft_for: str | None = Field(
        default=None,
        description="Teacher that writes with the student's drafts, greedily and by sampling at temperature 1, so that "
        "acceptance is measured: a model's folder or GGUF file, with the dataset's tokenizer. null: it is not measured.",
    )
    draft_prompts: int = Field(
        default=8, ge=1, description="Texts that draft_for continues, per domain: the first ones of the dataset."
    )
    draft_prompt_tokens: int = Field(
        default=32, ge=1, description="Tokens of these texts that it reads, the first ones."
    )
    tasks: list[str] = Field(
        default=[],
        description="Tasks of the lm-evaluation-harness to score the student on; they need the extra lm-eval. Empty: none.",
    )
    tasks_folder: str | None = Field(
        default=None,
        description="Folder with further tasks, YAML files in the harness's format; null: only those of the harness.",
    )
    task_documents: int | None = Field(
        default=None, ge=1, description="Number of documents per task, the first ones; null: all."
    )
