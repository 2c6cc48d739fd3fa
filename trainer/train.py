"""The training loop: dataset + plan + student in, student out. It reads from top to bottom.

Guarantees: the order of the data follows from the plan and the seed, on any number of ranks. Losses are per counted token of
the whole step, however the step is split into micro-batches and ranks. A run that is killed and started again gives
bit-equal losses on a CPU. A non-finite loss stops the run before the weights change.

    OUT/model/          the student in Hugging Face format, with the tokenizer; with `student.lora`, its adapter
    OUT/models/         the student of every `keep_models_every_steps` steps; with `student.lora`, its adapter. A run that
                        starts without a checkpoint removes those of a former one.
    OUT/adapter/        the adapter, where `student.lora.merge` asks for the whole student in OUT/model
    OUT/dequantized/    of a quantized student its rounded weights as an ordinary model, see kdata.trainer.quantization
    OUT/importance.parquet  why a pruned student has the parts that it has, see kdata.trainer.importance
    OUT/train.json      TrainResult
    OUT/metrics.jsonl   one line per logged step
    OUT/checkpoints/    see kdata.trainer.checkpoint

Elsewhere: settings (kdata.trainer.config), the data of each phase (kdata.trainer.phases), student and loss as one module
(kdata.trainer.learner), several ranks (kdata.trainer.distributed).

Shapes: M counted positions, O objectives.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

import kdata
from kdata.calls import validated
from kdata.errors import ConfigError, CorruptError, DataError, StorageError, TrainingError
from kdata.format.files import copy_files, folder_beside, lock_of, sync_directory, sync_tree, write_atomically
from kdata.observe.progress import Task
from kdata.store.pretrained import without_bars
from kdata.store.token_map import MATCHED
from kdata.trainer.acceleration import check_acceleration, compile_layers
from kdata.trainer.adapters import frozen_digest, has_adapters, open_adapter, save_adapter
from kdata.trainer.checkpoint import CheckpointState, Progress, load_checkpoint, save_checkpoint, step_folders, writing
from kdata.trainer.config import (
    MODELS,
    RUNTIME,
    SHARED,
    CheckpointStudent,
    PhaseConfig,
    Precision,
    QuantizeConfig,
    ScratchStudent,
    TrainConfig,
    TrainResult,
)
from kdata.trainer.distributed import Ranks, accumulating, join, spread, whole
from kdata.trainer.documents import refuse_unfit
from kdata.trainer.encoder_decoder import prepare, with_prompts
from kdata.trainer.importance import IMPORTANCE_FILE, Importance
from kdata.trainer.input_mask import check_mask, masked
from kdata.trainer.learner import Learner, resolve_precision
from kdata.trainer.loader import Batch
from kdata.trainer.metrics import Metrics, check_installed
from kdata.trainer.objective_config import CHUNK_OBJECTIVES, ObjectiveConfig
from kdata.trainer.optimizers import check_optimizer, make_optimizer
from kdata.trainer.phases import OpenPhase, open_phases, others_of
from kdata.trainer.quantization import dequantized, quantized
from kdata.trainer.schedule import learning_rate
from kdata.trainer.student import attend_by_documents, build_student, check_positions, importance_in, num_parameters

__all__ = ["PhaseConfig", "TrainConfig", "TrainResult", "learning_rate", "train"]

LearnerOf = Callable[[PreTrainedModel, Precision], Learner]


@dataclass(frozen=True)
class _Gradients:
    """Facts about one step, over all ranks, whose gradients are in the parameters.

    losses: nats per counted token. norm: before clipping. fill: share of token positions that are not padding.
    """

    losses: dict[str, float]
    norm: float
    tokens: int
    target_tokens: int
    fill: float


@validated
def train(
    config: TrainConfig,
    dataset: Path | str,
    plan: Path | str | None,
    out_dir: Path,
    *,
    learner_of: LearnerOf = Learner,
) -> TrainResult:
    """Train a student, or resume from a checkpoint in `out_dir`; alone, or as one of the ranks that torchrun started.

    Args:
        config: see TrainConfig.
        dataset: a folder, a URL or hf://OWNER/NAME, as for `kdata.open`; used in every phase that names no other.
        plan: name of a plan in the dataset, or a plan file; None: every sequence once an epoch.
        out_dir: created if it does not exist. Nothing is written before settings, data and student have been checked.
        learner_of: builds student and loss as one module from (student, precision); another loss is a subclass of Learner
            whose values are one column per objective of the mix, the cross-entropy first.
    Raises:
        MissingError: a dataset, a plan or the student's checkpoint does not exist.
        ConfigError: settings contradict each other, or the data cannot serve an objective.
        MismatchError: student, plan and datasets do not belong together, or `out_dir` was begun with other settings.
        DataError: a document is longer than the context or than the student's positions, or there is nothing to train on.
        StorageError: `out_dir` cannot be written, or another process writes to it.
        CorruptError: the checkpoint in `out_dir` is damaged.
        DependencyError: a logger, PEFT (for adapters), torchao (for quantized students) or bitsandbytes (for an 8-bit
            optimizer) is not installed.
        TrainingError: a loss or a gradient is not finite; the message names step and rows.
    """
    check_installed(config.loggers)
    check_optimizer(config)
    with join(config.device) as ranks, ExitStack() as stack:
        return _train(config, dataset, plan, out_dir, learner_of, ranks, stack)


def _train(
    config: TrainConfig,
    dataset: Path | str,
    plan: Path | str | None,
    out_dir: Path,
    learner_of: LearnerOf,
    ranks: Ranks,
    stack: ExitStack,
) -> TrainResult:
    precision = resolve_precision(config.precision, ranks.device.type)
    config = config.model_copy(update={"precision": precision})
    _check_context(config)
    check_acceleration(config.attention, config.compile, ranks.device, precision)
    phases = open_phases(config, dataset, plan, ranks)
    steps, rows_per_step = phases[-1].phase.end, config.batch_tokens // config.context_tokens
    torch.manual_seed(config.seed + ranks.rank)  # each rank has its own dropout; the weights have a seed of their own
    student = build_student(
        config.student, phases[0].dataset, config.seed, others_of(phases), rows=phases[0].loader.rows, ranks=ranks,
        importance=out_dir / IMPORTANCE_FILE,
    )  # fmt: skip
    refuse_unfit(student, config, ranks.world_size)
    chosen = importance_in(student)
    for open_phase in phases:
        check_positions(student, open_phase.longest_tokens)
    prepare(student, config, [(phase.dataset, phase.drawn_rows, phase.loader.positions) for phase in phases])
    check_mask(config.input_mask, student)
    if config.attention == "varlen":
        student.to(ranks.device)  # type: ignore[arg-type]  # transformers wraps Module.to
        attend_by_documents(student)
    frozen = frozen_digest(student) if has_adapters(student) else None
    _hold(out_dir, ranks, stack)
    _make_writable(out_dir)
    params = num_parameters(student)
    student.train()
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    bare_learner = learner_of(student, precision)
    layers = bare_learner.layers
    if config.compile:
        compile_layers(layers)
    learner = spread(bare_learner, layers, config.parallel, ranks)
    optimizer = make_optimizer(student, config, ranks)

    settings = _settings(config, phases, frozen, chosen)
    progress, saved_step = Progress(), None
    saved = load_checkpoint(out_dir / "checkpoints", student, optimizer, settings, ranks, last_step=steps)
    if chosen is not None and ranks.is_main:  # not before: a start that is refused leaves the file of the other run
        with writing(out_dir):
            write_atomically(out_dir / IMPORTANCE_FILE, chosen.to_bytes())
    if saved is not None:
        progress = saved.progress
        saved_step = progress.step
        _restore_data(phases, saved, out_dir)
    elif ranks.is_main:
        _remove_former_models(out_dir / MODELS)

    def checkpoint(open_phase: OpenPhase) -> None:
        nonlocal saved_step
        if saved_step == progress.step:  # writing it again would replace the only checkpoint
            return
        state = CheckpointState(step=progress.step, progress=progress, data=open_phase.state_dict(), settings=settings)
        with writing(out_dir):
            save_checkpoint(out_dir / "checkpoints", student, optimizer, state, ranks)
        saved_step = progress.step

    bar = Task(f"train {config.label}", steps, unit="steps")
    with writing(out_dir):
        metrics = Metrics(
            out_dir, config.loggers, label=config.label, settings=settings, step=progress.step, write=ranks.is_main
        )
    with bar, metrics:
        bar.skip(progress.step)
        for open_phase in phases:
            phase, batches = open_phase.phase, None
            while progress.step < phase.end:
                started, step_in_phase = time.perf_counter(), progress.step - phase.first_step
                period: dict[str, Any] = {}
                if open_phase.begins_period(progress.step):
                    period = open_phase.begin_period(
                        progress.step, learner, rows_per_step, config.context_tokens, ranks
                    )
                    batches = None
                waiting = time.perf_counter()
                batches = batches or iter(open_phase.loader)
                step_batches = list(islice(batches, rows_per_step // open_phase.loader.config.batch_rows))
                waited = time.perf_counter() - waiting
                if config.input_mask is not None:
                    step_batches = [masked(b, config.input_mask, config.seed, progress.step) for b in step_batches]
                step_batches = [with_prompts(student, batch) for batch in step_batches]

                rate = learning_rate(phase, step_in_phase)
                optimizer.set_rate(rate)
                objective = open_phase.objective_at(step_in_phase)
                gradients = _gradients(learner, step_batches, objective, open_phase, config, ranks, progress.step + 1)
                optimizer.step()
                optimizer.zero_grad()
                if open_phase.interpolation is not None:
                    open_phase.interpolation.update(gradients.losses["taid"], step_in_phase, phase.steps)

                seconds = time.perf_counter() - started
                progress = Progress(
                    step=progress.step + 1,
                    tokens=progress.tokens + gradients.tokens,
                    target_tokens=progress.target_tokens + gradients.target_tokens,
                    seconds=progress.seconds + seconds,
                    waited=progress.waited + waited,
                    losses=gradients.losses,
                )
                bar.advance(1, tokens=gradients.tokens, loss=gradients.losses["loss"])
                if progress.step % config.log_every_steps == 0 or period or progress.step in (1, phase.end):
                    line = {
                        "step": progress.step,
                        "phase": phase.name,
                        **gradients.losses,
                        "lr": rate,
                        **({"weights": objective.numbers()} if objective.weights != phase.objective.weights else {}),
                        **({"taid_t": objective.interpolation()} if "taid" in objective.weights else {}),
                        "grad_norm": gradients.norm,
                        "tokens": progress.tokens,
                        "target_tokens": progress.target_tokens,
                        "fill": gradients.fill,
                        "tokens_per_sec": gradients.tokens / seconds,
                        "wait_share": waited / seconds,
                        "seconds": progress.seconds,
                        **({"mixture": period} if period else {}),
                    }
                    with writing(out_dir):
                        metrics.write(line)
                kept_steps = config.keep_models_every_steps
                if kept_steps and progress.step % kept_steps == 0:  # before the checkpoint, which would skip it
                    with writing(out_dir):
                        (out_dir / MODELS).mkdir(exist_ok=True)
                        kept = out_dir / MODELS / f"step-{progress.step:08d}"
                        _save_student(student, config, open_phase.dataset, kept, ranks)
                if config.checkpoint_every_steps and progress.step % config.checkpoint_every_steps == 0:
                    checkpoint(open_phase)
        if not progress.target_tokens:
            raise DataError(
                f"no token of {steps:,} steps counted, so the student learned nothing; train for more steps, or on other rows"
            )
        checkpoint(phases[-1])
    last = phases[-1]
    result = TrainResult(
        label=config.label,
        model_dir="model",
        metrics=metrics.path.name,
        params=params,
        steps=progress.step,
        tokens=progress.tokens,
        target_tokens=progress.target_tokens,
        train_seconds=progress.seconds,
        wait_share=progress.waited / max(progress.seconds, 1e-9),
        losses=dict(sorted(progress.losses.items())),  # the same order after a resume
        plan=None if last.plan is None else last.plan.info.name,
        dataset_digest=last.dataset.content_digest,
        config=config,
    )
    with writing(out_dir):
        _save_student(student, config, last.dataset, out_dir / "model", ranks, beside=out_dir)
        if ranks.is_main:
            write_atomically(out_dir / "train.json", result.model_dump_json(indent=1).encode())
    return result


def _gradients(
    learner: nn.Module,
    batches: list[Batch],
    objective: ObjectiveConfig,
    open_phase: OpenPhase,
    config: TrainConfig,
    ranks: Ranks,
    step: int,
) -> _Gradients:
    """Accumulate the gradients of one step over micro-batches and ranks, and clip them.

    Raises:
        TrainingError: a loss or the gradient is not finite on some rank; every rank raises it.
    """
    # Every run reports the cross-entropy; at weight 0 it costs next to nothing.
    measured = objective.model_copy(update={"weights": {"cross_entropy": 0.0, **objective.numbers()}})
    sizes = [[len(b.targets), b.num_tokens, b.input_ids.numel(), b.targets.num_elsewhere] for b in batches]
    counted, tokens, positions, elsewhere = ranks.sum(np.array(sizes).sum(0)).astype(np.int64).tolist()
    total_weight = float(ranks.sum(np.array([math.fsum(b.targets.total_weight for b in batches)]))[0])
    parts: list[tuple[Tensor, Tensor]] = []
    for number, batch in enumerate(batches):
        with accumulating(learner, last=number + 1 == len(batches)):
            total, values_MO = learner(batch, measured, open_phase.tail, total_weight)
            (total * ranks.world_size).backward()  # DDP and FSDP2 average gradients over ranks
        parts.append((total.detach(), values_MO))
    of_chunks = [name in CHUNK_OBJECTIVES for name in measured.weights]
    sums = torch.stack([_sums(b, *part, of_chunks).double() for b, part in zip(batches, parts, strict=True)]).sum(0)
    loss, elsewhere_sum, *values = ranks.sum(sums.cpu().numpy()).tolist()
    if not math.isfinite(loss):
        rows = [_bad_rows(b, values_MO) for b, (_, values_MO) in zip(batches, parts, strict=True)]
        named = _named(open_phase.dataset, rows, ranks)
        raise TrainingError(f"the loss of step {step} is {loss}; {named}. {_REMEDY}")
    parameters = [p for p in learner.parameters() if p.requires_grad]
    norm_or_part = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
    norm = float(norm_or_part.full_tensor() if isinstance(norm_or_part, DTensor) else norm_or_part)
    if not math.isfinite(norm):
        named = _named(open_phase.dataset, [b.rows for b in batches], ranks)
        raise TrainingError(f"the gradient norm of step {step} is {norm}; {named}. {_REMEDY}")
    chosen_weight = (total_weight - elsewhere) or 1
    per_token = [
        value / (total_weight if name in CHUNK_OBJECTIVES else chosen_weight)
        for name, value in zip(measured.weights, values, strict=True)
    ]
    losses = {"loss": loss, **dict(zip(measured.weights, per_token, strict=True))}
    if objective.cross_entropy_elsewhere is not None:
        losses["cross_entropy_elsewhere"] = elsewhere_sum / max(elsewhere, 1)
    return _Gradients(losses, norm, tokens, counted, tokens / positions)


def _sums(batch: Batch, total: Tensor, values_MO: Tensor, of_chunks: list[bool]) -> Tensor:
    """Loss of a batch, sum of the cross-entropy where nothing else counts, and sum of each objective; [2 + O].

    Args:
        values_MO: the objectives, the cross-entropy first.
        of_chunks: which of them count at every target.
    """
    targets = batch.targets
    own = torch.where(torch.tensor(of_chunks).to(values_MO.device), values_MO.sum(0), targets.sums(values_MO))
    elsewhere = total.new_zeros(1) if targets.chosen_C is None else (~targets.chosen_C).to(own) @ values_MO[:, :1]
    return torch.cat([total[None], elsewhere, own])


_REMEDY = "The weights are as before the step; lower learning_rate, or leave these rows out with a plan"


def _bad_rows(batch: Batch, values_MO: Tensor) -> np.ndarray:
    """Global rows of the documents with a value that is not finite, int64."""
    bad_M = ~torch.isfinite(values_MO).all(-1).cpu().numpy()
    rows: np.ndarray = batch.rows[np.unique(batch.document_M[bad_M])]
    return rows


def _named(dataset: kdata.Dataset, rows: list[np.ndarray], ranks: Ranks) -> str:
    """The ids of these rows of all ranks, in words. Without rows: every value is finite and only the sum is not."""
    all_rows = np.unique(np.concatenate(ranks.gather(np.concatenate(rows))))
    if not len(all_rows):
        return "every value is finite, their sum is not"
    ids = dataset.index(["id"])["id"].take(all_rows[:8]).to_pylist()
    return f"rows {', '.join(ids)}" + (f" and {len(all_rows) - 8} more" if len(all_rows) > 8 else "")


def _check_context(config: TrainConfig) -> None:
    student = config.student
    if not isinstance(student, ScratchStudent) or student.architecture == "mamba":
        return
    if student.max_positions < config.context_tokens:
        raise ConfigError(
            f"student.max_positions={student.max_positions} is less than context_tokens={config.context_tokens}; raise it"
        )


def _hold(out_dir: Path, ranks: Ranks, stack: ExitStack) -> None:
    """Have the main rank hold the lock of the output folder until `stack` is closed.

    Every rank raises StorageError where another process holds it, ConfigError where it is a dataset.
    """
    refusal: StorageError | ConfigError | None = None
    if ranks.is_main:
        try:
            stack.enter_context(lock_of(out_dir))
            if (out_dir / "dataset.json").exists() or (out_dir / "manifest.jsonl").exists():
                raise ConfigError(f"{out_dir} is a dataset; name another folder for what is trained (--out)")
        except (StorageError, ConfigError) as error:
            refusal = error
    if ranks.sum(np.array([refusal is not None])).any():
        raise refusal or StorageError(f"{out_dir} cannot be used; the main rank says why")


def _restore_data(phases: list[OpenPhase], saved: CheckpointState, out_dir: Path) -> None:
    """Put the loader and the domain weights of the checkpoint's phase where they were."""
    name = saved.data.get("phase")
    try:
        if not any(p.phase.name == name and p.phase.first_step < saved.step <= p.phase.end for p in phases):
            raise CorruptError(f"step {saved.step} is not in its phase {name!r}")
        for open_phase in phases:
            open_phase.load_state_dict(saved.data)
    except CorruptError as error:
        place = out_dir / "checkpoints"
        raise CorruptError(
            f"{place}/step-{saved.step:08d}/state.json is damaged: {error}. Restore it from a copy, or remove {place} to "
            "train from the start."
        ) from error


