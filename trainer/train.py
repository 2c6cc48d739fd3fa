"""The training loop: dataset + plan + student in, student out. Reads from top to bottom.

What is promised: the order of data is that of the plan and the seed; losses are per counted token of the
whole step, however it is cut into micro-batches; a run that is killed and started again gives bit-equal
losses on a CPU; a non-finite loss stops the run before the weights are touched.

    OUT/model/          the student in Hugging Face format, with the tokenizer
    OUT/train.json      TrainResult
    OUT/metrics.jsonl   one line per logged step
    OUT/checkpoints/    see trainer.checkpoint

Shapes: B rows, L context, D hidden, V vocabulary, M counted positions.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel

import kdata
from kdata.errors import ConfigError, TrainingError
from kdata.plan import Plan
from kdata.progress import Stage
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.fused import Loss, distillation_loss
from trainer.loader import Batch, Loader, LoaderConfig
from trainer.objectives import ObjectiveConfig, Tail, resolve_tail
from trainer.student import (
    ScratchStudent,
    StudentConfig,
    build_student,
    head_of,
    hidden_states,
    num_parameters,
)


class TrainConfig(BaseModel):
    """One training run. Equal `steps` and `batch_tokens` mean equal compute."""

    model_config = ConfigDict(extra="forbid")

    label: str = Field(default="student", description="Name of the run in results.")
    student: StudentConfig = Field(default_factory=ScratchStudent, description="The model that learns.")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="What it minimises.")
    steps: int = Field(default=300, ge=1, description="Optimizer steps.")
    batch_tokens: int = Field(
        default=4096,
        ge=2,
        description="Cells of an optimizer step, a multiple of context_tokens; free cells count.",
    )
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=2,
        description="Cells of one forward and backward pass; divides batch_tokens. None: batch_tokens.",
    )
    context_tokens: int = Field(default=512, ge=2, description="Tokens of a row; no document may be longer.")
    seed: int = Field(default=0, ge=0, description="Seed of the initial weights and of the order of data.")
    learning_rate: float = Field(default=2e-3, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(default=30, ge=0, description="Steps of linear rise to the peak; 0: none.")
    decay: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="Shape after the rise.")
    final_learning_rate_share: float = Field(
        default=0.1, ge=0, le=1, description="Learning rate at the last step as a share of the peak."
    )
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW's decay, on matrices only.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's averaging rates.")
    clip_norm: float = Field(default=1.0, ge=0, description="Largest gradient norm; 0: no clipping.")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Matrix products of forward and backward; weights and sums stay float32."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is one.")
    window_documents: int = Field(default=1024, ge=1, description="Shuffled documents that are packed together.")
    prefetch_batches: int = Field(default=4, ge=0, description="Micro-batches read ahead; 0: none.")
    log_every_steps: int = Field(default=10, ge=1, description="Steps between lines of metrics.jsonl.")
    checkpoint_every_steps: int = Field(default=100, ge=0, description="Steps between checkpoints; 0: only at the end.")


class TrainResult(BaseModel):
    """What a run made and what it used; OUT/train.json."""

    label: str
    model_dir: str = Field(description="Where the student is, relative to OUT.")
    metrics: str = Field(description="metrics.jsonl, relative to OUT.")
    params: int = Field(description="Trainable parameters.")
    steps: int
    tokens: int = Field(description="Tokens in documents, really seen.")
    target_tokens: int = Field(description="Counted positions, really seen.")
    train_seconds: float = Field(description="Seconds in the loop, over all resumptions.")
    wait_share: float = Field(description="Share of those seconds spent waiting for data.")
    losses: dict[str, float] = Field(description="Objectives at the last step, nats per counted token.")
    plan: str | None = Field(description="Name of the plan; None: the whole dataset.")
    dataset_fingerprint: str
    config: TrainConfig


@dataclass
class _Progress:
    """What a run has done so far; goes into checkpoints."""

    step: int = 0
    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)


def train(config: TrainConfig, dataset_path: Path | str, plan_path: Path | str | None, out_dir: Path) -> TrainResult:
    """Train a student, going on from a checkpoint in `out_dir` where there is one.

    Args:
        config: see TrainConfig.
        dataset_path: what `kdata.open` takes.
        plan_path: a plan's Parquet file; None trains on every sequence once an epoch.
        out_dir: made when it does not exist.
    Raises:
        ConfigError: settings that do not go together, or an objective that the data cannot serve.
        MismatchError: student or plan do not belong to the dataset, or `out_dir` was begun with other
            settings.
        DataError: a document is longer than the context, or there is nothing to train on.
        TrainingError: a non-finite loss or gradient; the message names step and rows.
    """
    micro_tokens = _check_sizes(config)
    device = torch.device(device_name(config.device))
    dataset = kdata.open(dataset_path)
    plan = None if plan_path is None else Plan.load(plan_path)
    loader = Loader(dataset, None if plan is None else plan.rows(dataset), _loader_config(config, micro_tokens))
    tail = resolve_tail(config.objective, dataset.info.tail)
    torch.manual_seed(config.seed)
    model = build_student(config.student, dataset, config.seed)
    model.to(device).train()  # type: ignore[arg-type]  # transformers wraps Module.to
    optimizer = _optimizer(model, config)

    out_dir.mkdir(parents=True, exist_ok=True)
    settings = config.model_dump(mode="json", exclude={"label", "log_every_steps", "checkpoint_every_steps"})
    settings["data"] = loader.identity
    done = _Progress()
    saved = load_checkpoint(out_dir / "checkpoints", model, optimizer, settings)
    if saved is not None:
        done = _Progress(**saved["progress"])
        loader.load_state_dict(saved["loader"])
    metrics_path = out_dir / "metrics.jsonl"
    _forget_after(metrics_path, done.step)

    def checkpoint() -> None:
        state = {
            "step": done.step,
            "progress": vars(done),
            "loader": loader.state_dict(),
            "settings": settings,
        }
        save_checkpoint(out_dir / "checkpoints", model, optimizer, state)

    batches = iter(loader)
    with Stage(f"train {config.label}", config.steps * config.batch_tokens, unit="tokens") as stage:
        stage.advance(done.tokens)
        while done.step < config.steps:
            started = time.perf_counter()
            step_batches = list(islice(batches, config.batch_tokens // micro_tokens))
            waited = time.perf_counter() - started

            rate = learning_rate(config, done.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses, norm = _gradients(model, dataset, step_batches, config, tail, done.step + 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            seconds = time.perf_counter() - started
            tokens = sum(b.num_tokens for b in step_batches)
            counted = sum(len(b.targets) for b in step_batches)
            done = _Progress(
                done.step + 1,
                done.tokens + tokens,
                done.target_tokens + counted,
                done.seconds + seconds,
                done.waited + waited,
                losses,
            )
            stage.advance(tokens, step=done.step, loss=losses["loss"])
            if done.step % config.log_every_steps == 0 or done.step in (1, config.steps):
                line = {
                    "step": done.step,
                    **losses,
                    "lr": rate,
                    "grad_norm": norm,
                    "tokens": done.tokens,
                    "target_tokens": done.target_tokens,
                    "fill": sum(b.fill for b in step_batches) / len(step_batches),
                    "tokens_per_sec": tokens / seconds,
                    "wait_share": waited / seconds,
                    "seconds": done.seconds,
                }
                with metrics_path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            if config.checkpoint_every_steps and done.step % config.checkpoint_every_steps == 0:
                checkpoint()
    checkpoint()
    _save_model(model, dataset, out_dir / "model")
    result = TrainResult(
        label=config.label,
        model_dir="model",
        metrics=metrics_path.name,
        params=num_parameters(model),
        steps=done.step,
        tokens=done.tokens,
        target_tokens=done.target_tokens,
        train_seconds=done.seconds,
        wait_share=done.waited / max(done.seconds, 1e-9),
        losses=done.losses,
        plan=None if plan is None else plan.info.name,
        dataset_fingerprint=dataset.fingerprint,
        config=config,
    )
    (out_dir / "train.json").write_text(result.model_dump_json(indent=1), encoding="utf-8")
    return result


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of step 0, 1, ...: a linear rise over `warmup_steps`, then the decay."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    way = (step - config.warmup_steps) / max(config.steps - 1 - config.warmup_steps, 1)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * way)), "linear": 1 - way, "constant": 1.0}[config.decay]
    floor = config.final_learning_rate_share
    return config.learning_rate * (floor + (1 - floor) * shape)


def batch_loss(
    model: PreTrainedModel,
    batch: Batch,
    objective: ObjectiveConfig,
    tail: Tail,
    *,
    counted_tokens: int,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Loss:
    """Forward pass and sparse loss of one batch, divided by the whole step's counted tokens."""
    device = head_of(model).device
    half = precision == "bf16"
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        hidden_BLD = hidden_states(model, batch.input_ids.to(device), batch.position_ids.to(device))
    hidden_MD = hidden_BLD.flatten(0, 1).index_select(0, batch.predictor_M.to(device))
    return distillation_loss(
        hidden_MD,
        head_of(model),
        batch.targets.to(device),
        objective,
        tail,
        counted_tokens=counted_tokens,
        matmul_dtype=torch.bfloat16 if half else None,
    )


