"""The training loop: dataset + plan + student in, student out. Reads from top to bottom.

What is promised: the order of data is that of the plan and the seed, on any number of ranks; losses are per counted token
of the whole step, however it is cut into micro-batches and ranks; a run that is killed and started again gives bit-equal
losses on a CPU; a non-finite loss stops the run before the weights are touched.

    OUT/model/          the student in Hugging Face format, with the tokenizer
    OUT/train.json      TrainResult
    OUT/metrics.jsonl   one line per logged step
    OUT/checkpoints/    see kdata.trainer.checkpoint

Where the rest is: what a run is told (kdata.trainer.config), its data (kdata.trainer.stages), student and loss as one module
(kdata.trainer.learner), several ranks (kdata.trainer.distributed).

Shapes: M counted positions, O objectives.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

import kdata
from kdata.errors import ConfigError, TrainingError
from kdata.format.files import storage_errors
from kdata.observe.progress import Task
from kdata.trainer.checkpoint import load_checkpoint, save_checkpoint
from kdata.trainer.config import RUNTIME, SHARED, StageConfig, TrainConfig, TrainResult
from kdata.trainer.distributed import Ranks, accumulating, join, spread, whole
from kdata.trainer.learner import Learner, resolve_precision
from kdata.trainer.loader import Batch
from kdata.trainer.metrics import Metrics, check_installed
from kdata.trainer.objectives import ObjectiveConfig
from kdata.trainer.schedule import learning_rate
from kdata.trainer.stages import OpenStage, open_stages
from kdata.trainer.student import ScratchStudent, build_student, check_positions, num_parameters

__all__ = ["StageConfig", "TrainConfig", "TrainResult", "learning_rate", "train"]


@dataclass
class _Done:
    """What a run has behind it; goes into checkpoints. Tokens are of all ranks."""

    step: int = 0
    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Gradients:
    """One step's gradients are in the parameters; this is what is known of them, over all ranks.

    losses: nats per counted token. norm: before clipping. fill: share of cells that hold a token.
    """

    losses: dict[str, float]
    norm: float
    tokens: int
    target_tokens: int
    fill: float


def train(config: TrainConfig, dataset_path: Path | str, plan_path: Path | str | None, out_dir: Path) -> TrainResult:
    """Train a student, going on from a checkpoint in `out_dir` where there is one; alone, or as a rank under torchrun.

    Args:
        config: see TrainConfig.
        dataset_path: what `kdata.open` takes; the data of every stage that names no other.
        plan_path: a plan's Parquet file; None trains on every sequence once an epoch.
        out_dir: made when it does not exist.
    Raises:
        ConfigError: settings that do not go together, or an objective that the data cannot serve.
        MismatchError: student, plan or the stages' datasets do not belong together, or `out_dir` was begun with other
            settings.
        DataError: a document is longer than the context or than the student's positions, or there is nothing to train on.
        StorageError: `out_dir` cannot be made.
        DependencyError: a logger is not installed.
        TrainingError: a non-finite loss or gradient; the message names step and rows.
    """
    check_installed(config.loggers)
    with join(config.device) as ranks:
        return _train(config, dataset_path, plan_path, out_dir, ranks)


def _train(
    config: TrainConfig, dataset_path: Path | str, plan_path: Path | str | None, out_dir: Path, ranks: Ranks
) -> TrainResult:
    precision = resolve_precision(config.precision, ranks.device.type)
    config = config.model_copy(update={"precision": precision})
    _check_context(config)
    stages = open_stages(config, dataset_path, plan_path, ranks)
    with storage_errors(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    steps, rows_per_step = stages[-1].stage.end, config.batch_tokens // config.context_tokens
    torch.manual_seed(config.seed + ranks.rank)  # each rank its own dropout; the weights have a seed of their own
    student = build_student(config.student, stages[0].dataset, config.seed)
    for open_stage in stages:
        check_positions(student, open_stage.longest_tokens)
    params = num_parameters(student)
    student.train()
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own = Learner(student, precision)
    learner = spread(own, own.layers, config.parallel, ranks)
    optimizer = _optimizer(student, config)

    settings = _settings(config, stages)
    done, saved_step = _Done(), None
    saved = load_checkpoint(out_dir / "checkpoints", student, optimizer, settings, ranks)
    if saved is not None:
        done = _Done(**saved["progress"])
        saved_step = done.step
        for open_stage in stages:
            open_stage.load_state_dict(saved["data"])

    def checkpoint(open_stage: OpenStage) -> None:
        nonlocal saved_step
        if saved_step == done.step:  # the same again would have to replace the only one that there is
            return
        state = {"step": done.step, "progress": vars(done), "data": open_stage.state_dict(), "settings": settings}
        save_checkpoint(out_dir / "checkpoints", student, optimizer, state, ranks)
        saved_step = done.step

    progress = Task(f"train {config.label}", steps, unit="steps")
    metrics = Metrics(
        out_dir, config.loggers, label=config.label, settings=settings, step=done.step, write=ranks.is_main
    )
    with progress, metrics:
        progress.skip(done.step)
        for open_stage in stages:
            stage, batches = open_stage.stage, None
            while done.step < stage.end:
                started, step_in_stage = time.perf_counter(), done.step - stage.first_step
                told: dict[str, Any] = {}
                if open_stage.begins_period(done.step):
                    told = open_stage.begin_period(done.step, learner, rows_per_step, config.context_tokens, ranks)
                    batches = None
                waiting = time.perf_counter()
                batches = batches or iter(open_stage.source)
                step_batches = list(islice(batches, rows_per_step // open_stage.source.config.batch_rows))
                waited = time.perf_counter() - waiting

                rate = learning_rate(stage, step_in_stage)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                objective = stage.objective.at(step_in_stage, stage.steps)
                found = _gradients(learner, step_batches, objective, open_stage, config, ranks, done.step + 1)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

                seconds = time.perf_counter() - started
                done = _Done(
                    done.step + 1,
                    done.tokens + found.tokens,
                    done.target_tokens + found.target_tokens,
                    done.seconds + seconds,
                    done.waited + waited,
                    found.losses,
                )
                progress.advance(1, tokens=found.tokens, loss=found.losses["loss"])
                if done.step % config.log_every_steps == 0 or told or done.step in (1, stage.end):
                    line = {
                        "step": done.step,
                        "stage": stage.name,
                        **found.losses,
                        "lr": rate,
                        **({"weights": objective.numbers()} if objective != stage.objective else {}),
                        "grad_norm": found.norm,
                        "tokens": done.tokens,
                        "target_tokens": done.target_tokens,
                        "fill": found.fill,
                        "tokens_per_sec": found.tokens / seconds,
                        "wait_share": waited / seconds,
                        "seconds": done.seconds,
                        **({"mixture": told} if told else {}),
                    }
                    metrics.write(line)
                if config.checkpoint_every_steps and done.step % config.checkpoint_every_steps == 0:
                    checkpoint(open_stage)
        checkpoint(stages[-1])
    last = stages[-1]
    _save_model(student, last.dataset, out_dir / "model", ranks)
    result = TrainResult(
        label=config.label,
        model_dir="model",
        metrics=metrics.path.name,
        params=params,
        steps=done.step,
        tokens=done.tokens,
        target_tokens=done.target_tokens,
        train_seconds=done.seconds,
        wait_share=done.waited / max(done.seconds, 1e-9),
        losses=done.losses,
        plan=None if last.plan is None else last.plan.info.name,
        dataset_digest=last.dataset.content_digest,
        config=config,
    )
    if ranks.is_main:
        (out_dir / "train.json").write_text(result.model_dump_json(indent=1), encoding="utf-8")
    return result


def _gradients(
    learner: nn.Module,
    batches: list[Batch],
    objective: ObjectiveConfig,
    open_stage: OpenStage,
    config: TrainConfig,
    ranks: Ranks,
    step: int,
) -> _Gradients:
    """Accumulate one step's gradients over micro-batches and ranks, and clip them.

    Raises:
        TrainingError: a loss or the gradient is not finite, on whatever rank; every rank raises it.
    """
    # Every run reports the cross-entropy, which costs next to nothing.
    measured = objective.model_copy(update={"weights": {"cross_entropy": 0.0, **objective.numbers()}})
    sizes = [[len(b.targets), b.num_tokens, b.input_ids.numel()] for b in batches]
    counted, tokens, cells = ranks.sum(np.array(sizes).sum(0)).astype(np.int64).tolist()
    parts: list[tuple[Tensor, Tensor]] = []
    for number, batch in enumerate(batches):
        with accumulating(learner, last=number + 1 == len(batches)):
            total, values_MO = learner(batch, measured, open_stage.tail, counted)
            (total * ranks.world_size).backward()  # gradients are averaged over ranks
        parts.append((total.detach(), values_MO))
    sums = torch.stack([torch.cat([total[None], values_MO.sum(0)]).double() for total, values_MO in parts]).sum(0)
    loss, *values = ranks.sum(sums.cpu().numpy()).tolist()
    if not math.isfinite(loss):
        rows = [_bad_rows(b, values_MO) for b, (_, values_MO) in zip(batches, parts, strict=True)]
        raise TrainingError(f"the loss of step {step} is {loss}; {_named(open_stage.dataset, rows, ranks)}. {_REMEDY}")
    parameters = [p for p in learner.parameters() if p.requires_grad]
    norm_or_part = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
    norm = float(norm_or_part.full_tensor() if isinstance(norm_or_part, DTensor) else norm_or_part)
    if not math.isfinite(norm):
        rows = [b.rows for b in batches]
        named = _named(open_stage.dataset, rows, ranks)
        raise TrainingError(f"the gradient norm of step {step} is {norm}; {named}. {_REMEDY}")
    per_token = [value / max(counted, 1) for value in values]
    losses = {"loss": loss, **dict(zip(measured.weights, per_token, strict=True))}
    return _Gradients(losses, norm, tokens, counted, tokens / cells)


_REMEDY = "The weights are as before the step; lower learning_rate, or leave these rows out by a plan"


def _bad_rows(batch: Batch, values_MO: Tensor) -> np.ndarray:
    """Global rows of the documents with a value that is not finite, int64."""
    bad_M = ~torch.isfinite(values_MO).all(-1).cpu().numpy()
    return batch.rows[np.unique(batch.document_M[bad_M])]


def _named(dataset: kdata.Dataset, rows: list[np.ndarray], ranks: Ranks) -> str:
    """Ids of rows of every rank, in words; where no value is to blame, the sum of them is."""
    found = np.unique(np.concatenate(ranks.gather(np.concatenate(rows))))
    if not len(found):
        return "every value is finite, their sum is not"
    ids = dataset.index(["id"])["id"].take(found[:8]).to_pylist()
    return f"rows {', '.join(ids)}" + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def _check_context(config: TrainConfig) -> None:
    student = config.student
    if isinstance(student, ScratchStudent) and student.max_positions < config.context_tokens:
        raise ConfigError(
            f"student.max_positions={student.max_positions} is less than context_tokens={config.context_tokens}; raise it"
        )


def _settings(config: TrainConfig, stages: list[OpenStage]) -> dict[str, Any]:
    """What a run must repeat to go on: everything that decides its numbers. Data by content, not by path."""
    run = config.model_dump(mode="json", exclude={*RUNTIME, *SHARED, "stages"})
    by_stage = {s.stage.name: {**s.stage.settings(), "data": s.identity} for s in stages}
    return {**run, "stages": by_stage}


def _optimizer(model: PreTrainedModel, config: TrainConfig) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def _save_model(student: PreTrainedModel, dataset: kdata.Dataset, folder: Path, ranks: Ranks) -> None:
    """Write the student in Hugging Face format, with the dataset's tokenizer beside it."""
    parts = {id(tensor): whole(tensor) for tensor in student.state_dict(keep_vars=True).values()}
    state = {name: parts[id(tensor)] for name, tensor in student.state_dict(keep_vars=True).items()}
    if ranks.is_main:
        aside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        student.save_pretrained(aside, state_dict=state)
        if dataset.tokenizer_dir is not None:
            shutil.copytree(dataset.tokenizer_dir, aside, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    ranks.wait()