def _remove_former_models(root: Path) -> None:
    """Remove the models that a run kept which this one does not continue: they are no part of this one's course."""
    with writing(root):
        for folder in step_folders(root):
            by_run = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
            if folder.is_symlink() or not by_run:
                continue
            with folder_beside(folder) as aside:  # renamed first, so that one that is half removed does not look whole
                os.rename(folder, aside / folder.name)


def _make_writable(out_dir: Path) -> None:
    """Create the output folder and write a byte. Raises StorageError now rather than at the first checkpoint."""
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir) as file:
            file.write(b"0")


def _settings(
    config: TrainConfig, phases: list[OpenPhase], frozen: str | None, chosen: Importance | None
) -> dict[str, Any]:
    """The settings that decide a run's numbers, which a resumed run must repeat. Data by content, not by path.

    Args:
        frozen: digest of the weights that are not trained, which a checkpoint leaves out; None: all are trained.
        chosen: the parts of a model that a pruned student began with; None: it is no pruned student.
    """
    run = config.model_dump(mode="json", exclude={*RUNTIME, *SHARED, "phases"})
    if run["optimizer"] == "adamw":
        del run["optimizer"]  # as in runs that began before there were others
    if frozen is not None:
        run["student"]["lora"].pop("merge")
        run["student"]["frozen_digest"] = frozen
    if chosen is not None:
        run["student"]["kept_digest"] = chosen.digest
    by_phase = {p.phase.name: {**p.phase.settings(), "data": p.identity} for p in phases}
    return {**run, "phases": by_phase}


