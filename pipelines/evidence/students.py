"""One student: trained by `kdata.trainer` on equal terms with all others of its seed, and measured on held-out text."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import kdata
from kdata.pipelines.evidence.runs import Figures
from kdata.trainer.config import TrainConfig
from kdata.trainer.evaluate import evaluate
from kdata.trainer.learner import Learner
from kdata.trainer.train import LearnerOf, train


def train_and_measure(
    config: TrainConfig,
    dataset: kdata.Dataset,
    heldout: kdata.Dataset,
    learner_of: LearnerOf = Learner,
    plan: str | None = None,
) -> Figures:
    """Train one student and measure it on held-out text.

    Args:
        config: see `kdata.trainer.train.train`; `data_order: seed` gives students of one seed the same batches.
        learner_of, plan: see `kdata.trainer.train.train`.
    Returns:
        nll, kl, ece, top1, teacher_nll, teacher_ece over the held-out text, and `bits_per_byte` of it; final_loss in nats per
        counted token; tokens; tokens_per_sec, per second of processor time of the whole training; params.
    Raises:
        See `kdata.trainer.train.train`.
    """
    with tempfile.TemporaryDirectory(prefix="kdata-evidence-") as folder:
        started = time.process_time()
        result = train(config, dataset.path, plan, Path(folder), learner_of=learner_of)
        seconds = time.process_time() - started
        overall = evaluate(Path(folder) / result.model_dir, heldout.path)["overall"]
    names = ("nll", "kl", "ece", "top1", "teacher_nll", "teacher_ece")
    return {
        **{name: overall[name] for name in names},
        **bits_per_byte(overall),
        "final_loss": result.losses["loss"],
        "tokens": result.tokens,
        "tokens_per_sec": result.tokens / seconds,
        "params": result.params,
    }


def bits_per_byte(figures: Figures) -> Figures:
    """Bits per byte of student and teacher on the same text, by figures of `evaluate`; None where bytes are not known."""
    student, nll, teacher_nll = (figures[name] for name in ("bits_per_byte", "nll", "teacher_nll"))
    is_known = student is not None and nll and teacher_nll is not None
    return {
        "bits_per_byte": student,
        "teacher_bits_per_byte": student * teacher_nll / nll if is_known else None,  # type: ignore[operator]
    }
