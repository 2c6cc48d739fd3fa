"""The gradient of a real student from stored targets beside that of full distillation: angle, length, error.

    python -m tests.benchmarks.angles --teacher MODEL --corpus FILE.parquet --student MODEL --out FOLDER [--rows 8]

One batch of the training data, in float32. `tests/benchmarks/codec.py` has the same for a teacher of made-up logits, with its
variance. FOLDER keeps what the teacher read, so that another call does not ask it again. Prints a table; JSON last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from kdata.format.keep import KeepConfig
from kdata.loader.batches import BatchesConfig
from kdata.pipelines.evidence.data import DataConfig, EvidenceData
from kdata.pipelines.evidence.offline import find
from kdata.pipelines.evidence.online import OnlineLearner
from kdata.store.dataset import Dataset
from kdata.trainer.config import CheckpointStudent
from kdata.trainer.learner import Learner
from kdata.trainer.loader import Loader
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.phases import SEED_ORDER
from kdata.trainer.student import build_student
from tests.benchmarks.step import machine

SETTINGS = ("threshold 0.03 (default)", "hybrid 8 + 28", "sampled 12", "topk 64, ghost", "topk 64, renormalised")


def main() -> int:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.angles", description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", required=True, help="a model's folder, or a GGUF file")
    parser.add_argument("--corpus", required=True, help="a Parquet file with id, domain and text")
    parser.add_argument("--student", required=True, help="a model's folder")
    parser.add_argument("--out", type=Path, required=True, help="a folder for what the teacher read")
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch, of at most 256 tokens")
    parser.add_argument("--skip", type=int, default=0, help="batches to leave out first")
    parser.add_argument("--train-tokens", type=int, default=14_000, help="text for the teacher to read")
    parser.add_argument("--only", action="append", choices=SETTINGS, help="this setting; can be repeated")
    options = parser.parse_args()
    config = DataConfig(
        teacher=options.teacher, corpus=options.corpus, train_tokens=options.train_tokens, heldout_tokens=1000
    )
    data = EvidenceData(config, options.out)
    base = data.train(KeepConfig())
    student = build_student(CheckpointStudent(model=options.student), base, 0)

    def batch_of(dataset: Dataset) -> Any:
        config = BatchesConfig(context_tokens=256, batch_rows=options.rows, seed=0)
        return next(itertools.islice(Loader(dataset, None, config, order_key=SEED_ORDER), options.skip, None))

    def gradient(learner: Learner, batch: Any, objective: ObjectiveConfig, tail: str) -> list[torch.Tensor]:
        student.zero_grad(set_to_none=True)
        learner(batch, objective, tail, float(batch.targets.token_ids_C.numel()))[0].backward()
        return [p.grad.detach().clone() for p in student.parameters() if p.grad is not None]

    batch = batch_of(base)
    online = OnlineLearner(student, "fp32", data.states("train"), base)
    full = gradient(online, batch, ObjectiveConfig(), "ghost")
    length = math.sqrt(_dot(full, full))
    measured = []
    print("| targets | angle, degrees | length | relative error |\n|---|---|---|---|")
    for name in options.only or SETTINGS:
        setting = find(name)
        assert setting.keep is not None
        dataset = data.train(setting.keep)
        tail = setting.tail if setting.tail != "auto" else "draws" if dataset.info.tail == "draws" else "ghost"
        own = batch_of(dataset)
        assert (own.input_ids == batch.input_ids).all()
        found = gradient(Learner(student, "fp32"), own, ObjectiveConfig(weights={"forward_kl": 1.0}), tail)
        squares, dot = _dot(found, found), _dot(found, full)
        row = {
            "targets": name,
            "degrees": math.degrees(math.acos(min(1.0, dot / length / math.sqrt(squares)))),
            "length": math.sqrt(squares) / length,
            "error": math.sqrt(max(0.0, length**2 + squares - 2 * dot)) / length,
        }
        measured.append(row)
        print(f"| {name} | {row['degrees']:.2f} | {row['length']:.3f} | {row['error']:.3f} |", flush=True)
    print(json.dumps({"benchmark": "angles", "rows": options.rows, "processor": machine(), "measured": measured}))
    return 0


def _dot(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    sys.exit(main())