def _gradients(
    model: PreTrainedModel,
    dataset: kdata.Dataset,
    batches: list[Batch],
    config: TrainConfig,
    tail: Tail,
    step: int,
) -> tuple[dict[str, float], float]:
    """Accumulate one step's gradients; return losses per counted token and the norm before clipping."""
    objective = _with_cross_entropy(config.objective)
    counted = sum(len(b.targets) for b in batches)
    total, sums = 0.0, np.zeros(len(objective.weights))
    for batch in batches:
        loss = batch_loss(model, batch, objective, tail, counted_tokens=counted, precision=config.precision)
        value = float(loss.total.detach())
        if not math.isfinite(value):
            bad_M = ~torch.isfinite(loss.values_MO).all(-1).cpu().numpy()
            rows = np.unique(batch.rows[batch.document_M[bad_M]]) if bad_M.any() else np.unique(batch.rows)
            raise TrainingError(f"the loss of step {step} is {value}; {_named(dataset, rows)}. {_REMEDY}")
        loss.total.backward()
        total += value
        sums += loss.values_MO.sum(0).double().cpu().numpy()
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf))
    if not math.isfinite(norm):
        rows = np.unique(np.concatenate([b.rows for b in batches]))
        raise TrainingError(f"the gradient norm of step {step} is {norm}; {_named(dataset, rows)}. {_REMEDY}")
    return {
        "loss": total,
        **dict(zip(objective.weights, (sums / max(counted, 1)).tolist(), strict=True)),
    }, norm