def _save_student(
    student: PreTrainedModel,
    config: TrainConfig,
    dataset: kdata.Dataset,
    folder: Path,
    ranks: Ranks,
    *,
    beside: Path | None = None,
) -> None:
    """Write the student to a folder: its adapters, or with `lora.merge` the whole of it; with `quantize`, rounded weights.

    Args:
        beside: where the other form goes, `adapter` or `dequantized`; None: it is not written, and adapters are not merged.
    """
    lora = config.student.lora if isinstance(config.student, CheckpointStudent) else None
    if lora is None:
        parts = {id(tensor): whole(tensor) for tensor in student.state_dict(keep_vars=True).values()}
        state = {name: parts[id(tensor)] for name, tensor in student.state_dict(keep_vars=True).items()}
        if isinstance(config.student, CheckpointStudent) and (rounding := config.student.quantize) is not None:
            if beside is not None:
                save = partial(_save_rounded, dequantized, student, rounding, state)
                _commit(save, dataset, beside / "dequantized", ranks)
            _commit(partial(_save_rounded, quantized, student, rounding, state), dataset, folder, ranks)
            return
        _commit(lambda aside: student.save_pretrained(aside, state_dict=state), dataset, folder, ranks)
        return
    trained = {name: whole(p) for name, p in student.named_parameters() if p.requires_grad}
    adapter = beside / "adapter" if lora.merge and beside is not None else folder
    _commit(lambda aside: save_adapter(student, trained, aside), dataset, adapter, ranks)
    if adapter != folder:
        # From disk: what is merged is what was written, and on several ranks no rank holds the student whole.
        _commit(lambda aside: open_adapter(adapter).save_pretrained(aside), dataset, folder, ranks)


def _save_rounded(
    form: Callable[[PreTrainedModel, QuantizeConfig, dict[str, Tensor]], PreTrainedModel],
    student: PreTrainedModel,
    rounding: QuantizeConfig,
    state: dict[str, Tensor],
    folder: Path,
) -> None:
    form(student, rounding, state).save_pretrained(folder)


def _commit(write: Callable[[Path], None], dataset: kdata.Dataset, folder: Path, ranks: Ranks) -> None:
    """Write a folder on the main rank, with the dataset's tokenizer, and put it where it belongs when it is whole."""
    if ranks.is_main:
        with folder_beside(folder) as aside, folder_beside(folder) as former:
            with without_bars():
                write(aside)
            if dataset.tokenizer_dir is not None:
                copy_files(dataset.tokenizer_dir, aside)
                (aside / MATCHED).unlink(missing_ok=True)  # of the dataset, not of its tokenizer
            sync_tree(aside)
            if folder.is_symlink() or folder.exists():
                os.rename(folder, former / folder.name)
            os.rename(aside, folder)
            sync_directory(folder.parent)
    ranks.wait()
