"""One student: trained on equal terms with all others of its seed, and measured on held-out text.

The parts are the trainer's (student, loader, loss, learning rate, AdamW); its loop is written out once more for two things
that `trainer.train` rightly has not: full distillation in the loop, and one order of batches for datasets that differ in what
they keep. Where both can do it, they do the same (tests/pipelines/test_evidence.py).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

import kdata
from kdata.errors import TrainingError
from kdata.loader.batches import LoaderConfig
from kdata.pipelines.evidence.runs import Figures
from kdata.trainer.config import TrainConfig
from kdata.trainer.evaluate import evaluate
from kdata.trainer.learner import Learner, resolve_precision
from kdata.trainer.loader import Loader
from kdata.trainer.objectives import resolve_tail
from kdata.trainer.schedule import learning_rate
from kdata.trainer.student import build_student, num_parameters

LearnerOf = Callable[[PreTrainedModel], Learner]
# One order of batches for every dataset of a corpus: the loader mixes this with the seed, not the dataset's fingerprint.
SAME_ORDER = "0" * 64


@dataclass(frozen=True)
class Trained:
    """A student, the losses of its steps in nats per counted token, and what it took: seconds are of processor time."""

    student: PreTrainedModel
    losses: list[float]
    tokens: int
    seconds: float


def train_student(
    config: TrainConfig, dataset: kdata.Dataset, learner_of: LearnerOf | None = None, *, order: str | None = SAME_ORDER
) -> Trained:
    """Train one student in this process, on one thread's worth of micro-batches.

    Args:
        config: as for `kdata.trainer.train.train`; one stage, no mixture.
        learner_of: student and loss as one module; None: the trainer's own.
        order: what decides the order of documents beside the seed; None: the dataset, as in `trainer.train`.
    Raises:
        TrainingError: a loss that is not finite.
        Others: see `kdata.trainer.train.train`.
    """
    stage = config.resolved_stages()[0]
    tail = resolve_tail(config.objective, dataset.info.tail, kind=dataset.info.codec.kind)
    torch.manual_seed(config.seed)
    student = build_student(config.student, dataset, config.seed)
    student.train()
    precision = resolve_precision(config.precision, "cpu")
    learner = (learner_of or (lambda model: Learner(model, precision)))(student)
    matrices = [p for p in student.parameters() if p.ndim >= 2]
    vectors = [p for p in student.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    rows = config.batch_tokens // config.context_tokens
    loader = Loader(
        dataset, None, LoaderConfig(context_tokens=config.context_tokens, batch_rows=rows, seed=config.seed)
    )
    if order is not None:
        loader.arrays.identity = order
    losses: list[float] = []
    tokens, started = 0, time.process_time()
    for step, batch in zip(range(stage.steps), loader, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        objective = stage.objective.at(step, stage.steps)
        # With the cross-entropy beside it at weight 0, as the trainer's loop has it: bit-equal losses.
        measured = objective.model_copy(update={"weights": {"cross_entropy": 0.0, **objective.numbers()}})
        total, _ = learner(batch, measured, tail, len(batch.targets))
        losses.append(float(total.detach()))
        if not losses[-1] < float("inf"):
            raise TrainingError(f"the loss of step {step + 1} is {losses[-1]}; lower learning_rate")
        total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += batch.num_tokens
    return Trained(student, losses, tokens, time.process_time() - started)


def measure_student(trained: Trained, heldout: kdata.Dataset) -> Figures:
    """What `kdata evaluate` says of it, and how fast it learnt: tokens per second of processor time."""
    with tempfile.TemporaryDirectory(prefix="kdata-evidence-") as folder:
        trained.student.save_pretrained(folder)
        overall = evaluate(Path(folder), heldout.path)["overall"]
    names = ("nll", "kl", "ece", "top1", "teacher_nll", "teacher_ece")
    return {
        **{name: overall[name] for name in names},
        "final_loss": trained.losses[-1],
        "tokens": trained.tokens,
        "tokens_per_sec": trained.tokens / trained.seconds,
        "params": num_parameters(trained.student),
    }