_REMEDY = "The weights are as before the step; lower learning_rate, or leave these rows out by a plan"


def _named(dataset: kdata.Dataset, rows: np.ndarray) -> str:
    ids = dataset.index(["id"])["id"].take(rows[:8]).to_pylist()
    return f"rows {', '.join(ids)}" + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


def _with_cross_entropy(objective: ObjectiveConfig) -> ObjectiveConfig:
    """The same mix with cross-entropy measured: every run reports it, and it costs nothing."""
    return objective.model_copy(update={"weights": {"cross_entropy": 0.0, **objective.weights}})


def _check_sizes(config: TrainConfig) -> int:
    """Return tokens of a micro-batch. Raises ConfigError where sizes do not divide or warm-up is too long."""
    micro = config.micro_batch_tokens or config.batch_tokens
    if micro % config.context_tokens or config.batch_tokens % micro:
        raise ConfigError(
            f"batch_tokens={config.batch_tokens}, micro_batch_tokens={micro} and "
            f"context_tokens={config.context_tokens}: each must be a multiple of the next"
        )
    if config.warmup_steps >= config.steps:
        raise ConfigError(f"warmup_steps={config.warmup_steps} must be less than steps={config.steps}")
    if isinstance(config.student, ScratchStudent) and config.student.max_positions < config.context_tokens:
        raise ConfigError(
            f"student.max_positions={config.student.max_positions} is less than context_tokens="
            f"{config.context_tokens}; raise it"
        )
    return micro


def device_name(device: Literal["auto", "cpu", "cuda"]) -> str:
    """Resolve `auto`. Raises ConfigError when cuda is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no CUDA device; set it to auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _loader_config(config: TrainConfig, micro_tokens: int) -> LoaderConfig:
    return LoaderConfig(
        context_tokens=config.context_tokens,
        batch_rows=micro_tokens // config.context_tokens,
        seed=config.seed,
        window_documents=config.window_documents,
        prefetch_batches=config.prefetch_batches,
    )


def _optimizer(model: PreTrainedModel, config: TrainConfig) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def _forget_after(metrics: Path, step: int) -> None:
    """Drop metrics of steps that a resumed run will do again, and a last line that was cut by a kill."""

    def kept() -> Iterator[str]:
        for line in metrics.read_text("utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    yield line + "\n"
            except json.JSONDecodeError:
                return

    if metrics.exists():
        text = "".join(kept())
        aside = metrics.with_suffix(".tmp")
        aside.write_text(text, encoding="utf-8")
        aside.replace(metrics)


def _save_model(model: PreTrainedModel, dataset: kdata.Dataset, folder: Path) -> None:
    """Write the student in Hugging Face format, with the dataset's tokenizer beside it."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    if dataset.tokenizer_dir is not None:
        shutil.copytree(dataset.tokenizer_dir, aside, dirs_exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
